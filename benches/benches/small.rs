//! What a transfer of 64 bytes over RDMA costs in our own code: two engines of this process on made-up adapters, from push to
//! acknowledged.
//!
//! The adapters execute a work request while it is posted, so what is measured is both engines' work, the fake's, and the
//! time that two threads need to see each other's words. For the share of each, count instructions:
//! `valgrind --tool=callgrind --separate-threads=yes BENCH --bench --profile-time 1`, without the fake's functions.

use std::{hint::black_box, sync::Arc, time::Duration};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use kvtransfer::{
    config::{EngineConfig, SameHost},
    engine::{Engine, Memory, Transfer},
    ids::Room,
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
    testing::{
        conformance::{FakeNetwork, SOON, wait_for},
        fake_verbs::Behaviour,
    },
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

const BLOCK: u64 = 64;
const BLOCKS: u64 = 256;

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
                item_len: BLOCK,
                item_count: BLOCKS,
                layer_id: None,
            }],
            draft_entries: 0,
            state: StateShape::default(),
        }],
    }
}

fn engine(network: &FakeNetwork, rank: usize) -> Engine {
    let mut memory = Memory::new();
    let bytes = usize::try_from(BLOCK * BLOCKS).expect("a small region");
    memory.add(Region::heap(bytes).expect("this host has memory"));
    let mut config = EngineConfig::default();
    config.listen = Some(([127, 0, 0, 1], 0).into());
    config.same_host = SameHost::Off;
    config.rdma = network.rdma(rank);
    Engine::start(config, memory, layout()).expect("the engine starts")
}

/// A room whose pages are granted, both sides of it.
fn open(source: &Engine, target: &Engine, number: u64) -> (Transfer, Transfer) {
    let room = Room::new(number).expect("not zero");
    let request = ReceiveRequest {
        room,
        sources: vec![Source {
            peer: target.peers()[0].peer,
            dummy: false,
        }],
        receivers_expected: 1,
        prefix_tokens: 0,
        items: vec![Arc::from([7])],
        timeout: SOON,
    };
    let receive = target.receive(&request).expect("it opens");
    let timeout = SOON;
    let send = source.send(&SendRequest { room, timeout });
    let send = send.expect("it opens");
    send.wait_ready(SOON).expect("it is granted");
    (send, receive)
}

fn small(criterion: &mut Criterion) {
    let mut network = FakeNetwork::new(&Behaviour::erdma_compat(), 2, 1);
    network.config.queue_pairs = 4;
    // Longer than a room takes to open: the receiver's thread is awake when the batch comes.
    network.config.spin = Duration::from_millis(2);
    let (source, target) = (engine(&network, 0), engine(&network, 1));
    let address = source.local_addr().expect("it listens");
    target.connect(address, SOON).expect("the devices work");
    let fabric = network.fabric();
    wait_for("the queue pairs", || {
        let queues = fabric.queues(0);
        let is_ready = queues.len() == 4 && queues.iter().all(|queue| fabric.is_ready(*queue));
        is_ready.then_some(())
    });
    let mut number = 0;
    let chunk = Chunk {
        items: vec![Arc::from([3])],
        last: true,
    };
    criterion.bench_function("64 bytes from push to acknowledged", |b| {
        b.iter_batched(
            || {
                number += 1;
                open(&source, &target, number)
            },
            |(send, receive)| {
                send.push(black_box(&chunk)).expect("it is taken");
                send.wait(SOON).expect("in time").expect("it succeeds");
                (send, receive)
            },
            BatchSize::PerIteration,
        );
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = small
}
criterion_main!(benches);
