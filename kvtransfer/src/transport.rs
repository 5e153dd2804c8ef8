//! How bytes move: one lane protocol, three ways for the payload.
//!
//! A lane is a stream socket (TCP, or Unix on one host) with the frames of [`crate::wire::lane`]. Its payload comes
//! *inline* (TCP), is *pulled* by the receiver with `process_vm_readv` (same host), or lies in a shared *ring* where
//! the kernel does not allow that. In all three the receiver places the bytes itself, under the room's gate.

mod inbound;
pub(crate) mod lane;
mod outbound;
pub(crate) mod sys;
pub(crate) mod verbs;

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
}
