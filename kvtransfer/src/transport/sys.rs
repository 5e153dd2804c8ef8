//! The system calls that move bytes between raw memory and sockets or processes.
#![expect(unsafe_code, reason = "vectored I/O over raw memory has no safe form")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Most ranges in one call (`UIO_MAXIOV`, uapi/linux/uio.h).
pub(crate) const IOV_MAX: usize = 1024;

/// One range of memory for a vectored call.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct IoRange(libc::iovec);

// SAFETY: an address and a length; what may be done with it is each call's contract.
unsafe impl Send for IoRange {}

impl IoRange {
    pub(crate) fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// A range in another process.
    pub(crate) fn remote(address: u64, len: usize) -> Self {
        let address = usize::try_from(address).unwrap_or(usize::MAX);
        Self(libc::iovec {
            iov_base: std::ptr::without_provenance_mut(address),
            iov_len: len,
        })
    }
}

fn result(done: isize) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Sends ranges without blocking; how many bytes went.
///
/// # Safety
/// Every range must be readable until the call returns.
pub(crate) unsafe fn send(socket: BorrowedFd<'_>, ranges: &[IoRange]) -> io::Result<usize> {
    debug_assert!(
        ranges.len() <= IOV_MAX,
        "the kernel takes at most IOV_MAX ranges"
    );
    // SAFETY: an all-zero msghdr is valid: no name, no ranges, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = ranges.as_ptr().cast_mut().cast();
    message.msg_iovlen = ranges.len() as _;
    // SAFETY: `ranges` is repr(transparent) over iovec and outlives the call; the caller vouches for the memory.
    let done = unsafe {
        libc::sendmsg(
            socket.as_raw_fd(),
            &raw const message,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    result(done)
}

/// Receives into ranges without blocking; how many bytes came, 0 at the end of the stream.
///
/// # Safety
/// Every range must be writable until the call returns, and no reference to it may exist.
pub(crate) unsafe fn receive(socket: BorrowedFd<'_>, ranges: &[IoRange]) -> io::Result<usize> {
    debug_assert!(
        ranges.len() <= IOV_MAX,
        "the kernel takes at most IOV_MAX ranges"
    );
    // SAFETY: an all-zero msghdr is valid: no name, no ranges, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = ranges.as_ptr().cast_mut().cast();
    message.msg_iovlen = ranges.len() as _;
    // SAFETY: `ranges` is repr(transparent) over iovec and outlives the call; the caller vouches for the memory.
    let done = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    result(done)
}

/// Lets a socket count as readable only when it holds so many bytes, or has no space for more, or has ended.
pub(crate) fn set_low_water(socket: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    const BYTES_OF_AN_INT: libc::socklen_t = 4;
    // SAFETY: the option's value is the `i32` that the pointer refers to, for as long as the call takes.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            BYTES_OF_AN_INT,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Copies ranges of another process into ranges of this one; how many bytes were copied before the first fault.
///
/// # Safety
/// Every local range must be writable until the call returns, and no reference to it may exist.
pub(crate) unsafe fn pull(pid: i32, local: &[IoRange], remote: &[IoRange]) -> io::Result<usize> {
    debug_assert!(
        local.len() <= IOV_MAX && remote.len() <= IOV_MAX,
        "at most IOV_MAX ranges"
    );
    // SAFETY: both lists are repr(transparent) over iovec and outlive the call; the kernel checks remote addresses, the
    // caller vouches for local ones.
    let done = unsafe {
        libc::process_vm_readv(
            pid,
            local.as_ptr().cast(),
            local.len() as _,
            remote.as_ptr().cast(),
            remote.len() as _,
            0,
        )
    };
    result(done)
}

/// Reads `N` bytes at an address of another process.
pub(crate) fn peek<const N: usize>(pid: i32, address: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0_u8; N];
    let local = [IoRange::new(bytes.as_mut_ptr(), N)];
    let remote = [IoRange::remote(address, N)];
    // SAFETY: `bytes` is a local array that nothing else refers to during the call.
    let done = unsafe { pull(pid, &local, &remote) }?;
    if done == N {
        Ok(bytes)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
