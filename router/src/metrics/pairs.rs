//! Counters by pair, of which there are at most [`PAIRS_MAX`].
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::text::{Kind, Labels, Text};
use crate::pool::{Role, Worker, Workers};
use crate::schedule::map::Map;

/// Pairs with series of their own, as 32 prefill and 32 decode workers make; requests of further pairs are counted
/// together, as `other`.
pub const PAIRS_MAX: usize = 1024;

/// What is counted of a pair.
#[derive(Debug, Default)]
pub struct PairCounts {
    /// Requests sent to it.
    pub requests: AtomicU64,
    /// Of these, failed ones.
    pub failures: AtomicU64,
}

#[derive(Debug)]
struct Known {
    /// Held, so that no other worker can appear at the same address.
    prefill: Arc<Worker>,
    decode: Arc<Worker>,
    counts: Arc<PairCounts>,
}

/// Identifies workers by where they lie in memory: names would have to be hashed for every request.
type Key = (usize, usize);

/// Counters of all pairs.
#[derive(Debug, Default)]
pub struct Pairs {
    known: RwLock<Map<Key, Known>>,
    other: Arc<PairCounts>,
}

impl Pairs {
    /// The counters of a pair.
    pub fn of(&self, prefill: &Arc<Worker>, decode: &Arc<Worker>) -> Arc<PairCounts> {
        let key = key(prefill, decode);
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(pair) = known.get(&key) {
                return Arc::clone(&pair.counts);
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= PAIRS_MAX && !known.contains_key(&key) {
            return Arc::clone(&self.other);
        }
        let pair = known.entry(key).or_insert_with(|| Known {
            prefill: Arc::clone(prefill),
            decode: Arc::clone(decode),
            counts: Arc::default(),
        });
        Arc::clone(&pair.counts)
    }

    /// Requests that a pair was sent so far.
    pub fn requests(&self, prefill: &Arc<Worker>, decode: &Arc<Worker>) -> u64 {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known
            .get(&key(prefill, decode))
            .map_or(0, |pair| pair.counts.requests.load(Ordering::Relaxed))
    }

    /// Forgets pairs of workers that are gone, which makes place for others, and writes the rest.
    pub fn render(&self, text: &mut Text, workers: &Workers) {
        let here = |role, worker: &Arc<Worker>| {
            let mut workers = workers.of_role(role).iter();
            workers.any(|one| Arc::ptr_eq(one, worker))
        };
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, pair| {
            here(Role::Prefill, &pair.prefill) && here(Role::Decode, &pair.decode)
        });
        let mut rows: Vec<_> = known
            .values()
            .map(|pair| {
                let labels = Labels::default()
                    .with("prefill", pair.prefill.name())
                    .with("decode", pair.decode.name());
                (labels, Arc::clone(&pair.counts))
            })
            .collect();
        drop(known);
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        let other = Labels::default()
            .with("prefill", "other")
            .with("decode", "other");
        rows.push((other, Arc::clone(&self.other)));
        type Column = (&'static str, &'static str, fn(&PairCounts) -> &AtomicU64);
        let columns: [Column; 2] = [
            (
                "kvrouter_pair_requests_total",
                "Requests by the pair they were sent to.",
                |pair| &pair.requests,
            ),
            (
                "kvrouter_pair_failures_total",
                "Requests by pair that failed on one of its legs.",
                |pair| &pair.failures,
            ),
        ];
        for (name, help, column) in columns {
            text.family(name, Kind::Counter, help);
            for (labels, counts) in &rows {
                text.sample(labels, column(counts).load(Ordering::Relaxed));
            }
        }
    }
}

fn key(prefill: &Arc<Worker>, decode: &Arc<Worker>) -> Key {
    (Arc::as_ptr(prefill) as usize, Arc::as_ptr(decode) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, PrefillTarget, WorkerUrl};
    use crate::discover::{Fleet, flags};
    use crate::pool::Pool;
    use crate::pool::worker::WorkerSettings;

    fn pool(prefills: usize, decodes: usize) -> Pool {
        let url = |role: &str, at: usize| -> WorkerUrl {
            format!("http://{role}-{at}:1").parse().unwrap()
        };
        let prefill = |at| PrefillTarget {
            url: url("prefill", at),
            bootstrap_port: None,
        };
        let config = Config::new(
            (0..prefills).map(prefill).collect(),
            (0..decodes).map(|at| url("decode", at)).collect(),
        );
        let pool = Pool::new(WorkerSettings::default());
        pool.sync(&flags::fleet(&config));
        pool
    }

    #[test]
    fn their_number_is_bounded_and_the_gone_make_place() {
        let (pool, pairs) = (pool(33, 32), Pairs::default());
        let all = pool.now();
        for prefill in all.of_role(Role::Prefill) {
            for decode in all.of_role(Role::Decode) {
                let counts = pairs.of(prefill, decode);
                counts.requests.fetch_add(1, Ordering::Relaxed);
            }
        }
        let rendered = |workers: &Workers| {
            let mut text = Text::new();
            pairs.render(&mut text, workers);
            text.finish()
        };
        let text = rendered(&all);
        assert_eq!(text.lines().count(), 4 + 2 * (PAIRS_MAX + 1));
        let other = "kvrouter_pair_requests_total{prefill=\"other\",decode=\"other\"} 32";
        assert!(text.contains(other), "{text}");
        pool.sync(&Fleet::default());
        assert_eq!(rendered(&pool.now()).lines().count(), 6);
    }
}
