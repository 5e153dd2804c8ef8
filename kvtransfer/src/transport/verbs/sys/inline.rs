//! The calls of the data path, which the header has as inline functions: each goes through the provider's own table.
#![expect(unsafe_code, reason = "the calls go through function pointers")]

use std::ffi::c_int;

use super::{ibv_cq, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_wc};

/// Posts a chain to a queue pair's send queue (`ibv_post_send`, an inline function of the header).
///
/// Returns zero, or an error number of either sign; `*bad` is then the first request that was not taken.
///
/// # Safety
/// `qp` must be a live queue pair that no other thread uses during the call; `wr` the head of a chain of valid
/// requests, and `bad` writable. The memory of every element that is not inline must stay valid until its request has
/// completed or the queue pair is destroyed.
pub(crate) unsafe fn ibv_post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context outlives it.
    let post = unsafe { (*context).ops.post_send };
    match post {
        // SAFETY: the caller vouches for the chain; the pointer is the provider's own.
        Some(post) => unsafe { post(qp, wr, bad) },
        None => {
            // SAFETY: the caller vouches that `bad` may be written.
            unsafe { *bad = wr };
            libc::EOPNOTSUPP
        }
    }
}

/// Posts a chain to a queue pair's receive queue (`ibv_post_recv`).
///
/// Returns zero, or an error number of either sign; `*bad` is then the first request that was not taken.
///
/// # Safety
/// As for [`ibv_post_send`]; the buffers must stay writable until their receives complete or the queue pair is
/// destroyed.
pub(crate) unsafe fn ibv_post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context outlives it.
    let post = unsafe { (*context).ops.post_recv };
    match post {
        // SAFETY: the caller vouches for the chain; the pointer is the provider's own.
        Some(post) => unsafe { post(qp, wr, bad) },
        None => {
            // SAFETY: the caller vouches that `bad` may be written.
            unsafe { *bad = wr };
            libc::EOPNOTSUPP
        }
    }
}

/// Takes up to `entries` completions (`ibv_poll_cq`). Returns how many, or below zero.
///
/// # Safety
/// `cq` must be a live completion queue; `wc` must have room for `entries` completions. No queue pair of `cq` may be
/// destroyed during the call.
pub(crate) unsafe fn ibv_poll_cq(cq: *mut ibv_cq, entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the caller passes a live completion queue.
    let context = unsafe { (*cq).context };
    // SAFETY: a completion queue's context outlives it.
    let poll = unsafe { (*context).ops.poll_cq };
    match poll {
        // SAFETY: the caller vouches for the queue and the array; the pointer is the provider's own.
        Some(poll) => unsafe { poll(cq, entries, wc) },
        None => -libc::EOPNOTSUPP,
    }
}

/// Asks for one event on the queue's channel (`ibv_req_notify_cq`). Returns zero or an error number of either sign.
///
/// # Safety
/// `cq` must be a live completion queue.
pub(crate) unsafe fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller passes a live completion queue.
    let context = unsafe { (*cq).context };
    // SAFETY: a completion queue's context outlives it.
    let arm = unsafe { (*context).ops.req_notify_cq };
    match arm {
        // SAFETY: the queue is live; the pointer is the provider's own.
        Some(arm) => unsafe { arm(cq, solicited_only) },
        None => libc::EOPNOTSUPP,
    }
}
