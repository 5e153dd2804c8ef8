//! The cache's memory when peers read and write it: one region per rank, touched by copies only.

use std::sync::Arc;

use kvtransfer::memory::Region;

use crate::cache::{KvStore, RankShape, Span};

/// All entries of one rank in one region, as [`RankShape::spans`] places them.
pub(super) struct RegionStore {
    region: Arc<Region>,
    spans: Vec<Span>,
}

impl RegionStore {
    /// A view of `region`, which holds at least [`RankShape::region_bytes`].
    pub(super) fn new(region: Arc<Region>, shape: &RankShape) -> Self {
        assert!(
            region.len() as u64 >= shape.region_bytes(),
            "the region holds all entries"
        );
        Self {
            region,
            spans: shape.spans(),
        }
    }

    fn place(&self, entry: usize, byte_offset: u64, len: usize) -> u64 {
        let span = &self.spans[entry];
        assert!(
            byte_offset + len as u64 <= span.item_len * span.item_count,
            "entry {entry} ends before byte {byte_offset} + {len}"
        );
        span.offset + byte_offset
    }
}

impl KvStore for RegionStore {
    fn write(&self, entry: usize, byte_offset: u64, bytes: &[u8]) {
        let at = self.place(entry, byte_offset, bytes.len());
        self.region
            .write_at(at, bytes)
            .expect("invariant: spans lie in the region");
    }

    fn read(&self, entry: usize, byte_offset: u64, into: &mut [u8]) {
        let at = self.place(entry, byte_offset, into.len());
        self.region
            .read_at(at, into)
            .expect("invariant: spans lie in the region");
    }
}
