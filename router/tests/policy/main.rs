//! The scheduler's rules, its properties, and its baselines.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

mod baselines;
mod fleet;
mod properties;
mod rules;
mod samples;
