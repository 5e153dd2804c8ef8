//! The router's settings, with their defaults, units and costs, and the command line that fills them in.
#![forbid(unsafe_code)]

pub mod check;
mod command_line;
pub mod epp;
pub mod file;
pub mod gossip;
pub mod layers;
pub mod ops;
pub mod reload;
pub mod scheduling;
pub mod sources;
pub mod telemetry;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use hyper::http::uri::{Authority, Scheme};

pub use command_line::CommandLine;
pub use ops::TraceSettings;

use crate::pool::breaker::BreakerLimits;
use gossip::Gossip;
use scheduling::{Explain, Scheduling};
use telemetry::Telemetry;

/// Default of [`Config::body_bytes_max`]: what SGLang's own router allows, enough for a batch of images in base64.
pub const BODY_BYTES_MAX_DEFAULT: usize = 512 << 20;

/// Default of [`Config::buffered_bytes_max`].
pub const BUFFERED_BYTES_MAX_DEFAULT: usize = 4 << 30;

/// Default of [`Config::requests_max`].
pub const REQUESTS_MAX_DEFAULT: usize = 10_000;

/// Default of [`Config::queue_max`].
pub const QUEUE_MAX_DEFAULT: usize = 1_000;

/// Default of [`Config::queue_timeout`].
pub const QUEUE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);

/// Default of [`Config::attempts_max`].
pub const ATTEMPTS_MAX_DEFAULT: u32 = 3;

/// Largest [`Config::attempts_max`]: each attempt remembers the workers that failed.
pub const ATTEMPTS_MAX: u32 = 16;

/// Default of [`Config::probe_interval`].
pub const PROBE_INTERVAL_DEFAULT: Duration = Duration::from_secs(5);

/// Default of [`Config::drain_timeout`]: what Kubernetes grants a pod after SIGTERM.
pub const DRAIN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// Where a worker listens: `http://host:port` or `https://host:port`, nothing behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerUrl {
    scheme: Scheme,
    authority: Authority,
}

impl WorkerUrl {
    /// `http` or `https`.
    pub fn scheme(&self) -> &Scheme {
        &self.scheme
    }

    /// Whether the worker is reached over TLS.
    pub fn is_tls(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }

    /// Host and port, as they stand in the URL.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The host alone; an IPv6 address keeps its brackets, as SGLang's own router sends it.
    pub fn host(&self) -> &str {
        self.authority.host()
    }
}

impl std::fmt::Display for WorkerUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

impl std::str::FromStr for WorkerUrl {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = |reason| ConfigError::WorkerUrl {
            url: text.to_owned(),
            reason,
        };
        let uri: Uri = text.parse().map_err(|_| bad("it is not a URL"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(bad("it must start with http:// or https://"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad("nothing may follow the port"));
        }
        let parts = uri.into_parts();
        let authority = parts.authority.ok_or(bad("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it may not hold a password"));
        }
        let scheme = parts.scheme.ok_or(bad("it names no scheme"))?;
        Ok(Self { scheme, authority })
    }
}

/// Files with which the router proves to clients who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file with the certificate chain, the router's own first.
    pub certificates: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
}

/// A prefill worker and the port of its bootstrap server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillTarget {
    /// The worker's HTTP address.
    pub url: WorkerUrl,
    /// Its `--disaggregation-bootstrap-port`. With `None` the worker's `/server_info` is asked; until it tells, null is
    /// sent, and each worker assumes its own flag, which is right only when all share one value.
    pub bootstrap_port: Option<u16>,
}

/// Everything the router can be told. [`Config::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to listen on, default `0.0.0.0`.
    pub host: String,
    /// Port to listen on, default 8080; 0 picks a free one.
    pub port: u16,
    /// Prefill workers, at least one.
    pub prefills: Vec<PrefillTarget>,
    /// Decode workers, at least one.
    pub decodes: Vec<WorkerUrl>,
    /// Workers that are not part of pairs: they serve what a pair cannot (embeddings, rerank, score, classify).
    pub others: Vec<WorkerUrl>,
    /// How pairs are chosen.
    pub scheduling: Scheduling,
    /// What replicas tell each other.
    pub gossip: Gossip,
    /// Whether answers explain themselves. Default never.
    pub explain: Explain,
    /// How workers are listened to.
    pub telemetry: Telemetry,
    /// From the whole request read to the last byte sent. Default none: generations may take hours.
    pub request_timeout: Option<Duration>,
    /// From the dispatch to decode's first body byte. Default none.
    pub first_byte_timeout: Option<Duration>,
    /// Between two reads of decode's body. Default none.
    pub stall_timeout: Option<Duration>,
    /// Largest request body in bytes, default 512 MiB. A body is held in memory (once, twice while it is edited).
    pub body_bytes_max: usize,
    /// Memory for the bodies of all requests that have no answer yet, in bytes, default 4 GiB; above it clients get 503 with
    /// Retry-After.
    pub buffered_bytes_max: usize,
    /// Generation requests at one time, default 10 000, each choice of `n` counted; above it requests wait.
    pub requests_max: usize,
    /// Requests that may wait for one of these places or for a worker below its own limit, default 1000; above it the
    /// request of the lowest priority gets 429 with Retry-After.
    pub queue_max: usize,
    /// How long a request may wait there, default 60 s; then its client gets 503 with Retry-After.
    pub queue_timeout: Duration,
    /// Requests that one prefill worker computes or sends at a time. Default no limit.
    pub prefill_requests_max: Option<usize>,
    /// Bytes of request bodies that one prefill worker computes or sends at a time: what its egress has to carry grows with
    /// them. A request larger than this goes alone. Default no limit.
    pub prefill_bytes_max: Option<usize>,
    /// Requests that one decode worker holds at a time, from the dispatch to the last byte. Default no limit.
    pub decode_requests_max: Option<usize>,
    /// How many pairs a request may meet before its first byte, default 3. Only failures that another worker may not share
    /// are tried again, never a 4xx.
    pub attempts_max: u32,
    /// When a failing worker is left out.
    pub breaker: BreakerLimits,
    /// Data-parallel ranks of each prefill worker. `None`, the default, asks each worker's `/server_info`.
    pub prefill_dp_size: Option<u32>,
    /// Clients may choose data-parallel ranks (`routed_dp_rank`, `X-Data-Parallel-Rank`). Default no: the fields are dropped.
    pub trusts_dp_rank: bool,
    /// All workers run with `SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1`: simple requests to `/generate` and
    /// `/v1/chat/completions` then keep their bodies untouched and get their bootstrap fields in headers. Default no.
    pub header_overrides: bool,
    /// Serve TLS with these files. Default plain HTTP.
    pub tls: Option<TlsFiles>,
    /// PEM file with the authorities that sign the certificates of `https://` workers. Default the system's.
    pub worker_authorities: Option<PathBuf>,
    /// Bearer token for workers: used for probes and aborts, and for requests that bring no Authorization of their own.
    pub api_key: Option<String>,
    /// How often a worker is asked whether it is ready, default 5 s.
    pub probe_interval: Duration,
    /// How long live requests may go on after the stop signal, default 30 s.
    pub drain_timeout: Duration,
    /// One log line per request to a worker. Default no: at 10 000 requests per second that is 3 MB per second.
    pub access_log: bool,
    /// Where spans of requests go. Default nowhere, which costs nothing.
    pub traces: Option<TraceSettings>,
    /// Serve `/ui` and `/debug/state`. Default yes. They name the workers, as `/metrics` does.
    pub serves_pages: bool,
    /// Serve Envoy's external processing too. Default no; `kvrouter epp` does.
    pub epp: Option<epp::EppConfig>,
}

impl Config {
    /// The default settings for these workers.
    pub fn new(prefills: Vec<PrefillTarget>, decodes: Vec<WorkerUrl>) -> Self {
        Self {
            host: "0.0.0.0".to_owned(),
            port: 8080,
            prefills,
            decodes,
            others: Vec::new(),
            scheduling: Scheduling::default(),
            gossip: Gossip::default(),
            explain: Explain::default(),
            telemetry: Telemetry::default(),
            request_timeout: None,
            first_byte_timeout: None,
            stall_timeout: None,
            body_bytes_max: BODY_BYTES_MAX_DEFAULT,
            buffered_bytes_max: BUFFERED_BYTES_MAX_DEFAULT,
            requests_max: REQUESTS_MAX_DEFAULT,
            queue_max: QUEUE_MAX_DEFAULT,
            queue_timeout: QUEUE_TIMEOUT_DEFAULT,
            prefill_requests_max: None,
            prefill_bytes_max: None,
            decode_requests_max: None,
            attempts_max: ATTEMPTS_MAX_DEFAULT,
            breaker: BreakerLimits::default(),
            prefill_dp_size: None,
            trusts_dp_rank: false,
            header_overrides: false,
            tls: None,
            worker_authorities: None,
            api_key: None,
            probe_interval: PROBE_INTERVAL_DEFAULT,
            drain_timeout: DRAIN_TIMEOUT_DEFAULT,
            access_log: false,
            traces: None,
            serves_pages: true,
            epp: None,
        }
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first contradiction.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.prefills.is_empty() || self.decodes.is_empty() {
            return Err(ConfigError::NoWorkers);
        }
        let urls = self
            .prefills
            .iter()
            .map(|target| &target.url)
            .chain(&self.decodes)
            .chain(&self.others);
        let mut seen = HashSet::new();
        for url in urls {
            if !seen.insert(url.authority.as_str()) {
                return Err(ConfigError::DuplicateWorker {
                    url: url.to_string(),
                });
            }
        }
        self.check_settings()
    }

    /// Checks all but the workers, which may come from elsewhere.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first contradiction.
    pub fn check_settings(&self) -> Result<(), ConfigError> {
        if !(1..=tokio::sync::Semaphore::MAX_PERMITS).contains(&self.requests_max) {
            return Err(ConfigError::RequestsMax);
        }
        for (option, limit) in [
            ("--max-requests-per-prefill", self.prefill_requests_max),
            ("--max-bytes-per-prefill", self.prefill_bytes_max),
            ("--max-requests-per-decode", self.decode_requests_max),
            (
                "--prefill-dp-size",
                self.prefill_dp_size.map(|size| size as usize),
            ),
        ] {
            if limit == Some(0) {
                return Err(ConfigError::Zero { option });
            }
        }
        if !(1..=ATTEMPTS_MAX).contains(&self.attempts_max) {
            return Err(ConfigError::Attempts);
        }
        let key_fits = |key: &String| key.bytes().all(|byte| byte.is_ascii_graphic());
        if !self.api_key.as_ref().is_none_or(key_fits) {
            return Err(ConfigError::ApiKey);
        }
        self.scheduling.check()
    }
}

/// Why settings were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A worker's address is unusable.
    #[error("`{url}` is no worker address: {reason} (example: http://10.0.0.1:30000)")]
    WorkerUrl {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// One role has no worker.
    #[error("at least one --prefill and one --decode worker are needed")]
    NoWorkers,
    /// One address appears twice.
    #[error("the worker {url} is named twice")]
    DuplicateWorker {
        /// The address.
        url: String,
    },
    /// No request could be served, or more than can be counted.
    #[error("--max-concurrent-requests must be at least 1")]
    RequestsMax,
    /// A limit of zero would serve nobody.
    #[error("{option} must be at least 1")]
    Zero {
        /// The option.
        option: &'static str,
    },
    /// A number of the scheduler's that makes no sense.
    #[error("{option} is out of range: sizes and speeds are positive, shares from 0 to 1")]
    Scheduling {
        /// The option.
        option: &'static str,
    },
    /// The telemetry port is no port.
    #[error("`--telemetry {text}` needs a port from 1 to 65535 behind the URL")]
    TelemetryPort {
        /// The worker's URL.
        text: String,
    },
    /// The token cannot stand in a header.
    #[error("the --telemetry-token must be visible ASCII characters")]
    TelemetryToken,
    /// Another replica's address is none.
    #[error("`{text}` is no gossip address: write host:port")]
    GossipPeer {
        /// What was given.
        text: String,
    },
    /// The token cannot stand in a header.
    #[error("the --gossip-token must be visible ASCII characters")]
    GossipToken,
    /// No attempt at all, or too many.
    #[error("--max-attempts must be from 1 to {ATTEMPTS_MAX}")]
    Attempts,
    /// One half of what TLS needs.
    #[error("--tls-certificate and --tls-key belong together")]
    HalfTls,
    /// A part of what TLS among replicas needs.
    #[error("--gossip-certificate, --gossip-key and --gossip-authorities belong together")]
    HalfGossipTls,
    /// A part of what TLS towards telemetry listeners needs.
    #[error(
        "--telemetry-certificate and --telemetry-key belong together, and need --telemetry-authorities"
    )]
    HalfTelemetryTls,
    /// One half of what TLS for Envoy needs.
    #[error("--grpc-tls-certificate and --grpc-tls-key belong together")]
    HalfGrpcTls,
    /// More endpoints than gateways look at.
    #[error("--fallback-endpoints may be {} at most", epp::FALLBACKS_MAX)]
    Fallbacks,
    /// The key cannot stand in a header.
    #[error("the --api-key may hold visible ASCII characters only")]
    ApiKey,
    /// The bootstrap port is neither a port nor `none`.
    #[error("`{text}` is no bootstrap port: give a number from 1 to 65535, or `none`")]
    BootstrapPort {
        /// What was given.
        text: String,
    },
    /// A pool without the cluster it is in.
    #[error("--pool needs --kubernetes, which takes the place of --prefill and --decode")]
    PoolWithoutKubernetes,
    /// The pool's name is none.
    #[error("`{text}` names no InferencePool: write NAME or NAMESPACE/NAME")]
    PoolName {
        /// What was given.
        text: String,
    },
    /// A time without a known form.
    #[error("`{text}` is no time: write 30, 1.5, 500ms, 30s, 10m or 2h")]
    Time {
        /// What was given.
        text: String,
    },
}
