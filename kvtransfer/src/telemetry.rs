//! What an engine is doing right now: the picture, how it changes, and how it is told to others.
//!
//! Telemetry only observes; it can never block data. The engine keeps counters and [`rate`] and [`latency`] estimators,
//! and from time to time fills a [`snapshot::Snapshot`]. [`delta`] says what changed between two of them, [`message`]
//! puts both on the wire ([`v1`]), [`prometheus`] renders one as text. A consumer keeps a [`replica`], fed by a
//! [`watch::Watcher`]. The listener is `serve::telemetry`. All but [`watch`] are pure: no sockets, threads or clocks.
#![forbid(unsafe_code)]

pub mod codec;
pub mod delta;
pub mod latency;
pub mod message;
pub mod prometheus;
pub mod rate;
pub mod replica;
pub mod snapshot;
pub mod watch;

/// The generated messages, client and server of `kvtransfer.v1` (see `proto/kvtransfer/v1/telemetry.proto`).
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::cast_possible_truncation,
    clippy::use_self,
    elided_lifetimes_in_paths,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code follows its generator's style; the protocol file documents every field"
)]
pub mod v1 {
    tonic::include_proto!("kvtransfer.v1");
}
