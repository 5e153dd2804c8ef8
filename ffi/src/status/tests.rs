//! Every error of the library has its code, and every code a text.

use std::{collections::HashSet, ffi::CStr, io, time::Duration};

use kvt::{
    engine::{BuildError, ConnectError},
    error::{SubmitError, TransferError},
    ids::Room,
    serve::{ServeError, bootstrap_client::ClientError, telemetry::StartError},
    wire::control::FailureCode,
};

use super::*;

fn code(failure: impl Into<Failure>) -> kvt_status_t {
    let failure = failure.into();
    assert!(!failure.text.is_empty());
    failure.status
}

#[test]
fn every_code_has_one_text_that_starts_with_its_name() {
    let source = include_str!("../status.rs");
    let defined: Vec<_> = source
        .lines()
        .filter_map(|line| line.strip_prefix("pub const "))
        .filter_map(|line| line.split_once(": kvt_status_t = "))
        .map(|(name, number)| (name, number.trim_end_matches(';').parse::<i32>()))
        .collect();
    assert_eq!(defined.len(), TEXTS.len());
    let mut seen = HashSet::new();
    for (name, number) in defined {
        let number = number.expect("a plain number");
        assert!(seen.insert(number), "{number} is used twice");
        // SAFETY: every text of the table ends with a NUL and lives for ever.
        let text = unsafe { CStr::from_ptr(kvt_status_text(number)) };
        let text = text.to_str().expect("it is ASCII");
        assert!(text.starts_with(&format!("{name}: ")), "{name}: {text}");
    }
}

#[test]
fn errors_of_a_call_have_their_codes() {
    let room = Room::new(1).expect("not zero");
    let full = SubmitError::Full {
        what: "the queue",
        used: 1,
        asked: 1,
        limit: 1,
        setting: "x",
    };
    let expected = [
        (SubmitError::DuplicateRoom(room), KVT_DUPLICATE_ROOM),
        (full, KVT_QUEUE_FULL),
        (SubmitError::UnknownPeer, KVT_UNKNOWN_PEER),
        (SubmitError::Ended(TransferError::Cancelled), KVT_ENDED),
        (SubmitError::Ended(TransferError::Shutdown), KVT_SHUTDOWN),
        (SubmitError::NotReady, KVT_NOT_READY),
        (SubmitError::Items("too many".into()), KVT_BAD_ITEMS),
        (SubmitError::Released { region: 2 }, KVT_RELEASED),
        (SubmitError::Shutdown, KVT_SHUTDOWN),
    ];
    for (error, status) in expected {
        let words = error.to_string();
        assert_eq!(Failure::from(error), Failure::new(status, words));
    }
}

#[test]
fn ends_of_a_transfer_have_their_codes() {
    let (reason, elapsed) = (String::from("x"), Duration::from_secs(1));
    let failed = TransferError::PeerFailed {
        code: FailureCode::Timeout,
        reason: reason.clone(),
    };
    let stage = "waiting";
    let expected = [
        (TransferError::Cancelled, KVT_CANCELLED),
        (
            TransferError::CancelledBecause {
                reason: reason.clone(),
            },
            KVT_CANCELLED,
        ),
        (TransferError::Timeout { stage, elapsed }, KVT_TIMEOUT),
        (
            TransferError::NoPath {
                elapsed,
                reason: reason.clone(),
            },
            KVT_NO_PATH,
        ),
        (failed, KVT_PEER_FAILED),
        (
            TransferError::PeerLost {
                reason: reason.clone(),
            },
            KVT_PEER_LOST,
        ),
        (
            TransferError::PeerMisbehaved { reason },
            KVT_PEER_MISBEHAVED,
        ),
        (
            TransferError::Memory {
                op: "recvmsg",
                errno: 14,
            },
            KVT_MEMORY,
        ),
        (
            TransferError::Device {
                reason: "cuLaunchKernel on cuda:0: an illegal address".into(),
            },
            KVT_MEMORY,
        ),
        (TransferError::Shutdown, KVT_SHUTDOWN),
    ];
    for (error, status) in expected {
        assert_eq!(code(error), status);
    }
}

#[test]
fn failures_to_start_and_to_connect_have_their_codes() {
    let address = "127.0.0.1:1".parse().expect("an address");
    let io = || io::Error::from(io::ErrorKind::AddrInUse);
    let serve = || ServeError::AddressInUse { addr: address };
    let telemetry = StartError::Listen {
        addr: address,
        error: io(),
    };
    let failure = Failure::from(BuildError::Telemetry(telemetry));
    assert_eq!(failure.status, KVT_TELEMETRY);
    assert!(
        failure.text.contains("in use"),
        "the cause is told: {}",
        failure.text
    );
    assert_eq!(code(BuildError::Config("x".into())), KVT_BAD_CONFIG);
    assert_eq!(code(BuildError::Layout("x".into())), KVT_BAD_LAYOUT);
    assert_eq!(code(BuildError::Rdma("x".into())), KVT_RDMA);
    assert_eq!(
        code(BuildError::Listen {
            address,
            source: io()
        }),
        KVT_LISTEN
    );
    assert_eq!(code(BuildError::Bootstrap(serve())), KVT_BOOTSTRAP);
    assert_eq!(code(BuildError::System(io())), KVT_SYSTEM);
    assert_eq!(code(serve()), KVT_LISTEN);
    assert_eq!(
        code(ServeError::Thread {
            thread: "x",
            source: io()
        }),
        KVT_SYSTEM
    );
    assert_eq!(
        code(ConnectError::Unreachable {
            address,
            source: io()
        }),
        KVT_UNREACHABLE
    );
    assert_eq!(
        code(ConnectError::Refused {
            address,
            reason: "x".into()
        }),
        KVT_REFUSED
    );
    let stage = "hello";
    assert_eq!(
        code(ConnectError::Handshake {
            address,
            stage,
            source: io()
        }),
        KVT_INCOMPATIBLE
    );
    assert_eq!(
        code(ClientError::NotReady { text: "x".into() }),
        KVT_NOT_READY
    );
    assert_eq!(
        code(ClientError::Status {
            status: 404,
            text: "x".into()
        }),
        KVT_BOOTSTRAP
    );
    assert_eq!(code(ClientError::Unusable { what: "x" }), KVT_BAD_CONFIG);
}
