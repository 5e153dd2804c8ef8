//! What measurements teach: how long a prefill computes, and how fast a link is.
//!
//! Both learn *factors* of the nominal value, so that a link that was never used inherits what its neighbours showed:
//! pair → its prefill → the fleet → nominal.
#![forbid(unsafe_code)]

/// Weight of a new measurement once enough were seen.
const GAIN: f64 = 0.2;

/// A single measurement moves the mean by no more than this in the logarithm, or by three times the usual spread: one
/// stalled transfer must not condemn a link, while a lasting change gets through within some measurements.
const JUMP_MAX: f64 = std::f64::consts::LN_2;

/// Nothing is believed to be faster or slower than nominal by more than this: a guard against nonsense in samples.
const FACTOR_MAX: f64 = 1e4;

/// After this time half of what a pair showed is forgotten in favour of its prefill, so that a link which was slow once
/// and therefore is avoided gets another chance.
pub const PAIR_HALF_LIFE_S: f64 = 60.0;

/// The same for a prefill in favour of the fleet.
pub const PREFILL_HALF_LIFE_S: f64 = 120.0;

/// Transfers below this size show latency, larger ones bandwidth.
pub const SMALL_BYTES: u64 = 1 << 20;

/// A robust moving mean of positive numbers, kept in logarithms.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    log: f64,
    spread: f64,
    seen: f64,
    value: f64,
    at: f64,
}

impl Mean {
    /// Takes in a measurement made at `now` (seconds). Numbers that are not positive and finite are ignored.
    pub fn observe(&mut self, value: f64, now: f64) {
        self.observe_weighted(value, 1.0, now);
    }

    /// The same for a measurement that counts for less than one (`weight` from 0 to 1).
    pub fn observe_weighted(&mut self, value: f64, weight: f64, now: f64) {
        let log = value.ln();
        if !log.is_finite() || log.abs() > FACTOR_MAX.ln() * 4.0 || weight <= 0.0 {
            return;
        }
        if self.seen == 0.0 {
            self.log = log;
        } else {
            let limit = JUMP_MAX.max(3.0 * self.spread);
            let step = (log - self.log).clamp(-limit, limit);
            // Few measurements are averaged plainly, many with a fading memory.
            let gain = weight * GAIN.max(1.0 / (self.seen + 1.0));
            self.log += gain * step;
            self.spread += gain * (step.abs() - self.spread);
        }
        self.seen += weight;
        self.at = now;
        self.value = self.log.exp();
    }

    /// The mean; none before the first measurement.
    pub fn value(&self) -> Option<f64> {
        (self.seen > 0.0).then_some(self.value)
    }

    /// Which share of this mean is still believed at `now`.
    pub fn trust(&self, now: f64, half_life_s: f64) -> f64 {
        if self.seen == 0.0 {
            return 0.0;
        }
        if now <= self.at {
            return 1.0;
        }
        (-(now - self.at).max(0.0) / half_life_s).exp2()
    }

    /// This mean where it is trusted, `otherwise` where not.
    pub fn or(&self, otherwise: f64, now: f64, half_life_s: f64) -> f64 {
        let trust = self.trust(now, half_life_s);
        trust * self.value + (1.0 - trust) * otherwise
    }
}

/// Buckets of prompt lengths, one per power of two.
const BUCKETS: usize = 24;

/// How many measurements a worker's own bucket needs before it counts instead of the fleet's.
const OWN_SEEN: f64 = 3.0;

/// How much slower or faster than nominal prompts are computed, by their length: attention makes long ones slower per
/// token, fixed costs make short ones slower.
#[derive(Clone, Debug, Default)]
pub struct PrefillModel {
    lengths: [Mean; BUCKETS],
    all: Mean,
}

impl PrefillModel {
    /// Learns that `tokens` took `factor` times the nominal time.
    pub fn observe(&mut self, tokens: u64, factor: f64, weight: f64, now: f64) {
        let factor = factor.clamp(1.0 / FACTOR_MAX, FACTOR_MAX);
        self.lengths[bucket(tokens)].observe_weighted(factor, weight, now);
        self.all.observe_weighted(factor, weight, now);
    }

    /// The factor for this many tokens, of this worker if it was measured often enough, else of the `fleet`, else 1.
    pub fn factor(&self, tokens: u64, fleet: &Self) -> f64 {
        let at = |index: usize| {
            let own = &self.lengths[index];
            if own.seen >= OWN_SEEN {
                return own.value();
            }
            fleet.lengths[index].value().or_else(|| own.value())
        };
        let index = bucket(tokens);
        let Some(here) = at(index) else {
            return self.all.value().or(fleet.all.value()).unwrap_or(1.0);
        };
        // How far the length lies from the middle of its bucket, in buckets; straight between powers of two.
        let offset = tokens as f64 / (1_u64 << index) as f64 - 1.5;
        let neighbour = if offset < 0.0 {
            index.checked_sub(1).and_then(at)
        } else {
            (index + 1 < BUCKETS).then(|| at(index + 1)).flatten()
        };
        neighbour.map_or(here, |there| here + (there - here) * offset.abs().min(1.0))
    }
}

fn bucket(tokens: u64) -> usize {
    (tokens.max(1).ilog2() as usize).min(BUCKETS - 1)
}

/// What failures of a pair still cost: 1 for one just now, half of that 20 s later.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Failures {
    score: f64,
    at: f64,
}

/// The half-life of a failure.
const FAILURE_HALF_LIFE_S: f64 = 20.0;

/// More failures than this make nothing worse; otherwise a burst would exclude a pair for an hour.
const FAILURE_SCORE_MAX: f64 = 8.0;

impl Failures {
    /// Counts one.
    pub fn record(&mut self, now: f64) {
        self.score = (self.score(now) + 1.0).min(FAILURE_SCORE_MAX);
        self.at = now;
    }

    /// What is left of them.
    pub fn score(&self, now: f64) -> f64 {
        if self.score == 0.0 {
            return 0.0;
        }
        self.score * (-(now - self.at).max(0.0) / FAILURE_HALF_LIFE_S).exp2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_outlier_moves_little_and_a_lasting_change_gets_through() {
        let mut mean = Mean::default();
        for _ in 0..50 {
            mean.observe(10.0, 0.0);
        }
        mean.observe(0.001, 0.0);
        assert!(mean.value().unwrap() > 8.0, "{mean:?}");
        for _ in 0..25 {
            mean.observe(2.5, 0.0);
        }
        assert!((mean.value().unwrap() - 2.5).abs() < 0.2, "{mean:?}");
    }

    #[test]
    fn nonsense_is_not_learned() {
        let mut mean = Mean::default();
        for value in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300] {
            mean.observe(value, 0.0);
        }
        assert_eq!(mean.value(), None);
        assert_eq!(mean.or(7.0, 1.0, 60.0), 7.0);
    }

    #[test]
    fn old_means_fade() {
        let mut mean = Mean::default();
        mean.observe(4.0, 10.0);
        assert_eq!(mean.or(2.0, 10.0, 60.0), 4.0);
        assert!((mean.or(2.0, 70.0, 60.0) - 3.0).abs() < 1e-9);
    }

    #[test]
    fn prompt_lengths_are_told_apart() {
        let nominal_factor = |tokens: u64| 1.0 + tokens as f64 / 50_000.0;
        let mut fleet = PrefillModel::default();
        for round in 0..400_u64 {
            let tokens = 100 << (round % 11);
            fleet.observe(tokens, nominal_factor(tokens), 1.0, 0.0);
        }
        let fresh = PrefillModel::default();
        for tokens in [120, 1_000, 9_000, 60_000] {
            let ratio = fresh.factor(tokens, &fleet) / nominal_factor(tokens);
            assert!((0.8..1.25).contains(&ratio), "{tokens}: {ratio}");
        }
        assert_eq!(fresh.factor(5, &PrefillModel::default()), 1.0);
    }

    #[test]
    fn failures_fade_and_are_bounded() {
        let mut failures = Failures::default();
        for _ in 0..100 {
            failures.record(5.0);
        }
        assert_eq!(failures.score(5.0), FAILURE_SCORE_MAX);
        assert!(failures.score(205.0) < 0.01);
    }
}
