//! Promise P6: the aux row, and with it the room's number, becomes visible last. And a state never goes back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use kvtransfer::{
    engine::{Engine, Poll, Transfer},
    layout::RegionId,
    transfer::{Chunk, SendRequest},
};

use super::{
    child::Path,
    rig::{self, AUX, PAGES, WATCHDOG},
};

const ROOMS: u64 = 12;

fn pages() -> Vec<i32> {
    (0..i32::try_from(PAGES).expect("it fits")).collect()
}

fn room_word(engine: &Engine) -> u64 {
    let mut word = [0; 8];
    let aux = engine.region(RegionId(1)).expect("the aux region");
    aux.read_at(AUX - 8, &mut word).expect("in bounds");
    u64::from_le_bytes(word)
}

/// Looks at the room's word without pause, and at every page the moment it changes.
fn watch(engine: &Engine, seen: &AtomicU64, stop: &AtomicBool) -> Vec<(u64, usize)> {
    let mut sightings = Vec::new();
    let mut last = 0;
    while !stop.load(Ordering::Acquire) {
        let number = room_word(engine);
        if number != last {
            last = number;
            if number != 0 {
                let wrong = rig::wrong(engine, number, &pages(), &pages());
                sightings.push((number, wrong));
                seen.store(number, Ordering::Release);
            }
        }
    }
    sightings
}

fn aux_is_last(path: Path) {
    let sender = rig::start(rig::listening(path.config()));
    let receiver = Arc::new(rig::start(path.config()));
    let address = sender.local_addr().expect("it listens");
    let info = receiver.connect(address, WATCHDOG).expect("a connection");
    assert_eq!(info.path, path.name());
    let (seen, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let sightings = thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&receiver, &seen, &stop));
        for number in 1..=ROOMS {
            one_room(&sender, &receiver, &info, number);
            while seen.load(Ordering::Acquire) != number {
                assert!(!watcher.is_finished(), "the watcher ended early");
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Release);
        watcher.join().expect("no panic")
    });
    let expected: Vec<_> = (1..=ROOMS).map(|number| (number, 0)).collect();
    assert_eq!(
        sightings, expected,
        "(room, wrong pages when its number showed)"
    );
}

fn one_room(sender: &Engine, receiver: &Engine, info: &kvtransfer::engine::PeerInfo, number: u64) {
    rig::fill(sender, number, &pages());
    let aux = sender.region(RegionId(1)).expect("the aux region");
    aux.write_at(2 * AUX - 8, &number.to_le_bytes())
        .expect("in bounds");
    let request = rig::receive(number, info.peer, &pages(), Some(0), WATCHDOG);
    let there = receiver.receive(&request).expect("a free room");
    let request = SendRequest {
        room: rig::room(number),
        timeout: WATCHDOG,
    };
    let here = sender.send(&request).expect("a free room");
    here.wait_ready(WATCHDOG).expect("a grant");
    // Odd rooms in one chunk, even ones with the aux row in a chunk of its own.
    if number % 2 == 1 {
        let items = vec![Arc::from(pages()), Arc::from([1])];
        here.push(&Chunk { items, last: true })
            .expect("room for it");
    } else {
        for part in pages().chunks(56) {
            let items = vec![Arc::from(part)];
            here.push(&Chunk { items, last: false })
                .expect("room for it");
        }
        let items = vec![Arc::from([]), Arc::from([1])];
        here.push(&Chunk { items, last: true })
            .expect("room for it");
    }
    there.wait(WATCHDOG).expect("in time").expect("success");
    here.wait(WATCHDOG).expect("in time").expect("success");
}

#[test]
fn the_room_number_shows_last_over_tcp() {
    aux_is_last(Path::Tcp);
}

#[test]
fn the_room_number_shows_last_over_pull() {
    aux_is_last(Path::Pull);
}

#[test]
fn the_room_number_shows_last_over_ring() {
    aux_is_last(Path::Ring);
}

/// Every state that polling without pause sees until the end, each once for as long as it lasts.
fn states(transfer: &Transfer) -> Vec<u8> {
    let mut seen = Vec::new();
    loop {
        let state = transfer.poll();
        if seen.last() != Some(&(state as u8)) {
            seen.push(state as u8);
        }
        if matches!(state, Poll::Success | Poll::Failed) {
            return seen;
        }
    }
}

fn states_only_advance(path: Path) {
    let sender = rig::start(rig::listening(path.config()));
    let receiver = rig::start(path.config());
    let address = sender.local_addr().expect("it listens");
    let info = receiver.connect(address, WATCHDOG).expect("a connection");
    for number in 1..=400 {
        let request = rig::receive(number, info.peer, &pages()[..4], Some(0), WATCHDOG);
        let there = receiver.receive(&request).expect("a free room");
        let request = SendRequest {
            room: rig::room(number),
            timeout: WATCHDOG,
        };
        let here = sender.send(&request).expect("a free room");
        let seen = thread::scope(|scope| {
            let pollers = [&here, &there].map(|part| scope.spawn(|| states(part)));
            here.wait_ready(WATCHDOG).expect("a grant");
            let items = vec![Arc::from(&pages()[..4]), Arc::from([1])];
            here.push(&Chunk { items, last: true })
                .expect("room for it");
            pollers.map(|poller| poller.join().expect("no panic"))
        });
        for states in seen {
            assert!(states.is_sorted(), "room {number} went back: {states:?}");
            assert_eq!(states.last(), Some(&(Poll::Success as u8)), "room {number}");
        }
    }
}

#[test]
fn states_only_advance_over_tcp() {
    states_only_advance(Path::Tcp);
}

#[test]
fn states_only_advance_over_pull() {
    states_only_advance(Path::Pull);
}
