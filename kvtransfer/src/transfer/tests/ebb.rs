//! Rooms that fail while a network card may still touch their pages: when exactly do they end?

use super::*;
use crate::ids::Epoch;

const LANES: u8 = 2;
const EBB: Duration = Duration::from_millis(10);

fn one_sided(window: usize) -> LaneSetup {
    LaneSetup {
        mode: PayloadMode::Write,
        window,
        ..lane_setup(1 << 20)
    }
}

/// The nodes of [`ready`], with queue pairs.
fn ready_pair(pages: usize) -> (Node, TransferId, Node, TransferId) {
    let items = (0..i32::try_from(pages).expect("the test fits")).collect();
    let (mut sender, send, mut receiver, receive) = ready(vec![items]);
    for lane in 0..LANES {
        sender.lane_up(PEER, LaneId(lane), one_sided(4), 0);
        receiver.lane_up(PEER, LaneId(lane), one_sided(4), 0);
    }
    (sender, send, receiver, receive)
}

fn page(item: i32, last: bool) -> Chunk {
    Chunk {
        items: vec![Arc::from([item])],
        last,
    }
}

/// Passes everything that one node says to the other; what else it wanted.
fn talk(from: &mut Node, to: &mut Node) -> Vec<Output> {
    let mut rest = Vec::new();
    while let Some(output) = from.poll_output() {
        match output {
            Output::Control(_, message) => to.on_control(NOW, PEER, message),
            output => rest.push(output),
        }
    }
    rest
}

fn has_ended(outputs: &[Output], id: TransferId) -> bool {
    let mut all = outputs.iter();
    all.any(|output| matches!(output, Output::Ended { transfer, .. } if *transfer == id))
}

fn is_stopping(outputs: &[Output], id: TransferId) -> bool {
    outputs.contains(&Output::Stopping { transfer: id })
}

fn fenced(outputs: &[Output]) -> Vec<u8> {
    let all = outputs.iter().filter_map(|output| match output {
        Output::Fence { peer, lane, .. } if *peer == PEER => Some(lane.0),
        _ => None,
    });
    all.collect()
}

/// What a sender tells a receiver of its batches.
fn stopped(messages: &[Control]) -> Vec<u32> {
    let counts = messages.iter().filter_map(|message| match message {
        Control::RoomStopped { batches, .. } => Some(*batches),
        _ => None,
    });
    counts.collect()
}

/// P1, P2: a receiver's deadline passes; it ends when the notices of all batches that were handed out have come.
#[test]
fn a_receiver_ends_when_a_live_sender_has_stopped() {
    let (mut sender, send, mut receiver, receive) = ready_pair(3);
    sender.push(NOW, send, &page(4, false)).unwrap();
    sender.push(NOW, send, &page(5, false)).unwrap();
    let first = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    let second = sender.next_batch(NOW, PEER, LaneId(1)).unwrap();
    deliver(&mut receiver, &first);
    receiver.on_timeout(NOW + LONG);
    let wanted = talk(&mut receiver, &mut sender);
    assert!(is_stopping(&wanted, receive) && !has_ended(&wanted, receive));
    let wanted = talk(&mut sender, &mut receiver);
    assert!(is_stopping(&wanted, send), "its card has two batches");
    assert!(
        !has_ended(&outputs(&mut receiver), receive),
        "a notice is missing"
    );
    let ack = deliver(&mut receiver, &second);
    assert_eq!(ack.status(), AckStatus::Discarded);
    let wanted = outputs(&mut receiver);
    assert!(has_ended(&wanted, receive) && fenced(&wanted).is_empty());
    assert_eq!(receiver.audit().ebbing, 0);
}

/// P1, P2: a packed batch whose room ends while its bytes are moved to the pages counts as come once that has stopped, and so
/// does one that could not be moved.
#[test]
fn a_batch_that_was_being_moved_when_its_room_ended_is_not_waited_for() {
    let device = TransferError::Device {
        reason: "broken".into(),
    };
    for placement in [Placement::GateClosed, Placement::Failed(device)] {
        let (mut sender, send, mut receiver, receive) = ready_pair(3);
        sender.push(NOW, send, &page(4, false)).unwrap();
        let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
        let header = BatchHeader::new(batch.fields);
        let Admission::Place(place) = receiver.admit(NOW, PEER, &header) else {
            panic!("the room is there");
        };
        if placement == Placement::GateClosed {
            receiver.on_timeout(NOW + LONG);
            assert!(is_stopping(&talk(&mut receiver, &mut sender), receive));
        }
        let status = receiver.placed(NOW, PEER, &header, &place, placement);
        assert_eq!(status, AckStatus::Discarded);
        let mut wanted = talk(&mut receiver, &mut sender);
        talk(&mut sender, &mut receiver);
        wanted.extend(outputs(&mut receiver));
        assert!(has_ended(&wanted, receive) && fenced(&wanted).is_empty());
        assert_eq!(receiver.audit().ebbing, 0);
    }
}

/// P2: a withdrawn batch overtakes its sender's reason, which is told all the same; without one the batch is reason enough.
#[test]
fn a_receiver_whose_batch_was_withdrawn_waits_a_moment_for_the_reason() {
    for has_reason in [true, false] {
        let (mut sender, send, mut receiver, receive) = ready_pair(3);
        sender.push(NOW, send, &page(4, false)).unwrap();
        let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
        let header = BatchHeader::new(batch.fields);
        let Admission::Place(place) = receiver.admit(NOW, PEER, &header) else {
            panic!("the room is there");
        };
        let status = receiver.placed(NOW, PEER, &header, &place, Placement::Void);
        assert_eq!(status, AckStatus::Discarded);
        assert!(outputs(&mut receiver).is_empty(), "not yet");
        if has_reason {
            let reason = "the device is broken".into();
            sender.cancel(NOW, send, TransferError::Device { reason });
        } else {
            receiver.on_timeout(receiver.next_timeout());
            talk(&mut receiver, &mut sender);
        }
        talk(&mut sender, &mut receiver);
        let wanted = outputs(&mut receiver);
        assert!(has_ended(&wanted, receive) && fenced(&wanted).is_empty());
        let words = if has_reason {
            "is broken"
        } else {
            "it withdrew pages"
        };
        let text = format!("{wanted:?}");
        assert!(text.contains(words), "{text}");
    }
}

/// P1, P2: the sender is frozen, so the queue pairs are destroyed; the room ends when all are.
#[test]
fn a_receiver_destroys_the_queue_pairs_of_a_frozen_sender() {
    let (_, _, mut receiver, receive) = ready_pair(1);
    let due = NOW + LONG;
    receiver.on_timeout(due);
    assert!(fenced(&outputs(&mut receiver)).is_empty());
    assert_eq!(receiver.next_timeout(), due + EBB);
    receiver.on_timeout(due + EBB);
    let wanted = outputs(&mut receiver);
    assert_eq!(fenced(&wanted), [0, 1]);
    receiver.lane_fenced(PEER, LaneId(0), "fenced");
    assert!(!has_ended(&outputs(&mut receiver), receive));
    receiver.lane_fenced(PEER, LaneId(1), "fenced");
    assert!(has_ended(&outputs(&mut receiver), receive));
}

/// A queue pair made after the failure is none that the room waits for.
#[test]
fn a_lane_that_comes_up_meanwhile_does_not_matter() {
    let (_, _, mut receiver, receive) = ready_pair(1);
    receiver.cancel(NOW, receive, TransferError::Cancelled);
    assert_eq!(receiver.lane_offered(PEER, LaneId(2)), 1);
    receiver.lane_up(PEER, LaneId(2), one_sided(4), 0);
    receiver.on_timeout(NOW + EBB);
    assert_eq!(fenced(&outputs(&mut receiver)), [0, 1]);
    for lane in 0..LANES {
        receiver.lane_fenced(PEER, LaneId(lane), "fenced");
    }
    assert!(has_ended(&outputs(&mut receiver), receive));
}

/// The peer may write through a queue pair before this side knows that it is up, and was told too few failures.
#[test]
fn a_room_that_fails_after_a_lane_was_offered_waits_for_it() {
    let (_, _, mut receiver, receive) = ready_pair(1);
    for lane in 0..LANES {
        receiver.lane_fenced(PEER, LaneId(lane), "lost");
        receiver.lane_down(PEER, LaneId(lane), "lost");
    }
    assert_eq!(receiver.lane_offered(PEER, LaneId(0)), 0);
    receiver.cancel(NOW, receive, TransferError::Cancelled);
    receiver.lane_up(PEER, LaneId(0), one_sided(4), 0);
    assert!(!has_ended(&outputs(&mut receiver), receive));
    receiver.lane_fenced(PEER, LaneId(0), "fenced");
    assert!(has_ended(&outputs(&mut receiver), receive));
}

/// P1: a sender's pages are its own again when its card is done with them, whatever the receiver says.
#[test]
fn a_cancelled_sender_waits_for_its_card() {
    let (mut sender, send, ..) = ready_pair(2);
    sender.push(NOW, send, &page(4, false)).unwrap();
    sender.push(NOW, send, &page(5, false)).unwrap();
    sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    sender.cancel(NOW, send, TransferError::Cancelled);
    let wanted = outputs(&mut sender);
    assert!(is_stopping(&wanted, send) && !has_ended(&wanted, send));
    sender.reaped(PEER, LaneId(0), 1);
    assert!(
        !has_ended(&outputs(&mut sender), send),
        "one of two is reaped"
    );
    sender.reaped(PEER, LaneId(0), 2);
    assert!(has_ended(&outputs(&mut sender), send));
}

/// The same, where the card never says so: only the lane that has its batches is destroyed.
#[test]
fn a_cancelled_sender_destroys_the_queue_pair_of_a_frozen_receiver() {
    let (mut sender, send, ..) = ready_pair(1);
    sender.push(NOW, send, &page(4, true)).unwrap();
    sender.next_batch(NOW, PEER, LaneId(1)).unwrap();
    sender.cancel(NOW, send, TransferError::Cancelled);
    sender.on_timeout(NOW + EBB);
    let wanted = outputs(&mut sender);
    assert_eq!(fenced(&wanted), [1]);
    assert!(!has_ended(&wanted, send));
    sender.lane_fenced(PEER, LaneId(1), "fenced");
    assert!(has_ended(&outputs(&mut sender), send));
}

/// A sender that has handed out nothing, or heard the answers to all, ends at once.
#[test]
fn a_sender_whose_card_is_idle_ends_at_once() {
    let (mut sender, send, mut receiver, _) = ready_pair(2);
    sender.push(NOW, send, &page(4, false)).unwrap();
    let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    let ack = deliver(&mut receiver, &batch);
    sender.on_ack(NOW, PEER, LaneId(0), &ack).unwrap();
    sender.cancel(NOW, send, TransferError::Cancelled);
    let wanted = outputs(&mut sender);
    assert!(has_ended(&wanted, send) && !is_stopping(&wanted, send));
}

/// P1: a lost control stream does not stop a card.
#[test]
fn a_lost_peer_ends_its_rooms_when_its_lanes_are_destroyed() {
    let (mut sender, send, mut receiver, receive) = ready_pair(1);
    sender.push(NOW, send, &page(4, true)).unwrap();
    sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    for (node, id) in [(&mut sender, send), (&mut receiver, receive)] {
        node.peer_down(NOW, PEER, "gone");
        let wanted = outputs(node);
        assert!(is_stopping(&wanted, id) && !has_ended(&wanted, id));
        node.lane_fenced(PEER, LaneId(1), "gone");
        assert!(!has_ended(&outputs(node), id));
        node.lane_fenced(PEER, LaneId(0), "gone");
        let end = ended(node);
        assert!(matches!(end[..], [Err(TransferError::PeerLost { .. })]));
        assert_eq!(node.audit().timers, 0);
    }
}

/// P1: the other end may still take writes, so a batch is not sent again before that end is gone too.
#[test]
fn batches_of_a_destroyed_end_wait_for_the_other_end() {
    let (mut sender, send, ..) = ready_pair(1);
    sender.push(NOW, send, &page(4, true)).unwrap();
    let first = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    sender.lane_fenced(PEER, LaneId(0), "lost");
    assert!(sender.next_batch(NOW, PEER, LaneId(1)).is_none());
    sender.lane_down(PEER, LaneId(0), "lost");
    let again = sender.next_batch(NOW, PEER, LaneId(1)).unwrap();
    assert_eq!(again.fields.seq, first.fields.seq);
}

/// P1: a batch that the receiver has counted is not written again, because its room may have ended with success. The
/// answers that were lost with the queue pair come with the news that the other end is gone, before `lane_down`.
#[test]
fn an_answer_can_be_heard_after_the_end_was_destroyed() {
    let (mut sender, send, mut receiver, _) = ready_pair(1);
    sender.push(NOW, send, &page(4, true)).unwrap();
    let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
    let ack = deliver(&mut receiver, &batch);
    assert!(ended(&mut receiver)[0].is_ok());
    sender.lane_fenced(PEER, LaneId(0), "lost");
    sender.on_ack(NOW, PEER, LaneId(0), &ack).unwrap();
    sender.lane_down(PEER, LaneId(0), "lost");
    assert!(ended(&mut sender)[0].is_ok());
    assert_eq!(sender.audit().queued_windows, 0);
}

/// P1: a room that ended with the old queue pair must not go on over the new one.
#[test]
fn a_new_lane_waits_for_the_failures_that_the_peer_has_declared() {
    let (mut sender, send, mut receiver, receive) = ready_pair(1);
    sender.push(NOW, send, &page(4, true)).unwrap();
    for node in [&mut sender, &mut receiver] {
        for lane in 0..LANES {
            node.lane_fenced(PEER, LaneId(lane), "lost");
            node.lane_down(PEER, LaneId(lane), "lost");
        }
    }
    receiver.cancel(NOW, receive, TransferError::Cancelled);
    let wanted = outputs(&mut receiver);
    assert!(
        has_ended(&wanted, receive),
        "no lane, so nothing to wait for"
    );
    let told = receiver.lane_offered(PEER, LaneId(0));
    assert_eq!(told, 1);
    sender.lane_up(PEER, LaneId(0), one_sided(4), told);
    assert!(sender.next_batch(NOW, PEER, LaneId(0)).is_none());
    for output in wanted {
        if let Output::Control(_, message) = output {
            sender.on_control(NOW, PEER, message);
        }
    }
    assert!(has_ended(&outputs(&mut sender), send));
    assert!(sender.next_batch(NOW, PEER, LaneId(0)).is_none());
    assert_eq!(sender.audit().queued_windows, 0);
}

/// P2: with every queue pair lost, the deadline says that there was no path.
#[test]
fn without_a_lane_the_deadline_names_the_path() {
    let (mut sender, send, ..) = ready_pair(1);
    sender.push(NOW, send, &page(4, true)).unwrap();
    for lane in 0..LANES {
        sender.lane_fenced(PEER, LaneId(lane), "retries exceeded");
        sender.lane_down(PEER, LaneId(lane), "retries exceeded");
        sender.lane_down(PEER, LaneId(lane), "heard of twice");
    }
    let wanted = outputs(&mut sender);
    let dropped = |output: &Output| matches!(output, Output::Disconnect { .. });
    assert!(
        !wanted.iter().any(dropped),
        "a queue pair is made anew: {wanted:?}"
    );
    sender.on_timeout(NOW + LONG);
    let end = ended(&mut sender);
    let [Err(TransferError::NoPath { reason, .. })] = &end[..] else {
        panic!("{end:?}");
    };
    assert_eq!(reason, "retries exceeded");
}

/// P3: this side names the addresses, so it checks what it was granted.
#[test]
fn a_grant_of_pages_that_do_not_exist_is_refused() {
    for item in [-1, i32::MAX] {
        let mut sender = node(1, NodeConfig::default());
        let Control::Grant(mut grant) = grant(3, 1) else {
            unreachable!()
        };
        grant.items = vec![vec![item]];
        sender.on_control(NOW, PEER, Control::Grant(grant));
        let told = failures(&messages(&mut sender, PEER));
        assert_eq!(told, [FailureCode::Misbehaved], "{item}");
        assert_eq!(sender.audit().orphans, 0);
    }
}

/// A receiver that gives up a room of which nothing was ever sent is told so, and ends without destroying anything, even
/// if all queue pairs were lost when it asked.
#[test]
fn of_an_unknown_room_no_batch_was_handed_out() {
    for is_lane_up in [true, false] {
        let mut sender = node(1, NodeConfig::default());
        sender.lane_up(PEER, LaneId(0), one_sided(4), 0);
        if !is_lane_up {
            sender.lane_fenced(PEER, LaneId(0), "lost");
            sender.lane_down(PEER, LaneId(0), "lost");
        }
        outputs(&mut sender);
        sender.on_control(NOW, PEER, give_up(9));
        assert_eq!(stopped(&messages(&mut sender, PEER)), [0], "{is_lane_up}");
    }
    let (_, _, mut receiver, receive) = ready_pair(1);
    receiver.cancel(NOW, receive, TransferError::Cancelled);
    let wanted = outputs(&mut receiver);
    let failed = wanted.iter().find_map(|output| match output {
        Output::Control(_, Control::RoomFailed { room, epoch, .. }) => Some((*room, *epoch)),
        _ => None,
    });
    let (number, epoch): (u64, Epoch) = failed.unwrap();
    let stop = Control::RoomStopped {
        room: number,
        epoch,
        batches: 0,
    };
    receiver.on_control(NOW, PEER, stop);
    assert!(has_ended(&outputs(&mut receiver), receive));
}

/// The count is of all batches ever handed out, and a second, smaller one changes nothing.
#[test]
fn a_stopped_sender_counts_every_batch() {
    let (mut sender, send, mut receiver, receive) = ready_pair(3);
    for item in 4..6 {
        sender.push(NOW, send, &page(item, false)).unwrap();
        let batch = sender.next_batch(NOW, PEER, LaneId(0)).unwrap();
        if item == 4 {
            deliver(&mut receiver, &batch);
        }
    }
    sender.cancel(NOW, send, TransferError::Cancelled);
    let told = messages(&mut sender, PEER);
    assert_eq!(stopped(&told), [2]);
    for message in told {
        receiver.on_control(NOW, PEER, message);
    }
    // It answers the receiver's own failure, which crossed its own.
    for message in messages(&mut receiver, PEER) {
        sender.on_control(NOW, PEER, message);
    }
    let told = messages(&mut sender, PEER);
    assert_eq!(stopped(&told), [0]);
    for message in told {
        receiver.on_control(NOW, PEER, message);
    }
    assert!(
        !has_ended(&outputs(&mut receiver), receive),
        "one of two came"
    );
}
