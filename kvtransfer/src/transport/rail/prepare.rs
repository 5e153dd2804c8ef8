//! Making a queue pair: its frames' memory, its receives, the out-of-band connector, and handing it to the rail's thread.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    PORT, Rail,
    arrive::receive_id,
    buffers::Buffers,
    credits::Credits,
    lane::{Connection, LaneIo, Phase, QueuePairLane, Side, Terms, Watch, Wires},
    packing::{self, PackMemory, Packing},
    requests::{Key, Request},
    targets::Targets,
};
use crate::{
    clock,
    engine::{hub::Hub, link::Link},
    ids::LaneId,
    plan::descriptor::Descriptor,
    time::Time,
    transfer::LaneSetup,
    transport::verbs::{
        chain::{CHAIN_WRS_MAX, Chain},
        cq::Cq,
        error::VerbsError,
        qp::{LocalPath, PSN_MASK, Qp, QpAddress},
        slots::Slots,
    },
    wire::{
        control::ControlDecoder,
        lane::PayloadMode,
        rdma::{Connector, Endpoint, Landing, QpEnd, QpTerms, RailOffer},
    },
};

/// Receives of one queue pair: the batches of a peer's window, the answers to ours, and some.
pub(super) const RECEIVES: u16 = 64;

/// A queue pair that is not the rail's yet. Dropping it destroys it.
pub(crate) struct Prepared {
    pub(super) rail: Arc<Rail>,
    pub(super) key: Key,
    /// Until they are the queue pair's.
    buffers: Option<Buffers>,
    pub(super) slots: (u64, u32),
    pub(super) wires: Option<Wires>,
    /// What the peer is offered for packed batches. Goes after the queue pair.
    landing: Option<PackMemory>,
    psn: u32,
}

/// What a queue pair is handed over with.
pub(crate) struct QpParts {
    pub(crate) hub: Arc<Hub>,
    pub(crate) link: Arc<Link>,
    pub(crate) lane: LaneId,
    pub(crate) socket: OwnedFd,
    pub(crate) decoder: ControlDecoder,
    /// The peer's end.
    pub(crate) terms: QpTerms,
    /// Which of the peer's rails it is on.
    pub(crate) offer: RailOffer,
    pub(crate) is_active: bool,
    pub(crate) path_reason: String,
    /// When it must have said hello.
    pub(crate) until: Time,
    /// Told when it has, or has failed.
    pub(crate) opened: Option<crossbeam_channel::Sender<Result<(), String>>>,
}

impl Prepared {
    /// A queue pair to be connected out of band.
    ///
    /// # Errors
    /// The device's answer, in words.
    pub(crate) fn compat(rail: &Arc<Rail>) -> Result<Self, String> {
        let words = |error: VerbsError| error.to_string();
        let mut prepared = Self::reserve(rail)?;
        let caps = rail.caps();
        let cq = Cq::create(&rail.context, caps.completions(), true, prepared.key.place)
            .map_err(words)?;
        let mut qp = Qp::create(&rail.pd, &cq, &cq, caps).map_err(words)?;
        qp.enter_init(PORT).map_err(words)?;
        prepared.fill(qp, None, cq)?;
        Ok(prepared)
    }

    pub(super) fn reserve(rail: &Arc<Rail>) -> Result<Self, String> {
        let psn = crate::engine::hub::random().map_err(|error| error.to_string())?;
        let sends = u16::try_from(rail.send_queue).unwrap_or(u16::MAX);
        let buffers = Buffers::new(&rail.pd, RECEIVES, sends).map_err(|e| e.to_string())?;
        let mut core = rail.lock();
        // Under the lock: the rail's thread ends when nothing is reserved, and then nobody takes a queue pair.
        if rail.is_lost.load(Ordering::SeqCst) {
            return Err(rail.lost());
        }
        let key = core.reserve();
        drop(core);
        Ok(Self {
            rail: Arc::clone(rail),
            key,
            slots: buffers.slots(),
            buffers: Some(buffers),
            wires: None,
            landing: None,
            psn: u32::from_le_bytes(psn) & PSN_MASK,
        })
    }

    /// Adds frames' memory and posts every receive: the peer may send as soon as it is connected.
    pub(super) fn fill(
        &mut self,
        mut qp: Qp,
        connection: Option<Connection>,
        cq: Arc<Cq>,
    ) -> Result<(), String> {
        let buffers = self.buffers.take().ok_or("a queue pair is made once")?;
        for index in 0..RECEIVES {
            let (address, bytes, lkey) = buffers.receive(index);
            let id = receive_id(self.key.life, index);
            qp.post_recv(id, address, bytes, lkey)
                .map_err(|e| e.to_string())?;
        }
        self.wires = Some(Wires {
            qp,
            connection,
            cq,
            buffers,
            landing: None,
            packing: None,
        });
        Ok(())
    }

    /// What the peer must know of this end.
    pub(crate) fn terms(&self) -> QpTerms {
        let rail = &self.rail;
        let end = match rail.connector {
            Connector::Compat => QpEnd::Compat(self.endpoint()),
            Connector::Standard => QpEnd::Standard {
                address: rail.address.octets(),
                port: 0,
                token: 0,
            },
        };
        self.terms_at(end)
    }

    pub(super) fn terms_at(&self, end: QpEnd) -> QpTerms {
        QpTerms {
            end,
            receives: RECEIVES,
            slots: self.slots,
            landing: self
                .landing
                .as_ref()
                .map_or(Landing::default(), PackMemory::landing),
        }
    }

    /// Makes the memory in which the peer may lay packed batches, if it has any. Before [`Self::terms`].
    ///
    /// # Errors
    /// The peer can do nothing without, and there is none, in words.
    pub(crate) fn offer_landing(
        &mut self,
        hub: &Hub,
        link: &Link,
        theirs: &RailOffer,
    ) -> Result<(), String> {
        self.landing = packing::offer(&self.rail, hub, link, theirs)?;
        Ok(())
    }

    /// Whether what we send to the peer can reach its pages over this queue pair.
    ///
    /// # Errors
    /// It cannot, in words.
    pub(crate) fn check_reach(
        &self,
        link: &Link,
        offer: &RailOffer,
        theirs: &QpTerms,
    ) -> Result<(), String> {
        packing::check_reach(&self.rail, link, offer, theirs.landing)
    }

    fn endpoint(&self) -> Endpoint {
        let rail = &self.rail;
        Endpoint {
            qpn: self.wires.as_ref().map_or(0, |wires| wires.qp.qp_num()),
            psn: self.psn,
            gid: rail.gid.as_ref().map_or([0; 16], |gid| gid.gid),
            lid: rail.lid,
            mtu: u8::try_from(rail.mtu).unwrap_or(1).clamp(1, 5),
        }
    }

    /// Connects it to the peer's end. On eRDMA both directions work at once; elsewhere this end may send when the peer has
    /// done the same.
    ///
    /// # Errors
    /// The device's answer, in words.
    pub(crate) fn connect(&mut self, peer: &Endpoint) -> Result<(), String> {
        let rail = &self.rail;
        let gid_index = rail.gid.as_ref().map_or(0, |gid| gid.index);
        let path = LocalPath {
            port: PORT,
            gid_index,
            mtu: rail.mtu.min(peer.mtu.into()),
            psn: self.psn,
        };
        let to = QpAddress {
            gid: peer.gid,
            lid: peer.lid,
            qp_num: peer.qpn,
            psn: peer.psn,
        };
        let wires = self.wires.as_mut().ok_or("the queue pair is gone")?;
        let connected = wires
            .qp
            .enter_rtr(&path, &to)
            .and_then(|()| wires.qp.enter_rts(&path));
        connected.map_err(|error| format!("{}: {error}", rail.name))
    }

    /// Connects it to its own end.
    #[cfg(feature = "testing")]
    pub(super) fn connect_to_itself(&mut self) -> Result<(), String> {
        let own = self.endpoint();
        self.connect(&own)
    }

    #[cfg(feature = "testing")]
    pub(super) fn wires_mut(&mut self) -> Option<&mut Wires> {
        self.wires.as_mut()
    }

    /// Before the peer's listener is known: nothing but a place.
    ///
    /// # Errors
    /// No memory for frames.
    pub(crate) fn standard(rail: &Arc<Rail>) -> Result<Self, String> {
        Self::reserve(rail)
    }

    /// Gives the queue pair to the rail's thread, after `known` has made its handle known.
    ///
    /// # Errors
    /// It is not connected.
    pub(crate) fn adopt(
        mut self,
        parts: QpParts,
        known: impl FnOnce(&Arc<QueuePairLane>),
    ) -> Result<Arc<QueuePairLane>, String> {
        let mut wires = self.wires.take().ok_or("the queue pair is not connected")?;
        wires.landing = self.landing.take();
        let rail = Arc::clone(&self.rail);
        let handle = Arc::new(QueuePairLane {
            id: parts.lane,
            key: self.key,
            rail: Arc::clone(&rail),
            kicked: AtomicBool::new(false),
            over: AtomicBool::new(false),
            posted: AtomicU64::new(0),
            packed: AtomicU64::new(0),
        });
        let lane = lane_io(&rail, &handle, wires, parts);
        known(&handle);
        rail.request(Request::Adopt(Box::new(lane)));
        // The place is the lane's now.
        self.key.life = self.key.life.wrapping_sub(1);
        Ok(handle)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.wires = None;
        self.rail.lock().release(self.key);
    }
}

/// Why the path is no better one, with how a GPU's memory is reached.
fn reason(rail: &Rail, refused: &str) -> String {
    let mut reason = refused.to_owned();
    for verdict in &rail.verdicts {
        let (path, why) = (verdict.path.words(), &verdict.reason);
        let between = if reason.is_empty() { "" } else { "; " };
        reason.push_str(&format!("{between}GPU memory: {path} ({why})"));
    }
    reason
}

/// What both ends have said, put together. `most`: bytes of the longest batch that may be packed.
fn agreed(rail: &Rail, parts: &QpParts, most: Option<u64>) -> Terms {
    let config = &rail.settings;
    let ours = rail.offers_immediate();
    let setup = LaneSetup {
        mode: PayloadMode::Write,
        path: "verbs",
        path_reason: reason(rail, &parts.path_reason),
        batch_bytes: most.map_or(config.batch_bytes, |most| most.min(config.batch_bytes)),
        window: config.window,
    };
    let has_staged = !rail.staged.is_empty() || !parts.offer.staged.is_empty();
    Terms {
        setup,
        targets: Targets::new(&parts.link.agreement.regions, &parts.offer),
        slots: (ours && parts.offer.imm).then_some(parts.terms.slots),
        peer_receives: parts.terms.receives,
        message_bytes_max: rail
            .capabilities
            .wr_bytes_max
            .value
            .min(parts.offer.message_bytes_max),
        peer_chunk_bytes: parts.offer.chunk_bytes,
        has_staged,
        is_active: parts.is_active,
    }
}

fn lane_io(rail: &Arc<Rail>, handle: &Arc<QueuePairLane>, wires: Wires, parts: QpParts) -> LaneIo {
    let ours = wires.landing.as_ref().map(PackMemory::landing);
    let packing = Packing::new(parts.terms.landing, ours, rail.settings.pack_below);
    let (now, terms) = (clock::now(), agreed(rail, &parts, packing.most()));
    let sges_max = rail.capabilities.send_sge.value as usize;
    LaneIo {
        handle: Arc::clone(handle),
        _alive: parts.hub.lane_alive(),
        hub: parts.hub,
        peer: parts.link.peer,
        link: Arc::downgrade(&parts.link),
        wires: Some(wires),
        side: Side {
            socket: parts.socket,
            decoder: parts.decoder,
            peer_is_down: false,
            peer_reason: String::new(),
        },
        phase: Phase::Greeting {
            is_active: parts.is_active,
            has_spoken: false,
            until: parts.until,
        },
        is_closing: false,
        answer_hello: None,
        answered: 0,
        answers: VecDeque::new(),
        peer_answers: None,
        credits: Credits::new(terms.peer_receives, RECEIVES),
        sends: Slots::new(rail.send_queue, rail.send_queue, handle.key.life << 1),
        chain: Chain::new(CHAIN_WRS_MAX, sges_max, terms.message_bytes_max),
        descriptors: vec![Descriptor::EMPTY; CHAIN_WRS_MAX * 2].into(),
        descriptor_at: 0,
        descriptor_end: 0,
        writing: None,
        packing,
        acks: VecDeque::new(),
        is_inline: rail.is_inline(),
        sges_max,
        frames_sent: 0,
        given: 0,
        acked: 0,
        reaped: 0,
        reported: 0,
        last_sent: now,
        last_heard: now,
        last_active: now,
        last_timed: now,
        watch: Watch::Nothing,
        is_awaited: false,
        is_stirred: false,
        is_hungry: true,
        opened: parts.opened,
        terms,
    }
}
