//! One data connection: its socket, its thread, and how a waiting caller can do the thread's work.
//!
//! A lane is driven by its own thread, which sleeps in `poll` until the socket or the [`Lane::kick`] event is ready.
//! For small transfers two thread switches can be saved: the pushing thread writes the batch itself if the lane is free
//! ([`Lane::try_pump`]), and the waiting thread reads the acknowledgement itself ([`Lane::drive`]); meanwhile the lane's
//! thread leaves the socket alone, so that both are not woken by the same byte.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::{read, write},
};

use super::{
    LaneError,
    inbound::Inbound,
    outbound::{Outbound, Sent},
};
use crate::{
    clock,
    engine::hub::Hub,
    ids::{LaneId, PeerId},
    memory::Region,
    wire::hello::RegionAddress,
};

/// How long a lane's thread leaves the socket to callers after one has driven it.
const DRIVEN_FOR: Duration = Duration::from_millis(1);

/// Waits without spinning after a spin that did not pay: a slow peer costs one spin in so many waits.
const SPIN_REST: u32 = 15;

/// Shared memory between two processes, cut into slots of one batch each.
#[derive(Debug)]
pub(crate) struct Ring {
    region: Region,
    slot_bytes: u64,
}

impl Ring {
    pub(crate) fn new(region: Region, slot_bytes: u64) -> Self {
        Self { region, slot_bytes }
    }

    /// Where batch number `batch` goes. The node lets at most `slots` batches be unacknowledged, so a slot is free again
    /// when its turn comes.
    pub(super) fn slot(&self, batch: u64) -> u64 {
        let slots = self.region.len() as u64 / self.slot_bytes;
        batch % slots * self.slot_bytes
    }

    pub(super) fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }
}

/// What both halves of a lane need to know.
pub(crate) struct LaneContext {
    pub(crate) hub: Arc<Hub>,
    pub(crate) peer: PeerId,
    pub(crate) lane: LaneId,
    /// The peer's process, if its memory can be read.
    pub(crate) peer_pid: Option<i32>,
    pub(crate) peer_regions: Arc<[RegionAddress]>,
    pub(crate) ring_in: Option<Ring>,
    pub(crate) ring_out: Option<Ring>,
}

struct LaneIo {
    context: LaneContext,
    inbound: Inbound,
    outbound: Outbound,
    /// The socket did not take everything.
    blocked: bool,
}

/// One data connection.
pub(crate) struct Lane {
    pub(crate) id: LaneId,
    socket: OwnedFd,
    kick: OwnedFd,
    kicked: AtomicBool,
    io: Mutex<Option<LaneIo>>,
    /// Callers that drive the lane now.
    drivers: AtomicU32,
    driven_at: AtomicU64,
    /// Waits that go straight to sleep, because spinning did not pay.
    spin_rest: AtomicU32,
    failed: AtomicBool,
}

impl Lane {
    /// Starts the lane's thread. `rest`: bytes that were read with the handshake.
    ///
    /// # Errors
    /// No event descriptor or no thread can be had.
    pub(crate) fn start(
        socket: OwnedFd,
        context: LaneContext,
        rest: &[u8],
    ) -> std::io::Result<Arc<Self>> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let hub = Arc::clone(&context.hub);
        let name = format!("kvt-lane-{}-{}", context.peer.0, context.lane.0);
        let lane = Arc::new(Self {
            id: context.lane,
            socket,
            kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            kicked: AtomicBool::new(false),
            io: Mutex::new(Some(LaneIo {
                context,
                inbound: Inbound::new(rest),
                outbound: Outbound::new(),
                blocked: false,
            })),
            drivers: AtomicU32::new(0),
            driven_at: AtomicU64::new(0),
            spin_rest: AtomicU32::new(0),
            failed: AtomicBool::new(false),
        });
        let worker = Arc::clone(&lane);
        const STACK: usize = 256 << 10;
        let alive = hub.lane_alive();
        std::thread::Builder::new()
            .name(name)
            .stack_size(STACK)
            .spawn(move || {
                worker.run();
                drop(worker);
                drop(alive);
            })?;
        Ok(lane)
    }

    /// Wakes the lane's thread.
    pub(crate) fn kick(&self) {
        if !self.kicked.swap(true, Ordering::SeqCst) {
            // The counter cannot overflow: it is read before the flag is cleared.
            let _ = write(&self.kick, &1_u64.to_ne_bytes());
        }
    }

    /// Ends the connection; the thread notices and reports the lane down.
    pub(crate) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.kick();
    }

    /// Whether the connection has ended, so that there is nothing to drive any more.
    pub(crate) fn is_over(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Does the lane's work in the calling thread if nobody else does. Returns whether it did.
    pub(crate) fn try_pump(&self) -> bool {
        let mut io = match self.io.try_lock() {
            Ok(io) => io,
            Err(TryLockError::Poisoned(io)) => io.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let Some(open) = io.as_mut() else {
            return true;
        };
        let done = open.outbound_pump(self.socket.as_fd());
        let blocked = open.blocked;
        if let Err(error) = done {
            self.fail(&mut io, &error);
        } else if blocked {
            drop(io);
            self.kick();
        }
        true
    }

    /// Waits for the socket in the calling thread and does the lane's work, for at most `timeout`.
    pub(crate) fn drive(&self, timeout: Duration) {
        self.drivers.fetch_add(1, Ordering::SeqCst);
        self.driven_at.store(clock::now().nanos(), Ordering::SeqCst);
        if !self.spin() {
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&timespec(timeout)));
            if ready.is_ok_and(|count| count > 0) {
                let mut io = self.io.lock().unwrap_or_else(PoisonError::into_inner);
                self.pump(&mut io);
            }
        }
        self.driven_at.store(clock::now().nanos(), Ordering::SeqCst);
        self.drivers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Looks for an answer without sleeping, for a few microseconds, because going to sleep and being woken costs as much
    /// again as a small transfer. Gives up for a while when it did not pay. Returns whether an answer came.
    fn spin(&self) -> bool {
        let mut io = self.io.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = io.as_mut() else {
            return true;
        };
        let budget = open.context.hub.config.spin;
        if budget.is_zero() || self.spin_rest.load(Ordering::Relaxed) > 0 {
            let rest = self.spin_rest.load(Ordering::Relaxed);
            self.spin_rest
                .store(rest.saturating_sub(1), Ordering::Relaxed);
            return false;
        }
        let until = clock::now() + budget;
        let awaited = open.outbound.unacked;
        while clock::now() < until {
            self.pump(&mut io);
            match io.as_ref() {
                Some(open) if open.outbound.unacked >= awaited => std::hint::spin_loop(),
                _ => return true,
            }
        }
        self.spin_rest.store(SPIN_REST, Ordering::Relaxed);
        false
    }

    fn pump(&self, io: &mut Option<LaneIo>) {
        if let Some(open) = io
            && let Err(error) = open.pump(self.socket.as_fd())
        {
            self.fail(io, &error);
        }
    }

    /// Reports the lane down, once.
    fn fail(&self, io: &mut Option<LaneIo>, error: &LaneError) {
        let Some(open) = io.take() else {
            return;
        };
        self.failed.store(true, Ordering::SeqCst);
        let LaneContext {
            hub, peer, lane, ..
        } = &open.context;
        tracing::info!(%peer, lane = lane.0, %error, "lane ended");
        hub.lane_down(*peer, *lane, &error.to_string());
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.kick();
    }

    /// Whether a caller drives the lane, or has just done so.
    fn is_driven(&self) -> bool {
        let since = clock::now()
            .nanos()
            .saturating_sub(self.driven_at.load(Ordering::SeqCst));
        self.drivers.load(Ordering::SeqCst) > 0 || Duration::from_nanos(since) < DRIVEN_FOR
    }

    fn run(&self) {
        loop {
            if self.failed.load(Ordering::SeqCst) {
                return;
            }
            let (mut blocked, mut clogged) = (false, false);
            let driven = self.is_driven();
            if !driven || self.kicked.load(Ordering::SeqCst) {
                let mut io = self.io.lock().unwrap_or_else(PoisonError::into_inner);
                self.clear_kick();
                self.pump(&mut io);
                blocked = io.as_ref().is_some_and(|open| open.blocked);
                clogged = io.as_ref().is_some_and(|open| open.outbound.is_clogged());
                if io.is_none() {
                    return;
                }
            }
            let mut interest = PollFlags::empty();
            if !driven && !clogged {
                interest |= PollFlags::IN;
            }
            if blocked {
                interest |= PollFlags::OUT;
            }
            // A driven lane is looked at again when the drivers have gone.
            let timeout = driven.then(|| timespec(DRIVEN_FOR));
            let mut fds = [
                PollFd::new(&self.kick, PollFlags::IN),
                PollFd::new(&self.socket, interest),
            ];
            let watched = if driven && !blocked {
                &mut fds[..1]
            } else {
                &mut fds[..]
            };
            let _ = poll(watched, timeout.as_ref());
        }
    }

    fn clear_kick(&self) {
        if self.kicked.load(Ordering::SeqCst) {
            let mut count = [0; 8];
            let _ = read(&self.kick, &mut count[..]);
            self.kicked.store(false, Ordering::SeqCst);
        }
    }
}

impl LaneIo {
    fn outbound_pump(&mut self, socket: BorrowedFd<'_>) -> Result<(), LaneError> {
        let sent = self.outbound.pump(&self.context, socket)?;
        self.blocked = sent == Sent::Blocked;
        Ok(())
    }

    /// Reads, answers, sends, until the socket gives and takes no more.
    fn pump(&mut self, socket: BorrowedFd<'_>) -> Result<(), LaneError> {
        self.inbound
            .pump(&self.context, socket, &mut self.outbound)?;
        self.outbound_pump(socket)?;
        Ok(())
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
