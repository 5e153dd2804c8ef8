//! Streams and events, ours and those of applications.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{ffi::c_int, ptr, sync::Arc};

use cudarc::driver::sys as constants;

use super::{
    driver::{Context, cuda},
    error::GpuError,
    sys::Opaque,
};

/// `CUDA_ERROR_NOT_READY`: no failure, the work is not done yet.
const NOT_READY: u32 = constants::CUresult::CUDA_ERROR_NOT_READY as u32;

/// How urgent a stream's work is next to that of other streams of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Priority {
    /// Behind everything: blocks of other streams are placed first. What copies use beside a model.
    #[default]
    Low,
    /// Before streams of the default priority.
    High,
}

/// A stream's handle of somebody else, as an integer (`torch.cuda.Stream.cuda_stream`). Zero is the legacy default
/// stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream(pub u64);

/// An event's handle of somebody else, as an integer (`torch.cuda.Event.cuda_event`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawEvent(pub u64);

fn opaque(handle: u64) -> Result<Opaque, GpuError> {
    let address = usize::try_from(handle)
        .map_err(|_| GpuError::Misuse("a CUDA handle is not within the address space"))?;
    Ok(ptr::with_exposed_provenance_mut(address))
}

/// A stream of ours. It never waits for the legacy default stream.
pub struct Stream {
    context: Arc<Context>,
    raw: Opaque,
}

// SAFETY: the driver's calls on a stream may be made from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Makes a stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(context: &Arc<Context>, priority: Priority) -> Result<Self, GpuError> {
        let calls = context.calls();
        let _current = context.enter()?;
        let (mut least, mut greatest): (c_int, c_int) = (0, 0);
        // SAFETY: writes two numbers.
        unsafe {
            cuda!(
                calls,
                cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)
            )
        }?;
        let priority = match priority {
            Priority::Low => least,
            Priority::High => greatest,
        };
        let flags = constants::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut raw = ptr::null_mut();
        // SAFETY: writes the stream, which `drop` destroys.
        unsafe {
            cuda!(
                calls,
                cuStreamCreateWithPriority(&raw mut raw, flags, priority)
            )
        }?;
        let context = Arc::clone(context);
        Ok(Self { context, raw })
    }

    /// Its device's context.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Its handle, for libraries that take one.
    #[must_use]
    pub fn raw_stream(&self) -> RawStream {
        RawStream(self.raw.expose_provenance() as u64)
    }

    /// Marks the place in the stream that `event` then stands for.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, event: &Event) -> Result<(), GpuError> {
        let _current = self.context.enter()?;
        // SAFETY: both live; a stream and an event of different devices are refused.
        unsafe { cuda!(self.context.calls(), cuEventRecord(event.raw, self.raw)) }
    }

    /// What is enqueued from now on starts after `event`, on whatever stream and device it was recorded.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self, event: &Event) -> Result<(), GpuError> {
        let _current = self.context.enter()?;
        // SAFETY: both live; the driver keeps what it needs of the event.
        unsafe {
            cuda!(
                self.context.calls(),
                cuStreamWaitEvent(self.raw, event.raw, 0)
            )
        }
    }

    /// As [`Self::wait`], for an application's event.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The handle must be that of a live event of this process for the length of the call.
    pub unsafe fn wait_foreign(&self, event: RawEvent) -> Result<(), GpuError> {
        let event = opaque(event.0)?;
        let _current = self.context.enter()?;
        // SAFETY: the caller vouches for the event.
        unsafe { cuda!(self.context.calls(), cuStreamWaitEvent(self.raw, event, 0)) }
    }

    /// Copies between any two addresses that CUDA knows (device, peer device, pinned host), in stream order.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// Both ranges must stay mapped until the stream has passed the copy; the target must be the caller's to write.
    pub unsafe fn copy(&self, target: u64, source: u64, len: usize) -> Result<(), GpuError> {
        if len == 0 {
            return Ok(());
        }
        let _current = self.context.enter()?;
        // SAFETY: the caller vouches for both ranges.
        unsafe {
            cuda!(
                self.context.calls(),
                cuMemcpyAsync(target, source, len, self.raw)
            )
        }
    }

    /// Sets `len` bytes, in stream order.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The range must stay mapped until the stream has passed this, and be the caller's to write.
    pub unsafe fn fill(&self, target: u64, value: u8, len: usize) -> Result<(), GpuError> {
        let _current = self.context.enter()?;
        // SAFETY: the caller vouches for the range.
        unsafe {
            cuda!(
                self.context.calls(),
                cuMemsetD8Async(target, value, len, self.raw)
            )
        }
    }

    /// Waits for everything enqueued so far on this stream, and for nothing else.
    ///
    /// # Errors
    /// The driver's, also those of the work itself.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        let _current = self.context.enter()?;
        // SAFETY: the stream lives.
        unsafe { cuda!(self.context.calls(), cuStreamSynchronize(self.raw)) }
    }

    /// Whether everything enqueued so far is done.
    ///
    /// # Errors
    /// The driver's, also those of the work itself.
    pub fn is_idle(&self) -> Result<bool, GpuError> {
        let _current = self.context.enter()?;
        // SAFETY: the stream lives.
        let answer = unsafe { cuda!(self.context.calls(), cuStreamQuery(self.raw)) };
        done(answer)
    }

    pub(super) fn raw(&self) -> Opaque {
        self.raw
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else {
            return;
        };
        // SAFETY: made in `new`, destroyed once; work still enqueued is finished by the driver.
        let result = unsafe { cuda!(self.context.calls(), cuStreamDestroy_v2(self.raw)) };
        if let Err(error) = result {
            tracing::debug!(%error, "a stream was not destroyed");
        }
    }
}

/// What an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A waiting thread spins: some microseconds, and a core.
    Spin,
    /// A waiting thread sleeps.
    Sleep,
    /// As [`Self::Spin`], and it can be asked for time.
    Timing,
}

/// An event of ours.
pub struct Event {
    context: Arc<Context>,
    raw: Opaque,
}

// SAFETY: the driver's calls on an event may be made from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Makes an event. Until it is recorded it counts as done.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(context: &Arc<Context>, kind: EventKind) -> Result<Self, GpuError> {
        let flags = match kind {
            EventKind::Spin => constants::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32,
            EventKind::Sleep => {
                constants::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32
                    | constants::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32
            }
            EventKind::Timing => 0,
        };
        let _current = context.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes the event, which `drop` destroys.
        unsafe { cuda!(context.calls(), cuEventCreate(&raw mut raw, flags)) }?;
        let context = Arc::clone(context);
        Ok(Self { context, raw })
    }

    /// Marks a place in an application's stream, so that a stream of ours can wait for it.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// The handle must be that of a live stream of this event's device for the length of the call.
    pub unsafe fn record_on(&self, stream: RawStream) -> Result<(), GpuError> {
        let stream = opaque(stream.0)?;
        let _current = self.context.enter()?;
        // SAFETY: the caller vouches for the stream.
        unsafe { cuda!(self.context.calls(), cuEventRecord(self.raw, stream)) }
    }

    /// Its handle, for engines and libraries that take one.
    #[must_use]
    pub fn raw_event(&self) -> RawEvent {
        RawEvent(self.raw.expose_provenance() as u64)
    }

    /// Whether what it was recorded behind is done.
    ///
    /// # Errors
    /// The driver's, also those of the work itself.
    pub fn is_done(&self) -> Result<bool, GpuError> {
        let _current = self.context.enter()?;
        // SAFETY: the event lives.
        let answer = unsafe { cuda!(self.context.calls(), cuEventQuery(self.raw)) };
        done(answer)
    }

    /// Waits until what it was recorded behind is done.
    ///
    /// # Errors
    /// The driver's, also those of the work itself.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        let _current = self.context.enter()?;
        // SAFETY: the event lives.
        unsafe { cuda!(self.context.calls(), cuEventSynchronize(self.raw)) }
    }

    /// Milliseconds from `earlier` to this, both of [`EventKind::Timing`] and done.
    ///
    /// # Errors
    /// The driver's.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f32, GpuError> {
        let _current = self.context.enter()?;
        let mut elapsed = 0.0;
        // SAFETY: both events live; writes one number.
        unsafe {
            cuda!(
                self.context.calls(),
                cuEventElapsedTime(&raw mut elapsed, earlier.raw, self.raw)
            )
        }?;
        Ok(elapsed)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else {
            return;
        };
        // SAFETY: made in `new`, destroyed once.
        let result = unsafe { cuda!(self.context.calls(), cuEventDestroy_v2(self.raw)) };
        if let Err(error) = result {
            tracing::debug!(%error, "an event was not destroyed");
        }
    }
}

/// Reads "not ready" as no.
fn done(answer: Result<(), GpuError>) -> Result<bool, GpuError> {
    match answer {
        Ok(()) => Ok(true),
        Err(error) if error.code() == Some(NOT_READY) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_ready_is_an_answer_and_everything_else_an_error() {
        let failed = |code| {
            Err(GpuError::Cuda {
                op: "cuEventQuery",
                code,
                name: String::new(),
                text: String::new(),
            })
        };
        assert_eq!(done(Ok(())), Ok(true));
        assert_eq!(done(failed(600)), Ok(false));
        assert!(done(failed(700)).is_err());
    }
}
