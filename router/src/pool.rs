//! The workers behind the router.
pub mod bootstrap_probe;
pub mod breaker;
pub mod client;
pub mod health;
pub mod lines;
pub mod tls;
pub mod worker;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

pub use worker::{Blame, CacheFeed, Role, Worker, WorkerInfo};

use crate::discover::{Fleet, MEMBERS_MAX, Member};
use breaker::BreakerState;
use worker::WorkerSettings;

/// The workers, which come and go while the router runs.
#[derive(Debug)]
pub struct Pool {
    settings: Mutex<WorkerSettings>,
    /// Replaced as a whole, so that readers keep what they have seen.
    workers: RwLock<Arc<Workers>>,
    /// Held by the one that prepares a replacement.
    changing: Mutex<()>,
}

/// All workers of one moment, by role, in their source's order.
#[derive(Clone, Debug, Default)]
pub struct Workers {
    prefills: Vec<Arc<Worker>>,
    decodes: Vec<Arc<Worker>>,
    others: Vec<Arc<Worker>>,
}

impl Pool {
    /// A pool without workers.
    pub fn new(settings: WorkerSettings) -> Self {
        Self {
            settings: Mutex::new(settings),
            workers: RwLock::default(),
            changing: Mutex::default(),
        }
    }

    /// The workers as they are now.
    pub fn now(&self) -> Arc<Workers> {
        let workers = self.workers.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&workers)
    }

    /// Other limits from now on, for workers that are here and for those that come.
    pub fn limit(&self, settings: WorkerSettings) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
        for worker in self.now().workers() {
            worker.limit(&settings);
        }
    }

    /// Makes the pool equal to `fleet`. A member that was there already keeps its state; one whose address or role changed
    /// is a new worker. What a removed worker holds may end.
    pub fn sync(&self, fleet: &Fleet) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let settings = *self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.now();
        let known: HashMap<&str, &Arc<Worker>> = before
            .workers()
            .map(|worker| (worker.name(), worker))
            .collect();
        let mut after = Workers::default();
        let mut taken: HashMap<&str, &Member> = HashMap::new();
        for member in fleet.members.iter().take(MEMBERS_MAX) {
            if taken.insert(&member.name, member).is_some() {
                tracing::warn!(
                    name = member.name,
                    "two workers have one name, leaving one out"
                );
                continue;
            }
            let worker = match known.get(member.name.as_str()) {
                Some(worker) if worker.is(member) => {
                    worker.learn(member);
                    Arc::clone(worker)
                }
                _ => {
                    tracing::info!(role = %member.role, url = %member.url, name = member.name, "worker joins");
                    Arc::new(Worker::new(member, &settings))
                }
            };
            after.of_role_mut(member.role).push(worker);
        }
        for (name, worker) in known {
            if !taken.get(name).is_some_and(|member| worker.is(member)) {
                tracing::info!(role = %worker.role(), url = %worker.url(), name, "worker leaves");
            }
        }
        let mut workers = self.workers.write().unwrap_or_else(PoisonError::into_inner);
        *workers = Arc::new(after);
    }
}

impl Workers {
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

    fn of_role_mut(&mut self, role: Role) -> &mut Vec<Arc<Worker>> {
        match role {
            Role::Prefill => &mut self.prefills,
            Role::Decode => &mut self.decodes,
            Role::Other => &mut self.others,
        }
    }

    /// How many workers of `role` are ready and not going away.
    pub fn ready(&self, role: Role) -> usize {
        self.of_role(role)
            .iter()
            .filter(|worker| worker.is_ready() && !worker.is_draining())
            .count()
    }

    /// The workers of `role` that may be chosen, best kind first: ready ones whose breakers are not open; then ready ones;
    /// then all, because a probe can be wrong and a refused request is no better than a failed one. Those that go away are
    /// left out, and so is `avoid` when another worker of the role exists at all.
    pub fn candidates(&self, role: Role, avoid: &[Arc<Worker>]) -> Vec<&Arc<Worker>> {
        let stays = |worker: &&Arc<Worker>| !worker.is_draining();
        let all = || self.of_role(role).iter().filter(stays);
        let wanted = |worker: &&Arc<Worker>| !avoid.iter().any(|one| Arc::ptr_eq(one, worker));
        let mut left: Vec<_> = all().filter(wanted).collect();
        if left.is_empty() {
            left = all().collect();
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
