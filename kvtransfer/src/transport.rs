//! How bytes move: one lane protocol, three ways for the payload.
//!
//! A lane is a stream socket (TCP, or Unix on one host) with the frames of [`crate::wire::lane`]. Its payload comes
//! *inline* (TCP), is *pulled* by the receiver with `process_vm_readv` (same host), or lies in a shared *ring* where
//! the kernel does not allow that. In all three the receiver places the bytes itself, under the room's gate. Memory of a
//! device is copied by its device: pulled from the peer's allocation, or staged in host memory ([`staging`]).

use std::sync::Arc;

use crate::ids::LaneId;

mod inbound;
pub(crate) mod lane;
pub(crate) mod null_wire;
mod outbound;
pub(crate) mod rail;
pub(crate) mod staging;
pub(crate) mod sys;
pub(crate) mod verbs;

/// One data connection of a peer, whatever it is made of.
#[derive(Clone)]
pub(crate) enum DataLane {
    /// A stream socket and its two threads.
    Stream(Arc<lane::Lane>),
    /// A queue pair, served by its rail's thread.
    QueuePair(Arc<rail::QueuePairLane>),
}

impl DataLane {
    pub(crate) fn id(&self) -> LaneId {
        match self {
            Self::Stream(lane) => lane.id,
            Self::QueuePair(lane) => lane.id,
        }
    }

    /// There is work.
    pub(crate) fn kick(&self) {
        match self {
            Self::Stream(lane) => lane.kick(),
            Self::QueuePair(lane) => lane.kick(),
        }
    }

    /// Ends it for good. Its thread reports when it is gone.
    pub(crate) fn shut_down(&self) {
        match self {
            Self::Stream(lane) => lane.shut_down(),
            Self::QueuePair(lane) => lane.close(),
        }
    }

    /// Ends it so that nothing moves through it any more; where it is a queue pair, a new one takes its place.
    pub(crate) fn fence(&self, reason: &str) {
        match self {
            Self::Stream(lane) => lane.shut_down(),
            Self::QueuePair(lane) => lane.fence(reason),
        }
    }

    /// Whether it has ended, so that there is nothing to drive any more.
    pub(crate) fn is_over(&self) -> bool {
        match self {
            Self::Stream(lane) => lane.is_over(),
            Self::QueuePair(lane) => lane.is_over(),
        }
    }

    /// Sends in the calling thread if nobody else is at it. Returns whether it did.
    pub(crate) fn try_pump(&self) -> bool {
        match self {
            Self::Stream(lane) => lane.try_pump(),
            Self::QueuePair(lane) => lane.try_pump(),
        }
    }

    /// Waits for an answer in the calling thread and deals with it, for a few milliseconds at most. Returns false, at once,
    /// if somebody else does.
    pub(crate) fn drive(&self) -> bool {
        match self {
            Self::Stream(lane) => lane.drive(),
            Self::QueuePair(lane) => lane.drive(),
        }
    }
}

/// Why a lane ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// The socket failed.
    #[error("{0}")]
    Socket(#[from] std::io::Error),
    /// The peer sent something that is not the protocol.
    #[error("{0}")]
    Wire(#[from] crate::wire::WireError),
    /// The peer broke the protocol in a well-formed frame.
    #[error("{0}")]
    Protocol(String),
    /// Our own device did not copy.
    #[error("{0}")]
    Device(#[from] crate::memory::device::DeviceError),
}
