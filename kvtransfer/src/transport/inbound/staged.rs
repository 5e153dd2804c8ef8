//! Payload for a device's memory: received into host memory chunk by chunk, copied from there under the room's gate.
#![expect(unsafe_code, reason = "hands raw memory to recvmsg")]

use std::{io, os::fd::BorrowedFd, sync::Arc};

use super::{AHEAD, Expect, Filling, Inbound, Received, Step, consume, target_cursor};
use crate::{
    error::TransferError,
    memory::{
        Gate,
        device::{DeviceError, PART_BYTES},
    },
    plan::mismatch::End,
    transfer::{BatchIn, Placement},
    transport::{
        LaneError,
        lane::LaneContext,
        staging::Chunk,
        sys::{self, IoRange},
    },
    wire::lane::BatchHeader,
};

/// A batch on its way through a chunk.
pub(super) struct Staged {
    filling: Filling,
    chunk: Chunk,
    /// Bytes in the chunk.
    filled: usize,
    /// Those of them that have started for the device.
    sent: usize,
    /// Every page of the batch is on the device.
    is_sent_early: bool,
}

impl Staged {
    /// Bytes that are to come from the socket.
    pub(super) fn left(&self) -> u64 {
        self.filling.left
    }

    /// Bytes that the chunk takes before it must be emptied.
    fn space(&self) -> usize {
        let free = self.chunk.region().len() - self.filled;
        usize::try_from(self.filling.left).unwrap_or(free).min(free)
    }

    fn is_full(&self) -> bool {
        self.space() == 0
    }

    fn took(&mut self, bytes: usize) {
        self.filled += bytes;
        self.filling.left -= bytes as u64;
    }
}

/// A batch that our device did not place.
pub(super) fn failed(error: &DeviceError) -> Placement {
    let reason = error.to_string();
    Placement::Failed(TransferError::Device { reason })
}

impl Inbound {
    /// How the payload of an admitted batch is taken in. Waits for staging memory where it is needed: the peer is held up by
    /// the socket meanwhile.
    pub(super) fn payload(
        &mut self,
        context: &LaneContext,
        header: BatchHeader,
        batch: BatchIn,
        gate: Arc<Gate>,
    ) -> Result<Expect, LaneError> {
        let filling = Filling {
            cursor: target_cursor(&batch)?,
            left: header.len,
            header,
            batch,
            gate,
        };
        self.segment_at = 0;
        self.segment_end = 0;
        let batch = &filling.batch;
        let hub = &context.hub;
        let staging = hub.devices.staging();
        let is_on_device = hub.is_on_device(&batch.pairing, batch.component, End::Target);
        let Some(staging) = staging.filter(|_| is_on_device && filling.left > 0) else {
            return Ok(Expect::Payload(Box::new(filling)));
        };
        let is_sent_early = hub.is_all_on_device(&batch.pairing, batch.component, End::Target);
        loop {
            if let Some(chunk) = staging.to_receive()? {
                return Ok(Expect::Staged(Box::new(Staged {
                    filling,
                    chunk,
                    filled: 0,
                    sent: 0,
                    is_sent_early,
                })));
            }
            // Rooms end by their deadline at the latest.
            if filling.gate.pass().is_none() {
                return Ok(Expect::Skip(filling.header, filling.left));
            }
        }
    }

    /// Copies what the buffer already holds of a payload, and what a full chunk holds to where it belongs.
    pub(super) fn stage_from_buffer(
        &mut self,
        context: &LaneContext,
        mut staged: Box<Staged>,
    ) -> Result<Step, LaneError> {
        let len = staged.space().min(self.end - self.start);
        let bytes = &self.buffer[self.start..self.start + len];
        let copied = staged.chunk.region().write_at(staged.filled as u64, bytes);
        copied.map_err(|error| LaneError::Protocol(error.to_string()))?;
        self.start += len;
        staged.took(len);
        let is_full = staged.is_full();
        let mut moved = self.send_parts(context, &mut staged).map(|()| true);
        if is_full && moved.is_ok() {
            moved = self.empty_chunk(context, &mut staged);
        }
        let moved = match moved {
            Err(LaneError::Device(error)) => {
                // Ours to answer for, not the connection's: only the room ends. What is left of the batch is not wanted.
                let Filling { header, batch, .. } = &staged.filling;
                let placement = failed(&error);
                context.hub.placed(context.peer, header, batch, placement);
                false
            }
            moved => moved?,
        };
        if !moved {
            let Filling { header, left, .. } = staged.filling;
            self.expect = Expect::Skip(header, left);
        } else if !is_full {
            self.expect = Expect::Staged(staged);
            return Ok(Step::NeedBytes);
        } else if staged.filling.left > 0 {
            self.expect = Expect::Staged(staged);
        } else {
            let Filling { header, batch, .. } = staged.filling;
            self.expect = Expect::Seal(header, Some(batch), Placement::Placed);
        }
        Ok(Step::Again)
    }

    /// Lets what came in start for the device, a part at a time.
    fn send_parts(&mut self, context: &LaneContext, staged: &mut Staged) -> Result<(), LaneError> {
        let device = context.hub.devices.device();
        let Some(device) = device.filter(|_| staged.is_sent_early) else {
            return Ok(());
        };
        let waiting = staged.filled - staged.sent;
        if waiting == 0 || (waiting < PART_BYTES && !staged.is_full()) {
            return Ok(());
        }
        let range = staged.sent..staged.filled;
        self.stager.send(&**device, &mut staged.chunk, range)?;
        staged.sent = staged.filled;
        Ok(())
    }

    /// Copies a chunk into the device's pages. False: the room has ended, and nothing was copied.
    fn empty_chunk(
        &mut self,
        context: &LaneContext,
        staged: &mut Staged,
    ) -> Result<bool, LaneError> {
        let mut missing = staged.filled as u64;
        self.parts.clear();
        while missing > 0 {
            self.refill(&mut staged.filling);
            let mut part = self.segments[self.segment_at];
            part.len = part.len.min(missing);
            missing -= part.len;
            self.parts.push(part);
            let segments = &mut self.segments[..self.segment_end];
            self.segment_at = consume(segments, self.segment_at, part.len);
        }
        let Some(_pass) = staged.filling.gate.pass() else {
            return Ok(false);
        };
        let (hub, chunk) = (&context.hub, staged.chunk.region());
        if staged.is_sent_early {
            self.stager.deliver(hub, &self.parts)?;
        } else {
            self.stager.scatter(hub, &self.parts, chunk, 0)?;
        }
        (staged.filled, staged.sent) = (0, 0);
        Ok(true)
    }

    /// One `recvmsg` into the chunk, and what follows the payload into the buffer.
    pub(super) fn receive_staged(
        &mut self,
        socket: BorrowedFd<'_>,
        mut staged: Box<Staged>,
    ) -> io::Result<Received> {
        debug_assert!(
            self.start == self.end,
            "the buffer was emptied into the chunk first"
        );
        let space = staged.space();
        let target = staged.chunk.region().at(staged.filled as u64, space);
        let target = target.map_err(io::Error::other)?;
        self.ranges.clear();
        self.ranges.push(IoRange::new(target.as_ptr(), space));
        let mut wanted = space;
        if space as u64 == staged.filling.left {
            self.ranges
                .push(IoRange::new(self.buffer.as_mut_ptr(), AHEAD));
            wanted += AHEAD;
        }
        // SAFETY: the ranges are the lane's own chunk and its empty buffer, which nobody else uses during the call.
        let received = unsafe { sys::receive(socket, &self.ranges) };
        let got = match received {
            Ok(got) => got,
            Err(error) => {
                self.expect = Expect::Staged(staged);
                return Err(error);
            }
        };
        let placed = got.min(space);
        staged.took(placed);
        self.end = got - placed;
        self.expect = Expect::Staged(staged);
        Ok(Received {
            bytes: got,
            is_short: got < wanted,
        })
    }
}
