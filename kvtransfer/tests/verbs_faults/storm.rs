//! No storm of small rooms finds an empty receive queue.

use std::sync::Arc;

use kvtransfer::{
    ids::PeerId,
    testing::{
        conformance::{EngineFabric, SOON, room, to_send},
        fake_verbs::Behaviour,
        model::Model,
    },
    transfer::{Chunk, NodeConfig, ReceiveRequest, Source},
};

use super::rig::{FakePath, devices, network, rig, settled};

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
    let mut network = network(behaviour, 1);
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
