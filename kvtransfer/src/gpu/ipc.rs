//! GPU memory of another process of this host: the receiver maps the sender's allocation and copies from it.
//!
//! `cudaMalloc` blocks travel as an IPC handle plus an offset. Virtual-memory allocations (expandable segments) travel as
//! one POSIX descriptor for each physical piece, beside the handle (`SCM_RIGHTS`). Pools, managed and host memory are
//! refused with the reason, and staging is used.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{
    ffi::{c_int, c_void},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::Arc,
};

mod descriptors;
mod handle;
mod imports;

pub use descriptors::{DESCRIPTORS_MAX, receive_descriptors, send_descriptors};
use handle::Memory;
pub use handle::{HANDLE_BYTES_MAX, Handle, PIECES_MAX};
pub use imports::{IMPORTS_MAX, Imports, Mapping, PeerProcess};

use super::{
    driver::{self, Context, cuda},
    error::GpuError,
    memory::{DESCRIPTOR, known, release},
    pointer::{self, MemoryKind, PointerFacts},
    sys::IpcHandle,
};

/// An export: what the peer needs to map a range.
#[derive(Debug)]
pub struct Exported {
    /// To be sent as bytes.
    pub handle: Handle,
    /// To be sent beside it, in order; empty for `cudaMalloc` memory. May be closed once they are sent.
    pub descriptors: Vec<OwnedFd>,
}

/// Exports `len` bytes at `address` to other processes of this host.
///
/// The owner of the memory must not free it while a peer may copy from it; the handle carries the allocation's
/// generation, so that a peer never takes another allocation at the same address for it.
///
/// # Errors
/// [`GpuError::Refused`] for memory whose kind cannot be shared, with what to change; else the driver's.
pub fn export(context: &Context, address: u64, len: u64) -> Result<Exported, GpuError> {
    let facts = pointer::inspect(context, address)?;
    let refused = |reason: String| GpuError::Refused {
        what: "sharing memory with another process",
        address,
        reason,
    };
    if let Some(reason) = against(&facts) {
        return Err(refused(reason.to_owned()));
    }
    let (memory, offset, descriptors) = if facts.kind == MemoryKind::Virtual {
        pieces(context, address, len)?
    } else {
        if !facts.holds(address, len) {
            return Err(refused(format!(
                "{len} bytes end outside the allocation of {} bytes at {:#x}",
                facts.len, facts.base
            )));
        }
        let memory = Memory::Plain {
            handle: ipc_handle(context, facts.base)?,
            total: facts.len,
        };
        (memory, address - facts.base, Vec::new())
    };
    let handle = Handle {
        device: context.facts().uuid,
        allocation: facts.allocation,
        offset,
        len,
        memory,
    };
    Ok(Exported {
        handle,
        descriptors,
    })
}

/// Why memory of this kind cannot be shared.
fn against(facts: &PointerFacts) -> Option<&'static str> {
    match facts.kind {
        MemoryKind::Plain | MemoryKind::Virtual => None,
        MemoryKind::Pool => Some(
            "cudaMallocAsync pools have no IPC handles (torch: PYTORCH_CUDA_ALLOC_CONF=backend:native); \
             bytes go through pinned host memory",
        ),
        MemoryKind::Managed => {
            Some("managed memory has no IPC handle; bytes go through pinned host memory")
        }
        MemoryKind::PinnedHost | MemoryKind::NotCuda => Some("it is host memory, not a GPU's"),
        MemoryKind::OtherDevice => {
            Some("it is a mapping of another process's memory, which only its owner can share")
        }
    }
}

fn ipc_handle(context: &Context, base: u64) -> Result<[u8; 64], GpuError> {
    let _current = context.enter()?;
    let mut handle = IpcHandle([0; 64]);
    // SAFETY: writes the handle of an allocation that the driver just described.
    unsafe { cuda!(context.calls(), cuIpcGetMemHandle(&raw mut handle, base)) }?;
    Ok(handle.0)
}

/// The physical pieces under a range, each as a descriptor, and where in the first the range starts.
fn pieces(
    context: &Context,
    address: u64,
    len: u64,
) -> Result<(Memory, u64, Vec<OwnedFd>), GpuError> {
    let end = address.checked_add(len).filter(|_| len > 0);
    let end = end.ok_or(GpuError::Misuse(
        "an exported range has bytes and does not wrap",
    ))?;
    let (mut lens, mut descriptors) = (Vec::new(), Vec::new());
    let (first, _) = piece_at(context, address)?;
    let mut next = first;
    while next < end {
        let (base, bytes) = piece_at(context, next)?;
        if base != next || bytes == 0 {
            return Err(GpuError::Refused {
                what: "sharing memory with another process",
                address: next,
                reason: "its physical pieces do not follow each other".to_owned(),
            });
        }
        if lens.len() == PIECES_MAX {
            return Err(GpuError::Limit {
                what: "physical pieces of an export",
                asked: PIECES_MAX as u64 + 1,
                limit: PIECES_MAX as u64,
            });
        }
        descriptors.push(piece_descriptor(context, base)?);
        lens.push(bytes);
        next = base + bytes;
    }
    Ok((
        Memory::Virtual { pieces: lens },
        address - first,
        descriptors,
    ))
}

/// The physical piece at an address. For virtual memory the driver's "address range" is one mapping.
fn piece_at(context: &Context, address: u64) -> Result<(u64, u64), GpuError> {
    let _current = context.enter()?;
    let (mut base, mut bytes) = (0, 0);
    // SAFETY: writes two numbers.
    unsafe {
        cuda!(
            context.calls(),
            cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, address)
        )
    }?;
    Ok((base, bytes as u64))
}

fn piece_descriptor(context: &Context, base: u64) -> Result<OwnedFd, GpuError> {
    let calls = context.calls();
    let retain = known(
        calls.cuMemRetainAllocationHandle,
        "cuMemRetainAllocationHandle",
    )?;
    let export = known(
        calls.cuMemExportToShareableHandle,
        "cuMemExportToShareableHandle",
    )?;
    let pointer = usize::try_from(base)
        .map_err(|_| GpuError::Misuse("an address is outside of the address space"))?;
    let pointer = std::ptr::with_exposed_provenance_mut::<c_void>(pointer);
    let mut handle = 0;
    // SAFETY: writes a handle, released below.
    let code = unsafe { retain(&raw mut handle, pointer) };
    driver::check(calls, "cuMemRetainAllocationHandle", code)?;
    let mut descriptor: c_int = -1;
    let out = (&raw mut descriptor).cast();
    // SAFETY: writes a descriptor, which nobody else owns.
    let code = unsafe { export(out, handle, DESCRIPTOR, 0) };
    release(context, handle);
    driver::check(calls, "cuMemExportToShareableHandle", code).map_err(|error| {
        GpuError::Refused {
            what: "sharing memory with another process",
            address: base,
            reason: format!(
                "{error}; its allocator did not ask for POSIX descriptors \
                 (torch: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False)"
            ),
        }
    })?;
    // SAFETY: the driver made the descriptor for us just now.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Maps physical pieces one behind the other; the address of the first.
fn map_pieces(
    context: &Arc<Context>,
    pieces: &[u64],
    descriptors: &[OwnedFd],
) -> Result<imports::Pieces, GpuError> {
    let import = known(
        context.calls().cuMemImportFromShareableHandle,
        "cuMemImportFromShareableHandle",
    )?;
    let mut mapped = imports::Pieces::reserve(context, pieces)?;
    for (bytes, descriptor) in pieces.iter().zip(descriptors) {
        let number = usize::try_from(descriptor.as_raw_fd())
            .map_err(|_| GpuError::Peer("a descriptor is negative"))?;
        let mut handle = 0;
        // The driver takes the descriptor as a pointer-sized integer.
        let number = std::ptr::without_provenance_mut::<c_void>(number);
        // SAFETY: writes a handle; the driver duplicates what it needs of the descriptor.
        let code = unsafe { import(&raw mut handle, number, DESCRIPTOR) };
        driver::check(context.calls(), "cuMemImportFromShareableHandle", code)?;
        let outcome = mapped.push(*bytes, handle);
        release(context, handle);
        outcome?;
    }
    mapped.allow_access()?;
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_shared_is_refused_with_the_reason() {
        let facts = |kind| PointerFacts {
            kind,
            device: Some(0),
            base: 4096,
            len: 4096,
            allocation: 7,
            is_gpu_direct: false,
            has_ipc_handle: false,
            handle_types: 0,
        };
        assert_eq!(against(&facts(MemoryKind::Plain)), None);
        assert_eq!(against(&facts(MemoryKind::Virtual)), None);
        for (kind, word) in [
            (MemoryKind::Pool, "backend:native"),
            (MemoryKind::Managed, "managed"),
            (MemoryKind::PinnedHost, "host memory"),
            (MemoryKind::NotCuda, "host memory"),
            (MemoryKind::OtherDevice, "owner"),
        ] {
            let reason = against(&facts(kind)).expect("it cannot be shared");
            assert!(reason.contains(word), "{kind:?}: {reason}");
        }
    }
}
