//! Transfers of unusual shape: messages longer than the device takes, scattered pages, and many tiny rooms at once.

use kvtransfer::{
    engine::Memory,
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
};

use super::{
    child::Path,
    pair::{Pair, Room, config, pages},
    rig::{self, WATCHDOG},
};

/// Longer than two of Soft-RoCE's longest messages (8 MiB).
const LONG: u64 = 20 << 20;

fn long_layout() -> Layout {
    let entry = |offset| Entry {
        region: RegionId(0),
        offset,
        item_len: LONG,
        item_count: 2,
        layer_id: None,
    };
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
                entries: [0, 2 * LONG].map(entry).into(),
                draft_entries: 0,
                state: StateShape::default(),
            },
            Component {
                kind: ComponentKind::Aux,
                entries: vec![Entry {
                    region: RegionId(1),
                    offset: 0,
                    item_len: rig::AUX,
                    item_count: rig::ROWS,
                    layer_id: None,
                }],
                draft_entries: 0,
                state: StateShape::default(),
            },
        ],
    }
}

fn long_memory() -> Memory {
    let mut memory = Memory::new();
    memory.add(Region::mmap(usize::try_from(4 * LONG).expect("it fits")).expect("memory"));
    let rows = usize::try_from(rig::ROWS * rig::AUX).expect("it fits");
    memory.add(Region::heap(rows).expect("memory"));
    memory
}

/// A byte for every place, so that pieces in the wrong order or place show.
fn pattern(block: u64, bytes: &mut [u8]) {
    for (index, word) in (0..).zip(bytes.chunks_exact_mut(8)) {
        let value: u64 = (block << 20 | index).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// A page of 20 MiB of K and one of V, in one batch.
fn long_message(path: Path, devices: [&str; 2]) {
    const BLOCK: usize = 1 << 20;
    let mut config = config(path, 1);
    config.rdma.batch_bytes = 64 << 20;
    // A batch that may be packed has to fit half of the landing memory.
    config.rdma.landing_bytes = 0;
    let pair = Pair::of(&config, devices, long_memory, &long_layout());
    let (source, target) = (
        pair.first.region(RegionId(0)).expect("a region"),
        pair.second.region(RegionId(0)).expect("a region"),
    );
    let mut bytes = vec![0; BLOCK];
    let blocks = LONG / BLOCK as u64;
    // Where the first page of K and of V is; the second lies behind it.
    let places = (0..blocks)
        .flat_map(|block| [0, 2].map(|at| (block, (at * blocks + block) * BLOCK as u64)));
    for (block, at) in places.clone() {
        pattern(block ^ at, &mut bytes);
        source.write_at(at, &bytes).expect("in bounds");
    }
    let took = pair.deliver(1, &[0], &[1]);
    println!("40 MiB in one batch over {}: {took:?}", path.name());
    let mut got = vec![0; BLOCK];
    for (block, at) in places {
        pattern(block ^ at, &mut bytes);
        target.read_at(LONG + at, &mut got).expect("in bounds");
        assert!(got == bytes, "block {block} of the page from {at}");
        target.read_at(at, &mut got).expect("in bounds");
        assert!(got.iter().all(|byte| *byte == 0), "before it, at {at}");
    }
    let batches: u64 = pair
        .first
        .snapshot()
        .rails
        .iter()
        .map(|rail| rail.batches_total)
        .sum();
    assert_eq!(batches, 1);
}

/// Scattered sources, contiguous targets, and the reverse: the first is gathered into long WRITEs, the second cannot be.
fn scattered(path: Path, devices: [&str; 2]) {
    const COUNT: i32 = 600;
    let pair = Pair::new(&config(path, 2), devices);
    rig::fill(&pair.first, 8, &pages(0..1280));
    // 601 is prime to the stride, so every page is used once and no two neighbours stay neighbours.
    let spread: Vec<i32> = (0..COUNT).map(|page| page * 257 % 601).collect();
    let together = pages(640..640 + COUNT);
    pair.deliver(1, &spread, &together);
    assert_eq!(rig::wrong(&pair.second, 8, &spread, &together), 0);
    pair.deliver(2, &together, &spread);
    assert_eq!(rig::wrong(&pair.second, 8, &together, &spread), 0);
    // Runs of three: WRITEs end in the middle of what the device could gather.
    let runs: Vec<i32> = (0..COUNT).map(|page| page / 3 * 4 + page % 3).collect();
    pair.deliver(3, &spread, &runs);
    assert_eq!(rig::wrong(&pair.second, 8, &spread, &runs), 0);
}

/// Many more rooms than a queue pair has receives, in both directions at once, through one queue pair.
fn tiny_rooms(path: Path, devices: [&str; 2], immediate: bool) {
    const ROOMS: i32 = 400;
    let mut config = config(path, 1);
    config.rdma.window = 256;
    config.rdma.immediate = immediate;
    let pair = Pair::new(&config, devices);
    rig::fill(&pair.first, 1, &pages(0..ROOMS));
    rig::fill(&pair.second, 2, &pages(ROOMS..2 * ROOMS));
    let rooms: Vec<Room> = std::thread::scope(|scope| {
        let (first, second) = (&pair.first, &pair.second);
        let there = scope.spawn(|| {
            let open = |page: i32| {
                let number = 1 + u64::try_from(page).expect("a page");
                pair.open(number, &[page], &[page], WATCHDOG)
            };
            (0..ROOMS).map(open).collect::<Vec<_>>()
        });
        let back = scope.spawn(|| {
            let open = |page: i32| {
                let number = 1_000_000 + u64::try_from(page).expect("a page");
                let pages: [&[i32]; 2] = [&[page], &[page]];
                Room::open([second, first], pair.to_second, number, pages, WATCHDOG)
            };
            (ROOMS..2 * ROOMS).map(open).collect::<Vec<_>>()
        });
        let both = [there, back].map(|side| side.join().expect("no panic"));
        both.into_iter().flatten().collect()
    });
    for room in &rooms {
        assert_eq!(room.results(), [Ok(()), Ok(())]);
    }
    let there = pages(0..ROOMS);
    assert_eq!(rig::wrong(&pair.second, 1, &there, &there), 0);
    let back = pages(ROOMS..2 * ROOMS);
    assert_eq!(rig::wrong(&pair.first, 2, &back, &back), 0);
    assert_lanes_lived(&pair);
}

/// Hundreds of windows of one page each in one room: more batches than the peer has receives are ready at once.
fn many_batches(path: Path, devices: [&str; 2]) {
    let mut config = config(path, 1);
    config.rdma.window = 256;
    config.rdma.batch_bytes = 4096;
    let pair = Pair::new(&config, devices);
    let all = pages(0..300);
    rig::fill(&pair.first, 1, &all);
    rig::fill(&pair.second, 2, &pages(300..600));
    let there = pair.open(1, &all, &all, WATCHDOG);
    let back_pages = pages(300..600);
    let both: [&[i32]; 2] = [&back_pages, &back_pages];
    let back = Room::open(
        [&pair.second, &pair.first],
        pair.to_second,
        2,
        both,
        WATCHDOG,
    );
    assert_eq!(there.results(), [Ok(()), Ok(())]);
    assert_eq!(back.results(), [Ok(()), Ok(())]);
    assert_eq!(rig::wrong(&pair.second, 1, &all, &all), 0);
    assert_eq!(rig::wrong(&pair.first, 2, &back_pages, &back_pages), 0);
    assert_lanes_lived(&pair);
}

/// Rooms also succeed over a queue pair that was made anew: that would hide a receive queue that ran empty.
fn assert_lanes_lived(pair: &Pair) {
    for engine in [&pair.first, &pair.second] {
        let rails = engine.snapshot().rails;
        assert!(
            rails.iter().all(|rail| rail.failures.is_empty()),
            "{rails:?}"
        );
    }
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_message_longer_than_the_device_takes_is_split_over_siw() {
    long_message(Path::Siw, ["siw0", "siw1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_message_longer_than_the_device_takes_is_split_over_rxe_compat() {
    long_message(Path::RxeCompat, ["rxe0", "rxe1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn scattered_pages_arrive_in_order_over_siw() {
    scattered(Path::Siw, ["siw0", "siw1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn scattered_pages_arrive_in_order_over_rxe_compat() {
    scattered(Path::RxeCompat, ["rxe0", "rxe1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn tiny_rooms_both_ways_never_run_out_of_credits_over_siw() {
    tiny_rooms(Path::Siw, ["siw0", "siw1"], false);
    many_batches(Path::Siw, ["siw0", "siw1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn tiny_rooms_both_ways_never_run_out_of_credits_over_rxe_compat() {
    tiny_rooms(Path::RxeCompat, ["rxe0", "rxe1"], true);
    many_batches(Path::RxeCompat, ["rxe0", "rxe1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn tiny_rooms_both_ways_never_run_out_of_credits_over_rxe_standard() {
    tiny_rooms(Path::RxeStandard, ["rxe0", "rxe1"], false);
    many_batches(Path::RxeStandard, ["rxe0", "rxe1"]);
}
