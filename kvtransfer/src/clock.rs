//! The only place of the crate that reads a clock; everything else is handed `now`.
#![forbid(unsafe_code)]
#![expect(
    clippy::disallowed_methods,
    reason = "this module is the clock that the lint points everybody to"
)]

use std::{
    sync::OnceLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::time::Time;

static ORIGIN: OnceLock<Instant> = OnceLock::new();

/// Monotonic time since the first call in this process.
pub fn now() -> Time {
    let origin = *ORIGIN.get_or_init(Instant::now);
    // The first reading is 1 ns, so that a zero can mean "not yet" in telemetry.
    Time(1) + origin.elapsed()
}

/// Wall-clock time since the Unix epoch; zero if the host's clock is set before it.
pub fn wall() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
}
