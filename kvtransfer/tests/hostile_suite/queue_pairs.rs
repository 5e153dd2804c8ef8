//! What a peer says while it opens a queue pair, and beside one.

use std::{net::SocketAddr, time::Duration};

use kvtransfer::{
    config::{EngineConfig, RdmaUse},
    engine::Engine,
    ids::{Epoch, InstanceId},
    testing::fake_verbs::{Behaviour, FakeVerbs},
    wire::{
        control::Control,
        lane::{Ack, AckStatus, BatchFields, BatchHeader, PayloadMode},
        rdma::{Connector, Endpoint, Landing, QpEnd, QpOpen, QpTerms, RECEIVES_MIN, RailOffer},
    },
};

use super::{
    raw::{Raw, encoded, hello},
    rig,
    watch::{Dice, Watch},
};

/// Queue pairs opened by strangers and by a peer that means harm.
const OPENS: u64 = 400;

fn engine(fake: &FakeVerbs) -> Engine {
    let mut config = rig::listening(EngineConfig::default());
    config.handshake_timeout = Duration::from_millis(200);
    config.rdma.usage = RdmaUse::Auto;
    config.rdma.fake = Some(fake.clone());
    rig::start(config)
}

/// A rail that fits the regions in [`hello`].
fn rail() -> RailOffer {
    RailOffer {
        name: "raw".into(),
        connector: Connector::Compat,
        imm: false,
        message_bytes_max: 1 << 30,
        chunk_bytes: 1 << 31,
        rkeys: vec![1, 2],
        staged: Vec::new(),
    }
}

/// Dials and is welcomed as an engine with one rail.
fn welcomed(address: SocketAddr) -> Raw {
    let mut raw = Raw::dial(address);
    let mut hello = hello(9, 4);
    hello.rails = vec![rail()];
    raw.say(&Control::Hello(Box::new(hello)));
    let answer = raw.hear().expect("an answer");
    let Control::Welcome(welcome) = answer else {
        panic!("not welcome: {answer:?}");
    };
    assert_eq!(welcome.rails.len(), 2, "it offers both fake devices");
    raw
}

/// Mostly the address of a device that is there.
fn gid(dice: &mut Dice, fake: &FakeVerbs) -> [u8; 16] {
    match dice.below(4) {
        0 => std::array::from_fn(|_| u8::try_from(dice.below(256)).expect("a byte")),
        device => fake
            .address(usize::from(device > 1))
            .to_ipv6_mapped()
            .octets(),
    }
}

fn open(dice: &mut Dice, fake: &FakeVerbs) -> QpOpen {
    let small = |dice: &mut Dice, bound: u64| u8::try_from(dice.below(bound)).expect("it fits");
    let end = match dice.below(4) {
        0 => QpEnd::Standard {
            address: [127, 0, 77, small(dice, 9)],
            port: 1,
            token: dice.odd_number(),
        },
        _ => QpEnd::Compat(Endpoint {
            qpn: dice.odd_u32() & 0x00ff_ffff,
            psn: dice.odd_u32() & 0x00ff_ffff,
            gid: gid(dice, fake),
            lid: 0,
            mtu: 1 + small(dice, 5),
        }),
    };
    QpOpen {
        instance: InstanceId([9; 16]),
        link: if dice.below(8) == 0 {
            dice.odd_number()
        } else {
            9
        },
        lane: small(dice, 16),
        token: Vec::new(),
        rail: small(dice, 2),
        peer_rail: small(dice, 3),
        terms: QpTerms {
            end,
            receives: RECEIVES_MIN,
            slots: (dice.odd_number(), dice.odd_u32()),
            landing: Landing {
                address: dice.odd_number(),
                rkey: dice.odd_u32(),
                bytes: dice.odd_u32(),
            },
        },
    }
}

fn down(dice: &mut Dice) -> Control {
    let header = BatchHeader::new(BatchFields {
        mode: PayloadMode::Write,
        last: dice.below(2) == 0,
        component: 0,
        room: dice.odd_number(),
        epoch: Epoch(dice.odd_u32()),
        seq: dice.odd_u32(),
        window_start: 0,
        window_len: 1,
        offset: 0,
        len: 1,
        place: 0,
    });
    let count = dice.below(4);
    Control::QpDown {
        reason: "\u{7}%s".into(),
        answered: dice.odd_number(),
        answers: (0..count)
            .map(|_| Ack::new(&header, AckStatus::Placed))
            .collect(),
    }
}

#[test]
fn words_while_a_queue_pair_opens_and_beside_it() {
    let watch = Watch::start();
    let fake = FakeVerbs::new(Behaviour::roce());
    let engine = engine(&fake);
    let address = engine.local_addr().expect("it listens");
    let mut dice = Dice::new(5);
    let (mut readied, mut refused, mut cut) = (0, 0, 0);
    let mut control = welcomed(address);
    for round in 0..OPENS {
        // A connection that was cut beside a live queue pair was the end of the peer, who comes again.
        let known = engine
            .peers()
            .iter()
            .any(|peer| peer.instance == InstanceId([9; 16]));
        if !known {
            control = welcomed(address);
        }
        let mut bytes = encoded(&Control::QpOpen(Box::new(open(&mut dice, &fake))));
        if round % 3 == 0 {
            dice.mutate(&mut bytes, 4);
        }
        let mut beside = Raw::dial(address);
        if beside.send(&bytes).is_err() {
            continue;
        }
        // Damage may have made it longer: then the engine waits for the rest until its patience ends.
        match beside.hear() {
            Some(Control::QpReady(_)) => readied += 1,
            Some(Control::Reject { .. }) => {
                refused += 1;
                continue;
            }
            Some(other) => panic!("it answered {other:?}"),
            None => {
                cut += 1;
                continue;
            }
        }
        let mut words = match dice.below(4) {
            0 => encoded(&down(&mut dice)),
            1 => {
                let len = dice.below(64);
                dice.bytes(len)
            }
            _ => encoded(&Control::QpUp),
        };
        if round % 2 == 0 {
            words.extend(encoded(&down(&mut dice)));
        }
        let _ = beside.send(&words);
        drop(beside);
    }
    drop(control);
    println!("{OPENS} queue pairs asked for: {readied} made, {refused} refused, {cut} hung up on");
    assert!(readied > 10 && refused > 10, "both happened");
    watch.check(&engine);
    let threads = fake
        .device_names()
        .iter()
        .map(|name| format!("kvt-rail-{name}"));
    // The kernel keeps 15 letters of a thread's name.
    let threads: Vec<String> = threads
        .map(|name| name.chars().take(15).collect())
        .collect();
    let threads: Vec<&str> = threads.iter().map(String::as_str).collect();
    watch.check_process(&threads);
    engine.shut_down();
    drop(engine);
    fake.fabric().assert_clean();
}
