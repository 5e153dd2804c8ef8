//! Bytes on their way between pinned memory and a lane's buffer on the GPU.
#![forbid(unsafe_code)]

use std::{fmt, sync::Arc, thread};

use super::Opened;
use crate::{
    clock,
    gpu::{Event, GpuError},
    memory::{
        Region,
        device::{DeviceError, Flight},
    },
};

/// Bytes of a part of a flight: what a wire takes in some 100 µs, and PCIe in 20.
pub(super) const PART_BYTES: u64 = 1 << 20;

/// How long a thread looks for the end of a copy before it sleeps, in nanoseconds: most copies of a batch are over by then,
/// and being woken takes some 50 µs.
const LOOK_NANOS: u64 = 300_000;

/// Whether an event comes within the time in which looking is cheaper than sleeping.
pub(super) fn is_done_soon(event: &Event) -> Result<bool, GpuError> {
    let end = clock::now().nanos() + LOOK_NANOS;
    while !event.is_done()? {
        if clock::now().nanos() > end {
            return Ok(false);
        }
        thread::yield_now();
    }
    Ok(true)
}

/// Parts of [`PART_BYTES`] between the host and a lane's buffer.
pub(super) struct CudaFlight {
    shared: Arc<Opened>,
    marks: Vec<Arc<Event>>,
    _host: Arc<Region>,
}

impl CudaFlight {
    pub(super) fn new(shared: &Arc<Opened>, marks: Vec<Arc<Event>>, host: &Arc<Region>) -> Self {
        Self {
            shared: Arc::clone(shared),
            marks,
            _host: Arc::clone(host),
        }
    }
}

impl Flight for CudaFlight {
    fn wait(&self, bytes: u64) -> Result<(), DeviceError> {
        let parts = usize::try_from(bytes.div_ceil(PART_BYTES)).unwrap_or(usize::MAX);
        let last = parts.min(self.marks.len()).checked_sub(1);
        let Some(mark) = last.and_then(|last| self.marks.get(last)) else {
            return Ok(());
        };
        let arrived = is_done_soon(mark).and_then(|is_done| match is_done {
            true => Ok(()),
            false => mark.synchronize(),
        });
        arrived.map_err(|error| {
            self.shared
                .refused("copying between host and device", &error)
        })
    }
}

impl fmt::Debug for CudaFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaFlight")
            .field("parts", &self.marks.len())
            .finish_non_exhaustive()
    }
}
