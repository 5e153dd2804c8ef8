//! What engines say to each other: control messages and lane frames, with bounded decoders.
//!
//! Two kinds of stream exist between two engines. The *control* stream carries length-prefixed messages ([`control`]):
//! hello, grants, failures, heartbeats. A *lane* carries data ([`lane`]): 64-byte batch headers, each followed by its
//! payload, and 32-byte acknowledgements in the other direction. All numbers are little-endian. Nothing here obeys a
//! length before it has compared it with a bound, and nothing here panics on peer bytes (promise P3).
#![forbid(unsafe_code)]

pub mod blocks;
mod codec;
pub mod control;
pub mod hello;
pub mod lane;
pub mod rdma;
#[cfg(all(test, feature = "testing"))]
mod tests;

pub use codec::WireError;
