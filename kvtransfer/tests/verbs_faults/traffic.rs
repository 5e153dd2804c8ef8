//! What traffic costs in doorbells and completions, and that no storm of small rooms finds an empty receive queue.

use std::sync::Arc;

use kvtransfer::{
    ids::PeerId,
    testing::{
        conformance::{Deal, EngineFabric, FakeNetwork, SOON, room, to_send},
        fake_verbs::{Behaviour, QueueCounters},
        model::Model,
    },
    transfer::{Chunk, NodeConfig, ReceiveRequest, Source},
};

use super::rig::{FakePath, Rig, compat, devices, rig, settled};

/// What the living queue pairs of rank 0 have counted.
fn sent(rig: &Rig) -> QueueCounters {
    let fabric = devices(rig);
    let all = fabric.queues(0).into_iter();
    let all = all.filter_map(|queue| fabric.queue_counters(queue));
    all.fold(QueueCounters::default(), |sum, one| QueueCounters {
        send_doorbells: sum.send_doorbells + one.send_doorbells,
        send_requests: sum.send_requests + one.send_requests,
        send_completions: sum.send_completions + one.send_completions,
        writes: sum.writes + one.writes,
        ..sum
    })
}

/// A bulk room over one page size: work requests per doorbell and per completion at the sender.
fn ratios(immediate: bool, model: &Model, pages: usize) {
    let mut network = compat(1);
    network.config.immediate = immediate;
    network.config.batch_bytes = 2 << 20;
    let mut rig = rig(network, model, &NodeConfig::default());
    settled(&rig);
    let before = sent(&rig);
    rig.run(&Deal::new(model, 1, &[pages]));
    let after = sent(&rig);
    let requests = after.send_requests - before.send_requests;
    let doorbells = after.send_doorbells - before.send_doorbells;
    let completions = after.send_completions - before.send_completions;
    let writes = after.writes - before.writes;
    assert!(
        writes >= 4 * pages as u64,
        "{writes} writes for {pages} pages"
    );
    assert!(
        completions * 32 <= requests,
        "{completions} completions for {requests} requests"
    );
    assert!(
        doorbells * 16 <= requests,
        "{doorbells} doorbells for {requests} requests"
    );
}

#[test]
fn bulk_blocks_of_64_kib_cost_few_doorbells_and_completions() {
    let model = Model {
        pages: 128,
        page_size: 64,
        head_bytes: 256,
        has_state: false,
        ..Model::default()
    };
    for immediate in [false, true] {
        ratios(immediate, &model, 96);
    }
}

#[test]
fn scattered_pages_of_4_kib_cost_few_doorbells_and_completions() {
    let model = Model {
        pages: 1024,
        page_size: 16,
        head_bytes: 64,
        has_state: false,
        ..Model::default()
    };
    for immediate in [false, true] {
        ratios(immediate, &model, 1000);
    }
}

/// Rooms that wait for their end at the same time, each way.
const AT_ONCE: u64 = 64;
/// Waves of them.
const WAVES: u64 = 12;

/// One wave of rooms from `from` to `to`, each of one page.
fn wave(fabric: &EngineFabric<FakePath>, (from, to): (usize, usize), first: u64) {
    let peer: PeerId = fabric.peer(to, from).expect("they are connected");
    let page = |number: u64| -> Arc<[i32]> { [i32::try_from(number % 64).expect("small")].into() };
    let rooms: Vec<_> = (first..first + AT_ONCE)
        .map(|number| {
            let request = ReceiveRequest {
                room: room(number),
                sources: vec![Source { peer, dummy: false }],
                receivers_expected: 1,
                prefix_tokens: 0,
                items: vec![page(number)],
                timeout: SOON,
            };
            let receive = fabric.engine(to).receive(&request).expect("it opens");
            let send = fabric.engine(from).send(&to_send(number, SOON));
            (send.expect("it opens"), receive, page(number))
        })
        .collect();
    for (send, _, page) in &rooms {
        send.wait_ready(SOON).expect("it is granted");
        let chunk = Chunk {
            items: vec![Arc::clone(page)],
            last: true,
        };
        send.push(&chunk).expect("it is taken");
    }
    for (send, receive, _) in &rooms {
        for side in [send, receive] {
            side.wait(SOON).expect("in time").expect("it succeeds");
        }
    }
}

fn storm(behaviour: &Behaviour, immediate: bool) {
    let mut network = FakeNetwork::new(behaviour, 2, 1);
    network.config.queue_pairs = 1;
    network.config.immediate = immediate;
    // As many batches on the wire as a queue pair may have.
    network.config.window = 256;
    let model = Model {
        has_state: false,
        ..Model::default()
    };
    let rig = rig(network, &model, &NodeConfig::default());
    let queues = settled(&rig);
    let both = &rig.fabric;
    std::thread::scope(|scope| {
        for (way, start) in [((0, 1), 1), ((1, 0), 1 << 20)] {
            scope.spawn(move || {
                for index in 0..WAVES {
                    wave(both, way, start + index * AT_ONCE);
                }
            });
        }
    });
    let fabric = devices(&rig);
    assert_eq!(fabric.counters().empty_receives, 0);
    assert_eq!(fabric.queues(0), queues, "a queue pair died");
    let notices = fabric.counters().queues.recv_completions;
    assert!(notices >= 4 * AT_ONCE * WAVES, "{notices} notices");
}

#[test]
fn a_storm_of_small_rooms_both_ways_never_finds_an_empty_receive_queue() {
    for immediate in [false, true] {
        storm(&Behaviour::erdma_compat(), immediate);
        storm(&Behaviour::erdma_standard(), immediate);
    }
}
