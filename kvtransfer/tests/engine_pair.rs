//! Two engines in one process: a room moves over every path of this host.

use std::{sync::Arc, time::Duration};

use kvtransfer::{
    config::{EngineConfig, SameHost},
    engine::{Engine, Memory},
    ids::{PeerId, Room},
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard},
    memory::Region,
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

const PAGE: u64 = 16 << 10;
const PAGES: u64 = 256;
const LAYERS: u64 = 4;
const AUX: u64 = 64;

fn layout() -> Layout {
    let kv = (0..2 * LAYERS).map(|i| Entry {
        region: RegionId(0),
        offset: i * PAGE * PAGES,
        item_len: PAGE,
        item_count: PAGES,
        layer_id: None,
    });
    let aux = Entry {
        region: RegionId(1),
        offset: 0,
        item_len: AUX,
        item_count: 16,
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
        layers: 0..4,
        components: vec![
            Component {
                kind: ComponentKind::Kv,
                entries: kv.collect(),
                draft_entries: 0,
            },
            Component {
                kind: ComponentKind::Aux,
                entries: vec![aux],
                draft_entries: 0,
            },
        ],
    }
}

fn engine(config: EngineConfig) -> Engine {
    let mut memory = Memory::new();
    let kv = usize::try_from(2 * LAYERS * PAGE * PAGES).unwrap();
    memory.add(Region::mmap(kv).unwrap());
    memory.add(Region::heap(16 * AUX as usize).unwrap());
    Engine::start(config, memory, layout()).unwrap()
}

fn pair(same_host: SameHost) -> (Engine, Engine, PeerId, &'static str) {
    let mut config = EngineConfig::default();
    config.same_host = same_host;
    let mut listening = config.clone();
    listening.listen = Some("127.0.0.1:0".parse().unwrap());
    let prefill = engine(listening);
    let decode = engine(config);
    let info = decode
        .connect(prefill.local_addr().unwrap(), Duration::from_secs(5))
        .unwrap();
    (prefill, decode, info.peer, info.path)
}

fn page_bytes(seed: u64) -> Vec<u8> {
    (0..PAGE)
        .map(|i| (seed.wrapping_mul(31).wrapping_add(i * 7) % 251) as u8)
        .collect()
}

fn run(same_host: SameHost, expected_path: &str) {
    let (prefill, decode, peer, path) = pair(same_host);
    assert_eq!(path, expected_path);
    let source: Vec<i32> = (0..100).map(|i| (i * 37 + 5) % 256).collect();
    let target: Vec<i32> = (0..100).map(|i| (i * 53 + 11) % 256).collect();
    let kv = prefill.region(RegionId(0)).unwrap();
    for entry in 0..2 * LAYERS {
        for page in &source {
            let page = *page as u64;
            kv.write_at(
                (entry * PAGES + page) * PAGE,
                &page_bytes(entry * 1000 + page),
            )
            .unwrap();
        }
    }
    prefill
        .region(RegionId(1))
        .unwrap()
        .write_at(3 * AUX, &[9; AUX as usize])
        .unwrap();
    let room = Room::new(77).unwrap();
    let receive = decode
        .receive(&ReceiveRequest {
            room,
            sources: vec![Source { peer, dummy: false }],
            receivers_expected: 1,
            prefix_tokens: 32,
            items: vec![Arc::from(target.as_slice()), Arc::from([5])],
            timeout: Duration::from_secs(10),
        })
        .unwrap();
    let send = prefill
        .send(&SendRequest {
            room,
            timeout: Duration::from_secs(10),
        })
        .unwrap();
    let (granted, grants) = std::sync::mpsc::sync_channel(2);
    let again = granted.clone();
    send.on_ready(move |prefix_tokens| granted.send(prefix_tokens).unwrap());
    assert_eq!(grants.recv_timeout(Duration::from_secs(5)).unwrap(), 32);
    assert_eq!(send.wait_ready(Duration::from_secs(5)).unwrap(), 32);
    // Told late, called at once.
    send.on_ready(move |prefix_tokens| again.send(prefix_tokens).unwrap());
    assert_eq!(grants.try_recv().unwrap(), 32);
    send.push(&Chunk {
        items: vec![Arc::from(&source[..60])],
        last: false,
    })
    .unwrap();
    send.push(&Chunk {
        items: vec![Arc::from(&source[60..]), Arc::from([3])],
        last: true,
    })
    .unwrap();
    let sent = send
        .wait(Duration::from_secs(10))
        .expect("in time")
        .expect("succeeds");
    let received = receive
        .wait(Duration::from_secs(10))
        .expect("in time")
        .expect("succeeds");
    assert_eq!(sent.bytes, 100 * 2 * LAYERS * PAGE + AUX);
    assert_eq!(received.bytes, sent.bytes);
    let there = decode.region(RegionId(0)).unwrap();
    for entry in 0..2 * LAYERS {
        for (from, to) in source.iter().zip(&target) {
            let mut got = vec![0; PAGE as usize];
            there
                .read_at((entry * PAGES + *to as u64) * PAGE, &mut got)
                .unwrap();
            assert!(
                got == page_bytes(entry * 1000 + *from as u64),
                "entry {entry} page {to}"
            );
        }
    }
    let mut aux = [0; AUX as usize];
    decode
        .region(RegionId(1))
        .unwrap()
        .read_at(5 * AUX, &mut aux)
        .unwrap();
    assert_eq!(aux, [9; AUX as usize]);
}

#[test]
fn a_room_moves_over_tcp() {
    run(SameHost::Off, "tcp");
}

#[test]
fn a_room_moves_by_pull() {
    run(SameHost::PullOnly, "shm-pull");
}

#[test]
fn a_room_moves_through_the_ring() {
    run(SameHost::RingOnly, "shm-ring");
}
