//! One data connection: its socket and the threads that serve it.
//!
//! The *reader* sleeps in `recv` for the next frame, with a buffer of its own and without the lane's lock; what it read
//! is then dealt with under the lock, large payloads straight from the socket into the pages. The *writer* sleeps until
//! [`Lane::kick`] and then sends until the socket is full. For small transfers two thread switches are saved: the pushing
//! thread writes the batch itself if the lane is free ([`Lane::try_pump`]), and the waiting thread reads the answer
//! itself ([`Lane::drive`]); meanwhile the reader leaves the socket alone.

mod driver;
mod reader;
mod writer;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::Thread,
};

use super::{
    LaneError,
    inbound::Inbound,
    outbound::{Outbound, Sent},
};
use crate::{
    clock,
    engine::{devices::AttachedRegions, hub::Hub},
    ids::{LaneId, PeerId},
    memory::{
        Region,
        device::{Device, Pinned},
    },
    wire::hello::RegionAddress,
};

/// Stack of a lane's threads: they use a few KiB.
const STACK: usize = 256 << 10;

/// Shared memory between two processes, cut into slots of one batch each.
#[derive(Debug)]
pub(crate) struct Ring {
    region: Arc<Region>,
    slot_bytes: u64,
    /// Keeps it pinned, where a device copies to or from it.
    pinned_by: Option<Box<dyn Pinned>>,
}

impl Ring {
    pub(crate) fn new(region: Region, slot_bytes: u64) -> Self {
        Self {
            region: Arc::new(region),
            slot_bytes,
            pinned_by: None,
        }
    }

    /// The same, which `device` reads and writes as fast as it can.
    pub(crate) fn pinned(mut self, device: Option<&Arc<dyn Device>>) -> Self {
        self.pinned_by = device.and_then(|device| {
            let pinned = device.pin(&self.region);
            // Slower copies are copies all the same.
            pinned
                .inspect_err(|error| tracing::warn!(%error, "a ring is not pinned"))
                .ok()
        });
        self
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
    /// The peer's device memory, where it can be copied from.
    pub(crate) attached: Option<Arc<AttachedRegions>>,
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

/// What the reading half waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    /// The next frame.
    Frame,
    /// More of a payload or list: so many bytes of payload are still to come.
    Payload(u64),
    /// That the peer takes our answers.
    Answered,
    /// Nothing: the lane has ended.
    Nothing,
}

/// One data connection.
pub(crate) struct Lane {
    pub(crate) id: LaneId,
    socket: OwnedFd,
    io: Mutex<Option<LaneIo>>,
    reader: OnceLock<Thread>,
    writer: Arc<OnceLock<Thread>>,
    /// The reader leaves the socket to a driver.
    parked: AtomicBool,
    /// A caller reads the socket now.
    driver: AtomicBool,
    driven_at: AtomicU64,
    /// Waits that go straight to sleep, because spinning did not pay.
    spin_rest: AtomicU32,
    failed: AtomicBool,
}

impl Lane {
    /// Starts the lane's threads. `rest`: bytes that were read with the handshake.
    ///
    /// # Errors
    /// No thread can be had.
    pub(crate) fn start(
        socket: OwnedFd,
        context: LaneContext,
        rest: &[u8],
    ) -> std::io::Result<Arc<Self>> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        // Every call on pages says itself that it must not block; the reader's wait for a frame must.
        rustix::io::ioctl_fionbio(&socket, false)?;
        set_socket_timeout(&socket, Timeout::Recv, None)?;
        set_socket_timeout(&socket, Timeout::Send, None)?;
        let hub = Arc::clone(&context.hub);
        let name = format!("kvt-lane-{}-{}", context.peer.0, context.lane.0);
        let writer = Arc::new(OnceLock::new());
        let io = LaneIo {
            context,
            inbound: Inbound::new(rest),
            outbound: Outbound::new(Arc::clone(&writer)),
            blocked: false,
        };
        let lane = Arc::new(Self {
            id: io.context.lane,
            socket,
            io: Mutex::new(Some(io)),
            reader: OnceLock::new(),
            writer,
            parked: AtomicBool::new(false),
            driver: AtomicBool::new(false),
            driven_at: AtomicU64::new(0),
            spin_rest: AtomicU32::new(0),
            failed: AtomicBool::new(false),
        });
        let spawn = |suffix: &str, run: fn(&Self)| {
            let (worker, alive) = (Arc::clone(&lane), hub.lane_alive());
            let builder = std::thread::Builder::new().name(format!("{name}{suffix}"));
            builder.stack_size(STACK).spawn(move || {
                run(&worker);
                drop(worker);
                drop(alive);
            })
        };
        let started = spawn("w", Self::write_on).and_then(|writer| {
            let _ = lane.writer.set(writer.thread().clone());
            let reader = spawn("", Self::read_on)?;
            let _ = lane.reader.set(reader.thread().clone());
            Ok(())
        });
        if let Err(error) = started {
            // A writer without a reader must not stay behind.
            lane.failed.store(true, Ordering::SeqCst);
            lane.kick();
            return Err(error);
        }
        Ok(lane)
    }

    /// Wakes the writer: there is work, or room in the socket to wait for.
    pub(crate) fn kick(&self) {
        if let Some(writer) = self.writer.get() {
            writer.unpark();
        }
    }

    /// Ends the connection; the reader notices and reports the lane down.
    pub(crate) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.kick();
    }

    /// Whether the connection has ended, so that there is nothing to drive any more.
    pub(crate) fn is_over(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Sends in the calling thread if nobody else is at it. Returns whether it did.
    pub(crate) fn try_pump(&self) -> bool {
        let mut io = match self.io.try_lock() {
            Ok(io) => io,
            Err(TryLockError::Poisoned(io)) => io.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        if self.send(&mut io) {
            drop(io);
            self.kick();
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Option<LaneIo>> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what there is. Returns whether the socket is full, so that the writer must wait for it.
    fn send(&self, io: &mut Option<LaneIo>) -> bool {
        let Some(open) = io.as_mut() else {
            return false;
        };
        match open.send(self.socket.as_fd()) {
            Ok(()) => open.blocked,
            Err(error) => {
                self.fail(io, &error);
                false
            }
        }
    }

    /// Reads what there is, then sends. Returns whether the socket is full.
    fn pump(&self, io: &mut Option<LaneIo>) -> bool {
        let Some(open) = io.as_mut() else {
            return false;
        };
        if let Err(error) = open.receive(self.socket.as_fd()) {
            self.fail(io, &error);
        }
        self.send(io)
    }

    /// Deals with bytes that were read outside of the lock, then sends. Returns whether the socket is full.
    fn take_in(&self, io: &mut Option<LaneIo>, buffer: &mut Box<[u8]>, got: usize) -> bool {
        let Some(open) = io.as_mut() else {
            return false;
        };
        let LaneIo {
            context,
            inbound,
            outbound,
            ..
        } = open;
        let taken = inbound.take_in(context, self.socket.as_fd(), outbound, buffer, got);
        if let Err(error) = taken {
            self.fail(io, &error);
        }
        self.send(io)
    }

    fn want(io: &Option<LaneIo>) -> Want {
        match io {
            None => Want::Nothing,
            Some(open) if open.outbound.is_clogged() => Want::Answered,
            Some(open) if open.inbound.is_between_frames() => Want::Frame,
            Some(open) => Want::Payload(open.inbound.payload_left()),
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
        // The other thread notices by one of these two.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.kick();
    }
}

impl LaneIo {
    fn send(&mut self, socket: BorrowedFd<'_>) -> Result<(), LaneError> {
        let sent = self.outbound.pump(&self.context, socket)?;
        self.blocked = sent == Sent::Blocked;
        Ok(())
    }

    fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<(), LaneError> {
        self.inbound.pump(&self.context, socket, &mut self.outbound)
    }
}
