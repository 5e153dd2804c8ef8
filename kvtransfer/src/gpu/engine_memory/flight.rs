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

/// A place in a flight.
pub(super) struct Mark {
    /// Bytes that have arrived when the event comes, counted from the flight's first.
    pub(super) bytes: u64,
    pub(super) event: Arc<Event>,
}

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

/// Copies between the host and a lane's buffer.
pub(super) struct CudaFlight {
    shared: Arc<Opened>,
    /// In order; the last is the end.
    marks: Vec<Mark>,
    _host: Arc<Region>,
}

impl CudaFlight {
    pub(super) fn new(shared: &Arc<Opened>, marks: Vec<Mark>, host: &Arc<Region>) -> Self {
        Self {
            shared: Arc::clone(shared),
            marks,
            _host: Arc::clone(host),
        }
    }
}

impl Flight for CudaFlight {
    fn wait(&self, bytes: u64) -> Result<(), DeviceError> {
        let first = self.marks.iter().find(|mark| mark.bytes >= bytes);
        let Some(Mark { event, .. }) = first.or(self.marks.last()) else {
            return Ok(());
        };
        let arrived = is_done_soon(event).and_then(|is_done| match is_done {
            true => Ok(()),
            false => event.synchronize(),
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
            .field("copies", &self.marks.len())
            .finish_non_exhaustive()
    }
}
