//! Who is woken by what: completions that no event tells of, answers that a thread comes for, and sleep afterwards.

use std::{sync::Arc, time::Duration};

use kvtransfer::{
    engine::Transfer,
    testing::{
        conformance::{SOON, room, to_send, wait_for},
        model::Model,
    },
    transfer::{Chunk, NodeConfig, ReceiveRequest, Source},
};

use super::rig::{Rig, bulk_deal, bulk_rig, compat, devices, rig, settled};

/// No heartbeat within a test: what nothing else wakes the rail for is not done in time.
const NO_HEARTBEAT: Duration = Duration::from_secs(60);
/// A rail looks so often while threads drive, and a few times after that (`NEAR_SLEEP`, `NEAR_LOOKS`).
const NEAR: Duration = Duration::from_millis(4);
/// Rooms of one look at how many events there were.
const ROOMS: u64 = 20;

/// A sender and a receiver with one queue pair; who waits for a small room looks for its answer for 20 ms.
fn patient() -> Rig {
    let mut network = compat(1);
    network.config.queue_pairs = 1;
    network.config.heartbeat = NO_HEARTBEAT;
    network.config.spin = Duration::from_millis(5);
    let model = Model {
        has_state: false,
        ..Model::default()
    };
    let rig = rig(network, &model, &NodeConfig::default());
    settled(&rig);
    rig
}

/// Pushes a room of one page from rank 0; its two sides.
fn one_page(rig: &Rig, number: u64) -> (Transfer, Transfer) {
    let peer = rig.fabric.peer(1, 0).expect("they are connected");
    let items: Arc<[i32]> = [1].into();
    let receive = rig.fabric.engine(1).receive(&ReceiveRequest {
        room: room(number),
        sources: vec![Source { peer, dummy: false }],
        receivers_expected: 1,
        prefix_tokens: 0,
        items: vec![Arc::clone(&items)],
        timeout: SOON,
    });
    let send = rig.fabric.engine(0).send(&to_send(number, SOON));
    let send = send.expect("it opens");
    send.wait_ready(SOON).expect("it is granted");
    let chunk = Chunk {
        items: vec![items],
        last: true,
    };
    send.push(&chunk).expect("it is taken");
    (send, receive.expect("it opens"))
}

/// The same, waited for by the thread that pushed it.
fn awaited_page(rig: &Rig, number: u64) {
    let (send, receive) = one_page(rig, number);
    for side in [&send, &receive] {
        side.wait(SOON).expect("in time").expect("it succeeds");
    }
}

#[test]
fn what_completes_while_a_queue_is_armed_is_acted_upon_at_once() {
    let mut network = compat(1);
    network.config.heartbeat = NO_HEARTBEAT;
    let mut rig = bulk_rig(network);
    settled(&rig);
    devices(&rig).adjust(|behaviour| behaviour.completes_when_armed = true);
    // Each takes several windows of batches, so the sender must go on when answers come, and the receiver must answer.
    for number in 1..=3 {
        rig.run(&bulk_deal(number));
    }
}

#[test]
fn answers_make_no_event_where_the_pusher_looks_for_them() {
    let rig = patient();
    let fabric = devices(&rig);
    let mut next = 1;
    // A host with more to do may take a driver's processor away for longer than it looks, so not every room counts.
    wait_for("rooms without events", || {
        let before = fabric.watched(0);
        for number in next..next + ROOMS {
            awaited_page(&rig, number);
        }
        next += ROOMS;
        let after = fabric.watched(0);
        let is_quiet = (after.events - before.events) * 4 < ROOMS;
        let is_armed = after.armed_for_marked > before.armed_for_marked;
        (is_quiet && is_armed).then_some(())
    });
}

#[test]
fn the_rail_sleeps_again_once_nobody_drives_and_is_woken_by_any_answer() {
    let rig = patient();
    let fabric = devices(&rig);
    for number in 1..=ROOMS {
        awaited_page(&rig, number);
    }
    // There is no event of nothing happening: ten of its looks would be seen.
    let before = wait_for("a rail that sleeps until anything completes", || {
        let before = fabric.watched(0);
        std::thread::sleep(10 * NEAR);
        let is_asleep = fabric.is_armed_for_any(0) && fabric.watched(0) == before;
        is_asleep.then_some(before)
    });
    let (send, receive) = one_page(&rig, ROOMS + 1);
    // Looks without driving.
    for side in [&send, &receive] {
        let end = wait_for("the end of a room that nobody drives", || side.result());
        end.expect("it succeeds");
    }
    assert!(fabric.watched(0).events > before.events);
}
