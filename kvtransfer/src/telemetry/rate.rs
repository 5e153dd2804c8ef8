//! How many bytes per second a rail moves while it has something to move.
//!
//! The router divides waiting bytes by this rate, so it must be the rail's *capacity*, not its load: only busy time
//! counts, and an idle rail keeps its last rate. That also keeps the number still while nothing happens, which the
//! delta stream relies on.
#![forbid(unsafe_code)]

use std::time::Duration;

/// An exponentially weighted mean of bytes per busy second.
///
/// Bytes and busy time decay together: after one half-life of *busy* time an observation weighs half. Being a ratio of
/// two decayed sums, the mean has no start-up bias and never divides by zero.
#[derive(Clone, Debug)]
pub struct RateEstimator {
    half_life_s: f64,
    /// Bytes, each halved per half-life of busy time since.
    bytes: f64,
    /// Busy seconds, decayed the same way; below `half_life / ln 2` plus the last interval.
    busy_s: f64,
    /// End of the last completed transfer, on the caller's clock.
    completed_ns: Option<u64>,
    /// The last value of a running counter.
    total: Option<u64>,
}

impl RateEstimator {
    /// An estimator whose observations lose half their weight every `half_life` of busy time. A half-life shorter than
    /// a microsecond is taken as a microsecond.
    #[must_use]
    pub fn new(half_life: Duration) -> Self {
        Self {
            half_life_s: half_life.max(HALF_LIFE_MIN).as_secs_f64(),
            bytes: 0.0,
            busy_s: 0.0,
            completed_ns: None,
            total: None,
        }
    }

    /// `bytes` were moved in `busy` time. Bytes seen in no time are kept until time passes.
    pub fn observe(&mut self, bytes: u64, busy: Duration) {
        let busy_s = busy.as_secs_f64();
        let kept = (-busy_s / self.half_life_s).exp2();
        self.bytes = self.bytes * kept + lossy(bytes);
        self.busy_s = self.busy_s * kept + busy_s;
    }

    /// A transfer of `bytes` that started at `started_ns` is complete at `now_ns`. Time that overlaps an earlier
    /// transfer counts once; a clock that stands still or steps back counts as no time.
    pub fn complete(&mut self, bytes: u64, started_ns: u64, now_ns: u64) {
        let since = self
            .completed_ns
            .map_or(started_ns, |ended| ended.max(started_ns));
        self.completed_ns = Some(self.completed_ns.map_or(now_ns, |ended| ended.max(now_ns)));
        self.observe(bytes, Duration::from_nanos(now_ns.saturating_sub(since)));
    }

    /// A running byte counter reads `total` after `busy` more busy time. The counter may wrap around `u64`. The first
    /// reading only sets the mark.
    pub fn observe_total(&mut self, total: u64, busy: Duration) {
        if let Some(before) = self.total.replace(total) {
            self.observe(total.wrapping_sub(before), busy);
        }
    }

    /// Bytes per busy second; 0 until both bytes and time were seen. Always finite.
    #[must_use]
    pub fn bytes_per_s(&self) -> f64 {
        if self.busy_s <= 0.0 {
            return 0.0;
        }
        let rate = self.bytes / self.busy_s;
        if rate.is_finite() { rate } else { 0.0 }
    }
}

impl Default for RateEstimator {
    /// Half-life [`HALF_LIFE_DEFAULT`].
    fn default() -> Self {
        Self::new(HALF_LIFE_DEFAULT)
    }
}

/// Long enough to see past one batch, short enough that a degraded link shows within half a second of load, which is
/// how old a sample may be when a router still acts on it.
pub const HALF_LIFE_DEFAULT: Duration = Duration::from_millis(200);

/// Keeps the exponent finite for a half-life of zero.
const HALF_LIFE_MIN: Duration = Duration::from_micros(1);

/// A byte count as a float; 53 bits are plenty for a mean.
#[expect(
    clippy::cast_precision_loss,
    reason = "a mean needs no more than 53 bits"
)]
fn lossy(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_half_life_halves_the_weight_of_the_past() {
        let mut rate = RateEstimator::new(Duration::from_secs(1));
        // Far past its half-life the old rate is known exactly: 100 B/s.
        rate.observe(10_000, Duration::from_secs(100));
        for _ in 0..1000 {
            rate.observe(0, Duration::from_millis(1));
        }
        // The past weighed 100 s of raw time, now half of it, beside one idle-free second of nothing.
        let expected = 5_000.0 / (50.0 + (1.0 - 0.5) / std::f64::consts::LN_2);
        assert!(
            (rate.bytes_per_s() - expected).abs() < expected * 1e-3,
            "{}",
            rate.bytes_per_s()
        );
    }

    #[test]
    fn a_steady_rail_reads_its_rate_from_the_first_observation() {
        let mut rate = RateEstimator::default();
        for _ in 0..50 {
            rate.observe(1_000_000, Duration::from_millis(1));
            assert!((rate.bytes_per_s() - 1e9).abs() < 1.0);
        }
    }

    #[test]
    fn a_degraded_rail_shows_within_a_few_half_lives() {
        let mut rate = RateEstimator::new(Duration::from_millis(200));
        for _ in 0..1000 {
            rate.observe(10_000_000, Duration::from_millis(1));
        }
        for _ in 0..1000 {
            rate.observe(1_000_000, Duration::from_millis(1));
        }
        let expected = 1e9 + 9e9 / 32.0; // five half-lives
        assert!(
            (rate.bytes_per_s() / expected - 1.0).abs() < 0.02,
            "{}",
            rate.bytes_per_s()
        );
    }

    #[test]
    fn a_clock_that_stands_still_divides_nothing_by_zero() {
        let mut rate = RateEstimator::default();
        assert!(rate.bytes_per_s().abs() < f64::EPSILON);
        rate.complete(500, 7, 7);
        rate.complete(500, 7, 3);
        assert!(rate.bytes_per_s().abs() < f64::EPSILON);
        // The bytes were not lost: they count once time passes.
        rate.complete(0, 7, 1_007);
        assert!(
            (rate.bytes_per_s() - 1e9).abs() < 1e7,
            "{}",
            rate.bytes_per_s()
        );
    }

    #[test]
    fn overlapping_transfers_share_their_time() {
        let mut rate = RateEstimator::default();
        rate.complete(1_000, 0, 1_000);
        rate.complete(1_000, 0, 2_000);
        assert!((rate.bytes_per_s() - 1e9).abs() < 1e6);
        // An idle hour does not lower it.
        let hour = 3_600_000_000_000;
        rate.complete(1_000, hour, hour + 1_000);
        assert!((rate.bytes_per_s() - 1e9).abs() < 1e6);
    }

    #[test]
    fn a_counter_may_wrap() {
        let mut rate = RateEstimator::default();
        rate.observe_total(u64::MAX - 499, Duration::ZERO);
        rate.observe_total(500, Duration::from_micros(1));
        assert!(
            (rate.bytes_per_s() - 1e9).abs() < 1e6,
            "{}",
            rate.bytes_per_s()
        );
    }

    proptest! {
        #[test]
        fn any_history_gives_a_finite_rate_between_its_extremes(
            half_life_ns: u64,
            history in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 0..64),
        ) {
            let mut rate = RateEstimator::new(Duration::from_nanos(half_life_ns));
            for (bytes, started, now) in history {
                rate.complete(bytes, started, now);
                rate.observe_total(bytes, Duration::from_nanos(now));
                prop_assert!(rate.bytes_per_s().is_finite());
                prop_assert!(rate.bytes_per_s() >= 0.0);
            }
        }

        #[test]
        fn the_mean_lies_between_slowest_and_fastest(
            speeds in prop::collection::vec((1_000_u64..1_000_000, 1_u64..10_000), 1..64),
        ) {
            let mut rate = RateEstimator::default();
            for (bytes, busy_us) in &speeds {
                rate.observe(*bytes, Duration::from_micros(*busy_us));
            }
            let each = speeds.iter().map(|(bytes, us)| lossy(*bytes) * 1e6 / lossy(*us));
            let (low, high) = each.fold((f64::MAX, 0.0_f64), |(l, h), r| (l.min(r), h.max(r)));
            prop_assert!(rate.bytes_per_s() >= low * 0.999 && rate.bytes_per_s() <= high * 1.001);
        }
    }
}
