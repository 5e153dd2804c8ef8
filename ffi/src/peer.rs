//! Peers: the engines of other ranks.
#![expect(unsafe_code, reason = "exported functions take raw pointers")]

use std::{ffi::c_char, time::Duration};

use kvt::{engine::ProbeError, ids::PeerId};

use crate::{
    argument::{Place, text},
    engine::{Opened, kvt_engine_t},
    handle::on,
    settings::resolve,
    status::{
        Failure, KVT_BAD_ARGUMENT, KVT_BAD_CONFIG, KVT_OTHER, KVT_PEER_LOST, KVT_SYSTEM,
        KVT_UNKNOWN_PEER, KVT_UNREACHABLE, kvt_status_t,
    },
};

/// Connects to the listener of another engine, compares both layouts and opens the data connections.
///
/// Several connections to one engine may exist; each has its own number. The path that was chosen, and why not a better
/// one, is in `kvt_engine_info_json`.
///
/// Ownership: `address` ("host:port" or "[v6]:port") is read during the call only. `*out_peer` is a number, never used
/// twice; the connection lives until `kvt_peer_disconnect`, its loss, or the engine's end.
/// Threads: any; waits up to `timeout_ms`. Errors: `KVT_UNREACHABLE`, `KVT_REFUSED` (with the sentence that says why the
/// layouts do not fit), `KVT_INCOMPATIBLE`, `KVT_QUEUE_FULL` (peers_max), `KVT_SHUTDOWN`, `KVT_BAD_ARGUMENT`.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to; lengths are right.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_peer_connect(
    engine: *const kvt_engine_t,
    address: *const c_char,
    address_len: usize,
    timeout_ms: u32,
    out_peer: *mut u64,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let place = unsafe { Place::new(out_peer, "out_peer") }?;
        // SAFETY: this function's own contract.
        let address = unsafe { text(address, address_len, "address") }?;
        let address = resolve(address, "address").map_err(|failure| match failure.status {
            KVT_BAD_CONFIG => Failure {
                status: KVT_BAD_ARGUMENT,
                ..failure
            },
            KVT_SYSTEM => Failure {
                status: KVT_UNREACHABLE,
                ..failure
            },
            _ => failure,
        })?;
        let timeout = Duration::from_millis(timeout_ms.into());
        place.put(opened.engine.connect(address, timeout)?.peer.0);
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// Ends the connection to a peer. Transfers that need it fail with `reason` (which may be empty) on both sides.
///
/// Ownership: `reason` is read during the call only. Threads: any. Errors: `KVT_UNKNOWN_PEER` (it is gone already),
/// `KVT_BAD_ARGUMENT`.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to; lengths are right.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_peer_disconnect(
    engine: *const kvt_engine_t,
    peer: u64,
    reason: *const c_char,
    reason_len: usize,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let reason = unsafe { text(reason, reason_len, "reason") }?;
        known(opened, peer)?;
        let reason = if reason.is_empty() {
            "disconnected by the application"
        } else {
            reason
        };
        opened.engine.disconnect(PeerId(peer), reason);
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// Asks a peer whether it answers, and waits for that. A frozen process does not answer, although its connections stand.
///
/// Ownership: `*out_round_trip_ns`, which may be NULL, is how long the answer took. Threads: any; waits up to
/// `timeout_ms`. Errors: `KVT_PEER_LOST` (no answer in time; it stays connected until it has been silent for
/// `peer_silence_max_ms`), `KVT_UNKNOWN_PEER`.
///
/// # Safety
/// `engine` is NULL or alive; `out_round_trip_ns` is NULL or writable.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_peer_probe(
    engine: *const kvt_engine_t,
    peer: u64,
    timeout_ms: u32,
    out_round_trip_ns: *mut u64,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let place = unsafe { Place::optional(out_round_trip_ns, "out_round_trip_ns") }?;
        let timeout = Duration::from_millis(timeout_ms.into());
        let took = opened.engine.probe(PeerId(peer), timeout)?;
        if let Some(place) = place {
            place.put(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

impl From<ProbeError> for Failure {
    fn from(error: ProbeError) -> Self {
        let status = match &error {
            ProbeError::UnknownPeer => KVT_UNKNOWN_PEER,
            ProbeError::Silent { .. } => KVT_PEER_LOST,
            _ => KVT_OTHER,
        };
        Self::new(status, error.to_string())
    }
}

/// Fails where no such peer is connected.
pub(crate) fn known(opened: &Opened, peer: u64) -> Result<(), Failure> {
    if opened
        .engine
        .peers()
        .iter()
        .any(|known| known.peer == PeerId(peer))
    {
        return Ok(());
    }
    let text = format!("peer {peer} is not connected (any more)");
    Err(Failure::new(KVT_UNKNOWN_PEER, text))
}
