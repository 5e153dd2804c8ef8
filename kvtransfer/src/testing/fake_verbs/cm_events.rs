//! librdmacm's calls on events.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{ffi::c_int, ptr};

use super::{
    cm_calls::{cache_rts, channel_of, new_id, refresh, returned},
    connect::ConnectEvent,
    events::EventQueue,
    shared::Shared,
    state::State,
};
use crate::transport::verbs::sys;

/// An event, with the private data that it points to.
#[repr(C)]
struct FakeEvent {
    c: sys::rdma_cm_event,
    shared: *const Shared,
    /// The identifier that cannot be destroyed before this is acknowledged.
    counted: u64,
    private: Vec<u8>,
}

pub(super) unsafe extern "C" fn next_event(
    channel: *mut sys::rdma_event_channel,
    into: *mut *mut sys::rdma_cm_event,
) -> c_int {
    // SAFETY: the caller passes a channel of a living fabric.
    let (shared, number) = unsafe { channel_of(channel) };
    let fd = shared
        .lock()
        .connections
        .channels
        .get(&number)
        .map(EventQueue::fd);
    let Some(fd) = fd else {
        return returned(Err(libc::EINVAL));
    };
    if let Err(error) = rustix::io::read(&*fd, &mut [0; 8]) {
        return returned(Err(error.raw_os_error()));
    }
    shared.managed();
    let mut state = shared.lock();
    let waiting = state.connections.channels.get_mut(&number);
    let Some(event) = waiting.and_then(EventQueue::pop) else {
        return returned(Err(libc::EAGAIN));
    };
    let is_request = event.kind == sys::RDMA_CM_EVENT_CONNECT_REQUEST;
    if is_request {
        // As in librdmacm, the structure of a request's identifier is made when its event is taken.
        let id = new_id(shared, event.id, channel, ptr::null_mut());
        if let Some(entry) = state.connections.ids.get_mut(&event.id) {
            entry.handle = id.expose_provenance();
        }
        // SAFETY: the structure is new, so nobody else uses it.
        unsafe { refresh(shared, &state, event.id, id.cast()) };
    }
    state.cm_taken(&event);
    let id = handle_in(&state, event.id);
    if event.kind == sys::RDMA_CM_EVENT_ESTABLISHED && !id.is_null() {
        // SAFETY: the arena keeps it, and the thread that takes a channel's events owns its identifiers' states.
        unsafe { cache_rts(id) };
    }
    let listener = event
        .listener
        .map_or(ptr::null_mut(), |listener| handle_in(&state, listener));
    drop(state);
    let c_event = Box::into_raw(Box::new(c_event(shared, &event, id, listener)));
    // SAFETY: the caller passes a writable place.
    unsafe { into.write(c_event.cast()) };
    0
}

fn handle_in(state: &State, number: u64) -> *mut sys::rdma_cm_id {
    let entry = state.connections.ids.get(&number);
    entry.map_or(ptr::null_mut(), |entry| {
        ptr::with_exposed_provenance_mut(entry.handle)
    })
}

fn c_event(
    shared: &Shared,
    event: &ConnectEvent,
    id: *mut sys::rdma_cm_id,
    listener: *mut sys::rdma_cm_id,
) -> FakeEvent {
    let private = event.private.clone();
    let conn = sys::rdma_conn_param {
        private_data: if private.is_empty() {
            ptr::null()
        } else {
            private.as_ptr().cast()
        },
        private_data_len: u8::try_from(private.len()).unwrap_or(u8::MAX),
        // eRDMA reports the device's maxima, not what the peer asked for.
        responder_resources: 128,
        initiator_depth: 128,
        flow_control: 0,
        retry_count: 7,
        rnr_retry_count: 7,
        srq: 0,
        qp_num: 0,
    };
    FakeEvent {
        c: sys::rdma_cm_event {
            id,
            listen_id: listener,
            event: event.kind,
            status: event.status,
            param: sys::rdma_cm_event_param { conn },
        },
        shared: ptr::from_ref(shared),
        counted: event.listener.unwrap_or(event.id),
        private,
    }
}

pub(super) unsafe extern "C" fn ack_event(event: *mut sys::rdma_cm_event) -> c_int {
    if event.is_null() {
        return returned(Err(libc::EINVAL));
    }
    // SAFETY: the caller passes an event from `next_event`, once.
    let event = unsafe { Box::from_raw(event.cast::<FakeEvent>()) };
    // SAFETY: an identifier that has events to acknowledge keeps the fabric alive.
    let shared = unsafe { &*event.shared };
    let mut state = shared.lock();
    if let Some(entry) = state.connections.ids.get_mut(&event.counted) {
        entry.unacked = entry.unacked.saturating_sub(1);
    }
    drop(state);
    drop(event.private);
    0
}
