//! The sending half of a simulated lane: headers, payload in pieces under the gate, seals, acknowledgements.

use std::sync::Arc;

use super::{
    network::{LaneAt, Stream},
    world::{Event, World},
};
use crate::{
    ids::LaneId,
    memory::Gate,
    plan::{
        cursor::{Segment, SideCursor},
        mismatch::End,
    },
    transfer::BatchOut,
    wire::lane::{BatchHeader, PayloadMode, Seal, VOID_PLACE},
};

/// What a lane has begun to write.
#[derive(Debug)]
struct Writing {
    gate: Arc<Gate>,
    head: Vec<u8>,
    head_sent: usize,
    payload: Option<Payload>,
}

#[derive(Debug)]
struct Payload {
    batch: BatchOut,
    cursor: SideCursor,
    /// Bytes that one call took from the cursor but did not write yet.
    segment: Segment,
    left: u64,
    is_void: bool,
    seal_sent: usize,
}

/// The sending half of a lane.
#[derive(Debug, Default)]
pub(super) struct Outbound {
    pub(super) acks: Vec<u8>,
    writing: Option<Writing>,
    /// A batch was taken from the node; it is made ready in the next call, so that its room can end in between.
    pub(super) taken: Option<(BatchOut, Arc<Gate>)>,
    batches: usize,
}

impl Outbound {
    fn is_idle(&self) -> bool {
        self.acks.is_empty() && self.writing.is_none() && self.taken.is_none()
    }
}

impl World {
    /// One call of a lane's thread: takes a batch, or writes one piece.
    pub(super) fn pump(&mut self, at: LaneAt) {
        self.conns[at.conn].sides[at.side].lanes[at.lane].pumping = false;
        if !self.conns[at.conn].sides[at.side].lanes[at.lane].is_up {
            return;
        }
        if self.lane(at).spec.mode == PayloadMode::Write {
            return self.post(at);
        }
        if let Some((batch, gate)) = self.outbound(at).taken.take() {
            self.begin(at, batch, gate);
        } else if self.outbound(at).writing.is_none() {
            self.take_batch(at);
        }
        let lane = &mut self.conns[at.conn].sides[at.side].lanes[at.lane];
        let space = lane.out.space();
        if space == 0 {
            return; // The next arrival at the other side makes space and asks again.
        }
        let most = space.min(lane.out.net.piece_bytes) as u64;
        let most = usize::try_from(self.dice.within(1, most)).unwrap_or(1);
        let piece = self.next_piece(at, most);
        if !piece.is_empty() {
            let lane = &mut self.conns[at.conn].sides[at.side].lanes[at.lane];
            let when = lane.out.send(self.now, piece.len(), &mut self.dice);
            let arrive = Event::Arrive {
                conn: at.conn,
                side: 1 - at.side,
                stream: Stream::Lane(at.lane),
                bytes: piece,
            };
            self.at(when, arrive);
        }
        if !self.outbound(at).is_idle() {
            self.pump_soon(at);
        }
    }

    pub(super) fn outbound(&mut self, at: LaneAt) -> &mut Outbound {
        &mut self.conns[at.conn].sides[at.side].lanes[at.lane].outbound
    }

    pub(super) fn take_batch(&mut self, at: LaneAt) {
        let (index, peer) = {
            let side = &self.conns[at.conn].sides[at.side];
            (side.rank, side.peer)
        };
        let lane = LaneId(u8::try_from(at.lane).expect("invariant: at most 16 lanes"));
        let now = self.now;
        let batch = self.ranks[index].node.next_batch(now, peer, lane);
        self.settle(index);
        let Some(batch) = batch else {
            return;
        };
        let gate = self.ranks[index].gates.get(&batch.transfer).cloned();
        match gate {
            Some(gate) => self.outbound(at).taken = Some((batch, gate)),
            None => {
                let room = batch.fields.room;
                self.protocol(
                    index,
                    format!("room {room} is over but had a batch to send"),
                );
            }
        }
    }

    fn begin(&mut self, at: LaneAt, batch: BatchOut, gate: Arc<Gate>) {
        let index = self.conns[at.conn].sides[at.side].rank;
        let mut fields = batch.fields;
        let (mut tail, mut payload) = (Vec::new(), None);
        match fields.mode {
            PayloadMode::Inline => {
                let cursor = source_cursor(&batch);
                payload = Some(Payload {
                    cursor,
                    segment: Segment::EMPTY,
                    left: fields.len,
                    is_void: false,
                    seal_sent: 0,
                    batch,
                });
            }
            PayloadMode::Pull => {
                let cell = self.ranks[index].cell_of.get(&batch.transfer);
                fields.place = cell.copied().unwrap_or(0);
                tail.extend_from_slice(&gate.cell().1.to_le_bytes());
                for item in &batch.items[batch.part.clone()] {
                    tail.extend_from_slice(&item.to_le_bytes());
                }
            }
            PayloadMode::Ring => fields.place = self.copy_to_ring(at, &batch, &gate),
            PayloadMode::Write | PayloadMode::Packed | PayloadMode::Null => {
                self.protocol(index, "a batch that no lane here can carry".into())
            }
        }
        let mut head = BatchHeader::new(fields).to_bytes().to_vec();
        head.extend(tail);
        self.outbound(at).writing = Some(Writing {
            gate,
            head,
            head_sent: 0,
            payload,
        });
    }

    fn copy_to_ring(&mut self, at: LaneAt, batch: &BatchOut, gate: &Gate) -> u64 {
        let side = &mut self.conns[at.conn].sides[at.side];
        let lane = &mut side.lanes[at.lane];
        let slots = lane.spec.window;
        let slot = lane.outbound.batches % slots * lane.ring.slot;
        lane.outbound.batches += 1;
        let len = usize::try_from(batch.fields.len).unwrap_or(usize::MAX);
        assert!(
            len <= lane.ring.slot,
            "a ring batch of {len} bytes for slots of {}",
            lane.ring.slot
        );
        let Some(_pass) = gate.pass() else {
            return VOID_PLACE;
        };
        let rank = &self.ranks[side.rank];
        let (mut cursor, mut to) = (source_cursor(batch), slot);
        let items = &batch.items[batch.part.clone()];
        let mut segments = [Segment::EMPTY; 16];
        while cursor.remaining() > 0 {
            let filled = cursor.fill(items, &mut segments);
            for segment in &segments[..filled] {
                let bytes = rank.bytes(segment.region, segment.offset, segment.len);
                lane.ring.bytes[to..to + bytes.len()].copy_from_slice(bytes);
                to += bytes.len();
            }
        }
        slot as u64
    }

    /// At most `most` bytes of what is to be written.
    fn next_piece(&mut self, at: LaneAt, most: usize) -> Vec<u8> {
        let side = &mut self.conns[at.conn].sides[at.side];
        let out = &mut side.lanes[at.lane].outbound;
        let mut piece = Vec::new();
        // Answers go between two batches only.
        if out.writing.as_ref().is_none_or(|w| w.head_sent == 0) {
            let acks = out.acks.len().min(most);
            piece.extend(out.acks.drain(..acks));
        }
        let Some(writing) = &mut out.writing else {
            return piece;
        };
        let head = &writing.head[writing.head_sent..];
        let head = &head[..head.len().min(most - piece.len())];
        piece.extend_from_slice(head);
        writing.head_sent += head.len();
        let mut is_done = writing.head_sent == writing.head.len();
        if let Some(payload) = writing.payload.as_mut().filter(|_| is_done) {
            let rank = &self.ranks[side.rank];
            while payload.left > 0 && piece.len() < most {
                if payload.segment.len == 0 {
                    let items = &payload.batch.items[payload.batch.part.clone()];
                    let mut next = [Segment::EMPTY];
                    let filled = payload.cursor.fill(items, &mut next);
                    assert!(filled == 1, "the cursor ends before its batch");
                    payload.segment = next[0];
                }
                let len = payload.segment.len.min((most - piece.len()) as u64);
                payload.is_void |= writing.gate.pass().is_none();
                if payload.is_void {
                    piece.resize(piece.len() + usize::try_from(len).unwrap_or(0), 0);
                } else {
                    let Segment { region, offset, .. } = payload.segment;
                    piece.extend_from_slice(rank.bytes(region, offset, len));
                }
                payload.segment.offset += len;
                payload.segment.len -= len;
                payload.left -= len;
            }
            if payload.left == 0 {
                let seal = Seal::new(payload.batch.fields.seq, !payload.is_void).to_bytes();
                let seal = &seal[payload.seal_sent..];
                let seal = &seal[..seal.len().min(most - piece.len())];
                piece.extend_from_slice(seal);
                payload.seal_sent += seal.len();
            }
            is_done = payload.left == 0 && payload.seal_sent == Seal::LEN;
        }
        if is_done {
            out.writing = None;
            // There may be another batch.
            self.pump_soon(at);
        }
        piece
    }
}

fn source_cursor(batch: &BatchOut) -> SideCursor {
    let range = batch.fields.offset..batch.fields.offset + batch.fields.len;
    SideCursor::new(
        Arc::clone(&batch.pairing),
        usize::from(batch.fields.component),
        End::Source,
        batch.part.len(),
        range,
    )
    .expect("invariant: the node hands out ranges of its own streams")
}
