//! One queue pair to one peer, as the thread of its rail sees it.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    Rail,
    buffers::Buffers,
    credits::Credits,
    packing::{PackMemory, Packed, Packing},
    requests::{Key, Request},
    targets::Targets,
};
use crate::{
    engine::{hub::Hub, link::Link},
    ids::{LaneId, PeerId},
    memory::Gate,
    plan::descriptor::{Descriptor, PairCursor},
    time::Time,
    transfer::{BatchOut, LaneSetup},
    transport::verbs::{
        chain::Chain,
        cm::{CmId, EventChannel},
        cq::Cq,
        qp::Qp,
        slots::Slots,
    },
    wire::{control::ControlDecoder, lane::Ack},
};

/// What the engine holds of a queue pair.
pub(crate) struct QueuePairLane {
    pub(crate) id: LaneId,
    pub(super) key: Key,
    pub(super) rail: Arc<Rail>,
    /// Work was announced and not looked at yet.
    pub(super) kicked: AtomicBool,
    pub(super) over: AtomicBool,
    /// Work requests posted, and batches that were packed; for telemetry.
    pub(super) posted: AtomicU64,
    pub(super) packed: AtomicU64,
}

impl QueuePairLane {
    /// There is work: the rail's thread is woken if it sleeps.
    pub(crate) fn kick(&self) {
        // A thread that drives sees the flag: either it looks after this, or it has left and is not counted any more.
        let is_news = !self.kicked.swap(true, Ordering::SeqCst);
        if is_news && self.rail.driven().is_none() {
            self.rail.request(Request::Kick(self.key));
        }
    }

    /// Destroys this end, tells the peer, and has a new queue pair made.
    pub(crate) fn fence(&self, reason: &str) {
        let reason = reason.to_owned();
        self.rail.request(Request::Fence(self.key, reason));
    }

    /// Destroys this end for good: the peer is gone or no longer wanted.
    pub(crate) fn close(&self) {
        self.rail.request(Request::Close(self.key));
    }

    /// Whether work was announced, which then counts as seen.
    pub(super) fn take_kick(&self) -> bool {
        // Mostly there is none, and to look costs less than to swap.
        self.has_kick() && self.kicked.swap(false, Ordering::SeqCst)
    }

    pub(super) fn has_kick(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Work requests posted so far, and batches that were sent packed.
    pub(crate) fn operations(&self) -> (u64, u64) {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (read(&self.posted), read(&self.packed))
    }
}

/// Where a queue pair is in its life.
#[derive(Debug)]
pub(super) enum Phase {
    /// Connected, but no frame has come yet: the path is not proven.
    Greeting {
        /// This side speaks first.
        is_active: bool,
        /// It has spoken.
        has_spoken: bool,
        until: Time,
    },
    /// Batches flow.
    Up,
    /// In the error state: its work requests come back until `until`, then it is destroyed.
    Draining { until: Time, reason: String },
    /// This end is destroyed. The peer's may not be.
    Fenced { reason: String },
}

/// A batch being posted.
pub(super) struct Writing {
    pub(super) batch: BatchOut,
    pub(super) gate: Arc<Gate>,
    pub(super) way: Way,
    /// The room ended meanwhile: only the notice is left to send.
    pub(super) is_void: bool,
}

/// How the bytes of a batch reach the peer's pages.
#[expect(
    clippy::large_enum_variant,
    reason = "one per queue pair, in place; boxing it would allocate for every batch"
)]
pub(super) enum Way {
    /// The card puts them there.
    Direct(PairCursor),
    /// The peer does, from its landing memory.
    Packed(Packed),
}

impl Writing {
    pub(super) fn set_packed(&mut self, state: Packed) {
        self.way = Way::Packed(state);
    }
}

/// The verbs objects of a queue pair, in the order in which they must go.
pub(super) struct Wires {
    pub(super) qp: Qp,
    /// `rdma_cm`'s side of it, for the standard connector.
    pub(super) connection: Option<Connection>,
    pub(super) cq: Arc<Cq>,
    pub(super) buffers: Buffers,
    /// Where the peer writes packed batches.
    pub(super) landing: Option<PackMemory>,
    /// Where ours are gathered; made for the first of them.
    pub(super) packing: Option<PackMemory>,
}

/// An rdma_cm connection, which says when the peer has left.
pub(super) struct Connection {
    pub(super) id: CmId,
    pub(super) channel: Arc<EventChannel>,
}

/// What is agreed with the peer about a queue pair.
pub(super) struct Terms {
    pub(super) setup: LaneSetup,
    pub(super) targets: Targets,
    /// Where batch headers are written when notices travel as immediate data.
    pub(super) slots: Option<(u64, u32)>,
    /// Receives that the peer has posted.
    pub(super) peer_receives: u16,
    /// Bytes that one WRITE may have.
    pub(super) message_bytes_max: u64,
    /// The peer's regions are registered in chunks of so many bytes.
    pub(super) peer_chunk_bytes: u64,
    /// Some region of either side is out of the devices' reach.
    pub(super) has_staged: bool,
    pub(super) is_active: bool,
}

/// Which completions make an event, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Watch {
    /// None: somebody must look.
    Nothing,
    /// Frames that the peer marked, which answers are not, and failures.
    Marked,
    /// Every one.
    All,
}

/// The connection beside a queue pair.
pub(super) struct Side {
    pub(super) socket: OwnedFd,
    pub(super) decoder: ControlDecoder,
    /// The peer has said that its end is destroyed.
    pub(super) peer_is_down: bool,
    /// Why, in its words.
    pub(super) peer_reason: String,
}

/// One queue pair, owned by whoever holds the rail's core.
pub(super) struct LaneIo {
    pub(super) handle: Arc<QueuePairLane>,
    /// A shutdown waits until the queue pair is gone: then peers cannot write any more.
    pub(super) _alive: Arc<()>,
    pub(super) hub: Arc<Hub>,
    pub(super) peer: PeerId,
    /// Not kept alive by its own lanes.
    pub(super) link: Weak<Link>,
    /// Gone when the queue pair is destroyed.
    pub(super) wires: Option<Wires>,
    pub(super) terms: Terms,
    pub(super) side: Side,
    pub(super) phase: Phase,
    /// Closed for good: nothing is waited for when the queue pair is gone.
    pub(super) is_closing: bool,
    /// The active side has said hello, and is still to be told of so many failures.
    pub(super) answer_hello: Option<u64>,
    pub(super) credits: Credits,
    /// Chains that were posted; each says how many batches are done with when it is.
    pub(super) sends: Slots<u64>,
    pub(super) chain: Chain,
    pub(super) descriptors: Box<[Descriptor]>,
    /// The unsent part of `descriptors`.
    pub(super) descriptor_at: usize,
    pub(super) descriptor_end: usize,
    pub(super) writing: Option<Writing>,
    pub(super) packing: Packing,
    pub(super) acks: VecDeque<Ack>,
    /// Batches that were answered, and the last of the answers: they go to the peer once more when this end is destroyed.
    pub(super) answered: u64,
    pub(super) answers: VecDeque<Ack>,
    /// The same of the peer, when its end is destroyed.
    pub(super) peer_answers: Option<(u64, Vec<Ack>)>,
    /// Whether frames travel in the work request itself.
    pub(super) is_inline: bool,
    pub(super) sges_max: usize,
    /// Frames that did not travel inline, so far.
    pub(super) frames_sent: u64,
    /// Batches given to this lane; of these, acknowledged, and done with by the card.
    pub(super) given: u64,
    pub(super) acked: u64,
    pub(super) reaped: u64,
    pub(super) reported: u64,
    pub(super) last_sent: Time,
    pub(super) last_heard: Time,
    /// When something last happened: afterwards it is looked at for a while, then it sleeps.
    pub(super) last_active: Time,
    /// When the clock was last looked at for it.
    pub(super) last_timed: Time,
    /// What its completion queue will wake us for.
    pub(super) watch: Watch,
    /// Whoever pushed what it waits for is expected to look for the answer.
    pub(super) is_awaited: bool,
    /// Something completed since it was last pumped.
    pub(super) is_stirred: bool,
    /// The node may have a batch for it: it was not asked since it last might have got one.
    pub(super) is_hungry: bool,
    /// The thread that opened it waits for the outcome.
    pub(super) opened: Option<crossbeam_channel::Sender<Result<(), String>>>,
}

impl LaneIo {
    /// Whether answers of the peer are waited for.
    pub(super) fn is_awaiting(&self) -> bool {
        self.acked < self.given
    }

    /// Whether it need not be looked at: something will wake us if it has anything.
    pub(super) fn is_asleep(&self) -> bool {
        match self.watch {
            Watch::Nothing => false,
            Watch::Marked => !self.is_stirred && !self.is_awaiting(),
            Watch::All => !self.is_stirred,
        }
    }

    /// Arms its completion queue, for answers too unless `is_near` and it waits for none, or somebody looks for them. Returns whether there was something
    /// after all: what completed before it was armed makes no event.
    ///
    /// # Errors
    /// Why the queue pair cannot be used any more, in words.
    pub(super) fn arm(&mut self, now: Time, is_near: bool) -> Result<bool, String> {
        let is_cared_for = !self.is_awaiting() || self.is_awaited;
        let is_up = matches!(self.phase, Phase::Up) && !self.has_work();
        let wanted = if is_near && is_up && is_cared_for {
            Watch::Marked
        } else {
            Watch::All
        };
        if self.watch >= wanted {
            return Ok(false);
        }
        if let Some(wires) = &self.wires {
            let armed = wires.cq.arm(wanted == Watch::Marked);
            armed.map_err(|error| error.to_string())?;
        }
        self.watch = wanted;
        self.poll(now)
    }

    /// Whether there is something to post that only waits for its turn.
    pub(super) fn has_work(&self) -> bool {
        self.writing.is_some() || !self.acks.is_empty() || self.answer_hello.is_some()
    }

    /// Whether it must be looked at although nothing woke it.
    pub(super) fn is_due(&self, now: Time, heartbeat: Duration) -> bool {
        matches!(self.phase, Phase::Draining { .. })
            || self.is_settled()
            || now >= self.next_timeout(heartbeat)
    }

    /// When it must be looked at even if nothing happens.
    pub(super) fn next_timeout(&self, heartbeat: Duration) -> Time {
        match &self.phase {
            Phase::Greeting { until, .. } | Phase::Draining { until, .. } => *until,
            Phase::Up => self.last_sent.max(self.last_timed) + heartbeat,
            Phase::Fenced { .. } => Time::NEVER,
        }
    }
}
