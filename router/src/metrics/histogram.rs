//! Counts by size, with fixed edges.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use super::text::{Kind, Labels, Text};

/// Upper edges for times from a fast first byte to a long generation, in seconds.
pub const TIME_EDGES: [f64; 19] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0, 600.0, 1800.0,
];

/// Upper edges for the router's own part of a request, in seconds.
pub const OWN_EDGES: [f64; 9] = [
    0.000_025, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.005, 0.05, 1.0,
];

/// Upper edges for errors of predictions, in seconds; below 0 the answer was faster than predicted.
pub const ERROR_EDGES: [f64; 15] = [
    -10.0, -3.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0,
];

/// A histogram of seconds.
#[derive(Debug)]
pub struct Histogram {
    edges: &'static [f64],
    counts: Box<[AtomicU64]>,
    sum_nanos: AtomicI64,
}

impl Histogram {
    /// An empty one.
    pub fn new(edges: &'static [f64]) -> Self {
        Self {
            edges,
            counts: (0..=edges.len()).map(|_| AtomicU64::new(0)).collect(),
            sum_nanos: AtomicI64::new(0),
        }
    }

    /// Counts a time.
    pub fn observe(&self, time: Duration) {
        self.observe_seconds(time.as_secs_f64());
    }

    /// Counts a number of seconds, which may be negative. What is no number is not counted.
    pub fn observe_seconds(&self, seconds: f64) {
        if seconds.is_nan() {
            return;
        }
        let bucket = self.edges.partition_point(|edge| *edge < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the cast saturates; a sum of 292 years wraps"
        )]
        let nanos = (seconds * 1e9) as i64;
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// How many in each bucket, the last one without an upper edge.
    pub fn counts(&self) -> Vec<u64> {
        let counts = self.counts.iter();
        counts.map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// The upper edges.
    pub const fn edges(&self) -> &'static [f64] {
        self.edges
    }

    /// Writes it as a family of its own.
    pub fn render(&self, text: &mut Text, name: &'static str, help: &str) {
        text.family(name, Kind::Histogram, help);
        self.render_samples(text, &Labels::default());
    }

    /// Writes its samples, of which a family may hold several sets.
    pub fn render_samples(&self, text: &mut Text, labels: &Labels) {
        let mut total = 0;
        for (slot, count) in self.counts().into_iter().enumerate() {
            total += count;
            let edge = self.edges.get(slot);
            let edge = edge.map_or_else(|| "+Inf".to_owned(), f64::to_string);
            text.named_sample("_bucket", &labels.clone().with("le", &edge), total);
        }
        #[expect(clippy::cast_precision_loss, reason = "seconds for people")]
        let sum = self.sum_nanos.load(Ordering::Relaxed) as f64 / 1e9;
        text.named_sample("_sum", labels, sum);
        // The buckets' own total, so that both agree within one scrape.
        text.named_sample("_count", labels, total);
    }
}
