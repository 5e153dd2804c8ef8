//! Memory of a device: which path it takes and why, that staging memory is bounded, that failures are told, that nothing of a
//! peer stays in use, and that no byte moves after an end.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, thread, time::Duration};

use kvtransfer::{
    clock,
    config::{EngineConfig, SameHost},
    engine::{Block, Engine, Memory, Transfer},
    ids::{PeerId, Room},
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
    testing::{conformance::SOON, fake_device::FakeDevice},
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

/// As much as the driver copies by itself, if it lies together.
const LEN: usize = 4 << 20;

fn config(path: SameHost) -> EngineConfig {
    let mut config = EngineConfig::default();
    config.listen = Some(([127, 0, 0, 1], 0).into());
    config.same_host = path;
    config.writable_by_address = true;
    config.ring_bytes = 512 << 10;
    config.device_ring_bytes = 256 << 10;
    config.staged_batch_bytes = 64 << 10;
    config.staging_bytes = 128 << 10;
    config
}

fn engine(config: EngineConfig, region: Region) -> Engine {
    let mut memory = Memory::new();
    memory.add(region);
    Engine::start(config, memory, Layout::raw()).unwrap()
}

struct Pair {
    devices: [FakeDevice; 2],
    writer: Engine,
    written: Engine,
    peer: PeerId,
}

fn connect(writer: &Engine, written: &Engine) -> (PeerId, &'static str, String) {
    let info = writer.connect(written.local_addr().unwrap(), SOON).unwrap();
    (info.peer, info.path, info.path_reason)
}

fn pair(path: SameHost) -> Pair {
    let devices = [FakeDevice::new(), FakeDevice::new()];
    let [writer, written] = [0, 1].map(|rank| engine(config(path), devices[rank].region(LEN)));
    let (peer, ..) = connect(&writer, &written);
    Pair {
        devices,
        writer,
        written,
        peer,
    }
}

fn base(engine: &Engine) -> u64 {
    engine.region(RegionId(0)).unwrap().base_address()
}

fn pattern(salt: usize) -> Vec<u8> {
    (0..LEN)
        .map(|at| (at * 7 + at / 251 + salt).to_le_bytes()[0])
        .collect()
}

fn image(engine: &Engine) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    engine
        .region(RegionId(0))
        .unwrap()
        .read_at(0, &mut bytes)
        .unwrap();
    bytes
}

/// Every second piece of `len` bytes, in turn from the front to the back half.
fn scattered(writer: &Engine, written: &Engine, len: u64) -> Vec<Block> {
    let count = LEN as u64 / len;
    let piece = |index: u64| Block {
        source_address: base(writer) + index * len,
        target_address: base(written) + (count - 1 - index) * len,
        len,
    };
    (0..count).step_by(2).map(piece).collect()
}

fn expected(source: &[u8], before: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = before.to_vec();
    let count = LEN / len;
    for index in (0..count).step_by(2) {
        let (from, to) = (index * len, (count - 1 - index) * len);
        bytes[to..to + len].copy_from_slice(&source[from..from + len]);
    }
    bytes
}

fn fill(engine: &Engine, bytes: &[u8]) {
    engine
        .region(RegionId(0))
        .unwrap()
        .write_at(0, bytes)
        .unwrap();
}

#[test]
fn scattered_pieces_arrive_over_every_path_and_nothing_else_changes() {
    for path in [SameHost::Off, SameHost::RingOnly, SameHost::PullOnly] {
        let pair = pair(path);
        for len in [24, 1000, 16 << 10, 300 << 10] {
            let (source, before) = (pattern(1), pattern(100));
            fill(&pair.writer, &source);
            fill(&pair.written, &before);
            let blocks = scattered(&pair.writer, &pair.written, len as u64);
            pair.writer.write(pair.peer, &blocks, SOON).unwrap();
            let wanted = expected(&source, &before, len);
            assert!(image(&pair.written) == wanted, "{path:?}, pieces of {len}");
        }
    }
}

#[test]
fn each_path_copies_as_it_says() {
    let moved = LEN as u64 / 2;
    let counts = |path| {
        let pair = pair(path);
        let before = [0, 1].map(|rank| pair.devices[rank].counts());
        let blocks = scattered(&pair.writer, &pair.written, 4096);
        pair.writer.write(pair.peer, &blocks, SOON).unwrap();
        let after = [0, 1].map(|rank| pair.devices[rank].counts());
        (
            after[0].gathered - before[0].gathered,
            after[1].scattered - before[1].scattered,
            after[1].pulled - before[1].pulled,
        )
    };
    assert_eq!(counts(SameHost::Off), (moved, moved, 0));
    assert_eq!(counts(SameHost::RingOnly), (moved, moved, 0));
    assert_eq!(counts(SameHost::PullOnly), (0, 0, moved));
}

#[test]
fn memory_that_cannot_be_shared_goes_through_the_ring_and_the_reason_is_shown() {
    let devices = [FakeDevice::new(), FakeDevice::new()];
    devices[0].share_nothing();
    let [writer, written] =
        [0, 1].map(|rank| engine(config(SameHost::Auto), devices[rank].region(LEN)));
    let (_, path, _) = connect(&writer, &written);
    assert_eq!(path, "shm-ring");
    let seen = written.peers();
    assert_eq!(seen[0].path, "device-pull", "its own memory can be shared");

    let devices = [FakeDevice::new(), FakeDevice::new()];
    devices.iter().for_each(FakeDevice::attach_nothing);
    let [writer, written] =
        [0, 1].map(|rank| engine(config(SameHost::Auto), devices[rank].region(LEN)));
    let (_, path, reason) = connect(&writer, &written);
    assert_eq!(path, "shm-ring");
    assert!(reason.contains("peer access is not supported"), "{reason}");
}

#[test]
fn host_memory_and_device_memory_meet_in_the_ring() {
    let device = FakeDevice::new();
    let writer = engine(config(SameHost::Auto), Region::heap(LEN).unwrap());
    let written = engine(config(SameHost::Auto), device.region(LEN));
    let (peer, path, reason) = connect(&writer, &written);
    assert_eq!(path, "shm-ring");
    assert!(reason.contains("on a device"), "{reason}");
    let (source, before) = (pattern(3), pattern(9));
    fill(&writer, &source);
    fill(&written, &before);
    writer
        .write(peer, &scattered(&writer, &written, 4096), SOON)
        .unwrap();
    assert!(image(&written) == expected(&source, &before, 4096));
}

#[test]
fn an_engine_has_one_device() {
    let mut memory = Memory::new();
    memory.add(FakeDevice::new().region(LEN));
    memory.add(FakeDevice::named("fake:1").region(LEN));
    let refused = Engine::start(config(SameHost::Auto), memory, Layout::raw());
    let Err(error) = refused else {
        panic!("two devices in one engine");
    };
    assert!(
        error.to_string().contains("fake:0 and on fake:1"),
        "{error}"
    );
}

#[test]
fn short_rows_are_described_to_the_device_and_long_ones_listed() {
    let grids = |len: u64| {
        let pair = pair(SameHost::PullOnly);
        let blocks = scattered(&pair.writer, &pair.written, len);
        pair.writer.write(pair.peer, &blocks, SOON).unwrap();
        pair.devices[1].counts().grids
    };
    assert!(grids(16 << 10) > 0);
    assert_eq!(grids(LEN as u64), 0, "one block of 4 MiB");
}

/// Pages of 4 KiB in one buffer.
const PAGE: usize = 4096;

fn paged() -> Layout {
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
                item_len: PAGE as u64,
                item_count: (LEN / PAGE) as u64,
                layer_id: None,
            }],
            draft_entries: 0,
            state: StateShape::default(),
        }],
    }
}

/// Two engines with pages, and a granted room from the first to the second: page n goes to page n + 100.
struct Rooms {
    devices: [FakeDevice; 2],
    engines: [Engine; 2],
    sending: Transfer,
    receiving: Transfer,
}

fn rooms(path: SameHost, pages: i32) -> Rooms {
    let targets: Vec<i32> = (100..100 + pages).collect();
    rooms_of(config(path), &targets)
}

fn rooms_of(settings: EngineConfig, targets: &[i32]) -> Rooms {
    let devices = [FakeDevice::new(), FakeDevice::new()];
    let engines = [0, 1].map(|rank| {
        let mut memory = Memory::new();
        memory.add(devices[rank].region(LEN));
        Engine::start(settings.clone(), memory, paged()).unwrap()
    });
    let (peer, ..) = connect(&engines[1], &engines[0]);
    let room = Room::new(7).unwrap();
    let receiving = engines[1]
        .receive(&ReceiveRequest {
            room,
            sources: vec![Source { peer, dummy: false }],
            receivers_expected: 1,
            prefix_tokens: 0,
            items: vec![targets.into()],
            timeout: SOON,
        })
        .unwrap();
    let sending = engines[0]
        .send(&SendRequest {
            room,
            timeout: SOON,
        })
        .unwrap();
    sending.wait_ready(SOON).unwrap();
    Rooms {
        devices,
        engines,
        sending,
        receiving,
    }
}

fn chunk(items: std::ops::Range<i32>, last: bool) -> Chunk {
    Chunk {
        items: vec![items.collect()],
        last,
    }
}

#[test]
fn pages_that_follow_each_other_are_left_to_the_driver() {
    let grids = |list: Vec<i32>| {
        let mut settings = config(SameHost::PullOnly);
        settings.device_pull_batch_bytes = LEN as u64;
        let rooms = rooms_of(settings, &list);
        fill(&rooms.engines[0], &pattern(4));
        let items = vec![list.as_slice().into()];
        rooms.sending.push(&Chunk { items, last: true }).unwrap();
        rooms.sending.wait(SOON).unwrap().unwrap();
        rooms.receiving.wait(SOON).unwrap().unwrap();
        assert!(image(&rooms.engines[1]) == pattern(4));
        rooms.devices[1].counts().grids
    };
    let pages = i32::try_from(LEN / PAGE).unwrap();
    assert_eq!(grids((0..pages).collect()), 0, "4 MiB that lie together");
    assert!(grids((0..pages).rev().collect()) > 0);
}

#[test]
fn no_byte_is_read_before_its_events_have_happened_and_nobody_waits_for_them() {
    for path in [SameHost::Off, SameHost::RingOnly, SameHost::PullOnly] {
        let rooms = rooms(path, 30);
        let [device, _] = &rooms.devices;
        fill(&rooms.engines[0], &pattern(1));
        for event in [5, 6] {
            device.record_event(event);
        }
        rooms
            .sending
            .push_after(&chunk(0..10, false), &[5, 6])
            .unwrap();
        // Behind it, though it waits for nothing itself.
        rooms.sending.push(&chunk(10..20, false)).unwrap();
        // The application may use its event for something else at once.
        device.complete_event(5);
        device.record_event(5);
        let read = |rooms: &Rooms| {
            let counts = [0, 1].map(|rank| rooms.devices[rank].counts());
            counts[0].gathered + counts[1].pulled
        };
        let before = read(&rooms);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(read(&rooms), before, "{path:?}: event 6 has not happened");
        // What the pages hold by then is what arrives.
        let late = pattern(77);
        fill(&rooms.engines[0], &late);
        device.complete_event(6);
        rooms
            .sending
            .push_after(&chunk(20..30, true), &[6])
            .unwrap();
        rooms.sending.wait(SOON).unwrap().unwrap();
        rooms.receiving.wait(SOON).unwrap().unwrap();
        let arrived = &image(&rooms.engines[1])[100 * PAGE..130 * PAGE];
        assert!(arrived == &late[..30 * PAGE], "{path:?}");
    }
}

#[test]
fn an_event_that_never_happens_ends_by_the_deadline_and_one_that_fails_at_once() {
    let rooms = rooms(SameHost::Off, 10);
    let [device, _] = &rooms.devices;
    device.record_event(1);
    let refused = rooms.sending.push_after(&chunk(0..10, true), &[2]);
    assert!(refused.unwrap_err().to_string().contains("no such event"));
    rooms.sending.push_after(&chunk(0..10, true), &[1]).unwrap();
    assert!(rooms.sending.wait(Duration::from_millis(20)).is_none());
    device.break_copies();
    let error = rooms.sending.wait(SOON).unwrap().unwrap_err();
    assert!(
        error.to_string().contains("the device is broken"),
        "{error}"
    );
    let told = rooms.receiving.wait(SOON).unwrap().unwrap_err();
    assert!(told.to_string().contains("the device is broken"), "{told}");
}

#[test]
fn a_broken_device_is_named_to_both_sides() {
    for path in [SameHost::Off, SameHost::RingOnly, SameHost::PullOnly] {
        for broken in [0, 1] {
            let pair = pair(path);
            // The puller is the one that copies.
            let broken = if path == SameHost::PullOnly {
                1
            } else {
                broken
            };
            pair.devices[broken].break_copies();
            let blocks = scattered(&pair.writer, &pair.written, 4096);
            let patience = Duration::from_millis(500);
            let error = pair.writer.write(pair.peer, &blocks, patience).unwrap_err();
            let words = error.to_string();
            assert!(
                words.contains("the device is broken"),
                "{path:?}, {broken}: {words}"
            );
        }
    }
}

#[test]
fn more_lanes_than_staging_memory_take_turns() {
    let mut settings = config(SameHost::Off);
    settings.lanes = 8;
    let devices = [FakeDevice::new(), FakeDevice::new()];
    let [writer, written] = [0, 1].map(|rank| engine(settings.clone(), devices[rank].region(LEN)));
    let (peer, ..) = connect(&writer, &written);
    let back = written.peers()[0].peer;
    let (writer, written) = (Arc::new(writer), Arc::new(written));
    // Both ways at once: whoever waits for staging memory must not keep the other from receiving.
    let threads = (0..4).flat_map(|_| {
        [(&writer, &written, peer), (&written, &writer, back)].map(|(from, to, peer)| {
            let (from, to) = (Arc::clone(from), Arc::clone(to));
            thread::spawn(move || {
                for _ in 0..20 {
                    let blocks = scattered(&from, &to, 8 << 10);
                    from.write(peer, &blocks, SOON).unwrap();
                }
            })
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().unwrap();
    }
}

#[test]
fn a_thousand_peers_leave_nothing_in_use() {
    let device = FakeDevice::new();
    let written = engine(config(SameHost::PullOnly), device.region(LEN));
    for life in 0..1000 {
        let other = FakeDevice::new();
        let writer = engine(config(SameHost::PullOnly), other.region(LEN));
        let (peer, path, _) = connect(&writer, &written);
        assert_eq!(path, "device-pull");
        if life % 100 == 0 {
            let blocks = scattered(&writer, &written, 64 << 10);
            writer.write(peer, &blocks, SOON).unwrap();
        }
    }
    wait_until(|| device.counts().attached == 0);
}

#[test]
fn released_memory_is_given_up_by_peers_and_shared_anew() {
    let pair = pair(SameHost::PullOnly);
    assert_eq!(pair.devices[1].counts().attached, 1);
    pair.writer.release_memory(&[RegionId(0)], SOON).unwrap();
    wait_until(|| pair.devices[1].counts().attached == 0);
    assert_eq!(pair.devices[0].counts().unshared, 1);
    pair.writer.restore_memory(&[RegionId(0)]).unwrap();
    let (peer, path, _) = connect(&pair.writer, &pair.written);
    assert_eq!(path, "device-pull");
    let (source, before) = (pattern(5), pattern(6));
    fill(&pair.writer, &source);
    fill(&pair.written, &before);
    let blocks = scattered(&pair.writer, &pair.written, 4096);
    pair.writer.write(peer, &blocks, SOON).unwrap();
    assert!(image(&pair.written) == expected(&source, &before, 4096));
}

fn wait_until(what: impl Fn() -> bool) {
    let start = clock::now();
    while !what() {
        assert!(clock::now().since(start) < SOON, "it does not happen");
        thread::sleep(Duration::from_millis(1));
    }
}
