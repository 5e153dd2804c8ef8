//! p50 and p99 of recent transfers, in bounded memory.
#![forbid(unsafe_code)]

use std::time::Duration;

use hdrhistogram::Histogram;

/// Latency quantiles over a sliding window.
///
/// Two histograms take every sample; each window the elder is read no more, emptied, and becomes the younger. Reading
/// the elder therefore always covers between one and two windows. Values are kept to 2 significant digits (1 %) within
/// [`LATENCY_MIN_NS`]..=[`LATENCY_MAX_NS`]; values outside are counted at the nearer end.
#[derive(Clone, Debug)]
pub struct LatencyWindow {
    window_ns: u64,
    /// Start of the younger histogram, on the caller's clock; `None` before the first use.
    rotated_ns: Option<u64>,
    elder: Histogram<u32>,
    younger: Histogram<u32>,
}

/// Quantiles of one moment. All zero: no sample in the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantiles {
    /// Median, in nanoseconds.
    pub p50_ns: u64,
    /// 99th percentile, in nanoseconds.
    pub p99_ns: u64,
    /// Samples it is made of.
    pub samples: u64,
}

impl LatencyWindow {
    /// A window of the given length (at least a millisecond).
    #[must_use]
    pub fn new(window: Duration) -> Self {
        let window = window.max(Duration::from_millis(1));
        Self {
            window_ns: u64::try_from(window.as_nanos()).unwrap_or(u64::MAX),
            rotated_ns: None,
            elder: bounded(),
            younger: bounded(),
        }
    }

    /// A transfer that took `latency` is complete at `now_ns`.
    pub fn record(&mut self, latency: Duration, now_ns: u64) {
        self.rotate(now_ns);
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let ns = ns.clamp(LATENCY_MIN_NS, LATENCY_MAX_NS);
        self.elder.saturating_record(ns);
        self.younger.saturating_record(ns);
    }

    /// The quantiles at `now_ns`. Once nothing is recorded any more they change at most twice (as the windows empty),
    /// so that an idle rail looks the same each time.
    pub fn quantiles(&mut self, now_ns: u64) -> Quantiles {
        self.rotate(now_ns);
        if self.elder.is_empty() {
            return Quantiles::default();
        }
        let high = self.elder.max();
        Quantiles {
            p50_ns: self.elder.value_at_quantile(0.5).min(high),
            p99_ns: self.elder.value_at_quantile(0.99).min(high),
            samples: self.elder.len(),
        }
    }

    /// Bytes that the counters occupy; it never grows.
    #[must_use]
    pub fn counter_bytes(&self) -> usize {
        (self.elder.distinct_values() + self.younger.distinct_values()) * size_of::<u32>()
    }

    fn rotate(&mut self, now_ns: u64) {
        let Some(rotated) = self.rotated_ns else {
            self.rotated_ns = Some(now_ns);
            return;
        };
        // A clock that steps back rotates nothing.
        let windows = now_ns.saturating_sub(rotated) / self.window_ns;
        if windows == 0 {
            return;
        }
        self.elder.reset();
        if windows == 1 {
            std::mem::swap(&mut self.elder, &mut self.younger);
        } else {
            self.younger.reset();
        }
        self.rotated_ns = Some(rotated.saturating_add(windows.saturating_mul(self.window_ns)));
    }
}

impl Default for LatencyWindow {
    /// Window [`WINDOW_DEFAULT`].
    fn default() -> Self {
        Self::new(WINDOW_DEFAULT)
    }
}

/// Ten seconds: some hundred transfers of a busy rail, and gone soon after a fault is.
pub const WINDOW_DEFAULT: Duration = Duration::from_secs(10);

/// About a microsecond; nothing that crosses two processes is faster.
pub const LATENCY_MIN_NS: u64 = 1_024;

/// 64 seconds; a transfer's deadline is shorter.
pub const LATENCY_MAX_NS: u64 = 64_000_000_000;

/// 1 % is finer than two runs agree, and each further digit costs eight times the memory.
const SIGNIFICANT_DIGITS: u8 = 2;

fn bounded() -> Histogram<u32> {
    // A histogram's lower bound is its resolution there; one nanosecond keeps 1 % from our own bound on.
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, SIGNIFICANT_DIGITS)
        .expect("invariant: the bounds are constants a histogram accepts")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn memory_is_bounded() {
        let mut window = LatencyWindow::default();
        let before = window.counter_bytes();
        assert!(before <= 2 * 16 * 1024, "{before}");
        for sample in 0..100_000_u64 {
            window.record(Duration::from_nanos(sample * sample * sample), sample);
        }
        assert_eq!(window.counter_bytes(), before);
    }

    #[test]
    fn quantiles_are_within_one_percent() {
        for ns in [1_500, 10_000, 99_000, 1_000_000, 30_000_000_000] {
            let mut window = LatencyWindow::default();
            window.record(Duration::from_nanos(ns - ns / 20), 5);
            window.record(Duration::from_nanos(ns), 5);
            let p50 = window.quantiles(5).p50_ns;
            assert!(p50.abs_diff(ns - ns / 20) <= ns / 100, "{ns}: {p50}");
        }
        let mut window = LatencyWindow::default();
        for sample in 1..=1_000_u64 {
            window.record(Duration::from_micros(sample), 5);
        }
        let now = window.quantiles(6);
        assert_eq!(now.samples, 1_000);
        assert!(now.p50_ns.abs_diff(500_000) <= 5_000, "{now:?}");
        assert!(now.p99_ns.abs_diff(990_000) <= 9_900, "{now:?}");
    }

    #[test]
    fn values_out_of_range_count_at_the_ends() {
        let mut window = LatencyWindow::default();
        window.record(Duration::ZERO, 0);
        assert!(window.quantiles(0).p50_ns >= LATENCY_MIN_NS);
        assert!(window.quantiles(0).p50_ns <= LATENCY_MIN_NS * 102 / 100);
        window.record(Duration::MAX, 0);
        let top = window.quantiles(0).p99_ns;
        assert!(
            top.abs_diff(LATENCY_MAX_NS) <= LATENCY_MAX_NS / 100,
            "{top}"
        );
    }

    #[test]
    fn samples_last_between_one_and_two_windows() {
        let mut window = LatencyWindow::new(Duration::from_secs(10));
        window.record(Duration::from_micros(10), 0);
        window.record(Duration::from_micros(10), 9 * SECOND);
        assert_eq!(window.quantiles(10 * SECOND - 1).samples, 2);
        // One rotation: both were in the younger half too.
        assert_eq!(window.quantiles(10 * SECOND).samples, 2);
        window.record(Duration::from_micros(10), 15 * SECOND);
        assert_eq!(window.quantiles(20 * SECOND - 1).samples, 3);
        assert_eq!(window.quantiles(20 * SECOND).samples, 1);
        assert_eq!(window.quantiles(30 * SECOND), Quantiles::default());
    }

    #[test]
    fn an_idle_window_changes_at_most_twice() {
        let mut window = LatencyWindow::default();
        window.record(Duration::from_micros(10), 0);
        let mut changes = 0;
        let mut last = window.quantiles(0);
        for tick in 0..5_000 {
            let next = window.quantiles(tick * 20_000_000);
            changes += u32::from(next != last);
            last = next;
        }
        assert!(changes <= 2);
        assert_eq!(last, Quantiles::default());
    }

    #[test]
    fn a_long_pause_and_a_clock_that_steps_back_do_no_harm() {
        let mut window = LatencyWindow::default();
        window.record(Duration::from_micros(10), u64::MAX - 5);
        window.record(Duration::from_micros(10), 3);
        assert_eq!(window.quantiles(0).samples, 2);
        let mut window = LatencyWindow::default();
        window.record(Duration::from_micros(10), 0);
        assert_eq!(window.quantiles(u64::MAX), Quantiles::default());
    }
}
