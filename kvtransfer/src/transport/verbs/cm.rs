//! Connections by rdma_cm, which iWARP and eRDMA's standard mode need.
//!
//! Events arrive on a channel whose descriptor does not block; each is copied out and acknowledged before the next,
//! so that destroying an id never waits for one. librdmacm changes a connection's queue pair while it hands events
//! out, so the calls on ids share the channel's gate.
//!
//! The active side must post first: eRDMA in standard mode breaks a connection on which the passive side does.
#![expect(unsafe_code, reason = "calls into librdmacm")]

// The paths are spelled out, since a file that is itself included by path (the oracle does) looks elsewhere.
#[path = "cm/address.rs"]
mod address;
#[path = "cm/private_data.rs"]
pub(crate) mod private_data;

use std::{
    net::SocketAddr,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use address::{from_raw, to_raw};
use private_data::PRIVATE_DATA_WIRE_MAX;
pub(crate) use private_data::PrivateData;

use super::{
    context::set_nonblocking,
    cq::Cq,
    device,
    error::{VerbsError, check, check_pointer},
    library::{CmCalls, Library},
    pd::Pd,
    qp::{Qp, QpCaps},
    sys::{
        self, ibv_qp, ibv_qp_init_attr, rdma_cm_event, rdma_cm_id, rdma_conn_param,
        rdma_event_channel,
    },
};

/// READs in flight either way; we post none, but some providers refuse zero.
const READS_MAX: u8 = 1;
/// Retransmissions before the connection is given up.
const RETRY_COUNT: u8 = 7;
/// Waits for a receive before the connection is given up; 7 would wait for ever.
const RNR_RETRY_COUNT: u8 = 6;

/// Names an id in events. Never followed as a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct IdKey(usize);

/// A connection event.
pub(crate) struct CmEvent {
    /// `RDMA_CM_EVENT_*`, or a number newer than this crate.
    pub(crate) kind: u32,
    /// Why, for events of failure: an error number or the protocol's own reason.
    pub(crate) status: i32,
    /// The id it is about; for a request, the listener.
    pub(crate) id: IdKey,
    /// The requested connection. Dropping it refuses the request.
    pub(crate) request: Option<CmId>,
    /// What the peer sent along, if it was of our form.
    pub(crate) private_data: Option<PrivateData>,
}

impl CmEvent {
    /// The event in words.
    pub(crate) fn words(&self) -> &'static str {
        event_words(self.kind)
    }
}

fn event_words(kind: u32) -> &'static str {
    match kind {
        sys::RDMA_CM_EVENT_ADDR_RESOLVED => "the address is resolved",
        sys::RDMA_CM_EVENT_ADDR_ERROR => "the address could not be resolved",
        sys::RDMA_CM_EVENT_ROUTE_RESOLVED => "the route is resolved",
        sys::RDMA_CM_EVENT_ROUTE_ERROR => "the route could not be resolved",
        sys::RDMA_CM_EVENT_CONNECT_REQUEST => "a peer asks for a connection",
        sys::RDMA_CM_EVENT_CONNECT_RESPONSE => "the peer answered",
        sys::RDMA_CM_EVENT_CONNECT_ERROR => "the connection failed",
        sys::RDMA_CM_EVENT_UNREACHABLE => "the peer does not answer",
        sys::RDMA_CM_EVENT_REJECTED => "the peer refused the connection",
        sys::RDMA_CM_EVENT_ESTABLISHED => "the connection is established",
        sys::RDMA_CM_EVENT_DISCONNECTED => "the connection ended",
        sys::RDMA_CM_EVENT_DEVICE_REMOVAL => "the device went away",
        sys::RDMA_CM_EVENT_ADDR_CHANGE => "the address moved to another device",
        sys::RDMA_CM_EVENT_TIMEWAIT_EXIT => "the connection is forgotten",
        _ => "an unknown event",
    }
}

/// Where connection events arrive.
pub(crate) struct EventChannel {
    library: Arc<Library>,
    raw: NonNull<rdma_event_channel>,
    gate: Mutex<()>,
}

// SAFETY: every call on the channel and on its ids takes the gate.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    /// Opens a channel.
    pub(crate) fn open(library: &Arc<Library>) -> Result<Arc<Self>, VerbsError> {
        let cm = library.cm()?;
        // SAFETY: the call has no conditions.
        let raw = unsafe { (cm.rdma_create_event_channel)() };
        let channel = Arc::new(Self {
            library: Arc::clone(library),
            raw: check_pointer("rdma_create_event_channel", raw)?,
            gate: Mutex::new(()),
        });
        set_nonblocking(channel.fd_raw())?;
        Ok(channel)
    }

    fn fd_raw(&self) -> i32 {
        // SAFETY: the channel is open until drop, and its descriptor never changes.
        unsafe { (*self.raw.as_ptr()).fd }
    }

    fn calls(&self) -> &CmCalls {
        self.library
            .cm
            .as_ref()
            .expect("invariant: a channel is made by librdmacm's calls")
    }

    fn gate(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when [`Self::next_event`] has something.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the channel's, which the borrow keeps open.
        unsafe { BorrowedFd::borrow_raw(self.fd_raw()) }
    }

    /// The next event, if there is one; acknowledged when this returns.
    pub(crate) fn next_event(self: &Arc<Self>) -> Result<Option<CmEvent>, VerbsError> {
        let calls = self.calls();
        let gate = self.gate();
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is open and does not block.
        let code = unsafe { (calls.rdma_get_cm_event)(self.raw.as_ptr(), &raw mut raw) };
        if let Err(error) = check("rdma_get_cm_event", code) {
            return match error.errno() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                _ => Err(error),
            };
        }
        let raw = check_pointer("rdma_get_cm_event", raw)?;
        // SAFETY: the library returned an event, which lives until it is acknowledged.
        let event = self.copy_out(unsafe { raw.as_ref() });
        // SAFETY: the event is acknowledged once, and nothing of it is used afterwards.
        let code = unsafe { (calls.rdma_ack_cm_event)(raw.as_ptr()) };
        drop(gate);
        check("rdma_ack_cm_event", code)?;
        Ok(Some(event))
    }

    fn copy_out(self: &Arc<Self>, raw: &rdma_cm_event) -> CmEvent {
        let is_request = raw.event == sys::RDMA_CM_EVENT_CONNECT_REQUEST;
        let subject = if is_request { raw.listen_id } else { raw.id };
        let carries_data = matches!(
            raw.event,
            sys::RDMA_CM_EVENT_CONNECT_REQUEST
                | sys::RDMA_CM_EVENT_ESTABLISHED
                | sys::RDMA_CM_EVENT_REJECTED
        );
        CmEvent {
            kind: raw.event,
            status: raw.status,
            id: IdKey(subject.addr()),
            request: NonNull::new(raw.id)
                .filter(|_| is_request)
                .map(|id| CmId::adopt(self, id)),
            private_data: carries_data.then(|| private_data(raw)).flatten(),
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: every id holds an Arc of its channel, so none is left, and every event was acknowledged.
        unsafe { (self.calls().rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

fn private_data(raw: &rdma_cm_event) -> Option<PrivateData> {
    // SAFETY: the events for which this is called fill the connection's parameters.
    let conn = unsafe { raw.param.conn };
    if conn.private_data.is_null() {
        return None;
    }
    let len = usize::from(conn.private_data_len);
    // SAFETY: the library holds so many bytes there until the event is acknowledged.
    let wire = unsafe { std::slice::from_raw_parts(conn.private_data.cast::<u8>(), len) };
    PrivateData::decode(wire)
}

/// The library's id, kept until its owner and its queue pair are gone.
pub(super) struct IdHandle {
    channel: Arc<EventChannel>,
    raw: NonNull<rdma_cm_id>,
}

// SAFETY: every call on the id takes its channel's gate.
unsafe impl Send for IdHandle {}
// SAFETY: as above.
unsafe impl Sync for IdHandle {}

impl IdHandle {
    /// Makes the id's queue pair on `pd`, which must be on the context that librdmacm bound the id to.
    ///
    /// # Safety
    /// The attributes must name live completion queues, and these, the domain and this handle must outlive the queue
    /// pair.
    pub(super) unsafe fn create_qp(
        &self,
        pd: &Pd,
        attributes: *mut ibv_qp_init_attr,
    ) -> Result<NonNull<ibv_qp>, VerbsError> {
        let _gate = self.channel.gate();
        let raw = self.raw.as_ptr();
        // SAFETY: the id is alive, and the gate keeps it from being changed.
        let verbs = unsafe { (*raw).verbs };
        if verbs != pd.context().raw() {
            return Err(VerbsError::Misuse(
                "the connection is on another device, or the device was not opened for rdma_cm",
            ));
        }
        // SAFETY: as above.
        let before = unsafe { (*raw).qp };
        if !before.is_null() {
            return Err(VerbsError::Misuse(
                "the connection already has a queue pair",
            ));
        }
        // SAFETY: the caller vouches for the attributes; the domain is on the id's device.
        let code = unsafe { (self.channel.calls().rdma_create_qp)(raw, pd.raw(), attributes) };
        check("rdma_create_qp", code)?;
        // SAFETY: as above.
        let made = unsafe { (*raw).qp };
        check_pointer("rdma_create_qp", made)
    }

    /// Destroys the id's queue pair.
    ///
    /// # Safety
    /// It must have one, which nothing uses any more.
    pub(super) unsafe fn destroy_qp(&self) {
        let _gate = self.channel.gate();
        // SAFETY: the caller vouches for the queue pair.
        unsafe { (self.channel.calls().rdma_destroy_qp)(self.raw.as_ptr()) };
    }
}

impl Drop for IdHandle {
    fn drop(&mut self) {
        let _gate = self.channel.gate();
        // SAFETY: the id is ours and destroyed once; its queue pair held this handle and is gone, and its events are
        // acknowledged under the gate.
        let code = unsafe { (self.channel.calls().rdma_destroy_id)(self.raw.as_ptr()) };
        if let Err(error) = check("rdma_destroy_id", code) {
            tracing::warn!(%error, "a connection's id was not destroyed");
        }
    }
}

/// A connection, a request for one, or a listener.
pub(crate) struct CmId {
    handle: Arc<IdHandle>,
}

impl CmId {
    /// Makes an id whose events arrive on `channel`.
    pub(crate) fn create(channel: &Arc<EventChannel>) -> Result<Self, VerbsError> {
        let mut raw = ptr::null_mut();
        let gate = channel.gate();
        // SAFETY: the channel is open and kept so by the result.
        let code = unsafe {
            (channel.calls().rdma_create_id)(
                channel.raw.as_ptr(),
                &raw mut raw,
                ptr::null_mut(),
                sys::RDMA_PS_TCP,
            )
        };
        drop(gate);
        check("rdma_create_id", code)?;
        Ok(Self::adopt(channel, check_pointer("rdma_create_id", raw)?))
    }

    fn adopt(channel: &Arc<EventChannel>, raw: NonNull<rdma_cm_id>) -> Self {
        Self {
            handle: Arc::new(IdHandle {
                channel: Arc::clone(channel),
                raw,
            }),
        }
    }

    /// Names the id in events.
    pub(crate) fn key(&self) -> IdKey {
        IdKey(self.handle.raw.as_ptr().addr())
    }

    fn call(
        &self,
        op: &'static str,
        body: impl FnOnce(&CmCalls, *mut rdma_cm_id) -> i32,
    ) -> Result<(), VerbsError> {
        let channel = &self.handle.channel;
        let _gate = channel.gate();
        check(op, body(channel.calls(), self.handle.raw.as_ptr()))
    }

    /// Binds to a local address, and unless that is a wildcard to its device.
    pub(crate) fn bind(&mut self, to: SocketAddr) -> Result<(), VerbsError> {
        let mut address = to_raw(to);
        self.call("rdma_bind_addr", |cm, id| {
            // SAFETY: the id is alive under the gate; the address is read before the call returns.
            unsafe { (cm.rdma_bind_addr)(id, (&raw mut address).cast()) }
        })
    }

    /// Listens for requests; at most `backlog` wait.
    pub(crate) fn listen(&mut self, backlog: u16) -> Result<(), VerbsError> {
        self.call("rdma_listen", |cm, id| {
            // SAFETY: the id is alive under the gate.
            unsafe { (cm.rdma_listen)(id, i32::from(backlog)) }
        })
    }

    /// The bound port.
    pub(crate) fn local_port(&self) -> u16 {
        let channel = &self.handle.channel;
        let _gate = channel.gate();
        // SAFETY: the id is alive under the gate.
        u16::from_be(unsafe { (channel.calls().rdma_get_src_port)(self.handle.raw.as_ptr()) })
    }

    /// Starts to find the device for `to`; ends in an `ADDR_RESOLVED` or `ADDR_ERROR` event within `timeout`.
    pub(crate) fn resolve_addr(
        &mut self,
        from: Option<SocketAddr>,
        to: SocketAddr,
        timeout: Duration,
    ) -> Result<(), VerbsError> {
        let mut source = from.map(to_raw);
        let source = source
            .as_mut()
            .map_or(ptr::null_mut(), |address| ptr::from_mut(address).cast());
        let mut target = to_raw(to);
        self.call("rdma_resolve_addr", |cm, id| {
            // SAFETY: the id is alive under the gate; the addresses are read before the call returns.
            unsafe { (cm.rdma_resolve_addr)(id, source, (&raw mut target).cast(), millis(timeout)) }
        })
    }

    /// Starts to find the route; ends in a `ROUTE_RESOLVED` or `ROUTE_ERROR` event within `timeout`.
    pub(crate) fn resolve_route(&mut self, timeout: Duration) -> Result<(), VerbsError> {
        self.call("rdma_resolve_route", |cm, id| {
            // SAFETY: the id is alive under the gate.
            unsafe { (cm.rdma_resolve_route)(id, millis(timeout)) }
        })
    }

    /// The device it is bound to, once there is one.
    pub(crate) fn device_name(&self) -> Option<String> {
        let _gate = self.handle.channel.gate();
        // SAFETY: the id is alive under the gate.
        let verbs = unsafe { (*self.handle.raw.as_ptr()).verbs };
        let verbs = NonNull::new(verbs)?;
        // SAFETY: librdmacm keeps the context open while an id is bound to it.
        let raw = unsafe { (*verbs.as_ptr()).device };
        // SAFETY: an open context's device is alive.
        Some(unsafe { device::name(raw) })
    }

    /// The peer's address, once it is known.
    pub(crate) fn peer_address(&self) -> Option<SocketAddr> {
        let _gate = self.handle.channel.gate();
        // SAFETY: the id is alive under the gate, and the address is a copy.
        let raw = unsafe { (*self.handle.raw.as_ptr()).route.addr.dst_storage };
        from_raw(&raw)
    }

    /// Makes the connection's queue pair. Receives can be posted to it at once, sends when it is established.
    pub(crate) fn create_qp(
        &mut self,
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        caps: QpCaps,
    ) -> Result<Qp, VerbsError> {
        Qp::create_on(&self.handle, pd, send_cq, recv_cq, caps)
    }

    /// Asks the peer for the connection; ends in `ESTABLISHED`, `REJECTED`, `UNREACHABLE` or `CONNECT_ERROR`.
    pub(crate) fn connect(&mut self, data: &PrivateData) -> Result<(), VerbsError> {
        let (wire, len) = data.encode();
        let mut param = connection_parameters(&wire, len);
        self.call("rdma_connect", |cm, id| {
            // SAFETY: the id is alive under the gate; the parameters are read before the call returns.
            unsafe { (cm.rdma_connect)(id, &raw mut param) }
        })
    }

    /// Says yes to a request; ends in `ESTABLISHED` or an event of failure. Post receives before.
    pub(crate) fn accept(&mut self, data: &PrivateData) -> Result<(), VerbsError> {
        let (wire, len) = data.encode();
        let mut param = connection_parameters(&wire, len);
        self.call("rdma_accept", |cm, id| {
            // SAFETY: the id is alive under the gate; the parameters are read before the call returns.
            unsafe { (cm.rdma_accept)(id, &raw mut param) }
        })
    }

    /// Says no to a request.
    pub(crate) fn reject(self, data: &PrivateData) -> Result<(), VerbsError> {
        let (wire, len) = data.encode();
        self.call("rdma_reject", |cm, id| {
            // SAFETY: the id is alive under the gate; the bytes are read before the call returns.
            unsafe { (cm.rdma_reject)(id, wire.as_ptr().cast(), len) }
        })
    }

    /// Ends the connection: the queue pair goes to the error state, and the peer sees `DISCONNECTED`.
    ///
    /// A side that sees `DISCONNECTED` must call this too: on InfiniBand and RoCE that is the answer that the other
    /// side waits for before it sees the event itself. On iWARP there may be nothing left to do (`EINVAL`).
    pub(crate) fn disconnect(&mut self) -> Result<(), VerbsError> {
        self.call("rdma_disconnect", |cm, id| {
            // SAFETY: the id is alive under the gate.
            unsafe { (cm.rdma_disconnect)(id) }
        })
    }
}

fn connection_parameters(wire: &[u8; PRIVATE_DATA_WIRE_MAX], len: u8) -> rdma_conn_param {
    rdma_conn_param {
        private_data: wire.as_ptr().cast(),
        private_data_len: len,
        responder_resources: READS_MAX,
        initiator_depth: READS_MAX,
        flow_control: 1,
        retry_count: RETRY_COUNT,
        rnr_retry_count: RNR_RETRY_COUNT,
        srq: 0,
        qp_num: 0,
    }
}

fn millis(timeout: Duration) -> i32 {
    i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX)
}
