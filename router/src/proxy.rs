//! The HTTP front: requests in, two legs out, decode's bytes back.
pub mod abort;
pub mod deadline;
pub mod headers;
pub mod information;
pub mod json_edit;
pub mod leg;
pub mod pair;
pub mod request;
pub mod server;
pub mod shape;
pub mod stream;

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::config::Config;
use crate::drain::DrainSwitch;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::pool::client::WorkerClient;
use crate::schedule::pair::PairScheduler;
use crate::schedule::rooms::Rooms;
use abort::Aborts;

/// What all requests share.
#[derive(Debug)]
pub struct Front {
    /// The settings.
    pub config: Config,
    /// The workers.
    pub pool: Pool,
    /// Chooses pairs.
    pub scheduler: PairScheduler,
    /// The rooms in use.
    pub rooms: Arc<Rooms>,
    /// Connections to the workers.
    pub client: WorkerClient,
    /// Takes orders to abort requests on workers.
    pub aborts: Aborts,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// One permit per generation request.
    pub admission: Arc<Semaphore>,
    /// One permit per KiB of request bodies in memory.
    pub body_memory: Arc<Semaphore>,
    /// Thrown when the router stops.
    pub drain: DrainSwitch,
}

impl Front {
    /// Generation requests in flight.
    pub fn live_requests(&self) -> usize {
        self.config.requests_max - self.admission.available_permits()
    }
}
