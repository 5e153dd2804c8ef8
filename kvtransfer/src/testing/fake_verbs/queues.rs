//! libibverbs' exported calls on completion channels, completion queues and queue pairs.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{
    collections::VecDeque,
    ffi::{c_int, c_uint, c_void},
    ptr,
    sync::{Arc, atomic::AtomicU32},
};

use super::{
    QueuePairId,
    behaviour::{OutOfBand, SendQueueRule},
    calls::COMPLETIONS_MAX,
    connect::Errno,
    counters::{QueueCounters, Violation},
    events::{Armed, CompletionQueue, EventQueue},
    queue::{Hardware, Injected, QueuePair, SendQueue, Sizes},
    shared::{COMPLETION_VECTORS, FakeCompletions, Shared, fabric_of, set_errno},
    state::{About, State},
    sysfs,
};
use crate::transport::verbs::sys;

/// The smallest completion queue of eRDMA's provider; others are exact.
const ERDMA_COMPLETIONS_MIN: u32 = 64;

/// What the kernel wants to be named for RTR on InfiniBand and RoCE.
const RTR_MASK: c_int = sys::IBV_QP_STATE
    | sys::IBV_QP_AV
    | sys::IBV_QP_PATH_MTU
    | sys::IBV_QP_DEST_QPN
    | sys::IBV_QP_RQ_PSN
    | sys::IBV_QP_MAX_DEST_RD_ATOMIC
    | sys::IBV_QP_MIN_RNR_TIMER;
/// The same for INIT.
const INIT_MASK: c_int =
    sys::IBV_QP_STATE | sys::IBV_QP_PKEY_INDEX | sys::IBV_QP_PORT | sys::IBV_QP_ACCESS_FLAGS;
/// The same for RTS.
const RTS_MASK: c_int = sys::IBV_QP_STATE
    | sys::IBV_QP_TIMEOUT
    | sys::IBV_QP_RETRY_CNT
    | sys::IBV_QP_RNR_RETRY
    | sys::IBV_QP_SQ_PSN
    | sys::IBV_QP_MAX_QP_RD_ATOMIC;
/// `rnr_retry` that means for ever.
const RNR_FOR_EVER: u8 = 7;

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
    if attr.send_cq.is_null() || attr.recv_cq.is_null() {
        return null_with(libc::EINVAL);
    }
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

pub(super) unsafe extern "C" fn modify_qp(
    qp: *mut sys::ibv_qp,
    attr: *mut sys::ibv_qp_attr,
    mask: c_int,
) -> c_int {
    // SAFETY: the caller passes a queue pair of a living fabric.
    let context = unsafe { (*qp).context };
    // SAFETY: as above.
    let number = unsafe { (*qp).qp_num };
    // SAFETY: a queue pair's context is its fabric's.
    let (shared, device) = unsafe { fabric_of(context) };
    // SAFETY: the caller passes readable attributes.
    let attr = unsafe { &*attr };
    let mut state = shared.lock();
    match state.modify(QueuePairId { device, number }, attr, mask) {
        Ok(()) => {
            if mask & sys::IBV_QP_STATE != 0 {
                // libibverbs believes what was asked, whatever the adapter made of it.
                // SAFETY: the structure lives as long as its fabric, and the caller owns the queue pair.
                unsafe { (*qp).state = attr.qp_state };
            }
            0
        }
        Err(errno) => errno,
    }
}

impl State {
    fn modify(
        &mut self,
        id: QueuePairId,
        attr: &sys::ibv_qp_attr,
        mask: c_int,
    ) -> Result<(), Errno> {
        if self.devices[id.device].removed {
            return Err(libc::EIO);
        }
        let Some(queue) = self.queue(id) else {
            self.violate(Violation::UseAfterDestroy { call: "modify_qp" });
            return Err(libc::EINVAL);
        };
        let (from, by_cm) = (queue.state, queue.cm.is_some());
        if mask & sys::IBV_QP_STATE == 0 {
            return Ok(());
        }
        if attr.qp_state == sys::IBV_QPS_ERR {
            self.stop_queue(id);
            return Ok(());
        }
        if by_cm {
            // The connection manager drives the states of its queue pairs.
            return Err(libc::EINVAL);
        }
        match self.behaviour.out_of_band {
            OutOfBand::Full => self.modify_by_the_book(id, attr, mask, from),
            OutOfBand::ReadyAtRtr => {
                if attr.qp_state == sys::IBV_QPS_RTR {
                    let named = sys::IBV_QP_AV | sys::IBV_QP_DEST_QPN;
                    if mask & named != named {
                        return Err(libc::EINVAL);
                    }
                    self.connect_out_of_band(id, attr, Hardware::Ready)?;
                    if let Some(queue) = self.queue_mut(id) {
                        queue.state = sys::IBV_QPS_RTS;
                    }
                }
                Ok(())
            }
            OutOfBand::RefusedAtRtr(errno) if attr.qp_state >= sys::IBV_QPS_RTR => Err(errno),
            OutOfBand::RefusedAtRts(errno) if attr.qp_state >= sys::IBV_QPS_RTS => Err(errno),
            OutOfBand::RefusedAtRtr(_) | OutOfBand::RefusedAtRts(_) => Ok(()),
        }
    }

    fn modify_by_the_book(
        &mut self,
        id: QueuePairId,
        attr: &sys::ibv_qp_attr,
        mask: c_int,
        from: u32,
    ) -> Result<(), Errno> {
        let needed = match (from, attr.qp_state) {
            (_, sys::IBV_QPS_RESET) => sys::IBV_QP_STATE,
            (sys::IBV_QPS_RESET, sys::IBV_QPS_INIT) => INIT_MASK,
            (sys::IBV_QPS_INIT, sys::IBV_QPS_RTR) => RTR_MASK,
            (sys::IBV_QPS_RTR, sys::IBV_QPS_RTS) => RTS_MASK,
            _ => return Err(libc::EINVAL),
        };
        if mask & needed != needed {
            return Err(libc::EINVAL);
        }
        match attr.qp_state {
            sys::IBV_QPS_RTR => self.connect_out_of_band(id, attr, Hardware::Receives)?,
            sys::IBV_QPS_RESET => self.reset(id),
            _ => {}
        }
        let Some(queue) = self.queue_mut(id) else {
            return Err(libc::EINVAL);
        };
        queue.state = attr.qp_state;
        if attr.qp_state == sys::IBV_QPS_RTS {
            queue.hardware = Hardware::Ready;
            queue.rnr_forever = attr.rnr_retry == RNR_FOR_EVER;
            self.pump(id);
        }
        Ok(())
    }

    fn reset(&mut self, id: QueuePairId) {
        let rule = self.behaviour.send_queue;
        if let Some(queue) = self.queue_mut(id) {
            queue.hardware = Hardware::Idle;
            queue.remote = None;
            queue.pinned = None;
            queue.waiting.clear();
            queue.received.clear();
            queue.stalled_at = None;
            queue.send = SendQueue::new(rule, queue.sizes.send_depth);
            queue.ledger = SendQueue::new(SendQueueRule::Requests, u32::MAX);
        }
        self.forget_completions(id);
    }

    /// Points a queue pair at its peer. A peer that nobody has is no error: nothing will answer.
    fn connect_out_of_band(
        &mut self,
        id: QueuePairId,
        attr: &sys::ibv_qp_attr,
        hardware: Hardware,
    ) -> Result<(), Errno> {
        let route = attr.ah_attr.grh;
        let is_roce = self.behaviour.roce_gid_index.is_some();
        let table = sysfs::gid_table(self, id.device);
        let source = table.get(usize::from(route.sgid_index));
        let usable = source.is_some_and(|entry| !is_roce || entry.is_usable_ipv4());
        if attr.ah_attr.is_global == 0 || !usable {
            return Err(libc::EINVAL);
        }
        let there = (0..self.devices.len())
            .find(|&device| self.devices[device].gid(is_roce) == route.dgid.raw);
        let Some(queue) = self.queue_mut(id) else {
            return Err(libc::EINVAL);
        };
        if queue.hardware != Hardware::Idle {
            // eRDMA's state switch ignores what it does not expect: a queue pair keeps its first peer for life.
            return Ok(());
        }
        queue.remote = there.map(|device| QueuePairId {
            device,
            number: attr.dest_qp_num,
        });
        queue.hardware = hardware;
        self.pump(id);
        // Whoever has been waiting for this queue pair to receive may go on.
        self.pump_peer(id);
        Ok(())
    }

    /// The user moves a queue pair to ERR: nothing more leaves it. Whether it still lets writes in is the adapter's.
    pub(super) fn stop_queue(&mut self, id: QueuePairId) {
        self.release_zombies(id);
        let fences = self.behaviour.error_state_fences;
        let was_open = self
            .queue(id)
            .is_some_and(|queue| matches!(queue.hardware, Hardware::Receives | Hardware::Ready));
        self.fail_queue(id);
        if let Some(queue) = self.queue_mut(id)
            && was_open
            && !fences
        {
            queue.hardware = Hardware::Receives;
        }
        self.disconnect_queue(id);
    }

    /// Drops what a completion queue still holds of a queue pair.
    fn forget_completions(&mut self, id: QueuePairId) {
        let Some(serial) = self.queue(id).map(|queue| queue.serial) else {
            return;
        };
        let mut lost = 0;
        for completions in self.devices[id.device].completions.values_mut() {
            let lists = [Some(&mut completions.entries), completions.held.as_mut()];
            for list in lists.into_iter().flatten() {
                let before = list.len();
                list.retain(|completion| completion.queue_serial != serial);
                lost += (before - list.len()) as u64;
            }
        }
        self.counters.completions_lost += lost;
    }

    /// `ibv_destroy_qp`.
    pub(super) fn destroy_queue(&mut self, id: QueuePairId) -> Result<(), Errno> {
        let Some(queue) = self.queue(id) else {
            self.violate(Violation::UseAfterDestroy { call: "destroy_qp" });
            return Err(libc::EINVAL);
        };
        let count = queue.unacked_events;
        if count > 0 {
            let call = "destroy_qp";
            self.violate(Violation::EventsNotAcknowledged { call, count });
            return Err(libc::EBUSY);
        }
        let used = [queue.send_cq, queue.recv_cq];
        let device = &self.devices[id.device];
        let completions = used.iter().filter_map(|cq| device.completions.get(cq));
        if completions
            .into_iter()
            .any(CompletionQueue::is_being_polled)
        {
            self.violate(Violation::DestroyedDuringPoll { queue: id });
        }
        self.release_zombies(id);
        self.disconnect_queue(id);
        self.forget_completions(id);
        let device = &mut self.devices[id.device];
        device
            .events
            .remove_if(|event| matches!(event.about, About::Queue(at, _) if at == id.number));
        let Some(queue) = device.queues.remove(&id.number) else {
            return Err(libc::EINVAL);
        };
        self.bury(&queue.counters);
        if let Some(cm) = queue.cm.and_then(|cm| self.connections.ids.get_mut(&cm)) {
            cm.queue = None;
        }
        self.pump_all();
        Ok(())
    }
}

pub(super) unsafe extern "C" fn destroy_qp(qp: *mut sys::ibv_qp) -> c_int {
    // SAFETY: the caller passes a queue pair of a living fabric.
    let context = unsafe { (*qp).context };
    // SAFETY: as above.
    let number = unsafe { (*qp).qp_num };
    // SAFETY: a queue pair's context is its fabric's.
    let (shared, device) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    match state.destroy_queue(QueuePairId { device, number }) {
        Ok(()) => 0,
        Err(errno) => errno,
    }
}
