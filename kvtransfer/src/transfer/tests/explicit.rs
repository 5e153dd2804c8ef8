//! Rooms of explicit blocks at the node: whose they are, how many there may be, and how they are refused.

use super::{LONG, NOW, PEER, failures, messages, node, outputs, receive_request, room};
use crate::{
    error::{SubmitError, TransferError},
    ids::{Epoch, PeerId},
    layout::RegionId,
    plan::{
        blocks,
        descriptor::{Descriptor, Place},
        pairing::Pairing,
    },
    transfer::{NodeConfig, Output, SendRequest},
    wire::{
        blocks::{WRITES_MAX, WriteOpen},
        control::{Control, FailureCode},
    },
};
use std::{sync::Arc, time::Duration};

fn run() -> Descriptor {
    let place = Place {
        region: RegionId(0),
        offset: 8,
    };
    Descriptor {
        source: place,
        target: place,
        len: 16,
    }
}

fn open(number: u64) -> (WriteOpen, Arc<Pairing>) {
    let open = WriteOpen {
        room: number,
        timeout_ms: 5_000,
        blocks: vec![run()],
    };
    let pairing = blocks::pairing(&open.blocks, &[64], &[64]).expect("inside");
    (open, Arc::new(pairing))
}

#[test]
fn a_refusal_before_the_grant_ends_the_room_with_its_reason() {
    let mut writer = node(2, NodeConfig::default());
    let (request, pairing) = open(9);
    let id = writer
        .open_write(NOW, PEER, request.clone(), LONG, pairing)
        .expect("it opens");
    let asked = Control::WriteOpen(Box::new(request));
    assert_eq!(messages(&mut writer, PEER), [asked]);
    let refusal = |reason: &str| Control::RoomFailed {
        room: 9,
        epoch: Epoch(0),
        code: FailureCode::Misbehaved,
        reason: reason.into(),
    };
    writer.on_control(NOW, PeerId(2), refusal("a stranger's"));
    assert!(
        !outputs(&mut writer)
            .iter()
            .any(|o| matches!(o, Output::Ended { .. })),
        "another peer has no say"
    );
    writer.on_control(NOW, PEER, refusal("not here"));
    let error = TransferError::PeerFailed {
        code: FailureCode::Misbehaved,
        reason: "not here".into(),
    };
    let ended = Output::Ended {
        transfer: id,
        result: Err(error),
    };
    assert!(outputs(&mut writer).contains(&ended));
    assert_eq!(writer.audit().rooms, 0);
}

#[test]
fn the_writing_side_decides_when_it_is_too_late() {
    let mut writer = node(2, NodeConfig::default());
    let (request, pairing) = open(9);
    let own = Duration::from_millis(100);
    assert!(own < Duration::from_millis(request.timeout_ms.into()));
    let id = writer
        .open_write(NOW, PEER, request, own, pairing)
        .expect("it opens");
    writer.on_timeout(NOW + own);
    let ended = outputs(&mut writer).into_iter().find_map(|o| match o {
        Output::Ended { transfer, result } if transfer == id => Some(result),
        _ => None,
    });
    let error = ended.expect("it ends").expect_err("by its deadline");
    assert!(matches!(error, TransferError::Timeout { .. }), "{error:?}");
}

#[test]
fn a_grant_of_another_peer_gets_nothing() {
    let mut writer = node(2, NodeConfig::default());
    let (request, pairing) = open(9);
    writer
        .open_write(NOW, PEER, request, LONG, pairing)
        .expect("it opens");
    outputs(&mut writer);
    let mut thief = node(1, NodeConfig::default());
    let (request, pairing) = open(9);
    thief
        .accept_write(NOW, PEER, &request, pairing)
        .expect("it opens");
    for message in messages(&mut thief, PEER) {
        writer.on_control(NOW, PeerId(2), message);
    }
    let told = messages(&mut writer, PeerId(2));
    assert_eq!(failures(&told), [FailureCode::ItemMismatch]);
}

#[test]
fn numbers_of_peers_and_of_the_application_are_apart() {
    let mut written = node(2, NodeConfig::default());
    let number = room().number();
    let own = written
        .open_receive(NOW, &receive_request(vec![Arc::from([1])]))
        .expect("the application's room");
    let mut rooms = vec![own];
    for peer in [PEER, PeerId(2)] {
        let (request, pairing) = open(number);
        rooms.push(
            written
                .accept_write(NOW, peer, &request, pairing)
                .expect("it opens"),
        );
    }
    let (request, pairing) = open(number);
    let twice = written.accept_write(NOW, PEER, &request, pairing);
    assert_eq!(twice, Err(SubmitError::DuplicateRoom(room())));
    assert_eq!(written.audit().rooms, 3);
    for id in rooms {
        written.cancel(NOW, id, TransferError::Cancelled);
    }
    let audit = written.audit();
    assert_eq!((audit.rooms, audit.transfers), (0, 0));
}

#[test]
fn a_peer_has_so_many_rooms_at_once_and_no_more() {
    let mut written = node(2, NodeConfig::default());
    let mut rooms = Vec::new();
    for number in 1..=WRITES_MAX as u64 {
        let (request, pairing) = open(number);
        rooms.push(
            written
                .accept_write(NOW, PEER, &request, pairing)
                .expect("room for it"),
        );
    }
    let (request, pairing) = open(1000);
    let over = written.accept_write(NOW, PEER, &request, pairing);
    assert!(
        matches!(
            over,
            Err(SubmitError::Full {
                used: 32,
                limit: 32,
                ..
            })
        ),
        "{over:?}"
    );
    let (request, pairing) = open(1000);
    written
        .accept_write(NOW, PeerId(2), &request, pairing)
        .expect("another peer's own bound");
    written.cancel(NOW, rooms[0], TransferError::Cancelled);
    let (request, pairing) = open(1000);
    written
        .accept_write(NOW, PEER, &request, pairing)
        .expect("a place is free again");
}

#[test]
fn an_applications_room_of_that_number_is_not_taken() {
    let mut writer = node(1, NodeConfig::default());
    let request = SendRequest {
        room: room(),
        timeout: LONG,
    };
    writer.open_send(NOW, &request).expect("it opens");
    let (request, pairing) = open(room().number());
    let refused = writer.open_write(NOW, PEER, request, LONG, pairing);
    assert_eq!(refused, Err(SubmitError::DuplicateRoom(room())));
    let (request, pairing) = open(77);
    let refused = writer.open_write(NOW, PeerId(5), request, LONG, pairing);
    assert_eq!(refused, Err(SubmitError::UnknownPeer));
}
