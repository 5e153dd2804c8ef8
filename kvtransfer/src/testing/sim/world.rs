//! The event loop: what happens next, to whom.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::{
    dice::Dice,
    network::{Conn, LaneAt, Stream},
    qp::QpEvent,
    rank::{Handle, Rank, RankSpec},
};
use crate::{
    error::{SubmitError, TransferError},
    layout::RegionId,
    plan::stream::check_items,
    time::Time,
    transfer::{Chunk, NodeAudit, NodeConfig, Output, ReceiveRequest, SendRequest, Summary},
    wire::control::Control,
};

/// Time between two calls of one thread.
const CALL: Duration = Duration::from_nanos(500);

/// Something that the application of a rank is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// Every receiver has granted its pages.
    Ready {
        /// The sender.
        handle: Handle,
        /// Tokens that the receivers already hold.
        prefix_tokens: u32,
    },
    /// A transfer ended; its gate is closed.
    Ended {
        /// Which.
        handle: Handle,
        /// How.
        result: Result<Summary, TransferError>,
    },
    /// A connection is gone on this side.
    PeerLost {
        /// Who noticed.
        rank: usize,
        /// Whom it lost.
        other: usize,
    },
    /// A stream carried something that is not the protocol, though all ranks are honest.
    Protocol {
        /// Who noticed.
        rank: usize,
        /// What.
        reason: String,
    },
    /// A transport wrote into a rank's memory.
    Placed(PlacedBytes),
}

/// Bytes that a transport wrote into a rank's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedBytes {
    /// For which transfer.
    pub handle: Handle,
    /// Where.
    pub region: RegionId,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

#[derive(Debug)]
pub(super) enum Event {
    Tick {
        rank: usize,
        life: u32,
    },
    Arrive {
        conn: usize,
        /// The receiving side.
        side: usize,
        stream: Stream,
        bytes: Vec<u8>,
    },
    /// A lane's thread writes.
    Pump(LaneAt),
    /// A lane's thread goes on with a copy.
    Copy(LaneAt),
    LaneLost(LaneAt),
    /// Something happens to one end of that queue pair of a lane.
    Qp(LaneAt, u32, QpEvent),
    LinkLost {
        conn: usize,
        side: usize,
        reason: String,
    },
    Thaw {
        rank: usize,
        life: u32,
    },
}

/// Ranks, connections, and what is going to happen.
pub struct World {
    pub(super) dice: Dice,
    pub(super) now: Time,
    events: BTreeMap<(Time, u64), Event>,
    next_event: u64,
    pub(super) ranks: Vec<Rank>,
    pub(super) conns: Vec<Conn>,
    notices: VecDeque<Notice>,
    steps: u64,
    pub(super) fences: u64,
}

impl World {
    /// An empty world at 1 ns.
    pub fn new(seed: u64) -> Self {
        Self {
            dice: Dice::new(seed),
            now: Time(1),
            events: BTreeMap::new(),
            next_event: 0,
            ranks: Vec::new(),
            conns: Vec::new(),
            notices: VecDeque::new(),
            steps: 0,
            fences: 0,
        }
    }

    /// Adds a rank; its index.
    ///
    /// # Errors
    /// The layout contradicts itself.
    pub fn add_rank(&mut self, spec: RankSpec) -> Result<usize, String> {
        spec.layout.validate().map_err(|error| error.to_string())?;
        let index = self.ranks.len();
        self.ranks.push(Rank::new(index, spec));
        Ok(index)
    }

    /// The time.
    pub fn now(&self) -> Time {
        self.now
    }

    /// Events so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Queue pairs that nodes wanted destroyed so far.
    pub fn fences(&self) -> u64 {
        self.fences
    }

    /// The next notice for an application.
    pub fn notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// Whether a rank runs now.
    pub fn is_running(&self, rank: usize) -> bool {
        self.ranks[rank].is_alive && !self.ranks[rank].is_frozen
    }

    /// Whether a rank's process exists, frozen or not.
    pub fn is_alive(&self, rank: usize) -> bool {
        self.ranks[rank].is_alive
    }

    /// Counts the restarts of a rank.
    pub fn life(&self, rank: usize) -> u32 {
        self.ranks[rank].life
    }

    /// Whether a transfer has failed but not ended: a card may still touch its pages.
    pub fn is_ebbing(&self, handle: Handle) -> bool {
        let rank = &self.ranks[handle.rank];
        let is_here = rank.is_alive && rank.life == handle.life;
        is_here && !rank.gates.contains_key(&handle.id) && !rank.over.contains(&handle.id)
    }

    /// Sizes of the node's tables.
    pub fn audit(&self, rank: usize) -> NodeAudit {
        self.ranks[rank].node.audit()
    }

    /// The bounds of a rank's node.
    pub fn bounds(&self, rank: usize) -> &NodeConfig {
        &self.ranks[rank].spec.node
    }

    /// Gates of a rank's transfers that have not ended.
    pub fn gates(&self, rank: usize) -> usize {
        self.ranks[rank].gates.len()
    }

    /// Messages and batches about rooms that are over, since the start.
    pub fn late_messages(&self, rank: usize) -> u64 {
        self.ranks[rank].node.late_messages()
    }

    /// Writes a rank's own memory, as its application does.
    ///
    /// # Panics
    /// If the range is outside the region.
    pub fn write(&mut self, rank: usize, region: RegionId, offset: u64, bytes: &[u8]) {
        let target = self.ranks[rank].bytes_mut(region, offset, bytes.len() as u64);
        target.copy_from_slice(bytes);
    }

    /// Reads a rank's own memory.
    ///
    /// # Panics
    /// If the range is outside the region.
    pub fn read(&self, rank: usize, region: RegionId, offset: u64, len: u64) -> &[u8] {
        self.ranks[rank].bytes(region, offset, len)
    }

    /// Zeroes of the shape of a rank's memory.
    pub(super) fn region_lens(&self, rank: usize) -> Vec<Vec<u8>> {
        let regions = self.ranks[rank].memory.iter();
        regions.map(|region| vec![0; region.len()]).collect()
    }

    /// Opens the sending side of a room.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn send(&mut self, rank: usize, request: &SendRequest) -> Result<Handle, SubmitError> {
        let now = self.now;
        let id = self.ranks[rank].node.open_send(now, request)?;
        self.opened(rank, id)
    }

    /// Opens the receiving side of a room. Sources name peers as [`World::peer`] does.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn receive(
        &mut self,
        rank: usize,
        request: &ReceiveRequest,
    ) -> Result<Handle, SubmitError> {
        let now = self.now;
        self.check_lists(rank, &request.items)?;
        let id = self.ranks[rank].node.open_receive(now, request)?;
        let handle = self.opened(rank, id)?;
        let known = &mut self.ranks[rank];
        let grant = (request.room.number(), known.last_epoch);
        known.grants.insert(grant, id);
        Ok(handle)
    }

    fn opened(&mut self, index: usize, id: crate::ids::TransferId) -> Result<Handle, SubmitError> {
        let rank = &mut self.ranks[index];
        rank.add_gate(id);
        let life = rank.life;
        self.settle(index);
        Ok(Handle {
            rank: index,
            life,
            id,
        })
    }

    /// Queues pages.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn push(&mut self, handle: Handle, chunk: &Chunk) -> Result<(), SubmitError> {
        self.check_lists(handle.rank, &chunk.items)?;
        let now = self.now;
        let done = self.ranks[handle.rank].node.push(now, handle.id, chunk);
        self.settle(handle.rank);
        done
    }

    /// Ends a transfer. No byte of it moves when this returns, or where cards move them, when its end is told.
    pub fn cancel(&mut self, handle: Handle) {
        self.end(handle, TransferError::Cancelled);
    }

    pub(super) fn end(&mut self, handle: Handle, error: TransferError) {
        let now = self.now;
        let rank = &mut self.ranks[handle.rank];
        if rank.life == handle.life && rank.is_alive {
            rank.node.cancel(now, handle.id, error);
            self.settle(handle.rank);
        }
    }

    /// The same check as the engine's handle makes.
    fn check_lists(&self, rank: usize, lists: &[std::sync::Arc<[i32]>]) -> Result<(), SubmitError> {
        let components = &self.ranks[rank].spec.layout.components;
        if lists.len() > components.len() {
            let (got, known) = (lists.len(), components.len());
            let reason = format!("{got} item lists for {known} components");
            return Err(SubmitError::Items(reason));
        }
        for (component, list) in components.iter().zip(lists) {
            check_items(list, component.item_count())
                .map_err(|error| SubmitError::Items(error.to_string()))?;
        }
        Ok(())
    }

    /// Lets the next thing happen. False if nothing is left to happen until `end`; the time is `end` then.
    pub fn step(&mut self, end: Time) -> bool {
        let Some(next) = self.events.first_entry().filter(|next| next.key().0 <= end) else {
            self.now = self.now.max(end);
            return false;
        };
        self.now = self.now.max(next.key().0);
        let event = next.remove();
        self.steps += 1;
        self.dispatch(event);
        true
    }

    pub(super) fn at(&mut self, time: Time, event: Event) {
        self.events.insert((time, self.next_event), event);
        self.next_event += 1;
    }

    pub(super) fn soon(&mut self, event: Event) {
        let at = self.now + CALL;
        self.at(at, event);
    }

    /// A lane's thread is asked to write, if it is not already.
    pub(super) fn pump_soon(&mut self, at: LaneAt) {
        let lane = &mut self.conns[at.conn].sides[at.side].lanes[at.lane];
        if lane.is_up && !lane.pumping {
            lane.pumping = true;
            self.soon(Event::Pump(at));
        }
    }

    /// The rank that an event happens to; `None` if that process is gone.
    fn owner(&self, event: &Event) -> Option<usize> {
        let (rank, life) = match event {
            Event::Tick { rank, life } | Event::Thaw { rank, life } => (*rank, *life),
            Event::Arrive { conn, side, .. } | Event::LinkLost { conn, side, .. } => {
                let side = &self.conns[*conn].sides[*side];
                (side.rank, side.life)
            }
            Event::Pump(at) | Event::Copy(at) | Event::LaneLost(at) | Event::Qp(at, ..) => {
                let side = &self.conns[at.conn].sides[at.side];
                (side.rank, side.life)
            }
        };
        let known = &self.ranks[rank];
        (known.is_alive && known.life == life).then_some(rank)
    }

    fn dispatch(&mut self, event: Event) {
        let event = match event {
            Event::Qp(at, number, event) if event.is_of_card() => {
                return self.qp_event(at, number, event);
            }
            event => event,
        };
        let Some(rank) = self.owner(&event) else {
            return;
        };
        if self.ranks[rank].is_frozen {
            if let Event::Thaw { .. } = event {
                self.ranks[rank].is_frozen = false;
                // What waited in the socket buffers is read before the timers are looked at, as the engine does.
                let backlog = std::mem::take(&mut self.ranks[rank].backlog);
                backlog.into_iter().for_each(|event| self.dispatch(event));
                self.tick(rank);
            } else {
                self.ranks[rank].backlog.push_back(event);
            }
            return;
        }
        match event {
            Event::Tick { .. } => self.tick(rank),
            Event::Arrive {
                conn,
                side,
                stream,
                bytes,
            } => self.arrive(conn, side, stream, &bytes),
            Event::Pump(at) => self.pump(at),
            Event::Copy(at) => self.copy_on(at),
            Event::LaneLost(at) => self.lane_lost(at, "connection reset"),
            Event::Qp(at, number, event) => self.qp_event(at, number, event),
            Event::LinkLost { conn, side, reason } => self.link_lost(conn, side, &reason),
            Event::Thaw { .. } => {}
        }
    }

    fn tick(&mut self, rank: usize) {
        let now = self.now;
        self.ranks[rank].armed = Time::NEVER;
        self.ranks[rank].node.on_timeout(now);
        self.settle(rank);
    }

    fn arrive(&mut self, conn: usize, side: usize, stream: Stream, bytes: &[u8]) {
        let lane = match stream {
            Stream::Lane(lane) => lane,
            Stream::Control => return self.control_arrive(conn, side, bytes),
        };
        let at = LaneAt { conn, side, lane };
        let writer = &mut self.conns[conn].sides[1 - side].lanes[lane];
        writer.out.in_flight -= bytes.len();
        let (writer_up, lane) = (writer.is_up, &mut self.conns[conn].sides[side].lanes[lane]);
        if lane.is_up && (writer_up || !self.conns[conn].loses) {
            let lane = &mut self.conns[conn].sides[side].lanes[at.lane];
            lane.inbound.buffer.extend_from_slice(bytes);
            if !lane.inbound.is_copying {
                self.lane_work(at);
            }
        }
        self.pump_soon(at.other());
    }

    pub(super) fn protocol(&mut self, rank: usize, reason: String) {
        self.notices.push_back(Notice::Protocol { rank, reason });
    }

    pub(super) fn notify(&mut self, notice: Notice) {
        self.notices.push_back(notice);
    }

    /// Does what a node wants done, then sets its alarm.
    pub(super) fn settle(&mut self, index: usize) {
        while let Some(output) = self.ranks[index].node.poll_output() {
            let life = self.ranks[index].life;
            match output {
                Output::Control(peer, message) => {
                    if let Control::Grant(grant) = &message {
                        self.ranks[index].last_epoch = grant.epoch;
                    }
                    if let Some((conn, side)) = self.ranks[index].peers.get(&peer).copied() {
                        self.say(conn, side, &message);
                    }
                }
                Output::Work(peer) => {
                    if let Some((conn, side)) = self.ranks[index].peers.get(&peer).copied() {
                        for lane in 0..self.conns[conn].sides[side].lanes.len() {
                            self.pump_soon(LaneAt { conn, side, lane });
                        }
                    }
                }
                Output::Ready {
                    transfer: id,
                    prefix_tokens,
                } => {
                    let rank = index;
                    let handle = Handle { rank, life, id };
                    self.notify(Notice::Ready {
                        handle,
                        prefix_tokens,
                    });
                }
                Output::Stopping { transfer } => self.ranks[index].close_gate(transfer),
                Output::Fence { peer, lane, reason } => self.fence(index, peer, lane, reason),
                Output::Ended {
                    transfer: id,
                    result,
                } => {
                    // First the gate: when anybody learns of an end, no byte of it can move any more (promise P1).
                    self.ranks[index].close_gate(id);
                    self.ranks[index].over.insert(id);
                    let rank = index;
                    let handle = Handle { rank, life, id };
                    self.notify(Notice::Ended { handle, result });
                }
                Output::Disconnect { peer, reason } => {
                    if let Some((conn, side)) = self.ranks[index].peers.get(&peer).copied() {
                        self.break_link(conn, side, &reason);
                    }
                }
            }
        }
        let due = self.ranks[index].node.next_timeout().max(self.now);
        if due < self.ranks[index].armed && due != Time::NEVER {
            let life = self.ranks[index].life;
            self.ranks[index].armed = due;
            self.at(due, Event::Tick { rank: index, life });
        }
    }
}
