//! How rooms end: by success, by either side, by the clock, by a bound (promises P1, P2, P4, P8).

use std::time::Duration;

use super::{Bench, Deal, Fabric, Outcome, SOON, room, to_send};
use crate::{
    error::{SubmitError, TransferError},
    testing::model::Model,
    transfer::{Chunk, NodeConfig},
    wire::control::FailureCode,
};

/// Long enough for late bytes to land, if any were on their way.
const LATE: Duration = Duration::from_millis(50);
const SHORT: Duration = Duration::from_millis(40);

fn failure(outcome: Option<Outcome>) -> TransferError {
    let outcome = outcome.expect("it ends in time");
    outcome.expect_err("it fails")
}

fn code(outcome: Option<Outcome>) -> FailureCode {
    match failure(outcome) {
        TransferError::PeerFailed { code, .. } => code,
        other => panic!("the peer ended it, but: {other}"),
    }
}

/// A room with many bytes, of which the first chunk is pushed and more are to come.
fn under_way<F: Fabric>() -> (Bench<F>, Deal, F::Transfer, F::Transfer) {
    let model = Model {
        pages: 512,
        page_size: 16,
        head_bytes: 64,
        ..Model::default()
    };
    let mut bench = Bench::<F>::duo(&model);
    let deal = Deal::new(&model, 20, &[250, 250]);
    bench.fill(1);
    bench.fill_rank(1, 2);
    let receive = bench.receive(&deal);
    let send = bench.send(deal.room);
    bench.fabric.wait_ready(&send).expect("it is granted");
    bench
        .fabric
        .push(&send, &deal.pushes()[0])
        .expect("it is taken");
    (bench, deal, send, receive)
}

/// The receiver's application takes its pages back; nobody may touch them any more.
fn poison_and_wait<F: Fabric>(bench: &mut Bench<F>) {
    bench.fill_rank(1, 3);
    let before = bench.image(1);
    bench.fabric.pass(LATE);
    assert!(before == bench.image(1), "P1: late bytes");
    // The connection is as good as before.
    let model = Model {
        pages: 512,
        page_size: 16,
        head_bytes: 64,
        ..Model::default()
    };
    bench.run(&Deal::new(&model, 21, &[3]));
}

/// P1, P2: the sender cancels in the middle; the receiver learns it, and no byte lands after.
pub fn cancelled_by_the_sender<F: Fabric>() {
    let (mut bench, deal, send, receive) = under_way::<F>();
    bench.fabric.cancel(&send);
    assert_eq!(
        failure(bench.fabric.wait(&send, SOON)),
        TransferError::Cancelled
    );
    let refused = bench.fabric.push(&send, &deal.pushes()[1]);
    assert!(matches!(refused, Err(SubmitError::Ended(_))), "{refused:?}");
    // The source's pages are written by other requests at once.
    bench.fill_rank(0, 9);
    assert_eq!(
        code(bench.fabric.wait(&receive, SOON)),
        FailureCode::Cancelled
    );
    poison_and_wait(&mut bench);
}

/// P1, P2: the receiver cancels in the middle.
pub fn cancelled_by_the_receiver<F: Fabric>() {
    let (mut bench, deal, send, receive) = under_way::<F>();
    bench.fabric.cancel(&receive);
    bench.fill_rank(1, 3);
    let before = bench.image(1);
    // It may or may not have heard already.
    let _ = bench.fabric.push(&send, &deal.pushes()[1]);
    assert_eq!(code(bench.fabric.wait(&send, SOON)), FailureCode::Cancelled);
    assert!(before == bench.image(1), "P1: bytes after the cancellation");
    poison_and_wait(&mut bench);
}

/// P2: nobody opens the sending side.
pub fn deadline_without_sender<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let mut request = bench.receive_of(1, &Deal::new(&model, 22, &[4]));
    request.timeout = SHORT;
    let receive = bench.fabric.receive(1, &request).expect("it opens");
    let error = failure(bench.fabric.wait(&receive, SOON));
    let TransferError::Timeout { elapsed, .. } = error else {
        panic!("{error}");
    };
    assert!(elapsed >= SHORT && elapsed < SHORT * 20, "{elapsed:?}");
    // A sender that comes now fails at once.
    let send = bench.send(22);
    assert_eq!(code(bench.fabric.wait(&send, SOON)), FailureCode::Timeout);
}

/// P2: the sender opens but its application pushes nothing.
pub fn deadline_without_pages<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let mut request = bench.receive_of(1, &Deal::new(&model, 23, &[4]));
    request.timeout = SHORT;
    let receive = bench.fabric.receive(1, &request).expect("it opens");
    let send = bench.send(23);
    let error = failure(bench.fabric.wait(&receive, SOON));
    assert!(matches!(error, TransferError::Timeout { .. }), "{error}");
    assert_eq!(code(bench.fabric.wait(&send, SOON)), FailureCode::Timeout);
}

/// P2: a live room cannot be opened a second time, on either side, and the first is not disturbed.
pub fn duplicate_rooms<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let deal = Deal::new(&model, 24, &[4]);
    let receive = bench.receive(&deal);
    let send = bench.send(24);
    let request = bench.receive_of(1, &deal);
    let again = bench.fabric.receive(1, &request).err();
    assert_eq!(again, Some(SubmitError::DuplicateRoom(room(24))));
    let again = bench.fabric.send(0, &to_send(24, SOON)).err();
    assert_eq!(again, Some(SubmitError::DuplicateRoom(room(24))));
    bench.fabric.wait_ready(&send).expect("it is granted");
    bench
        .fabric
        .push(&send, &deal.pushes()[0])
        .expect("it is taken");
    for side in [&send, &receive] {
        bench
            .fabric
            .wait(side, SOON)
            .expect("in time")
            .expect("it succeeds");
    }
}

/// P1: a number may be used again after its room succeeded; what comes is the new room's.
pub fn room_reuse<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    for pages in [5, 9, 1] {
        bench.run(&Deal::new(&model, 25, &[pages, 2]));
    }
}

/// P2: the grant waits for the sender.
pub fn grant_before_sender<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let deal = Deal::new(&model, 26, &[4]);
    let receive = bench.receive(&deal);
    bench.fabric.pass(SHORT);
    let send = bench.send(26);
    bench.fabric.wait_ready(&send).expect("the grant was kept");
    bench
        .fabric
        .push(&send, &deal.pushes()[0])
        .expect("it is taken");
    bench
        .fabric
        .wait(&receive, SOON)
        .expect("in time")
        .expect("it succeeds");
}

/// P2, P4: a grant is not kept for ever; its receiver is told that nobody came.
pub fn grant_without_sender<F: Fabric>() {
    let model = Model::default();
    let node = NodeConfig {
        orphan_ttl: SHORT,
        ..NodeConfig::default()
    };
    let mut bench = Bench::<F>::new(&model, (1, 1), 1, &node);
    let receive = bench.receive(&Deal::new(&model, 27, &[4]));
    assert_eq!(
        code(bench.fabric.wait(&receive, SOON)),
        FailureCode::NoSender
    );
}

/// P2: a receiver that gave up before the sender opened: the sender fails at once, not at its deadline.
pub fn cancelled_before_the_sender_opens<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let receive = bench.receive(&Deal::new(&model, 28, &[4]));
    bench.fabric.cancel(&receive);
    bench.fabric.pass(SHORT);
    let send = bench.send(28);
    assert_eq!(code(bench.fabric.wait(&send, SOON)), FailureCode::Cancelled);
}

/// P1, P3: what arrives about a room that is over is counted and otherwise ignored.
pub fn late_messages_are_ignored<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let deal = Deal::new(&model, 29, &[4]);
    let receive = bench.receive(&deal);
    let send = bench.send(29);
    bench.fabric.wait_ready(&send).expect("it is granted");
    bench.fabric.cancel(&send);
    bench.fabric.cancel(&receive);
    bench.fabric.pass(SHORT);
    let late = [0, 1].map(|rank| bench.fabric.late_messages(rank));
    // Whoever cancelled first told the other; if both were over by then, each counts the other's word.
    assert!(late.iter().sum::<u64>() <= 2, "{late:?}");
    bench.run(&Deal::new(&model, 30, &[4]));
}

/// P7: a sender cannot push more than was granted, and is told both numbers.
pub fn more_pages_than_granted<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let deal = Deal::new(&model, 31, &[4]);
    let receive = bench.receive(&deal);
    let send = bench.send(31);
    bench.fabric.wait_ready(&send).expect("it is granted");
    let seven = Chunk {
        items: vec![(0..7).collect()],
        last: false,
    };
    let error = bench.fabric.push(&send, &seven).expect_err("too many");
    let text = error.to_string();
    assert!(text.contains('7') && text.contains('4'), "{text}");
    // Nothing was queued: the room can still be served.
    bench
        .fabric
        .push(&send, &deal.pushes()[0])
        .expect("it is taken");
    bench
        .fabric
        .wait(&receive, SOON)
        .expect("in time")
        .expect("it succeeds");
}

/// P7, P8: fewer pages than granted are no success at either side.
pub fn fewer_pages_than_granted<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let deal = Deal::new(&model, 32, &[4]);
    let receive = bench.receive(&deal);
    let send = bench.send(32);
    bench.fabric.wait_ready(&send).expect("it is granted");
    let two = Chunk {
        items: vec![(0..2).collect()],
        last: true,
    };
    bench
        .fabric
        .push(&send, &two)
        .expect("a sender may stop early");
    let error = failure(bench.fabric.wait(&receive, SOON));
    assert!(
        matches!(error, TransferError::PeerMisbehaved { .. }),
        "{error}"
    );
    let told = failure(bench.fabric.wait(&send, SOON));
    assert!(matches!(told, TransferError::PeerFailed { .. }), "{told}");
}

/// P4: a queue takes exactly its bound, and the refusal names it.
pub fn full_queue<F: Fabric>() {
    let model = Model::default();
    let page = u64::from(model.page_size * model.heads * model.layers * 2) * model.head_bytes;
    let node = NodeConfig {
        queue_bytes_max: 6 * page,
        ..NodeConfig::default()
    };
    let mut bench = Bench::<F>::new(&model, (1, 1), 1, &node);
    let deal = Deal::new(&model, 33, &[6, 1]);
    let receive = bench.receive(&deal);
    let send = bench.send(33);
    bench.fabric.wait_ready(&send).expect("it is granted");
    let seven = Chunk {
        items: vec![(0..7).collect()],
        last: false,
    };
    let Err(SubmitError::Full {
        used,
        asked,
        limit,
        setting,
        ..
    }) = bench.fabric.push(&send, &seven)
    else {
        panic!("the queue took more than its bound");
    };
    let numbers = (used, asked, limit, setting);
    assert_eq!(numbers, (0, 7 * page, 6 * page, "queue_bytes_max"));
    let mut chunks = deal.pushes().into_iter();
    let first = chunks.next().expect("there are two");
    bench.fabric.push(&send, &first).expect("exactly the bound");
    let last = chunks.next().expect("there are two");
    loop {
        match bench.fabric.push(&send, &last) {
            Ok(()) => break,
            Err(SubmitError::Full { .. }) => bench.fabric.pass(Duration::from_millis(1)),
            Err(error) => panic!("{error}"),
        }
    }
    bench
        .fabric
        .wait(&receive, SOON)
        .expect("in time")
        .expect("it succeeds");
}

/// P4: the table of transfers takes exactly its bound, both roles together, and has room again after an end.
pub fn full_table<F: Fabric>() {
    let model = Model::default();
    let node = NodeConfig {
        transfers_max: 3,
        ..NodeConfig::default()
    };
    let mut bench = Bench::<F>::new(&model, (1, 1), 1, &node);
    let mut open: Vec<F::Transfer> = (40..43).map(|number| bench.send(number)).collect();
    let refused = bench.fabric.send(0, &to_send(43, SOON)).err();
    let Some(SubmitError::Full {
        used,
        limit,
        setting,
        ..
    }) = refused
    else {
        panic!("the table took more than its bound");
    };
    assert_eq!((used, limit, setting), (3, 3, "transfers_max"));
    let first = open.remove(0);
    bench.fabric.cancel(&first);
    open.push(bench.send(44));
}
