//! Promise P5: a frozen peer with a full queue slows nobody else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use kvtransfer::{
    clock,
    engine::{Engine, Transfer},
    error::{SubmitError, TransferError},
    transfer::{Chunk, SendRequest},
    wire::control::Control,
};

use super::{
    child::{Other, Path},
    raw::{Raw, encoded},
    rig::{self, PAGES, WATCHDOG},
};

/// Blocks of transfers to the good peer, every second one with the other peer frozen.
const BLOCKS: u64 = 12;
/// Transfers per block.
const ROOMS: u64 = 150;
/// The goal is 1.5; two loaded cores need slack.
const RATIO_MAX: f64 = 5.0;
/// Below this, a ratio of two percentiles says more about the machine than about us.
const NOISE: Duration = Duration::from_millis(2);

fn open(engine: &Engine, number: u64) -> Transfer {
    let request = SendRequest {
        room: rig::room(number),
        timeout: WATCHDOG,
    };
    let transfer = engine.send(&request).expect("a free room");
    transfer.wait_ready(WATCHDOG).expect("a grant");
    transfer
}

/// Times single-page transfers to the good peer, from push to end.
fn block(engine: &Engine, good: &mut Other, us: u64, first: u64) -> Vec<Duration> {
    good.tell(&format!("serve {first} {ROOMS} {us}"));
    let timed = (first..first + ROOMS).map(|number| {
        let transfer = open(engine, number);
        let start = clock::now();
        let items = vec![Arc::from([1])];
        transfer
            .push(&Chunk { items, last: true })
            .expect("room for it");
        transfer.wait(WATCHDOG).expect("in time").expect("success");
        clock::now().since(start)
    });
    let timed = timed.collect();
    good.hear("served");
    timed
}

/// Freezes a peer in the middle of a room and pushes to it until its queue is full.
fn clog(engine: &Engine, bad: &mut Other, us: u64, number: u64) -> Transfer {
    bad.tell(&format!("receive {number} 20000 {us} 0..{PAGES} 1"));
    let transfer = open(engine, number);
    bad.freeze();
    for page in 0..i32::try_from(PAGES).expect("it fits") {
        let items = vec![Arc::from([page])];
        match transfer.push(&Chunk { items, last: false }) {
            Ok(()) => {}
            Err(SubmitError::Full { .. }) => return transfer,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the queue never filled");
}

fn p99(mut figures: Vec<Duration>) -> (Duration, Duration) {
    figures.sort();
    (
        figures[figures.len() / 2],
        figures[figures.len() * 99 / 100],
    )
}

fn frozen_neighbour(path: Path) {
    let mut config = rig::listening(path.config());
    config.node.queue_windows_max = 32;
    config.lane_window = 8;
    let engine = rig::start(config);
    let address = engine.local_addr().expect("it listens");
    let (mut good, mut bad) = (Other::start(path, None), Other::start(path, None));
    let us = good.connect(address);
    let us_too = bad.connect(address);
    let (mut calm, mut beside) = (Vec::new(), Vec::new());
    for at in 0..BLOCKS {
        let first = 1 + at * ROOMS;
        if at % 2 == 0 {
            calm.extend(block(&engine, &mut good, us, first));
        } else {
            let stuck = clog(&engine, &mut bad, us_too, 1_000_000 + at);
            beside.extend(block(&engine, &mut good, us, first));
            assert_eq!(stuck.result(), None, "it was stuck all the time");
            stuck.cancel();
            bad.thaw();
            let ended = bad.hear("ended");
            assert!(ended.starts_with("peer_failed"), "{ended}");
        }
    }
    let ((calm50, calm99), (beside50, beside99)) = (p99(calm), p99(beside));
    println!(
        "one page over {}: alone p50 {calm50:?} p99 {calm99:?}, beside a frozen peer p50 {beside50:?} p99 {beside99:?}",
        path.name()
    );
    let bound = calm99.max(NOISE).mul_f64(RATIO_MAX);
    assert!(beside99 <= bound, "p99 {calm99:?} became {beside99:?}");
}

/// A peer that talks without pause delays nobody's deadline.
#[test]
fn a_chattering_peer_delays_no_deadline() {
    const ROUNDS: u64 = 10;
    const DEADLINE: Duration = Duration::from_millis(60);
    let engine = rig::start(rig::listening(Path::Tcp.config()));
    let mut raw = Raw::welcomed(engine.local_addr().expect("it listens"), 1, 1);
    let chatter = encoded(&Control::Pong { nonce: 1 }).repeat(3000);
    let stop = AtomicBool::new(false);
    let (said, worst) = thread::scope(|scope| {
        let talker = scope.spawn(|| {
            let mut said = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                raw.send(&chatter).expect("it reads");
                said += 3000;
            }
            said
        });
        let late = (1..=ROUNDS).map(|number| {
            let start = clock::now();
            let request = SendRequest {
                room: rig::room(number),
                timeout: DEADLINE,
            };
            let transfer = engine.send(&request).expect("a free room");
            let end = transfer.wait(WATCHDOG).expect("it ends");
            assert!(matches!(end, Err(TransferError::Timeout { .. })), "{end:?}");
            clock::now().since(start).saturating_sub(DEADLINE)
        });
        let worst = late.max().expect("some rounds");
        stop.store(true, Ordering::Relaxed);
        (talker.join().expect("no panic"), worst)
    });
    println!("deadlines beside a chattering peer: late by at most {worst:?}; it said {said}");
    assert!(worst < Duration::from_millis(500), "{worst:?}");
}

#[test]
fn a_frozen_peer_slows_no_other_over_tcp() {
    frozen_neighbour(Path::Tcp);
}

#[test]
fn a_frozen_peer_slows_no_other_over_pull() {
    frozen_neighbour(Path::Pull);
}

#[test]
fn a_frozen_peer_slows_no_other_over_ring() {
    frozen_neighbour(Path::Ring);
}
