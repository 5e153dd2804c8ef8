//! Events of an application that a chunk waits for.
#![expect(unsafe_code, reason = "takes handles of the application's")]

use std::{
    fmt,
    sync::{Arc, PoisonError},
};

use super::Opened;
use crate::{
    gpu::{Event, EventKind, GpuError, Priority, RawEvent, Stream},
    memory::device::{Awaited, DeviceError},
};

/// Most streams that are kept for the next event.
const IDLE_STREAMS_MAX: usize = 64;

/// What an application's event stood for when it was handed over: a stream of ours waits for it, and an event of ours stands
/// behind that. So the application may record its own anew at once, as torch does.
pub(super) struct CudaAwaited {
    shared: Arc<Opened>,
    /// Goes back to the others when this is dropped.
    stream: Option<Stream>,
    behind: Event,
}

impl CudaAwaited {
    pub(super) fn new(shared: &Arc<Opened>, event: u64) -> Result<Self, GpuError> {
        let behind = Event::new(&shared.context, EventKind::Sleep)?;
        let idle = shared.idle_streams.lock();
        let idle = idle.unwrap_or_else(PoisonError::into_inner).pop();
        let stream = match idle {
            Some(stream) => stream,
            None => Stream::new(&shared.context, Priority::High)?,
        };
        // SAFETY: the caller of the engine says that the event lives during the call.
        unsafe { stream.wait_foreign(RawEvent(event)) }?;
        stream.record(&behind)?;
        Ok(Self {
            shared: Arc::clone(shared),
            stream: Some(stream),
            behind,
        })
    }
}

impl Awaited for CudaAwaited {
    fn is_done(&self) -> Result<bool, DeviceError> {
        let is_done = self.behind.is_done();
        is_done.map_err(|error| self.shared.refused("waiting for an event", &error))
    }
}

impl Drop for CudaAwaited {
    fn drop(&mut self) {
        // One that still waits would hold up the next event.
        let is_idle = self.behind.is_done().unwrap_or(false);
        let Some(stream) = self.stream.take().filter(|_| is_idle) else {
            return;
        };
        let idle = self.shared.idle_streams.lock();
        let mut idle = idle.unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_STREAMS_MAX {
            idle.push(stream);
        }
    }
}

impl fmt::Debug for CudaAwaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaAwaited")
            .field("device", &self.shared.name)
            .finish_non_exhaustive()
    }
}
