//! The router in front of a fleet that changes, tells of itself and is shared with other routers.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

mod bookings;
mod explain;
#[path = "../front/fakes.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod fakes;
mod gossip;
mod kv_events;
mod members;
mod samples;
