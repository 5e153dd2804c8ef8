//! Queues of events behind real file descriptors, and completion queues.
#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};

use super::counters::WatchCounters;

/// Most events that wait in one queue; the kernel's own queues are of this order, and a test never needs more.
const EVENTS_MAX: usize = 1 << 16;

/// Events with a file descriptor that is readable exactly while at least one may be taken.
///
/// The descriptor is a counting eventfd: who has read it once may take one event. It blocks unless its user makes it
/// non-blocking, like those of the real libraries.
#[derive(Debug)]
pub(super) struct EventQueue<T> {
    fd: Arc<OwnedFd>,
    ready: VecDeque<T>,
    /// Set while the host is frozen: events gather in `held` and the descriptor stays silent.
    frozen: bool,
    held: VecDeque<T>,
}

impl<T> EventQueue<T> {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC;
        Ok(Self {
            fd: Arc::new(eventfd(0, flags)?),
            ready: VecDeque::new(),
            frozen: false,
            held: VecDeque::new(),
        })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The descriptor, to be read without the fabric's lock.
    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    pub(super) fn push(&mut self, event: T) {
        if self.ready.len() + self.held.len() >= EVENTS_MAX {
            tracing::warn!("an event queue of the fake fabric is full; the event is lost");
            return;
        }
        if self.frozen {
            self.held.push_back(event);
            return;
        }
        self.ready.push_back(event);
        ring(&self.fd);
    }

    /// Takes an event, after one read of the descriptor.
    pub(super) fn pop(&mut self) -> Option<T> {
        self.ready.pop_front()
    }

    pub(super) fn set_frozen(&mut self, frozen: bool) {
        self.frozen = frozen;
        if !frozen {
            while let Some(event) = self.held.pop_front() {
                self.ready.push_back(event);
                ring(&self.fd);
            }
        }
    }

    /// Removes events about an object that is being destroyed, and their counts in the descriptor.
    pub(super) fn remove_if(&mut self, about: impl Fn(&T) -> bool) {
        self.held.retain(|event| !about(event));
        let before = self.ready.len();
        self.ready.retain(|event| !about(event));
        for _ in self.ready.len()..before {
            let mut word = [0; 8];
            let polled = rustix::event::poll(
                &mut [rustix::event::PollFd::new(
                    &*self.fd,
                    rustix::event::PollFlags::IN,
                )],
                Some(&rustix::event::Timespec::default()),
            );
            if polled.is_ok_and(|ready| ready > 0) {
                let read = rustix::io::read(&*self.fd, &mut word);
                debug_assert!(read.is_ok(), "a readable eventfd can be read");
            }
        }
    }
}

fn ring(fd: &OwnedFd) {
    let rung = rustix::io::write(fd, &1u64.to_ne_bytes());
    debug_assert!(rung.is_ok(), "an eventfd takes more than EVENTS_MAX");
}

/// One completion, as the fabric keeps it until it is polled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) wr_id: u64,
    pub(super) status: u32,
    pub(super) opcode: u32,
    pub(super) byte_len: u32,
    /// Big-endian, as it was posted.
    pub(super) imm: Option<u32>,
    pub(super) queue: u32,
    pub(super) peer_queue: u32,
    pub(super) queue_serial: u64,
    /// For send work requests: their place in the send queue.
    pub(super) send_index: Option<u64>,
    pub(super) solicited: bool,
}

/// What a completion queue waits for before it makes an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Armed {
    No,
    Any,
    Solicited,
}

/// One completion queue of a device.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    pub(super) capacity: u32,
    pub(super) entries: VecDeque<Completion>,
    pub(super) armed: Armed,
    pub(super) channel: Option<u32>,
    /// Address of the C structure.
    pub(super) handle: usize,
    pub(super) unacked: u32,
    /// Completions that a test holds back.
    pub(super) held: Option<VecDeque<Completion>>,
    /// Completions that are seen once the queue has been armed.
    pub(super) late: VecDeque<Completion>,
    pub(super) watched: WatchCounters,
    /// Threads inside `poll_cq` of this queue.
    pub(super) pollers: Arc<AtomicU32>,
}

impl CompletionQueue {
    pub(super) fn is_being_polled(&self) -> bool {
        self.pollers.load(Ordering::Acquire) > 0
    }

    /// Adds a completion; `Err` when the queue is full, `Ok(true)` when an event is due.
    ///
    /// `is_shy`: one that comes while the queue is not armed is seen only when it has been.
    pub(super) fn push(
        &mut self,
        completion: Completion,
        solicited: bool,
        is_shy: bool,
    ) -> Result<bool, ()> {
        if let Some(held) = &mut self.held {
            held.push_back(completion);
            return Ok(false);
        }
        let waiting = self.entries.len() + self.late.len();
        if waiting >= usize::try_from(self.capacity).unwrap_or(usize::MAX) {
            return Err(());
        }
        if is_shy && self.armed == Armed::No {
            self.late.push_back(completion);
            return Ok(false);
        }
        self.entries.push_back(completion);
        let due = match self.armed {
            Armed::No => false,
            Armed::Any => true,
            Armed::Solicited => solicited,
        };
        if due {
            self.armed = Armed::No;
            self.watched.events += 1;
        }
        Ok(due)
    }

    /// Asks for one event. Completions that are already there make none: who arms must poll once more.
    pub(super) fn arm(&mut self, solicited_only: bool) {
        self.entries.append(&mut self.late);
        if solicited_only {
            self.armed = Armed::Solicited;
            self.watched.armed_for_marked += 1;
        } else {
            self.armed = Armed::Any;
            self.watched.armed_for_any += 1;
        }
    }
}
