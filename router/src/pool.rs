//! The workers behind the router.
pub mod client;
pub mod health;
pub mod worker;

use std::sync::Arc;

pub use worker::{Blame, Role, Worker};

use crate::config::Config;

/// All workers, by role. The lists are never empty and do not change while the router runs.
#[derive(Debug)]
pub struct Pool {
    prefills: Vec<Arc<Worker>>,
    decodes: Vec<Arc<Worker>>,
}

impl Pool {
    /// The workers of a checked configuration.
    pub fn new(config: &Config) -> Self {
        let prefills = config
            .prefills
            .iter()
            .map(|target| Arc::new(Worker::prefill(target)));
        let decodes = config
            .decodes
            .iter()
            .map(|url| Arc::new(Worker::decode(url)));
        Self {
            prefills: prefills.collect(),
            decodes: decodes.collect(),
        }
    }

    /// Every worker, prefill first.
    pub fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.prefills.iter().chain(&self.decodes)
    }

    /// The workers of one role.
    pub fn of_role(&self, role: Role) -> &[Arc<Worker>] {
        match role {
            Role::Prefill => &self.prefills,
            Role::Decode => &self.decodes,
        }
    }

    /// How many workers of `role` are ready.
    pub fn ready(&self, role: Role) -> usize {
        self.of_role(role)
            .iter()
            .filter(|worker| worker.is_ready())
            .count()
    }

    /// The workers of `role` that may be chosen: the ready ones; or all, if a role has no ready worker, because a probe can
    /// be wrong and a refused request is no better than a failed one. `avoid` is left out when another one remains.
    pub fn candidates(&self, role: Role, avoid: Option<&Arc<Worker>>) -> Vec<&Arc<Worker>> {
        let all = self.of_role(role);
        let wanted = |worker: &&Arc<Worker>| avoid.is_none_or(|avoid| !Arc::ptr_eq(avoid, worker));
        let ready: Vec<_> = all
            .iter()
            .filter(|worker| worker.is_ready())
            .filter(wanted)
            .collect();
        if !ready.is_empty() {
            return ready;
        }
        let others: Vec<_> = all.iter().filter(wanted).collect();
        if others.is_empty() {
            all.iter().collect()
        } else {
            others
        }
    }
}
