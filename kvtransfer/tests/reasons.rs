//! P2: whoever gives up, in whichever order the two sides come, the other one learns of it at once and in the same words.

use std::time::Duration;

use kvtransfer::{
    engine::Transfer,
    error::TransferError,
    testing::{
        conformance::{Bench, Deal, EngineFabric, Fabric, SOON, TcpPath, to_send},
        model::Model,
    },
    transfer::NodeConfig,
    wire::control::{FailureCode, REASON_BYTES_MAX},
};

type Tcp = Bench<EngineFabric<TcpPath>>;

const WORDS: &str = "Aborted by AbortReq. (prefill side)";

fn told(side: &Transfer) -> (FailureCode, String) {
    match side.wait(SOON) {
        Some(Err(TransferError::PeerFailed { code, reason })) => (code, reason),
        other => panic!("{side:?}: {other:?}"),
    }
}

#[test]
fn a_sender_that_is_cancelled_tells_the_receiver_its_own_words() {
    let mut bench = Tcp::duo(&Model::default());
    let receive = bench.receive(&Deal::new(&Model::default(), 1, &[4]));
    let send = bench.send(1);
    send.wait_ready(SOON).unwrap();
    send.cancel_with(WORDS);
    let own = TransferError::CancelledBecause {
        reason: WORDS.into(),
    };
    assert_eq!(send.result(), Some(Err(own)));
    assert_eq!(told(&receive), (FailureCode::Cancelled, WORDS.into()));
    // It ended once: a second word changes nothing.
    receive.cancel_with("too late");
    assert_eq!(told(&receive), (FailureCode::Cancelled, WORDS.into()));
}

#[test]
fn a_receiver_that_is_cancelled_tells_the_sender_its_own_words() {
    let mut bench = Tcp::duo(&Model::default());
    let receive = bench.receive(&Deal::new(&Model::default(), 2, &[4]));
    let send = bench.send(2);
    send.wait_ready(SOON).unwrap();
    receive.cancel_with(WORDS);
    assert_eq!(told(&send), (FailureCode::Cancelled, WORDS.into()));
}

#[test]
fn a_sender_cancelled_before_the_grant_fails_the_receiver_as_soon_as_it_grants() {
    let mut bench = Tcp::duo(&Model::default());
    let send = bench.send(3);
    send.cancel_with(WORDS);
    let receive = bench.receive(&Deal::new(&Model::default(), 3, &[4]));
    assert_eq!(told(&receive), (FailureCode::Cancelled, WORDS.into()));
}

#[test]
fn a_sender_whose_deadline_passes_before_the_grant_fails_the_receiver_as_soon_as_it_grants() {
    let mut bench = Tcp::duo(&Model::default());
    let request = to_send(4, Duration::from_millis(20));
    let send = bench.fabric.send(0, &request).unwrap();
    let error = send.wait(SOON).unwrap().unwrap_err();
    assert!(matches!(error, TransferError::Timeout { .. }), "{error}");
    let receive = bench.receive(&Deal::new(&Model::default(), 4, &[4]));
    let (code, reason) = told(&receive);
    assert_eq!(code, FailureCode::Timeout);
    assert_eq!(reason, error.to_string());
    assert!(
        reason.contains("waiting for the receiver's grant"),
        "{reason}"
    );
}

#[test]
fn a_receiver_cancelled_before_the_sender_opens_fails_it_at_once() {
    let mut bench = Tcp::duo(&Model::default());
    let receive = bench.receive(&Deal::new(&Model::default(), 5, &[4]));
    receive.cancel_with(WORDS);
    // The cancellation is one message behind the grant; the sender may open between the two.
    let send = bench.send(5);
    assert_eq!(told(&send), (FailureCode::Cancelled, WORDS.into()));
}

#[test]
fn a_receiver_whose_deadline_passes_before_the_sender_opens_fails_it_at_once() {
    let mut bench = Tcp::duo(&Model::default());
    let deal = Deal::new(&Model::default(), 6, &[4]);
    let mut request = bench.receive_of(1, &deal);
    request.timeout = Duration::from_millis(20);
    let receive = bench.fabric.receive(1, &request).unwrap();
    let error = receive.wait(SOON).unwrap().unwrap_err();
    let send = bench.send(6);
    assert_eq!(told(&send), (FailureCode::Timeout, error.to_string()));
}

#[test]
fn with_several_senders_the_others_hear_of_it_too() {
    let model = Model::default();
    let mut bench = Tcp::new(&model, (2, 1), 1, &NodeConfig::default());
    let deal = Deal::new(&model, 7, &[4]);
    let request = bench.receive_of(2, &deal);
    let receive = bench.fabric.receive(2, &request).unwrap();
    let sends: Vec<Transfer> = (0..2)
        .map(|rank| bench.fabric.send(rank, &to_send(7, SOON)).unwrap())
        .collect();
    sends[0].cancel_with(WORDS);
    assert_eq!(told(&receive), (FailureCode::Cancelled, WORDS.into()));
    let (code, reason) = told(&sends[1]);
    assert_eq!(code, FailureCode::OtherPeer);
    assert!(reason.contains(WORDS), "{reason}");
}

#[test]
fn a_reason_is_one_bounded_line_on_the_other_side() {
    let mut bench = Tcp::duo(&Model::default());
    let receive = bench.receive(&Deal::new(&Model::default(), 8, &[4]));
    let send = bench.send(8);
    send.cancel_with(&format!("one\ntwo{}", "é".repeat(4096)));
    let (_, reason) = told(&receive);
    assert!(reason.starts_with("one twoé"), "{reason}");
    assert!(reason.len() > REASON_BYTES_MAX - 2 && reason.len() <= REASON_BYTES_MAX);
    let empty = bench.send(9);
    empty.cancel_with("");
    assert_eq!(empty.result(), Some(Err(TransferError::Cancelled)));
}
