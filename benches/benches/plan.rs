//! What planning costs per block: the cursors over page lists as a radix cache leaves them.
//!
//! Criterion reports time per run and blocks per second; a block is one page of one buffer, or one token row where heads
//! are cut. Goal: at most 20 ns per block, and 7 ms for 327 360 blocks.

use std::hint::black_box;
use std::num::NonZeroU64;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvtransfer::layout::{
    Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape,
};
use kvtransfer::plan::cursor::{Segment, SideCursor};
use kvtransfer::plan::descriptor::{Descriptor, Limits, PairCursor};
use kvtransfer::plan::mismatch::End;
use kvtransfer::plan::pairing::{Pairing, pair};
use kvtransfer::plan::stream::Stream;

/// One deployment and one chunk of it.
struct Case {
    name: &'static str,
    pairing: Arc<Pairing>,
    source_items: Vec<i32>,
    target_items: Vec<i32>,
    /// Blocks before any merging.
    blocks: u64,
}

const HEADS: u32 = 8;

/// K and V of `layers` layers, pages of `page_size` tokens times 8 heads times 128 bytes, over `tp` ranks.
fn layout(layers: u32, page_size: u32, tp: u32, items: u64) -> Layout {
    let rank_kv_heads = HEADS / tp;
    let item_len = u64::from(page_size) * u64::from(rank_kv_heads) * 128;
    let entry = |place: u32| Entry {
        region: RegionId(place / 2),
        offset: u64::from(place % 2) * items * item_len,
        item_len,
        item_count: items,
        layer_id: None,
    };
    let entries = (0..2 * layers).map(entry).collect();
    Layout {
        page_size,
        kv_dtype: "bfloat16".into(),
        kv_layout: "nhd".into(),
        attention: Attention::Heads {
            total_kv_heads: HEADS,
            rank_kv_heads,
        },
        tp: Shard { rank: 0, size: tp },
        pp: Shard::ONE,
        layers: 0..layers,
        components: vec![Component {
            kind: ComponentKind::Kv,
            entries,
            draft_entries: 0,
            state: StateShape::default(),
        }],
    }
}

fn case(name: &'static str, layers: u32, pages: i32, scattered: bool, target_tp: u32) -> Case {
    let items = 4 * u64::from(pages.unsigned_abs());
    let (source, target) = (
        layout(layers, 16, 1, items),
        layout(layers, 16, target_tp, items),
    );
    let pairing = pair(&source, &target).expect("the layouts fit");
    let rows = if target_tp == 1 { 1 } else { 16 };
    let blocks = 2 * u64::from(layers) * u64::from(pages.unsigned_abs()) * rows;
    // No two neighbours of a scattered list touch, on either side; the strides make it a permutation.
    let spread = |step: i32| (0..pages).map(|at| 2 * ((at * step) % pages) + 1).collect();
    let (source_items, target_items) = if scattered {
        (spread(7), spread(13))
    } else {
        ((0..pages).collect(), (5..pages + 5).collect())
    };
    Case {
        name,
        pairing: Arc::new(pairing),
        source_items,
        target_items,
        blocks,
    }
}

fn side(case: &Case, end: End, out: &mut [Segment]) -> u64 {
    let items = match end {
        End::Source => &case.source_items,
        End::Target => &case.target_items,
    };
    let stream = Stream::new(&case.pairing.components[0], items.len()).expect("few items");
    let range = 0..stream.len_bytes();
    let mut cursor = SideCursor::new(case.pairing.clone(), 0, end, items.len(), range)
        .expect("the range is the stream");
    let mut segments = 0;
    while cursor.remaining() > 0 {
        segments += cursor.fill(items, out) as u64;
        black_box(&mut *out);
    }
    segments
}

fn paired(case: &Case, limits: &Limits, out: &mut [Descriptor]) -> u64 {
    let (from, to) = (&case.source_items, &case.target_items);
    let stream = Stream::new(&case.pairing.components[0], from.len()).expect("few items");
    let range = 0..stream.len_bytes();
    let mut cursor = PairCursor::new(case.pairing.clone(), 0, from.len(), range, limits)
        .expect("the range is the stream");
    let mut descriptors = 0;
    while cursor.remaining() > 0 {
        descriptors += cursor.fill(from, to, out) as u64;
        black_box(&mut *out);
    }
    descriptors
}

fn plan(criterion: &mut Criterion) {
    let cases = [
        case("contiguous 64 layers, 512 pages", 64, 512, false, 1),
        case("scattered 64 layers, 512 pages of 16 KiB", 64, 512, true, 1),
        case(
            "scattered 62 layers, 2640 pages (327 360 blocks)",
            62,
            2640,
            true,
            1,
        ),
        case("half the heads, 64 layers, 512 pages", 64, 512, true, 2),
    ];
    let chunk = NonZeroU64::new(1 << 31);
    let limits = Limits {
        len_max: NonZeroU64::new(1 << 30),
        source_chunk: chunk,
        target_chunk: chunk,
    };
    for case in &cases {
        let mut group = criterion.benchmark_group(case.name);
        group.throughput(Throughput::Elements(case.blocks));
        let mut segments = [Segment::EMPTY; 512];
        group.bench_function("source side", |b| {
            b.iter(|| side(case, End::Source, &mut segments))
        });
        group.bench_function("target side", |b| {
            b.iter(|| side(case, End::Target, &mut segments))
        });
        let mut descriptors = [Descriptor::EMPTY; 512];
        group.bench_function("both sides", |b| {
            b.iter(|| paired(case, &limits, &mut descriptors));
        });
        group.finish();
    }
    let (source, target) = (layout(64, 16, 1, 4096), layout(64, 16, 2, 4096));
    criterion.bench_function("pair two layouts of 128 buffers", |b| {
        b.iter(|| pair(black_box(&source), black_box(&target)));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = plan
}
criterion_main!(benches);
