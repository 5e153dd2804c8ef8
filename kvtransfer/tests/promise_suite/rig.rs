//! Engines with small memories whose every byte is known, as both suites need them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use kvtransfer::{
    config::EngineConfig,
    engine::{Engine, Memory},
    ids::{PeerId, Room},
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
    transfer::{ReceiveRequest, Source},
};

/// Bytes of one page of one buffer. With two buffers (K and V) a page index moves 16 KiB.
pub(crate) const PAGE: u64 = 8 << 10;
/// Pages of each buffer.
pub(crate) const PAGES: u64 = 1280;
/// Buffers.
pub(crate) const BUFFERS: u64 = 2;
/// Bytes of an aux row: the room's number lies in the last eight.
pub(crate) const AUX: u64 = 64;
/// Aux rows.
pub(crate) const ROWS: u64 = 16;
/// Far above anything expected: a hang becomes a failure.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(30);

pub(crate) fn layout() -> Layout {
    let entry = |region, offset, item_len, item_count| Entry {
        region: RegionId(region),
        offset,
        item_len,
        item_count,
        layer_id: None,
    };
    let kv = (0..BUFFERS).map(|i| entry(0, i * PAGE * PAGES, PAGE, PAGES));
    Layout {
        page_size: 16,
        kv_dtype: "bfloat16".into(),
        kv_layout: "nhd".into(),
        attention: Attention::Heads {
            total_kv_heads: 4,
            rank_kv_heads: 4,
        },
        tp: Shard::ONE,
        pp: Shard::ONE,
        layers: 0..1,
        components: vec![
            Component {
                kind: ComponentKind::Kv,
                entries: kv.collect(),
                draft_entries: 0,
                state: StateShape::default(),
            },
            Component {
                kind: ComponentKind::Aux,
                entries: vec![entry(1, 0, AUX, ROWS)],
                draft_entries: 0,
                state: StateShape::default(),
            },
        ],
    }
}

pub(crate) fn memory() -> Memory {
    let mut memory = Memory::new();
    let kv = usize::try_from(BUFFERS * PAGE * PAGES).expect("it fits");
    memory.add(Region::mmap(kv).expect("memory"));
    memory.add(Region::heap(usize::try_from(ROWS * AUX).expect("it fits")).expect("memory"));
    memory
}

pub(crate) fn start(config: EngineConfig) -> Engine {
    Engine::start(config, memory(), layout()).expect("an engine")
}

/// A configuration that listens on a free loopback port.
pub(crate) fn listening(mut config: EngineConfig) -> EngineConfig {
    config.listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    config
}

pub(crate) fn room(number: u64) -> Room {
    Room::new(number).expect("not zero")
}

/// A receive of KV pages and, if `row` is given, an aux row.
pub(crate) fn receive(
    number: u64,
    peer: PeerId,
    pages: &[i32],
    row: Option<i32>,
    timeout: Duration,
) -> ReceiveRequest {
    ReceiveRequest {
        room: room(number),
        sources: vec![Source { peer, dummy: false }],
        receivers_expected: 1,
        prefix_tokens: 0,
        items: vec![Arc::from(pages), row.into_iter().collect()],
        timeout,
    }
}

/// The bytes that page `page` of buffer `buffer` must hold when its source was filled with `seed`.
pub(crate) fn page_bytes(seed: u64, buffer: u64, page: u64) -> Vec<u8> {
    let start = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (buffer << 32) ^ page;
    let words = (0..PAGE / 8).map(|i| start.wrapping_add(i.wrapping_mul(0x85EB_CA6B_27D4_EB4F)));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Fills pages of every buffer.
pub(crate) fn fill(engine: &Engine, seed: u64, pages: &[i32]) {
    let kv = engine.region(RegionId(0)).expect("the KV region");
    for (buffer, page) in cells(pages) {
        kv.write_at(
            (buffer * PAGES + page) * PAGE,
            &page_bytes(seed, buffer, page),
        )
        .expect("in bounds");
    }
}

/// How many pages of `pages` do not hold what the source pages `from` were filled with.
pub(crate) fn wrong(engine: &Engine, seed: u64, from: &[i32], pages: &[i32]) -> usize {
    let kv = engine.region(RegionId(0)).expect("the KV region");
    let mut got = vec![0; usize::try_from(PAGE).expect("it fits")];
    let pairs = cells(from).zip(cells(pages));
    pairs
        .filter(|((buffer, source), (_, target))| {
            kv.read_at((buffer * PAGES + target) * PAGE, &mut got)
                .expect("in bounds");
            got != page_bytes(seed, *buffer, *source)
        })
        .count()
}

fn cells(pages: &[i32]) -> impl Iterator<Item = (u64, u64)> {
    let page = |page: &i32| u64::try_from(*page).expect("a page");
    (0..BUFFERS).flat_map(move |buffer| pages.iter().map(move |p| (buffer, page(p))))
}
