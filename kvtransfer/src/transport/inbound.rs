//! The receiving half of a lane: headers in, payload straight into the pages, under the room's gate.
#![expect(unsafe_code, reason = "hands raw region memory to recvmsg")]

mod awaited;
mod device;
mod local;
mod staged;

use std::{io, os::fd::BorrowedFd, sync::Arc};

use local::PullSource;
use staged::Staged;

use super::{
    LaneError,
    lane::LaneContext,
    outbound::{Outbound, consume, range_of},
    staging::Stager,
    sys::{self, IOV_MAX, IoRange},
};
use crate::{
    clock,
    memory::Gate,
    plan::{
        cursor::{Segment, SideCursor},
        mismatch::End,
    },
    transfer::{BatchIn, Placement},
    wire::lane::{ACK_MAGIC, Ack, BatchHeader, PayloadMode, Seal, WINDOW_ITEMS_MAX},
};

/// Bytes that the reader takes in one call between frames: a small batch comes whole, headers included.
pub(super) const READ_AHEAD: usize = 32 << 10;
/// Bytes of the buffer: what is read at once behind what may be left, at most a pull's header and item list.
pub(super) const BUFFER: usize = READ_AHEAD + 8 + 4 * WINDOW_ITEMS_MAX as usize + BatchHeader::LEN;
/// Bytes read after a payload: its seal and the next header, but none of the next payload, which would be copied twice.
const AHEAD: usize = Seal::LEN + BatchHeader::LEN;
/// Read size where acknowledgements are awaited, so that one call takes many.
const ACKS_AHEAD: usize = 32 * Ack::LEN;
/// Bytes thrown away per call.
const DISCARD: usize = 64 << 10;
const SEGMENTS: usize = IOV_MAX - 1;

/// What the next bytes of the stream are.
enum Expect {
    Frame,
    Items(BatchHeader, BatchIn, Arc<Gate>),
    /// A pull list of a batch that is not placed.
    SkipItems(BatchHeader),
    Payload(Box<Filling>),
    /// Payload for a device's memory.
    Staged(Box<Staged>),
    /// Payload that nobody wants, then its seal.
    Skip(BatchHeader, u64),
    Seal(BatchHeader, Option<BatchIn>, Placement),
}

/// A batch being placed.
struct Filling {
    header: BatchHeader,
    batch: BatchIn,
    gate: Arc<Gate>,
    cursor: SideCursor,
    left: u64,
}

pub(super) struct Inbound {
    expect: Expect,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    segments: Box<[Segment]>,
    segment_at: usize,
    segment_end: usize,
    ranges: Vec<IoRange>,
    remote: Vec<IoRange>,
    scratch: Box<[u8]>,
    stager: Stager,
    /// Segments of one chunk.
    parts: Vec<Segment>,
    copies: device::Copies,
}

/// What one system call brought.
#[derive(Clone, Copy, Debug)]
struct Received {
    bytes: usize,
    /// Less than there was space for.
    is_short: bool,
}

/// Whether more may be done without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Again,
    /// The buffer does not hold enough.
    NeedBytes,
}

impl Inbound {
    /// `rest`: bytes that were read with the handshake.
    pub(super) fn new(rest: &[u8]) -> Self {
        let mut buffer = vec![0; BUFFER].into_boxed_slice();
        let end = rest.len().min(BUFFER);
        buffer[..end].copy_from_slice(&rest[..end]);
        Self {
            expect: Expect::Frame,
            buffer,
            start: 0,
            end,
            segments: vec![Segment::EMPTY; SEGMENTS].into_boxed_slice(),
            segment_at: 0,
            segment_end: 0,
            ranges: Vec::with_capacity(IOV_MAX),
            remote: Vec::new(),
            scratch: Box::default(),
            stager: Stager::default(),
            parts: Vec::new(),
            copies: device::Copies::default(),
        }
    }

    /// Reads until the socket is empty or the peer must first read our answers.
    pub(super) fn pump(
        &mut self,
        context: &LaneContext,
        socket: BorrowedFd<'_>,
        out: &mut Outbound,
    ) -> Result<(), LaneError> {
        loop {
            while self.step(context, out)? == Step::Again {}
            if out.is_clogged() {
                return Ok(());
            }
            match self.receive(context, socket, out) {
                Ok(Received { bytes: 0, .. }) => return Err(LaneError::Closed),
                Ok(received) => {
                    while self.step(context, out)? == Step::Again {}
                    // A read that got less than it asked for has emptied the socket. Within a payload more is on its way
                    // and another read is cheaper than a wait; between frames it would only find nothing.
                    let between_frames = matches!(self.expect, Expect::Frame);
                    if received.is_short && between_frames && self.start == self.end {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes bytes that were read elsewhere.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.compact();
        self.buffer[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    /// Deals with `got` bytes that the reader read into a buffer like ours, and with whatever else the socket holds if
    /// there may be more.
    pub(super) fn take_in(
        &mut self,
        context: &LaneContext,
        socket: BorrowedFd<'_>,
        out: &mut Outbound,
        buffer: &mut Box<[u8]>,
        got: usize,
    ) -> Result<(), LaneError> {
        if self.start == self.end && got > 0 {
            std::mem::swap(&mut self.buffer, buffer);
            (self.start, self.end) = (0, got);
        } else {
            self.append(&buffer[..got]);
        }
        while self.step(context, out)? == Step::Again {}
        if self.is_between_frames() && got < READ_AHEAD {
            return Ok(());
        }
        self.pump(context, socket, out)
    }

    fn compact(&mut self) {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// Deals with what the buffer holds.
    fn step(&mut self, context: &LaneContext, out: &mut Outbound) -> Result<Step, LaneError> {
        match std::mem::replace(&mut self.expect, Expect::Frame) {
            Expect::Frame => self.frame(context, out),
            Expect::Items(header, batch, gate) => {
                let Some(list) = self.take(8 + 4 * header.window_len as usize) else {
                    self.expect = Expect::Items(header, batch, gate);
                    return Ok(Step::NeedBytes);
                };
                let source = PullSource::parse(list);
                let placement = self.pull(context, &header, &batch, &gate, &source);
                let status = context.hub.placed(context.peer, &header, &batch, placement);
                out.queue_ack(Ack::new(&header, status));
                Ok(Step::Again)
            }
            Expect::SkipItems(header) => {
                if self.take(8 + 4 * header.window_len as usize).is_none() {
                    self.expect = Expect::SkipItems(header);
                    return Ok(Step::NeedBytes);
                }
                discard(context, &header, out);
                Ok(Step::Again)
            }
            Expect::Payload(filling) => self.fill_from_buffer(context, filling),
            Expect::Staged(staged) => self.stage_from_buffer(context, staged),
            Expect::Skip(header, left) => {
                let have = (self.end - self.start) as u64;
                let skipped = have.min(left);
                self.start += usize::try_from(skipped).expect("invariant: within the buffer");
                let left = left - skipped;
                if left > 0 {
                    self.expect = Expect::Skip(header, left);
                    return Ok(Step::NeedBytes);
                }
                self.expect = Expect::Seal(header, None, Placement::GateClosed);
                Ok(Step::Again)
            }
            Expect::Seal(header, batch, placement) => {
                let Some(seal) = self.take(Seal::LEN) else {
                    self.expect = Expect::Seal(header, batch, placement);
                    return Ok(Step::NeedBytes);
                };
                let seal: &[u8; Seal::LEN] = seal
                    .first_chunk()
                    .expect("invariant: taken with that length");
                let good = Seal::parse(seal, header.seq)?;
                match batch {
                    None => discard(context, &header, out),
                    Some(batch) => {
                        let placement = if good { placement } else { Placement::Void };
                        let status = context.hub.placed(context.peer, &header, &batch, placement);
                        out.queue_ack(Ack::new(&header, status));
                    }
                }
                Ok(Step::Again)
            }
        }
    }

    /// A batch header or an acknowledgement.
    fn frame(&mut self, context: &LaneContext, out: &mut Outbound) -> Result<Step, LaneError> {
        let have = &self.buffer[self.start..self.end];
        let Some(magic) = have.first_chunk::<4>() else {
            return Ok(Step::NeedBytes);
        };
        if u32::from_le_bytes(*magic) == ACK_MAGIC {
            let Some(bytes) = have.first_chunk::<{ Ack::LEN }>() else {
                return Ok(Step::NeedBytes);
            };
            let ack = Ack::parse(bytes)?;
            self.start += Ack::LEN;
            context
                .hub
                .on_ack(clock::now(), context.peer, context.lane, &ack)
                .map_err(LaneError::Protocol)?;
            out.unacked = out.unacked.saturating_sub(1);
            return Ok(Step::Again);
        }
        let Some(bytes) = have.first_chunk::<{ BatchHeader::LEN }>() else {
            return Ok(Step::NeedBytes);
        };
        let header = BatchHeader::parse(bytes)?;
        self.start += BatchHeader::LEN;
        let admitted = context.hub.admit(context.peer, &header);
        self.expect = match (header.mode(), admitted) {
            (PayloadMode::Inline, Some((batch, gate))) => {
                self.payload(context, header, batch, gate)?
            }
            (PayloadMode::Inline, None) => Expect::Skip(header, header.len),
            (PayloadMode::Pull, Some((batch, gate))) => Expect::Items(header, batch, gate),
            (PayloadMode::Pull, None) => Expect::SkipItems(header),
            (PayloadMode::Ring, Some((batch, gate))) => {
                let placement = self.copy_from_ring(context, &header, &batch, &gate)?;
                let status = context.hub.placed(context.peer, &header, &batch, placement);
                out.queue_ack(Ack::new(&header, status));
                Expect::Frame
            }
            (PayloadMode::Ring, None) => {
                discard(context, &header, out);
                Expect::Frame
            }
            (PayloadMode::Null, Some((batch, _))) if context.hub.config.null_wire => {
                let placement = Placement::Placed;
                let status = context.hub.placed(context.peer, &header, &batch, placement);
                out.queue_ack(Ack::new(&header, status));
                Expect::Frame
            }
            (PayloadMode::Null, None) if context.hub.config.null_wire => {
                discard(context, &header, out);
                Expect::Frame
            }
            (PayloadMode::Null, _) => {
                let what = "a batch without its bytes; null_wire is not set here";
                return Err(LaneError::Protocol(what.into()));
            }
            (PayloadMode::Write | PayloadMode::Packed, _) => {
                let what =
                    "a batch written by RDMA, announced on a connection that is not a queue pair";
                return Err(LaneError::Protocol(what.into()));
            }
        };
        Ok(Step::Again)
    }

    fn take(&mut self, len: usize) -> Option<&[u8]> {
        let end = self.start.checked_add(len).filter(|end| *end <= self.end)?;
        let bytes = &self.buffer[self.start..end];
        self.start = end;
        Some(bytes)
    }

    /// Works out the next places if none are left.
    fn refill(&mut self, filling: &mut Filling) {
        if self.segment_at == self.segment_end {
            let items = &filling.batch.items[filling.batch.part.clone()];
            self.segment_end = filling.cursor.fill(items, &mut self.segments);
            self.segment_at = 0;
        }
    }

    /// Copies what the buffer already holds of a payload.
    fn fill_from_buffer(
        &mut self,
        context: &LaneContext,
        mut filling: Box<Filling>,
    ) -> Result<Step, LaneError> {
        while filling.left > 0 && self.start < self.end {
            self.refill(&mut filling);
            let segment = self.segments[self.segment_at];
            let have = (self.end - self.start) as u64;
            let len = have.min(segment.len);
            let bytes = usize::try_from(len).expect("invariant: within the buffer");
            let Some(_pass) = filling.gate.pass() else {
                self.expect = Expect::Skip(filling.header, filling.left);
                return Ok(Step::Again);
            };
            let region = context.hub.region(segment.region);
            let source = &self.buffer[self.start..self.start + bytes];
            let copied = region.map(|region| region.write_at(segment.offset, source));
            if !matches!(copied, Some(Ok(()))) {
                return Err(LaneError::Protocol(format!(
                    "region {} is gone",
                    segment.region.0
                )));
            }
            self.start += bytes;
            filling.left -= len;
            self.segment_at = consume(&mut self.segments[..self.segment_end], self.segment_at, len);
        }
        if filling.left > 0 {
            self.expect = Expect::Payload(filling);
            return Ok(Step::NeedBytes);
        }
        self.expect = Expect::Seal(filling.header, Some(filling.batch), Placement::Placed);
        Ok(Step::Again)
    }

    /// One `recvmsg`: into the pages if a payload is due, else into the buffer.
    fn receive(
        &mut self,
        context: &LaneContext,
        socket: BorrowedFd<'_>,
        out: &Outbound,
    ) -> io::Result<Received> {
        self.compact();
        match std::mem::replace(&mut self.expect, Expect::Frame) {
            Expect::Payload(filling) => self.receive_payload(context, socket, filling),
            Expect::Staged(staged) => self.receive_staged(socket, staged),
            Expect::Skip(header, left) => {
                self.expect = Expect::Skip(header, left);
                self.receive_and_drop(socket, left)
            }
            expect => {
                let want = match &expect {
                    Expect::Items(header, ..) | Expect::SkipItems(header) => {
                        8 + 4 * header.window_len as usize + BatchHeader::LEN
                    }
                    Expect::Frame if out.unacked > 0 => ACKS_AHEAD,
                    // Not a byte of the payload that follows: it would be copied twice.
                    Expect::Frame => BatchHeader::LEN,
                    _ => AHEAD,
                };
                self.expect = expect;
                let end = want.max(self.end + 1).min(BUFFER);
                let space = &mut self.buffer[self.end..end];
                let ranges = [IoRange::new(space.as_mut_ptr(), space.len())];
                // SAFETY: the range is the unused part of our own buffer, not otherwise referred to during the call.
                let got = unsafe { sys::receive(socket, &ranges) }?;
                let is_short = got < end - self.end;
                self.end += got;
                Ok(Received {
                    bytes: got,
                    is_short,
                })
            }
        }
    }

    fn receive_payload(
        &mut self,
        context: &LaneContext,
        socket: BorrowedFd<'_>,
        mut filling: Box<Filling>,
    ) -> io::Result<Received> {
        debug_assert!(
            self.start == self.end,
            "the buffer was emptied into the pages first"
        );
        self.refill(&mut filling);
        self.ranges.clear();
        let mut staged = 0;
        for segment in &self.segments[self.segment_at..self.segment_end] {
            self.ranges.push(range_of(context, segment)?);
            staged += segment.len;
        }
        if staged == filling.left {
            self.ranges
                .push(IoRange::new(self.buffer.as_mut_ptr(), AHEAD));
        }
        let received = match filling.gate.pass() {
            // SAFETY: the ranges are region memory that the hub keeps alive, and the empty buffer; the gate is held, so
            // the pages still belong to the transfer.
            Some(_pass) => unsafe { sys::receive(socket, &self.ranges) },
            None => {
                let left = filling.left;
                self.expect = Expect::Skip(filling.header, left);
                return self.receive_and_drop(socket, left);
            }
        };
        let got = match received {
            Ok(got) => got,
            Err(error) => {
                self.expect = Expect::Payload(filling);
                return Err(error);
            }
        };
        let placed = (got as u64).min(filling.left);
        filling.left -= placed;
        self.segment_at = consume(
            &mut self.segments[..self.segment_end],
            self.segment_at,
            placed,
        );
        self.end = got - usize::try_from(placed).unwrap_or(got);
        self.expect = Expect::Payload(filling);
        let is_short = (got as u64) < staged + AHEAD as u64;
        Ok(Received {
            bytes: got,
            is_short,
        })
    }

    /// Reads payload that nobody wants.
    fn receive_and_drop(&mut self, socket: BorrowedFd<'_>, left: u64) -> io::Result<Received> {
        if self.scratch.is_empty() {
            self.scratch = vec![0; DISCARD].into_boxed_slice();
        }
        let len = usize::try_from(left).unwrap_or(DISCARD).min(DISCARD);
        let ranges = [IoRange::new(self.scratch.as_mut_ptr(), len)];
        // SAFETY: the range is our own scratch memory, not otherwise referred to during the call.
        let got = unsafe { sys::receive(socket, &ranges) }?;
        if let Expect::Skip(_, left) = &mut self.expect {
            *left -= got as u64;
        }
        Ok(Received {
            bytes: got,
            is_short: got < len,
        })
    }
}

fn discard(context: &LaneContext, header: &BatchHeader, out: &mut Outbound) {
    let status = context.hub.discarded(header);
    out.queue_ack(Ack::new(header, status));
}

fn target_cursor(batch: &BatchIn) -> Result<SideCursor, LaneError> {
    let pairing = Arc::clone(&batch.pairing);
    let items = batch.part.len();
    SideCursor::new(
        pairing,
        batch.component,
        End::Target,
        items,
        batch.range.clone(),
    )
    .map_err(|error| LaneError::Protocol(error.to_string()))
}
