//! The sending half of a queue pair: chains of WRITEs straight from the pages, and the frames after them.

use std::{
    num::NonZeroU64,
    sync::{Arc, atomic::Ordering},
};

use super::{
    Rail,
    buffers::slot_address,
    lane::{LaneIo, Phase, Way, Writing},
    packing::{Choice, Packed},
};
use crate::{
    engine::hub::Next,
    plan::descriptor::{Descriptor, Limits, PairCursor, Place},
    time::Time,
    transfer::BatchOut,
    transport::verbs::chain::{CHAIN_SGES_MAX, ChainError, Flags, RemotePlace, Sge},
    wire::{
        lane::{BatchHeader, PayloadMode, VOID_PLACE},
        rdma::{Frame, Immediate},
    },
};

/// Places of the send queue that pages leave to frames, so that answers are never behind a full queue of pages.
const FRAMES_RESERVED: u32 = 4;

/// Fills arrays of elements before they are gathered.
pub(super) const NO_SGE: Sge = Sge {
    address: 0,
    bytes: 0,
    lkey: 0,
};

/// Whether all that was to be added to a chain is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Added {
    All,
    /// The chain, the send queue or the peer's landing memory is full.
    Some,
}

impl LaneIo {
    /// Posts what there is to post, chain by chain. Returns whether anything was.
    ///
    /// # Errors
    /// Why the queue pair cannot be used any more, in words.
    pub(super) fn pump(&mut self, rail: &Rail, now: Time) -> Result<bool, String> {
        self.is_stirred = false;
        let mut has_posted = false;
        while self.pump_once(rail, now)? {
            has_posted = true;
        }
        if has_posted {
            self.last_active = now;
        }
        Ok(has_posted)
    }

    fn pump_once(&mut self, rail: &Rail, now: Time) -> Result<bool, String> {
        if self.wires.is_none() || self.sends.free() == 0 {
            return Ok(false);
        }
        self.chain.clear();
        match &mut self.phase {
            Phase::Greeting {
                is_active: true,
                has_spoken,
                ..
            } if !*has_spoken => {
                *has_spoken = true;
                let failures_told = self.hub.lane_offered(self.peer, self.handle.id);
                self.add_frame(Frame::Hello { failures_told })?;
            }
            Phase::Up => {
                if let Some(failures_told) = self.answer_hello.take() {
                    self.add_frame(Frame::Hello { failures_told })?;
                }
                self.add_work(rail, now)?;
            }
            Phase::Greeting { .. } | Phase::Draining { .. } | Phase::Fenced { .. } => {}
        }
        if self.chain.is_empty() {
            return Ok(false);
        }
        self.post(now)
    }

    fn post(&mut self, now: Time) -> Result<bool, String> {
        let Some(wires) = &mut self.wires else {
            return Ok(false);
        };
        let count = u32::try_from(self.chain.len()).unwrap_or(u32::MAX);
        // What is done with when this chain is: every batch before the one that is being written.
        let done = self.given - u64::from(self.writing.is_some());
        let id = self.sends.enter(count, done).map_err(|e| e.to_string())?;
        self.chain.seal(id);
        wires
            .qp
            .post(&mut self.chain)
            .map_err(|error| error.to_string())?;
        self.handle.rail.counters.posted(count);
        self.handle
            .posted
            .fetch_add(count.into(), Ordering::Relaxed);
        self.last_sent = now;
        Ok(true)
    }

    /// Fills a chain: answers, then pages and their notices, then returned credits if nothing else carries them.
    fn add_work(&mut self, rail: &Rail, now: Time) -> Result<(), String> {
        while let Some(ack) = self.acks.front().copied() {
            if !self.has_place_for_frame() || !self.credits.can_send(self.promised()) {
                break;
            }
            self.add_frame(Frame::Ack(ack))?;
            self.acks.pop_front();
        }
        while self.begin(rail, now)? {
            if self.add_writes(rail)? == Added::Some || !self.add_notice()? {
                break;
            }
        }
        let is_idle = now >= self.last_sent + rail.settings.heartbeat;
        if self.chain.is_empty() && self.has_place_for_frame() {
            if self.credits.must_return() {
                self.add_frame(Frame::Credit)?;
            } else if is_idle && self.credits.can_send(0) {
                self.add_frame(Frame::Heartbeat)?;
            }
        }
        Ok(())
    }

    /// Credits that are spoken for: the notice of the batch that is being written.
    fn promised(&self) -> u16 {
        u16::from(self.writing.is_some())
    }

    fn has_place_for_frame(&self) -> bool {
        let used = u32::try_from(self.chain.len()).unwrap_or(u32::MAX);
        let has_inline = !self.is_inline || self.chain.inline_room() >= Frame::LEN_MAX;
        self.chain.room() > 0 && has_inline && self.sends.free() > used
    }

    /// Makes sure that there is a batch being written. Returns whether there is.
    fn begin(&mut self, rail: &Rail, now: Time) -> Result<bool, String> {
        if self.writing.is_some() {
            return Ok(true);
        }
        if !self.is_hungry || !self.credits.can_send(0) || !self.has_place_for_pages() {
            return Ok(false);
        }
        let (peer, lane) = (self.peer, self.handle.id);
        let Some(next) = self.hub.next_batch(now, peer, lane) else {
            self.is_hungry = false;
            return Ok(false);
        };
        let Next {
            batch,
            gate,
            has_more,
        } = next;
        self.is_hungry = has_more;
        self.given += 1;
        let (way, is_void) = self.way(rail, &batch)?;
        self.writing = Some(Writing {
            way,
            batch,
            gate,
            is_void,
        });
        Ok(true)
    }

    /// How a batch travels, and whether it does not because its room ends here.
    fn way(&mut self, rail: &Rail, batch: &BatchOut) -> Result<(Way, bool), String> {
        let fields = &batch.fields;
        let chunk = NonZeroU64::new(rail.chunk_bytes);
        let limits = Limits {
            len_max: NonZeroU64::new(self.terms.message_bytes_max),
            source_chunk: chunk,
            target_chunk: NonZeroU64::new(self.terms.peer_chunk_bytes),
        };
        let cursor = PairCursor::new(
            Arc::clone(&batch.pairing),
            usize::from(fields.component),
            batch.part.len(),
            fields.offset..fields.offset + fields.len,
            &limits,
        );
        let mut cursor = cursor.map_err(|error| error.to_string())?;
        let (sources, targets) = ranges(batch)?;
        self.descriptor_at = 0;
        self.descriptor_end = cursor.fill(sources, targets, &mut self.descriptors);
        let way = match self.choose(batch) {
            Choice::Direct => (Way::Direct(cursor), false),
            Choice::Packed => (Way::Packed(Packed::Waiting), false),
            Choice::Neither => (Way::Packed(Packed::Waiting), true),
        };
        Ok(way)
    }

    pub(super) fn has_place_for_pages(&self) -> bool {
        let used = u32::try_from(self.chain.len()).unwrap_or(u32::MAX);
        self.chain.room() > 0 && self.sends.free() > used.saturating_add(FRAMES_RESERVED)
    }

    /// Adds WRITEs of the batch that is being written, sources gathered where their targets touch.
    ///
    /// The gate is held meanwhile: after it has been closed no page is handed to the card.
    fn add_writes(&mut self, rail: &Rail) -> Result<Added, String> {
        let Some(mut writing) = self.writing.take() else {
            return Ok(Added::All);
        };
        if let Way::Packed(state) = writing.way {
            let added = if writing.is_void {
                Ok(Added::All)
            } else {
                self.add_packed(&mut writing, state)
            };
            self.writing = Some(writing);
            return added;
        }
        if self.packing.holds_before(&writing.batch) {
            self.writing = Some(writing);
            return Ok(Added::Some);
        }
        let gate = Arc::clone(&writing.gate);
        let pass = gate.pass();
        let added = if pass.is_some() && !writing.is_void {
            self.add_pages(rail, &mut writing)
        } else {
            writing.is_void = true;
            Ok(Added::All)
        };
        // The chain is posted after this, but before anybody can learn that the room ended: whoever closes the gate then
        // waits for this queue pair (the node's ebb), because the batch is among those that it was given.
        drop(pass);
        self.writing = Some(writing);
        added
    }

    fn add_pages(&mut self, rail: &Rail, writing: &mut Writing) -> Result<Added, String> {
        let Writing { batch, way, .. } = writing;
        let Way::Direct(cursor) = way else {
            return Ok(Added::All);
        };
        let mut sges = [NO_SGE; CHAIN_SGES_MAX];
        while self.has_place_for_pages() {
            if self.descriptor_at == self.descriptor_end {
                let (sources, targets) = ranges(batch)?;
                let filled = cursor.fill(sources, targets, &mut self.descriptors);
                (self.descriptor_at, self.descriptor_end) = (0, filled);
                if filled == 0 {
                    return Ok(Added::All);
                }
            }
            let left = &self.descriptors[self.descriptor_at..self.descriptor_end];
            let limits = (self.terms.peer_chunk_bytes, self.terms.message_bytes_max);
            let count = gather(rail, left, self.sges_max, limits, &mut sges)?;
            let to = left
                .first()
                .and_then(|first| self.terms.targets.place(first.target));
            let to = to.ok_or("the peer granted pages of a region that it did not offer")?;
            let flags = Flags::default();
            match self.chain.write(0, &sges[..count], to, flags) {
                Ok(()) => self.descriptor_at += count,
                Err(ChainError::Full) => return Ok(Added::Some),
                Err(error) => return Err(error.to_string()),
            }
        }
        let is_done = self.descriptor_at == self.descriptor_end && cursor.remaining() == 0;
        Ok(if is_done { Added::All } else { Added::Some })
    }

    /// Adds the notice of the batch that was written. Returns false if there is no place for it now.
    fn add_notice(&mut self) -> Result<bool, String> {
        if !self.has_place_for_frame() {
            return Ok(false);
        }
        let Some(writing) = self.writing.take() else {
            return Ok(false);
        };
        let mut fields = writing.batch.fields;
        match writing.way {
            _ if writing.is_void => fields.place = VOID_PLACE,
            Way::Packed(Packed::At { place, .. }) => {
                fields.mode = PayloadMode::Packed;
                fields.place = place;
                self.handle.rail.counters.packed(fields.len);
                self.handle.packed.fetch_add(1, Ordering::Relaxed);
            }
            Way::Direct(_) | Way::Packed(Packed::Waiting) => fields.place = 0,
        }
        let header = BatchHeader::new(fields);
        match self.terms.slots {
            Some(slots) => self.add_immediate(slots, &header)?,
            None => self.add_frame(Frame::Batch(header))?,
        }
        Ok(true)
    }

    /// Adds a frame as a SEND. A credit for it must be there.
    fn add_frame(&mut self, frame: Frame) -> Result<(), String> {
        let mut bytes = [0; Frame::LEN_MAX];
        let solicited = frame.is_marked();
        let len = frame.encode(self.credits.send(), &mut bytes);
        let flags = Flags {
            signalled: false,
            solicited,
        };
        let added = if self.is_inline {
            self.chain.send_inline(0, &bytes[..len], flags)
        } else {
            let sge = self.stage(&bytes[..len])?;
            self.chain.send(0, &[sge], flags)
        };
        added.map_err(|error| error.to_string())
    }

    /// Adds a WRITE of the header to the peer's next slot, with the slot's number as immediate data.
    fn add_immediate(&mut self, slots: (u64, u32), header: &BatchHeader) -> Result<(), String> {
        let slot = u16::try_from((self.given - 1) % u64::from(self.terms.peer_receives))
            .expect("invariant: a remainder of a u16");
        let credits = self.credits.send();
        let sge = self.stage(&header.to_bytes())?;
        let to = RemotePlace {
            address: slot_address(slots.0, slot),
            rkey: slots.1,
        };
        let flags = Flags {
            signalled: false,
            solicited: true,
        };
        let imm = Immediate { slot, credits }.to_bits();
        self.chain
            .write_with_imm(0, &[sge], to, imm, flags)
            .map_err(|error| error.to_string())
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<Sge, String> {
        let wires = self.wires.as_ref().ok_or("the queue pair is gone")?;
        self.frames_sent += 1;
        Ok(wires.buffers.stage(self.frames_sent, bytes))
    }
}

/// The items of a batch, here and at the peer.
fn ranges(batch: &BatchOut) -> Result<(&[i32], &[i32]), String> {
    let (start, len) = (batch.fields.window_start, batch.fields.window_len);
    let (start, len) = (start as usize, len as usize);
    let targets = batch.targets.get(start..start.saturating_add(len));
    // What was pushed was compared with what was granted, so this does not happen; if it does, only the lane ends.
    let targets = targets.ok_or("a batch for more pages than were granted")?;
    Ok((&batch.items[batch.part.clone()], targets))
}

/// The sources of one WRITE: those from the front whose targets lie one behind the other, at most `most` of them.
///
/// The limits are the bytes of a registered chunk of the peer's, a power of two, and of one WRITE. `sges` is the caller's
/// and used again for every WRITE: making a new one costs more than filling it. Returns how many were filled.
pub(super) fn gather(
    rail: &Rail,
    descriptors: &[Descriptor],
    most: usize,
    (peer_chunk_bytes, message_bytes_max): (u64, u64),
    sges: &mut [Sge; CHAIN_SGES_MAX],
) -> Result<usize, String> {
    let chunk_mask = peer_chunk_bytes - 1;
    let (mut count, mut bytes) = (0, 0);
    let mut next: Option<Place> = None;
    for descriptor in descriptors.iter().take(most.min(CHAIN_SGES_MAX)) {
        // A WRITE has one remote key, so it does not go on into the peer's next chunk.
        let touches = next.is_none_or(|next| {
            next == descriptor.target && descriptor.target.offset & chunk_mask != 0
        });
        if !touches || bytes + descriptor.len > message_bytes_max {
            break;
        }
        sges[count] = rail.source(descriptor.source, descriptor.len)?;
        count += 1;
        bytes += descriptor.len;
        next = Some(Place {
            offset: descriptor.target.offset + descriptor.len,
            ..descriptor.target
        });
    }
    Ok(count)
}
