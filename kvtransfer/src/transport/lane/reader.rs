//! The reader: sleeps in `recv` for the next frame, waits for more of a payload, or leaves the socket to a driver.

use std::{os::fd::AsFd, sync::atomic::Ordering, thread, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{
        RecvFlags, recv,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use super::{Lane, Want, driver::DRIVE_SLICE, driver::DRIVEN_FOR};
use crate::transport::{
    LaneError,
    inbound::{BUFFER, READ_AHEAD},
    sys,
};

/// Bytes of a payload for which the reader is woken: few enough to stay in the processor's cache and to leave the sender
/// space in the socket, which holds some MiB.
const PAYLOAD_AT_ONCE: u64 = 256 << 10;

impl Lane {
    pub(super) fn read_on(&self) {
        let mut buffer = vec![0; BUFFER].into_boxed_slice();
        // The handshake may have left bytes, and a driver may have left some unread.
        let mut look = true;
        while !self.failed.load(Ordering::SeqCst) {
            if self.is_driven() {
                self.leave_to_drivers();
                look = true;
                continue;
            }
            let want = {
                let mut io = self.lock();
                let blocked = std::mem::take(&mut look) && self.pump(&mut io);
                self.kick_if(blocked);
                Self::want(&io)
            };
            match want {
                Want::Nothing => return,
                Want::Frame => self.read_frame(&mut buffer),
                Want::Payload(left) => {
                    self.wait_for_payload(left);
                    look = true;
                }
                Want::Answered => {
                    self.wait(PollFlags::OUT);
                    look = true;
                }
            }
        }
    }

    fn kick_if(&self, blocked: bool) {
        if blocked {
            self.kick();
        }
    }

    /// Waits until a good part of a payload is there. A segment is 64 KiB at best, and being woken for each costs as much as
    /// copying it.
    fn wait_for_payload(&self, left: u64) {
        let enough = left.min(PAYLOAD_AT_ONCE);
        let enough = i32::try_from(enough).ok().filter(|enough| *enough > 1);
        // Where it cannot be set, every segment wakes us.
        let is_set =
            enough.is_some_and(|enough| sys::set_low_water(self.socket.as_fd(), enough).is_ok());
        self.wait(PollFlags::IN);
        if is_set {
            // What follows the payload is short.
            let _ = sys::set_low_water(self.socket.as_fd(), 1);
        }
    }

    fn wait(&self, interest: PollFlags) {
        let mut fds = [PollFd::new(&self.socket, interest)];
        let _ = poll(&mut fds, None);
    }

    /// One `recv` outside of the lock; small transfers come whole with it.
    fn read_frame(&self, buffer: &mut Box<[u8]>) {
        let got = match recv(&self.socket, &mut buffer[..READ_AHEAD], RecvFlags::empty()) {
            Ok((got, _)) => got,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return,
            Err(error) => {
                let error = LaneError::Socket(error.into());
                return self.fail(&mut self.lock(), &error);
            }
        };
        let mut io = self.lock();
        if got == 0 {
            return self.fail(&mut io, &LaneError::Closed);
        }
        let blocked = self.take_in(&mut io, buffer, got);
        drop(io);
        self.kick_if(blocked);
    }

    /// Sleeps while callers read the socket themselves.
    fn leave_to_drivers(&self) {
        // A driver's `recv` must not outlast its transfer's deadline by much.
        let slice = set_socket_timeout(&self.socket, Timeout::Recv, Some(DRIVE_SLICE));
        while slice.is_ok() && !self.failed.load(Ordering::SeqCst) {
            self.parked.store(true, Ordering::SeqCst);
            while self.is_driven() && !self.failed.load(Ordering::SeqCst) {
                thread::park_timeout(DRIVEN_FOR);
            }
            self.parked.store(false, Ordering::SeqCst);
            // A driver that saw `parked` before has set `driver` before that, so one of us sees the other.
            if !self.is_driven() {
                break;
            }
        }
        let _ = set_socket_timeout(&self.socket, Timeout::Recv, None::<Duration>);
    }
}
