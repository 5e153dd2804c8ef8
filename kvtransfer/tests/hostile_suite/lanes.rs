//! A data connection after a valid handshake: headers with good checksums and bad contents, acks, seals, pull lists.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
};

use kvtransfer::{
    config::EngineConfig,
    engine::{Engine, Transfer},
    ids::{Epoch, PeerId},
    transfer::{Chunk, SendRequest},
    wire::{
        control::{Control, Grant},
        lane::{Ack, AckStatus, BatchFields, BatchHeader, PayloadMode, Seal},
    },
};

use super::{
    raw::{Raw, open_lane},
    rig::{self, WATCHDOG},
    watch::{Dice, Watch},
};

const BATCHES: u64 = 400_000;
const PER_LANE: u64 = 4_000;

/// Reads acknowledgements away, so that the engine keeps reading.
fn drain(stream: &TcpStream) -> thread::JoinHandle<()> {
    let mut stream = stream.try_clone().expect("a descriptor");
    thread::spawn(move || {
        let mut sink = vec![0; 64 << 10];
        while stream.read(&mut sink).is_ok_and(|got| got > 0) {}
    })
}

/// Opens rooms granted to the raw peer, whose epochs it learns on its control stream.
fn open_rooms(engine: &Engine, raw: &mut Raw, peer: PeerId, first: u64) -> Vec<(Transfer, Epoch)> {
    let pages: Vec<i32> = (0..64).collect();
    (first..first + 16)
        .map(|number| {
            let request = rig::receive(number, peer, &pages, Some(0), WATCHDOG);
            let transfer = engine.receive(&request).expect("a free room");
            loop {
                match raw.hear().expect("a grant") {
                    Control::Grant(Grant { room, epoch, .. }) if room == number => {
                        return (transfer, epoch);
                    }
                    _ => {}
                }
            }
        })
        .collect()
}

/// A header for one of the rooms, right in most of its fields; the payload that it says follows.
fn odd_batch(dice: &mut Dice, rooms: &[(Transfer, Epoch)], out: &mut Vec<u8>) {
    let at = usize::try_from(dice.below(rooms.len() as u64)).expect("it fits");
    let (transfer, epoch) = &rooms[at];
    let mode = match dice.below(12) {
        0 => PayloadMode::Pull,
        _ => PayloadMode::Inline,
    };
    let mut fields = BatchFields {
        mode,
        last: dice.below(50) == 0,
        component: 0,
        room: transfer.room().number(),
        epoch: *epoch,
        seq: u32::try_from(dice.below(1 << 14)).expect("it fits"),
        window_start: 0,
        window_len: 4,
        offset: dice.below(1024) * 8,
        len: dice.below(64),
        place: dice.odd_number(),
    };
    match dice.below(24) {
        0 => fields.component = dice.roll().to_le_bytes()[0],
        1 => fields.window_start = dice.odd_u32(),
        2 => fields.window_len = dice.odd_u32() % 4097,
        3 => fields.offset = dice.odd_number(),
        4 => fields.len = dice.below(1 << 17),
        5 => fields.seq = dice.odd_u32() % (1 << 20),
        6 => fields.room = dice.odd_number(),
        7 => fields.epoch = Epoch(dice.odd_u32()),
        8 => fields.window_len = 0,
        _ => {}
    }
    out.extend(BatchHeader::new(fields).to_bytes());
    match mode {
        PayloadMode::Inline => {
            out.resize(
                out.len() + usize::try_from(fields.len).expect("it fits"),
                0x5A,
            );
            out.extend(Seal::new(fields.seq, dice.below(30) > 0).to_bytes());
        }
        _ => {
            out.extend(dice.roll().to_le_bytes());
            for _ in 0..fields.window_len {
                out.extend(dice.odd_u32().to_le_bytes());
            }
        }
    }
}

/// What ends the lane: damaged headers, wrong seals, ring batches without a ring, acks for nothing.
fn fatal_bytes(dice: &mut Dice, rooms: &[(Transfer, Epoch)]) -> Vec<u8> {
    let fields = BatchFields {
        mode: PayloadMode::Ring,
        last: true,
        component: 0,
        room: rooms[0].0.room().number(),
        epoch: rooms[0].1,
        seq: 0,
        window_start: 0,
        window_len: 1,
        offset: 0,
        len: 8,
        place: dice.odd_number(),
    };
    let mut bytes = match dice.below(4) {
        0 => BatchHeader::new(fields).to_bytes().to_vec(),
        1 => Ack::new(&BatchHeader::new(fields), AckStatus::Placed)
            .to_bytes()
            .to_vec(),
        2 => {
            let inline = BatchFields {
                mode: PayloadMode::Inline,
                ..fields
            };
            let mut bytes = BatchHeader::new(inline).to_bytes().to_vec();
            bytes.extend([0; 8]);
            bytes.extend(Seal::new(dice.odd_u32(), true).to_bytes());
            bytes
        }
        _ => {
            let mut bytes = BatchHeader::new(fields).to_bytes().to_vec();
            dice.mutate(&mut bytes, 0);
            bytes
        }
    };
    bytes.extend([0xEE; 128]);
    bytes
}

fn engine() -> (Engine, SocketAddr) {
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let address = engine.local_addr().expect("it listens");
    (engine, address)
}

#[test]
fn batches_of_a_welcomed_peer() {
    let watch = Watch::start();
    let (engine, address) = engine();
    let mut dice = Dice::new(3);
    let (mut sent, mut first) = (0, 1);
    let mut ends = std::collections::BTreeMap::<&str, u64>::new();
    while sent < BATCHES {
        let mut raw = Raw::welcomed(address, 1, 1);
        let (mut lane, ready) = open_lane(address, 1, 0, b"");
        assert!(matches!(ready, Control::LaneReady { .. }), "{ready:?}");
        let peer = engine
            .peers()
            .last()
            .expect("the raw peer is connected")
            .peer;
        let reader = drain(&lane.stream);
        let mut bytes = Vec::new();
        let mut all = Vec::new();
        for _ in 0..PER_LANE / 200 {
            let rooms = open_rooms(&engine, &mut raw, peer, first);
            first += rooms.len() as u64;
            for _ in 0..200 {
                odd_batch(&mut dice, &rooms, &mut bytes);
                sent += 1;
            }
            let _ = lane.send(&bytes);
            bytes.clear();
            all.extend(rooms);
        }
        let _ = lane.send(&fatal_bytes(&mut dice, &all));
        sent += 1;
        // Its only lane ended, so the peer is gone and everything with it.
        reader.join().expect("no panic");
        for (transfer, _) in all {
            let end = transfer.wait(WATCHDOG).expect("it ends");
            let name = end.as_ref().map_or_else(|error| error.name(), |_| "ok");
            *ends.entry(name).or_default() += 1;
        }
    }
    println!("lane, batches: {sent} frames, {first} rooms ended as {ends:?}");
    assert!(
        ends.contains_key("peer_misbehaved") && ends.contains_key("peer_failed"),
        "the deeper checks were reached: {ends:?}"
    );
    watch.check(&engine);
}

#[test]
fn acknowledgements_of_a_welcomed_peer() {
    const ROUNDS: u64 = 1500;
    let watch = Watch::start();
    let (engine, address) = engine();
    let mut dice = Dice::new(4);
    let (mut sent, mut wrong) = (0, 0);
    for round in 1..=ROUNDS {
        let mut raw = Raw::welcomed(address, 1, 1);
        let (mut lane, ready) = open_lane(address, 1, 0, b"");
        assert!(matches!(ready, Control::LaneReady { .. }), "{ready:?}");
        raw.say(&Control::Grant(Grant {
            room: round,
            epoch: Epoch(1),
            receivers_expected: 1,
            dummy: false,
            prefix_tokens: 0,
            items: vec![vec![1, 2, 3], vec![1]],
        }));
        let request = SendRequest {
            room: rig::room(round),
            timeout: WATCHDOG,
        };
        let transfer = engine.send(&request).expect("a free room");
        transfer.wait_ready(WATCHDOG).expect("a grant");
        let items = vec![Arc::from([4, 5, 6])];
        transfer
            .push(&Chunk { items, last: true })
            .expect("room for it");
        let mut header = [0; BatchHeader::LEN];
        lane.stream.read_exact(&mut header).expect("a batch");
        let header = BatchHeader::parse(&header).expect("well formed");
        let good = Ack::new(&header, AckStatus::Placed).to_bytes();
        let mut bytes = good.to_vec();
        match dice.below(4) {
            0 => bytes = Ack::new(&header, AckStatus::Discarded).to_bytes().to_vec(),
            1 => bytes.extend_from_slice(&good),
            2 => bytes = dice.bytes(64),
            _ => dice.mutate(&mut bytes, 4),
        }
        sent += 2;
        let _ = lane.stream.write_all(&bytes);
        drop(lane);
        let end = transfer.wait(WATCHDOG).expect("it ends");
        wrong += u64::from(end.is_err());
    }
    println!("lane, acknowledgements: {sent} frames, {wrong} of {ROUNDS} rooms failed");
    assert!(wrong > 0, "wrong answers fail the room");
    watch.check(&engine);
}
