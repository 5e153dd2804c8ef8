//! The connections to one peer: its control stream's outbox and its lanes.

use std::{
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{devices::PeerMemory, lanes::Lanes, redial::Redial, write::Turns};
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use crate::{
    ids::{InstanceId, LaneId, PeerId},
    plan::pairing::Pairing,
    transfer::LaneSetup,
    wire::{
        control::Control,
        hello::{HostIdentity, RegionAddress},
        rdma::RailOffer,
    },
};

/// Unsent control bytes at which a peer that does not read them is given up: several grants of the largest size.
const OUTBOX_BYTES_MAX: usize = 32 << 20;

/// What was agreed with a peer.
#[derive(Clone, Debug)]
pub(crate) struct Agreement {
    pub(crate) instance: InstanceId,
    pub(crate) generation: u64,
    /// Joins lanes to the control stream; drawn by the dialling side.
    pub(crate) link: u64,
    pub(crate) lanes: u8,
    pub(crate) address: String,
    pub(crate) host: HostIdentity,
    pub(crate) regions: Arc<[RegionAddress]>,
    /// Allocations of its device, as it describes them.
    pub(crate) shares: Arc<[Vec<u8>]>,
    /// Its regions may be written by address.
    pub(crate) by_address: bool,
    /// Its RDMA devices.
    pub(crate) rails: Arc<[RailOffer]>,
    pub(crate) outgoing: Result<Arc<Pairing>, String>,
    pub(crate) incoming: Result<Arc<Pairing>, String>,
}

#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

/// The connections to one peer.
pub(crate) struct Link {
    pub(crate) peer: PeerId,
    pub(crate) agreement: Agreement,
    pub(crate) path: Mutex<(&'static str, String)>,
    pub(crate) handshake: Duration,
    control: OwnedFd,
    outbox: Mutex<Outbox>,
    pub(crate) lanes: Lanes,
    pub(super) peer_memory: OnceLock<PeerMemory>,
    /// Where this side dialled it; `None` if the peer dialled.
    pub(crate) dialled: Option<SocketAddr>,
    pub(super) redial: Mutex<Redial>,
    /// Rooms of ours that write to its addresses.
    pub(super) writes: Turns,
    is_closed: AtomicBool,
}

/// The control stream's peer has not read for too long.
pub(crate) struct OutboxFull;

impl Link {
    pub(crate) fn new(
        peer: PeerId,
        agreement: Agreement,
        control: OwnedFd,
        handshake: Duration,
        dialled: Option<SocketAddr>,
    ) -> Self {
        Self {
            peer,
            agreement,
            path: Mutex::new(("none", "no data connection is open yet".into())),
            handshake,
            control,
            outbox: Mutex::default(),
            lanes: Lanes::default(),
            peer_memory: OnceLock::new(),
            dialled,
            redial: Mutex::default(),
            writes: Turns::default(),
            is_closed: AtomicBool::new(false),
        }
    }

    /// Appends a message to the outbox.
    pub(crate) fn queue(&self, message: &Control) -> Result<(), OutboxFull> {
        let mut outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        if outbox.bytes.len() - outbox.sent > OUTBOX_BYTES_MAX {
            return Err(OutboxFull);
        }
        message.encode(&mut outbox.bytes);
        Ok(())
    }

    /// Sends what the socket takes; the control thread goes on when it takes more.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let mut outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        while outbox.sent < outbox.bytes.len() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(&self.control, &outbox.bytes[outbox.sent..], flags) {
                Ok(sent) => outbox.sent += sent,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        outbox.bytes.clear();
        outbox.bytes.shrink_to(64 << 10);
        outbox.sent = 0;
        Ok(())
    }

    /// Destroys this end of a lane's queue pair, as soon as the thread that owns it gets to it.
    pub(crate) fn fence(&self, id: LaneId, reason: &str) {
        if let Some(lane) = self.lanes.all().iter().find(|lane| lane.id() == id) {
            tracing::info!(peer = %self.peer, lane = id.0, reason, "fencing a data connection");
            lane.fence(reason);
        }
    }

    pub(crate) fn note_path(&self, setup: &LaneSetup) {
        let mut path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        *path = (setup.path, setup.path_reason.clone());
    }

    /// Whether it has been shut down: lanes that come now are not wanted.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// Ends every connection. Threads that own them notice.
    pub(crate) fn shut_down(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        let _ = shutdown(&self.control, Shutdown::Both);
        for lane in self.lanes.all() {
            lane.shut_down();
        }
    }
}
