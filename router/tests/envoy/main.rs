//! The picker behind a real Envoy. Its tests need Envoy's binary: `router/tests/envoy/run.sh` fetches it and runs them.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

mod alike;
mod cases;
mod explain;
#[allow(dead_code, reason = "shared with the front's tests")]
#[path = "../front/fakes.rs"]
mod fakes;
mod faults;
mod gateway;
mod modes;
mod outages;
mod process;
mod workers;
