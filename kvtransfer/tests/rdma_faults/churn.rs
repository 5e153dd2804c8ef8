//! Peers that come and go under traffic: queue pairs are made and destroyed while others of the same rail are polled.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use kvtransfer::{engine::Engine, error::TransferError};

use super::{
    child::Path,
    pair::{Pair, Room, config, pages, queue_pairs, until},
    rig::{self, WATCHDOG},
};

const CYCLES: u64 = 15;
const ROOM: i32 = 128;

/// Connects to `to`, opens a room from it to `engine`, and hangs up in the middle. How the sender's end ended.
fn visit(engine: &Engine, to: &Engine, number: u64) -> Result<(), TransferError> {
    let address = to.local_addr().expect("it listens");
    let peer = engine
        .connect(address, WATCHDOG)
        .expect("a connection")
        .peer;
    let all = pages(0..ROOM);
    let both: [&[i32]; 2] = [&all, &all];
    let room = Room::open([to, engine], peer, number, both, WATCHDOG);
    if number.is_multiple_of(2) {
        until("a byte", || {
            room.receive.result().is_some() || super::pair::arrived(engine, number) > 0
        });
    }
    engine.disconnect(peer, "enough");
    let [send, receive] = room.results();
    assert!(
        matches!(receive, Ok(()) | Err(TransferError::PeerLost { .. })),
        "{receive:?}"
    );
    send
}

fn come_and_go(path: Path, devices: [&str; 2]) {
    let config = config(path, 2);
    let mut pair = Pair::new(&config, devices);
    rig::fill(&pair.first, 6, &pages(0..ROOM));
    rig::fill(&pair.first, 7, &[1100]);
    // Two visitors come and go; the pair talks on meanwhile over the same rail.
    let visitors = [devices[1], devices[0]].map(|device| {
        let mut config = config.clone();
        config.rdma.devices = device.to_owned();
        rig::start(config)
    });
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let pair = &pair;
        let talker = scope.spawn(|| {
            let mut number = 1_000_000;
            while !is_over.load(Ordering::Relaxed) {
                pair.deliver(number, &[1100], &[1100]);
                number += 1;
            }
            number - 1_000_000
        });
        let comers: Vec<_> = (1..)
            .zip(&visitors)
            .map(|(first, visitor)| {
                scope.spawn(move || {
                    let ends =
                        (0..CYCLES).map(|cycle| visit(visitor, &pair.first, first * 1000 + cycle));
                    ends.filter(Result::is_err).count()
                })
            })
            .collect();
        let cut: Vec<usize> = comers
            .into_iter()
            .map(|comer| comer.join().expect("no panic"))
            .collect();
        is_over.store(true, Ordering::Relaxed);
        let rooms = talker.join().expect("no room of the pair failed");
        println!(
            "{}: {} visits, cut short {cut:?}; {rooms} rooms beside them",
            path.name(),
            2 * CYCLES
        );
        assert!(rooms > 0, "the pair talked");
    });
    drop(visitors);
    let both = pair.first.peers().len();
    assert_eq!(both, 1, "the visitors are gone");
    // Nothing is left of them on the devices.
    let count = |wanted: usize| {
        let has = || {
            devices
                .iter()
                .map(|device| queue_pairs(device))
                .sum::<usize>()
        };
        until("their queue pairs are destroyed", || has() == wanted);
    };
    count(4);
    pair.deliver(1, &pages(0..ROOM), &pages(0..ROOM));
    assert_eq!(
        rig::wrong(&pair.second, 6, &pages(0..ROOM), &pages(0..ROOM)),
        0
    );
    pair.second.shut_down();
    pair.first.shut_down();
    pair = Pair::new(&config, devices);
    count(4);
    drop(pair);
    count(0);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn peers_come_and_go_under_traffic_over_siw() {
    come_and_go(Path::Siw, ["siw0", "siw1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn peers_come_and_go_under_traffic_over_rxe_compat() {
    come_and_go(Path::RxeCompat, ["rxe0", "rxe1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn peers_come_and_go_under_traffic_over_rxe_standard() {
    come_and_go(Path::RxeStandard, ["rxe0", "rxe1"]);
}
