//! Transfers: one side's part in one room.
#![expect(unsafe_code, reason = "exported functions take raw pointers")]

mod given;
mod moving;

use std::{ffi::c_char, sync::Arc, time::Duration};

use kvt::{
    engine::Transfer,
    ids::Room,
    transfer::{Chunk, ReceiveRequest, SendRequest},
};

use crate::{
    argument::{Place, Texts, list, one, text},
    engine::{Opened, kvt_engine_t},
    guard::enter,
    handle::{Handle, Opaque, borrow, free, give, on},
    records::Record,
    status::{Failure, KVT_WOULD_WAIT, kvt_status_t},
};

use given::{item_lists, source};
use moving::{Moving, state};

/// `kvt_transfer_poll_many`: it failed; `kvt_transfer_wait` says why. The numbers are SGLang's `KVPoll`.
pub const KVT_STATE_FAILED: u8 = 0;
/// `kvt_transfer_poll_many`: the sender waits for grants.
pub const KVT_STATE_BOOTSTRAPPING: u8 = 1;
/// `kvt_transfer_poll_many`: pages may be pushed; none has moved yet.
pub const KVT_STATE_WAITING_FOR_INPUT: u8 = 2;
/// `kvt_transfer_poll_many`: pages are moving.
pub const KVT_STATE_TRANSFERRING: u8 = 3;
/// `kvt_transfer_poll_many`: every page has arrived.
pub const KVT_STATE_SUCCESS: u8 = 4;

/// `kvt_transfer_push`: no chunk follows.
pub const KVT_LAST: u32 = 1;

/// `kvt_transfer_wait`: until every receiver has granted its pages, or the end.
pub const KVT_UNTIL_READY: i32 = 1;
/// `kvt_transfer_wait`: until the end.
pub const KVT_UNTIL_ENDED: i32 = 2;

/// One side's part in one room. Made by `kvt_send_open` or `kvt_receive_open`, given back by `kvt_transfer_free`. Any
/// thread may use it, several at a time. It may outlive its engine, and then says `KVT_SHUTDOWN`.
pub struct kvt_transfer_t(Handle<Moving>);

impl Opaque for kvt_transfer_t {
    type Value = Moving;
    const NAME: &'static str = "transfer";

    fn handle(&self) -> &Handle<Moving> {
        &self.0
    }

    fn around(handle: Handle<Moving>) -> Self {
        Self(handle)
    }
}

/// Opens the sending side of a room.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_send_request_t {
    /// The rendezvous number (SGLang's `bootstrap_room`), not 0.
    pub room: u64,
    /// The caller's own number, repeated in the completion.
    pub user_data: u64,
    /// How long the whole transfer may take, waiting for grants included.
    pub timeout_ms: u32,
    /// 0.
    pub reserved: u32,
}

/// One sender that a receiver expects.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_source_t {
    /// A connected peer, from `kvt_peer_connect`.
    pub peer: u64,
    /// 1 where the peer only concludes and sends no pages (SGLang's dummy ranks), else 0.
    pub dummy: u32,
    /// 0.
    pub reserved: u32,
}

/// Item indices (pages, slots) of one component. The sender's and the receiver's lists pair by position.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_items_t {
    /// The indices. May be NULL if `count` is 0.
    pub items: *const i32,
    /// How many.
    pub count: usize,
}

/// Opens the receiving side of a room and grants its pages to the senders.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_receive_request_t {
    /// The rendezvous number (SGLang's `bootstrap_room`), not 0.
    pub room: u64,
    /// The caller's own number, repeated in the completion.
    pub user_data: u64,
    /// How long the whole transfer may take.
    pub timeout_ms: u32,
    /// How many receivers each sender must wait for, this one included (SGLang's `required_dst_info_num`). At most 65535.
    pub receivers_expected: u32,
    /// Tokens already held, which the sender need not send (SGLang's `decode_prefix_len`).
    pub prefix_tokens: u32,
    /// 0.
    pub reserved: u32,
    /// Who sends.
    pub sources: *const kvt_source_t,
    /// How many.
    pub sources_len: usize,
    /// Target items, one list per component of the layout; lists at the end may be left out.
    pub items: *const kvt_items_t,
    /// How many lists.
    pub items_len: usize,
}

/// How a transfer stands, or ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct kvt_outcome_t {
    /// `KVT_WOULD_WAIT` while it is live, `KVT_OK` when every page has arrived, else why it failed.
    pub status: kvt_status_t,
    /// A `KVT_STATE_` number.
    pub state: u32,
    /// Tokens that the receivers already hold; 0 until they have granted their pages.
    pub prefix_tokens: u32,
    /// 1 once every receiver has granted its pages, so that pages may be pushed.
    pub is_ready: u32,
    /// Its room.
    pub room: u64,
    /// The engine's number for it, as in `kvt_completion_t`.
    pub id: u64,
    /// Payload bytes placed or acknowledged; 0 unless it succeeded.
    pub bytes: u64,
    /// Batches they came in.
    pub batches: u64,
    /// From opening to the first batch, in nanoseconds.
    pub waited_ns: u64,
    /// From the first batch to the end, in nanoseconds.
    pub moving_ns: u64,
}

/// Opens the sending side of a room. It becomes ready when every receiver has granted its pages.
///
/// Ownership: `request` is read during the call only. `*out_transfer` is the caller's, to be given back with
/// `kvt_transfer_free`. Threads: any; never waits. Errors: `KVT_DUPLICATE_ROOM`, `KVT_QUEUE_FULL`, `KVT_SHUTDOWN`,
/// `KVT_BAD_ARGUMENT`. `*out_transfer` is untouched then.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_send_open(
    engine: *const kvt_engine_t,
    request: *const kvt_send_request_t,
    out_transfer: *mut *mut kvt_transfer_t,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let place = unsafe { Place::new(out_transfer, "out_transfer") }?;
        // SAFETY: this function's own contract.
        let request = unsafe { one(request, "request") }?;
        let room = room(request.room)?;
        zero(request.reserved, "request.reserved")?;
        let record = record(room, request.user_data);
        let request = SendRequest {
            room,
            timeout: millis(request.timeout_ms),
        };
        place.put(open(opened, record, || opened.engine.send(&request))?);
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// Opens the receiving side of a room and tells its senders where their pages go. From now on until the end they may
/// write to those pages.
///
/// Ownership: `request` and its lists are read during the call only. `*out_transfer` is the caller's, to be given back
/// with `kvt_transfer_free`. Threads: any; never waits. Errors: `KVT_DUPLICATE_ROOM`, `KVT_QUEUE_FULL`,
/// `KVT_UNKNOWN_PEER`, `KVT_BAD_ITEMS`, `KVT_SHUTDOWN`, `KVT_BAD_ARGUMENT`. `*out_transfer` is untouched then.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to; lengths are right.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_receive_open(
    engine: *const kvt_engine_t,
    request: *const kvt_receive_request_t,
    out_transfer: *mut *mut kvt_transfer_t,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let place = unsafe { Place::new(out_transfer, "out_transfer") }?;
        // SAFETY: this function's own contract.
        let request = unsafe { one(request, "request") }?;
        let room = room(request.room)?;
        zero(request.reserved, "request.reserved")?;
        let record = record(room, request.user_data);
        // SAFETY: this function's own contract.
        let sources = unsafe { list(request.sources, request.sources_len, "request.sources") }?;
        let expected = request.receivers_expected;
        let request = ReceiveRequest {
            room,
            sources: sources.iter().map(source).collect::<Result<_, _>>()?,
            receivers_expected: u16::try_from(expected).map_err(|_| {
                Failure::argument(format!(
                    "`request.receivers_expected` is {expected}, at most 65535"
                ))
            })?,
            prefix_tokens: request.prefix_tokens,
            // SAFETY: this function's own contract.
            items: unsafe { item_lists(request.items, request.items_len, &opened.tails) }?,
            timeout: millis(request.timeout_ms),
        };
        place.put(open(opened, record, || opened.engine.receive(&request))?);
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// Queues pages to every receiver: `items[c]` are indices in component `c` of the layout; successive chunks follow each
/// other. With `KVT_LAST` in `flags` no chunk follows; that one may be empty. Small chunks are written by the calling
/// thread if the connection is free.
///
/// Ownership: the lists are copied; the pages themselves must not change until the end. Threads: any; never waits, but
/// chunks of one transfer are ordered by their calls. Errors: `KVT_NOT_READY`, `KVT_BAD_ITEMS`, `KVT_QUEUE_FULL` (try
/// again), `KVT_ENDED`, `KVT_SHUTDOWN`, `KVT_BAD_ARGUMENT`. Nothing is queued then.
///
/// # Safety
/// `transfer` is NULL or alive; the lists are as long as they say.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_transfer_push(
    transfer: *const kvt_transfer_t,
    items: *const kvt_items_t,
    items_len: usize,
    flags: u32,
) -> kvt_status_t {
    let body = |moving: &Moving| {
        zero(flags & !KVT_LAST, "flags")?;
        // SAFETY: this function's own contract.
        let items = unsafe { item_lists(items, items_len, &moving.tails) }?;
        let last = flags & KVT_LAST != 0;
        Ok(moving.transfer.push(&Chunk { items, last })?)
    };
    // SAFETY: this function's own contract.
    unsafe { on(transfer, body) }
}

/// Queues pages that the device still writes: not a byte of them is read before each of the `events` has happened. They are
/// events of the device's driver as integers (`CUevent`, `cudaEvent_t`; `torch.cuda.Event.cuda_event`), recorded before
/// this call. Otherwise as `kvt_transfer_push`, which is what it is without events. Chunks pushed later wait behind this
/// one; what would be refused by the time the events have happened ends the transfer instead.
///
/// Ownership: the lists are copied; an event may be recorded anew or destroyed when this returns; the pages themselves must
/// not change from the events to the end. Threads: any; never waits, neither for the network nor for the device. Errors:
/// those of `kvt_transfer_push`; `KVT_BAD_ITEMS` also for events of an engine without device memory, unknown ones, and more
/// than 64. Nothing is queued then.
///
/// # Safety
/// `transfer` is NULL or alive; the lists are as long as they say; the events are alive during the call.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_transfer_push_after(
    transfer: *const kvt_transfer_t,
    items: *const kvt_items_t,
    items_len: usize,
    flags: u32,
    events: *const u64,
    events_len: usize,
) -> kvt_status_t {
    let body = |moving: &Moving| {
        zero(flags & !KVT_LAST, "flags")?;
        // SAFETY: this function's own contract.
        let items = unsafe { item_lists(items, items_len, &moving.tails) }?;
        // SAFETY: this function's own contract.
        let events = unsafe { list(events, events_len, "events") }?;
        let last = flags & KVT_LAST != 0;
        let chunk = Chunk { items, last };
        Ok(moving.transfer.push_after(&chunk, events)?)
    };
    // SAFETY: this function's own contract.
    unsafe { on(transfer, body) }
}

/// The states of many transfers, of any engines, in one call: `out_states[i]` is a `KVT_STATE_` number.
///
/// Ownership: `out_states` is the caller's, for `len` values. Threads: any; never waits. Errors: `KVT_NULL_ARGUMENT`
/// (also for a NULL among the transfers), `KVT_PANIC`. `out_states` is undefined then.
///
/// # Safety
/// `transfers` is NULL or points to `len` transfers that are NULL or alive; `out_states` is NULL or writable for `len`
/// values.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_transfer_poll_many(
    transfers: *const *const kvt_transfer_t,
    len: usize,
    out_states: *mut u8,
) -> kvt_status_t {
    enter(|| {
        // SAFETY: this function's own contract.
        let transfers = unsafe { list(transfers, len, "transfers") }?;
        if transfers.is_empty() {
            return Ok(());
        }
        // SAFETY: this function's own contract.
        let states = unsafe { Place::new(out_states, "out_states") }?;
        for (at, transfer) in transfers.iter().enumerate() {
            // SAFETY: this function's own contract.
            let handle = unsafe { borrow(*transfer) };
            let handle = handle.map_err(|_| Failure::null(&format!("transfers[{at}]")))?;
            let state = handle.with(|moving| Ok(state(moving.transfer.poll())))?;
            // SAFETY: `at` is below `len`, for which the caller has room.
            unsafe { states.put_at(at, state) };
        }
        Ok(())
    })
}

/// Waits for readiness (`KVT_UNTIL_READY`) or the end (`KVT_UNTIL_ENDED`), up to `timeout_ms`; 0 only looks. Either way
/// `*out_outcome` says how the transfer stands, and `*out_reason`, if it failed, the sentence that says why.
///
/// Once this has shown the end, nothing of the transfer touches memory any more.
///
/// Ownership: `*out_reason` is the caller's, to be given back with `kvt_text_free`; it is NULL unless the transfer failed.
/// Both places may be NULL. Threads: any. Errors: `KVT_WOULD_WAIT` (the time passed; the transfer goes on),
/// `KVT_BAD_ARGUMENT`. A failed transfer is no error of this call: `out_outcome->status` says it.
///
/// # Safety
/// `transfer` is NULL or alive; the places are NULL or writable.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_transfer_wait(
    transfer: *const kvt_transfer_t,
    until: i32,
    timeout_ms: u32,
    out_outcome: *mut kvt_outcome_t,
    out_reason: *mut *mut c_char,
) -> kvt_status_t {
    let body = |moving: &Moving| {
        // SAFETY: this function's own contract.
        let outcome = unsafe { Place::optional(out_outcome, "out_outcome") }?;
        // SAFETY: this function's own contract.
        let reason = unsafe { Texts::optional(out_reason, "out_reason") }?;
        let timeout = millis(timeout_ms);
        let came = match until {
            KVT_UNTIL_READY => {
                moving.transfer.wait_ready(timeout).is_ok() || moving.transfer.result().is_some()
            }
            KVT_UNTIL_ENDED => moving.transfer.wait(timeout).is_some(),
            other => {
                let text = format!("`until` is {other}, no KVT_UNTIL_ number");
                return Err(Failure::argument(text));
            }
        };
        let (stand, why) = moving.outcome();
        if let Some(place) = outcome {
            place.put(stand);
        }
        if let Some(place) = reason {
            place.put_or_null(why);
        }
        if came {
            return Ok(());
        }
        let text = format!(
            "room {}: {timeout:?} passed; the transfer goes on",
            stand.room
        );
        Err(Failure::new(KVT_WOULD_WAIT, text))
    };
    // SAFETY: this function's own contract.
    unsafe { on(transfer, body) }
}

/// Ends a transfer and tells the other side why at once: `reason` is in the text of its `KVT_PEER_FAILED`. With an empty
/// reason it hears "cancelled by the application". A transfer that has ended stays as it is.
///
/// Nothing more is handed to a network, but a network card may still touch this side's pages: they are free when
/// `kvt_transfer_wait`, `kvt_transfer_fence` or `kvt_transfer_poll_many` shows the end, which without RDMA is at once.
///
/// Ownership: `reason` is read during the call only. Threads: any; does not wait. Errors: `KVT_BAD_ARGUMENT`.
///
/// # Safety
/// `transfer` is NULL or alive; `reason` is NULL or as long as it says.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_transfer_cancel(
    transfer: *const kvt_transfer_t,
    reason: *const c_char,
    reason_len: usize,
) -> kvt_status_t {
    let body = |moving: &Moving| {
        // SAFETY: this function's own contract.
        let reason = unsafe { text(reason, reason_len, "reason") }?;
        moving.transfer.start_cancel(reason);
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(transfer, body) }
}

/// Ends a transfer as `kvt_transfer_cancel` does, without a reason, and waits until nothing of it can touch this side's
/// memory any more: with RDMA some 10 ms, else at once. A transfer that has ended is fenced already.
///
/// Ownership: nothing changes hands. Threads: any; waits up to `timeout_ms`. Errors: `KVT_WOULD_WAIT` (the time passed;
/// the memory may still be touched, fence again).
///
/// # Safety
/// `transfer` is NULL or alive.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_transfer_fence(
    transfer: *const kvt_transfer_t,
    timeout_ms: u32,
) -> kvt_status_t {
    let body = |moving: &Moving| {
        moving.transfer.start_cancel("");
        let timeout = millis(timeout_ms);
        if moving.transfer.wait(timeout).is_some() {
            return Ok(());
        }
        let room = moving.transfer.room();
        let text =
            format!("room {room} is not fenced after {timeout:?}; its memory may still be touched");
        Err(Failure::new(KVT_WOULD_WAIT, text))
    };
    // SAFETY: this function's own contract.
    unsafe { on(transfer, body) }
}

/// Gives a transfer back. One that is still live is cancelled first, as by `kvt_transfer_cancel`; a completion of it
/// that nobody drained is dropped. NULL is nothing to do.
///
/// Ownership: the transfer is gone. Threads: any, but no other call with this transfer may be running or follow. It may
/// be freed before or after its engine. Errors: none.
///
/// # Safety
/// `transfer` is NULL or came from an open call and was not freed before.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_transfer_free(transfer: *mut kvt_transfer_t) {
    // SAFETY: this function's own contract.
    unsafe { free(transfer) };
}

fn open(
    opened: &Opened,
    record: Record,
    start: impl FnOnce() -> Result<Transfer, kvt::error::SubmitError>,
) -> Result<*mut kvt_transfer_t, Failure> {
    let transfer = opened.records.open(record, start, Transfer::id)?;
    Ok(give(Moving {
        transfer,
        records: Arc::clone(&opened.records),
        tails: Arc::clone(&opened.tails),
    }))
}

fn record(room: Room, user_data: u64) -> Record {
    Record { room, user_data }
}

fn room(number: u64) -> Result<Room, Failure> {
    Room::new(number).ok_or_else(|| Failure::argument("`request.room` is 0, which is no room"))
}

fn zero(value: u32, what: &str) -> Result<(), Failure> {
    if value == 0 {
        return Ok(());
    }
    Err(Failure::argument(format!(
        "`{what}` has bits that must be 0: {value:#x}"
    )))
}

fn millis(number: u32) -> Duration {
    Duration::from_millis(number.into())
}
