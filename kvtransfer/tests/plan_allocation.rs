//! Filling from a cursor allocates nothing, however many blocks there are (promise of the data path).
#![expect(
    unsafe_code,
    reason = "a counting allocator has to implement GlobalAlloc"
)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::cell::Cell;
use std::num::NonZeroU64;
use std::sync::Arc;

use kvtransfer::layout::{
    Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape,
};
use kvtransfer::plan::cursor::{Segment, SideCursor};
use kvtransfer::plan::descriptor::{Descriptor, Limits, PairCursor};
use kvtransfer::plan::mismatch::End;
use kvtransfer::plan::pairing::{Pairing, pair};
use kvtransfer::plan::ranges::batches;
use kvtransfer::plan::stream::{Stream, check_items};

thread_local! {
    /// Allocations of this thread; other tests of the binary run on other threads.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system allocator unchanged, which upholds the contract; counting touches only a
// thread-local number that needs no allocation of its own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller upholds the contract of alloc, which is the same one.
        unsafe { System.alloc(memory) }
    }

    unsafe fn dealloc(&self, at: *mut u8, memory: Memory) {
        // SAFETY: the block came from the system allocator in `alloc` above.
        unsafe { System.dealloc(at, memory) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

fn layout(tp: u32) -> Layout {
    let item_len = u64::from(8 / tp) * 16 * 64;
    let entry = |place: u32| Entry {
        region: RegionId(place),
        offset: 0,
        item_len,
        item_count: 4096,
        layer_id: None,
    };
    let entries = (0..32).map(entry).collect();
    Layout {
        page_size: 16,
        kv_dtype: "bfloat16".into(),
        kv_layout: "nhd".into(),
        attention: Attention::Heads {
            total_kv_heads: 8,
            rank_kv_heads: 8 / tp,
        },
        tp: Shard { rank: 0, size: tp },
        pp: Shard::ONE,
        layers: 0..16,
        components: vec![Component {
            kind: ComponentKind::Kv,
            entries,
            draft_entries: 0,
            state: StateShape::default(),
        }],
    }
}

/// Walks a chunk of scattered pages in batches on one side, then on both; returns the blocks seen.
fn walk(pairing: &Arc<Pairing>, items: &[i32]) -> u64 {
    check_items(items, 4096).unwrap();
    let stream = Stream::new(&pairing.components[0], items.len()).unwrap();
    let mut seen = 0;
    for batch in batches(
        &stream,
        0..stream.len_bytes(),
        NonZeroU64::new(1 << 20).unwrap(),
    ) {
        for end in [End::Source, End::Target] {
            let mut cursor =
                SideCursor::new(pairing.clone(), 0, end, items.len(), batch.clone()).unwrap();
            let mut out = [Segment::EMPTY; 64];
            while cursor.remaining() > 0 {
                seen += cursor.fill(items, &mut out) as u64;
            }
        }
        let limits = Limits {
            source_chunk: NonZeroU64::new(1 << 21),
            ..Limits::default()
        };
        let mut cursor = PairCursor::new(pairing.clone(), 0, items.len(), batch, &limits).unwrap();
        let mut out = [Descriptor::EMPTY; 64];
        while cursor.remaining() > 0 {
            seen += cursor.fill(items, items, &mut out) as u64;
        }
    }
    seen
}

#[test]
fn walking_a_chunk_allocates_nothing() {
    let items: Vec<i32> = (0..2000).map(|at| 2 * at).collect();
    for target_tp in [1, 2] {
        let pairing = Arc::new(pair(&layout(1), &layout(target_tp)).unwrap());
        let mut seen = 0;
        let count = allocations(|| seen = walk(&pairing, &items));
        assert_eq!(count, 0, "target tp {target_tp}");
        assert!(seen >= 3 * 32 * 2000, "the walk saw {seen} blocks");
    }
    assert!(
        allocations(|| drop(vec![0u8; 16])) > 0,
        "the counter counts"
    );
}
