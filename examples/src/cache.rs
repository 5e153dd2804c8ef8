//! The paged KV cache of one worker: what its memory looks like, and how the model reads and writes it.
//!
//! Every tensor-parallel rank has one [`RankMemory`]: the keys and values of its own KV heads, layer by layer, in
//! pages, followed by the aux rows. Page numbers are shared: page 7 of a sequence is page 7 on every rank, because
//! one allocator ([`pages`]) serves them all. The bytes live behind [`KvStore`], because in a PD worker a peer writes
//! into them while we look on: nobody may hold a `&[u8]` over such memory.
#![forbid(unsafe_code)]

pub mod aux;
pub mod heap;
pub mod pages;

use std::sync::Arc;

use kvtransfer::layout::{
    Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape,
};

/// Number of a page, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u32);

/// The bytes of one rank's KV and aux entries. Entries and their sizes are those of [`RankShape::spans`].
///
/// Both calls copy: the memory may be written by a peer at any moment, and only the transfer protocol says which
/// pages are quiet. A read that races with a peer's write returns some mixture of bytes, never undefined behaviour.
///
/// # Panics
/// Implementations panic when a range leaves its entry: offsets are computed by this crate alone, so that is a bug.
pub trait KvStore: Send + Sync {
    /// Copies `bytes` into `entry`, `byte_offset` bytes after its start.
    fn write(&self, entry: usize, byte_offset: u64, bytes: &[u8]);
    /// Fills `into` from `entry`, `byte_offset` bytes after its start.
    fn read(&self, entry: usize, byte_offset: u64, into: &mut [u8]);
}

/// Where one entry lies if all entries share one region, back to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte in the region; a multiple of [`ENTRY_ALIGN`].
    pub offset: u64,
    /// Bytes of one item: a page for KV, a row for aux.
    pub item_len: u64,
    /// Items in the entry.
    pub item_count: u64,
}

/// Entries start on a page of the machine, so that a same-host path may map them one by one.
pub const ENTRY_ALIGN: u64 = 4096;

/// The sizes of one rank's share of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankShape {
    /// Transformer blocks.
    pub layers: usize,
    /// KV heads held by this rank.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens per page.
    pub page_size: usize,
    /// Pages in each KV entry.
    pub pages: usize,
    /// Aux rows.
    pub aux_slots: usize,
}

/// Bytes of one element of the cache: f32.
const ELEMENT_BYTES: usize = 4;

impl RankShape {
    /// The entry that holds the keys of `layer`: all K layers come first.
    #[must_use]
    pub const fn key_entry(&self, layer: usize) -> usize {
        layer
    }

    /// The entry that holds the values of `layer`: after all K layers.
    #[must_use]
    pub const fn value_entry(&self, layer: usize) -> usize {
        self.layers + layer
    }

    /// The first aux entry: after all KV entries.
    #[must_use]
    pub const fn first_aux_entry(&self) -> usize {
        2 * self.layers
    }

    /// Bytes of one token's keys (or values) on this rank.
    #[must_use]
    pub const fn row_bytes(&self) -> usize {
        self.kv_heads * self.head_dim * ELEMENT_BYTES
    }

    /// Bytes of one page of one KV entry: `[page_size, kv_heads, head_dim]` f32, "nhd".
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        self.page_size * self.row_bytes()
    }

    /// All entries in order: K layers, V layers, aux entries ([`aux::AUX_ENTRIES`]; the room is the last).
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        let kv = (self.page_bytes() as u64, self.pages as u64);
        let rows = (aux::ROW_BYTES as u64, self.aux_slots as u64);
        let sizes = std::iter::repeat_n(kv, 2 * self.layers)
            .chain(std::iter::repeat_n(rows, aux::AUX_ENTRIES));
        let mut offset = 0;
        sizes
            .map(|(item_len, item_count)| {
                let span = Span {
                    offset,
                    item_len,
                    item_count,
                };
                offset = (offset + item_len * item_count).next_multiple_of(ENTRY_ALIGN);
                span
            })
            .collect()
    }

    /// Bytes of a region that holds all entries.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        let last = self
            .spans()
            .pop()
            .expect("invariant: there are aux entries");
        (last.offset + last.item_len * last.item_count).next_multiple_of(ENTRY_ALIGN)
    }

    /// What a peer must know of this rank, if all entries lie in `region` as [`RankShape::spans`] says.
    ///
    /// `tp` is this rank's place; `total_kv_heads` are the KV heads of the whole model.
    #[must_use]
    pub fn layout(&self, region: RegionId, tp: Shard, total_kv_heads: usize) -> Layout {
        let narrow = |n: usize| u32::try_from(n).expect("invariant: sizes come from u32 flags");
        let mut entries: Vec<Entry> = self
            .spans()
            .into_iter()
            .map(|span| Entry {
                region,
                offset: span.offset,
                item_len: span.item_len,
                item_count: span.item_count,
                layer_id: None,
            })
            .collect();
        let aux = entries.split_off(self.first_aux_entry());
        let component = |kind, entries| Component {
            kind,
            entries,
            draft_entries: 0,
            state: StateShape::default(),
        };
        Layout {
            page_size: narrow(self.page_size),
            kv_dtype: "float32".to_owned(),
            kv_layout: "nhd".to_owned(),
            attention: Attention::Heads {
                total_kv_heads: narrow(total_kv_heads),
                rank_kv_heads: narrow(self.kv_heads),
            },
            tp,
            pp: Shard::ONE,
            layers: 0..narrow(self.layers),
            components: vec![
                component(ComponentKind::Kv, entries),
                component(ComponentKind::Aux, aux),
            ],
        }
    }
}

/// One rank's share of the cache: its sizes and its bytes.
#[derive(Clone)]
pub struct RankMemory {
    /// The sizes.
    pub shape: RankShape,
    /// The bytes.
    pub store: Arc<dyn KvStore>,
}

impl std::fmt::Debug for RankMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RankMemory")
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// One sequence's view of the cache: the page table over all ranks.
#[derive(Clone, Copy, Debug)]
pub struct PagedKv<'a> {
    /// All ranks in order; each holds an equal, consecutive part of the KV heads.
    pub ranks: &'a [RankMemory],
    /// The pages of the sequence in order: token `t` lies in page `t / page_size`.
    pub pages: &'a [PageIndex],
}

impl PagedKv<'_> {
    /// Stores the keys and values of consecutive tokens from position `start`. Both are `[token, kv_head, head_dim]`
    /// over all heads of the model; each rank keeps its own.
    ///
    /// # Panics
    /// When a position lies beyond the pages: the scheduler leases pages for a sequence's whole life.
    pub fn write(&self, layer: usize, start: usize, keys: &[f32], values: &[f32]) {
        let width: usize = self
            .ranks
            .iter()
            .map(|r| r.shape.kv_heads * r.shape.head_dim)
            .sum();
        assert_eq!(keys.len(), values.len(), "keys and values come in pairs");
        for (entry_of, data) in [(0, keys), (1, values)] {
            for (t, token) in data.chunks_exact(width).enumerate() {
                let mut rest = token;
                for rank in self.ranks {
                    let (own, others) = rest.split_at(rank.shape.kv_heads * rank.shape.head_dim);
                    rest = others;
                    let bytes: Vec<u8> = own.iter().flat_map(|x| x.to_le_bytes()).collect();
                    let (page, row) = self.locate(&rank.shape, start + t);
                    let entry = entry_of * rank.shape.layers + layer;
                    let offset = page * rank.shape.page_bytes() + row * rank.shape.row_bytes();
                    rank.store.write(entry, offset as u64, &bytes);
                }
            }
        }
    }

    /// Reads the first `count` tokens of a layer: for each KV head of the model, in global order, its keys and its
    /// values as dense `[count, head_dim]` rows.
    #[must_use]
    pub fn gather(&self, layer: usize, count: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
        let mut heads = Vec::new();
        for rank in self.ranks {
            let keys = self.gather_entry(rank, rank.shape.key_entry(layer), count);
            let values = self.gather_entry(rank, rank.shape.value_entry(layer), count);
            heads.extend(keys.into_iter().zip(values));
        }
        heads
    }

    fn gather_entry(&self, rank: &RankMemory, entry: usize, count: usize) -> Vec<Vec<f32>> {
        let shape = &rank.shape;
        let mut heads = vec![Vec::with_capacity(count * shape.head_dim); shape.kv_heads];
        let mut bytes = vec![0; shape.page_bytes()];
        for (page, first) in self.pages.iter().zip((0..count).step_by(shape.page_size)) {
            let rows = shape.page_size.min(count - first);
            let used = &mut bytes[..rows * shape.row_bytes()];
            rank.store
                .read(entry, page.0 as u64 * shape.page_bytes() as u64, used);
            for row in used.chunks_exact(shape.row_bytes()) {
                let parts = row.chunks_exact(shape.head_dim * ELEMENT_BYTES);
                for (head, part) in heads.iter_mut().zip(parts) {
                    head.extend(part.chunks_exact(ELEMENT_BYTES).map(|b| {
                        f32::from_le_bytes(b.try_into().expect("invariant: chunks of four"))
                    }));
                }
            }
        }
        heads
    }

    /// The page number and the row in it of a position.
    fn locate(&self, shape: &RankShape, position: usize) -> (usize, usize) {
        let page = self.pages[position / shape.page_size];
        (page.0 as usize, position % shape.page_size)
    }
}

#[cfg(test)]
mod tests {
    use super::heap::heap_ranks;
    use super::*;

    const SHAPE: RankShape = RankShape {
        layers: 3,
        kv_heads: 4,
        head_dim: 2,
        page_size: 4,
        pages: 8,
        aux_slots: 2,
    };

    #[test]
    fn what_is_written_is_gathered_by_head_at_any_tp() {
        let pages = [PageIndex(5), PageIndex(0), PageIndex(7)];
        let count = 10;
        let value = |t: usize, h: usize, d: usize| (t * 100 + h * 10 + d) as f32;
        let data: Vec<f32> = (0..count * 8)
            .map(|i| value(i / 8, i / 2 % 4, i % 2))
            .collect();
        let negative: Vec<f32> = data.iter().map(|x| -x).collect();
        for tp in [1, 2, 4] {
            let ranks = heap_ranks(SHAPE, tp);
            let kv = PagedKv {
                ranks: &ranks,
                pages: &pages,
            };
            // Two pieces, cut inside a page.
            kv.write(1, 0, &data[..7 * 8], &negative[..7 * 8]);
            kv.write(1, 7, &data[7 * 8..], &negative[7 * 8..]);
            let heads = kv.gather(1, count);
            assert_eq!(heads.len(), 4);
            for (h, (keys, values)) in heads.iter().enumerate() {
                let expected: Vec<f32> = (0..count)
                    .flat_map(|t| [value(t, h, 0), value(t, h, 1)])
                    .collect();
                assert_eq!(*keys, expected, "tp {tp} head {h}");
                assert!(values.iter().zip(&expected).all(|(v, e)| *v == -e));
            }
            assert!(
                kv.gather(0, count)
                    .iter()
                    .all(|(k, v)| k.iter().chain(v).all(|x| *x == 0.0))
            );
        }
    }

    #[test]
    fn entries_do_not_overlap_and_the_layout_says_the_same() {
        let spans = SHAPE.spans();
        assert_eq!(spans.len(), 6 + aux::AUX_ENTRIES);
        for pair in spans.windows(2) {
            assert!(pair[0].offset + pair[0].item_len * pair[0].item_count <= pair[1].offset);
            assert_eq!(pair[1].offset % ENTRY_ALIGN, 0);
        }
        let layout = SHAPE.layout(RegionId(3), Shard::ONE, 4);
        let entries: Vec<&Entry> = layout.components.iter().flat_map(|c| &c.entries).collect();
        assert_eq!(layout.components[0].entries.len(), 6);
        assert_eq!(layout.components[1].kind, ComponentKind::Aux);
        for (entry, span) in entries.iter().zip(&spans) {
            assert_eq!((entry.offset, entry.item_len), (span.offset, span.item_len));
        }
        let last = entries.last().expect("aux");
        assert!(last.offset + last.item_len * last.item_count <= SHAPE.region_bytes());
    }
}
