//! The network card's part of a queue pair: it reads and writes memory by itself, whatever the processes do.
//!
//! A frozen sender's posted writes still land, and they land at a frozen receiver. What is on the wire when the sender's
//! end is destroyed may still land, until the receiver's end is destroyed too. The processes' part is in `qp`.

use std::{collections::VecDeque, time::Duration};

use super::{
    network::{LaneAt, LaneEnd},
    qp::{Posting, QpEvent},
    rank::Handle,
    world::{Event, Notice, PlacedBytes, World},
};
use crate::{
    ids::{Epoch, TransferId},
    plan::descriptor::Descriptor,
    time::Time,
    wire::lane::{Ack, BatchHeader},
};

/// Chance that a write on the wire, and all behind it, is lost when its sender's end is destroyed: both what lands and
/// what does not must be common.
const CUT_PERCENT: u64 = 15;

/// One write request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// The sender's transfer.
    pub(super) transfer: TransferId,
    pub(super) room: u64,
    pub(super) epoch: Epoch,
    pub(super) places: Descriptor,
}

/// What a process has handed to its card.
#[derive(Debug)]
pub(super) enum Work {
    Write(Run),
    /// A header, and how many batches the lane has been given with it.
    Notice(BatchHeader, u64),
    Ack(Ack),
}

/// What is on the wire.
#[derive(Debug)]
pub(super) enum Frame {
    Write(Run, Vec<u8>),
    Notice(BatchHeader, u64),
    Ack(Ack),
}

impl Frame {
    fn len(&self) -> usize {
        match self {
            Self::Write(_, bytes) => bytes.len(),
            Self::Notice(..) => BatchHeader::LEN,
            Self::Ack(_) => Ack::LEN,
        }
    }
}

/// One end of a lane's queue pair.
#[derive(Debug, Default)]
pub(super) struct Qp {
    /// Counts the queue pairs that the lane has had.
    pub(super) number: u32,
    /// Not destroyed.
    pub(super) is_alive: bool,
    pub(super) posted: VecDeque<Work>,
    /// The card has an event on its way.
    is_busy: bool,
    /// What was behind this on the wire is lost.
    is_cut: bool,
    pub(super) posting: Option<Posting>,
    /// Batches posted.
    pub(super) given: u64,
    /// Answers to be posted.
    pub(super) acks: Vec<Ack>,
    /// The last answers, as many as the other side's window, and how many there were.
    pub(super) answers: VecDeque<Ack>,
    pub(super) answered: u64,
    /// Answers heard.
    pub(super) acked: u64,
    /// What the opener said of its failures.
    pub(super) told: u64,
    /// When the last message on the connection beside it arrives.
    pub(super) beside_at: Time,
}

impl Qp {
    /// The `number`th queue pair of a lane.
    pub(super) fn new(number: u32, beside_at: Time) -> Self {
        Self {
            number,
            is_alive: true,
            beside_at,
            ..Self::default()
        }
    }
}

impl World {
    pub(super) fn lane(&mut self, at: LaneAt) -> &mut LaneEnd {
        &mut self.conns[at.conn].sides[at.side].lanes[at.lane]
    }

    /// The card goes on, if it has work.
    pub(super) fn card_soon(&mut self, at: LaneAt) {
        let qp = &mut self.lane(at).qp;
        if qp.is_alive && !qp.is_busy && !qp.posted.is_empty() {
            qp.is_busy = true;
            let number = qp.number;
            self.soon(Event::Qp(at, number, QpEvent::Card));
        }
    }

    /// The card carries out one request.
    pub(super) fn card(&mut self, at: LaneAt, number: u32) {
        let lane = self.lane(at);
        if lane.qp.number != number {
            return;
        }
        lane.qp.is_busy = false;
        if !lane.qp.is_alive || lane.out.space() == 0 {
            return; // The next landing makes space and asks again.
        }
        let Some(work) = lane.qp.posted.pop_front() else {
            return;
        };
        let frame = match work {
            Work::Write(run) => Frame::Write(run, self.card_reads(at, &run)),
            Work::Notice(header, count) => {
                if !self.conns[at.conn].reads_again {
                    // The card has copied it all: the pages are free, though nothing has landed yet.
                    self.soon(Event::Qp(at, number, QpEvent::Reaped(count)));
                }
                Frame::Notice(header, count)
            }
            Work::Ack(ack) => Frame::Ack(ack),
        };
        let out = &mut self.conns[at.conn].sides[at.side].lanes[at.lane].out;
        let when = out.send(self.now, frame.len(), &mut self.dice);
        self.at(when, Event::Qp(at.other(), number, QpEvent::Land(frame)));
        self.card_soon(at);
    }

    /// Reads source pages for a write.
    fn card_reads(&self, at: LaneAt, run: &Run) -> Vec<u8> {
        let index = self.conns[at.conn].sides[at.side].rank;
        let rank = &self.ranks[index];
        let (id, source) = (run.transfer, run.places.source);
        assert!(
            !rank.over.contains(&id),
            "P1: rank {index}: its card reads pages of {id:?}, which has ended"
        );
        rank.bytes(source.region, source.offset, run.places.len)
            .to_vec()
    }

    /// Something arrives at a card.
    pub(super) fn land(&mut self, at: LaneAt, number: u32, mut frame: Frame) {
        let from = at.other();
        let sender = &mut self.conns[at.conn].sides[from.side].lanes[at.lane];
        let mut is_lost = false;
        let mut sends_on = false;
        if sender.qp.number == number {
            sender.out.in_flight -= frame.len();
            sends_on = sender.qp.is_alive;
            sender.qp.is_cut |= !sends_on && self.dice.chance(CUT_PERCENT);
            is_lost = sender.qp.is_cut;
        }
        let qp = &self.lane(at).qp;
        is_lost |= qp.number != number || !qp.is_alive;
        if !is_lost {
            let reads_again = self.conns[at.conn].reads_again && sends_on;
            if let Frame::Write(run, bytes) = &mut frame
                && reads_again
                && self.dice.chance(50)
            {
                // A packet was lost, and the card reads the pages once more.
                *bytes = self.card_reads(from, run);
            }
            match frame {
                Frame::Write(run, bytes) => self.card_writes(at, &run, &bytes),
                Frame::Notice(_, count) if reads_again => {
                    self.reap_later(from, number, count);
                    self.soon(Event::Qp(at, number, QpEvent::Heard(frame)));
                }
                Frame::Notice(..) | Frame::Ack(_) => {
                    self.soon(Event::Qp(at, number, QpEvent::Heard(frame)));
                }
            }
        }
        self.card_soon(from);
    }

    /// The sender's card learns that a batch has landed.
    fn reap_later(&mut self, at: LaneAt, number: u32, count: u64) {
        let delay = Duration::from_micros(self.dice.within(1, 50));
        let reaped = Event::Qp(at, number, QpEvent::Reaped(count));
        self.at(self.now + delay, reaped);
    }

    fn card_writes(&mut self, at: LaneAt, run: &Run, bytes: &[u8]) {
        let side = &self.conns[at.conn].sides[at.side];
        let (index, life) = (side.rank, side.life);
        let rank = &mut self.ranks[index];
        let (target, len) = (run.places.target, run.places.len);
        let (region, offset) = (target.region, target.offset);
        rank.bytes_mut(region, offset, len).copy_from_slice(bytes);
        let Some(id) = rank.grants.get(&(run.room, run.epoch)).copied() else {
            let room = run.room;
            panic!("P3: a card wrote for room {room}, which rank {index} never granted");
        };
        let rank = index;
        let handle = Handle { rank, life, id };
        self.notify(Notice::Placed(PlacedBytes {
            handle,
            region,
            offset,
            len,
        }));
    }
}
