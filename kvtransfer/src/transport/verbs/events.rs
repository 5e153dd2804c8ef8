//! Asynchronous events of a device: what they mean for queue pairs. Numbers that are newer than this crate are possible.
#![forbid(unsafe_code)]

use super::sys;

/// The event in words.
pub(crate) const fn words(kind: u32) -> &'static str {
    match kind {
        sys::IBV_EVENT_CQ_ERR => "a completion queue overran (CQ_ERR)",
        sys::IBV_EVENT_QP_FATAL => "a queue pair failed (QP_FATAL)",
        sys::IBV_EVENT_QP_REQ_ERR => "a queue pair got an invalid request (QP_REQ_ERR)",
        sys::IBV_EVENT_QP_ACCESS_ERR => "the peer touched memory that it may not (QP_ACCESS_ERR)",
        sys::IBV_EVENT_COMM_EST => "the first packet came (COMM_EST)",
        sys::IBV_EVENT_DEVICE_FATAL => "the device failed or was removed (DEVICE_FATAL)",
        sys::IBV_EVENT_PORT_ACTIVE => "the port is up (PORT_ACTIVE)",
        sys::IBV_EVENT_PORT_ERR => "the port is down (PORT_ERR)",
        sys::IBV_EVENT_GID_CHANGE => "the port's addresses changed (GID_CHANGE)",
        sys::IBV_EVENT_QP_LAST_WQE_REACHED => {
            "a queue pair took its last receive (QP_LAST_WQE_REACHED)"
        }
        _ => "another event",
    }
}

/// Whether the queue pair that it names is lost.
pub(crate) const fn kills_queue_pair(kind: u32) -> bool {
    matches!(
        kind,
        sys::IBV_EVENT_QP_FATAL | sys::IBV_EVENT_QP_REQ_ERR | sys::IBV_EVENT_QP_ACCESS_ERR
    )
}

/// Whether every queue pair of the device is lost.
pub(crate) const fn kills_device(kind: u32) -> bool {
    matches!(kind, sys::IBV_EVENT_DEVICE_FATAL | sys::IBV_EVENT_PORT_ERR)
}

/// Whether the device itself is lost: nothing of it works again, and whoever takes it away waits for its last user.
pub(crate) const fn loses_device(kind: u32) -> bool {
    kind == sys::IBV_EVENT_DEVICE_FATAL
}
