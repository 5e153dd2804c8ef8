//! Promise P1 over RDMA: a page is somebody else's from the moment its room is reported over, whatever the cards still hold.

use std::{sync::mpsc, time::Duration};

use kvtransfer::{
    error::TransferError,
    testing::{
        conformance::{Bench, EngineFabric, Fabric, SOON, wait_for},
        fake_verbs::{Behaviour, Mode},
    },
    transfer::NodeConfig,
};

use super::{
    relay::Relay,
    rig::{
        FakePath, addresses, bulk, bulk_deal, bulk_rig, compat, devices, network, opened, push,
        rig, settled, strangers,
    },
};

/// Long enough to see that something does not happen.
const WHILE: Duration = Duration::from_millis(40);

fn patient(ebb_max: Duration) -> NodeConfig {
    let mut node = NodeConfig::default();
    node.ebb_max = ebb_max;
    node
}

#[test]
fn source_pages_are_not_free_before_the_card_has_said_so() {
    let mut rig = rig(compat(1), &bulk(), &patient(SOON));
    let queues = settled(&rig);
    let deal = bulk_deal(1);
    let (send, _receive) = opened(&mut rig, &deal, SOON);
    let fabric = devices(&rig);
    fabric.hold_completions(0, true);
    let before = fabric.counters().bytes_written;
    push(&mut rig, &deal, &send);
    wait_for("writes", || {
        (fabric.counters().bytes_written > before).then_some(())
    });
    let (sender, told) = mpsc::channel();
    send.on_end(move |end| drop(sender.send(end.clone())));
    std::thread::scope(|scope| {
        scope.spawn(|| send.cancel());
        let early = told.recv_timeout(WHILE);
        assert!(
            early.is_err(),
            "over while the card has the pages: {early:?}"
        );
        fabric.hold_completions(0, false);
        let end = told.recv_timeout(SOON).expect("the card has spoken");
        assert_eq!(end, Err(TransferError::Cancelled));
    });
    assert_eq!(fabric.queues(0), queues, "no queue pair had to go");
}

#[test]
fn source_pages_are_free_once_a_silent_cards_queue_pairs_are_destroyed() {
    let mut rig = rig(compat(1), &bulk(), &patient(Duration::from_millis(20)));
    settled(&rig);
    let deal = bulk_deal(1);
    let (send, _receive) = opened(&mut rig, &deal, SOON);
    let fabric = devices(&rig);
    fabric.set_mode(Mode::Manual);
    push(&mut rig, &deal, &send);
    wait_for("work requests", || (fabric.waiting() > 0).then_some(()));
    let wrote = |queue: &_| {
        let counters = fabric.queue_counters(*queue);
        counters.is_some_and(|counters| counters.writes > 0)
    };
    let carriers: Vec<_> = fabric.queues(0).into_iter().filter(wrote).collect();
    assert!(!carriers.is_empty());
    send.cancel();
    let left = fabric.queues(0);
    let alive = carriers.iter().filter(|queue| left.contains(queue));
    assert_eq!(alive.count(), 0, "its card may still read the pages");
    fabric.set_mode(Mode::Auto);
    rig.run(&bulk_deal(2));
}

/// The sender and all that it says are frozen, its card is not: what was posted lands whenever the card gets to it.
fn frozen_sender(behaviour: &Behaviour) {
    let network = network(behaviour, 1);
    let mut rig: Bench<EngineFabric<FakePath>> =
        strangers(network, &bulk(), &NodeConfig::default());
    let relay = Relay::to(rig.fabric.address(0));
    let connected = rig.fabric.engine(1).connect(relay.address, SOON);
    connected.expect("the relay is transparent");
    settled(&rig);
    let fabric = devices(&rig);
    let deal = bulk_deal(1);
    let (send, receive) = opened(&mut rig, &deal, Duration::from_millis(60));
    relay.stall(true);
    fabric.set_mode(Mode::Manual);
    push(&mut rig, &deal, &send);
    wait_for("work requests", || (fabric.waiting() > 0).then_some(()));
    let end = receive.wait(SOON).expect("it ends in time");
    assert!(end.is_err(), "nothing arrived: {end:?}");
    let pages = addresses(&rig, 1, &deal.to[0]);
    let watched: Vec<_> = pages.into_iter().map(|page| fabric.watch(page)).collect();
    rig.fill_rank(1, 3);
    let before = rig.image(1);
    // The card wakes up, then its host.
    fabric.run();
    fabric.set_mode(Mode::Auto);
    relay.stall(false);
    assert!(send.wait(SOON).expect("it ends in time").is_err());
    settled(&rig);
    assert!(before == rig.image(1), "bytes changed after the end");
    assert_eq!(fabric.counters().late_writes, 0);
    watched.into_iter().for_each(|watch| fabric.unwatch(watch));
    rig.run(&bulk_deal(2));
}

#[test]
fn writes_of_a_frozen_sender_never_land_after_the_end() {
    for behaviour in [Behaviour::erdma_compat(), Behaviour::roce()] {
        frozen_sender(&behaviour);
    }
}

/// The receiver's engine is gone, and with it every right of its peer to the pages.
#[test]
fn writes_never_land_after_a_receiver_has_shut_down() {
    let mut rig = bulk_rig(compat(1));
    settled(&rig);
    let deal = bulk_deal(1);
    let (send, receive) = opened(&mut rig, &deal, SOON);
    let fabric = devices(&rig);
    fabric.set_mode(Mode::Manual);
    push(&mut rig, &deal, &send);
    wait_for("work requests", || (fabric.waiting() > 0).then_some(()));
    let pages = addresses(&rig, 1, &deal.to[0]);
    rig.fabric.shut_down(1);
    for page in pages {
        let _ = fabric.watch(page);
    }
    fabric.run();
    let end = receive.result().expect("shut down");
    assert_eq!(end, Err(TransferError::Shutdown));
    assert_eq!(fabric.counters().late_writes, 0, "after the shutdown");
    assert!(fabric.queues(1).is_empty(), "it left queue pairs behind");
    fabric.set_mode(Mode::Auto);
    assert!(send.wait(SOON).expect("it ends in time").is_err());
}

/// Both sides give up while pages are on the wire, again and again: each end is final.
#[test]
fn cancelled_rooms_leave_nothing_on_the_wire() {
    let mut rig = bulk_rig(compat(1));
    let fabric = devices(&rig);
    for number in 1..9 {
        settled(&rig);
        let deal = bulk_deal(number);
        let (send, receive) = opened(&mut rig, &deal, SOON);
        fabric.set_mode(Mode::Manual);
        push(&mut rig, &deal, &send);
        wait_for("work requests", || (fabric.waiting() > 0).then_some(()));
        let first = if number % 2 == 0 { &send } else { &receive };
        first.cancel();
        assert!(receive.wait(SOON).expect("in time").is_err());
        let pages = addresses(&rig, 1, &deal.to[0]);
        let watched: Vec<_> = pages.into_iter().map(|page| fabric.watch(page)).collect();
        rig.fill_rank(1, number);
        let before = rig.image(1);
        fabric.run();
        fabric.set_mode(Mode::Auto);
        assert!(send.wait(SOON).expect("in time").is_err());
        assert_eq!(fabric.counters().late_writes, 0, "room {number}");
        watched.into_iter().for_each(|watch| fabric.unwatch(watch));
        assert!(before == rig.image(1), "bytes changed after the end");
    }
    rig.run(&bulk_deal(9));
}
