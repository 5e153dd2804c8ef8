//! What operators see and set: settings from all places, reloads, metrics, spans, logs, the page.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

mod deploy;
mod exposition;
#[allow(dead_code, reason = "shared with the tests of the front")]
#[path = "../front/fakes.rs"]
mod fakes;
mod logs;
mod metrics;
mod page;
mod process;
mod reload;
mod settings;
mod traces;
mod ui_fleet;
