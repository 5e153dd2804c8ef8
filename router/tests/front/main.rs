//! The router between workers that misbehave on command. Events, not pauses, order these tests.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

mod contract;
mod failures;
mod fakes;
mod operation;
mod process;
