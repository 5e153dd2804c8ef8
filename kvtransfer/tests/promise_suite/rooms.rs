//! Rooms and peers that come twice, late, or never: each has one clear outcome.

use std::{sync::Arc, time::Duration};

use kvtransfer::{
    config::EngineConfig,
    engine::{Engine, PeerInfo, Transfer},
    error::{SubmitError, TransferError},
    ids::{Epoch, InstanceId},
    transfer::{Chunk, SendRequest},
    wire::{
        control::{Control, FailureCode, Grant},
        lane::{Ack, AckStatus, BatchFields, BatchHeader, PayloadMode, Seal},
    },
};

use super::{
    child::{Other, Path},
    raw::{Raw, open_lane},
    rig::{self, WATCHDOG},
};

fn open_send(engine: &Engine, number: u64) -> Transfer {
    let request = SendRequest {
        room: rig::room(number),
        timeout: WATCHDOG,
    };
    engine.send(&request).expect("a free room")
}

fn push_page(transfer: &Transfer, page: i32) {
    let items = vec![Arc::from([page])];
    transfer
        .push(&Chunk { items, last: true })
        .expect("room for it");
}

fn pair() -> (Engine, Engine, PeerInfo) {
    let sender = rig::start(rig::listening(EngineConfig::default()));
    let receiver = rig::start(EngineConfig::default());
    let info = receiver
        .connect(sender.local_addr().expect("it listens"), WATCHDOG)
        .expect("a connection");
    (sender, receiver, info)
}

/// Moves page 5 of the sender to page 3 of the receiver.
fn move_page(sender: &Engine, receiver: &Engine, info: &PeerInfo, number: u64) {
    rig::fill(sender, number, &[5]);
    let request = rig::receive(number, info.peer, &[3], None, WATCHDOG);
    let there = receiver.receive(&request).expect("a free room");
    let here = open_send(sender, number);
    here.wait_ready(WATCHDOG).expect("a grant");
    push_page(&here, 5);
    there.wait(WATCHDOG).expect("in time").expect("success");
    here.wait(WATCHDOG).expect("in time").expect("success");
    assert_eq!(rig::wrong(receiver, number, &[5], &[3]), 0);
}

#[test]
fn a_grant_calls_back_once_and_an_end_without_one_never() {
    let (sender, receiver, info) = pair();
    let (told, heard) = std::sync::mpsc::sync_channel(4);
    let here = open_send(&sender, 40);
    let early = told.clone();
    here.on_ready(move |prefix_tokens| early.send(prefix_tokens).expect("room for it"));
    assert!(heard.try_recv().is_err(), "nothing is granted yet");
    let mut request = rig::receive(40, info.peer, &[3], None, WATCHDOG);
    request.prefix_tokens = 48;
    let there = receiver.receive(&request).expect("a free room");
    assert_eq!(heard.recv_timeout(WATCHDOG), Ok(48));
    // Asked late, called at once, in the caller's thread.
    let late = told.clone();
    here.on_ready(move |prefix_tokens| late.send(prefix_tokens + 1).expect("room for it"));
    assert_eq!(heard.try_recv(), Ok(49));
    there.cancel();

    let alone = open_send(&sender, 41);
    alone.on_ready(move |_| told.send(0).expect("room for it"));
    alone.cancel();
    drop((here, there, alone));
    // Every callback was called or dropped with its transfer.
    assert_eq!(
        heard.recv_timeout(WATCHDOG),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
    );
}

#[test]
fn a_room_in_use_is_refused_and_its_first_use_goes_on() {
    let (sender, receiver, info) = pair();
    let request = rig::receive(4, info.peer, &[3], None, WATCHDOG);
    let there = receiver.receive(&request).expect("a free room");
    let again = receiver.receive(&request).expect_err("in use");
    assert_eq!(again, SubmitError::DuplicateRoom(rig::room(4)));
    let here = open_send(&sender, 4);
    let request = SendRequest {
        room: rig::room(4),
        timeout: WATCHDOG,
    };
    let again = sender.send(&request).expect_err("in use");
    assert_eq!(again, SubmitError::DuplicateRoom(rig::room(4)));
    here.wait_ready(WATCHDOG).expect("a grant");
    push_page(&here, 5);
    there.wait(WATCHDOG).expect("in time").expect("success");
    here.wait(WATCHDOG).expect("in time").expect("success");
    // Free again, now that it is over.
    move_page(&sender, &receiver, &info, 4);
}

#[test]
fn a_second_receiver_of_the_same_room_is_told_so() {
    let (sender, receiver, info) = pair();
    let other = rig::start(EngineConfig::default());
    let address = sender.local_addr().expect("it listens");
    let to = other.connect(address, WATCHDOG).expect("a connection");
    let first = receiver
        .receive(&rig::receive(4, info.peer, &[3], None, WATCHDOG))
        .expect("a free room");
    let here = open_send(&sender, 4);
    here.wait_ready(WATCHDOG).expect("a grant");
    let second = other
        .receive(&rig::receive(4, to.peer, &[3], None, WATCHDOG))
        .expect("free on that engine");
    let end = second.wait(WATCHDOG).expect("at once");
    assert!(
        matches!(
            end,
            Err(TransferError::PeerFailed {
                code: FailureCode::DuplicateRoom,
                ..
            })
        ),
        "{end:?}"
    );
    push_page(&here, 5);
    first.wait(WATCHDOG).expect("in time").expect("success");
}

#[test]
fn a_room_that_nobody_sends_fails_with_no_sender() {
    let mut config = rig::listening(EngineConfig::default());
    config.node.orphan_ttl = Duration::from_millis(100);
    let sender = rig::start(config);
    let receiver = rig::start(EngineConfig::default());
    let address = sender.local_addr().expect("it listens");
    let info = receiver.connect(address, WATCHDOG).expect("a connection");
    let transfer = receiver
        .receive(&rig::receive(4, info.peer, &[3], None, WATCHDOG))
        .expect("a free room");
    let end = transfer.wait(WATCHDOG).expect("long before its deadline");
    assert!(
        matches!(&end, Err(TransferError::PeerFailed { code: FailureCode::NoSender, reason }) if reason.contains("room 4")),
        "{end:?}"
    );
}

fn grant(number: u64, epoch: u32) -> Control {
    Control::Grant(Grant {
        room: number,
        epoch: Epoch(epoch),
        receivers_expected: 1,
        dummy: false,
        prefix_tokens: 0,
        items: vec![vec![3]],
    })
}

#[test]
fn room_zero_is_refused_in_words_and_costs_nothing_else() {
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let mut raw = Raw::welcomed(engine.local_addr().expect("it listens"), 1, 1);
    raw.say(&grant(0, 1));
    let Some(Control::RoomFailed {
        room, code, reason, ..
    }) = raw.hear_news()
    else {
        panic!("no answer");
    };
    assert_eq!((room, code), (0, FailureCode::Misbehaved));
    assert!(reason.contains("room 0 is reserved"), "{reason}");
    raw.say(&grant(8, 2));
    let transfer = open_send(&engine, 8);
    transfer
        .wait_ready(WATCHDOG)
        .expect("its other rooms are fine");
}

#[test]
fn late_words_about_a_finished_room_do_not_touch_its_next_use() {
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let mut raw = Raw::welcomed(engine.local_addr().expect("it listens"), 1, 1);
    raw.say(&grant(8, 1));
    let first = open_send(&engine, 8);
    first.wait_ready(WATCHDOG).expect("a grant");
    first.cancel();
    let told = raw.hear_news();
    assert!(
        matches!(
            told,
            Some(Control::RoomFailed {
                room: 8,
                epoch: Epoch(1),
                ..
            })
        ),
        "{told:?}"
    );
    raw.say(&grant(8, 2));
    let second = open_send(&engine, 8);
    second.wait_ready(WATCHDOG).expect("a grant");
    let failed = |epoch| Control::RoomFailed {
        room: 8,
        epoch: Epoch(epoch),
        code: FailureCode::Cancelled,
        reason: "changed its mind".into(),
    };
    raw.say(&failed(1));
    // A duplicate of the good grant, a grant of an earlier use, and a pong to know that all were read.
    raw.say(&grant(8, 2));
    raw.say(&grant(8, 1));
    let refused = raw.hear_news();
    assert!(
        matches!(
            refused,
            Some(Control::RoomFailed {
                epoch: Epoch(1),
                code: FailureCode::DuplicateRoom,
                ..
            })
        ),
        "{refused:?}"
    );
    assert_eq!(second.result(), None, "the second use lives");
    raw.say(&failed(2));
    let end = second.wait(WATCHDOG).expect("at once");
    assert!(
        matches!(
            end,
            Err(TransferError::PeerFailed {
                code: FailureCode::Cancelled,
                ..
            })
        ),
        "{end:?}"
    );
}

#[test]
fn a_batch_for_an_unknown_room_is_thrown_away_and_answered() {
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let address = engine.local_addr().expect("it listens");
    let _control = Raw::welcomed(address, 1, 1);
    let (mut lane, ready) = open_lane(address, 1, 0, b"");
    assert!(matches!(ready, Control::LaneReady { .. }), "{ready:?}");
    for seq in 0..3 {
        let header = BatchHeader::new(BatchFields {
            mode: PayloadMode::Inline,
            last: true,
            component: 0,
            room: 12345,
            epoch: Epoch(9),
            seq,
            window_start: 0,
            window_len: 1,
            offset: 0,
            len: 4096,
            place: 0,
        });
        lane.send(&header.to_bytes()).expect("it reads");
        lane.send(&[7; 4096]).expect("it reads");
        lane.send(&Seal::new(seq, true).to_bytes())
            .expect("it reads");
        let mut answer = [0; Ack::LEN];
        std::io::Read::read_exact(&mut lane.stream, &mut answer).expect("an answer");
        let ack = Ack::parse(&answer).expect("well formed");
        assert_eq!(
            (ack.status(), ack.room, ack.seq),
            (AckStatus::Discarded, 12345, seq)
        );
    }
}

#[test]
fn a_peer_that_connects_again_replaces_itself() {
    let (sender, receiver, info) = pair();
    let request = rig::receive(4, info.peer, &[3], None, WATCHDOG);
    let caught = receiver.receive(&request).expect("a free room");
    let sending = open_send(&sender, 4);
    sending.wait_ready(WATCHDOG).expect("a grant");
    let address = sender.local_addr().expect("it listens");
    let again = receiver.connect(address, WATCHDOG).expect("a connection");
    assert_ne!(again.peer, info.peer, "connections are never renumbered");
    for transfer in [&caught, &sending] {
        let end = transfer.wait(WATCHDOG).expect("at once");
        assert!(
            matches!(end, Err(TransferError::PeerLost { .. })),
            "{end:?}"
        );
    }
    assert_eq!(sender.peers().len(), 1, "one engine, one connection");
    move_page(&sender, &receiver, &again, 4);
}

#[test]
fn a_peer_restarted_at_its_old_address_is_a_new_peer() {
    let receiver = rig::start(Path::Tcp.config());
    let mut first = Other::start(Path::Tcp, Some(([127, 0, 0, 1], 0).into()));
    let address = first.address();
    let known = receiver.connect(address, WATCHDOG).expect("a connection");
    let request = rig::receive(4, known.peer, &[3], Some(1), WATCHDOG);
    let moved = receiver.receive(&request).expect("a free room");
    first.tell("send 4 20000 5..6 1 0");
    moved.wait(WATCHDOG).expect("in time").expect("success");
    let request = rig::receive(5, known.peer, &[3], Some(1), WATCHDOG);
    let caught = receiver.receive(&request).expect("a free room");
    first.kill();
    let end = caught.wait(WATCHDOG).expect("at once");
    assert!(
        matches!(end, Err(TransferError::PeerLost { .. })),
        "{end:?}"
    );
    drop(first);
    let mut second = Other::start(Path::Tcp, Some(address));
    assert_eq!(second.address(), address);
    let late = receiver
        .receive(&request)
        .expect_err("the old peer is gone");
    assert_eq!(late, SubmitError::UnknownPeer);
    let new = receiver.connect(address, WATCHDOG).expect("a connection");
    assert_ne!(new.instance, known.instance);
    assert_ne!(new.instance, InstanceId([0; 16]));
    let request = rig::receive(5, new.peer, &[3], Some(1), WATCHDOG);
    let fresh = receiver.receive(&request).expect("a free room");
    second.tell("fill 8 0..8");
    second.hear("filled");
    second.tell("send 5 20000 5..6 1 0");
    fresh.wait(WATCHDOG).expect("in time").expect("success");
    assert_eq!(rig::wrong(&receiver, 8, &[5], &[3]), 0);
}
