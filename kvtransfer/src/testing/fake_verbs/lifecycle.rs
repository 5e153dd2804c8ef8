//! The states of a queue pair, from INIT to its destruction.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::ffi::c_int;

use super::{
    QueuePairId,
    behaviour::{OutOfBand, SendQueueRule},
    connect::Errno,
    counters::Violation,
    events::CompletionQueue,
    queue::{Hardware, SendQueue},
    shared::fabric_of,
    state::{About, State},
    sysfs,
};
use crate::transport::verbs::sys;

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
            let lists = [
                Some(&mut completions.entries),
                Some(&mut completions.late),
                completions.held.as_mut(),
            ];
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
