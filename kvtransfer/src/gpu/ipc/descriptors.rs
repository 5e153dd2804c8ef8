//! Descriptors over a Unix socket (`SCM_RIGHTS`).
#![forbid(unsafe_code)]

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::gpu::GpuError;

/// Most descriptors of one message. The kernel's bound is 253; longer lists travel as several messages.
pub const DESCRIPTORS_MAX: usize = 64;

/// Sends bytes with descriptors, which arrive with the first of the bytes. How many bytes were sent.
///
/// # Errors
/// No bytes, too many descriptors, or the system's reasons.
pub fn send_descriptors(
    socket: &UnixStream,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<usize, GpuError> {
    if bytes.is_empty() {
        return Err(GpuError::Misuse(
            "descriptors travel with at least one byte",
        ));
    }
    if descriptors.len() > DESCRIPTORS_MAX {
        return Err(GpuError::Limit {
            what: "descriptors of a message",
            asked: descriptors.len() as u64,
            limit: DESCRIPTORS_MAX as u64,
        });
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(GpuError::Misuse("the space for descriptors was measured"));
    }
    let parts = [IoSlice::new(bytes)];
    let sent = sendmsg(socket.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL);
    sent.map_err(|error| GpuError::system("sending descriptors", error))
}

/// Receives bytes and the descriptors that come with them; none survives an exec. Zero bytes: the peer closed.
///
/// # Errors
/// More descriptors than [`DESCRIPTORS_MAX`], or the system's reasons.
pub fn receive_descriptors(
    socket: &UnixStream,
    bytes: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>), GpuError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket.as_fd(), &mut parts, &mut control, flags);
    let received = received.map_err(|error| GpuError::system("receiving descriptors", error))?;
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.contains(rustix::net::ReturnFlags::CTRUNC) {
        return Err(GpuError::Peer(
            "more descriptors came than a message may carry",
        ));
    }
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _};

    use super::*;
    use crate::memory::Region;

    #[test]
    fn descriptors_arrive_with_their_bytes() {
        let (here, there) = UnixStream::pair().expect("sockets");
        let region = Region::memfd("passed", 4096).expect("memfd");
        region.write_at(0, b"through").expect("in bounds");
        let descriptor = region.memfd_fd().expect("it has one");
        let many = vec![descriptor.as_fd(); DESCRIPTORS_MAX];
        assert_eq!(send_descriptors(&here, b"head", &many), Ok(4));
        let mut bytes = [0; 16];
        let (count, descriptors) = receive_descriptors(&there, &mut bytes).expect("sent above");
        assert_eq!(
            (&bytes[..count], descriptors.len()),
            (b"head".as_slice(), DESCRIPTORS_MAX)
        );
        let mut text = [0; 7];
        let first = descriptors
            .into_iter()
            .next()
            .expect("as many as were sent");
        File::from(first).read_exact(&mut text).expect("4096 bytes");
        assert_eq!(&text, b"through");
        drop(here);
        assert_eq!(
            receive_descriptors(&there, &mut bytes).expect("closed").0,
            0
        );
    }

    #[test]
    fn too_many_descriptors_and_no_bytes_are_refused() {
        let (here, _there) = UnixStream::pair().expect("sockets");
        let many = vec![here.as_fd(); DESCRIPTORS_MAX + 1];
        assert!(matches!(
            send_descriptors(&here, b"x", &many),
            Err(GpuError::Limit { .. })
        ));
        assert!(send_descriptors(&here, b"", &many[..1]).is_err());
    }
}
