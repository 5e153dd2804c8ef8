//! Tries the RDMA path between two hosts with queue pairs of its own: bytes, latency, bandwidth and faults.
//!
//! The engine never sends without a receive at the peer and never with a wrong key, so what a device does then is only
//! seen here. Both doctors make an [`endpoint`], connected by queue pair numbers or through rdma_cm ([`door`]); the asking one ([`client`]) drives, the serving one ([`server`]) obeys,
//! and [`wire`] is what they say to each other over their TCP connection.

pub(super) mod client;
mod door;
mod endpoint;
pub(super) mod server;
mod wire;

use crate::transport::verbs::chain::ChainError;
use crate::transport::verbs::error::VerbsError;
use crate::transport::verbs::qp::PostError;

/// Why a trial did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum TrialError {
    #[error("{0}")]
    Verbs(#[from] VerbsError),
    #[error("{0}")]
    Post(#[from] PostError),
    #[error("{0}")]
    Chain(#[from] ChainError),
    #[error("{0}")]
    Exchange(#[from] super::exchange::ExchangeError),
    #[error("no {0} within {1} s")]
    Nothing(&'static str, u64),
    #[error("a request failed: {0}")]
    Completion(String),
    #[error("rdma_cm: {0} (status {1})")]
    Connection(&'static str, i32),
    #[error("the peer says: {0}")]
    Peer(String),
    #[error("byte {0} is not the one that was sent")]
    Differs(usize),
    #[error("{0}")]
    Refused(String),
}
