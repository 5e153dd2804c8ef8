//! libibverbs' exported calls on devices, contexts, protection domains, regions and asynchronous events.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{
    ffi::{c_char, c_int},
    ptr,
};

use super::{
    counters::Violation,
    lifecycle, queues, regions,
    shared::{FABRICS_MAX, FakeDevice, Shared, fabric_of, set_errno},
    state::{About, State},
    sysfs,
};
use crate::transport::verbs::{library::VerbsCalls, sys};

/// The most queue pairs that a device reports; not enforced.
const QUEUES_MAX: c_int = 1023;
/// The deepest completion queue.
pub(super) const COMPLETIONS_MAX: c_int = 1 << 20;
/// READs in flight that a device reports.
const READS_MAX: c_int = 128;
/// `active_speed` that means EDR: eRDMA reports it whatever the link does.
const SPEED_EDR: u8 = 32;
/// `active_width` that means four lanes.
const WIDTH_4X: u8 = 2;
/// `phys_state` of a link that is up, and of one that is not.
const PHYSICAL_UP: u8 = 5;
const PHYSICAL_DISABLED: u8 = 3;

/// The copies of the call that has no argument to tell fabrics apart.
macro_rules! per_slot {
    ($call:ident: $($slot:literal)*) => { [$($call::<$slot>),*] };
}
pub(super) use per_slot;

type DeviceListCall = unsafe extern "C" fn(*mut c_int) -> *mut *mut sys::ibv_device;

const DEVICE_LISTS: [DeviceListCall; FABRICS_MAX] =
    per_slot!(device_list: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);

/// The table of the fabric in this slot.
pub(super) fn table(slot: usize) -> VerbsCalls {
    VerbsCalls {
        ibv_get_device_list: DEVICE_LISTS[slot],
        ibv_free_device_list: free_device_list,
        ibv_get_device_guid: device_guid,
        ibv_open_device: open_device,
        ibv_close_device: close_device,
        ibv_get_async_event: next_async_event,
        ibv_ack_async_event: ack_async_event,
        ibv_query_device: query_device,
        ibv_query_port: query_port,
        ibv_query_gid: query_gid,
        ibv_alloc_pd: alloc_pd,
        ibv_dealloc_pd: dealloc_pd,
        ibv_reg_mr: regions::reg_mr,
        ibv_dereg_mr: regions::dereg_mr,
        ibv_create_comp_channel: queues::create_channel,
        ibv_destroy_comp_channel: queues::destroy_channel,
        ibv_create_cq: queues::create_cq,
        ibv_destroy_cq: queues::destroy_cq,
        ibv_get_cq_event: queues::next_cq_event,
        ibv_ack_cq_events: queues::ack_cq_events,
        ibv_create_qp: queues::create_qp,
        ibv_modify_qp: lifecycle::modify_qp,
        ibv_destroy_qp: lifecycle::destroy_qp,
        ibv_reg_mr_iova2: Some(regions::reg_mr_iova2),
        ibv_reg_dmabuf_mr: Some(regions::reg_dmabuf_mr),
    }
}

unsafe extern "C" fn device_list<const SLOT: usize>(
    count: *mut c_int,
) -> *mut *mut sys::ibv_device {
    let Some(shared) = Shared::in_slot(SLOT) else {
        set_errno(libc::ENOSYS);
        return ptr::null_mut();
    };
    let state = shared.lock();
    let present = |(index, device): (usize, &*mut FakeDevice)| {
        let removed = state.devices.get(index).is_none_or(|device| device.removed);
        (!removed).then_some(device.cast::<sys::ibv_device>())
    };
    let all = shared.devices().iter().enumerate();
    let mut list: Vec<*mut sys::ibv_device> = all.filter_map(present).collect();
    if !count.is_null() {
        // SAFETY: the caller passes null or a writable place.
        unsafe { *count = c_int::try_from(list.len()).unwrap_or(c_int::MAX) };
    }
    list.push(ptr::null_mut());
    drop(state);
    // The length is found again by the final null; see `free_device_list`.
    Box::into_raw(list.into_boxed_slice()).cast()
}

/// Counts the entries of a null-terminated array, the null included.
///
/// # Safety
/// `list` must be such an array.
pub(super) unsafe fn length_with_null<T>(list: *mut *mut T) -> usize {
    let mut len = 0;
    loop {
        // SAFETY: the final null has not been passed yet.
        let place = unsafe { list.add(len) };
        len += 1;
        // SAFETY: as above.
        if unsafe { *place }.is_null() {
            return len;
        }
    }
}

unsafe extern "C" fn free_device_list(list: *mut *mut sys::ibv_device) {
    if list.is_null() {
        return;
    }
    // SAFETY: the caller passes an array from `device_list`, once.
    let len = unsafe { length_with_null(list) };
    let list = ptr::slice_from_raw_parts_mut(list, len);
    // SAFETY: `device_list` made it from a box of this length.
    drop(unsafe { Box::from_raw(list) });
}

/// # Safety
/// `device` must come from `device_list` of a fabric that is alive for `'a`.
unsafe fn device_of<'a>(device: *mut sys::ibv_device) -> (&'a Shared, usize) {
    // SAFETY: every device of a fabric is a `FakeDevice` of its arena.
    let device = unsafe { &*device.cast::<FakeDevice>() };
    // SAFETY: the fabric is alive by this function's contract.
    (unsafe { &*device.shared }, device.index)
}

unsafe extern "C" fn device_guid(device: *mut sys::ibv_device) -> u64 {
    // SAFETY: the caller passes a device of a living fabric.
    let (shared, index) = unsafe { device_of(device) };
    let state = shared.lock();
    node_guid(&state, index).to_be()
}

/// The GUID made of the device's MAC, host byte order.
pub(super) fn node_guid(state: &State, index: usize) -> u64 {
    let mac = state.devices[index].mac;
    u64::from_be_bytes([
        mac[0] ^ 2,
        mac[1],
        mac[2],
        0xff,
        0xfe,
        mac[3],
        mac[4],
        mac[5],
    ])
}

unsafe extern "C" fn open_device(device: *mut sys::ibv_device) -> *mut sys::ibv_context {
    // SAFETY: the caller passes a device of a living fabric.
    let (shared, index) = unsafe { device_of(device) };
    if shared.lock().devices[index].removed {
        set_errno(libc::ENODEV);
        return ptr::null_mut();
    }
    let Some(context) = shared.open(index) else {
        set_errno(libc::ENODEV);
        return ptr::null_mut();
    };
    shared.lock().devices[index].contexts += 1;
    shared.retain();
    context.cast()
}

unsafe extern "C" fn close_device(context: *mut sys::ibv_context) -> c_int {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    device.contexts = device.contexts.saturating_sub(1);
    let (objects, contexts) = (device.objects(), device.contexts);
    // Other contexts of the device may own them, also one that the connection manager keeps.
    if objects > 0 && contexts == 0 && state.behaviour.cm.is_none() {
        state.violate(Violation::ClosedWithObjects {
            device: index,
            objects,
        });
    }
    drop(state);
    // SAFETY: undoes the `retain` of `open_device`; the caller closes once.
    unsafe { Shared::release(shared) };
    0
}

unsafe extern "C" fn next_async_event(
    context: *mut sys::ibv_context,
    into: *mut sys::ibv_async_event,
) -> c_int {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    let fd = shared.lock().devices[index].events.fd();
    if let Err(error) = rustix::io::read(&*fd, &mut [0; 8]) {
        set_errno(error.raw_os_error());
        return -1;
    }
    let mut state = shared.lock();
    let Some(event) = state.devices[index].events.pop() else {
        set_errno(libc::EAGAIN);
        return -1;
    };
    let element = match event.about {
        About::Queue(number, handle) => {
            if let Some(queue) = state.devices[index].queues.get_mut(&number) {
                queue.unacked_events += 1;
            }
            sys::ibv_async_event_element {
                qp: ptr::with_exposed_provenance_mut(handle),
            }
        }
        About::Completions(_, handle) => sys::ibv_async_event_element {
            cq: ptr::with_exposed_provenance_mut(handle),
        },
        About::Port => sys::ibv_async_event_element { port_num: 1 },
        About::Device => sys::ibv_async_event_element {
            other: ptr::null_mut(),
        },
    };
    let event = sys::ibv_async_event {
        element,
        event_type: event.kind,
    };
    // SAFETY: the caller passes a writable place.
    unsafe { into.write(event) };
    0
}

unsafe extern "C" fn ack_async_event(event: *mut sys::ibv_async_event) {
    // SAFETY: the caller passes an event that it got.
    let event = unsafe { *event };
    let names_queue = [
        sys::IBV_EVENT_QP_FATAL,
        sys::IBV_EVENT_QP_REQ_ERR,
        sys::IBV_EVENT_QP_ACCESS_ERR,
    ];
    if !names_queue.contains(&event.event_type) {
        return;
    }
    // SAFETY: events of these types carry a queue pair.
    let qp = unsafe { event.element.qp };
    // SAFETY: it cannot have been freed: the arena keeps it as long as the fabric.
    let context = unsafe { (*qp).context };
    // SAFETY: as above.
    let number = unsafe { (*qp).qp_num };
    // SAFETY: a queue pair's context is its fabric's.
    let (shared, index) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    if let Some(queue) = state.devices[index].queues.get_mut(&number) {
        queue.unacked_events = queue.unacked_events.saturating_sub(1);
    }
}

unsafe extern "C" fn query_device(
    context: *mut sys::ibv_context,
    into: *mut sys::ibv_device_attr,
) -> c_int {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    let state = shared.lock();
    let behaviour = &state.behaviour;
    let signed = |value: u32| c_int::try_from(value).unwrap_or(c_int::MAX);
    let mut firmware: [c_char; 64] = [0; 64];
    for (slot, byte) in firmware.iter_mut().zip(sysfs::FIRMWARE.bytes()) {
        *slot = c_char::from_ne_bytes([byte]);
    }
    // SAFETY: the structure is plain integers, for which zero is a value.
    let mut attr: sys::ibv_device_attr = unsafe { std::mem::zeroed() };
    attr.fw_ver = firmware;
    attr.node_guid = node_guid(&state, index).to_be();
    attr.sys_image_guid = attr.node_guid;
    attr.max_mr_size = behaviour.region_bytes_max;
    attr.page_size_cap = 0x7fff_f000;
    attr.vendor_id = behaviour.vendor_id;
    attr.vendor_part_id = behaviour.part_id;
    attr.max_qp = QUEUES_MAX;
    attr.max_qp_wr = signed(behaviour.queue_depth_max);
    attr.max_sge = signed(behaviour.reported_sge_max);
    attr.max_sge_rd = 1;
    attr.max_cq = 2 * QUEUES_MAX;
    attr.max_cqe = COMPLETIONS_MAX;
    attr.max_mr = 2 * QUEUES_MAX;
    attr.max_pd = QUEUES_MAX;
    attr.max_qp_rd_atom = READS_MAX;
    attr.max_qp_init_rd_atom = READS_MAX;
    // Newer eRDMA drivers report shared receive queues, and creating one fails all the same.
    attr.max_srq = 1;
    attr.phys_port_cnt = 1;
    // SAFETY: the caller passes a writable place.
    unsafe { into.write(attr) };
    0
}

unsafe extern "C" fn query_port(
    context: *mut sys::ibv_context,
    port: u8,
    into: *mut sys::ibv_port_attr,
) -> c_int {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    if port != 1 {
        return libc::EINVAL;
    }
    let state = shared.lock();
    let up = state.devices[index].port_up && !state.devices[index].removed;
    // SAFETY: the structure is plain integers, for which zero is a value.
    let mut attr: sys::ibv_port_attr = unsafe { std::mem::zeroed() };
    attr.state = if up {
        sys::IBV_PORT_ACTIVE
    } else {
        sys::IBV_PORT_DOWN
    };
    attr.max_mtu = sys::IBV_MTU_4096;
    attr.active_mtu = sys::IBV_MTU_1024;
    attr.gid_tbl_len = c_int::try_from(sysfs::gid_table(&state, index).len()).unwrap_or(0);
    attr.max_msg_sz = state.behaviour.message_bytes_max;
    attr.pkey_tbl_len = 1;
    attr.max_vl_num = 1;
    attr.active_width = WIDTH_4X;
    attr.active_speed = SPEED_EDR;
    attr.phys_state = if up { PHYSICAL_UP } else { PHYSICAL_DISABLED };
    attr.link_layer = sys::IBV_LINK_LAYER_ETHERNET;
    // SAFETY: the caller passes a writable place.
    unsafe { into.write(attr) };
    0
}

unsafe extern "C" fn query_gid(
    context: *mut sys::ibv_context,
    port: u8,
    entry: c_int,
    into: *mut sys::ibv_gid,
) -> c_int {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    let state = shared.lock();
    let table = sysfs::gid_table(&state, index);
    let found = usize::try_from(entry).ok().and_then(|at| table.get(at));
    let Some(found) = found.filter(|_| port == 1) else {
        set_errno(libc::EINVAL);
        return -1;
    };
    // SAFETY: the caller passes a writable place.
    unsafe { into.write(sys::ibv_gid { raw: found.raw }) };
    0
}

unsafe extern "C" fn alloc_pd(context: *mut sys::ibv_context) -> *mut sys::ibv_pd {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    if device.removed {
        set_errno(libc::EIO);
        return ptr::null_mut();
    }
    let handle = device.new_handle();
    device.domains.insert(handle);
    drop(state);
    shared.retain();
    shared.keep(sys::ibv_pd { context, handle })
}

unsafe extern "C" fn dealloc_pd(pd: *mut sys::ibv_pd) -> c_int {
    // SAFETY: the caller passes a domain of a living fabric.
    let context = unsafe { (*pd).context };
    // SAFETY: as above.
    let handle = unsafe { (*pd).handle };
    // SAFETY: a domain's context is its fabric's.
    let (shared, index) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    let in_use = device.regions.count_in(handle) > 0
        || device.queues.values().any(|queue| queue.pd == handle);
    if in_use {
        return libc::EBUSY;
    }
    if !device.domains.remove(&handle) {
        state.violate(Violation::UseAfterDestroy { call: "dealloc_pd" });
        return libc::EINVAL;
    }
    drop(state);
    // SAFETY: undoes the `retain` of `alloc_pd`, once, because the domain was still in the table.
    unsafe { Shared::release(shared) };
    0
}
