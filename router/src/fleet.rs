//! What follows the workers: the pool, their probes, and what they tell of themselves.
#![forbid(unsafe_code)]

pub mod kv_events;
pub mod loads;
pub mod telemetry;

use std::collections::HashMap;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::discover::FleetWatch;
use crate::pool::{Role, Worker, health};
use crate::proxy::Front;

/// Keeps the pool equal to the latest fleet, and looks after every worker for as long as it is there. Runs until it is
/// dropped.
pub async fn follow(front: Arc<Front>, mut fleet: FleetWatch) {
    let mut attended: HashMap<String, Attended> = HashMap::new();
    loop {
        let latest = Arc::clone(&fleet.borrow_and_update());
        front.pool.sync(&latest);
        let now = front.pool.now();
        front.picker.sync(&now);
        let here: HashMap<_, _> = now
            .workers()
            .map(|worker| (worker.name(), worker))
            .collect();
        attended.retain(|name, attended| {
            let same = |worker: &&Arc<Worker>| Arc::ptr_eq(worker, &attended.worker);
            here.get(name.as_str()).is_some_and(same)
        });
        for (name, worker) in here {
            attended
                .entry(name.to_owned())
                .or_insert_with(|| Attended::begin(&front, worker));
        }
        // A worker may have room where there was none.
        front.hold.ring();
        if fleet.changed().await.is_err() {
            // This was the last fleet of its source.
            std::future::pending::<()>().await;
        }
    }
}

/// A worker and the tasks that look after it; they end when this is dropped.
#[derive(Debug)]
struct Attended {
    worker: Arc<Worker>,
    _tasks: JoinSet<()>,
}

impl Attended {
    fn begin(front: &Arc<Front>, worker: &Arc<Worker>) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(health::watch(
            Arc::clone(worker),
            front.client.clone(),
            front.config.probe_interval,
            {
                let hold = Arc::clone(&front.hold);
                move || hold.ring()
            },
        ));
        if worker.role() != Role::Other {
            tasks.spawn(telemetry::watch(Arc::clone(front), Arc::clone(worker)));
            if let Some(interval) = front.config.telemetry.loads_interval {
                tasks.spawn(loads::poll(Arc::clone(front), Arc::clone(worker), interval));
            }
        }
        if worker.role() == Role::Prefill && front.config.telemetry.kv_events {
            tasks.spawn(kv_events::watch(Arc::clone(front), Arc::clone(worker)));
        }
        Self {
            worker: Arc::clone(worker),
            _tasks: tasks,
        }
    }
}
