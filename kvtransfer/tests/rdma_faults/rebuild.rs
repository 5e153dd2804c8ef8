//! Promise P5: when a queue pair is fenced, the other rooms of that peer go on, and a new queue pair takes its place.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use kvtransfer::engine::Engine;

use super::{
    child::Path,
    pair::{Pair, Room, arrived, config, lanes, pages, until},
    rig::{self, WATCHDOG},
};

const LANES: usize = 2;
const ROUNDS: u64 = 6;
/// Pages of the large room.
const LARGE: i32 = 512;
/// The page of the small rooms.
const SMALL: i32 = 1200;

/// How often a lane of an engine's only peer has gone.
fn losses(engine: &Engine) -> u64 {
    let rails = engine.snapshot().rails;
    let all = rails.iter().flat_map(|rail| &rail.failures);
    let counts = all.filter(|(reason, _)| reason == "lane_down");
    counts.map(|(_, count)| *count).max().unwrap_or(0)
}

fn go_on(path: Path, devices: [&str; 2]) {
    let pair = Pair::new(&config(path, 2), devices);
    until("both lanes", || lanes(&pair.first).len() == LANES);
    rig::fill(&pair.first, 3, &pages(0..LARGE));
    rig::fill(&pair.first, 4, &[SMALL]);
    let is_over = AtomicBool::new(false);
    let (mut small, mut rebuilt) = (0, Vec::new());
    thread::scope(|scope| {
        let pair = &pair;
        let talker = scope.spawn(|| {
            let mut worst = Duration::ZERO;
            let mut number = 1000;
            while !is_over.load(Ordering::Relaxed) {
                worst = worst.max(pair.deliver(number, &[SMALL], &[SMALL]));
                number += 1;
            }
            (number - 1000, worst)
        });
        for round in 0..ROUNDS {
            let number = 1 + round;
            rig::fill(&pair.second, 90 + round, &pages(0..LARGE));
            let room = pair.open(number, &pages(0..LARGE), &pages(0..LARGE), WATCHDOG);
            until("bytes", || arrived(&pair.second, number) > 256 << 10);
            // Either side fences either lane.
            let lane = u8::try_from(round / 2 % 2).expect("small");
            let before = losses(&pair.first);
            let found = if round % 2 == 0 {
                pair.first.reset_lane(pair.to_second, lane)
            } else {
                pair.second.reset_lane(pair.to_first, lane)
            };
            assert!(found, "lane {lane} is there");
            rebuilt.push(until("a new queue pair", || {
                losses(&pair.first) > before && lanes(&pair.first).len() == LANES
            }));
            assert_eq!(room.results(), [Ok(()), Ok(())], "round {round}");
            let all = pages(0..LARGE);
            assert_eq!(rig::wrong(&pair.second, 3, &all, &all), 0, "round {round}");
        }
        is_over.store(true, Ordering::Relaxed);
        let (count, worst) = talker.join().expect("no small room failed");
        small = count;
        println!(
            "{}: rebuilt after {rebuilt:?}; {count} small rooms meanwhile, the slowest {worst:?}",
            path.name()
        );
    });
    assert!(small >= ROUNDS, "small rooms went on: {small}");
}

/// A whole peer's lanes at once, again and again: the rooms wait, and succeed.
fn all_at_once(path: Path, devices: [&str; 2]) {
    let pair = Pair::new(&config(path, 2), devices);
    until("both lanes", || lanes(&pair.first).len() == LANES);
    rig::fill(&pair.first, 5, &pages(0..LARGE));
    let all = pages(0..LARGE);
    let room = Room::open(
        [&pair.first, &pair.second],
        pair.to_first,
        1,
        [&all, &all],
        WATCHDOG,
    );
    for _ in 0..3 {
        let (before, moved) = (losses(&pair.first), arrived(&pair.second, 1));
        for lane in 0..2 {
            pair.first.reset_lane(pair.to_second, lane);
            pair.second.reset_lane(pair.to_first, lane);
        }
        until("both were lost", || losses(&pair.first) > before);
        until("new ones work", || {
            room.receive.result().is_some() || arrived(&pair.second, 1) > moved
        });
    }
    assert_eq!(room.results(), [Ok(()), Ok(())]);
    assert_eq!(rig::wrong(&pair.second, 5, &all, &all), 0);
    until("both lanes again", || lanes(&pair.first).len() == LANES);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn rooms_go_on_beside_a_rebuild_over_siw() {
    go_on(Path::Siw, ["siw0", "siw1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn rooms_go_on_beside_a_rebuild_over_rxe_compat() {
    go_on(Path::RxeCompat, ["rxe0", "rxe1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn rooms_go_on_beside_a_rebuild_over_rxe_standard() {
    go_on(Path::RxeStandard, ["rxe0", "rxe1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_room_outlives_the_loss_of_all_lanes_over_siw() {
    all_at_once(Path::Siw, ["siw0", "siw1"]);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_room_outlives_the_loss_of_all_lanes_over_rxe_compat() {
    all_at_once(Path::RxeCompat, ["rxe0", "rxe1"]);
}
