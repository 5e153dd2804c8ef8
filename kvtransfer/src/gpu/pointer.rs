//! What a pointer points to: which kind of allocation, whose, how long, and what can be done with it.
//!
//! The memory is an application's (torch): `cudaMalloc` blocks by default, pools with `cudaMallocAsync`, reserved
//! addresses backed piece by piece with expandable segments. What can be exported differs by kind.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::ffi::c_uint;

use cudarc::driver::sys::CUpointer_attribute as Attribute;
use serde::{Deserialize, Serialize};

use super::{
    driver::{Context, cuda},
    error::GpuError,
};

/// How memory was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MemoryKind {
    /// `cudaMalloc`: one block, shared by an IPC handle.
    Plain,
    /// `cudaMallocAsync`: from a pool; shared only through its pool, if that was made for it.
    Pool,
    /// `cuMemCreate` + `cuMemMap` (expandable segments): addresses backed by physical pieces, shared by descriptors if they were
    /// made for it.
    Virtual,
    /// `cudaMallocManaged`: moves between host and device.
    Managed,
    /// Pinned host memory that CUDA knows.
    PinnedHost,
    /// Nothing that CUDA knows: ordinary host memory.
    NotCuda,
    /// Device memory of a kind that this module does not know, such as a mapping of another process's.
    OtherDevice,
}

impl MemoryKind {
    /// In words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Plain => "cudaMalloc memory",
            Self::Pool => "cudaMallocAsync pool memory",
            Self::Virtual => "virtual-memory (expandable) allocation",
            Self::Managed => "managed memory",
            Self::PinnedHost => "pinned host memory",
            Self::NotCuda => "ordinary host memory",
            Self::OtherDevice => "device memory of another process or of an unknown kind",
        }
    }

    /// Whether it lies on a device, so that copies need CUDA.
    #[must_use]
    pub fn is_device(self) -> bool {
        matches!(
            self,
            Self::Plain | Self::Pool | Self::Virtual | Self::Managed | Self::OtherDevice
        )
    }
}

/// What CUDA knows about a pointer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointerFacts {
    /// How it was allocated.
    pub kind: MemoryKind,
    /// The GPU that it lies on, as this process counts them.
    pub device: Option<u32>,
    /// Start of the allocation; of the reserved range for [`MemoryKind::Virtual`]. Zero for [`MemoryKind::NotCuda`].
    pub base: u64,
    /// Bytes of the allocation from `base`.
    pub len: u64,
    /// A number that no other allocation of this process ever has: the allocation's generation.
    pub allocation: u64,
    /// Whether RDMA devices can register it.
    pub is_gpu_direct: bool,
    /// Whether its kind has IPC handles.
    pub has_ipc_handle: bool,
    /// The handle types that it was made for (`CUmemAllocationHandleType` bits; 1 is a POSIX descriptor).
    pub handle_types: u32,
}

impl PointerFacts {
    /// Whether `len` bytes at `pointer` lie within the allocation.
    #[must_use]
    pub fn holds(&self, pointer: u64, len: u64) -> bool {
        pointer >= self.base
            && pointer
                .checked_add(len)
                .is_some_and(|end| end - self.base <= self.len)
    }
}

/// Asks CUDA about a pointer. Any number may be asked about.
///
/// # Errors
/// The driver's, but for pointers that CUDA does not know: those are [`MemoryKind::NotCuda`].
pub fn inspect(context: &Context, pointer: u64) -> Result<PointerFacts, GpuError> {
    let _current = context.enter()?;
    let number = |which| number(context, which, pointer);
    let Some(memory_type) = number(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE)? else {
        return Ok(PointerFacts {
            kind: MemoryKind::NotCuda,
            device: None,
            base: 0,
            len: 0,
            allocation: 0,
            is_gpu_direct: false,
            has_ipc_handle: false,
            handle_types: 0,
        });
    };
    let is_set = |which| Ok::<_, GpuError>(number(which)?.unwrap_or(0) != 0);
    let seen = Seen {
        is_host: memory_type == 1,
        is_managed: is_set(Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED)?,
        is_pooled: is_set(Attribute::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE)?,
        has_ipc_handle: is_set(Attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE)?,
        is_virtual: is_virtual(context, pointer),
    };
    let device = number(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)?;
    let kind = seen.kind();
    let handle_types = number(Attribute::CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES)?.unwrap_or(0);
    Ok(PointerFacts {
        kind,
        // A device's ordinal is asked for as an int; the rest of the eight bytes stays zero.
        device: device.and_then(|ordinal| u32::try_from(ordinal).ok()),
        base: number(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR)?.unwrap_or(0),
        len: number(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE)?.unwrap_or(0),
        allocation: number(Attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID)?.unwrap_or(0),
        is_gpu_direct: is_set(Attribute::CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE)?,
        has_ipc_handle: seen.has_ipc_handle,
        handle_types: u32::try_from(handle_types & u64::from(u32::MAX)).unwrap_or(0),
    })
}

/// What the attributes say about the kind.
#[expect(
    clippy::struct_excessive_bools,
    reason = "CUDA answers yes or no to each"
)]
#[derive(Clone, Copy, Debug)]
struct Seen {
    is_host: bool,
    is_managed: bool,
    is_pooled: bool,
    has_ipc_handle: bool,
    is_virtual: bool,
}

impl Seen {
    fn kind(self) -> MemoryKind {
        // Managed memory has a host's or a device's type, by where it is; pools are virtual memory underneath.
        if self.is_managed {
            MemoryKind::Managed
        } else if self.is_host {
            MemoryKind::PinnedHost
        } else if self.is_pooled {
            MemoryKind::Pool
        } else if self.is_virtual {
            MemoryKind::Virtual
        } else if self.has_ipc_handle {
            MemoryKind::Plain
        } else {
            MemoryKind::OtherDevice
        }
    }
}

/// An attribute as a number; `None` where CUDA does not know the pointer or the driver not the attribute.
fn number(context: &Context, which: Attribute, pointer: u64) -> Result<Option<u64>, GpuError> {
    const INVALID_VALUE: u32 = 1;
    let mut value = 0_u64;
    let out = (&raw mut value).cast();
    // SAFETY: no attribute asked for here is longer than eight bytes.
    match unsafe {
        cuda!(
            context.calls(),
            cuPointerGetAttribute(out, which as c_uint, pointer)
        )
    } {
        Ok(()) => Ok(Some(value)),
        Err(error) if error.code() == Some(INVALID_VALUE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a physical piece is mapped there: only virtual-memory allocations have one to retain.
fn is_virtual(context: &Context, pointer: u64) -> bool {
    let calls = context.calls();
    let (Some(retain), Some(release)) = (calls.cuMemRetainAllocationHandle, calls.cuMemRelease)
    else {
        return false;
    };
    let Ok(address) = usize::try_from(pointer) else {
        return false;
    };
    let mut handle = 0;
    let address = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: writes a handle, or refuses an address that is not mapped in this way.
    if unsafe { retain(&raw mut handle, address) } != 0 {
        return false;
    }
    // SAFETY: the handle was retained above and is released once.
    let released = unsafe { release(handle) };
    if released != 0 {
        tracing::debug!(code = released, "a physical piece was not released");
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Seen = Seen {
        is_host: false,
        is_managed: false,
        is_pooled: false,
        has_ipc_handle: false,
        is_virtual: false,
    };

    #[test]
    fn kinds_follow_from_the_attributes() {
        assert_eq!(NOTHING.kind(), MemoryKind::OtherDevice);
        let plain = Seen {
            has_ipc_handle: true,
            ..NOTHING
        };
        assert_eq!(plain.kind(), MemoryKind::Plain);
        let pooled = Seen {
            is_pooled: true,
            is_virtual: true,
            ..NOTHING
        };
        assert_eq!(pooled.kind(), MemoryKind::Pool);
        let expandable = Seen {
            is_virtual: true,
            ..NOTHING
        };
        assert_eq!(expandable.kind(), MemoryKind::Virtual);
        let managed = Seen {
            is_managed: true,
            is_host: true,
            ..NOTHING
        };
        assert_eq!(managed.kind(), MemoryKind::Managed);
        let pinned = Seen {
            is_host: true,
            ..NOTHING
        };
        assert_eq!(pinned.kind(), MemoryKind::PinnedHost);
        assert!(!pinned.kind().is_device() && expandable.kind().is_device());
    }

    #[test]
    fn a_range_is_held_only_if_all_of_it_is() {
        let facts = PointerFacts {
            kind: MemoryKind::Plain,
            device: Some(0),
            base: 4096,
            len: 8192,
            allocation: 1,
            is_gpu_direct: true,
            has_ipc_handle: true,
            handle_types: 0,
        };
        assert!(facts.holds(4096, 8192));
        assert!(facts.holds(5000, 1));
        assert!(!facts.holds(4095, 1));
        assert!(!facts.holds(4097, 8192));
        assert!(!facts.holds(u64::MAX, 2));
    }
}
