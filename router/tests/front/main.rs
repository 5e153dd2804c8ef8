//! The router between workers that misbehave on command. Events, not pauses, order these tests.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

mod choices;
mod contract;
mod dialects;
mod failures;
#[allow(dead_code, reason = "the tests of the fleet use the rest")]
mod fakes;
mod faults;
mod operation;
mod process;
mod regressions;
mod transport;
