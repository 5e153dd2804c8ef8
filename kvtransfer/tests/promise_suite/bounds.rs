//! Promise P4: every queue and table has a bound, and reaching it is a sentence.

use std::{sync::Arc, time::Duration};

use kvtransfer::{
    clock,
    config::EngineConfig,
    engine::{ConnectError, Engine},
    error::{SubmitError, TransferError},
    ids::Epoch,
    transfer::{Chunk, SendRequest},
    wire::control::{Control, FailureCode, Grant},
};

use super::{
    child::{Other, Path},
    raw::{Raw, encoded, hello, open_lane},
    rig::{self, WATCHDOG},
};

fn send(number: u64) -> SendRequest {
    SendRequest {
        room: rig::room(number),
        timeout: WATCHDOG,
    }
}

/// Pushes single pages to a frozen peer until the engine refuses one; the refusal.
fn push_until_full(change: impl FnOnce(&mut EngineConfig)) -> SubmitError {
    let mut config = rig::listening(Path::Tcp.config());
    change(&mut config);
    let engine = rig::start(config);
    let mut frozen = Other::start(Path::Tcp, None);
    let us = frozen.connect(engine.local_addr().expect("it listens"));
    frozen.tell(&format!("receive 1 20000 {us} 0..{} 1", rig::PAGES));
    let transfer = engine.send(&send(1)).expect("a free room");
    transfer.wait_ready(WATCHDOG).expect("a grant");
    frozen.freeze();
    for page in 0..i32::try_from(rig::PAGES).expect("it fits") {
        let items = vec![Arc::from([page])];
        if let Err(error) = transfer.push(&Chunk { items, last: false }) {
            return error;
        }
    }
    panic!("{} pages to a frozen peer were all taken", rig::PAGES);
}

#[test]
fn a_queue_of_windows_is_full_exactly_at_its_bound() {
    // One unacknowledged batch per lane: what is over that stays queued.
    let error = push_until_full(|config| {
        config.lane_window = 1;
        config.node.queue_windows_max = 10;
    });
    let SubmitError::Full {
        used,
        asked,
        limit,
        setting,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(
        (used, asked, limit, setting),
        (10, 1, 10, "queue_windows_max")
    );
}

#[test]
fn a_queue_of_bytes_is_full_exactly_at_its_bound() {
    let page = rig::BUFFERS * rig::PAGE;
    let error = push_until_full(|config| {
        config.lane_window = 1;
        config.node.queue_bytes_max = 12 * page;
    });
    let SubmitError::Full {
        used,
        asked,
        limit,
        setting,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(
        (used, asked, limit, setting),
        (12 * page, page, 12 * page, "queue_bytes_max")
    );
}

#[test]
fn the_table_of_transfers_is_full_exactly_at_its_bound() {
    let mut config = EngineConfig::default();
    config.node.transfers_max = 8;
    let engine = rig::start(config);
    let mut open: Vec<_> = (1..=8)
        .map(|number| engine.send(&send(number)).expect("room for it"))
        .collect();
    let error = engine.send(&send(9)).expect_err("the ninth");
    assert!(
        matches!(
            error,
            SubmitError::Full {
                used: 8,
                asked: 1,
                limit: 8,
                setting: "transfers_max",
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("raise transfers_max"), "{error}");
    open.pop();
    engine.send(&send(9)).expect("a place was given back");
}

#[test]
fn grants_without_a_sender_are_kept_up_to_their_bound() {
    let mut config = rig::listening(EngineConfig::default());
    config.node.orphans_max = 4;
    let engine = rig::start(config);
    let mut raw = Raw::welcomed(engine.local_addr().expect("it listens"), 1, 1);
    for number in 1..=5 {
        raw.say(&Control::Grant(grant(number, 1)));
    }
    let Some(Control::RoomFailed {
        room, code, reason, ..
    }) = raw.hear_news()
    else {
        panic!("no refusal");
    };
    assert_eq!((room, code), (5, FailureCode::Busy));
    assert!(reason.contains("already 4 rooms"), "{reason}");
    // The kept ones are good, and make room when they are taken.
    let taken = engine.send(&send(3)).expect("a free room");
    taken
        .wait_ready(WATCHDOG)
        .expect("the grant was there first");
    raw.say(&Control::Grant(grant(6, 1)));
    let next = engine.send(&send(6)).expect("a free room");
    next.wait_ready(WATCHDOG).expect("it was kept");
}

fn grant(number: u64, epoch: u32) -> Grant {
    Grant {
        room: number,
        epoch: Epoch(epoch),
        receivers_expected: 1,
        dummy: false,
        prefix_tokens: 0,
        items: vec![vec![0, 1, 2]],
    }
}

#[test]
fn grants_of_a_lost_peer_keep_no_places() {
    let mut config = rig::listening(EngineConfig::default());
    config.node.orphans_max = 4;
    let engine = rig::start(config);
    let address = engine.local_addr().expect("it listens");
    let mut lost = Raw::welcomed(address, 1, 1);
    for number in 1..=4 {
        lost.say(&Control::Grant(grant(number, 1)));
    }
    lost.say(&Control::Ping { nonce: 1 });
    while !matches!(lost.hear(), Some(Control::Pong { .. })) {}
    drop(lost);
    let start = clock::now();
    while !engine.peers().is_empty() {
        assert!(clock::now().since(start) < WATCHDOG, "the peer is kept");
        std::thread::yield_now();
    }
    let mut good = Raw::welcomed(address, 2, 1);
    good.say(&Control::Grant(grant(9, 1)));
    good.say(&Control::Ping { nonce: 2 });
    let answer = good.hear();
    assert!(
        matches!(answer, Some(Control::Pong { .. })),
        "refused: {answer:?}"
    );
    let transfer = engine.send(&send(9)).expect("a free room");
    transfer.wait_ready(WATCHDOG).expect("it was kept");
}

#[test]
fn peers_that_hang_up_on_the_welcome_leave_nothing_behind() {
    let mut config = rig::listening(EngineConfig::default());
    // A ping would find out too.
    config.node.heartbeat = WATCHDOG;
    let engine = rig::start(config);
    let address = engine.local_addr().expect("it listens");
    for round in 0..200_u8 {
        let mut raw = Raw::dial(address);
        // Closing resets the connection, so that whatever the engine does next with it may fail.
        let linger = Some(Duration::ZERO);
        rustix::net::sockopt::set_socket_linger(&raw.stream, linger).expect("a socket");
        raw.say(&Control::Hello(Box::new(hello(round, 1))));
    }
    let start = clock::now();
    while !engine.peers().is_empty() {
        let waited = clock::now().since(start);
        assert!(
            waited < Duration::from_secs(4),
            "{} ghosts",
            engine.peers().len()
        );
        std::thread::yield_now();
    }
    assert!(works(&engine), "the engine still works");
}

#[test]
fn three_hundred_silent_strangers_keep_nobody_out() {
    let mut config = rig::listening(EngineConfig::default());
    config.strangers_max = 64;
    let engine = rig::start(config);
    let address = engine.local_addr().expect("it listens");
    let silent: Vec<_> = (0..300)
        .map(|_| std::net::TcpStream::connect(address).expect("it accepts"))
        .collect();
    let peer = rig::start(EngineConfig::default());
    let info = peer.connect(address, WATCHDOG).expect("it is let in");
    println!(
        "handshake among {} silent strangers: {:?}",
        silent.len(),
        info.handshake
    );
    assert!(
        info.handshake < Duration::from_secs(2),
        "{:?}",
        info.handshake
    );
    // The older ones had to give way. Reading tells an ended stream from an open one.
    let closed = silent.iter().filter(|stream| is_over(stream)).count();
    assert!(closed >= 300 - 64, "only {closed} of 300 were turned out");
}

fn is_over(mut stream: &std::net::TcpStream) -> bool {
    stream.set_nonblocking(true).expect("a socket");
    let got = std::io::Read::read(&mut stream, &mut [0]);
    got.map_or_else(
        |error| error.kind() != std::io::ErrorKind::WouldBlock,
        |_| true,
    )
}

#[test]
fn one_peer_too_many_is_told_so() {
    let mut config = rig::listening(EngineConfig::default());
    config.peers_max = 1;
    let engine = rig::start(config);
    let address = engine.local_addr().expect("it listens");
    let first = rig::start(EngineConfig::default());
    let second = rig::start(EngineConfig::default());
    first.connect(address, WATCHDOG).expect("room for one");
    let error = second.connect(address, WATCHDOG).expect_err("not for two");
    assert!(
        matches!(&error, ConnectError::Refused { reason, .. } if reason.contains("already 1 peers") && reason.contains("peers_max")),
        "{error}"
    );
    // The one that is in can come again.
    first
        .connect(address, WATCHDOG)
        .expect("it replaces itself");
}

/// A listener that takes its time at every step of the handshake.
#[test]
fn a_slow_handshake_ends_at_its_one_deadline() {
    const STEP: Duration = Duration::from_millis(300);
    const TIMEOUT: Duration = Duration::from_millis(500);
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for (step, stream) in listener.incoming().enumerate() {
            let mut stream = stream.expect("a connection");
            std::thread::sleep(STEP);
            let answer = if step == 0 {
                Control::Welcome(Box::new(hello(9, 2)))
            } else {
                Control::LaneReady { can_pull: false }
            };
            let _ = std::io::Write::write_all(&mut stream, &encoded(&answer));
            held.push(stream);
        }
    });
    let engine = rig::start(EngineConfig::default());
    let start = clock::now();
    let error = engine.connect(address, TIMEOUT).expect_err("too slow");
    let took = clock::now().since(start);
    println!("connecting with a deadline of {TIMEOUT:?} ended after {took:?}: {error}");
    assert!(took >= TIMEOUT, "{took:?}");
    // A whole step later it would have been waited for step by step.
    assert!(took < TIMEOUT + STEP / 2, "{took:?}");
    assert!(engine.peers().is_empty());
}

#[test]
fn waiting_beside_a_dead_lane_does_not_spin() {
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let address = engine.local_addr().expect("it listens");
    let mut raw = Raw::welcomed(address, 1, 2);
    let (mut first, ready) = open_lane(address, 1, 0, b"");
    assert!(matches!(ready, Control::LaneReady { .. }), "{ready:?}");
    raw.say(&Control::Grant(grant(3, 1)));
    let transfer = engine.send(&send(3)).expect("a free room");
    transfer.wait_ready(WATCHDOG).expect("a grant");
    let items = vec![Arc::from([1])];
    transfer
        .push(&Chunk { items, last: true })
        .expect("room for it");
    // It has been written to the first lane; the second, which never answers, inherits it.
    std::io::Read::read_exact(&mut first.stream, &mut [0; 64]).expect("a batch");
    let (_second, ready) = open_lane(address, 1, 1, b"");
    assert!(matches!(ready, Control::LaneReady { .. }), "{ready:?}");
    drop(first);
    let before = busy();
    let wall = Duration::from_millis(400);
    assert_eq!(transfer.wait(wall), None, "nobody acknowledges");
    let spent = busy() - before;
    println!("waiting {wall:?} beside a dead lane cost {spent:?} of processor time");
    assert!(spent < wall / 4, "{spent:?}");
}

/// Processor time of this thread.
fn busy() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("our own");
    // User and system time, in hundredths of a second (proc(5)); the name before them may hold spaces.
    let after = stat.rsplit(')').next().expect("a line");
    let ticks = after.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks
        .map(|word| word.parse::<u64>().expect("a number"))
        .sum();
    Duration::from_millis(ticks * 10)
}

#[test]
fn a_peer_that_does_not_read_its_control_stream_is_given_up() {
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let _deaf = Raw::welcomed(engine.local_addr().expect("it listens"), 1, 1);
    let peer = engine.peers()[0].peer;
    // Some 2 MiB of grant each: the outbox takes 32 MiB, the two sockets a few more.
    let pages: Vec<i32> = vec![1; 512 << 10];
    let mut open = Vec::new();
    let refused = (1..=64).find_map(|number| {
        let request = rig::receive(number, peer, &pages, None, WATCHDOG);
        engine
            .receive(&request)
            .map(|transfer| open.push(transfer))
            .err()
    });
    assert_eq!(refused, Some(SubmitError::UnknownPeer), "it is dropped");
    assert!((16..=32).contains(&open.len()), "{} grants", open.len());
    for transfer in &open {
        let end = transfer.wait(WATCHDOG).expect("it ends");
        assert!(
            matches!(&end, Err(TransferError::PeerLost { reason }) if reason.contains("does not read")),
            "{end:?}"
        );
    }
    assert!(works(&engine), "the engine still works");
}

/// Whether a good peer can move a page.
fn works(engine: &Engine) -> bool {
    let peer = rig::start(EngineConfig::default());
    let address = engine.local_addr().expect("it listens");
    let info = peer.connect(address, WATCHDOG).expect("it is let in");
    let request = rig::receive(77, info.peer, &[3], None, WATCHDOG);
    let there = peer.receive(&request).expect("a free room");
    let here = engine.send(&send(77)).expect("a free room");
    here.wait_ready(WATCHDOG).expect("a grant");
    let items = vec![Arc::from([5])];
    here.push(&Chunk { items, last: true })
        .expect("room for it");
    matches!(there.wait(WATCHDOG), Some(Ok(_)))
}
