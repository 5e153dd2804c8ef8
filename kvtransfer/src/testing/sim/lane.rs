//! The receiving half of a simulated lane: frames in, bytes into the pages under the gate, one event per piece.

use std::sync::Arc;

use super::{
    network::LaneAt,
    rank::Handle,
    world::{Event, Notice, PlacedBytes, World},
};
use crate::{
    error::TransferError,
    ids::LaneId,
    memory::Gate,
    plan::{
        cursor::{Segment, SideCursor},
        descriptor::{Descriptor, Limits, PairCursor},
        mismatch::End,
        stream::check_items,
    },
    transfer::{Admission, BatchIn, Placement},
    wire::lane::{ACK_MAGIC, Ack, AckStatus, BatchHeader, PayloadMode, Seal, VOID_PLACE},
};

/// Most places filled by one call of a copying thread.
const COPY_PLACES: usize = 8;

/// A batch that may be placed.
#[derive(Debug)]
struct Batch {
    header: BatchHeader,
    to: BatchIn,
    gate: Arc<Gate>,
}

/// What the next bytes of the stream are.
#[derive(Debug, Default)]
enum Expect {
    #[default]
    Frame,
    Items(Batch),
    SkipItems(BatchHeader),
    Payload {
        batch: Batch,
        cursor: SideCursor,
        left: u64,
        /// A place that is half filled.
        place: Segment,
    },
    Skip(BatchHeader, u64),
    Seal(BatchHeader, Option<(BatchIn, Placement)>),
    Pull {
        batch: Batch,
        items: Vec<i32>,
        cursor: PairCursor,
        token: u64,
    },
    Ring {
        batch: Batch,
        cursor: SideCursor,
        from: usize,
    },
}

/// The receiving half of a lane.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    pub(super) buffer: Vec<u8>,
    expect: Expect,
    /// A copy goes on by itself; arrivals wait in the buffer.
    pub(super) is_copying: bool,
}

/// Whether more may be done now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Again,
    NeedBytes,
    /// A copy goes on in a later event.
    Later,
}

impl Inbound {
    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        (self.buffer.len() >= len).then(|| self.buffer.drain(..len).collect())
    }
}

impl World {
    /// A copy goes on. It is one call of the lane's thread, so it ends even if the connection has.
    pub(super) fn copy_on(&mut self, at: LaneAt) {
        self.conns[at.conn].sides[at.side].lanes[at.lane]
            .inbound
            .is_copying = false;
        self.lane_work(at);
    }

    /// Deals with what a lane's buffer holds.
    pub(super) fn lane_work(&mut self, at: LaneAt) {
        loop {
            let lane = &mut self.conns[at.conn].sides[at.side].lanes[at.lane];
            let mut inbound = std::mem::take(&mut lane.inbound);
            let step = self.inbound_step(at, &mut inbound);
            let lane = &mut self.conns[at.conn].sides[at.side].lanes[at.lane];
            match step {
                Ok(step) => {
                    inbound.is_copying = step == Step::Later;
                    lane.inbound = inbound;
                    match step {
                        Step::Again => {}
                        Step::NeedBytes => break,
                        Step::Later => {
                            self.soon(Event::Copy(at));
                            break;
                        }
                    }
                }
                Err(reason) => {
                    let rank = self.conns[at.conn].sides[at.side].rank;
                    self.protocol(rank, reason.clone());
                    return self.lane_lost(at, &reason);
                }
            }
        }
        self.pump_soon(at);
    }

    fn inbound_step(&mut self, at: LaneAt, lane: &mut Inbound) -> Result<Step, String> {
        match std::mem::take(&mut lane.expect) {
            Expect::Frame => self.frame(at, lane),
            Expect::Items(batch) => {
                let Some(list) = lane.take(8 + 4 * batch.header.window_len as usize) else {
                    lane.expect = Expect::Items(batch);
                    return Ok(Step::NeedBytes);
                };
                self.start_pull(lane, batch, &list)?;
                Ok(Step::Later)
            }
            Expect::SkipItems(header) => {
                if lane.take(8 + 4 * header.window_len as usize).is_none() {
                    lane.expect = Expect::SkipItems(header);
                    return Ok(Step::NeedBytes);
                }
                self.refuse_batch(at, &header);
                Ok(Step::Again)
            }
            Expect::Payload {
                batch,
                cursor,
                left,
                place,
            } => Ok(self.fill(at, lane, (batch, cursor, left, place))),
            Expect::Skip(header, left) => {
                let have = (lane.buffer.len() as u64).min(left);
                lane.take(usize::try_from(have).unwrap_or(0));
                let left = left - have;
                if left > 0 {
                    lane.expect = Expect::Skip(header, left);
                    return Ok(Step::NeedBytes);
                }
                lane.expect = Expect::Seal(header, None);
                Ok(Step::Again)
            }
            Expect::Seal(header, placed) => {
                let Some(seal) = lane.take(Seal::LEN) else {
                    lane.expect = Expect::Seal(header, placed);
                    return Ok(Step::NeedBytes);
                };
                let seal: [u8; Seal::LEN] = seal.try_into().map_err(|_| "seal length")?;
                let is_good = Seal::parse(&seal, header.seq).map_err(|error| error.to_string())?;
                match placed {
                    None => self.refuse_batch(at, &header),
                    Some((to, placement)) => {
                        let placement = if is_good { placement } else { Placement::Void };
                        self.finish_batch(at, &header, &to, placement);
                    }
                }
                Ok(Step::Again)
            }
            Expect::Pull {
                batch,
                items,
                cursor,
                token,
            } => Ok(self.pull(at, lane, batch, (items, cursor, token))),
            Expect::Ring {
                batch,
                cursor,
                from,
            } => Ok(self.copy_from_ring(at, lane, batch, (cursor, from))),
        }
    }

    /// A batch header or an acknowledgement.
    fn frame(&mut self, at: LaneAt, lane: &mut Inbound) -> Result<Step, String> {
        if !self.conns[at.conn].sides[at.side].lanes[at.lane].is_up {
            return Ok(Step::NeedBytes);
        }
        let (index, peer) = self.ends(at);
        let now = self.now;
        let Some(magic) = lane.buffer.first_chunk::<4>() else {
            return Ok(Step::NeedBytes);
        };
        if u32::from_le_bytes(*magic) == ACK_MAGIC {
            let Some(bytes) = lane.buffer.first_chunk::<{ Ack::LEN }>() else {
                return Ok(Step::NeedBytes);
            };
            let ack = Ack::parse(bytes).map_err(|error| error.to_string())?;
            lane.take(Ack::LEN);
            let number = LaneId(u8::try_from(at.lane).expect("invariant: at most 16 lanes"));
            self.ranks[index].node.on_ack(now, peer, number, &ack)?;
            self.settle(index);
            return Ok(Step::Again);
        }
        let Some(bytes) = lane.buffer.first_chunk::<{ BatchHeader::LEN }>() else {
            return Ok(Step::NeedBytes);
        };
        let header = BatchHeader::parse(bytes).map_err(|error| error.to_string())?;
        lane.take(BatchHeader::LEN);
        let admission = self.ranks[index].node.admit(now, peer, &header);
        self.settle(index);
        let admitted = match admission {
            Admission::Place(to) => self.ranks[index]
                .gates
                .get(&to.transfer)
                .cloned()
                .map(|gate| Batch { header, to, gate }),
            Admission::Discard => None,
        };
        lane.expect = match (header.mode(), admitted) {
            (PayloadMode::Inline, Some(batch)) => Expect::Payload {
                cursor: target_cursor(&batch)?,
                left: header.len,
                place: Segment::EMPTY,
                batch,
            },
            (PayloadMode::Inline, None) => Expect::Skip(header, header.len),
            (PayloadMode::Pull, Some(batch)) => Expect::Items(batch),
            (PayloadMode::Pull, None) => Expect::SkipItems(header),
            (PayloadMode::Ring, Some(batch)) if header.place == VOID_PLACE => {
                self.finish_batch(at, &header, &batch.to, Placement::Void);
                Expect::Frame
            }
            (PayloadMode::Ring, Some(batch)) => {
                let cursor = target_cursor(&batch)?;
                let from = usize::try_from(header.place).map_err(|_| "a ring place")?;
                lane.expect = Expect::Ring {
                    batch,
                    cursor,
                    from,
                };
                return Ok(Step::Later);
            }
            (PayloadMode::Ring, None) => {
                self.refuse_batch(at, &header);
                Expect::Frame
            }
            (PayloadMode::Write | PayloadMode::Packed | PayloadMode::Null, _) => {
                return Err("a batch that this lane cannot carry".into());
            }
        };
        Ok(Step::Again)
    }

    /// Places what the buffer holds of a payload.
    fn fill(
        &mut self,
        at: LaneAt,
        lane: &mut Inbound,
        (batch, mut cursor, mut left, mut place): (Batch, SideCursor, u64, Segment),
    ) -> Step {
        let items = &batch.to.items[batch.to.part.clone()];
        while left > 0 && !lane.buffer.is_empty() {
            if place.len == 0 {
                let mut next = [Segment::EMPTY];
                let filled = cursor.fill(items, &mut next);
                assert!(filled == 1, "the cursor ends before its batch");
                place = next[0];
            }
            let len = place.len.min(lane.buffer.len() as u64);
            if batch.gate.pass().is_none() {
                lane.expect = Expect::Skip(batch.header, left);
                return Step::Again;
            }
            let bytes: Vec<u8> = lane
                .buffer
                .drain(..usize::try_from(len).unwrap_or(0))
                .collect();
            self.place(at, &batch.to, place, &bytes);
            place.offset += len;
            place.len -= len;
            left -= len;
        }
        if left > 0 {
            lane.expect = Expect::Payload {
                batch,
                cursor,
                left,
                place,
            };
            return Step::NeedBytes;
        }
        lane.expect = Expect::Seal(batch.header, Some((batch.to, Placement::Placed)));
        Step::Again
    }

    fn start_pull(&self, lane: &mut Inbound, batch: Batch, list: &[u8]) -> Result<(), String> {
        let (token, items) = list.split_at(8);
        let token = u64::from_le_bytes(token.try_into().map_err(|_| "token length")?);
        let items: Vec<i32> = items
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let paired = &batch.to.pairing.components[batch.to.component];
        check_items(&items, paired.item_count(End::Source)).map_err(|error| error.to_string())?;
        let cursor = PairCursor::new(
            Arc::clone(&batch.to.pairing),
            batch.to.component,
            items.len(),
            batch.to.range.clone(),
            &Limits::default(),
        );
        let cursor = cursor.map_err(|error| error.to_string())?;
        lane.expect = Expect::Pull {
            batch,
            items,
            cursor,
            token,
        };
        Ok(())
    }

    /// One call of a pull: reads the sender's memory as it is now.
    fn pull(
        &mut self,
        at: LaneAt,
        lane: &mut Inbound,
        batch: Batch,
        (items, mut cursor, token): (Vec<i32>, PairCursor, u64),
    ) -> Step {
        let sender = &self.conns[at.conn].sides[1 - at.side];
        let (sender, life) = (sender.rank, sender.life);
        let is_gone = !self.ranks[sender].is_alive || self.ranks[sender].life != life;
        let placement = if batch.gate.pass().is_none() {
            Some(Placement::GateClosed)
        } else if is_gone {
            // ESRCH: no such process.
            Some(Placement::Failed(TransferError::Memory {
                op: "process_vm_readv",
                errno: 3,
            }))
        } else if cursor.remaining() > 0 {
            let mut places = [Descriptor::EMPTY; COPY_PLACES];
            let targets = &batch.to.items[batch.to.part.clone()];
            let filled = cursor.fill(&items, targets, &mut places);
            for place in &places[..filled] {
                let Descriptor {
                    source,
                    target,
                    len,
                } = *place;
                let bytes = self.ranks[sender]
                    .bytes(source.region, source.offset, len)
                    .to_vec();
                let to = Segment {
                    region: target.region,
                    offset: target.offset,
                    len,
                };
                self.place(at, &batch.to, to, &bytes);
            }
            None
        } else if self.ranks[sender].peek(batch.header.place) == token {
            Some(Placement::Placed)
        } else {
            Some(Placement::Void)
        };
        match placement {
            Some(placement) => {
                self.finish_batch(at, &batch.header, &batch.to, placement);
                Step::Again
            }
            None => {
                lane.expect = Expect::Pull {
                    batch,
                    items,
                    cursor,
                    token,
                };
                Step::Later
            }
        }
    }

    /// One call of a copy out of the sender's ring.
    fn copy_from_ring(
        &mut self,
        at: LaneAt,
        lane: &mut Inbound,
        batch: Batch,
        (mut cursor, mut from): (SideCursor, usize),
    ) -> Step {
        if batch.gate.pass().is_none() {
            self.finish_batch(at, &batch.header, &batch.to, Placement::GateClosed);
            return Step::Again;
        }
        let mut places = [Segment::EMPTY; COPY_PLACES];
        let filled = cursor.fill(&batch.to.items[batch.to.part.clone()], &mut places);
        for place in &places[..filled] {
            let len = usize::try_from(place.len).unwrap_or(0);
            let ring = &self.conns[at.conn].sides[1 - at.side].lanes[at.lane].ring;
            let bytes = ring.bytes[from..from + len].to_vec();
            self.place(at, &batch.to, *place, &bytes);
            from += len;
        }
        if cursor.remaining() > 0 {
            lane.expect = Expect::Ring {
                batch,
                cursor,
                from,
            };
            return Step::Later;
        }
        self.finish_batch(at, &batch.header, &batch.to, Placement::Placed);
        Step::Again
    }

    fn place(&mut self, at: LaneAt, batch: &BatchIn, to: Segment, bytes: &[u8]) {
        let rank = self.conns[at.conn].sides[at.side].rank;
        let Segment { region, offset, .. } = to;
        let len = bytes.len() as u64;
        self.ranks[rank]
            .bytes_mut(region, offset, len)
            .copy_from_slice(bytes);
        let handle = Handle {
            rank,
            life: self.ranks[rank].life,
            id: batch.transfer,
        };
        self.notify(Notice::Placed(PlacedBytes {
            handle,
            region,
            offset,
            len,
        }));
    }

    fn finish_batch(
        &mut self,
        at: LaneAt,
        header: &BatchHeader,
        batch: &BatchIn,
        placement: Placement,
    ) {
        let (rank, peer) = self.ends(at);
        let now = self.now;
        let node = &mut self.ranks[rank].node;
        let status = node.placed(now, peer, header, batch, placement);
        self.settle(rank);
        self.answer(at, header, status);
    }

    /// A batch that was not placed.
    fn refuse_batch(&mut self, at: LaneAt, header: &BatchHeader) {
        let rank = self.conns[at.conn].sides[at.side].rank;
        let status = self.ranks[rank].node.discarded(header);
        self.answer(at, header, status);
    }

    fn answer(&mut self, at: LaneAt, header: &BatchHeader, status: AckStatus) {
        let ack = Ack::new(header, status).to_bytes();
        self.outbound(at).acks.extend_from_slice(&ack);
    }

    fn ends(&self, at: LaneAt) -> (usize, crate::ids::PeerId) {
        let side = &self.conns[at.conn].sides[at.side];
        (side.rank, side.peer)
    }
}

fn target_cursor(batch: &Batch) -> Result<SideCursor, String> {
    SideCursor::new(
        Arc::clone(&batch.to.pairing),
        batch.to.component,
        End::Target,
        batch.to.part.len(),
        batch.to.range.clone(),
    )
    .map_err(|error| error.to_string())
}
