//! Rails: the RDMA devices that an engine uses, and their queue pairs to its peers.
//!
//! ```text
//! credits   who may send a frame (pure)             buffers   frames of one queue pair, registered
//! targets   the peer's addresses and keys (pure)    open      devices, registrations
//! prepare   making a queue pair; compat connector   standard  the standard connector
//! lane      one queue pair's state                  pump      pages and frames out
//! thread    the one owner of all queue pairs        arrive    completions and frames in
//! requests  what others ask of it                   life      drain, destroy, tell the peer, make room
//! counters  what it asked of its device (pure)
//! ```
//! A chain is WRITEs straight from the pages, gathered where their targets touch, none of them signalled, and a SEND with the
//! batch header after them (or the header itself as a WRITE with immediate data). The receiver counts notices and answers;
//! a completion at the sender only means that its pages are free again (promise P8).

mod address;
mod arrive;
mod buffers;
mod counters;
mod credits;
mod lane;
mod life;
mod open;
#[cfg(feature = "testing")]
pub(crate) mod posting;
mod prepare;
mod pump;
mod requests;
mod standard;
mod targets;
mod thread;

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU32},
};

pub use counters::RailCounts;
pub(crate) use lane::QueuePairLane;
pub(crate) use prepare::{Prepared, QpParts};
pub(crate) use standard::Listening;

use self::{counters::Counters, requests::Request, thread::Core};
use crate::{
    config::RdmaConfig,
    memory::Region,
    plan::descriptor::Place,
    transport::verbs::{
        chain::Sge, context::Context, device::GidEntry, mr::RegisteredRegion, pd::Pd,
        probe::Capabilities,
    },
    wire::rdma::{Connector, RailOffer},
};

/// The port that is used of a device; eRDMA devices have one, and others name their ports as devices of their own.
const PORT: u8 = 1;

/// One RDMA device with the engine's memory registered.
pub(crate) struct Rail {
    /// The device's name.
    pub(crate) name: String,
    /// Its index in the hello.
    pub(crate) number: u8,
    pub(crate) connector: Connector,
    pub(super) settings: RdmaConfig,
    context: Arc<Context>,
    /// One per engine and device: a key is only good within it, and an engine is one domain of trust.
    pd: Arc<Pd>,
    /// `None` for a region without bytes.
    regions: Vec<Option<RegisteredRegion>>,
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
    /// The thread has ended: nobody takes requests any more. Set while `requests` is locked.
    is_over: AtomicBool,
    /// Threads that have taken the place of the rail's own: none or one.
    drivers: AtomicU32,
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
        }
    }

    fn offers_immediate(&self) -> bool {
        self.settings.immediate && self.capabilities.immediate.value
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

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_requests(&self) -> MutexGuard<'_, Vec<Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The rails of an engine, and why there are none, if so.
pub(crate) struct Rails {
    rails: Vec<Arc<Rail>>,
    refusal: String,
}

impl Rails {
    /// None, for the reason given.
    pub(crate) fn none(refusal: String) -> Self {
        Self {
            rails: Vec::new(),
            refusal,
        }
    }

    /// What the hello says of them.
    pub(crate) fn offers(&self) -> Vec<RailOffer> {
        self.rails.iter().map(|rail| rail.offer()).collect()
    }

    pub(crate) fn get(&self, number: u8) -> Option<&Arc<Rail>> {
        self.rails.get(usize::from(number))
    }

    /// Which of our rails goes with which of a peer's: those of the same connector, in order, the shorter list's ones used
    /// again.
    ///
    /// # Errors
    /// A sentence that says why there is no pair.
    pub(crate) fn pairs(&self, offers: &[RailOffer]) -> Result<Vec<(u8, u8)>, String> {
        if self.rails.is_empty() {
            return Err(self.refusal.clone());
        }
        if offers.is_empty() {
            return Err("the peer uses no RDMA device".into());
        }
        let mut pairs = Vec::new();
        for connector in [Connector::Compat, Connector::Standard] {
            let ours = self.rails.iter().filter(|rail| rail.connector == connector);
            let ours: Vec<u8> = ours.map(|rail| rail.number).collect();
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
            let (ours, theirs) = (self.rails[0].connector.name(), offers[0].connector.name());
            return Err(format!(
                "RDMA devices connect in {ours} mode here and in {theirs} mode at the peer; put both in one mode"
            ));
        }
        Ok(pairs)
    }

    /// What each has asked of its device.
    pub(crate) fn counts(&self) -> Vec<RailCounts> {
        let rails = self.rails.iter();
        rails.map(|rail| rail.counters.counts(&rail.name)).collect()
    }

    /// Whether there are any.
    pub(crate) fn is_open(&self) -> bool {
        !self.rails.is_empty()
    }

    /// Ends them, their registrations included. Their queue pairs must have been told to end.
    ///
    /// # Errors
    /// The rails that were still in use at the deadline, and a sentence that names the first.
    pub(crate) fn close(self, deadline: crate::time::Time) -> Result<(), (Self, String)> {
        self.stop();
        let mut left = Vec::new();
        for mut rail in self.rails {
            loop {
                rail = match Arc::try_unwrap(rail) {
                    Ok(unused) => {
                        drop(unused);
                        break;
                    }
                    Err(used) if crate::clock::now() < deadline => used,
                    Err(used) => {
                        left.push(used);
                        break;
                    }
                };
                // Its thread and its queue pairs hold it; neither says when it lets go.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        let Some(first) = left.first() else {
            return Ok(());
        };
        let reason = format!("device {} is still in use; release again", first.name);
        let left = Self {
            rails: left,
            refusal: self.refusal,
        };
        Err((left, reason))
    }

    /// Ends their threads, once their queue pairs are gone.
    pub(crate) fn stop(&self) {
        for rail in &self.rails {
            rail.stop();
        }
    }
}
