//! The writer: sleeps until there is work, sends until the socket is full.

use std::{sync::atomic::Ordering, thread};

use rustix::event::{PollFd, PollFlags, poll};

use super::Lane;

impl Lane {
    pub(super) fn write_on(&self) {
        while !self.failed.load(Ordering::SeqCst) {
            let blocked = {
                let mut io = self.lock();
                self.send(&mut io)
            };
            if blocked {
                // Also returns when the connection ends.
                let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
                let _ = poll(&mut fds, None);
            } else if !self.failed.load(Ordering::SeqCst) {
                // A kick between the send and here is not lost: the next park returns at once.
                thread::park();
            }
        }
    }
}
