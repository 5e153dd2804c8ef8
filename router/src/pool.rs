//! The workers behind the router.
pub mod breaker;
pub mod client;
pub mod health;
pub mod tls;
pub mod worker;

use std::sync::Arc;

pub use worker::{Blame, Role, Worker};

use crate::config::Config;
use breaker::BreakerState;
use worker::WorkerLimits;

/// All workers, by role. The lists do not change while the router runs; prefill and decode are never empty.
#[derive(Debug)]
pub struct Pool {
    prefills: Vec<Arc<Worker>>,
    decodes: Vec<Arc<Worker>>,
    others: Vec<Arc<Worker>>,
}

impl Pool {
    /// The workers of a checked configuration.
    pub fn new(config: &Config) -> Self {
        let prefill_limits = WorkerLimits {
            requests: config.prefill_requests_max,
            bytes: config.prefill_bytes_max,
        };
        let decode_limits = WorkerLimits {
            requests: config.decode_requests_max,
            bytes: None,
        };
        let (breaker, dp_size) = (config.breaker, config.prefill_dp_size);
        let prefill = |target| Arc::new(Worker::prefill(target, dp_size, breaker, prefill_limits));
        let decode = |url| Arc::new(Worker::new(Role::Decode, url, breaker, decode_limits));
        let no_limits = WorkerLimits::default();
        let other = |url| Arc::new(Worker::new(Role::Other, url, breaker, no_limits));
        Self {
            prefills: config.prefills.iter().map(prefill).collect(),
            decodes: config.decodes.iter().map(decode).collect(),
            others: config.others.iter().map(other).collect(),
        }
    }

    /// Every worker, prefill first.
    pub fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.prefills
            .iter()
            .chain(&self.decodes)
            .chain(&self.others)
    }

    /// The workers of one role.
    pub fn of_role(&self, role: Role) -> &[Arc<Worker>] {
        match role {
            Role::Prefill => &self.prefills,
            Role::Decode => &self.decodes,
            Role::Other => &self.others,
        }
    }

    /// How many workers of `role` are ready.
    pub fn ready(&self, role: Role) -> usize {
        self.of_role(role)
            .iter()
            .filter(|worker| worker.is_ready())
            .count()
    }

    /// The workers of `role` that may be chosen, best kind first: ready ones whose breakers are not open; then ready ones;
    /// then all, because a probe can be wrong and a refused request is no better than a failed one. `avoid` is left out
    /// when another worker of the role exists at all.
    pub fn candidates(&self, role: Role, avoid: &[Arc<Worker>]) -> Vec<&Arc<Worker>> {
        let all = self.of_role(role);
        let wanted = |worker: &&Arc<Worker>| !avoid.iter().any(|one| Arc::ptr_eq(one, worker));
        let mut left: Vec<_> = all.iter().filter(wanted).collect();
        if left.is_empty() {
            left = all.iter().collect();
        }
        let tiers: [fn(&Worker) -> bool; 2] = [
            |worker| worker.is_ready() && worker.breaker_state() != BreakerState::Open,
            Worker::is_ready,
        ];
        for fits in tiers {
            let found: Vec<_> = left.iter().copied().filter(|worker| fits(worker)).collect();
            if !found.is_empty() {
                return found;
            }
        }
        left
    }
}
