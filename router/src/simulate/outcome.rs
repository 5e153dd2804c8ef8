//! What came out of a simulation.
#![forbid(unsafe_code)]

use serde::Serialize;

/// The numbers of one policy. Times are seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Mean time to the first token, from the arrival at the router on.
    pub mean_ttft_s: f64,
    /// Half of the requests were faster.
    pub p50_ttft_s: f64,
    /// Nine of ten were faster.
    pub p90_ttft_s: f64,
    /// 99 of 100 were faster.
    pub p99_ttft_s: f64,
    /// Share of requests whose first token came within 3 s.
    pub share_under_3s: f64,
    /// Pairs chosen.
    pub decisions: u64,
    /// Requests that had to wait in the router.
    pub held: u64,
    /// Mean age of the sample behind a decision; 0 without samples.
    pub mean_sample_age_s: f64,
    /// Mean time in the router and in the prefill's queue.
    pub mean_wait_s: f64,
    /// Mean time from ready to the first byte on the wire.
    pub mean_wire_wait_s: f64,
    /// Mean time on the wire.
    pub mean_transfer_s: f64,
    /// Mean of |predicted − actual| time to the first token, from the dispatch on.
    pub mean_prediction_error_s: f64,
    /// Every time to the first token, ascending.
    #[serde(skip)]
    pub ttft_s: Vec<f64>,
}

impl Outcome {
    /// The time that a share `quantile` (0 to 1) of the requests did not exceed, by nearest rank; 0 without requests.
    pub fn quantile(&self, quantile: f64) -> f64 {
        let count = self.ttft_s.len();
        let enough = |rank: &usize| *rank as f64 >= quantile * count as f64;
        let rank = (1..=count).find(enough).unwrap_or(count);
        let index = rank.saturating_sub(1);
        self.ttft_s.get(index).copied().unwrap_or(0.0)
    }
}

/// The header and one line per policy.
pub fn table(outcomes: &[(&str, Outcome)]) -> String {
    let mut text = format!(
        "{:<13} {:>9} {:>8} {:>8} {:>8} {:>7} {:>7} {:>9} {:>9} {:>9}\n",
        "policy", "mean s", "p50", "p90", "p99", "<3s %", "held", "wire wait", "pred err", "age ms"
    );
    for (name, outcome) in outcomes {
        text += &format!(
            "{name:<13} {:>9.3} {:>8.3} {:>8.3} {:>8.3} {:>7.1} {:>7} {:>9.3} {:>9.3} {:>9.1}\n",
            outcome.mean_ttft_s,
            outcome.p50_ttft_s,
            outcome.p90_ttft_s,
            outcome.p99_ttft_s,
            outcome.share_under_3s * 100.0,
            outcome.held,
            outcome.mean_wire_wait_s,
            outcome.mean_prediction_error_s,
            outcome.mean_sample_age_s * 1e3,
        );
    }
    text
}

/// Adds up what happens, and makes an [`Outcome`] of it.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) ttft_s: Vec<f64>,
    pub(super) decisions: u64,
    pub(super) held: u64,
    pub(super) ages: u64,
    pub(super) age_s: f64,
    pub(super) wait_s: f64,
    pub(super) wire_wait_s: f64,
    pub(super) transfer_s: f64,
    pub(super) prediction_error_s: f64,
}

impl Tally {
    pub(super) fn outcome(mut self) -> Outcome {
        self.ttft_s.sort_by(f64::total_cmp);
        let count = self.ttft_s.len().max(1) as f64;
        let mut outcome = Outcome {
            mean_ttft_s: self.ttft_s.iter().sum::<f64>() / count,
            share_under_3s: self.ttft_s.partition_point(|ttft| *ttft < 3.0) as f64 / count,
            decisions: self.decisions,
            held: self.held,
            mean_sample_age_s: self.age_s / self.ages.max(1) as f64,
            mean_wait_s: self.wait_s / count,
            mean_wire_wait_s: self.wire_wait_s / count,
            mean_transfer_s: self.transfer_s / count,
            mean_prediction_error_s: self.prediction_error_s / count,
            ttft_s: self.ttft_s,
            ..Outcome::default()
        };
        outcome.p50_ttft_s = outcome.quantile(0.5);
        outcome.p90_ttft_s = outcome.quantile(0.9);
        outcome.p99_ttft_s = outcome.quantile(0.99);
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let tally = Tally {
            ttft_s: (1..=100).rev().map(f64::from).collect(),
            decisions: 100,
            ..Tally::default()
        };
        let outcome = tally.outcome();
        assert_eq!(outcome.mean_ttft_s, 50.5);
        assert_eq!(
            (outcome.p50_ttft_s, outcome.p90_ttft_s, outcome.p99_ttft_s),
            (50.0, 90.0, 99.0)
        );
        assert_eq!(outcome.share_under_3s, 0.02);
        assert_eq!(Outcome::default().quantile(0.5), 0.0);
        assert!(table(&[("fused", outcome)]).contains("50.500"));
    }
}
