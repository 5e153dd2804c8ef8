//! The data path's calls, behind the provider's table: post, poll, arm.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{ffi::c_int, ptr};

use super::{
    QueuePairId,
    behaviour::{OutOfBand, SendQueueRule},
    counters::Violation,
    memory::{Payload, Segment},
    poll,
    queue::{Hardware, Operation, RecvRequest, SendRequest, Space, blocks_of},
    shared::fabric_of,
    state::State,
};
use crate::transport::verbs::sys;

/// The provider's table.
pub(super) fn operations() -> sys::ibv_context_ops {
    sys::ibv_context_ops {
        _compat_query_device: [None; 7],
        alloc_mw: None,
        bind_mw: None,
        dealloc_mw: None,
        _compat_create_cq: None,
        poll_cq: Some(poll::poll_cq),
        req_notify_cq: Some(poll::req_notify_cq),
        _compat_cq_event: [None; 7],
        post_srq_recv: None,
        _compat_create_qp: [None; 4],
        post_send: Some(post_send),
        post_recv: Some(post_recv),
        _compat_create_ah: [None; 5],
    }
}

/// Errno values as this provider returns them.
pub(super) fn returned(errno: c_int, negative: bool) -> c_int {
    if negative { -errno } else { errno }
}

/// A queue pair as its C structure describes it.
struct Handle {
    id: QueuePairId,
    address: usize,
    /// What libibverbs believes the state to be.
    cached_state: u32,
}

/// # Safety
/// `qp` must come from `create_qp` of a fabric that is alive.
unsafe fn handle_of(qp: *mut sys::ibv_qp, device: usize) -> Handle {
    // SAFETY: queue pairs' C structures live as long as their fabric.
    let number = unsafe { (*qp).qp_num };
    // SAFETY: as above.
    let cached_state = unsafe { (*qp).state };
    Handle {
        id: QueuePairId { device, number },
        address: qp.addr(),
        cached_state,
    }
}

/// The segments of a request; `None` when the list is null and not empty.
///
/// # Safety
/// A list that is not null must have `count` readable entries.
unsafe fn segments(list: *const sys::ibv_sge, count: c_int) -> Option<Vec<Segment>> {
    let count = usize::try_from(count).ok()?;
    if count == 0 {
        return Some(Vec::new());
    }
    if list.is_null() {
        return None;
    }
    // SAFETY: by this function's contract.
    let list = unsafe { std::slice::from_raw_parts(list, count) };
    let convert = |entry: &sys::ibv_sge| Segment {
        addr: entry.addr,
        len: entry.length,
        key: entry.lkey,
    };
    Some(list.iter().map(convert).collect())
}

unsafe extern "C" fn post_send(
    qp: *mut sys::ibv_qp,
    first: *mut sys::ibv_send_wr,
    bad: *mut *mut sys::ibv_send_wr,
) -> c_int {
    // SAFETY: the caller passes a queue pair of a living fabric (contract of `ibv_post_send`).
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context is its fabric's.
    let (shared, device) = unsafe { fabric_of(context) };
    // SAFETY: as above.
    let handle = unsafe { handle_of(qp, device) };
    let mut state = shared.lock();
    let mut current = first;
    let mut failure = 0;
    let mut accepted = 0;
    while !current.is_null() {
        // SAFETY: the caller's chain is valid until the call returns.
        let request = unsafe { &*current };
        // SAFETY: the chain's lists and inline bytes are valid until the call returns.
        match unsafe { post_one(&mut state, &handle, request) } {
            Ok(()) => accepted += 1,
            Err(errno) => {
                // SAFETY: the caller passes a writable place.
                unsafe { *bad = current };
                failure = returned(errno, state.behaviour.negative_errno);
                break;
            }
        }
        current = request.next;
    }
    if accepted > 0 {
        state.rang(handle.id);
    }
    failure
}

/// Takes one send work request; an errno when it is refused.
///
/// # Safety
/// The request's list, and what an inline request's list points to, must be readable.
unsafe fn post_one(
    state: &mut State,
    handle: &Handle,
    request: &sys::ibv_send_wr,
) -> Result<(), c_int> {
    state.may_post(handle)?;
    let is_inline = request.send_flags & sys::IBV_SEND_INLINE != 0;
    let is_read = request.opcode == sys::IBV_WR_RDMA_READ;
    if is_read && (request.num_sge < 1 || request.sg_list.is_null()) {
        state.violate(Violation::ReadWithoutEntry { queue: handle.id });
        return Err(libc::EINVAL);
    }
    // SAFETY: the target's both members start with the same fields as plain integers, so reading them is defined.
    let target = unsafe { request.wr.rdma };
    let (addr, key) = (target.remote_addr, target.rkey);
    let imm = Some(request.imm_data);
    let operation = match request.opcode {
        sys::IBV_WR_RDMA_WRITE => Operation::Write {
            addr,
            key,
            imm: None,
        },
        sys::IBV_WR_RDMA_WRITE_WITH_IMM if state.behaviour.immediate => {
            Operation::Write { addr, key, imm }
        }
        sys::IBV_WR_SEND => Operation::Send { imm: None },
        sys::IBV_WR_SEND_WITH_IMM if state.behaviour.immediate => Operation::Send { imm },
        sys::IBV_WR_RDMA_READ => Operation::Read { addr, key },
        _ => return Err(libc::EINVAL),
    };
    let shape = Shape {
        segments: u32::try_from(request.num_sge).map_err(|_| libc::EINVAL)?,
        is_inline,
    };
    if state.behaviour.null && !is_inline {
        return state.take(
            handle,
            request,
            operation,
            Payload::Bytes(Vec::new()),
            &shape,
        );
    }
    // SAFETY: by this function's contract.
    let list = unsafe { segments(request.sg_list, request.num_sge) }.ok_or(libc::EINVAL)?;
    let payload = if is_inline && !is_read {
        let mut bytes = Vec::new();
        for part in &list {
            let from = ptr::with_exposed_provenance::<u8>(
                usize::try_from(part.addr).map_err(|_| libc::EINVAL)?,
            );
            if part.len > 0 {
                // SAFETY: inline bytes are readable during the post, by this function's contract.
                bytes.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(from, part.len as usize)
                });
            }
        }
        Payload::Bytes(bytes)
    } else {
        Payload::Gather(list)
    };
    state.take(handle, request, operation, payload, &shape)
}

/// What a request looks like in the queue.
struct Shape {
    segments: u32,
    is_inline: bool,
}

impl State {
    /// Whether the provider would look at a request at all.
    fn may_post(&mut self, handle: &Handle) -> Result<(), c_int> {
        if self.devices[handle.id.device].removed {
            return Err(libc::EIO);
        }
        let rule = self.behaviour.send_queue;
        let Some(queue) = self
            .queue_mut(handle.id)
            .filter(|queue| queue.handle == handle.address)
        else {
            self.violate(Violation::UseAfterDestroy { call: "post_send" });
            return Err(libc::EINVAL);
        };
        if let Some((left, errno)) = queue.injected.post_failure {
            if left == 0 {
                queue.injected.post_failure = None;
                return Err(errno);
            }
            queue.injected.post_failure = Some((left - 1, errno));
        }
        match rule {
            // eRDMA's provider looks only at the state that the user set or asked for last.
            SendQueueRule::Blocks if handle.cached_state == sys::IBV_QPS_ERR => Err(libc::EINVAL),
            SendQueueRule::Blocks => Ok(()),
            // siw: −1, so this errno.
            SendQueueRule::Lenient if queue.hardware == Hardware::Dead => Err(libc::EPERM),
            SendQueueRule::Lenient => Ok(()),
            // The specification: from RTS on; in error it is taken and flushed.
            SendQueueRule::Requests if queue.state < sys::IBV_QPS_RTS => Err(libc::EINVAL),
            SendQueueRule::Requests => Ok(()),
        }
    }

    fn take(
        &mut self,
        handle: &Handle,
        request: &sys::ibv_send_wr,
        operation: Operation,
        payload: Payload,
        shape: &Shape,
    ) -> Result<(), c_int> {
        let order = self.new_order();
        let null = self.behaviour.null;
        let Some(queue) = self.queue_mut(handle.id) else {
            return Err(libc::EINVAL);
        };
        let inline_bytes = match (&payload, shape.is_inline) {
            (Payload::Bytes(bytes), true) => {
                Some(u32::try_from(bytes.len()).map_err(|_| libc::EINVAL)?)
            }
            _ => None,
        };
        let is_send = matches!(operation, Operation::Send { .. });
        if shape.segments > queue.sizes.send_sge
            || inline_bytes.is_some_and(|len| len > queue.sizes.inline)
        {
            return Err(libc::EINVAL);
        }
        let blocks = blocks_of(is_send, shape.segments, inline_bytes);
        let Space::Taken { index, overran } = queue.send.take(blocks) else {
            queue.counters.full += 1;
            return Err(libc::ENOMEM);
        };
        let counted = queue.ledger.take(1);
        debug_assert!(
            matches!(counted, Space::Taken { index: mine, .. } if mine == index),
            "both books number the same requests"
        );
        let outstanding = queue.ledger.outstanding();
        let depth = queue.sizes.send_depth;
        let counters = &mut queue.counters;
        counters.send_requests += 1;
        counters.writes += u64::from(matches!(operation, Operation::Write { .. }));
        counters.outstanding_max = counters.outstanding_max.max(outstanding as u64);
        counters.past_depth += u64::from(outstanding > depth as usize);
        counters.overruns += u64::from(overran);
        let taken = SendRequest {
            wr_id: request.wr_id,
            operation,
            payload,
            signalled: queue.signals_all || request.send_flags & sys::IBV_SEND_SIGNALED != 0,
            solicited: request.send_flags & sys::IBV_SEND_SOLICITED != 0,
            order,
            index,
        };
        if overran {
            // The oldest request that the adapter has not read yet is the one that was overwritten.
            queue.waiting.pop_front();
            self.violate(Violation::SendQueueOverrun {
                queue: handle.id,
                wr_id: request.wr_id,
                outstanding,
                depth,
            });
        }
        if null {
            self.finish_send(handle.id, &taken, sys::IBV_WC_SUCCESS, 0);
        } else if let Some(queue) = self.queue_mut(handle.id) {
            queue.waiting.push_back(taken);
        }
        Ok(())
    }

    /// A doorbell rang: the adapter looks at the queue.
    fn rang(&mut self, id: QueuePairId) {
        let flushes = self.behaviour.flushes;
        let Some(queue) = self.queue_mut(id) else {
            return;
        };
        queue.counters.send_doorbells += 1;
        let in_error = queue.state == sys::IBV_QPS_ERR;
        if in_error && flushes {
            self.flush(id);
        } else {
            self.pump(id);
        }
    }

    fn take_receive_request(
        &mut self,
        handle: &Handle,
        wr_id: u64,
        list: Vec<Segment>,
    ) -> Result<(), c_int> {
        if self.devices[handle.id.device].removed {
            return Err(libc::EIO);
        }
        let flushes = self.behaviour.flushes;
        let checks_state = self.behaviour.out_of_band == OutOfBand::Full;
        let Some(queue) = self
            .queue_mut(handle.id)
            .filter(|queue| queue.handle == handle.address)
        else {
            self.violate(Violation::UseAfterDestroy { call: "post_recv" });
            return Err(libc::EINVAL);
        };
        let too_early = queue.state == sys::IBV_QPS_RESET && queue.cm.is_none();
        if list.len() > queue.sizes.recv_sge as usize || (checks_state && too_early) {
            return Err(libc::EINVAL);
        }
        if queue.received.len() >= queue.sizes.recv_depth as usize {
            return Err(libc::ENOMEM);
        }
        queue.counters.recv_requests += 1;
        queue.received.push_back(RecvRequest { wr_id, list });
        if queue.state == sys::IBV_QPS_ERR && flushes {
            self.flush(handle.id);
        }
        Ok(())
    }
}

unsafe extern "C" fn post_recv(
    qp: *mut sys::ibv_qp,
    first: *mut sys::ibv_recv_wr,
    bad: *mut *mut sys::ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a queue pair of a living fabric (contract of `ibv_post_recv`).
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context is its fabric's.
    let (shared, device) = unsafe { fabric_of(context) };
    // SAFETY: as above.
    let handle = unsafe { handle_of(qp, device) };
    let mut state = shared.lock();
    let mut current = first;
    let mut failure = 0;
    while !current.is_null() {
        // SAFETY: the caller's chain is valid until the call returns.
        let request = unsafe { &*current };
        // SAFETY: as above, with its lists.
        let list = unsafe { segments(request.sg_list, request.num_sge) };
        let taken = list
            .ok_or(libc::EINVAL)
            .and_then(|list| state.take_receive_request(&handle, request.wr_id, list));
        if let Err(errno) = taken {
            // SAFETY: the caller passes a writable place.
            unsafe { *bad = current };
            failure = returned(errno, state.behaviour.negative_errno);
            break;
        }
        current = request.next;
    }
    state.pump_peer(handle.id);
    failure
}
