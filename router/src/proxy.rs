//! The HTTP front: requests in, two legs out, decode's bytes back.
pub mod abort;
pub mod admission;
pub mod deadline;
pub mod dispatch;
pub mod fanout;
pub mod first_bytes;
pub mod headers;
pub mod json_edit;
pub mod leg;
pub mod live;
pub mod logprobs;
pub mod messages;
pub mod models;
pub mod pair;
pub mod passthrough;
pub mod placement;
pub mod request;
pub mod server;
pub mod shape;
pub mod sse;
pub mod stream;
pub mod target;

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::config::Config;
use crate::config::reload::LiveConfig;
use crate::discover::FleetWatch;
use crate::drain::DrainSwitch;
use crate::fleet::telemetry::Engines;
use crate::metrics::Metrics;
use crate::observe::Tracer;
use crate::observe::export::{self, Exporter};
use crate::pick::Picker;
use crate::pick::hold::Hold;
use crate::pool::Pool;
use crate::pool::client::WorkerClient;
use crate::pool::tls::TlsError;
use crate::pool::worker::WorkerSettings;
use crate::schedule::rooms::Rooms;
use abort::{AbortRunner, Aborts};
use admission::Admission;

/// What all requests share.
#[derive(Debug)]
pub struct Front {
    /// The settings as the router started with them.
    pub config: Config,
    /// The settings in effect: those that may change while the router runs are read here.
    pub live: LiveConfig,
    /// When this was made.
    pub began: Instant,
    /// Makes spans of requests, if anybody wants them.
    pub tracer: Option<Tracer>,
    /// Sends them, once somebody runs it.
    pub exporter: Mutex<Option<Exporter>>,
    /// What the source of workers published last; [`crate::fleet`] makes the pool follow it.
    pub fleet: FleetWatch,
    /// The workers.
    pub pool: Pool,
    /// Chooses pairs; only [`placement`] asks it.
    pub picker: Arc<Picker>,
    /// The rooms in use.
    pub rooms: Arc<Rooms>,
    /// Connections to the workers.
    pub client: WorkerClient,
    /// Takes orders to abort requests on workers.
    pub aborts: Aborts,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Counters of the Envoy picker.
    pub epp: crate::epp::counters::Counters,
    /// One place per choice of a generation request.
    pub admission: Arc<Admission>,
    /// Which worker the engines in telemetry belong to.
    pub engines: Engines,
    /// Requests that wait for a worker with room.
    pub hold: Arc<Hold>,
    /// Requests on their second or later pair.
    pub retrying: AtomicUsize,
    /// One permit per KiB of request bodies in memory.
    pub body_memory: Arc<Semaphore>,
    /// Thrown when the router stops.
    pub drain: DrainSwitch,
}

impl Front {
    /// The state of a router that has served nothing yet, and the runner of its aborts. The pool holds what `fleet` holds now.
    ///
    /// # Errors
    /// [`TlsError`] when workers are reached over TLS and nobody is trusted to sign their certificates.
    pub fn new(config: Config, fleet: FleetWatch) -> Result<(Arc<Self>, AbortRunner), TlsError> {
        let metrics = Arc::new(Metrics::default());
        let client = WorkerClient::new(&config)?;
        let pool = Pool::new(WorkerSettings::of(&config));
        pool.sync(&fleet.borrow());
        let (tracer, exporter) = match &config.traces {
            Some(settings) => {
                let (queue, exporter) = export::channel(settings, &metrics)?;
                let ratio = settings.ratio;
                (Some(Tracer { queue, ratio }), Some(exporter))
            }
            None => (None, None),
        };
        let picker = Arc::new(Picker::new(&config.scheduling));
        picker.sync(&pool.now());
        let (aborts, abort_runner) = Aborts::new(client.clone(), Arc::clone(&metrics));
        let front = Self {
            fleet,
            pool,
            picker,
            engines: Engines::default(),
            rooms: Arc::new(Rooms::default()),
            client,
            aborts,
            metrics,
            epp: crate::epp::counters::Counters::default(),
            admission: Arc::new(Admission::new(config.requests_max, config.queue_max)),
            hold: Arc::new(Hold::new(config.queue_max)),
            retrying: AtomicUsize::new(0),
            body_memory: Arc::new(Semaphore::new(
                config.buffered_bytes_max.div_ceil(request::KIB),
            )),
            drain: DrainSwitch::default(),
            live: LiveConfig::new(config.clone()),
            began: Instant::now(),
            tracer,
            exporter: Mutex::new(exporter),
            config,
        };
        Ok((Arc::new(front), abort_runner))
    }

    /// Other settings from now on. Only those that [`crate::config::reload`] lists may differ from the ones before.
    pub fn apply(&self, config: Config) {
        self.admission.resize(config.requests_max, config.queue_max);
        self.hold.resize(config.queue_max);
        self.pool.limit(WorkerSettings::of(&config));
        self.picker.reset(config.scheduling.settings.clone());
        self.live.replace(config);
        // A worker may have room where there was none.
        self.hold.ring();
    }
}
