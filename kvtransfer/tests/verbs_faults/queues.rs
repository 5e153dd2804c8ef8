//! What goes wrong on one queue pair: the room goes on through the other one, or is told what happened.

use std::time::Duration;

use kvtransfer::{
    error::TransferError,
    testing::{
        conformance::{Fabric, SOON, wait_for},
        fake_verbs::Behaviour,
    },
    transfer::NodeConfig,
};

use super::rig::{
    Rig, bulk, bulk_deal, bulk_rig, compat, devices, forbid_new_queues, gone, opened, push, rig,
    run_with_fault, settled, succeeded,
};

/// `ENOMEM`, which the providers answer when a send queue is full.
const ENOMEM: i32 = 12;

/// The statuses of the specification, from `LOC_LEN_ERR` to `GENERAL_ERR`, by their names in the header.
const STATUSES: [&str; 21] = [
    "LOC_LEN_ERR",
    "LOC_QP_OP_ERR",
    "LOC_EEC_OP_ERR",
    "LOC_PROT_ERR",
    "WR_FLUSH_ERR",
    "MW_BIND_ERR",
    "BAD_RESP_ERR",
    "LOC_ACCESS_ERR",
    "REM_INV_REQ_ERR",
    "REM_ACCESS_ERR",
    "REM_OP_ERR",
    "RETRY_EXC_ERR",
    "RNR_RETRY_EXC_ERR",
    "LOC_RDD_VIOL_ERR",
    "REM_INV_RD_REQ_ERR",
    "REM_ABORT_ERR",
    "INV_EECN_ERR",
    "INV_EEC_STATE_ERR",
    "FATAL_ERR",
    "RESP_TIMEOUT_ERR",
    "GENERAL_ERR",
];

/// Why a side of a room that must fail failed.
#[track_caller]
pub(crate) fn no_path(end: Option<Result<impl Sized, TransferError>>) -> String {
    match end.expect("it ends in time").err() {
        Some(TransferError::NoPath { reason, .. }) => reason,
        other => panic!("not for want of a path: {other:?}"),
    }
}

#[test]
fn a_post_that_fails_within_a_chain_costs_the_queue_pair_and_no_page() {
    let mut rig = bulk_rig(compat(1));
    for (number, accepted) in (1..).zip([0, 1, 5, 20]) {
        let queue = settled(&rig)[0];
        devices(&rig).fail_post(queue, accepted, ENOMEM);
        rig.run(&bulk_deal(number));
        gone(&rig, queue);
    }
}

#[test]
fn a_post_that_fails_alone_is_told_with_its_errno() {
    let mut network = compat(1);
    network.config.queue_pairs = 1;
    network.config.drain = Duration::ZERO;
    let mut rig = bulk_rig(network);
    let queue = settled(&rig)[0];
    let deal = bulk_deal(1);
    let (send, _receive) = opened(&mut rig, &deal, Duration::from_millis(300));
    forbid_new_queues(&rig);
    devices(&rig).fail_post(queue, 3, ENOMEM);
    push(&mut rig, &deal, &send);
    let reason = no_path(send.wait(SOON));
    assert!(reason.contains("ibv_post_send"), "{reason}");
    assert!(reason.contains(&format!("errno {ENOMEM}")), "{reason}");
}

/// A completion that never comes shows when a later one does; until then nothing but its places in the queue is lost.
#[test]
fn a_lost_completion_of_a_chain_costs_the_queue_pair_and_no_page() {
    for after in [0, 1, 3] {
        let mut rig = bulk_rig(compat(1));
        let queue = settled(&rig)[0];
        devices(&rig).drop_completion(queue, after);
        for number in 1..4 {
            rig.run(&bulk_deal(number));
        }
        assert!(
            devices(&rig).counters().completions_lost > 0,
            "nothing was lost after {after}"
        );
        gone(&rig, queue);
    }
}

#[test]
fn after_every_status_the_other_queue_pair_goes_on() {
    let mut rig = bulk_rig(compat(1));
    for (status, _) in (1..).zip(STATUSES) {
        for (index, lands) in [(0, false), (1, true)] {
            let queue = settled(&rig)[index];
            devices(&rig).fail_request(queue, status % 7, status, lands);
            rig.run(&bulk_deal(u64::from(2 * status) + u64::from(lands)));
        }
    }
}

fn fail_alone(behaviour: &Behaviour, status: u32, name: &str) {
    let mut network = super::rig::network(behaviour, 1);
    network.config.queue_pairs = 1;
    network.config.drain = Duration::ZERO;
    let mut rig = bulk_rig(network);
    let queue = settled(&rig)[0];
    let deal = bulk_deal(1);
    let (send, receive) = opened(&mut rig, &deal, Duration::from_millis(300));
    forbid_new_queues(&rig);
    devices(&rig).fail_request(queue, 2, status, false);
    push(&mut rig, &deal, &send);
    let reason = no_path(send.wait(SOON));
    assert!(reason.contains(&format!("({name})")), "{name}: {reason}");
    let device = &rig.fabric.network().fake.device_names()[0];
    assert!(reason.starts_with(device.as_str()), "{device}: {reason}");
    let told = receive.wait(SOON).expect("it ends in time");
    assert!(told.is_err(), "nothing could have arrived");
}

#[test]
fn a_status_without_another_path_is_told_in_words() {
    let behaviours = [Behaviour::erdma_compat(), Behaviour::roce()];
    std::thread::scope(|scope| {
        for shift in 0..4 {
            let behaviour = &behaviours[shift % 2];
            scope.spawn(move || {
                let every = (1..).zip(STATUSES).skip(shift).step_by(4);
                every.for_each(|(status, name)| fail_alone(behaviour, status, name));
            });
        }
    });
}

#[test]
fn a_queue_pair_that_the_device_gives_up_is_replaced() {
    let mut rig = bulk_rig(compat(1));
    for number in 1..6 {
        let queue = settled(&rig)[0];
        run_with_fault(&mut rig, &bulk_deal(number), |rig| devices(rig).kill(queue));
        gone(&rig, queue);
    }
    settled(&rig);
}

#[test]
fn a_queue_pair_that_the_device_gives_up_is_named_when_it_was_the_only_one() {
    let mut network = compat(1);
    network.config.queue_pairs = 1;
    let mut rig = bulk_rig(network);
    let queue = settled(&rig)[0];
    let deal = bulk_deal(1);
    let (send, _receive) = opened(&mut rig, &deal, Duration::from_millis(400));
    forbid_new_queues(&rig);
    devices(&rig).kill(queue);
    push(&mut rig, &deal, &send);
    let reason = no_path(send.wait(SOON));
    assert!(reason.contains("QP_FATAL"), "{reason}");
}

/// eRDMA gives nothing back that was posted before the error state: the wait for it is bounded.
#[test]
fn a_queue_pair_that_flushes_nothing_is_destroyed_after_its_drain() {
    let mut network = compat(1);
    network.config.drain = Duration::from_millis(60);
    let drain = network.config.drain;
    let mut rig = bulk_rig(network);
    let queue = settled(&rig)[0];
    let mut before = kvtransfer::engine::Engine::now();
    run_with_fault(&mut rig, &bulk_deal(1), |rig| {
        before = kvtransfer::engine::Engine::now();
        devices(rig).kill(queue);
        gone(rig, queue);
    });
    let took = kvtransfer::engine::Engine::now().since(before);
    assert!(took >= drain, "it was not waited for: {took:?}");
    assert!(took < drain + SOON / 2, "{took:?}");
    settled(&rig);
}

/// The provider forgets the completions of a destroyed queue pair: their batches are settled without them.
#[test]
fn completions_that_go_with_their_queue_pair_are_not_waited_for() {
    let mut rig = bulk_rig(compat(1));
    let deal = bulk_deal(1);
    let queues = settled(&rig);
    let fabric = devices(&rig);
    let (send, receive) = opened(&mut rig, &deal, SOON);
    fabric.hold_completions(0, true);
    let before = fabric.counters().bytes_written;
    push(&mut rig, &deal, &send);
    wait_for("writes", || {
        (fabric.counters().bytes_written > before).then_some(())
    });
    rig.fabric.reset_lane(0, 1, 0);
    rig.fabric.reset_lane(0, 1, 1);
    for queue in queues {
        gone(&rig, queue);
    }
    assert!(fabric.counters().completions_lost > 0, "nothing was lost");
    fabric.hold_completions(0, false);
    succeeded(&mut rig, &deal, &send, &receive);
}

/// Rooms one after another while queue pairs of both sides die: each is whole.
#[test]
fn rooms_survive_a_series_of_faults_on_both_sides() {
    let node = NodeConfig::default();
    let mut rig: Rig = rig(compat(2), &bulk(), &node);
    for number in 1..20 {
        let fabric = devices(&rig);
        let device = usize::try_from(number % 4).expect("small");
        if let Some(queue) = fabric.queues(device).first() {
            match number % 3 {
                0 => fabric.kill(*queue),
                1 => fabric.fail_post(*queue, 4, ENOMEM),
                _ => fabric.fail_request(*queue, 3, 12, number % 2 == 0),
            }
        }
        rig.run(&bulk_deal(number));
    }
}
