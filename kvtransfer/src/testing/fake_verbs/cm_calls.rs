//! librdmacm's exported calls.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{
    ffi::{c_int, c_uint, c_void},
    ptr,
};

use super::{
    calls::{length_with_null, per_slot},
    cm_events,
    connect::Errno,
    counters::Violation,
    events::EventQueue,
    lifecycle, queues,
    shared::{FABRICS_MAX, Shared, fabric_of, set_errno},
    state::State,
};
use crate::transport::verbs::{library::CmCalls, sys};

/// An event channel.
#[repr(C)]
pub(super) struct FakeChannel {
    c: sys::rdma_event_channel,
    shared: *const Shared,
    number: u64,
}

/// An identifier.
#[repr(C)]
pub(super) struct FakeId {
    c: sys::rdma_cm_id,
    shared: *const Shared,
    number: u64,
}

type DeviceListCall = unsafe extern "C" fn(*mut c_int) -> *mut *mut sys::ibv_context;
type ChannelCall = unsafe extern "C" fn() -> *mut sys::rdma_event_channel;

const DEVICE_LISTS: [DeviceListCall; FABRICS_MAX] =
    per_slot!(managed_devices: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
const CHANNELS: [ChannelCall; FABRICS_MAX] =
    per_slot!(create_channel: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);

/// The table of the fabric in this slot.
pub(super) fn table(slot: usize) -> CmCalls {
    CmCalls {
        rdma_get_devices: DEVICE_LISTS[slot],
        rdma_free_devices: free_devices,
        rdma_create_event_channel: CHANNELS[slot],
        rdma_destroy_event_channel: destroy_channel,
        rdma_create_id: create_id,
        rdma_destroy_id: destroy_id,
        rdma_bind_addr: bind_addr,
        rdma_resolve_addr: resolve_addr,
        rdma_resolve_route: resolve_route,
        rdma_create_qp: create_qp,
        rdma_destroy_qp: destroy_qp,
        rdma_connect: connect,
        rdma_listen: listen,
        rdma_accept: accept,
        rdma_reject: reject,
        rdma_disconnect: disconnect,
        rdma_get_cm_event: cm_events::next_event,
        rdma_ack_cm_event: cm_events::ack_event,
        rdma_get_src_port: source_port,
    }
}

/// What librdmacm returns: zero, or −1 with `errno`.
pub(super) fn returned(result: Result<(), Errno>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

unsafe extern "C" fn managed_devices<const SLOT: usize>(
    count: *mut c_int,
) -> *mut *mut sys::ibv_context {
    let Some(shared) = Shared::in_slot(SLOT) else {
        set_errno(libc::ENODEV);
        return ptr::null_mut();
    };
    let managed = shared.managed().iter();
    let mut list: Vec<*mut sys::ibv_context> = managed.map(|context| context.cast()).collect();
    if !count.is_null() {
        // SAFETY: the caller passes null or a writable place.
        unsafe { *count = c_int::try_from(list.len()).unwrap_or(c_int::MAX) };
    }
    list.push(ptr::null_mut());
    Box::into_raw(list.into_boxed_slice()).cast()
}

unsafe extern "C" fn free_devices(list: *mut *mut sys::ibv_context) {
    if list.is_null() {
        return;
    }
    // SAFETY: the caller passes an array from `managed_devices`, once.
    let len = unsafe { length_with_null(list) };
    let list = ptr::slice_from_raw_parts_mut(list, len);
    // SAFETY: `managed_devices` made it from a box of this length.
    drop(unsafe { Box::from_raw(list) });
}

unsafe extern "C" fn create_channel<const SLOT: usize>() -> *mut sys::rdma_event_channel {
    let made = Shared::in_slot(SLOT).and_then(|shared| Some((shared, EventQueue::new().ok()?)));
    let Some((shared, events)) = made else {
        set_errno(libc::ENODEV);
        return ptr::null_mut();
    };
    let fd = events.raw_fd();
    let mut state = shared.lock();
    let number = state.connections.new_number();
    state.connections.channels.insert(number, events);
    drop(state);
    shared.retain();
    let pointer = ptr::from_ref::<Shared>(&shared);
    let channel = shared.keep(FakeChannel {
        c: sys::rdma_event_channel { fd },
        shared: pointer,
        number,
    });
    channel.cast()
}

/// # Safety
/// `channel` must be one of a fabric that is alive for `'a`.
pub(super) unsafe fn channel_of<'a>(channel: *mut sys::rdma_event_channel) -> (&'a Shared, u64) {
    // SAFETY: every channel is a `FakeChannel` of its fabric's arena.
    let channel = unsafe { &*channel.cast::<FakeChannel>() };
    // SAFETY: the fabric is alive by this function's contract.
    (unsafe { &*channel.shared }, channel.number)
}

unsafe extern "C" fn destroy_channel(channel: *mut sys::rdma_event_channel) {
    // SAFETY: the caller passes a channel of a living fabric.
    let (shared, number) = unsafe { channel_of(channel) };
    let mut state = shared.lock();
    if state.connections.channels.remove(&number).is_none() {
        state.violate(Violation::UseAfterDestroy {
            call: "destroy_event_channel",
        });
        return;
    }
    drop(state);
    // SAFETY: undoes the `retain` of `create_channel`, once, because the channel was still in the table.
    unsafe { Shared::release(shared) };
}

/// Makes the C structure of an identifier, which keeps the fabric alive.
pub(super) fn new_id(
    shared: &Shared,
    number: u64,
    channel: *mut sys::rdma_event_channel,
    user: *mut c_void,
) -> *mut FakeId {
    // SAFETY: the structure is integers and pointers, for which zero is a value.
    let mut c: sys::rdma_cm_id = unsafe { std::mem::zeroed() };
    c.channel = channel;
    c.context = user;
    c.ps = sys::RDMA_PS_TCP;
    c.qp_type = sys::IBV_QPT_RC;
    shared.retain();
    shared.keep(FakeId {
        c,
        shared: ptr::from_ref(shared),
        number,
    })
}

unsafe extern "C" fn create_id(
    channel: *mut sys::rdma_event_channel,
    into: *mut *mut sys::rdma_cm_id,
    user: *mut c_void,
    _space: c_uint,
) -> c_int {
    // SAFETY: the caller passes a channel of a living fabric.
    let (shared, channel_number) = unsafe { channel_of(channel) };
    let number = shared.lock().connections.add_id(channel_number);
    let id = new_id(shared, number, channel, user);
    let mut state = shared.lock();
    if let Some(entry) = state.connections.ids.get_mut(&number) {
        entry.handle = id.expose_provenance();
    }
    // SAFETY: the caller passes a writable place.
    unsafe { into.write(id.cast()) };
    0
}

/// # Safety
/// `id` must be one of a fabric that is alive for `'a`.
unsafe fn id_of<'a>(id: *mut sys::rdma_cm_id) -> (&'a Shared, u64) {
    let id = id.cast::<FakeId>();
    // SAFETY: every identifier is a `FakeId` of its fabric's arena.
    let shared = unsafe { (*id).shared };
    // SAFETY: as above.
    let number = unsafe { (*id).number };
    // SAFETY: the fabric is alive by this function's contract.
    (unsafe { &*shared }, number)
}

unsafe extern "C" fn destroy_id(id: *mut sys::rdma_cm_id) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    let mut state = shared.lock();
    let Some(entry) = state.connections.ids.get(&number) else {
        state.violate(Violation::UseAfterDestroy { call: "destroy_id" });
        return returned(Err(libc::EINVAL));
    };
    let count = entry.unacked;
    if count > 0 {
        let call = "destroy_id";
        state.violate(Violation::EventsNotAcknowledged { call, count });
        return returned(Err(libc::EBUSY));
    }
    let result = state.cm_destroy(number);
    drop(state);
    if result.is_ok() {
        // SAFETY: undoes the `retain` of `new_id`, once, because the identifier was still in the table.
        unsafe { Shared::release(shared) };
    }
    returned(result)
}

/// An IPv4 address and port in host byte order; `None` for anything else.
///
/// # Safety
/// `address` must be null or point to a socket address of the size that its family has.
unsafe fn ipv4(address: *const libc::sockaddr) -> Option<(u32, u16)> {
    if address.is_null() {
        return None;
    }
    // SAFETY: every socket address begins with its family.
    let family = unsafe { (*address).sa_family };
    if c_int::from(family) != libc::AF_INET {
        return None;
    }
    // SAFETY: the family says that it is one of these, by this function's contract complete.
    let address = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
    Some((
        u32::from_be(address.sin_addr.s_addr),
        u16::from_be(address.sin_port),
    ))
}

fn socket_address((address, port): (u32, u16)) -> libc::sockaddr_storage {
    // SAFETY: the structure is plain bytes, for which zero is a value.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let written = libc::sockaddr_in {
        sin_family: libc::AF_INET.cast_unsigned().try_into().unwrap_or(0),
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: address.to_be(),
        },
        sin_zero: [0; 8],
    };
    let place = (&raw mut storage).cast::<libc::sockaddr_in>();
    // SAFETY: the storage is larger than an IPv4 address and aligned for it.
    unsafe { place.write(written) };
    storage
}

/// Writes what is known of an identifier into its C structure: device, addresses.
///
/// # Safety
/// `id` must be one of this fabric that no other thread uses now.
pub(super) unsafe fn refresh(
    shared: &Shared,
    state: &State,
    number: u64,
    id: *mut sys::rdma_cm_id,
) {
    let Some(entry) = state.connections.ids.get(&number) else {
        return;
    };
    // SAFETY: by this function's contract nobody else reads or writes the structure now.
    let c = unsafe { &mut *id };
    if let Some(context) = entry.device.and_then(|device| shared.managed().get(device)) {
        c.verbs = context.cast();
        c.port_num = 1;
    }
    c.route.addr.src_storage = socket_address(entry.local);
    c.route.addr.dst_storage = socket_address(entry.remote);
}

unsafe extern "C" fn bind_addr(id: *mut sys::rdma_cm_id, local: *mut libc::sockaddr) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    // SAFETY: the caller passes a socket address.
    let Some(local) = (unsafe { ipv4(local) }) else {
        return returned(Err(libc::EAFNOSUPPORT));
    };
    shared.managed();
    let mut state = shared.lock();
    let result = state.cm_bind(number, local);
    // SAFETY: the caller owns the identifier during the call.
    unsafe { refresh(shared, &state, number, id) };
    returned(result)
}

unsafe extern "C" fn resolve_addr(
    id: *mut sys::rdma_cm_id,
    source: *mut libc::sockaddr,
    target: *mut libc::sockaddr,
    _timeout_ms: c_int,
) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    // SAFETY: the caller passes null or a socket address.
    let source = unsafe { ipv4(source) };
    // SAFETY: the caller passes a socket address.
    let Some(target) = (unsafe { ipv4(target) }) else {
        return returned(Err(libc::EAFNOSUPPORT));
    };
    shared.managed();
    let mut state = shared.lock();
    let result = state.cm_resolve_address(number, source, target);
    // SAFETY: the caller owns the identifier during the call.
    unsafe { refresh(shared, &state, number, id) };
    returned(result)
}

unsafe extern "C" fn resolve_route(id: *mut sys::rdma_cm_id, _timeout_ms: c_int) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    returned(shared.lock().cm_resolve_route(number))
}

unsafe extern "C" fn create_qp(
    id: *mut sys::rdma_cm_id,
    pd: *mut sys::ibv_pd,
    attr: *mut sys::ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    // SAFETY: as above.
    let verbs = unsafe { (*id).verbs };
    if verbs.is_null() || pd.is_null() {
        return returned(Err(libc::EINVAL));
    }
    // SAFETY: the caller passes a domain of a living fabric.
    let context = unsafe { (*pd).context };
    if context != verbs {
        // The domain was made on a context that is not the connection manager's.
        return returned(Err(libc::EINVAL));
    }
    // SAFETY: the caller passes a domain of this fabric and readable attributes.
    let qp = unsafe { queues::create_qp(pd, attr) };
    if qp.is_null() {
        return -1;
    }
    // SAFETY: it has just been made.
    let queue_number = unsafe { (*qp).qp_num };
    // SAFETY: as above; nobody else has it yet.
    unsafe { (*qp).state = sys::IBV_QPS_INIT };
    // SAFETY: the caller owns the identifier during the call.
    unsafe { (*id).qp = qp };
    // SAFETY: a domain's context is its fabric's.
    let (_, device) = unsafe { fabric_of(context) };
    let queue = super::QueuePairId {
        device,
        number: queue_number,
    };
    let mut state = shared.lock();
    if let Some(entry) = state.queue_mut(queue) {
        entry.cm = Some(number);
        entry.state = sys::IBV_QPS_INIT;
    }
    if let Some(entry) = state.connections.ids.get_mut(&number) {
        entry.queue = Some(queue);
    }
    0
}

unsafe extern "C" fn destroy_qp(id: *mut sys::rdma_cm_id) {
    // SAFETY: the caller passes an identifier of a living fabric, and owns it.
    let qp = unsafe { std::mem::replace(&mut (*id).qp, ptr::null_mut()) };
    if !qp.is_null() {
        // SAFETY: the queue pair is the identifier's own, of the same fabric.
        unsafe { lifecycle::destroy_qp(qp) };
    }
}

/// The private data of connection parameters.
///
/// # Safety
/// `param` must be null or readable, with as much private data as it says.
unsafe fn private_data(param: *const sys::rdma_conn_param) -> Vec<u8> {
    if param.is_null() {
        return Vec::new();
    }
    // SAFETY: by this function's contract.
    let param = unsafe { *param };
    // SAFETY: as above.
    unsafe { bytes(param.private_data, param.private_data_len) }
}

/// # Safety
/// `data` must be null or have `len` readable bytes.
unsafe fn bytes(data: *const c_void, len: u8) -> Vec<u8> {
    if data.is_null() || len == 0 {
        return Vec::new();
    }
    // SAFETY: by this function's contract.
    unsafe { std::slice::from_raw_parts(data.cast::<u8>(), usize::from(len)) }.to_vec()
}

unsafe extern "C" fn connect(id: *mut sys::rdma_cm_id, param: *mut sys::rdma_conn_param) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    // SAFETY: the caller passes readable parameters.
    let private = unsafe { private_data(param) };
    returned(shared.lock().cm_connect(number, &private))
}

unsafe extern "C" fn listen(id: *mut sys::rdma_cm_id, backlog: c_int) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    returned(shared.lock().cm_listen(number, backlog))
}

/// Tells libibverbs' structure what librdmacm has made of the queue pair.
///
/// # Safety
/// `id` must be an identifier whose owner is in a call.
pub(super) unsafe fn cache_rts(id: *mut sys::rdma_cm_id) {
    // SAFETY: by this function's contract.
    let qp = unsafe { (*id).qp };
    if !qp.is_null() {
        // SAFETY: the arena keeps it; its owner is in this call.
        unsafe { (*qp).state = sys::IBV_QPS_RTS };
    }
}

unsafe extern "C" fn accept(id: *mut sys::rdma_cm_id, param: *mut sys::rdma_conn_param) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    // SAFETY: the caller passes null or readable parameters.
    let private = unsafe { private_data(param) };
    let result = shared.lock().cm_accept(number, &private);
    if result.is_ok() {
        // SAFETY: the caller owns the identifier during the call.
        unsafe { cache_rts(id) };
    }
    returned(result)
}

unsafe extern "C" fn reject(id: *mut sys::rdma_cm_id, data: *const c_void, len: u8) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    // SAFETY: the caller passes so many bytes.
    let private = unsafe { bytes(data, len) };
    returned(shared.lock().cm_reject(number, &private))
}

unsafe extern "C" fn disconnect(id: *mut sys::rdma_cm_id) -> c_int {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    returned(shared.lock().cm_disconnect(number))
}

unsafe extern "C" fn source_port(id: *mut sys::rdma_cm_id) -> u16 {
    // SAFETY: the caller passes an identifier of a living fabric.
    let (shared, number) = unsafe { id_of(id) };
    let state = shared.lock();
    let entry = state.connections.ids.get(&number);
    entry.map_or(0, |entry| entry.local.1).to_be()
}
