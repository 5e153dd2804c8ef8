//! What the threads of an engine share: the node behind its lock, the memory, the links.

mod links;

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use mio::Waker;

use super::{
    PeerInfo,
    awaited::Waiting,
    control::Adopted,
    devices::DeviceSide,
    handle::{CompletionQueue, Shared},
    lanes::Stage,
    link::Link,
    probe::Probes,
    write::Written,
};
use crate::{
    clock,
    config::EngineConfig,
    error::{SubmitError, TransferError},
    ids::{CountedMap, InstanceId, LaneId, PeerId, TransferId},
    layout::{Layout, RegionId},
    memory::{Gate, Region},
    telemetry::snapshot::Snapshot,
    time::Time,
    transfer::{Admission, BatchIn, BatchOut, Chunk, LaneSetup, Node, Placement},
    transport::{
        DataLane,
        null_wire::NullWire,
        rail::{PackingBudgets, Rails},
    },
    wire::lane::{Ack, AckStatus, BatchHeader},
};

pub(super) use links::peer_info;

/// How long a shutdown waits for lane threads; they end at once unless the machine is overloaded.
const JOIN_TIMEOUT: Duration = Duration::from_secs(3);

pub(super) struct Core {
    pub(super) node: Node,
    pub(super) transfers: CountedMap<TransferId, Arc<Shared>>,
    pub(super) links: CountedMap<PeerId, Arc<Link>>,
    pub(super) completions: Option<Arc<CompletionQueue>>,
    /// Regions whose memory is gone for now.
    pub(super) released: BTreeSet<RegionId>,
    /// Rooms of peers that write to addresses here.
    pub(super) written: HashMap<(PeerId, u64), Written>,
    /// Rooms that this engine wrote to addresses of a peer, and which that peer is to confirm closed.
    pub(super) closing: HashMap<(PeerId, u64), crossbeam_channel::Sender<()>>,
}

/// A batch for a lane.
pub(crate) struct Next {
    pub(crate) batch: BatchOut,
    pub(crate) gate: Arc<Gate>,
    /// Windows are left in the peer's queue.
    pub(crate) has_more: bool,
}

/// Shared state of one engine.
pub(crate) struct Hub {
    pub(crate) config: EngineConfig,
    pub(crate) layout: Layout,
    pub(crate) instance: InstanceId,
    pub(crate) generation: u64,
    /// What a same-host peer reads to prove that it can.
    pub(crate) probe_cookie: Box<[u8; 16]>,
    /// The RDMA devices.
    pub(super) rails: RwLock<Arc<Rails>>,
    /// Devices that were to be closed, but are still in use. Held while memory is released or restored.
    pub(super) old_rails: Mutex<Option<Arc<Rails>>>,
    /// Signalled when no transfer is live any more, if somebody waits for that.
    pub(super) idle: Condvar,
    pub(super) idle_waiters: AtomicUsize,
    /// Threads that are about to close the gates of transfers that have ended.
    pub(super) closing_gates: AtomicUsize,
    /// What lanes without a wire have been asked to send.
    pub(crate) null_wire: NullWire,
    /// Chunks whose pages are not written yet.
    pub(super) waiting: Waiting,
    /// Some failed room waits for a network card.
    is_ebbing: AtomicBool,
    regions: Vec<Arc<Region>>,
    pub(crate) devices: DeviceSide,
    /// Memory for batches that queue pairs pack.
    pub(crate) packing: PackingBudgets,
    core: Mutex<Core>,
    waker: Waker,
    /// When the control thread will wake by itself.
    pub(super) armed: AtomicU64,
    stopped: AtomicBool,
    pub(super) probes: Probes,
    adopted: Mutex<Vec<Adopted>>,
    next_peer: AtomicU64,
    next_token: AtomicU64,
    pub(super) malformed: AtomicU64,
    lane_threads: Arc<()>,
}

impl Hub {
    pub(super) fn new(
        config: EngineConfig,
        regions: Vec<Arc<Region>>,
        devices: DeviceSide,
        layout: Layout,
        rails: Rails,
    ) -> io::Result<(Self, mio::Poll)> {
        let poll = mio::Poll::new()?;
        let waker = Waker::new(poll.registry(), super::control::WAKE)?;
        let node = Node::new(config.node.clone());
        let generation = u64::try_from(clock::wall().as_nanos()).unwrap_or(u64::MAX);
        let packing = PackingBudgets::new(config.staging_bytes);
        let core = Core {
            node,
            transfers: CountedMap::default(),
            links: CountedMap::default(),
            completions: None,
            released: BTreeSet::new(),
            written: HashMap::new(),
            closing: HashMap::new(),
        };
        let hub = Self {
            config,
            layout,
            instance: InstanceId(random()?),
            generation,
            probe_cookie: Box::new(random()?),
            rails: RwLock::new(Arc::new(rails)),
            old_rails: Mutex::default(),
            idle: Condvar::new(),
            idle_waiters: AtomicUsize::new(0),
            closing_gates: AtomicUsize::new(0),
            null_wire: NullWire::default(),
            waiting: Waiting::default(),
            is_ebbing: AtomicBool::new(false),
            regions,
            devices,
            packing,
            core: Mutex::new(core),
            waker,
            armed: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            probes: Probes::default(),
            adopted: Mutex::default(),
            next_peer: AtomicU64::new(1),
            next_token: AtomicU64::new(u64::from_le_bytes(random()?)),
            malformed: AtomicU64::new(0),
            lane_threads: Arc::new(()),
        };
        Ok((hub, poll))
    }

    /// Runs `f` on the node, then does what the node wants done.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Node, Time) -> R) -> R {
        self.with_core(|core, now| f(&mut core.node, now))
    }

    pub(super) fn with_core<R>(&self, f: impl FnOnce(&mut Core, Time) -> R) -> R {
        let now = clock::now();
        self.with_core_at(|core| f(core, now))
    }

    fn with_core_at<R>(&self, f: impl FnOnce(&mut Core) -> R) -> R {
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut core);
        let effects = self.collect(&mut core);
        let is_ebbing = core.node.is_ebbing();
        // It changes under the lock only, and to write it costs more than to look.
        if self.is_ebbing.load(Ordering::Relaxed) != is_ebbing {
            self.is_ebbing.store(is_ebbing, Ordering::SeqCst);
        }
        drop(core);
        if let Some(effects) = effects {
            self.perform(effects);
        }
        result
    }

    /// Queues pages. Small ones are written here and now if the lane is free; the lane that took them is returned, so
    /// that a thread that waits for them can read the answer itself.
    pub(super) fn push(
        &self,
        transfer: TransferId,
        chunk: &Chunk,
    ) -> Result<Option<DataLane>, SubmitError> {
        let now = clock::now();
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        core.node.push(now, transfer, chunk)?;
        let effects = self.collect(&mut core);
        drop(core);
        let mut taken = None;
        if let Some(mut effects) = effects {
            effects.work.retain(|(link, _, bytes)| {
                let lane = link
                    .lanes
                    .first_up()
                    .filter(|_| *bytes <= self.config.inline_bytes);
                let pumped = lane.filter(|lane| lane.try_pump());
                let is_left = pumped.is_none();
                taken = pumped.or(taken.take());
                is_left
            });
            self.perform(effects);
        }
        Ok(taken.filter(|_| self.config.drive_while_waiting))
    }

    pub(super) fn lock_core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a transfer and remembers its handle before any of its outputs are acted on.
    ///
    /// # Errors
    /// What `open` says, or that memory is released.
    pub(super) fn open(
        &self,
        shared: &Arc<Shared>,
        open: impl FnOnce(&mut Node, Time) -> Result<TransferId, SubmitError>,
    ) -> Result<TransferId, SubmitError> {
        self.open_with(shared, |core, now| open(&mut core.node, now))
    }

    /// The same for who needs more than the node.
    pub(super) fn open_with(
        &self,
        shared: &Arc<Shared>,
        open: impl FnOnce(&mut Core, Time) -> Result<TransferId, SubmitError>,
    ) -> Result<TransferId, SubmitError> {
        self.with_core(|core, now| {
            if let Some(region) = core.released.first() {
                return Err(SubmitError::Released { region: region.0 });
            }
            let id = open(core, now)?;
            shared.set_id(id);
            core.transfers.insert(id, Arc::clone(shared));
            Ok(id)
        })
    }

    pub(crate) fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(id.0 as usize).map(Arc::as_ref)
    }

    pub(super) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// A number for a gate's cell: never zero, never the same twice in a row.
    pub(super) fn new_token(&self) -> u64 {
        self.next_token.fetch_add(2, Ordering::Relaxed) | 1
    }

    pub(super) fn new_peer_id(&self) -> PeerId {
        PeerId(self.next_peer.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn next_batch(&self, now: Time, peer: PeerId, lane: LaneId) -> Option<Next> {
        self.with_core_at(|core| {
            let batch = core.node.next_batch(now, peer, lane)?;
            let gate = Arc::clone(&core.transfers.get(&batch.transfer)?.gate);
            Some(Next {
                batch,
                gate,
                has_more: core.node.has_queued(peer),
            })
        })
    }

    /// Whether there may be more for the lane now.
    pub(crate) fn on_ack(
        &self,
        now: Time,
        peer: PeerId,
        lane: LaneId,
        ack: &Ack,
    ) -> Result<bool, String> {
        self.with_core_at(|core| {
            core.node.on_ack(now, peer, lane, ack)?;
            Ok(core.node.has_queued(peer))
        })
    }

    /// A batch lies in our pages, or was withdrawn by its sender: what shall its lane answer?
    ///
    /// Both happen under the lock under which rooms end, so what is admitted is still the room's when it is counted. The gate
    /// is not asked: it holds an end up while we ourselves move bytes, and here the card has moved them before. What it may
    /// still write is fenced by destroying its queue pair (promise P1).
    pub(crate) fn arrived(
        &self,
        now: Time,
        peer: PeerId,
        header: &BatchHeader,
        placement: Placement,
    ) -> AckStatus {
        self.with_core_at(|core| match core.node.admit(now, peer, header) {
            Admission::Place(batch) => core.node.placed(now, peer, header, &batch, placement),
            Admission::Discard => core.node.discarded(header),
        })
    }

    pub(crate) fn admit(&self, peer: PeerId, header: &BatchHeader) -> Option<(BatchIn, Arc<Gate>)> {
        self.with_core(|core, now| match core.node.admit(now, peer, header) {
            Admission::Place(batch) => {
                let gate = Arc::clone(&core.transfers.get(&batch.transfer)?.gate);
                Some((batch, gate))
            }
            Admission::Discard => None,
        })
    }

    pub(crate) fn placed(
        &self,
        peer: PeerId,
        header: &BatchHeader,
        batch: &BatchIn,
        placement: Placement,
    ) -> AckStatus {
        self.with(|node, now| node.placed(now, peer, header, batch, placement))
    }

    /// A transfer cannot go on here.
    pub(crate) fn fail(&self, transfer: TransferId, error: TransferError) {
        self.with(|node, now| node.cancel(now, transfer, error));
    }

    pub(crate) fn discarded(&self, header: &BatchHeader) -> AckStatus {
        self.with(|node, _| node.discarded(header))
    }

    /// Whether lanes should report what their cards are done with.
    pub(crate) fn is_ebbing(&self) -> bool {
        self.is_ebbing.load(Ordering::SeqCst)
    }

    pub(crate) fn reaped(&self, peer: PeerId, lane: LaneId, count: u64) {
        self.with(|node, _| node.reaped(peer, lane, count));
    }

    pub(crate) fn lane_fenced(&self, peer: PeerId, lane: LaneId, reason: &str) {
        // First the link: work must not be given to a lane that cannot take it any more.
        if let Some(link) = self.link(peer) {
            link.lanes.advance(lane, Stage::Ending);
        }
        self.with(|node, _| node.lane_fenced(peer, lane, reason));
    }

    /// This end of a queue pair is about to speak; how many failures it must say that it has told.
    pub(crate) fn lane_offered(&self, peer: PeerId, lane: LaneId) -> u64 {
        self.with(|node, _| node.lane_offered(peer, lane))
    }

    pub(crate) fn lane_down(&self, peer: PeerId, lane: LaneId, reason: &str) {
        // First the link forgets it: work must not be given to a lane that has no thread any more.
        if let Some(link) = self.link(peer) {
            link.lanes.remove(lane);
        }
        self.with(|node, _| node.lane_down(peer, lane, reason));
    }

    /// A lane's connection stands: the node may use it.
    pub(crate) fn lane_up(&self, peer: PeerId, lane: LaneId, setup: LaneSetup, failures_told: u64) {
        self.with(|node, _| node.lane_up(peer, lane, setup, failures_told));
    }

    pub(super) fn completions(&self) -> Arc<CompletionQueue> {
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let bound = self.config.node.transfers_max;
        Arc::clone(
            core.completions
                .get_or_insert_with(|| Arc::new(CompletionQueue::new(bound))),
        )
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let wall_ns = u64::try_from(clock::wall().as_nanos()).unwrap_or(u64::MAX);
        let mut snapshot = Snapshot {
            instance: self.instance.to_string(),
            epoch: self.generation,
            wall_ns,
            ..Snapshot::default()
        };
        let now = clock::now();
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        core.node.picture(now, &mut snapshot);
        links::count_operations(&core, &mut snapshot);
        snapshot
    }

    pub(super) fn late_messages(&self) -> u64 {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        core.node.late_messages()
    }

    pub(super) fn malformed(&self) -> u64 {
        self.malformed.load(Ordering::Relaxed)
    }

    /// When the control thread must call [`Hub::on_timeout`]; it will sleep until then.
    pub(super) fn arm(&self) -> Time {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let next = core.node.next_timeout();
        self.armed.store(next.nanos(), Ordering::SeqCst);
        next
    }

    pub(super) fn on_timeout(&self) {
        self.with(|node, now| node.on_timeout(now));
    }

    /// Gives a control stream to the control thread.
    pub(super) fn adopt(&self, adopted: Adopted) -> io::Result<()> {
        self.adopted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(adopted);
        self.waker.wake()
    }

    /// Control streams given since the last call.
    pub(super) fn adopted(&self) -> Vec<Adopted> {
        std::mem::take(&mut *self.adopted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn wake_control(&self) {
        // Waking can only fail if the control thread is gone, and then nothing waits for it.
        let _ = self.waker.wake();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    pub(super) fn shut_down(&self) {
        if self.stopped.swap(true, Ordering::SeqCst) {
            return;
        }
        let (transfers, peers) = {
            let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
            let transfers: Vec<TransferId> = core.transfers.keys().copied().collect();
            (
                transfers,
                core.links.keys().copied().collect::<Vec<PeerId>>(),
            )
        };
        for transfer in transfers {
            self.with(|node, now| node.cancel(now, transfer, TransferError::Shutdown));
        }
        for peer in peers {
            self.drop_peer(peer, "the engine shut down");
        }
        self.wake_control();
    }

    /// Held by a lane's thread while it runs.
    pub(crate) fn lane_alive(&self) -> Arc<()> {
        Arc::clone(&self.lane_threads)
    }

    /// Waits for the lane threads, which touch the regions, for at most [`JOIN_TIMEOUT`].
    pub(super) fn join_lanes(&self) {
        let deadline = clock::now() + JOIN_TIMEOUT;
        while Arc::strong_count(&self.lane_threads) > 1 && clock::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}
