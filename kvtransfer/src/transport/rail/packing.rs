//! Packed batches: gathered here into one piece, written to the peer's landing memory with one WRITE, moved to the pages there.
//!
//! A page's bytes that lie in many small pieces, as head slices do between ranks of unequal size, would each take a work request
//! (or an element of one) of their own. Packed, a batch takes two: its bytes and its notice. So does memory that the device
//! does not reach. The bytes travel in the order of the stream, so the sender names none of the receiver's pages, and the
//! receiver places them under its room's gate as on every path where it places (promise P1).

mod memory;

use std::sync::Arc;

pub(super) use self::memory::PackMemory;
use super::{
    Rail,
    lane::{LaneIo, Writing},
    pump::Added,
    ring::{Incoming, Outgoing, Part},
};
use crate::{
    engine::{hub::Hub, link::Link},
    error::TransferError,
    layout::RegionId,
    memory::Gate,
    plan::{
        cursor::{Segment, SideCursor},
        mismatch::End,
        pairing::{Pairing, Piece},
        stream::StreamError,
    },
    transfer::{BatchIn, BatchOut, Placement},
    transport::{
        LaneError,
        staging::Stager,
        verbs::{
            chain::{Flags, RemotePlace},
            mr::Access,
        },
    },
    wire::{
        lane::{AckStatus, BatchHeader},
        rdma::{Landing, RailOffer},
    },
};

/// Fewest pieces of a batch that is packed: a chain of fewer WRITEs costs less than copying their bytes on both sides.
const PIECES_MIN: usize = 8;

/// Segments worked out at a time: all of a batch of 1 MiB in pieces of 256 bytes, which is one launch of a device's kernel.
const SEGMENTS: usize = 4096;

/// How a batch travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Its pieces are written to their pages.
    Direct,
    /// It is packed.
    Packed,
    /// It would have to be packed, and cannot.
    Neither,
}

/// Where a batch stands that is being packed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Packed {
    /// Its place in the peer's landing memory is not free yet.
    Waiting,
    /// It was gathered, and so many bytes of it are in chains.
    At { place: u64, posted: u64 },
}

/// Both directions of a queue pair.
pub(super) struct Packing {
    /// Where the peer takes packed batches, and the account of it.
    outgoing: Option<(Landing, Outgoing)>,
    /// Where ours arrive.
    incoming: Option<Incoming>,
    /// Batches whose pieces have fewer bytes on average are packed.
    below: u64,
    gather: Stager,
    scatter: Stager,
    segments: Vec<Segment>,
}

impl Packing {
    pub(super) fn new(theirs: Landing, ours: Option<Landing>, below: u64) -> Self {
        let outgoing = (theirs.bytes > 0).then(|| (theirs, Outgoing::new(theirs.bytes.into())));
        Self {
            outgoing,
            incoming: ours.map(|ours| Incoming::new(ours.bytes.into())),
            below,
            gather: Stager::default(),
            scatter: Stager::default(),
            segments: Vec::new(),
        }
    }

    /// Bytes of the longest batch that may be packed here; `None` where none may.
    pub(super) fn most(&self) -> Option<u64> {
        self.outgoing.as_ref().map(|(_, ring)| ring.most())
    }

    /// The first `count` batches are answered.
    pub(super) fn answered(&mut self, count: u64) {
        if let Some((_, ring)) = &mut self.outgoing {
            ring.answered(count);
        }
    }

    /// Whether earlier components of a batch's room wait to be moved to their pages: what the card writes to the pages itself
    /// would overtake them (promise P6).
    pub(super) fn holds_before(&self, batch: &BatchOut) -> bool {
        let ring = self.outgoing.as_ref();
        ring.is_some_and(|(_, ring)| ring.holds_before(part_of(batch)))
    }

    fn buffer(&mut self) -> &mut [Segment] {
        self.segments.resize(SEGMENTS, Segment::EMPTY);
        &mut self.segments
    }
}

fn part_of(batch: &BatchOut) -> Part {
    let (room, component) = (batch.fields.room, batch.fields.component);
    Part { room, component }
}

/// What a peer is offered for the batches that it may pack, if any of what it may send would be.
///
/// # Errors
/// It would, but there is no memory for it, in words.
pub(super) fn offer(
    rail: &Rail,
    hub: &Hub,
    link: &Link,
    theirs: &RailOffer,
) -> Result<Option<PackMemory>, String> {
    let bytes = rail.settings.landing_bytes;
    let below = rail.settings.pack_below;
    let by_address = hub.config.writable_by_address;
    let incoming = link.agreement.incoming.as_ref().ok();
    let must = must_stage(incoming, by_address, &theirs.staged, &rail.staged);
    let may = by_address
        || incoming.is_some_and(|pairing| {
            let mut pieces = pairing.components.iter().flat_map(|c| c.pieces());
            pieces.any(|piece| whole(piece) < below)
        });
    if bytes == 0 || !(must || may) {
        return if must {
            Err("memory that the RDMA devices do not reach needs landing memory (rdma.landing_bytes)".into())
        } else {
            Ok(None)
        };
    }
    let (budget, device) = (&hub.packing.landing, hub.devices.device());
    match PackMemory::new(&rail.pd, budget, bytes, Access::WriteTarget, device) {
        Ok(memory) => Ok(Some(memory)),
        Err(reason) if must => Err(reason),
        Err(reason) => {
            tracing::warn!(
                rail = rail.name,
                reason,
                "small pieces are written one by one"
            );
            Ok(None)
        }
    }
}

/// Bytes that lie together on both sides, if items do not touch.
fn whole(piece: &Piece) -> u64 {
    let touches = |end: End| piece.side(end).row_stride == piece.row_len;
    if touches(End::Source) && touches(End::Target) {
        piece.item_bytes()
    } else {
        piece.row_len
    }
}

/// Whether bytes of a pairing, or of any regions `by_address`, can only be packed, because a device does not reach them. Its
/// source's and target's regions out of reach are given.
fn must_stage(
    pairing: Option<&Arc<Pairing>>,
    by_address: bool,
    source: &[u32],
    target: &[u32],
) -> bool {
    let reaches = |staged: &[u32], region: RegionId| staged.binary_search(&region.0).is_err();
    let is_reached = |piece: &Piece| {
        reaches(source, piece.source.region) && reaches(target, piece.target.region)
    };
    let has_staged = !source.is_empty() || !target.is_empty();
    let is_paired = || {
        pairing.is_some_and(|pairing| {
            let mut pieces = pairing.components.iter().flat_map(|c| c.pieces());
            pieces.any(|piece| !is_reached(piece))
        })
    };
    has_staged && (by_address || is_paired())
}

/// Whether what we send to a peer can reach its pages over a queue pair for which it offered `landing`.
///
/// # Errors
/// It cannot, in words.
pub(super) fn check_reach(
    rail: &Rail,
    link: &Link,
    theirs: &RailOffer,
    landing: Landing,
) -> Result<(), String> {
    let (outgoing, by_address) = (link.agreement.outgoing.as_ref(), link.agreement.by_address);
    if landing.bytes == 0 && must_stage(outgoing.ok(), by_address, &rail.staged, &theirs.staged) {
        return Err(
            "the RDMA devices do not reach all memory, and the peer offered no landing memory"
                .into(),
        );
    }
    Ok(())
}

impl LaneIo {
    /// Makes the memory in which batches are packed. Nothing is done where it is there.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub(super) fn prepare_packing(&mut self) -> Result<(), String> {
        let (Some(wires), Some((landing, _))) = (&mut self.wires, &self.packing.outgoing) else {
            return Err("the peer offered no landing memory".into());
        };
        if wires.packing.is_none() {
            let (budget, device) = (&self.hub.packing.packing, self.hub.devices.device());
            let bytes = landing.bytes.into();
            let pd = &self.handle.rail.pd;
            let memory = PackMemory::new(pd, budget, bytes, Access::Local, device);
            wires.packing = Some(memory?);
        }
        Ok(())
    }

    /// How a batch travels whose first pieces are among the descriptors.
    pub(super) fn choose(&mut self, batch: &BatchOut) -> Choice {
        let len = batch.fields.len;
        if len == 0 {
            return Choice::Direct;
        }
        let pieces = &self.descriptors[self.descriptor_at..self.descriptor_end];
        let must = self.terms.has_staged && {
            let component = usize::from(batch.fields.component);
            let paired = batch.pairing.components.get(component);
            let is_reached = |piece: &Piece| {
                let (source, target) = (piece.source.region, piece.target.region);
                self.handle.rail.reaches(source) && self.terms.targets.reaches(target)
            };
            paired.is_some_and(|paired| !paired.pieces().iter().all(is_reached))
        };
        let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
        let is_small =
            pieces.len() >= PIECES_MIN && bytes / (pieces.len() as u64).max(1) < self.packing.below;
        let is_any = self.packing.below == u64::MAX;
        // Else it would have to wait until the receiver has moved what came before.
        let follows = self.packing.holds_before(batch);
        if !must && !is_small && !is_any && !follows {
            return Choice::Direct;
        }
        let made = match self.packing.most() {
            None => Err("the peer offered no landing memory".into()),
            // One that was cut for another lane, which was lost.
            Some(most) if len > most => Err(format!(
                "a batch of {len} bytes for landing memory that takes {most}"
            )),
            Some(_) => self.prepare_packing(),
        };
        match made {
            Ok(()) => Choice::Packed,
            Err(reason) if must => {
                // Only its room ends.
                self.hub
                    .fail(batch.transfer, TransferError::Device { reason });
                Choice::Neither
            }
            Err(reason) => {
                tracing::debug!(
                    rail = self.handle.rail.name,
                    reason,
                    "a batch of small pieces is not packed"
                );
                Choice::Direct
            }
        }
    }

    /// Adds the WRITE of a packed batch, once its place at the peer is free.
    pub(super) fn add_packed(
        &mut self,
        writing: &mut Writing,
        state: Packed,
    ) -> Result<Added, String> {
        let (place, mut posted) = match state {
            Packed::At { place, posted } => (place, posted),
            Packed::Waiting => match self.pack(writing)? {
                Some(place) => (place, 0),
                // It is over, or comes later.
                None if writing.is_void => return Ok(Added::All),
                None => return Ok(Added::Some),
            },
        };
        let len = writing.batch.fields.len;
        while posted < len && self.has_place_for_pages() {
            let bytes = (len - posted).min(self.terms.message_bytes_max);
            let memory = self.wires.as_ref().and_then(|wires| wires.packing.as_ref());
            let memory = memory.ok_or("the queue pair is gone")?;
            let sge = memory.sge(place + posted, bytes)?;
            let (landing, _) = self.packing.outgoing.as_ref().ok_or("no landing memory")?;
            let to = RemotePlace {
                address: landing.address + place + posted,
                rkey: landing.rkey,
            };
            let added = self.chain.write(0, &[sge], to, Flags::default());
            added.map_err(|error| error.to_string())?;
            posted += bytes;
        }
        writing.set_packed(Packed::At { place, posted });
        Ok(if posted == len {
            Added::All
        } else {
            Added::Some
        })
    }

    /// Gathers a batch. `None`: its place is not free, or its room has ended, and it is void now.
    ///
    /// The gate is held meanwhile: what is gathered while the room is alive are its pages, however late they are written.
    fn pack(&mut self, writing: &mut Writing) -> Result<Option<u64>, String> {
        let gate = Arc::clone(&writing.gate);
        let Some(pass) = gate.pass() else {
            writing.is_void = true;
            return Ok(None);
        };
        let len = writing.batch.fields.len;
        let (_, ring) = self.packing.outgoing.as_mut().ok_or("no landing memory")?;
        let Some(place) = ring.take(self.given, part_of(&writing.batch), len) else {
            return Ok(None);
        };
        let gathered = self.gather_all(&writing.batch, place);
        drop(pass);
        match gathered {
            Ok(()) => return Ok(Some(place)),
            Err(LaneError::Device(error)) => {
                let reason = error.to_string();
                self.hub
                    .fail(writing.batch.transfer, TransferError::Device { reason });
            }
            Err(error) => return Err(error.to_string()),
        }
        if let Some((_, ring)) = &mut self.packing.outgoing {
            ring.take_back();
        }
        writing.is_void = true;
        Ok(None)
    }

    fn gather_all(&mut self, batch: &BatchOut, place: u64) -> Result<(), LaneError> {
        let memory = self.wires.as_ref().and_then(|wires| wires.packing.as_ref());
        let memory = memory.ok_or_else(|| LaneError::Protocol("no memory to pack in".into()))?;
        let fields = &batch.fields;
        let mut cursor = SideCursor::new(
            Arc::clone(&batch.pairing),
            fields.component.into(),
            End::Source,
            batch.part.len(),
            fields.offset..fields.offset + fields.len,
        )
        .map_err(broken)?;
        let mut at = place;
        while cursor.remaining() > 0 {
            let items = &batch.items[batch.part.clone()];
            let filled = cursor.fill(items, self.packing.buffer());
            let segments = &self.packing.segments[..filled];
            self.packing
                .gather
                .gather(&self.hub, segments, &memory.region, at)?;
            at += segments.iter().map(|segment| segment.len).sum::<u64>();
        }
        Ok(())
    }

    /// A packed batch lies in our landing memory: moves it to where it belongs.
    ///
    /// # Errors
    /// The peer broke the protocol, in words.
    pub(super) fn unpack(&mut self, header: &BatchHeader) -> Result<AckStatus, String> {
        let incoming = self.packing.incoming.as_mut();
        let incoming = incoming.ok_or("a packed batch, and no landing memory was offered")?;
        let arrived = incoming.arrived(header.place, header.len);
        arrived.map_err(|error| error.to_string())?;
        let Some((batch, gate)) = self.hub.admit(self.peer, header) else {
            return Ok(self.hub.discarded(header));
        };
        let placement = match self.scatter_all(&batch, &gate, header.place) {
            // Batches before it may have been written to the pages.
            Ok(Placement::Placed) if header.is_last() => self.made_visible(),
            Ok(placement) => placement,
            Err(LaneError::Device(error)) => {
                let reason = error.to_string();
                Placement::Failed(TransferError::Device { reason })
            }
            Err(error) => return Err(error.to_string()),
        };
        self.handle.rail.counters.unpacked();
        Ok(self.hub.placed(self.peer, header, &batch, placement))
    }

    fn scatter_all(
        &mut self,
        batch: &BatchIn,
        gate: &Gate,
        place: u64,
    ) -> Result<Placement, LaneError> {
        let memory = self.wires.as_ref().and_then(|wires| wires.landing.as_ref());
        let memory = memory.ok_or_else(|| LaneError::Protocol("the queue pair is gone".into()))?;
        let mut cursor = SideCursor::new(
            Arc::clone(&batch.pairing),
            batch.component,
            End::Target,
            batch.part.len(),
            batch.range.clone(),
        )
        .map_err(broken)?;
        let mut at = place;
        while cursor.remaining() > 0 {
            let items = &batch.items[batch.part.clone()];
            let filled = cursor.fill(items, self.packing.buffer());
            let segments = &self.packing.segments[..filled];
            let Some(_pass) = gate.pass() else {
                return Ok(Placement::GateClosed);
            };
            self.packing
                .scatter
                .scatter(&self.hub, segments, &memory.region, at)?;
            at += segments.iter().map(|segment| segment.len).sum::<u64>();
        }
        Ok(Placement::Placed)
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "given to map_err by its name"
)]
fn broken(error: StreamError) -> LaneError {
    LaneError::Protocol(error.to_string())
}
