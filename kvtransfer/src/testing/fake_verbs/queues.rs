//! libibverbs' exported calls on completion channels, completion queues and queue pairs.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{
    collections::VecDeque,
    ffi::{c_int, c_uint, c_void},
    ptr,
    sync::{Arc, atomic::AtomicU32},
};

use super::{
    behaviour::SendQueueRule,
    calls::COMPLETIONS_MAX,
    connect::Errno,
    counters::{QueueCounters, Violation, WatchCounters},
    events::{Armed, CompletionQueue, EventQueue},
    queue::{Hardware, Injected, QueuePair, SendQueue, Sizes},
    shared::{COMPLETION_VECTORS, FakeCompletions, Shared, fabric_of, set_errno},
    state::{About, State},
};
use crate::transport::verbs::sys;

/// The smallest completion queue of eRDMA's provider; others are exact.
const ERDMA_COMPLETIONS_MIN: u32 = 64;

fn null_with<T>(errno: c_int) -> *mut T {
    set_errno(errno);
    ptr::null_mut()
}

pub(super) unsafe extern "C" fn create_channel(
    context: *mut sys::ibv_context,
) -> *mut sys::ibv_comp_channel {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    let Ok(mut events) = EventQueue::new() else {
        return null_with(libc::EMFILE);
    };
    let fd = events.raw_fd();
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    if device.removed {
        return null_with(libc::EIO);
    }
    events.set_frozen(device.frozen);
    let handle = device.new_handle();
    device.channels.insert(handle, events);
    drop(state);
    shared.retain();
    // The C structure has no handle, so `refcnt`, which users leave alone, carries it.
    shared.keep(sys::ibv_comp_channel {
        context,
        fd,
        refcnt: c_int::try_from(handle).unwrap_or(c_int::MAX),
    })
}

/// # Safety
/// `channel` must be one of a fabric that is alive for `'a`.
unsafe fn channel_of<'a>(channel: *mut sys::ibv_comp_channel) -> (&'a Shared, usize, u32) {
    // SAFETY: by this function's contract.
    let context = unsafe { (*channel).context };
    // SAFETY: as above.
    let handle = unsafe { (*channel).refcnt };
    // SAFETY: a channel's context is its fabric's.
    let (shared, index) = unsafe { fabric_of(context) };
    (shared, index, handle.cast_unsigned())
}

pub(super) unsafe extern "C" fn destroy_channel(channel: *mut sys::ibv_comp_channel) -> c_int {
    // SAFETY: the caller passes a channel of a living fabric.
    let (shared, index, handle) = unsafe { channel_of(channel) };
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    let mut users = device.completions.values();
    if users.any(|completions| completions.channel == Some(handle)) {
        return libc::EBUSY;
    }
    if device.channels.remove(&handle).is_none() {
        state.violate(Violation::UseAfterDestroy {
            call: "destroy_comp_channel",
        });
        return libc::EINVAL;
    }
    drop(state);
    // SAFETY: undoes the `retain` of `create_channel`, once, because the channel was still in the table.
    unsafe { Shared::release(shared) };
    0
}

pub(super) unsafe extern "C" fn create_cq(
    context: *mut sys::ibv_context,
    entries: c_int,
    user: *mut c_void,
    channel: *mut sys::ibv_comp_channel,
    vector: c_int,
) -> *mut sys::ibv_cq {
    // SAFETY: the caller passes a context of a living fabric.
    let (shared, index) = unsafe { fabric_of(context) };
    let channel_number = if channel.is_null() {
        None
    } else {
        // SAFETY: the caller passes null or a channel of this fabric.
        Some(unsafe { channel_of(channel) }.2)
    };
    let mut state = shared.lock();
    let Ok(asked) = u32::try_from(entries) else {
        return null_with(libc::EINVAL);
    };
    if asked == 0 || entries > COMPLETIONS_MAX || !(0..COMPLETION_VECTORS).contains(&vector) {
        return null_with(libc::EINVAL);
    }
    let capacity = match state.behaviour.send_queue {
        SendQueueRule::Blocks => asked.max(ERDMA_COMPLETIONS_MIN).next_power_of_two(),
        SendQueueRule::Requests | SendQueueRule::Lenient => asked,
    };
    if state.devices[index].removed {
        return null_with(libc::EIO);
    }
    let handle = state.devices[index].new_handle();
    let pollers = Arc::new(AtomicU32::new(0));
    // SAFETY: a mutex of zeroes is an initialised one on Linux, and nobody uses it.
    let mutex = unsafe { std::mem::zeroed() };
    // SAFETY: the same for the condition variable.
    let cond = unsafe { std::mem::zeroed() };
    let object = shared.keep(FakeCompletions {
        c: sys::ibv_cq {
            context,
            channel,
            cq_context: user,
            handle,
            cqe: c_int::try_from(capacity).unwrap_or(c_int::MAX),
            mutex,
            cond,
            comp_events_completed: 0,
            async_events_completed: 0,
        },
        pollers: Arc::clone(&pollers),
    });
    let completions = CompletionQueue {
        capacity,
        entries: VecDeque::new(),
        armed: Armed::No,
        channel: channel_number,
        handle: object.expose_provenance(),
        unacked: 0,
        held: None,
        late: VecDeque::new(),
        watched: WatchCounters::default(),
        pollers,
    };
    state.devices[index].completions.insert(handle, completions);
    drop(state);
    shared.retain();
    object.cast()
}

/// # Safety
/// `cq` must be a completion queue of a fabric that is alive for `'a`.
unsafe fn completions_of<'a>(cq: *mut sys::ibv_cq) -> (&'a Shared, usize, u32) {
    // SAFETY: by this function's contract.
    let context = unsafe { (*cq).context };
    // SAFETY: as above.
    let handle = unsafe { (*cq).handle };
    // SAFETY: a completion queue's context is its fabric's.
    let (shared, index) = unsafe { fabric_of(context) };
    (shared, index, handle)
}

pub(super) unsafe extern "C" fn destroy_cq(cq: *mut sys::ibv_cq) -> c_int {
    // SAFETY: the caller passes a completion queue of a living fabric.
    let (shared, index, handle) = unsafe { completions_of(cq) };
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    let mut users = device.queues.values();
    if users.any(|queue| queue.send_cq == handle || queue.recv_cq == handle) {
        return libc::EBUSY;
    }
    let Some(completions) = device.completions.get(&handle) else {
        state.violate(Violation::UseAfterDestroy { call: "destroy_cq" });
        return libc::EINVAL;
    };
    let (count, channel) = (completions.unacked, completions.channel);
    if count > 0 {
        let call = "destroy_cq";
        state.violate(Violation::EventsNotAcknowledged { call, count });
        return libc::EBUSY;
    }
    if let Some(channel) = channel.and_then(|channel| device.channels.get_mut(&channel)) {
        channel.remove_if(|about| *about == handle);
    }
    device
        .events
        .remove_if(|event| matches!(event.about, About::Completions(at, _) if at == handle));
    device.completions.remove(&handle);
    drop(state);
    // SAFETY: undoes the `retain` of `create_cq`, once, because the queue was still in the table.
    unsafe { Shared::release(shared) };
    0
}

pub(super) unsafe extern "C" fn next_cq_event(
    channel: *mut sys::ibv_comp_channel,
    cq: *mut *mut sys::ibv_cq,
    user: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller passes a channel of a living fabric.
    let (shared, index, handle) = unsafe { channel_of(channel) };
    let fd = shared.lock().devices[index]
        .channels
        .get(&handle)
        .map(EventQueue::fd);
    let Some(fd) = fd else {
        set_errno(libc::EINVAL);
        return -1;
    };
    if let Err(error) = rustix::io::read(&*fd, &mut [0; 8]) {
        set_errno(error.raw_os_error());
        return -1;
    }
    let mut state = shared.lock();
    let device = &mut state.devices[index];
    let number = device.channels.get_mut(&handle).and_then(EventQueue::pop);
    let completions = number.and_then(|number| device.completions.get_mut(&number));
    let Some(completions) = completions else {
        set_errno(libc::EAGAIN);
        return -1;
    };
    completions.unacked += 1;
    let found: *mut sys::ibv_cq = ptr::with_exposed_provenance_mut(completions.handle);
    // SAFETY: the caller passes a writable place.
    unsafe { cq.write(found) };
    // SAFETY: the queue is in the table, so its structure is alive.
    let context = unsafe { (*found).cq_context };
    // SAFETY: the caller passes a writable place.
    unsafe { user.write(context) };
    0
}

pub(super) unsafe extern "C" fn ack_cq_events(cq: *mut sys::ibv_cq, count: c_uint) {
    // SAFETY: the caller passes a completion queue of a living fabric.
    let (shared, index, handle) = unsafe { completions_of(cq) };
    let mut state = shared.lock();
    if let Some(completions) = state.devices[index].completions.get_mut(&handle) {
        completions.unacked = completions.unacked.saturating_sub(count);
    }
}

/// Whether the provider takes a queue pair of this size.
fn validate(state: &State, attr: &sys::ibv_qp_init_attr) -> Result<Sizes, Errno> {
    let behaviour = &state.behaviour;
    if attr.qp_type != sys::IBV_QPT_RC || !attr.srq.is_null() {
        return Err(libc::EOPNOTSUPP);
    }
    if attr.send_cq.is_null() || attr.recv_cq.is_null() {
        return Err(libc::EINVAL);
    }
    let cap = attr.cap;
    let send_fits = (1..=behaviour.queue_depth_max).contains(&cap.max_send_wr);
    let recv_fits =
        (behaviour.recv_depth_min..=behaviour.queue_depth_max).contains(&cap.max_recv_wr);
    let fits = send_fits
        && recv_fits
        && cap.max_send_sge <= behaviour.send_sge_max
        && cap.max_recv_sge <= behaviour.recv_sge_max
        && cap.max_inline_data <= behaviour.inline_max;
    if !fits {
        return Err(libc::EINVAL);
    }
    Ok(Sizes {
        send_depth: cap.max_send_wr,
        recv_depth: cap.max_recv_wr,
        send_sge: cap.max_send_sge,
        recv_sge: cap.max_recv_sge,
        inline: cap.max_inline_data,
    })
}

pub(super) unsafe extern "C" fn create_qp(
    pd: *mut sys::ibv_pd,
    attr: *mut sys::ibv_qp_init_attr,
) -> *mut sys::ibv_qp {
    // SAFETY: the caller passes a domain of a living fabric.
    let context = unsafe { (*pd).context };
    // SAFETY: as above.
    let domain = unsafe { (*pd).handle };
    // SAFETY: the caller passes readable attributes.
    let attr = unsafe { &*attr };
    // SAFETY: a domain's context is its fabric's.
    let (shared, index) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    let sizes = match validate(&state, attr) {
        Ok(sizes) => sizes,
        Err(errno) => return null_with(errno),
    };
    // SAFETY: the caller passes completion queues of this fabric.
    let (_, _, send_cq) = unsafe { completions_of(attr.send_cq) };
    // SAFETY: as above.
    let (_, _, recv_cq) = unsafe { completions_of(attr.recv_cq) };
    let serial = state.new_serial();
    let rule = state.behaviour.send_queue;
    let device = &mut state.devices[index];
    // SAFETY: the caller passes completion queues of this fabric.
    let send_context = unsafe { (*attr.send_cq).context };
    // SAFETY: as above.
    let recv_context = unsafe { (*attr.recv_cq).context };
    let queues_live = [send_cq, recv_cq]
        .iter()
        .all(|number| device.completions.contains_key(number));
    if device.removed {
        return null_with(libc::EIO);
    }
    if !queues_live || send_context != context || recv_context != context {
        return null_with(libc::EINVAL);
    }
    let number = device.new_queue_number();
    // SAFETY: a mutex of zeroes is an initialised one on Linux, and nobody uses it.
    let mutex = unsafe { std::mem::zeroed() };
    // SAFETY: the same for the condition variable.
    let cond = unsafe { std::mem::zeroed() };
    let object = shared.keep(sys::ibv_qp {
        context,
        qp_context: attr.qp_context,
        pd,
        send_cq: attr.send_cq,
        recv_cq: attr.recv_cq,
        srq: ptr::null_mut(),
        handle: number,
        qp_num: number,
        state: sys::IBV_QPS_RESET,
        qp_type: attr.qp_type,
        mutex,
        cond,
        events_completed: 0,
    });
    let queue = QueuePair {
        serial,
        pd: domain,
        send_cq,
        recv_cq,
        signals_all: attr.sq_sig_all != 0,
        sizes,
        state: sys::IBV_QPS_RESET,
        hardware: Hardware::Idle,
        handle: object.expose_provenance(),
        remote: None,
        pinned: None,
        cm: None,
        rnr_forever: true,
        send: SendQueue::new(rule, sizes.send_depth),
        ledger: SendQueue::new(SendQueueRule::Requests, u32::MAX),
        waiting: VecDeque::new(),
        received: VecDeque::new(),
        stalled_at: None,
        unacked_events: 0,
        injected: Injected::default(),
        counters: QueueCounters::default(),
    };
    device.queues.insert(number, queue);
    object
}
