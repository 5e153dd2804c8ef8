//! The processes' part of a queue pair: batches posted in chains under the gate, notices heard and answered, ends
//! destroyed, queue pairs made anew.
//!
//! Beside every queue pair there is a small connection of its own, so its messages overtake those of the control stream and
//! are overtaken by them. A destroyed end is announced there *with the last answers of that end*: an answer that was lost
//! with the queue pair must not make the sender write a batch again that the receiver has already counted, because the
//! room may have succeeded and its pages may belong to another one.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{
    card::{Frame, Qp, Run, Work},
    connect::lane_id,
    network::{LaneAt, Pipe},
    world::{Event, World},
};
use crate::{
    ids::{LaneId, PeerId},
    memory::Gate,
    plan::descriptor::{Descriptor, Limits, PairCursor},
    transfer::{Admission, BatchOut, LaneSetup, Placement},
    wire::lane::{Ack, BatchHeader, VOID_PLACE},
};

/// Most writes posted by one call.
const CHAIN: usize = 4;
/// How often, and for at most how many microseconds, a process is put aside between two chains.
const PAUSE_PERCENT: u64 = 10;
const PAUSE_MICROS: u64 = 3_000;
/// Most time, in microseconds, that a message on the connection beside a queue pair takes.
const BESIDE_MICROS: u64 = 3_000;
/// Most time, in microseconds, that destroying one end takes.
pub(super) const DESTROY_MICROS: u64 = 500;
/// Before a lost queue pair is made anew, in microseconds.
const BACK_OFF_MICROS: u64 = 4_000;

/// A batch that is being posted.
#[derive(Debug)]
pub(super) struct Posting {
    batch: BatchOut,
    gate: Arc<Gate>,
    cursor: PairCursor,
}

/// A message on the connection beside a queue pair.
#[derive(Debug)]
pub(super) enum Beside {
    /// The opener has an end; so many failures it had told.
    Open(u64),
    /// The acceptor has one too.
    Ready(u64),
    /// The opener may be written to.
    Up,
    /// The sender's end is destroyed; the answers it gave last, and how many it gave in all.
    Down(VecDeque<Ack>, u64),
}

/// What happens to one end of a queue pair.
#[derive(Debug)]
pub(super) enum QpEvent {
    /// The card goes on with what is posted.
    Card,
    /// Something arrives at the card.
    Land(Frame),
    /// The process takes a notice or an answer from its completion queue.
    Heard(Frame),
    /// The process learns that its card is done with so many batches.
    Reaped(u64),
    /// The process destroys its end.
    Destroy(String),
    Beside(Beside),
    /// The opener makes the queue pair anew.
    Redial,
}

impl QpEvent {
    /// Whether it happens without the process.
    pub(super) fn is_of_card(&self) -> bool {
        matches!(self, Self::Card | Self::Land(_))
    }
}

impl World {
    pub(super) fn qp_event(&mut self, at: LaneAt, number: u32, event: QpEvent) {
        let is_this = self.lane(at).qp.number == number;
        let is_alive = is_this && self.lane(at).qp.is_alive;
        match event {
            QpEvent::Card => self.card(at, number),
            QpEvent::Land(frame) => self.land(at, number, frame),
            // The completions of a destroyed queue pair are never read.
            QpEvent::Heard(frame) if is_alive => self.frame_heard(at, frame),
            QpEvent::Reaped(count) if is_alive => {
                let (index, peer, lane) = self.names(at);
                self.ranks[index].node.reaped(peer, lane, count);
                self.settle(index);
            }
            QpEvent::Destroy(reason) if is_alive => self.destroy(at, &reason),
            QpEvent::Beside(message) if self.conns[at.conn].sides[at.side].is_up => {
                self.beside_heard(at, number, message);
            }
            QpEvent::Redial if is_this && self.conns[at.conn].sides[at.side].is_up => {
                self.redial(at);
            }
            QpEvent::Heard(_)
            | QpEvent::Reaped(_)
            | QpEvent::Destroy(_)
            | QpEvent::Beside(_)
            | QpEvent::Redial => {}
        }
    }

    pub(super) fn names(&self, at: LaneAt) -> (usize, PeerId, LaneId) {
        let side = &self.conns[at.conn].sides[at.side];
        (side.rank, side.peer, lane_id(at.lane))
    }

    /// One call of the process: posts answers and one chain of writes, or takes a batch.
    pub(super) fn post(&mut self, at: LaneAt) {
        let qp = &mut self.lane(at).qp;
        let acks = std::mem::take(&mut qp.acks);
        qp.posted.extend(acks.into_iter().map(Work::Ack));
        let posting = qp.posting.take();
        let taken = self.outbound(at).taken.take();
        let is_at_work = if let Some(posting) = posting {
            self.post_chain(at, posting);
            self.pause(at);
            true
        } else if let Some((batch, gate)) = taken {
            let most = self.lane(at).out.net.piece_bytes as u64;
            self.lane(at).qp.posting = Some(Posting::new(batch, gate, most));
            true
        } else {
            self.take_batch(at);
            self.outbound(at).taken.is_some()
        };
        if is_at_work {
            self.pump_soon(at);
        }
        self.card_soon(at);
    }

    /// Sometimes the process is put aside between two chains, so that rooms end, and queue pairs fail, within a batch.
    fn pause(&mut self, at: LaneAt) {
        if self.dice.chance(PAUSE_PERCENT) {
            self.lane(at).pumping = true;
            let delay = Duration::from_micros(self.dice.within(1, PAUSE_MICROS));
            self.at(self.now + delay, Event::Pump(at));
        }
    }

    /// Posts the next writes of a batch while holding its gate; behind the last one, or if the room has ended, the notice.
    fn post_chain(&mut self, at: LaneAt, mut posting: Posting) {
        let batch = &posting.batch;
        let fields = &batch.fields;
        let mut place = 0;
        let mut places = [Descriptor::EMPTY; CHAIN];
        let chain = 1 + self.dice.index(CHAIN);
        let mut filled = 0;
        match posting.gate.pass() {
            Some(_pass) => {
                let start = fields.window_start as usize;
                let targets = &batch.targets[start..start + fields.window_len as usize];
                let items = &batch.items[batch.part.clone()];
                filled = posting.cursor.fill(items, targets, &mut places[..chain]);
            }
            None if posting.cursor.remaining() > 0 => place = VOID_PLACE,
            None => {}
        }
        let (transfer, room, epoch) = (batch.transfer, fields.room, fields.epoch);
        let qp = &mut self.conns[at.conn].sides[at.side].lanes[at.lane].qp;
        for places in places[..filled].iter().copied() {
            qp.posted.push_back(Work::Write(Run {
                transfer,
                room,
                epoch,
                places,
            }));
        }
        if place == VOID_PLACE || posting.cursor.remaining() == 0 {
            let header = BatchHeader::new(crate::wire::lane::BatchFields { place, ..*fields });
            qp.given += 1;
            qp.posted.push_back(Work::Notice(header, qp.given));
        } else {
            qp.posting = Some(posting);
        }
    }

    fn frame_heard(&mut self, at: LaneAt, frame: Frame) {
        let (index, peer, _) = self.names(at);
        let now = self.now;
        match frame {
            Frame::Ack(ack) if self.conns[at.conn].sides[at.side].is_up => {
                self.answer_heard(at, &ack);
            }
            // The peer is lost already, only its end is not destroyed yet.
            Frame::Write(..) | Frame::Ack(_) => {}
            Frame::Notice(header, _) => {
                let node = &mut self.ranks[index].node;
                let admission = node.admit(now, peer, &header);
                self.settle(index);
                let node = &mut self.ranks[index].node;
                let status = match admission {
                    Admission::Place(to) => {
                        let is_void = header.place == VOID_PLACE;
                        let placement = if is_void {
                            Placement::Void
                        } else {
                            Placement::Placed
                        };
                        node.placed(now, peer, &header, &to, placement)
                    }
                    Admission::Discard => node.discarded(&header),
                };
                self.settle(index);
                let lane = self.lane(at);
                let (ack, window) = (Ack::new(&header, status), lane.spec.window);
                lane.qp.acks.push(ack);
                lane.qp.answered += 1;
                lane.qp.answers.push_back(ack);
                if lane.qp.answers.len() > window {
                    lane.qp.answers.pop_front();
                }
            }
        }
        self.pump_soon(at);
    }

    fn answer_heard(&mut self, at: LaneAt, ack: &Ack) {
        let (index, peer, lane) = self.names(at);
        self.lane(at).qp.acked += 1;
        let now = self.now;
        if let Err(reason) = self.ranks[index].node.on_ack(now, peer, lane, ack) {
            self.protocol(index, reason);
        }
        self.settle(index);
    }

    /// The node wants an end destroyed; that takes a moment.
    pub(super) fn fence(&mut self, index: usize, peer: PeerId, lane: LaneId, reason: String) {
        self.fences += 1;
        let life = self.ranks[index].life;
        for conn in 0..self.conns.len() {
            for side in 0..2 {
                let end = &self.conns[conn].sides[side];
                if (end.rank, end.life, end.peer) == (index, life, peer) {
                    let lane = usize::from(lane.0);
                    return self.destroy_later(LaneAt { conn, side, lane }, reason);
                }
            }
        }
    }

    pub(super) fn destroy_later(&mut self, at: LaneAt, reason: String) {
        let delay = Duration::from_micros(self.dice.within(0, DESTROY_MICROS));
        let number = self.lane(at).qp.number;
        let event = Event::Qp(at, number, QpEvent::Destroy(reason));
        self.at(self.now + delay, event);
    }

    /// Destroys an end: from now on nothing lands through it and nothing is read by it. Then the other side is told.
    pub(super) fn destroy(&mut self, at: LaneAt, reason: &str) {
        let lane = self.lane(at);
        lane.is_up = false;
        lane.outbound.taken = None;
        let qp = &mut lane.qp;
        if !qp.is_alive {
            return;
        }
        qp.is_alive = false;
        qp.posted.clear();
        qp.posting = None;
        qp.acks.clear();
        let (answers, answered) = (std::mem::take(&mut qp.answers), qp.answered);
        let (index, peer, id) = self.names(at);
        self.ranks[index].node.lane_fenced(peer, id, reason);
        self.settle(index);
        if self.conns[at.conn].sides[at.side].is_up {
            self.beside(at, Beside::Down(answers, answered));
        }
    }

    /// Sends a message on the connection beside a queue pair; they stay in order.
    fn beside(&mut self, at: LaneAt, message: Beside) {
        let delay = Duration::from_micros(self.dice.within(10, BESIDE_MICROS));
        let when = self.now + delay;
        let qp = &mut self.lane(at).qp;
        qp.beside_at = qp.beside_at.max(when);
        let (when, number) = (qp.beside_at, qp.number);
        let event = Event::Qp(at.other(), number, QpEvent::Beside(message));
        self.at(when, event);
    }

    fn beside_heard(&mut self, at: LaneAt, number: u32, message: Beside) {
        let qp = &self.lane(at).qp;
        let is_this = qp.number == number;
        let is_alive = is_this && qp.is_alive;
        match message {
            Beside::Open(told) if qp.number + 1 == number => {
                let mine = self.make_end(at, number);
                self.lane(at).qp.told = told;
                self.beside(at, Beside::Ready(mine));
            }
            Beside::Ready(told) if is_alive => {
                self.beside(at, Beside::Up);
                self.qp_up(at, told);
            }
            Beside::Up if is_alive => {
                let told = self.lane(at).qp.told;
                self.qp_up(at, told);
            }
            Beside::Down(answers, answered) if is_this => {
                self.destroy(at, "the peer's end of the queue pair is gone");
                self.both_gone(at, number, answers, answered);
            }
            Beside::Open(_) | Beside::Ready(_) | Beside::Up | Beside::Down(..) => {}
        }
    }

    /// Both ends are destroyed: what the peer has counted is settled, the rest is queued again.
    fn both_gone(&mut self, at: LaneAt, number: u32, answers: VecDeque<Ack>, answered: u64) {
        let lost = answered - self.lane(at).qp.acked;
        let known = answers.len() as u64 - lost;
        for ack in answers
            .into_iter()
            .skip(usize::try_from(known).unwrap_or(0))
        {
            self.answer_heard(at, &ack);
        }
        let (index, peer, lane) = self.names(at);
        let node = &mut self.ranks[index].node;
        node.lane_down(peer, lane, "its queue pair is gone");
        self.settle(index);
        if at.side == 0 {
            let delay = Duration::from_micros(self.dice.within(100, BACK_OFF_MICROS));
            let redial = Event::Qp(at, number, QpEvent::Redial);
            self.at(self.now + delay, redial);
        }
    }

    fn redial(&mut self, at: LaneAt) {
        let number = self.lane(at).qp.number + 1;
        let told = self.make_end(at, number);
        self.beside(at, Beside::Open(told));
    }

    /// Makes this side's end of a new queue pair; how many failures it has told.
    fn make_end(&mut self, at: LaneAt, number: u32) -> u64 {
        let lane = self.lane(at);
        lane.qp = Qp::new(number, lane.qp.beside_at);
        lane.out = Pipe::new(lane.spec.net);
        let (index, peer, id) = self.names(at);
        self.ranks[index].node.lane_offered(peer, id)
    }

    /// Both ends are there.
    fn qp_up(&mut self, at: LaneAt, told: u64) {
        let lane = self.lane(at);
        lane.is_up = true;
        let setup = LaneSetup::from(&lane.spec);
        let (index, peer, id) = self.names(at);
        self.ranks[index].node.lane_up(peer, id, setup, told);
        self.settle(index);
        self.pump_soon(at);
    }
}

impl Posting {
    fn new(batch: BatchOut, gate: Arc<Gate>, len_max: u64) -> Self {
        let fields = &batch.fields;
        let limits = Limits {
            len_max: std::num::NonZeroU64::new(len_max),
            ..Limits::default()
        };
        let cursor = PairCursor::new(
            Arc::clone(&batch.pairing),
            usize::from(fields.component),
            batch.part.len(),
            fields.offset..fields.offset + fields.len,
            &limits,
        );
        let cursor = cursor.expect("invariant: the node hands out ranges of its own streams");
        Self {
            batch,
            gate,
            cursor,
        }
    }
}
