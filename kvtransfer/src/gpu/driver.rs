//! The driver and its contexts: what every other file of this module stands on.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{
    ffi::{CStr, c_char, c_int},
    marker::PhantomData,
    ptr,
    sync::Arc,
};

use super::{
    device::{self, DeviceFacts},
    error::GpuError,
    sys::{self, Calls, Code, Opaque},
};

/// Most GPUs of a host that are looked at; the largest servers sold have 16, racks of one address space 72.
pub const DEVICES_MAX: u32 = 128;

/// The CUDA driver of this host, initialised.
#[derive(Clone, Copy)]
pub struct Driver {
    calls: &'static Calls,
}

impl Driver {
    /// Opens and initialises libcuda. Cheap when repeated.
    ///
    /// # Errors
    /// [`GpuError::NoDriver`] where it is not installed, and CUDA's own reasons, such as no visible GPU.
    pub fn open() -> Result<Self, GpuError> {
        let calls = sys::calls()?;
        // SAFETY: may be called on any thread, any number of times.
        let code = unsafe { (calls.cuInit)(0) };
        check(calls, "cuInit", code)?;
        Ok(Self { calls })
    }

    /// The newest CUDA release that the driver speaks, as (major, minor).
    ///
    /// # Errors
    /// The driver's.
    pub fn version(self) -> Result<(u32, u32), GpuError> {
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { (self.calls.cuDriverGetVersion)(&raw mut version) };
        check(self.calls, "cuDriverGetVersion", code)?;
        let version = version.unsigned_abs();
        Ok((version / 1000, version % 1000 / 10))
    }

    /// How many GPUs this process may use, at most [`DEVICES_MAX`].
    ///
    /// # Errors
    /// The driver's.
    pub fn device_count(self) -> Result<u32, GpuError> {
        let mut count = 0;
        // SAFETY: writes one number.
        let code = unsafe { (self.calls.cuDeviceGetCount)(&raw mut count) };
        check(self.calls, "cuDeviceGetCount", code)?;
        Ok(u32::try_from(count).unwrap_or(0).min(DEVICES_MAX))
    }

    /// What there is to know about each GPU.
    ///
    /// # Errors
    /// The driver's.
    pub fn devices(self) -> Result<Vec<DeviceFacts>, GpuError> {
        (0..self.device_count()?)
            .map(|ordinal| device::facts(self, ordinal))
            .collect()
    }

    /// The driver's handle of a device.
    pub(super) fn handle(self, ordinal: u32) -> Result<c_int, GpuError> {
        let ordinal = c_int::try_from(ordinal)
            .map_err(|_| GpuError::Misuse("a GPU's ordinal is a small number"))?;
        let mut device = 0;
        // SAFETY: writes one number.
        let code = unsafe { (self.calls.cuDeviceGet)(&raw mut device, ordinal) };
        check(self.calls, "cuDeviceGet", code)?;
        Ok(device)
    }

    pub(super) fn calls(self) -> &'static Calls {
        self.calls
    }
}

/// Turns a code into an error with CUDA's name and text.
pub(super) fn check(calls: &Calls, op: &'static str, code: Code) -> Result<(), GpuError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: writes a pointer to a string of the library's, or refuses an unknown code.
    let name = unsafe { told(calls.cuGetErrorName, code) };
    // SAFETY: as above.
    let text = unsafe { told(calls.cuGetErrorString, code) };
    Err(GpuError::Cuda {
        op,
        code,
        name: name.unwrap_or_else(|| "an unknown code".to_owned()),
        text: text.unwrap_or_else(|| "the driver has no words for it".to_owned()),
    })
}

/// A string of the driver's about a code.
///
/// # Safety
/// `ask` must be `cuGetErrorName` or `cuGetErrorString`.
unsafe fn told(
    ask: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
    about: Code,
) -> Option<String> {
    let mut text = ptr::null();
    // SAFETY: writes one pointer, by the caller's word.
    let code = unsafe { ask(about, &raw mut text) };
    if code != 0 || text.is_null() {
        return None;
    }
    // SAFETY: the library's strings are static and end with a zero.
    let text = unsafe { CStr::from_ptr(text) };
    Some(text.to_string_lossy().into_owned())
}

/// Runs a call of the table and turns its code into a result.
macro_rules! cuda {
    ($calls:expr, $symbol:ident($($argument:expr),* $(,)?)) => {{
        let calls: &$crate::gpu::sys::Calls = $calls;
        let code = (calls.$symbol)($($argument),*);
        $crate::gpu::driver::check(calls, stringify!($symbol), code)
    }};
}
pub(super) use cuda;

/// The same for a call that older drivers lack.
macro_rules! cuda_optional {
    ($calls:expr, $symbol:ident($($argument:expr),* $(,)?)) => {{
        let calls: &$crate::gpu::sys::Calls = $calls;
        match calls.$symbol {
            Some(call) => {
                let code = call($($argument),*);
                $crate::gpu::driver::check(calls, stringify!($symbol), code)
            }
            None => Err($crate::gpu::GpuError::MissingSymbol { symbol: stringify!($symbol) }),
        }
    }};
}
pub(super) use cuda_optional;

/// The primary context of a device: the one that the runtime API, and so torch, uses. It is kept as long as this lives.
pub struct Context {
    driver: Driver,
    device: c_int,
    raw: Opaque,
    facts: DeviceFacts,
}

// SAFETY: the driver's calls on a context may be made from any thread; the handle is only passed to them.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of the GPU `ordinal`, as this process counts them.
    ///
    /// # Errors
    /// [`GpuError::NoDriver`], no such GPU, or the driver's reasons.
    pub fn primary(ordinal: u32) -> Result<Arc<Self>, GpuError> {
        let driver = Driver::open()?;
        let device = driver.handle(ordinal)?;
        let facts = device::facts(driver, ordinal)?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes the context; it is released once, in `drop`.
        unsafe { cuda!(driver.calls, cuDevicePrimaryCtxRetain(&raw mut raw, device)) }?;
        Ok(Arc::new(Self {
            driver,
            device,
            raw,
            facts,
        }))
    }

    /// Makes it current on this thread until the guard is dropped, which puts the previous one back.
    ///
    /// # Errors
    /// The driver's, after a fatal error for instance.
    pub fn enter(&self) -> Result<Current<'_>, GpuError> {
        // SAFETY: the context is retained by `self`, which the guard borrows.
        unsafe { cuda!(self.calls(), cuCtxPushCurrent_v2(self.raw)) }?;
        Ok(Current {
            context: self,
            thread_bound: PhantomData,
        })
    }

    /// The device's number in this process.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.facts.ordinal
    }

    /// What there is to know about its device.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    pub(super) fn driver(&self) -> Driver {
        self.driver
    }

    pub(super) fn calls(&self) -> &'static Calls {
        self.driver.calls
    }

    pub(super) fn device(&self) -> c_int {
        self.device
    }

    pub(super) fn raw(&self) -> Opaque {
        self.raw
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, in `primary`.
        let released = unsafe { cuda!(self.calls(), cuDevicePrimaryCtxRelease_v2(self.device)) };
        if let Err(error) = released {
            tracing::debug!(%error, "a context was not released");
        }
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("ordinal", &self.facts.ordinal)
            .field("pci_address", &self.facts.pci_address)
            .finish_non_exhaustive()
    }
}

/// A context is current on this thread.
#[must_use = "the context is current only while this lives"]
pub struct Current<'a> {
    context: &'a Context,
    /// A thread's stack of contexts is its own.
    thread_bound: PhantomData<*mut ()>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: pops what `enter` pushed on this thread; guards cannot leave it.
        let result = unsafe { cuda!(self.context.calls(), cuCtxPopCurrent_v2(&raw mut popped)) };
        if let Err(error) = result {
            tracing::debug!(%error, "a context was not popped");
        }
    }
}
