//! Pages of a device on their way to a socket: copied to host memory chunk by chunk, sent from there.
#![forbid(unsafe_code)]

use super::{Outbound, Payload, Staged, consume, source_cursor};
use crate::{
    memory::device::PART_BYTES,
    plan::mismatch::End,
    transfer::BatchOut,
    transport::{LaneError, lane::LaneContext, staging::Chunk},
    wire::lane::Seal,
};

/// What [`Outbound::chunk`] found.
pub(super) enum Taken {
    /// Staging memory for the next batch.
    Chunk(Chunk),
    /// The engine's memory is the host's.
    NotNeeded,
    /// There is none now; the writer will be woken.
    Later,
}

/// Whether the pages of a batch must be copied to host memory before they can be sent.
pub(super) fn is_staged(context: &LaneContext, batch: &BatchOut) -> bool {
    let component = usize::from(batch.fields.component);
    let hub = &context.hub;
    hub.is_on_device(&batch.pairing, component, End::Source)
}

impl Staged {
    pub(super) fn new(chunk: Chunk) -> Self {
        Self {
            chunk,
            at: 0,
            ready: 0,
            filled: 0,
        }
    }

    /// Waits for the next bytes: a first part, so that the wire has something to do, then the rest.
    fn advance(&mut self) -> Result<(), LaneError> {
        let first = if self.at == 0 { PART_BYTES } else { usize::MAX };
        let ready = self.filled.min(first);
        self.chunk.wait(ready)?;
        self.ready = ready;
        Ok(())
    }
}

impl Payload {
    /// What is written of a batch behind its header; from `chunk` where its pages lie on a device.
    pub(super) fn new(batch: BatchOut, chunk: Option<Chunk>) -> Result<Self, LaneError> {
        let fields = &batch.fields;
        Ok(Self {
            cursor: source_cursor(&batch)?,
            left: fields.len,
            staged: chunk.map(Staged::new),
            void: false,
            seal: Seal::new(fields.seq, true).to_bytes(),
            seal_sent: 0,
            batch,
        })
    }

    /// The room ended: what is left to send are zeros, and the seal says so.
    pub(super) fn give_up(&mut self) {
        self.staged = None;
        self.void = true;
        self.seal = Seal::new(self.batch.fields.seq, false).to_bytes();
    }
}

impl Outbound {
    /// Staging memory for the next batch, if it may need some.
    pub(super) fn chunk(&self, context: &LaneContext) -> Result<Taken, LaneError> {
        let streams = context.ring_out.is_none();
        let Some(staging) = context.hub.devices.staging().filter(|_| streams) else {
            return Ok(Taken::NotNeeded);
        };
        let current;
        let writer = match self.writer.get() {
            Some(writer) => writer,
            None => {
                current = std::thread::current();
                &current
            }
        };
        Ok(staging.to_send(writer)?.map_or(Taken::Later, Taken::Chunk))
    }

    /// Sees to it that there are bytes to send: fills the chunk of the batch being written when all of it is sent and pages are
    /// left, and waits for what is on its way there.
    pub(super) fn stage(&mut self, context: &LaneContext) -> Result<(), LaneError> {
        let Some(writing) = &mut self.writing else {
            return Ok(());
        };
        let Some(payload) = &mut writing.payload else {
            return Ok(());
        };
        let (left, batch) = (payload.left, &payload.batch);
        let Some(staged) = &mut payload.staged else {
            return Ok(());
        };
        if staged.at < staged.ready {
            return Ok(());
        }
        if staged.at < staged.filled {
            return staged.advance();
        }
        if left == 0 {
            return Ok(());
        }
        let space = staged.chunk.region().len();
        let mut missing = left.min(space as u64);
        self.parts.clear();
        while missing > 0 {
            if self.segment_at == self.segment_end {
                let items = &batch.items[batch.part.clone()];
                self.segment_end = payload.cursor.fill(items, &mut self.segments);
                self.segment_at = 0;
            }
            let mut part = self.segments[self.segment_at];
            part.len = part.len.min(missing);
            missing -= part.len;
            self.parts.push(part);
            let segments = &mut self.segments[..self.segment_end];
            self.segment_at = consume(segments, self.segment_at, part.len);
        }
        // What is gathered while the room is alive are its pages, however late they are sent.
        let Some(pass) = writing.gate.pass() else {
            payload.give_up();
            return Ok(());
        };
        self.stager
            .fetch(&context.hub, &self.parts, &mut staged.chunk)?;
        drop(pass);
        staged.at = 0;
        staged.filled = self
            .parts
            .iter()
            .map(|part| usize::try_from(part.len).unwrap_or(usize::MAX))
            .sum();
        staged.advance()
    }
}
