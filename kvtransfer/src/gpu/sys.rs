//! libcuda's calls as a table, and the few structs of `cuda.h` that they take.
//!
//! cudarc finds and opens the library ([`driver::is_culib_present`], [`driver::culib`]) and its constants are used
//! everywhere. Its functions are not: they panic where a symbol is missing, and they return a Rust enum, for which a
//! code that a newer driver made up is undefined behaviour. Here a result is a number.
#![expect(unsafe_code, reason = "symbols are looked up by name and given a type")]

use std::{
    ffi::{c_char, c_int, c_uint, c_ulonglong, c_void},
    sync::OnceLock,
};

use cudarc::driver::sys as driver;

use super::error::GpuError;

/// `CUresult`; zero is success.
pub(crate) type Code = c_uint;
/// `CUdeviceptr`.
pub(crate) type Address = u64;
/// `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`: pointers to what only the driver knows.
pub(crate) type Opaque = *mut c_void;

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IpcHandle(pub(crate) [u8; 64]);

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    /// `CUmemLocationType`.
    pub(crate) kind: c_uint,
    /// A device's ordinal.
    pub(crate) id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllocationProperties {
    /// `CUmemAllocationType`.
    pub(crate) kind: c_uint,
    /// `CUmemAllocationHandleType`, a set of bits.
    pub(crate) handle_types: c_uint,
    /// Where it lies.
    pub(crate) location: Location,
    pub(crate) win32_meta_data: *mut c_void,
    pub(crate) compression: u8,
    pub(crate) gpu_direct_rdma_capable: u8,
    pub(crate) usage: u16,
    pub(crate) reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AccessDescription {
    /// Who may access.
    pub(crate) location: Location,
    /// `CUmemAccess_flags`.
    pub(crate) flags: c_uint,
}

// cudarc's bindings are generated from NVIDIA's header.
const _: () = {
    assert!(size_of::<IpcHandle>() == size_of::<driver::CUipcMemHandle>());
    assert!(size_of::<Location>() == size_of::<driver::CUmemLocation>());
    assert!(size_of::<AllocationProperties>() == size_of::<driver::CUmemAllocationProp>());
    assert!(size_of::<AccessDescription>() == size_of::<driver::CUmemAccessDesc>());
    assert!(size_of::<Address>() == size_of::<driver::CUdeviceptr>());
    assert!(size_of::<Opaque>() == size_of::<driver::CUstream>());
};

/// Declares the table and how it is filled.
macro_rules! call_table {
    (
        required { $($(#[$doc:meta])* $symbol:ident: fn($($argument:ty),*);)* }
        optional { $($(#[$optional_doc:meta])* $optional:ident: fn($($optional_argument:ty),*);)* }
    ) => {
        /// The calls of libcuda. Their contracts are those of `cuda.h`; each returns a [`Code`].
        #[expect(non_snake_case, reason = "the names are the library's")]
        pub(crate) struct Calls {
            $($(#[$doc])* pub(crate) $symbol: unsafe extern "C" fn($($argument),*) -> Code,)*
            $($(#[$optional_doc])* pub(crate) $optional: Option<unsafe extern "C" fn($($optional_argument),*) -> Code>,)*
        }

        impl Calls {
            fn load(library: &Opened) -> Result<Self, GpuError> {
                Ok(Self {
                    $($symbol: {
                        // SAFETY: cuda.h declares the symbol with this type.
                        let found = unsafe { library.symbol(concat!(stringify!($symbol), "\0")) };
                        found.ok_or(GpuError::MissingSymbol { symbol: stringify!($symbol) })?
                    },)*
                    $($optional: {
                        // SAFETY: cuda.h declares the symbol with this type.
                        unsafe { library.symbol(concat!(stringify!($optional), "\0")) }
                    },)*
                })
            }
        }
    };
}

call_table! {
    required {
        /// Flags: none are defined.
        cuInit: fn(c_uint);
        /// 1000 × major + 10 × minor.
        cuDriverGetVersion: fn(*mut c_int);
        cuGetErrorName: fn(Code, *mut *const c_char);
        cuGetErrorString: fn(Code, *mut *const c_char);
        cuDeviceGetCount: fn(*mut c_int);
        cuDeviceGet: fn(*mut c_int, c_int);
        cuDeviceGetName: fn(*mut c_char, c_int, c_int);
        cuDeviceGetAttribute: fn(*mut c_int, c_uint, c_int);
        cuDeviceTotalMem_v2: fn(*mut usize, c_int);
        /// Free and total bytes of the current context's device.
        cuMemGetInfo_v2: fn(*mut usize, *mut usize);
        cuDeviceGetPCIBusId: fn(*mut c_char, c_int, c_int);
        cuDeviceGetUuid_v2: fn(*mut [u8; 16], c_int);
        cuDeviceCanAccessPeer: fn(*mut c_int, c_int, c_int);
        cuDevicePrimaryCtxRetain: fn(*mut Opaque, c_int);
        cuDevicePrimaryCtxRelease_v2: fn(c_int);
        cuCtxPushCurrent_v2: fn(Opaque);
        cuCtxPopCurrent_v2: fn(*mut Opaque);
        cuCtxEnablePeerAccess: fn(Opaque, c_uint);
        /// Least, greatest (numerically lower) priority.
        cuCtxGetStreamPriorityRange: fn(*mut c_int, *mut c_int);
        cuStreamCreateWithPriority: fn(*mut Opaque, c_uint, c_int);
        cuStreamDestroy_v2: fn(Opaque);
        cuStreamSynchronize: fn(Opaque);
        cuStreamQuery: fn(Opaque);
        cuStreamWaitEvent: fn(Opaque, Opaque, c_uint);
        cuEventCreate: fn(*mut Opaque, c_uint);
        cuEventRecord: fn(Opaque, Opaque);
        cuEventQuery: fn(Opaque);
        cuEventSynchronize: fn(Opaque);
        cuEventElapsedTime: fn(*mut f32, Opaque, Opaque);
        cuEventDestroy_v2: fn(Opaque);
        cuMemAlloc_v2: fn(*mut Address, usize);
        cuMemFree_v2: fn(Address);
        /// Destination, source, bytes, stream; unified addresses say what lies where.
        cuMemcpyAsync: fn(Address, Address, usize, Opaque);
        cuMemsetD8Async: fn(Address, u8, usize, Opaque);
        cuMemHostAlloc: fn(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost: fn(*mut c_void);
        cuMemHostRegister_v2: fn(*mut c_void, usize, c_uint);
        cuMemHostUnregister: fn(*mut c_void);
        cuMemHostGetDevicePointer_v2: fn(*mut Address, *mut c_void, c_uint);
        cuMemGetAddressRange_v2: fn(*mut Address, *mut usize, Address);
        cuPointerGetAttribute: fn(*mut c_void, c_uint, Address);
        cuIpcGetMemHandle: fn(*mut IpcHandle, Address);
        cuIpcOpenMemHandle_v2: fn(*mut Address, IpcHandle, c_uint);
        cuIpcCloseMemHandle: fn(Address);
        cuModuleLoadDataEx: fn(*mut Opaque, *const c_void, c_uint, *mut c_uint, *mut *mut c_void);
        cuModuleUnload: fn(Opaque);
        cuModuleGetFunction: fn(*mut Opaque, Opaque, *const c_char);
        cuFuncSetAttribute: fn(Opaque, c_uint, c_int);
        /// Function, grid, block, dynamic shared memory, stream, parameters, extra.
        cuLaunchKernel: fn(
            Opaque, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Opaque, *mut *mut c_void, *mut *mut c_void
        );
    }
    optional {
        cuMemCreate: fn(*mut u64, usize, *const AllocationProperties, c_ulonglong);
        cuMemRelease: fn(u64);
        cuMemGetAllocationGranularity: fn(*mut usize, *const AllocationProperties, c_uint);
        cuMemRetainAllocationHandle: fn(*mut u64, *mut c_void);
        cuMemAddressReserve: fn(*mut Address, usize, usize, Address, c_ulonglong);
        cuMemAddressFree: fn(Address, usize);
        cuMemMap: fn(Address, usize, usize, u64, c_ulonglong);
        cuMemUnmap: fn(Address, usize);
        cuMemSetAccess: fn(Address, usize, *const AccessDescription, usize);
        cuMemExportToShareableHandle: fn(*mut c_void, u64, c_uint, c_ulonglong);
        cuMemImportFromShareableHandle: fn(*mut u64, *mut c_void, c_uint);
        /// Handle, address, bytes, handle type, flags (since CUDA 11.7).
        cuMemGetHandleForAddressRange: fn(*mut c_void, Address, usize, c_uint, c_ulonglong);
        /// Target, scope (since CUDA 11.3).
        cuFlushGPUDirectRDMAWrites: fn(c_uint, c_uint);
        cuMemAllocAsync: fn(*mut Address, usize, Opaque);
        cuMemFreeAsync: fn(Address, Opaque);
    }
}

/// libcuda, open for the life of the process.
struct Opened(());

impl Opened {
    /// Finds and opens libcuda. `None` where there is none.
    fn open() -> Option<Self> {
        // SAFETY: loading libcuda runs its constructors, which may run on any thread.
        let is_present = unsafe { driver::is_culib_present() };
        is_present.then_some(Self(()))
    }

    /// Looks a symbol up and gives it the type `T`.
    ///
    /// # Safety
    /// `T` must be the function-pointer type that `cuda.h` declares for `name`, which ends with a zero byte.
    unsafe fn symbol<T: Copy>(&self, name: &str) -> Option<T> {
        // SAFETY: `open` has seen that the library loads, and its absence is all that makes this panic.
        let library = unsafe { driver::culib() };
        // SAFETY: the caller vouches for the type.
        let found = unsafe { library.get::<T>(name.as_bytes()) };
        found.ok().map(|symbol| *symbol)
    }
}

/// The host's libcuda, opened once per process and never closed. A failure is not kept: the next call tries again.
///
/// # Errors
/// [`GpuError::NoDriver`] or [`GpuError::MissingSymbol`].
pub(crate) fn calls() -> Result<&'static Calls, GpuError> {
    static OPENED: OnceLock<Calls> = OnceLock::new();
    if let Some(calls) = OPENED.get() {
        return Ok(calls);
    }
    let library = Opened::open().ok_or(GpuError::NoDriver)?;
    let loaded = Calls::load(&library)?;
    Ok(OPENED.get_or_init(|| loaded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_libcuda_everything_says_so_and_nothing_panics() {
        match calls() {
            Ok(_) => assert!(calls().is_ok(), "what was opened stays open"),
            Err(error) => {
                assert_eq!(error, GpuError::NoDriver);
                assert!(error.to_string().contains("libcuda"), "{error}");
            }
        }
    }
}
