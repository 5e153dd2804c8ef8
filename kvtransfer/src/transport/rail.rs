//! Rails: the RDMA devices that an engine uses, and their queue pairs to its peers.
//!
//! ```text
//! credits   who may send a frame (pure)             buffers   frames of one queue pair, registered
//! targets   the peer's addresses and keys (pure)    open      devices, registrations
//! prepare   making a queue pair; compat connector   standard  the standard connector
//! lane      one queue pair's state                  pump      pages and frames out
//! packing   small pieces gathered, landed, scattered ring      where they land (pure)
//! thread    the one owner of all queue pairs        arrive    completions and frames in
//! drive     its place taken for a small transfer
//! requests  what others ask of it                   life      drain, destroy, tell the peer, make room
//! counters  what it asked of its device (pure)      budget    a bound on memory for packing (pure)
//! ```
//! A chain is WRITEs straight from the pages, gathered where their targets touch, none of them signalled, and a SEND with the
//! batch header after them (or the header itself as a WRITE with immediate data). The receiver counts notices and answers;
//! a completion at the sender only means that its pages are free again (promise P8).

mod address;
mod arrive;
mod budget;
mod buffers;
mod counters;
mod credits;
mod drive;
mod lane;
mod life;
mod open;
mod packing;
#[cfg(feature = "testing")]
pub(crate) mod posting;
mod prepare;
mod pump;
mod requests;
mod ring;
mod standard;
mod targets;
mod thread;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32},
    },
    time::Duration,
};

pub(crate) use budget::PackingBudgets;
pub use counters::RailCounts;
pub(crate) use lane::QueuePairLane;
pub(crate) use prepare::{Prepared, QpParts};
pub(crate) use standard::Listening;

use self::{counters::Counters, requests::Request, thread::Core};
use crate::{
    clock,
    config::RdmaConfig,
    gpu::verdict::GpuDirect,
    layout::RegionId,
    memory::{Region, device::Device},
    plan::descriptor::Place,
    time::Time,
    transport::verbs::{
        chain::Sge, context::Context, device::GidEntry, mr::RegisteredRegion, pd::Pd,
        probe::Capabilities,
    },
    wire::rdma::{Connector, RailOffer},
};

/// The port that is used of a device; eRDMA devices have one, and others name their ports as devices of their own.
const PORT: u8 = 1;

/// What is said of a device that does not come back.
const LOST: &str = "the device failed or was removed";

/// One RDMA device with the engine's memory registered.
pub(crate) struct Rail {
    /// The device's name.
    pub(crate) name: String,
    pub(crate) connector: Connector,
    pub(super) settings: RdmaConfig,
    context: Arc<Context>,
    /// One per engine and device: a key is only good within it, and an engine is one domain of trust.
    pd: Arc<Pd>,
    /// `None` for a region without bytes, and for one that the device does not reach.
    regions: Vec<Option<RegisteredRegion>>,
    /// Regions that the device does not reach, ascending.
    staged: Vec<u32>,
    /// How it reaches a GPU's memory, where regions lie there.
    verdicts: Vec<GpuDirect>,
    /// The GPU that must be flushed before its kernels see what peers wrote, over this rail or another.
    flushed: Arc<OnceLock<Arc<dyn Device>>>,
    /// Outlives its registrations.
    _memory: Vec<Arc<Region>>,
    chunk_bytes: u64,
    capabilities: Capabilities,
    gid: Option<GidEntry>,
    address: std::net::Ipv4Addr,
    mtu: u32,
    lid: u16,
    send_queue: u32,
    requests: Mutex<Vec<Request>>,
    waker: mio::Waker,
    is_asleep: AtomicBool,
    is_stopped: AtomicBool,
    /// The device failed or was removed: it is let go once its last queue pair is gone. Set while `core` is locked.
    is_lost: AtomicBool,
    /// The thread has ended: nobody takes requests any more. Set while `requests` is locked.
    is_over: AtomicBool,
    /// A thread has taken the place of the rail's own for the queue pair in this place, counted from one; zero without.
    driver: AtomicU32,
    /// The rail's thread looks at every queue pair within milliseconds. It is cleared under the core's lock only.
    is_near: AtomicBool,
    counters: Counters,
    core: Mutex<Core>,
}

impl Rail {
    /// What peers must know of it.
    pub(crate) fn offer(&self) -> RailOffer {
        let rkeys = self
            .regions
            .iter()
            .flatten()
            .flat_map(RegisteredRegion::rkeys);
        RailOffer {
            name: self.name.clone(),
            connector: self.connector,
            imm: self.offers_immediate(),
            message_bytes_max: self.capabilities.wr_bytes_max.value,
            chunk_bytes: self.chunk_bytes,
            rkeys: rkeys.collect(),
            staged: self.staged.clone(),
        }
    }

    fn offers_immediate(&self) -> bool {
        self.settings.immediate && self.capabilities.immediate.value
    }

    /// Whether the device reaches a region.
    fn reaches(&self, region: RegionId) -> bool {
        self.staged.binary_search(&region.0).is_err()
    }

    /// A piece of our memory as a WRITE names it.
    fn source(&self, place: Place, len: u64) -> Result<Sge, String> {
        let region = self.regions.get(place.region.0 as usize);
        let region = region.and_then(Option::as_ref);
        let piece = region.and_then(|region| region.piece(place.offset));
        let piece = piece.filter(|piece| len <= piece.bytes);
        let piece = piece.ok_or("pages outside of the registered memory")?;
        Ok(Sge {
            address: piece.address,
            bytes: u32::try_from(len).map_err(|_| "a piece of 4 GiB or more")?,
            lkey: piece.lkey,
        })
    }

    /// Why there is nothing to be had of it any more.
    fn lost(&self) -> String {
        format!("{}: {LOST}", self.name)
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_requests(&self) -> MutexGuard<'_, Vec<Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often it is looked whether a rail is still in use.
const RELEASE_LOOK: Duration = Duration::from_millis(1);

/// Holds a rail until its device is lost; the rail's thread empties it then.
type Slot = Mutex<Option<Arc<Rail>>>;

/// The rails of an engine, and why there are none, if so.
pub(crate) struct Rails {
    /// What the hello says of each: a peer names them by their numbers, so a lost one keeps its own.
    offers: Vec<RailOffer>,
    slots: Vec<Arc<Slot>>,
    refusal: String,
}

impl Rails {
    /// Of devices that are all open: from here on each has a thread.
    fn new(rails: Vec<(Arc<Rail>, mio::Poll)>) -> Result<Self, String> {
        let offers = rails.iter().map(|(rail, _)| rail.offer()).collect();
        let slots = rails.into_iter().map(|(rail, poll)| rail.start(poll));
        Ok(Self {
            offers,
            slots: slots.collect::<Result<_, _>>()?,
            refusal: String::new(),
        })
    }

    /// None, for the reason given.
    pub(crate) fn none(refusal: String) -> Self {
        Self {
            offers: Vec::new(),
            slots: Vec::new(),
            refusal,
        }
    }

    /// What the hello says of them.
    pub(crate) fn offers(&self) -> Vec<RailOffer> {
        self.offers.clone()
    }

    /// The rail of that number.
    ///
    /// # Errors
    /// A sentence that says why there is none.
    pub(crate) fn get(&self, number: u8) -> Result<Arc<Rail>, String> {
        let index = usize::from(number);
        let (Some(slot), Some(offer)) = (self.slots.get(index), self.offers.get(index)) else {
            return Err("a rail that this engine did not offer".into());
        };
        let rail = slot.lock().unwrap_or_else(PoisonError::into_inner).clone();
        rail.ok_or_else(|| format!("{}: {LOST}", offer.name))
    }

    fn alive(&self) -> impl Iterator<Item = Arc<Rail>> {
        let slots = self.slots.iter();
        slots.filter_map(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Their devices and connectors, and why there is none, for somebody who only looks.
    pub(crate) fn faces(&self) -> (Vec<(String, Connector)>, String) {
        let faces = self
            .offers
            .iter()
            .map(|offer| (offer.name.clone(), offer.connector));
        (faces.collect(), self.refusal.clone())
    }

    /// Which of our rails goes with which of a peer's: those of the same connector, in order, the shorter list's ones used
    /// again.
    ///
    /// # Errors
    /// A sentence that says why there is no pair.
    pub(crate) fn pairs(&self, offers: &[RailOffer]) -> Result<Vec<(u8, u8)>, String> {
        if self.offers.is_empty() {
            return Err(self.refusal.clone());
        }
        if offers.is_empty() {
            return Err("the peer uses no RDMA device".into());
        }
        let mut pairs = Vec::new();
        for connector in [Connector::Compat, Connector::Standard] {
            let ours = (0_u8..)
                .zip(&self.offers)
                .filter(|(_, offer)| offer.connector == connector);
            let ours: Vec<u8> = ours.map(|(number, _)| number).collect();
            let theirs = (0_u8..)
                .zip(offers)
                .filter(|(_, offer)| offer.connector == connector);
            let theirs: Vec<u8> = theirs.map(|(number, _)| number).collect();
            if !ours.is_empty() && !theirs.is_empty() {
                let count = ours.len().max(theirs.len());
                let both = ours.iter().cycle().zip(theirs.iter().cycle());
                pairs.extend(both.take(count).map(|(our, their)| (*our, *their)));
            }
        }
        if pairs.is_empty() {
            let (ours, theirs) = (self.offers[0].connector.name(), offers[0].connector.name());
            return Err(format!(
                "RDMA devices connect in {ours} mode here and in {theirs} mode at the peer; put both in one mode"
            ));
        }
        Ok(pairs)
    }

    /// What each has asked of its device.
    pub(crate) fn counts(&self) -> Vec<RailCounts> {
        let rails = self.alive();
        rails.map(|rail| rail.counters.counts(&rail.name)).collect()
    }

    /// How each reaches a GPU's memory, where regions lie there.
    pub(crate) fn verdicts(&self) -> Vec<GpuDirect> {
        let rails = self.alive();
        rails.flat_map(|rail| rail.verdicts.clone()).collect()
    }

    /// Whether there are any whose device is there.
    pub(crate) fn is_open(&self) -> bool {
        self.alive().next().is_some()
    }

    /// Ends them, their registrations included. Their queue pairs must have been told to end.
    ///
    /// # Errors
    /// The rails that were still in use at the deadline, and a sentence that names the first.
    pub(crate) fn close(self, deadline: Time) -> Result<(), (Self, String)> {
        self.stop();
        let mut reason = None;
        for slot in &self.slots {
            let taken = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            let used = taken.and_then(|rail| until_unused(rail, deadline).err());
            if let Some(rail) = used {
                let name = &rail.name;
                reason.get_or_insert(format!("device {name} is still in use; release again"));
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(rail);
            }
        }
        match reason {
            None => Ok(()),
            Some(reason) => Err((self, reason)),
        }
    }

    /// Ends their threads, once their queue pairs are gone.
    pub(crate) fn stop(&self) {
        for rail in self.alive() {
            rail.stop();
        }
    }
}

/// Waits for everybody else to let go of a rail: its thread and its queue pairs hold it, and neither says when it lets go.
fn until_unused(mut rail: Arc<Rail>, deadline: Time) -> Result<(), Arc<Rail>> {
    loop {
        rail = match Arc::try_unwrap(rail) {
            Ok(unused) => {
                drop(unused);
                return Ok(());
            }
            Err(used) if clock::now() < deadline => used,
            Err(used) => return Err(used),
        };
        std::thread::sleep(RELEASE_LOOK);
    }
}
