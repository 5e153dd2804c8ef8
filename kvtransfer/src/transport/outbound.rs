//! The sending half of a lane: acknowledgements and batches, straight from the pages to the socket.
#![expect(unsafe_code, reason = "hands raw region memory to sendmsg")]

mod staged;

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, OnceLock},
    thread::Thread,
};

use super::{
    LaneError,
    lane::LaneContext,
    outbound::staged::{Taken, is_staged},
    staging::{Chunk, Stager},
    sys::{self, IOV_MAX, IoRange},
};
use crate::{
    clock,
    engine::hub::Next,
    memory::{Gate, Region},
    plan::{
        cursor::{Segment, SideCursor},
        mismatch::End,
    },
    transfer::BatchOut,
    wire::lane::{Ack, BatchHeader, PayloadMode, Seal, VOID_PLACE},
};

/// Unsent acknowledgements at which a lane stops reading: a peer that sends batches but never reads answers.
pub(super) const ACK_BYTES_MAX: usize = 64 << 10;

/// Fills the rest of a batch whose room ended while it was half written.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Segments worked out at a time: a call's worth, less one range each for acks, head, and seal.
const SEGMENTS: usize = IOV_MAX - 3;

/// How far a call to [`Outbound::pump`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Nothing is left to send.
    All,
    /// The socket is full.
    Blocked,
}

/// A batch being written.
struct Writing {
    gate: Arc<Gate>,
    /// Header, and for a pull the token and the items.
    head: Vec<u8>,
    head_sent: usize,
    payload: Option<Payload>,
}

/// Inline payload being written.
struct Payload {
    batch: BatchOut,
    cursor: SideCursor,
    /// Bytes not sent yet.
    left: u64,
    /// Where its pages, or the next of them, wait if they come from a device.
    staged: Option<Staged>,
    /// The room ended: zeros follow instead of pages.
    void: bool,
    seal: [u8; Seal::LEN],
    seal_sent: usize,
}

/// Pages of a batch that were copied to host memory.
struct Staged {
    chunk: Chunk,
    /// The unsent part of the chunk.
    at: usize,
    /// Where the part ends that has arrived.
    ready: usize,
    filled: usize,
}

pub(super) struct Outbound {
    acks: Vec<u8>,
    acks_sent: usize,
    writing: Option<Writing>,
    segments: Box<[Segment]>,
    /// The unsent part of `segments`.
    segment_at: usize,
    segment_end: usize,
    ranges: Vec<IoRange>,
    /// Batches handed to this lane so far: numbers the ring's slots.
    batches: u64,
    /// Batches written and not acknowledged yet.
    pub(super) unacked: usize,
    spare_head: Vec<u8>,
    stager: Stager,
    /// Segments of one chunk.
    parts: Vec<Segment>,
    /// The lane's writer, which is woken when there is staging memory again.
    writer: Arc<OnceLock<Thread>>,
}

impl Outbound {
    pub(super) fn new(writer: Arc<OnceLock<Thread>>) -> Self {
        Self {
            acks: Vec::new(),
            acks_sent: 0,
            writing: None,
            segments: vec![Segment::EMPTY; SEGMENTS].into_boxed_slice(),
            segment_at: 0,
            segment_end: 0,
            ranges: Vec::with_capacity(IOV_MAX),
            batches: 0,
            unacked: 0,
            spare_head: Vec::new(),
            stager: Stager::default(),
            parts: Vec::new(),
            writer,
        }
    }

    pub(super) fn queue_ack(&mut self, ack: Ack) {
        self.acks.extend_from_slice(&ack.to_bytes());
    }

    /// Whether the peer owes it to us to read before we read any more of it.
    pub(super) fn is_clogged(&self) -> bool {
        self.acks.len() - self.acks_sent >= ACK_BYTES_MAX
    }

    /// Whether there is something that the socket did not take.
    pub(super) fn is_pending(&self) -> bool {
        self.writing.is_some() || self.acks.len() > self.acks_sent
    }

    /// Sends until there is nothing to send or the socket is full.
    pub(super) fn pump(
        &mut self,
        context: &LaneContext,
        socket: BorrowedFd<'_>,
    ) -> Result<Sent, LaneError> {
        loop {
            if self.writing.is_none() {
                self.begin(context)?;
            }
            if !self.is_pending() {
                return Ok(Sent::All);
            }
            self.stage(context)?;
            match self.send_some(context, socket) {
                Ok(sent) => self.advance(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Sent::Blocked);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes the next batch from the node, if there is one.
    fn begin(&mut self, context: &LaneContext) -> Result<(), LaneError> {
        // A batch that was taken must be sent, so its staging memory comes first.
        let chunk = match self.chunk(context)? {
            Taken::Chunk(chunk) => Some(chunk),
            Taken::NotNeeded => None,
            Taken::Later => return Ok(()),
        };
        let next = context
            .hub
            .next_batch(clock::now(), context.peer, context.lane);
        let Some(Next { batch, gate, .. }) = next else {
            return Ok(());
        };
        let slot = self.batches;
        self.batches += 1;
        self.unacked += 1;
        let mut head = std::mem::take(&mut self.spare_head);
        head.clear();
        let mut fields = batch.fields;
        let payload = match fields.mode {
            PayloadMode::Inline => {
                head.extend_from_slice(&BatchHeader::new(fields).to_bytes());
                self.segment_at = 0;
                self.segment_end = 0;
                let chunk = chunk.filter(|_| is_staged(context, &batch));
                Some(Payload::new(batch, chunk)?)
            }
            PayloadMode::Pull => {
                let (address, token) = gate.cell();
                fields.place = address;
                head.extend_from_slice(&BatchHeader::new(fields).to_bytes());
                head.extend_from_slice(&token.to_le_bytes());
                for item in &batch.items[batch.part.clone()] {
                    head.extend_from_slice(&item.to_le_bytes());
                }
                None
            }
            PayloadMode::Ring => {
                fields.place = self.copy_to_ring(context, &batch, &gate, slot)?;
                head.extend_from_slice(&BatchHeader::new(fields).to_bytes());
                None
            }
            PayloadMode::Null => {
                context
                    .hub
                    .null_wire
                    .plan(&batch)
                    .map_err(LaneError::Protocol)?;
                head.extend_from_slice(&BatchHeader::new(fields).to_bytes());
                None
            }
            PayloadMode::Write | PayloadMode::Packed => {
                let what = "a batch for a queue pair was given to a stream";
                return Err(LaneError::Protocol(what.into()));
            }
        };
        self.writing = Some(Writing {
            gate,
            head,
            head_sent: 0,
            payload,
        });
        Ok(())
    }

    /// Copies a batch into its slot of the ring, and says where it lies: [`VOID_PLACE`] if its room ended meanwhile.
    fn copy_to_ring(
        &mut self,
        context: &LaneContext,
        batch: &BatchOut,
        gate: &Gate,
        slot: u64,
    ) -> Result<u64, LaneError> {
        let ring = context
            .ring_out
            .as_ref()
            .ok_or_else(|| missing_ring("sending"))?;
        // A batch cut for another lane, which was lost, may be larger than a slot: it must not run over its neighbours.
        let (len, most) = (batch.fields.len, ring.slot_bytes());
        if len > most {
            let reason = format!("a batch of {len} bytes for ring slots of {most}");
            return Err(LaneError::Protocol(reason));
        }
        let mut place = ring.slot(slot);
        let first = place;
        let mut cursor = source_cursor(batch)?;
        let items = &batch.items[batch.part.clone()];
        while cursor.remaining() > 0 {
            let filled = cursor.fill(items, &mut self.segments);
            let Some(_pass) = gate.pass() else {
                return Ok(VOID_PLACE);
            };
            let segments = &self.segments[..filled];
            let hub = &context.hub;
            self.stager.gather(hub, segments, ring.region(), place)?;
            place += segments.iter().map(|segment| segment.len).sum::<u64>();
        }
        Ok(first)
    }

    fn send_some(&mut self, context: &LaneContext, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.ranges.clear();
        let started = self
            .writing
            .as_ref()
            .is_some_and(|writing| writing.head_sent > 0);
        if !started {
            push_bytes(&mut self.ranges, &self.acks[self.acks_sent..]);
        }
        let Some(writing) = &mut self.writing else {
            // SAFETY: the ranges point into `self.acks`, which is not touched until the call returns.
            return unsafe { sys::send(socket, &self.ranges) };
        };
        push_bytes(&mut self.ranges, &writing.head[writing.head_sent..]);
        let Some(payload) = &mut writing.payload else {
            // SAFETY: the ranges point into `self.acks` and `writing.head`, which are not touched until the call returns.
            return unsafe { sys::send(socket, &self.ranges) };
        };
        // Held during the call: when the room's end is reported, the kernel no longer reads its pages.
        let needs_pages = payload.left > 0 && payload.staged.is_none();
        let pass = if needs_pages && !payload.void {
            writing.gate.pass()
        } else {
            None
        };
        if needs_pages && pass.is_none() && !payload.void {
            payload.give_up();
        }
        if payload.void {
            let len = usize::try_from(payload.left)
                .unwrap_or(usize::MAX)
                .min(ZEROS.len());
            push_bytes(&mut self.ranges, &ZEROS[..len]);
            if len as u64 == payload.left {
                push_bytes(&mut self.ranges, &payload.seal[payload.seal_sent..]);
            }
        } else if let Some(staged) = &payload.staged {
            let len = staged.ready - staged.at;
            let base = staged.chunk.region().at(staged.at as u64, len);
            let base = base.map_err(io::Error::other)?;
            self.ranges.push(IoRange::new(base.as_ptr(), len));
            if len as u64 == payload.left {
                push_bytes(&mut self.ranges, &payload.seal[payload.seal_sent..]);
            }
        } else {
            if self.segment_at == self.segment_end && payload.left > 0 {
                let items = &payload.batch.items[payload.batch.part.clone()];
                self.segment_end = payload.cursor.fill(items, &mut self.segments);
                self.segment_at = 0;
            }
            let segments = &self.segments[self.segment_at..self.segment_end];
            let mut staged = 0;
            for segment in segments {
                self.ranges.push(range_of(context, segment)?);
                staged += segment.len;
            }
            if staged == payload.left {
                push_bytes(&mut self.ranges, &payload.seal[payload.seal_sent..]);
            }
        }
        // SAFETY: the ranges point into buffers of `self`, a static, and region memory whose region the hub keeps alive;
        // the gate is held, so the pages are still the transfer's.
        let sent = unsafe { sys::send(socket, &self.ranges) };
        drop(pass);
        sent
    }

    /// Accounts for `sent` bytes, in the order in which `send_some` staged them.
    fn advance(&mut self, mut sent: usize) {
        let started = self
            .writing
            .as_ref()
            .is_some_and(|writing| writing.head_sent > 0);
        if !started {
            let acks = sent.min(self.acks.len() - self.acks_sent);
            self.acks_sent += acks;
            sent -= acks;
            if self.acks_sent == self.acks.len() {
                self.acks.clear();
                self.acks_sent = 0;
            }
        }
        let Some(writing) = &mut self.writing else {
            return;
        };
        let head = sent.min(writing.head.len() - writing.head_sent);
        writing.head_sent += head;
        sent -= head;
        let head_done = writing.head_sent == writing.head.len();
        let done = match &mut writing.payload {
            None => head_done,
            Some(payload) => {
                let bytes = (sent as u64).min(payload.left);
                payload.left -= bytes;
                if let Some(staged) = &mut payload.staged {
                    staged.at += usize::try_from(bytes).unwrap_or(sent);
                } else if !payload.void {
                    let segments = &mut self.segments[..self.segment_end];
                    self.segment_at = consume(segments, self.segment_at, bytes);
                }
                payload.seal_sent += sent - usize::try_from(bytes).unwrap_or(sent);
                head_done && payload.left == 0 && payload.seal_sent == Seal::LEN
            }
        };
        if done && let Some(writing) = self.writing.take() {
            self.spare_head = writing.head;
        }
    }
}

fn missing_ring(who: &str) -> LaneError {
    LaneError::Protocol(format!("a ring batch, but the {who} side has no ring"))
}

fn source_cursor(batch: &BatchOut) -> Result<SideCursor, LaneError> {
    let component = usize::from(batch.fields.component);
    let range = batch.fields.offset..batch.fields.offset + batch.fields.len;
    SideCursor::new(
        Arc::clone(&batch.pairing),
        component,
        End::Source,
        batch.part.len(),
        range,
    )
    .map_err(|error| LaneError::Protocol(error.to_string()))
}

pub(super) fn len_of(segment: &Segment) -> usize {
    usize::try_from(segment.len).expect("invariant: a segment is at most a batch, 64 MiB")
}

/// A segment of local memory for a system call.
pub(super) fn range_of(context: &LaneContext, segment: &Segment) -> io::Result<IoRange> {
    let len = len_of(segment);
    let region: Option<&Region> = context.hub.region(segment.region);
    let base = region.and_then(|region| region.at(segment.offset, len).ok());
    // Layouts and items were checked against the regions, so this does not happen; if it does, only the lane ends.
    let base = base.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(IoRange::new(base.as_ptr(), len))
}

fn push_bytes(ranges: &mut Vec<IoRange>, bytes: &[u8]) {
    if !bytes.is_empty() {
        ranges.push(IoRange::new(bytes.as_ptr().cast_mut(), bytes.len()));
    }
}

/// Takes `bytes` off the front of `segments[at..]`; the new front.
pub(super) fn consume(segments: &mut [Segment], mut at: usize, mut bytes: u64) -> usize {
    while bytes > 0 {
        let segment = &mut segments[at];
        if bytes < segment.len {
            segment.offset += bytes;
            segment.len -= bytes;
            return at;
        }
        bytes -= segment.len;
        at += 1;
    }
    at
}
