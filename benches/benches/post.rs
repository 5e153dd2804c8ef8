//! What handing WRITEs to a device costs on our side, on a device that does nothing: chains of 64, one doorbell and one
//! completion each.
//!
//! Criterion reports time per run and work requests per second. Goal: at most 60 ns per work request.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvtransfer::layout::{
    Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape,
};
use kvtransfer::plan::pairing::pair;
use kvtransfer::testing::PostDriver;

const PAGE: u64 = 4096;
/// As many as a chain has.
const CHAIN: i32 = 64;
/// Pages of the plan: 64 chains.
const PAGES: i32 = 64 * CHAIN;

fn layout() -> Layout {
    Layout {
        page_size: 16,
        kv_dtype: "bfloat16".into(),
        kv_layout: "nhd".into(),
        attention: Attention::Latent,
        tp: Shard::ONE,
        pp: Shard::ONE,
        layers: 0..1,
        components: vec![Component {
            kind: ComponentKind::Kv,
            entries: vec![Entry {
                region: RegionId(0),
                offset: 0,
                item_len: PAGE,
                item_count: 2 * u64::from(PAGES.unsigned_abs()),
                layer_id: None,
            }],
            draft_entries: 0,
            state: StateShape::default(),
        }],
    }
}

fn post(criterion: &mut Criterion) {
    let layout = layout();
    let pairing = Arc::new(pair(&layout, &layout).expect("equal layouts"));
    let pages = PAGES.unsigned_abs() as usize;
    let mut driver = PostDriver::new(2 * pages * 4096).expect("a device that does nothing");
    // No two neighbours touch, on either side; the strides make it a permutation.
    let spread =
        |step: i32| -> Vec<i32> { (0..PAGES).map(|at| 2 * ((at * step) % PAGES) + 1).collect() };
    let (from, to) = (spread(7), spread(13));
    let chain = CHAIN.unsigned_abs() as usize;
    let mut group = criterion.benchmark_group("work requests of 4 KiB in chains of 64");
    group.throughput(Throughput::Elements(PAGES.unsigned_abs().into()));
    group.bench_function("planned, gathered, built, posted, completed", |b| {
        b.iter(|| {
            driver
                .write(black_box(&pairing), &from, &to)
                .expect("posted")
        });
    });
    // Leaves a chain of 63, because a full one is posted and cleared at once.
    let last = chain - 1;
    driver
        .write(&pairing, &from[..last], &to[..last])
        .expect("posted");
    group.throughput(Throughput::Elements(last as u64));
    group.bench_function("a built chain posted and completed", |b| {
        b.iter(|| driver.post().expect("posted"));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = post
}
criterion_main!(benches);
