//! The driver: a thread that waits for its own small transfer reads the socket itself.

use std::{sync::atomic::Ordering, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, recv},
};

use super::{Lane, Want, clock};
use crate::transport::{LaneError, inbound::BUFFER};

/// How long the reader leaves the socket to callers after one has driven it.
pub(super) const DRIVEN_FOR: Duration = Duration::from_millis(1);

/// How long a driver sleeps before it looks whether its transfer ended another way.
pub(super) const DRIVE_SLICE: Duration = Duration::from_millis(5);

/// Waits without spinning after a spin that did not pay: a slow peer costs one spin in so many waits.
const SPIN_REST: u32 = 15;

/// Bytes a driver reads at once: a few dozen answers.
const ANSWERS: usize = 2048;

impl Lane {
    /// Waits for an answer in the calling thread and deals with it, for a few milliseconds at most. Returns false, at once,
    /// if somebody else reads the socket: then the caller is woken by whoever that is.
    pub(crate) fn drive(&self) -> bool {
        if self.driver.swap(true, Ordering::SeqCst) {
            return false;
        }
        self.driven_at.store(clock::now().nanos(), Ordering::SeqCst);
        let drove = self.parked.load(Ordering::SeqCst);
        if drove && !self.spin() {
            self.sleep_for_answer();
        }
        // With answers outstanding the reader takes over at once; else it gives the next driver a moment.
        let is_done = self
            .lock()
            .as_ref()
            .is_none_or(|open| open.outbound.unacked == 0);
        let driven_at = if is_done || !drove {
            clock::now().nanos()
        } else {
            0
        };
        self.driven_at.store(driven_at, Ordering::SeqCst);
        self.driver.store(false, Ordering::SeqCst);
        if driven_at == 0
            && let Some(reader) = self.reader.get()
        {
            reader.unpark();
        }
        drove
    }

    /// Whether a caller drives the lane, or has just done so.
    pub(super) fn is_driven(&self) -> bool {
        let driven_at = self.driven_at.load(Ordering::SeqCst);
        let since = clock::now().nanos().saturating_sub(driven_at);
        self.driver.load(Ordering::SeqCst) || Duration::from_nanos(since) < DRIVEN_FOR
    }

    /// Looks for an answer without sleeping, for a few microseconds, because going to sleep and being woken costs as much
    /// again as a small transfer. Gives up for a while when it did not pay. Returns whether an answer came.
    fn spin(&self) -> bool {
        let mut io = self.lock();
        let Some(open) = io.as_ref() else {
            return true;
        };
        let (budget, awaited) = (open.context.hub.config.spin, open.outbound.unacked);
        let rest = self.spin_rest.load(Ordering::Relaxed);
        if budget.is_zero() || rest > 0 {
            self.spin_rest
                .store(rest.saturating_sub(1), Ordering::Relaxed);
            return false;
        }
        let until = clock::now() + budget;
        while clock::now() < until {
            match io.as_mut() {
                Some(open) if open.outbound.unacked >= awaited => {
                    if let Err(error) = open.receive(super::AsFd::as_fd(&self.socket)) {
                        self.fail(&mut io, &error);
                    }
                }
                _ => {
                    if self.send(&mut io) {
                        self.kick();
                    }
                    return true;
                }
            }
        }
        self.spin_rest.store(SPIN_REST, Ordering::Relaxed);
        false
    }

    fn sleep_for_answer(&self) {
        let want = Self::want(&self.lock());
        if want != Want::Frame {
            let slice = Timespec {
                tv_sec: 0,
                tv_nsec: DRIVE_SLICE.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&slice));
            if self.pump(&mut self.lock()) {
                self.kick();
            }
            return;
        }
        let mut answers = [0; ANSWERS];
        // The reader has set a receive timeout of one slice before it left the socket.
        match recv(&self.socket, &mut answers[..], RecvFlags::empty()) {
            Ok((0, _)) => self.fail(&mut self.lock(), &LaneError::Closed),
            Ok((got, _)) => {
                let mut io = self.lock();
                if let Some(open) = io.as_mut() {
                    open.inbound.append(&answers[..got]);
                }
                if self.take_in(&mut io, &mut Box::default(), 0) {
                    self.kick();
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => self.fail(&mut self.lock(), &LaneError::Socket(error.into())),
        }
    }
}

const _: () = assert!(
    ANSWERS < BUFFER / 4,
    "what a driver reads fits behind what the buffer holds"
);
