//! Device memory of our own: scratch for kernels and staging, and the kinds of allocation that applications use, for
//! tests and proofs.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{ffi::c_int, ptr, sync::Arc};

use cudarc::driver::sys as constants;

use super::{
    driver::{Context, cuda},
    error::GpuError,
    stream::Stream,
    sys::{AccessDescription, AllocationProperties, Location},
};

/// A `cudaMalloc` block.
pub struct DeviceBuffer {
    context: Arc<Context>,
    address: u64,
    len: usize,
}

impl DeviceBuffer {
    /// Allocates `len` bytes, which hold whatever was there.
    ///
    /// # Errors
    /// An empty length, or the driver's reasons.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Self, GpuError> {
        let _current = context.enter()?;
        let mut address = 0;
        // SAFETY: writes the address; freed once, in `drop`.
        unsafe { cuda!(context.calls(), cuMemAlloc_v2(&raw mut address, len)) }?;
        let context = Arc::clone(context);
        Ok(Self {
            context,
            address,
            len,
        })
    }

    /// Where it starts.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "CUDA allocates no empty block")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Its device's context.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Fills it from host memory and waits for it.
    ///
    /// # Errors
    /// The lengths differ, or the driver's reasons.
    pub fn write(&self, stream: &Stream, bytes: &[u8]) -> Result<(), GpuError> {
        if bytes.len() != self.len {
            return Err(GpuError::Misuse(
                "the bytes are not as many as the buffer's",
            ));
        }
        let source = bytes.as_ptr().expose_provenance() as u64;
        // SAFETY: both are alive until the stream is synchronised below.
        unsafe { stream.copy(self.address, source, self.len) }?;
        stream.synchronize()
    }

    /// Reads all of it into host memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self, stream: &Stream) -> Result<Vec<u8>, GpuError> {
        let mut bytes = vec![0_u8; self.len];
        let target = bytes.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: both are alive until the stream is synchronised below.
        unsafe { stream.copy(target, self.address, self.len) }?;
        stream.synchronize()?;
        Ok(bytes)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else {
            return;
        };
        // SAFETY: allocated in `new`, freed once. The driver waits for work that uses it.
        let result = unsafe { cuda!(self.context.calls(), cuMemFree_v2(self.address)) };
        if let Err(error) = result {
            tracing::debug!(%error, "a device buffer was not freed");
        }
    }
}

/// A virtual-memory allocation like those of torch's expandable segments: reserved addresses, backed by physical pieces
/// that can be shared by descriptor.
pub struct VirtualBuffer {
    context: Arc<Context>,
    address: u64,
    reserved: usize,
    piece_bytes: usize,
    mapped: usize,
}

impl VirtualBuffer {
    /// Reserves and backs `pieces` pieces of the driver's granularity times `granules`.
    ///
    /// # Errors
    /// A driver without virtual memory, or its reasons.
    pub fn new(context: &Arc<Context>, pieces: usize, granules: usize) -> Result<Self, GpuError> {
        let properties = properties(context);
        let granularity = granularity(context, &properties)?;
        let too_long = GpuError::Misuse("the allocation is longer than the address space");
        let piece_bytes = granularity.checked_mul(granules).ok_or(too_long.clone())?;
        let reserved = piece_bytes.checked_mul(pieces).ok_or(too_long)?;
        let address = reserve(context, reserved)?;
        let mut buffer = Self {
            context: Arc::clone(context),
            address,
            reserved,
            piece_bytes,
            mapped: 0,
        };
        for place in 0..pieces {
            let handle = create(context, piece_bytes, &properties)?;
            let mapped = map(
                context,
                address + (place * piece_bytes) as u64,
                piece_bytes,
                handle,
            );
            // The mapping keeps the piece.
            release(context, handle);
            mapped?;
            buffer.mapped += 1;
        }
        allow_access(context, address, reserved)?;
        Ok(buffer)
    }

    /// Where it starts.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "CUDA reserves no empty range")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.reserved
    }

    /// Bytes of each physical piece.
    #[must_use]
    pub fn piece_bytes(&self) -> usize {
        self.piece_bytes
    }
}

impl Drop for VirtualBuffer {
    fn drop(&mut self) {
        for place in 0..self.mapped {
            let at = self.address + (place * self.piece_bytes) as u64;
            unmap(&self.context, at, self.piece_bytes);
        }
        free_addresses(&self.context, self.address, self.reserved);
    }
}

/// Physical memory of the context's device that can be shared by descriptor and registered by RDMA devices.
pub(super) fn properties(context: &Context) -> AllocationProperties {
    AllocationProperties {
        kind: constants::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED as u32,
        handle_types: DESCRIPTOR,
        location: Location {
            kind: constants::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as u32,
            id: context.device(),
        },
        win32_meta_data: ptr::null_mut(),
        compression: 0,
        gpu_direct_rdma_capable: u8::from(context.facts().is_gpu_direct_virtual),
        usage: 0,
        reserved: [0; 4],
    }
}

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub(super) const DESCRIPTOR: u32 =
    constants::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.0;

/// A call that older drivers lack.
pub(super) fn known<T: Copy>(call: Option<T>, symbol: &'static str) -> Result<T, GpuError> {
    call.ok_or(GpuError::MissingSymbol { symbol })
}

/// The least length of a physical piece, in bytes.
pub(super) fn granularity(
    context: &Context,
    properties: &AllocationProperties,
) -> Result<usize, GpuError> {
    const OP: &str = "cuMemGetAllocationGranularity";
    const MINIMUM: u32 = 0;
    let call = known(context.calls().cuMemGetAllocationGranularity, OP)?;
    let mut bytes = 0;
    // SAFETY: reads the properties, writes one number.
    let code = unsafe { call(&raw mut bytes, properties, MINIMUM) };
    super::driver::check(context.calls(), OP, code)?;
    Ok(bytes)
}

fn create(
    context: &Context,
    len: usize,
    properties: &AllocationProperties,
) -> Result<u64, GpuError> {
    const OP: &str = "cuMemCreate";
    let call = known(context.calls().cuMemCreate, OP)?;
    let mut handle = 0;
    // SAFETY: reads the properties, writes a handle.
    let code = unsafe { call(&raw mut handle, len, properties, 0) };
    super::driver::check(context.calls(), OP, code)?;
    Ok(handle)
}

/// Gives a handle back; its memory lives as long as something is mapped to it.
pub(super) fn release(context: &Context, handle: u64) {
    let Some(call) = context.calls().cuMemRelease else {
        return;
    };
    // SAFETY: the caller owns the handle and gives it up.
    let code = unsafe { call(handle) };
    if code != 0 {
        tracing::debug!(code, "a physical piece was not released");
    }
}

/// Reserves addresses.
pub(super) fn reserve(context: &Context, len: usize) -> Result<u64, GpuError> {
    const OP: &str = "cuMemAddressReserve";
    let call = known(context.calls().cuMemAddressReserve, OP)?;
    let _current = context.enter()?;
    let mut address = 0;
    // SAFETY: writes an address.
    let code = unsafe { call(&raw mut address, len, 0, 0, 0) };
    super::driver::check(context.calls(), OP, code)?;
    Ok(address)
}

/// Gives reserved addresses back; nothing may be mapped there.
pub(super) fn free_addresses(context: &Context, address: u64, len: usize) {
    let Some(call) = context.calls().cuMemAddressFree else {
        return;
    };
    // SAFETY: the caller reserved the range and has unmapped all of it.
    let code = unsafe { call(address, len) };
    if code != 0 {
        tracing::debug!(code, "reserved addresses were not given back");
    }
}

/// Maps a physical piece at reserved addresses.
pub(super) fn map(
    context: &Context,
    address: u64,
    len: usize,
    handle: u64,
) -> Result<(), GpuError> {
    const OP: &str = "cuMemMap";
    let call = known(context.calls().cuMemMap, OP)?;
    // SAFETY: the caller reserved the range and owns the handle.
    let code = unsafe { call(address, len, 0, handle, 0) };
    super::driver::check(context.calls(), OP, code)
}

/// Takes a mapping away.
pub(super) fn unmap(context: &Context, address: u64, len: usize) {
    let (Some(call), Ok(_current)) = (context.calls().cuMemUnmap, context.enter()) else {
        return;
    };
    // SAFETY: the caller mapped the range, and nothing uses it any more.
    let code = unsafe { call(address, len) };
    if code != 0 {
        tracing::debug!(code, "a mapping was not taken away");
    }
}

/// Lets the context's device read and write a mapped range.
pub(super) fn allow_access(context: &Context, address: u64, len: usize) -> Result<(), GpuError> {
    const OP: &str = "cuMemSetAccess";
    let call = known(context.calls().cuMemSetAccess, OP)?;
    let device: c_int = context.device();
    let description = AccessDescription {
        location: Location {
            kind: constants::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as u32,
            id: device,
        },
        flags: constants::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE as u32,
    };
    // SAFETY: reads one description; the range is mapped by the caller.
    let code = unsafe { call(address, len, &raw const description, 1) };
    super::driver::check(context.calls(), OP, code)
}

/// A `cudaMallocAsync` allocation from the device's default pool.
pub struct PoolBuffer {
    context: Arc<Context>,
    address: u64,
}

impl PoolBuffer {
    /// Allocates `len` bytes and waits until they are there.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(stream: &Stream, len: usize) -> Result<Self, GpuError> {
        const OP: &str = "cuMemAllocAsync";
        let context = stream.context();
        let call = known(context.calls().cuMemAllocAsync, OP)?;
        let mut address = 0;
        let current = context.enter()?;
        // SAFETY: writes an address; freed once, in `drop`.
        let code = unsafe { call(&raw mut address, len, stream.raw()) };
        super::driver::check(context.calls(), OP, code)?;
        drop(current);
        let buffer = Self {
            context: Arc::clone(context),
            address,
        };
        stream.synchronize()?;
        Ok(buffer)
    }

    /// Where it starts.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for PoolBuffer {
    fn drop(&mut self) {
        let (Some(call), Ok(_current)) =
            (self.context.calls().cuMemFreeAsync, self.context.enter())
        else {
            return;
        };
        // SAFETY: allocated in `new`, freed once, in the default stream's order.
        let code = unsafe { call(self.address, ptr::null_mut()) };
        if code != 0 {
            tracing::debug!(code, "a pool allocation was not freed");
        }
    }
}
