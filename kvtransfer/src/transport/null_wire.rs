//! No wire: every batch is worked out as a network card would have to be told, and counted. For measurements of the plan.
#![forbid(unsafe_code)]

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    plan::descriptor::{Descriptor, Limits, PairCursor, Place},
    transfer::BatchOut,
};

/// Elements of one WRITE: sources that lie apart may share it where their targets touch. As many as eRDMA has.
const SGES: u32 = 4;
/// Registration chunks of both sides, and the longest message: no descriptor crosses a multiple of it.
const CHUNK_BYTES: NonZeroU64 = NonZeroU64::new(2 << 30).expect("it is not zero");
/// Descriptors worked out at a time, as for a chain.
const AT_A_TIME: usize = 64;

/// What connections without a wire were asked to move, since the engine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NullCounts {
    /// Batches: each would end with a notice to the receiver.
    pub batches: u64,
    /// Bytes.
    pub bytes: u64,
    /// Runs of bytes that lie together at both ends: what SGLang calls a block.
    pub blocks: u64,
    /// WRITEs with at most 4 elements each, whose sources are gathered where their targets touch; each batch adds one
    /// more for its notice.
    pub wire_operations: u64,
}

/// The counters.
#[derive(Debug, Default)]
pub(crate) struct NullWire {
    batches: AtomicU64,
    bytes: AtomicU64,
    blocks: AtomicU64,
    wire_operations: AtomicU64,
}

impl NullWire {
    /// Works out a batch and counts it.
    ///
    /// # Errors
    /// The batch does not fit its pairing: a fault of ours.
    pub(crate) fn plan(&self, batch: &BatchOut) -> Result<(), String> {
        let fields = &batch.fields;
        let limits = Limits {
            len_max: Some(CHUNK_BYTES),
            source_chunk: Some(CHUNK_BYTES),
            target_chunk: Some(CHUNK_BYTES),
        };
        let cursor = PairCursor::new(
            Arc::clone(&batch.pairing),
            usize::from(fields.component),
            batch.part.len(),
            fields.offset..fields.offset + fields.len,
            &limits,
        );
        let mut cursor = cursor.map_err(|error| error.to_string())?;
        let sources = &batch.items[batch.part.clone()];
        let start = fields.window_start as usize;
        let targets = batch.targets.get(start..start + sources.len());
        let targets = targets.ok_or("a batch beyond the granted items")?;
        let mut descriptors = [Descriptor::EMPTY; AT_A_TIME];
        let (mut blocks, mut writes) = (0, 0);
        let mut gathered = Gathered::default();
        while cursor.remaining() > 0 {
            let filled = cursor.fill(sources, targets, &mut descriptors);
            blocks += filled as u64;
            for descriptor in &descriptors[..filled] {
                writes += u64::from(gathered.starts_anew(descriptor));
            }
        }
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(fields.len, Ordering::Relaxed);
        self.blocks.fetch_add(blocks, Ordering::Relaxed);
        self.wire_operations
            .fetch_add(writes + 1, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn counts(&self) -> NullCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NullCounts {
            batches: read(&self.batches),
            bytes: read(&self.bytes),
            blocks: read(&self.blocks),
            wire_operations: read(&self.wire_operations),
        }
    }
}

/// The WRITE in the making.
#[derive(Default)]
struct Gathered {
    next: Option<Place>,
    elements: u32,
}

impl Gathered {
    /// Whether a descriptor needs a WRITE of its own.
    fn starts_anew(&mut self, descriptor: &Descriptor) -> bool {
        let joins = self.next == Some(descriptor.target) && self.elements < SGES;
        self.elements = if joins { self.elements + 1 } else { 1 };
        self.next = Some(Place {
            offset: descriptor.target.offset + descriptor.len,
            ..descriptor.target
        });
        !joins
    }
}
