//! The engine's TCP listener before, during and after the handshake.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
};

use kvtransfer::{
    config::EngineConfig,
    ids::{Epoch, InstanceId},
    transfer::SendRequest,
    wire::control::{Control, FailureCode, Grant},
};

use super::{
    raw::{Raw, encoded, hello},
    rig,
    watch::{Dice, Watch},
};

/// Strangers that send a mutated first message; each is a connection and a thread.
const STRANGERS: u64 = 3_000;
/// Messages after a valid handshake.
const MESSAGES: u64 = 400_000;
/// Of them, each may end its connection: a new one follows.
const FATAL_EVERY: u64 = 2_000;

/// Sends what it has, and waits until the engine has read it all and hung up.
fn fling(address: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream
        .set_read_timeout(Some(rig::WATCHDOG))
        .expect("a socket");
    // It may have hung up already; then the rest is not worth sending.
    if stream.write_all(bytes).is_ok() {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut sink = [0; 4096];
    while stream.read(&mut sink).is_ok_and(|got| got > 0) {}
}

#[test]
fn first_messages_of_strangers() {
    let watch = Watch::start();
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let address = engine.local_addr().expect("it listens");
    let mut dice = Dice::new(1);
    let good_hello = encoded(&Control::Hello(Box::new(hello(1, 1))));
    let good_open = encoded(&Control::LaneOpen {
        instance: InstanceId([1; 16]),
        link: 1,
        lane: 0,
        token: vec![7; 40],
        can_pull: true,
    });
    for round in 0..STRANGERS {
        let bytes = match round % 5 {
            0 => {
                let len = dice.below(200);
                dice.bytes(len)
            }
            1 => {
                // The head says anything, the body is noise.
                let mut bytes = good_hello[..12].to_vec();
                dice.mutate(&mut bytes, 4);
                let len = dice.below(400);
                bytes.extend(dice.bytes(len));
                bytes
            }
            2 => {
                let mut bytes = good_open.clone();
                dice.mutate(&mut bytes, 5);
                bytes
            }
            3 => {
                let cut = usize::try_from(dice.below(good_hello.len() as u64)).expect("it fits");
                good_hello[..cut].to_vec()
            }
            _ => {
                let mut bytes = good_hello.clone();
                dice.mutate(&mut bytes, 12);
                bytes
            }
        };
        fling(address, &bytes);
    }
    println!("listener, before the handshake: {STRANGERS} frames");
    watch.check(&engine);
    assert!(engine.malformed() > 0, "they were counted");
}

/// A message that a welcomed peer might send, with odd numbers in it.
fn odd_message(dice: &mut Dice) -> Control {
    let room = match dice.below(3) {
        0 => dice.below(64),
        _ => dice.odd_number(),
    };
    let epoch = Epoch(dice.odd_u32() % 8);
    match dice.below(8) {
        0..=3 => Control::Grant(Grant {
            room,
            epoch,
            receivers_expected: u16::try_from(dice.odd_number() % 65_536).expect("it fits"),
            dummy: dice.below(4) == 0,
            prefix_tokens: dice.odd_u32(),
            items: (0..dice.below(4))
                .map(|_| {
                    let len = dice.below(9);
                    (0..len).map(|_| dice.odd_u32().cast_signed()).collect()
                })
                .collect(),
        }),
        4 | 5 => Control::RoomFailed {
            room,
            epoch,
            code: FailureCode::Cancelled,
            reason: "\u{7}\n\"{}%s\u{202e}"
                .repeat(usize::try_from(dice.below(20)).expect("it fits")),
        },
        6 => Control::Pong {
            nonce: dice.odd_number(),
        },
        _ => Control::Ping {
            nonce: dice.odd_number(),
        },
    }
}

/// Something that ends the connection.
fn fatal_bytes(dice: &mut Dice) -> Vec<u8> {
    let mut bytes = match dice.below(4) {
        0 => encoded(&Control::Hello(Box::new(hello(1, 1)))),
        1 => encoded(&Control::LaneReady { can_pull: true }),
        2 => {
            let len = 12 + dice.below(64);
            dice.bytes(len)
        }
        _ => encoded(&odd_message(dice)),
    };
    dice.mutate(&mut bytes, 0);
    // Whatever it has become, this is not the protocol.
    bytes.extend([0xEE; 64]);
    bytes
}

/// Reads whatever the engine says, so that it is never the engine that has to wait.
fn drain(raw: &Raw) -> thread::JoinHandle<()> {
    let mut stream = raw.stream.try_clone().expect("a descriptor");
    thread::spawn(move || {
        let mut sink = vec![0; 64 << 10];
        while stream.read(&mut sink).is_ok_and(|got| got > 0) {}
    })
}

#[test]
fn messages_of_a_welcomed_peer() {
    let watch = Watch::start();
    let mut config = rig::listening(EngineConfig::default());
    config.node.orphans_max = 1000;
    let engine = rig::start(config);
    let address = engine.local_addr().expect("it listens");
    let mut dice = Dice::new(2);
    let mut sent = 0;
    let mut connections = 0;
    while sent < MESSAGES {
        let mut raw = Raw::welcomed(address, 1, 1);
        connections += 1;
        let reader = drain(&raw);
        // Rooms that its grants can hit, as sender and as receiver.
        let open: Vec<_> = (1..32)
            .filter_map(|number| {
                let request = SendRequest {
                    room: rig::room(number),
                    timeout: rig::WATCHDOG,
                };
                engine.send(&request).ok()
            })
            .collect();
        let mut bytes = Vec::new();
        for _ in 0..FATAL_EVERY {
            odd_message(&mut dice).encode(&mut bytes);
            sent += 1;
        }
        bytes.extend(fatal_bytes(&mut dice));
        sent += 1;
        // The engine hangs up as soon as it sees the fatal one.
        let _ = raw.send(&bytes);
        let _ = raw.stream.shutdown(Shutdown::Write);
        reader.join().expect("no panic");
        drop(open);
    }
    println!("control stream: {sent} frames over {connections} connections");
    watch.check(&engine);
}
