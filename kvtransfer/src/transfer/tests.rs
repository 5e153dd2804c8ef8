//! Nodes wired together by hand: each test decides which message arrives when.

use std::{sync::Arc, time::Duration};

use super::{
    Admission, BatchOut, Chunk, LaneSetup, Node, NodeConfig, Output, PeerSetup, Placement,
    ReceiveRequest, SendRequest, Source,
};
use crate::{
    error::{SubmitError, TransferError},
    ids::{InstanceId, LaneId, PeerId, Room, TransferId},
    layout::Shard,
    plan::pairing::pair,
    testing::model::Model,
    time::Time,
    wire::{
        control::{Control, FailureCode, Grant},
        lane::{Ack, AckStatus, BatchHeader, PayloadMode},
    },
};

mod ebb;
mod explicit;

const NOW: Time = Time(1_000);
const LONG: Duration = Duration::from_secs(5);
/// How every node calls the one on the other side.
const PEER: PeerId = PeerId(1);

fn room() -> Room {
    Room::new(7).expect("not zero")
}

/// A node with `peers` peers, two lanes each, that all have the model's layout.
fn node(peers: u64, config: NodeConfig) -> Node {
    let (layout, _) = Model::default().rank(Shard::ONE, Shard::ONE);
    let pairing = Arc::new(pair(&layout, &layout).expect("the test fits"));
    let mut node = Node::new(config);
    for peer in 1..=peers {
        let setup = PeerSetup {
            instance: InstanceId([u8::try_from(peer).expect("the test fits"); 16]),
            address: String::new(),
            outgoing: Ok(Arc::clone(&pairing)),
            incoming: Ok(Arc::clone(&pairing)),
        };
        node.peer_up(NOW, PeerId(peer), setup);
        for lane in 0..2 {
            node.lane_up(PeerId(peer), LaneId(lane), lane_setup(1 << 20), 0);
        }
    }
    node
}

fn lane_setup(batch_bytes: u64) -> LaneSetup {
    LaneSetup {
        mode: PayloadMode::Inline,
        path: "test",
        path_reason: String::new(),
        batch_bytes,
        window: 4,
    }
}

fn receive_request(items: Vec<Arc<[i32]>>) -> ReceiveRequest {
    ReceiveRequest {
        room: room(),
        sources: vec![Source {
            peer: PEER,
            dummy: false,
        }],
        receivers_expected: 1,
        prefix_tokens: 3,
        items,
        timeout: LONG,
    }
}

fn outputs(node: &mut Node) -> Vec<Output> {
    std::iter::from_fn(|| node.poll_output()).collect()
}

/// The messages for peer `to`.
fn messages(node: &mut Node, to: PeerId) -> Vec<Control> {
    let all = outputs(node).into_iter();
    all.filter_map(|output| match output {
        Output::Control(peer, message) if peer == to => Some(message),
        _ => None,
    })
    .collect()
}

fn failures(messages: &[Control]) -> Vec<FailureCode> {
    let codes = messages.iter().filter_map(|message| match message {
        Control::RoomFailed { code, .. } => Some(*code),
        _ => None,
    });
    codes.collect()
}

/// A sender and a receiver with the room open on both, granted and ready.
fn ready(items: Vec<Arc<[i32]>>) -> (Node, TransferId, Node, TransferId) {
    let (mut sender, mut receiver) = (
        node(1, NodeConfig::default()),
        node(1, NodeConfig::default()),
    );
    let receive = receiver
        .open_receive(NOW, &receive_request(items))
        .expect("the test fits");
    let request = SendRequest {
        room: room(),
        timeout: LONG,
    };
    let send = sender.open_send(NOW, &request).expect("the test fits");
    for message in messages(&mut receiver, PEER) {
        sender.on_control(NOW, PEER, message);
    }
    let ready = Output::Ready {
        transfer: send,
        prefix_tokens: 3,
    };
    assert_eq!(outputs(&mut sender), [ready]);
    (sender, send, receiver, receive)
}

fn header(batch: &BatchOut) -> BatchHeader {
    BatchHeader::new(batch.fields)
}

/// The receiver takes a batch as a lane would; what it answers.
fn deliver(receiver: &mut Node, batch: &BatchOut) -> Ack {
    let header = header(batch);
    let status = match receiver.admit(NOW, PEER, &header) {
        Admission::Place(to) => receiver.placed(NOW, PEER, &header, &to, Placement::Placed),
        Admission::Discard => receiver.discarded(&header),
    };
    Ack::new(&header, status)
}

fn ended(node: &mut Node) -> Vec<Result<u64, TransferError>> {
    let all = outputs(node).into_iter();
    all.filter_map(|output| match output {
        Output::Ended { result, .. } => Some(result.map(|summary| summary.bytes)),
        _ => None,
    })
    .collect()
}

fn one_page() -> Chunk {
    Chunk {
        items: vec![Arc::from([4])],
        last: true,
    }
}

/// P2, P8: the last batch had arrived, only its acknowledgement was lost with the lane.
#[test]
fn a_last_batch_sent_again_after_its_room_succeeded_counts() {
    let (mut sender, send, mut receiver, _) = ready(vec![Arc::from([9])]);
    sender.push(NOW, send, &one_page()).unwrap();
    let first = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    deliver(&mut receiver, &first);
    let received = ended(&mut receiver);
    sender.lane_down(PEER, LaneId(0), "reset");
    let again = sender.next_batch(NOW, PEER, LaneId(1)).unwrap();
    assert_eq!(again.fields.seq, first.fields.seq);
    let ack = deliver(&mut receiver, &again);
    assert_eq!(ack.status(), AckStatus::Placed);
    sender.on_ack(NOW, PEER, LaneId(1), &ack).unwrap();
    assert_eq!(ended(&mut sender), received);
    assert!(received[0].is_ok());
}

/// The same, where both copies were admitted before either was placed.
#[test]
fn two_copies_of_a_last_batch_may_be_placed_at_once() {
    let (mut sender, send, mut receiver, _) = ready(vec![Arc::from([9])]);
    sender.push(NOW, send, &one_page()).unwrap();
    let header = header(&sender.next_batch(NOW, PEER, LaneId(0)).unwrap());
    let admit = |receiver: &mut Node| match receiver.admit(NOW, PEER, &header) {
        Admission::Place(to) => to,
        Admission::Discard => panic!("the room is live"),
    };
    let (one, two) = (admit(&mut receiver), admit(&mut receiver));
    for to in [&one, &two] {
        let status = receiver.placed(NOW, PEER, &header, to, Placement::Placed);
        assert_eq!(status, AckStatus::Placed);
    }
}

/// A batch of a room that failed is never acknowledged as placed (promise P8).
#[test]
fn a_batch_of_a_failed_room_is_discarded() {
    let (mut sender, send, mut receiver, receive) = ready(vec![Arc::from([9])]);
    sender.push(NOW, send, &one_page()).unwrap();
    let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    receiver.cancel(NOW, receive, TransferError::Cancelled);
    let ack = deliver(&mut receiver, &batch);
    assert_eq!(ack.status(), AckStatus::Discarded);
    sender.on_ack(NOW, PEER, LaneId(0), &ack).unwrap();
    assert_eq!(
        ended(&mut sender),
        [],
        "the receiver's reason may be on its way"
    );
    let refused = sender.push(NOW, send, &one_page());
    assert!(matches!(refused, Err(SubmitError::Ended(_))), "{refused:?}");
    sender.on_timeout(sender.next_timeout());
    assert!(matches!(
        ended(&mut sender)[..],
        [Err(TransferError::PeerFailed { .. })]
    ));
}

/// The receiver's reason counts, even if the answer to a batch overtook it.
#[test]
fn the_reason_of_a_discarded_batch_reaches_the_sender() {
    let (mut sender, send, mut receiver, receive) = ready(vec![Arc::from([9])]);
    sender.push(NOW, send, &one_page()).unwrap();
    let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    let why = TransferError::Memory {
        op: "test",
        errno: 5,
    };
    receiver.cancel(NOW, receive, why);
    let ack = deliver(&mut receiver, &batch);
    sender.on_ack(NOW, PEER, LaneId(0), &ack).unwrap();
    for output in outputs(&mut receiver) {
        if let Output::Control(_, message) = output {
            sender.on_control(NOW, PEER, message);
        }
    }
    let end = ended(&mut sender);
    let [Err(TransferError::PeerFailed { code, .. })] = &end[..] else {
        panic!("{end:?}");
    };
    assert_eq!(*code, FailureCode::Memory);
}

/// A room without any bytes, granted without any list, is concluded by an empty batch.
#[test]
fn an_empty_room_succeeds_without_item_lists() {
    let (mut sender, send, mut receiver, _) = ready(Vec::new());
    let nothing = Chunk {
        items: Vec::new(),
        last: true,
    };
    sender.push(NOW, send, &nothing).unwrap();
    let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    let ack = deliver(&mut receiver, &batch);
    sender.on_ack(NOW, PEER, LaneId(0), &ack).unwrap();
    assert_eq!(ended(&mut receiver), [Ok(0)]);
    assert_eq!(ended(&mut sender), [Ok(0)]);
}

fn grant(epoch: u32, expected: u16) -> Control {
    Control::Grant(Grant {
        room: room().number(),
        epoch: crate::ids::Epoch(epoch),
        receivers_expected: expected,
        dummy: false,
        prefix_tokens: 0,
        items: vec![vec![1]],
    })
}

fn give_up(epoch: u32) -> Control {
    Control::RoomFailed {
        room: room().number(),
        epoch: crate::ids::Epoch(epoch),
        code: FailureCode::Timeout,
        reason: "enough".into(),
    }
}

/// P2: one of two receivers gives up before the sender opens; the other is told, whether it granted before or after.
#[test]
fn the_other_receivers_of_a_room_learn_that_one_gave_up() {
    for grants_first in [true, false] {
        let mut sender = node(2, NodeConfig::default());
        let (one, two) = (PeerId(1), PeerId(2));
        sender.on_control(NOW, one, grant(5, 2));
        if grants_first {
            sender.on_control(NOW, two, grant(6, 2));
        }
        sender.on_control(NOW, one, give_up(5));
        if !grants_first {
            sender.on_control(NOW, two, grant(6, 2));
        }
        let told = failures(&messages(&mut sender, two));
        assert_eq!(
            told,
            [FailureCode::OtherPeer],
            "grants first: {grants_first}"
        );
        let request = SendRequest {
            room: room(),
            timeout: LONG,
        };
        sender.open_send(NOW, &request).unwrap();
        assert!(ended(&mut sender)[0].is_err(), "the sender fails at once");
    }
}

/// A peer named twice would owe its last batch twice and never conclude.
#[test]
fn a_source_named_twice_is_refused() {
    let mut receiver = node(1, NodeConfig::default());
    let mut request = receive_request(vec![Arc::from([1])]);
    request.sources.push(request.sources[0]);
    let refused = receiver.open_receive(NOW, &request);
    assert!(matches!(refused, Err(SubmitError::Items(why)) if why.contains("twice")));
    assert_eq!(receiver.audit().transfers, 0);
}

/// A batch cut for a lane with larger batches is the room's last one on any lane: it waits for the others (P6).
#[test]
fn a_large_last_batch_sent_again_waits_for_the_others() {
    let (mut sender, send, _, _) = ready(vec![Arc::from([9, 10])]);
    let half = |last, item: i32| Chunk {
        items: vec![Arc::from([item])],
        last,
    };
    sender.push(NOW, send, &half(false, 4)).unwrap();
    let first = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    sender.push(NOW, send, &half(true, 5)).unwrap();
    assert!(
        sender.next_batch(NOW, PEER, LaneId(1)).is_none(),
        "the last batch must follow the first on its lane"
    );
    sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    sender.lane_up(PEER, LaneId(1), lane_setup(16), 0);
    sender.lane_up(PEER, LaneId(2), lane_setup(16), 0);
    sender.lane_down(PEER, LaneId(0), "reset");
    let again = sender.next_batch(NOW, PEER, LaneId(1)).unwrap();
    assert_eq!(again.fields.seq, first.fields.seq);
    assert!(
        sender.next_batch(NOW, PEER, LaneId(2)).is_none(),
        "the first is not acknowledged yet"
    );
    assert!(sender.next_batch(NOW, PEER, LaneId(1)).unwrap().fields.last);
}

/// P4: each bound is reached, and says its numbers.
#[test]
fn a_full_queue_names_its_bound() {
    let config = NodeConfig {
        queue_windows_max: 2,
        ..NodeConfig::default()
    };
    let mut sender = node(1, config);
    let request = SendRequest {
        room: room(),
        timeout: LONG,
    };
    let send = sender.open_send(NOW, &request).unwrap();
    let Control::Grant(mut wide) = grant(1, 1) else {
        unreachable!()
    };
    wide.items = vec![(0..9).collect()];
    sender.on_control(NOW, PEER, Control::Grant(wide));
    let page = |item: i32| Chunk {
        items: vec![Arc::from([item])],
        last: false,
    };
    for item in 0..2 {
        sender.push(NOW, send, &page(item)).unwrap();
    }
    let full = sender.push(NOW, send, &page(2)).unwrap_err();
    let SubmitError::Full {
        used,
        limit,
        setting,
        ..
    } = full
    else {
        panic!("{full}");
    };
    assert_eq!((used, limit, setting), (2, 2, "queue_windows_max"));
    assert_eq!(sender.audit().queued_windows, 2);
    // One window goes to a lane, and there is room for exactly one.
    sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    sender.push(NOW, send, &page(2)).unwrap();
    assert!(sender.push(NOW, send, &page(3)).is_err());
}

/// P4: rooms remembered for absent senders are bounded; the grant over the bound is answered.
#[test]
fn orphans_are_bounded_and_answered() {
    let config = NodeConfig {
        orphans_max: 1,
        ..NodeConfig::default()
    };
    let mut sender = node(1, config);
    sender.on_control(NOW, PEER, grant(1, 1));
    let Control::Grant(mut other) = grant(2, 1) else {
        unreachable!()
    };
    other.room += 1;
    sender.on_control(NOW, PEER, Control::Grant(other));
    assert_eq!(failures(&messages(&mut sender, PEER)), [FailureCode::Busy]);
    sender.on_timeout(NOW + Duration::from_secs(30));
    let told = failures(&messages(&mut sender, PEER));
    assert_eq!(told, [FailureCode::NoSender]);
    assert_eq!(sender.audit().orphans, 0);
}
