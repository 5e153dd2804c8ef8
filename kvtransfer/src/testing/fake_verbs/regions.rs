//! libibverbs' exported calls on memory regions.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{
    ffi::{c_int, c_uint, c_void},
    ptr,
};

use super::{
    behaviour::DmaBuf,
    counters::Violation,
    memory::{Region, effective_access},
    shared::{fabric_of, set_errno},
};
use crate::{testing::fake_device::is_device_address, transport::verbs::sys};

/// Registers memory; null with `errno` when it is refused. Memory of a device is found by a dma-buf, or with peer memory.
///
/// # Safety
/// `pd` must be a domain of a living fabric.
unsafe fn register(
    pd: *mut sys::ibv_pd,
    start: u64,
    len: usize,
    access: u32,
    is_dmabuf: bool,
) -> *mut sys::ibv_mr {
    // SAFETY: by this function's contract.
    let context = unsafe { (*pd).context };
    // SAFETY: as above.
    let domain = unsafe { (*pd).handle };
    // SAFETY: a domain's context is its fabric's.
    let (shared, index) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    let wants_remote = access & (sys::IBV_ACCESS_REMOTE_WRITE | sys::IBV_ACCESS_REMOTE_ATOMIC) != 0;
    let len = len as u64;
    let behaviour = state.behaviour.clone();
    let device = &mut state.devices[index];
    let locked = device.regions.registered_bytes.saturating_add(len);
    let errno = if device.removed {
        libc::EIO
    } else if len == 0
        || start.checked_add(len).is_none()
        || len > behaviour.region_bytes_max
        || (wants_remote && access & sys::IBV_ACCESS_LOCAL_WRITE == 0)
        || !device.domains.contains(&domain)
    {
        libc::EINVAL
    } else if !is_dmabuf && !behaviour.peer_memory && is_device_address(start) {
        libc::EFAULT
    } else if behaviour.locked_bytes_max.is_some_and(|max| locked > max) {
        libc::ENOMEM
    } else {
        0
    };
    let region = Region {
        pd: domain,
        start,
        len,
        access: effective_access(access, behaviour.forces_remote_write),
        key: 0,
    };
    let added = if errno == 0 {
        device.regions.add(region, behaviour.keys_repeat)
    } else {
        None
    };
    let Some(region) = added else {
        set_errno(if errno == 0 { libc::ENOMEM } else { errno });
        return ptr::null_mut();
    };
    let handle = device.new_handle();
    drop(state);
    shared.keep(sys::ibv_mr {
        context,
        pd,
        addr: ptr::with_exposed_provenance_mut(usize::try_from(start).unwrap_or(0)),
        length: usize::try_from(len).unwrap_or(0),
        handle,
        lkey: region.key,
        rkey: region.key,
    })
}

pub(super) unsafe extern "C" fn reg_mr(
    pd: *mut sys::ibv_pd,
    addr: *mut c_void,
    len: usize,
    access: c_int,
) -> *mut sys::ibv_mr {
    let start = addr.expose_provenance() as u64;
    // SAFETY: the caller passes a domain of a living fabric.
    unsafe { register(pd, start, len, access.cast_unsigned(), false) }
}

pub(super) unsafe extern "C" fn reg_mr_iova2(
    pd: *mut sys::ibv_pd,
    addr: *mut c_void,
    len: usize,
    iova: u64,
    access: c_uint,
) -> *mut sys::ibv_mr {
    let start = addr.expose_provenance() as u64;
    if iova != start {
        // The fabric moves bytes by plain addresses; nothing of ours asks for another base.
        set_errno(libc::EOPNOTSUPP);
        return ptr::null_mut();
    }
    // SAFETY: the caller passes a domain of a living fabric.
    unsafe { register(pd, start, len, access, false) }
}

/// Whether a buffer has the bytes that are asked of it; one without any stands for all.
fn holds(fd: c_int, offset: u64, len: usize) -> bool {
    // SAFETY: all bytes zero are a value of the structure.
    let mut facts: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the structure outlives the call.
    let is_known = unsafe { libc::fstat(fd, &raw mut facts) } == 0;
    let bytes = u64::try_from(facts.st_size).unwrap_or(0);
    let end = offset.checked_add(len as u64);
    is_known && (bytes == 0 || end.is_some_and(|end| end <= bytes))
}

pub(super) unsafe extern "C" fn reg_dmabuf_mr(
    pd: *mut sys::ibv_pd,
    offset: u64,
    len: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut sys::ibv_mr {
    // SAFETY: the caller passes a domain of a living fabric.
    let context = unsafe { (*pd).context };
    // SAFETY: a domain's context is its fabric's.
    let (shared, _) = unsafe { fabric_of(context) };
    let dmabuf = shared.lock().behaviour.dmabuf;
    // SAFETY: asking for an fd's flags has no preconditions.
    let is_open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    let errno = match dmabuf {
        DmaBuf::NotSupported => libc::EOPNOTSUPP,
        DmaBuf::Supported if !is_open => libc::EBADF,
        DmaBuf::Invalid => libc::EINVAL,
        DmaBuf::Supported if !holds(fd, offset, len) => libc::EINVAL,
        DmaBuf::Supported => {
            // The buffer is taken to be mapped at `iova`, as a CUDA allocation is.
            // SAFETY: as above.
            return unsafe { register(pd, iova, len, access.cast_unsigned(), true) };
        }
    };
    set_errno(errno);
    ptr::null_mut()
}

pub(super) unsafe extern "C" fn dereg_mr(mr: *mut sys::ibv_mr) -> c_int {
    // SAFETY: the caller passes a region of a living fabric.
    let context = unsafe { (*mr).context };
    // SAFETY: as above.
    let key = unsafe { (*mr).rkey };
    // SAFETY: a region's context is its fabric's.
    let (shared, index) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    if !state.devices[index].regions.remove(key) {
        state.violate(Violation::UseAfterDestroy { call: "dereg_mr" });
        return libc::EINVAL;
    }
    0
}
