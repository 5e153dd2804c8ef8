//! Posting pages to RDMA devices allocates nothing per page or work request: a room of eight times the pages, in the same
//! number of batches, costs the same allocations in all threads of both engines (promise of the data path).
#![expect(
    unsafe_code,
    reason = "a counting allocator has to implement GlobalAlloc"
)]

use std::{
    alloc::{GlobalAlloc, Layout as Memory, System},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use kvtransfer::{
    config::EngineConfig,
    engine::{Engine, Memory as Regions},
    ids::Room,
    layout::Shard,
    memory::Region,
    testing::{
        conformance::{FakeNetwork, SOON, wait_for},
        fake_verbs::{Behaviour, FakeVerbs},
        model::Model,
    },
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

/// Allocations of every thread, but not those of the fake adapters. The binary has one test, so nothing else allocates.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call goes to the system allocator unchanged, which upholds the contract; counting touches only an atomic
// and a thread-local number that need no allocation of their own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        if !FakeVerbs::is_inside() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
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

/// Pages of the smaller room; each is 4 KiB in four buffers.
const PAGES: usize = 64;
/// Times as many in the larger one.
const FACTOR: usize = 8;

fn model() -> Model {
    Model {
        pages: 4096,
        page_size: 16,
        head_bytes: 64,
        has_state: false,
        ..Model::default()
    }
}

fn engine(network: &FakeNetwork, rank: usize) -> Engine {
    let (layout, regions) = model().rank(Shard::ONE, Shard::ONE);
    let mut memory = Regions::new();
    for len in regions {
        memory.add(Region::heap(len).expect("this host has memory"));
    }
    let mut config = EngineConfig::default();
    config.listen = Some(([127, 0, 0, 1], 0).into());
    config.rdma = network.rdma(rank);
    config.same_host = kvtransfer::config::SameHost::Off;
    Engine::start(config, memory, layout).expect("the engine starts")
}

/// Moves a room and counts from the push to the end on both sides.
fn cost(source: &Engine, target: &Engine, number: u64, pages: usize) -> u64 {
    let room = Room::new(number).expect("not zero");
    // Every other page, so that neither side's pages touch.
    let items: Arc<[i32]> = (0..).step_by(2).take(pages).collect();
    let peer = target.peers().last().expect("it is connected").peer;
    let request = ReceiveRequest {
        room,
        sources: vec![Source { peer, dummy: false }],
        receivers_expected: 1,
        prefix_tokens: 0,
        items: vec![Arc::clone(&items)],
        timeout: SOON,
    };
    let receive = target.receive(&request).expect("it opens");
    let timeout = SOON;
    let send = source.send(&SendRequest { room, timeout });
    let send = send.expect("it opens");
    send.wait_ready(SOON).expect("it is granted");
    let chunk = Chunk {
        items: vec![items],
        last: true,
    };
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    send.push(&chunk).expect("it is taken");
    for side in [&send, &receive] {
        side.wait(SOON).expect("in time").expect("it succeeds");
    }
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// Measures rooms of few and of many pages over a network of two ranks; WRITEs in all of them.
fn compare(mut network: FakeNetwork) -> u64 {
    network.config.queue_pairs = 1;
    // One batch a room, so that what a batch may cost is the same.
    network.config.batch_bytes = 16 << 20;
    network.config.landing_bytes = 16 << 20;
    // No heartbeat comes between.
    network.config.heartbeat = Duration::from_secs(60);
    let (source, target) = (engine(&network, 0), engine(&network, 1));
    let address = source.local_addr().expect("it listens");
    target.connect(address, SOON).expect("the devices work");
    let fabric = network.fabric();
    wait_for("the queue pair", || {
        let queues = fabric.queues(0);
        (queues.len() == 1 && fabric.is_ready(queues[0])).then_some(())
    });
    // The first rooms fill what is kept for later ones.
    for number in 1..4 {
        cost(&source, &target, number, PAGES * FACTOR);
    }
    // Another thread may allocate now and then (a timer, a log): the least of a few runs is what a room costs.
    let least = |start: u64, pages: usize| {
        let costs = (start..start + 8).map(|number| cost(&source, &target, number, pages));
        costs.min().expect("eight runs")
    };
    let requests = fabric.counters().queues.writes;
    let few = least(10, PAGES);
    let many = least(30, PAGES * FACTOR);
    let writes = fabric.counters().queues.writes - requests;
    assert!(
        many <= few,
        "{few} allocations for {PAGES} pages, {many} for {FACTOR} times as many"
    );
    assert!(few > 0, "the counter counts");
    drop((source, target));
    writes
}

#[test]
fn a_room_of_many_pages_allocates_as_little_as_one_of_few() {
    let network = || FakeNetwork::new(&Behaviour::erdma_compat(), 2, 1);
    for immediate in [false, true] {
        let mut direct = network();
        direct.config.immediate = immediate;
        let writes = compare(direct);
        assert!(
            writes >= 8 * 4 * (PAGES + PAGES * FACTOR) as u64,
            "{writes}"
        );
    }
    assert_eq!(compare(network().packed()), 16, "a WRITE for each room");
}
