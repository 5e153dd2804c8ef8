//! What goes wrong with a whole device or the path between two: another device takes over at once, or the one comes back.

use std::time::Duration;

use kvtransfer::testing::{
    conformance::{SOON, wait_for},
    fake_verbs::{Behaviour, Mode},
};

use super::{
    queues::no_path,
    rig::{
        Rig, bulk_deal, bulk_rig, compat, devices, gone, network, opened, push, run_with_fault,
        settled, succeeded,
    },
};

/// Steps of virtual time after which a request without an answer has failed.
const RETRIES: u64 = 24;

/// Waits until an engine that goes on holds nothing of a device any more, which is what its removal waits for.
fn let_go(rig: &Rig, device: usize) {
    let fabric = devices(rig);
    wait_for("the last object of a lost device to go", || {
        (fabric.objects(device) == 0).then_some(())
    });
}

/// Devices that differ in how they connect, flush and fail.
fn kinds() -> [Behaviour; 3] {
    [
        Behaviour::erdma_compat(),
        Behaviour::erdma_standard(),
        Behaviour::roce(),
    ]
}

#[test]
fn a_device_that_is_removed_in_flight_leaves_its_pages_to_the_other() {
    for behaviour in kinds() {
        // The sender's and the receiver's first device.
        for removed in [0, 2] {
            let mut rig = bulk_rig(network(&behaviour, 2));
            settled(&rig);
            run_with_fault(&mut rig, &bulk_deal(1), |rig| {
                devices(rig).remove_device(removed);
            });
            let_go(&rig, removed);
            for number in 2..5 {
                rig.run(&bulk_deal(number));
            }
        }
    }
}

#[test]
fn a_device_that_is_removed_without_another_is_named_at_the_deadline() {
    for behaviour in kinds() {
        let mut rig = bulk_rig(network(&behaviour, 1));
        settled(&rig);
        let deal = bulk_deal(1);
        let (send, receive) = opened(&mut rig, &deal, Duration::from_millis(300));
        let fabric = devices(&rig);
        fabric.set_mode(Mode::Manual);
        push(&mut rig, &deal, &send);
        fabric.remove_device(0);
        let reason = no_path(send.wait(SOON));
        let device = &rig.fabric.network().fake.device_names()[0];
        assert!(reason.contains(device.as_str()), "{device}: {reason}");
        // Polling, or rdma_cm, may meet the removal before its event is read.
        let words = ["DEVICE_FATAL", "ibv_poll_cq", "rdma_cm", "or was removed"];
        assert!(words.iter().any(|word| reason.contains(word)), "{reason}");
        let told = receive.wait(SOON).expect("it ends in time");
        assert!(told.is_err(), "nothing could have arrived");
        fabric.set_mode(Mode::Auto);
        let_go(&rig, 0);
    }
}

/// A device that goes while its queue pairs are being made: whoever makes one is refused, and holds nothing afterwards.
#[test]
fn a_device_that_is_removed_under_a_rebuild_is_let_go() {
    for behaviour in kinds() {
        for (removed, waits) in [(0, false), (0, true), (2, false), (2, true)] {
            let mut rig = bulk_rig(network(&behaviour, 2));
            let queues = settled(&rig);
            run_with_fault(&mut rig, &bulk_deal(1), |rig| {
                let fabric = devices(rig);
                queues.iter().for_each(|queue| fabric.kill(*queue));
                if waits {
                    gone(rig, queues[0]);
                }
                fabric.remove_device(removed);
            });
            let_go(&rig, removed);
            rig.run(&bulk_deal(2));
        }
    }
}

#[test]
fn a_cut_between_two_devices_moves_the_room_to_the_others() {
    let mut rig = bulk_rig(compat(2));
    let queues = settled(&rig);
    let deal = bulk_deal(1);
    let (send, receive) = opened(&mut rig, &deal, SOON);
    let fabric = devices(&rig);
    fabric.cut(0, 2);
    push(&mut rig, &deal, &send);
    wait_for("the retries to be used up", || {
        fabric.tick(RETRIES);
        (send.result().is_some() && receive.result().is_some()).then_some(())
    });
    succeeded(&mut rig, &deal, &send, &receive);
    fabric.mend(0, 2);
    let cut_off = queues.iter().filter(|queue| queue.device == 0);
    assert!(cut_off.count() > 0, "the first rail carries something");
    wait_for("the cut rail to come back", || {
        let back = fabric.queues(0);
        (back.len() == 2 && back.iter().all(|queue| fabric.is_ready(*queue))).then_some(())
    });
    rig.run(&bulk_deal(2));
}

#[test]
fn a_cut_without_another_path_is_named_and_the_rail_comes_back() {
    let mut network = compat(1);
    network.config.queue_pairs = 1;
    network.config.drain = Duration::ZERO;
    let mut rig = bulk_rig(network);
    let queue = settled(&rig)[0];
    let deal = bulk_deal(1);
    let (send, _receive) = opened(&mut rig, &deal, Duration::from_millis(300));
    let fabric = devices(&rig);
    fabric.cut(0, 1);
    push(&mut rig, &deal, &send);
    wait_for("the retries to be used up", || {
        fabric.tick(RETRIES);
        (!fabric.queues(0).contains(&queue)).then_some(())
    });
    let reason = no_path(send.wait(SOON));
    assert!(reason.contains("RETRY_EXC_ERR"), "{reason}");
    fabric.mend(0, 1);
    rig.run(&bulk_deal(2));
}

#[test]
fn a_port_that_goes_down_and_up_again_finishes_the_room() {
    for device in [0, 1] {
        let mut rig = bulk_rig(compat(1));
        let queues = settled(&rig);
        run_with_fault(&mut rig, &bulk_deal(1), |rig| {
            devices(rig).set_port(device, false);
            for queue in queues {
                gone(rig, queue);
            }
            devices(rig).set_port(device, true);
        });
        settled(&rig);
        rig.run(&bulk_deal(2));
    }
}

#[test]
fn a_port_that_is_down_is_named() {
    let mut rig = bulk_rig(compat(1));
    settled(&rig);
    let deal = bulk_deal(1);
    let (send, _receive) = opened(&mut rig, &deal, Duration::from_millis(300));
    devices(&rig).set_port(0, false);
    push(&mut rig, &deal, &send);
    let reason = no_path(send.wait(SOON));
    assert!(reason.contains("PORT_ERR"), "{reason}");
    devices(&rig).set_port(0, true);
    rig.run(&bulk_deal(2));
}
