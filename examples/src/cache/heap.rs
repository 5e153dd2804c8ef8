//! The store of a worker without a transfer engine: ordinary memory of this process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{KvStore, RankMemory, RankShape};

/// Entries on the heap, each behind a lock of its own, so that the loopback may copy while the model computes.
#[derive(Debug)]
pub struct HeapStore {
    entries: Vec<Mutex<Box<[u8]>>>,
}

impl HeapStore {
    /// Zeroed memory for all entries of `shape`.
    #[must_use]
    pub fn new(shape: &RankShape) -> Self {
        let entry = |span: super::Span| {
            let len = usize::try_from(span.item_len * span.item_count)
                .expect("invariant: the cache fits the address space");
            Mutex::new(vec![0; len].into_boxed_slice())
        };
        Self {
            entries: shape.spans().into_iter().map(entry).collect(),
        }
    }

    fn entry(&self, entry: usize) -> MutexGuard<'_, Box<[u8]>> {
        // Plain bytes are valid whatever a panicking holder was doing.
        self.entries[entry]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl KvStore for HeapStore {
    fn write(&self, entry: usize, byte_offset: u64, bytes: &[u8]) {
        let start = usize::try_from(byte_offset).expect("invariant: offsets fit the entry");
        self.entry(entry)[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn read(&self, entry: usize, byte_offset: u64, into: &mut [u8]) {
        let start = usize::try_from(byte_offset).expect("invariant: offsets fit the entry");
        into.copy_from_slice(&self.entry(entry)[start..start + into.len()]);
    }
}

/// Heap memory for `tp` ranks that share the KV heads of `whole` (the shape of a single rank) evenly.
///
/// # Panics
/// When `tp` does not divide the heads; settings are checked before memory is made.
#[must_use]
pub fn heap_ranks(whole: RankShape, tp: usize) -> Vec<RankMemory> {
    assert!(
        tp > 0 && whole.kv_heads.is_multiple_of(tp),
        "{tp} ranks cannot share {} heads",
        whole.kv_heads
    );
    let shape = RankShape {
        kv_heads: whole.kv_heads / tp,
        ..whole
    };
    (0..tp)
        .map(|_| RankMemory {
            shape,
            store: Arc::new(HeapStore::new(&shape)),
        })
        .collect()
}
