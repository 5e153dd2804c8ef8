//! Chooses the prefill and the decode worker of a request.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use rand::RngExt;

/// How pairs are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Policy {
    /// Each pair with the same chance.
    Random,
    /// Every worker in turn, and every pair in turn.
    #[default]
    RoundRobin,
}

/// The state of a policy.
#[derive(Debug, Default)]
pub struct PairScheduler {
    policy: Policy,
    turn: AtomicU64,
}

impl PairScheduler {
    /// A scheduler that follows `policy`.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            turn: AtomicU64::new(0),
        }
    }

    /// Indices of a prefill and a decode worker, of `prefills` and `decodes` candidates (both at least 1).
    pub fn choose(&self, prefills: usize, decodes: usize) -> (usize, usize) {
        assert!(
            prefills > 0 && decodes > 0,
            "invariant: both roles have a candidate"
        );
        match self.policy {
            Policy::Random => {
                let mut rng = rand::rng();
                (rng.random_range(0..prefills), rng.random_range(0..decodes))
            }
            Policy::RoundRobin => {
                let turn = self.turn.fetch_add(1, Ordering::Relaxed);
                turn_pair(turn, prefills as u64, decodes as u64)
            }
        }
    }
}

/// Two plain counters would move in lock-step: with as many prefills as decodes, prefill `i` would only ever meet one
/// decode. The decode side therefore shifts by one each time the two cycles meet again.
#[expect(
    clippy::cast_possible_truncation,
    reason = "both results are below a usize argument"
)]
pub(super) fn turn_pair(turn: u64, prefills: u64, decodes: u64) -> (usize, usize) {
    let cycle = prefills / gcd(prefills, decodes) * decodes;
    let decode = (turn % decodes + turn / cycle % decodes) % decodes;
    ((turn % prefills) as usize, decode as usize)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn round_robin_meets_every_pair_equally() {
        for (prefills, decodes) in [(1, 1), (2, 2), (3, 2), (4, 6), (4, 4), (1, 5)] {
            let scheduler = PairScheduler::new(Policy::RoundRobin);
            let rounds = 5 * prefills * decodes * decodes;
            let mut met = HashMap::new();
            for _ in 0..rounds {
                *met.entry(scheduler.choose(prefills, decodes)).or_insert(0) += 1;
            }
            assert_eq!(met.len(), prefills * decodes, "{prefills}x{decodes}");
            let expected = rounds / (prefills * decodes);
            assert!(
                met.values().all(|count| *count == expected),
                "{prefills}x{decodes}: {met:?}"
            );
        }
    }

    #[test]
    fn random_reaches_every_pair() {
        let scheduler = PairScheduler::new(Policy::Random);
        let met: std::collections::HashSet<_> = (0..2000).map(|_| scheduler.choose(3, 4)).collect();
        assert_eq!(met.len(), 12);
    }
}
