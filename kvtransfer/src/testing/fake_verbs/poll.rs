//! The other half of the data path's calls: poll and arm.
#![expect(unsafe_code, reason = "these are C entry points")]

use std::{
    ffi::c_int,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{
    QueuePairId,
    counters::Violation,
    post::returned,
    shared::{FakeCompletions, fabric_of},
};
use crate::transport::verbs::sys;

/// What `opcode` holds in a completion that failed: the manual says it is not valid then, so it is nothing sensible.
const OPCODE_NOT_VALID: u32 = 0x5a;
/// Added to the status, this is `vendor_err` of a failed completion.
const VENDOR_ERROR: u32 = 0x100;

/// Counts a thread into a completion queue, and out again when it leaves.
struct Inside<'a>(&'a AtomicU32);

impl<'a> Inside<'a> {
    fn enter(pollers: &'a AtomicU32) -> Self {
        pollers.fetch_add(1, Ordering::AcqRel);
        Self(pollers)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(super) unsafe extern "C" fn poll_cq(
    cq: *mut sys::ibv_cq,
    entries: c_int,
    into: *mut sys::ibv_wc,
) -> c_int {
    // SAFETY: the caller passes a completion queue of a living fabric; all of them are `FakeCompletions`.
    let pollers = unsafe { &(*cq.cast::<FakeCompletions>()).pollers };
    let _inside = Inside::enter(pollers);
    // SAFETY: as above.
    let context = unsafe { (*cq).context };
    // SAFETY: as above.
    let number = unsafe { (*cq).handle };
    // SAFETY: a completion queue's context is its fabric's.
    let (shared, device) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    if state.devices[device].removed {
        return -libc::EIO;
    }
    if state.devices[device].frozen {
        return 0;
    }
    if let Some(completions) = state.devices[device].completions.get_mut(&number) {
        completions.watched.polls += 1;
    }
    let mut taken = 0;
    while taken < entries {
        let Some(completions) = state.devices[device].completions.get_mut(&number) else {
            state.violate(Violation::UseAfterDestroy { call: "poll_cq" });
            return -libc::EINVAL;
        };
        let Some(completion) = completions.entries.pop_front() else {
            break;
        };
        let id = QueuePairId {
            device,
            number: completion.queue,
        };
        if let (Some(index), Some(queue)) = (completion.send_index, state.queue_mut(id))
            && queue.serial == completion.queue_serial
        {
            queue.send.polled(index);
            queue.ledger.polled(index);
        }
        let failed = completion.status != sys::IBV_WC_SUCCESS;
        let written = sys::ibv_wc {
            wr_id: completion.wr_id,
            status: completion.status,
            opcode: if failed {
                OPCODE_NOT_VALID
            } else {
                completion.opcode
            },
            vendor_err: if failed {
                VENDOR_ERROR + completion.status
            } else {
                0
            },
            byte_len: completion.byte_len,
            imm_data: completion.imm.unwrap_or(0),
            qp_num: completion.queue,
            src_qp: completion.peer_queue,
            wc_flags: completion.imm.map_or(0, |_| sys::IBV_WC_WITH_IMM),
            pkey_index: 0,
            slid: 0,
            sl: 0,
            dlid_path_bits: 0,
        };
        let offset = usize::try_from(taken).unwrap_or(0);
        // SAFETY: the caller's array has `entries` places and `taken` is below that.
        let place = unsafe { into.add(offset) };
        // SAFETY: as above.
        unsafe { place.write(written) };
        taken += 1;
    }
    taken
}

pub(super) unsafe extern "C" fn req_notify_cq(
    cq: *mut sys::ibv_cq,
    solicited_only: c_int,
) -> c_int {
    // SAFETY: the caller passes a completion queue of a living fabric.
    let context = unsafe { (*cq).context };
    // SAFETY: as above.
    let number = unsafe { (*cq).handle };
    // SAFETY: a completion queue's context is its fabric's.
    let (shared, device) = unsafe { fabric_of(context) };
    let mut state = shared.lock();
    let negative = state.behaviour.negative_errno;
    if state.devices[device].removed {
        return returned(libc::EIO, negative);
    }
    let Some(completions) = state.devices[device].completions.get_mut(&number) else {
        state.violate(Violation::UseAfterDestroy {
            call: "req_notify_cq",
        });
        return returned(libc::EINVAL, negative);
    };
    completions.arm(solicited_only != 0);
    0
}
