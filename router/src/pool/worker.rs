//! One worker: where it is, whether it is ready, what it holds, what it is to blame for.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::time::Instant;

use super::breaker::{Breaker, BreakerLimits, BreakerState};
use super::lines::Lines;
use crate::config::{Config, WorkerUrl};
use crate::discover::Member;

/// More data-parallel ranks than this are no statement about a real worker.
pub const DP_SIZE_MAX: u32 = 4096;

/// A KV cache of more tokens than this is no statement about a real worker either.
pub const TOKENS_MAX: u64 = 1 << 40;

/// What a worker says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkerInfo {
    /// Data-parallel ranks.
    pub dp_size: Option<u64>,
    /// The port of its bootstrap server.
    pub bootstrap_port: Option<u64>,
    /// Tokens per page of its KV cache.
    pub page_tokens: Option<u64>,
    /// Tokens that the KV cache of one data-parallel rank holds.
    pub kv_tokens: Option<u64>,
}

/// Where a worker publishes the events of its prefix cache (SGLang's `kv_events` in `/server_info`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheFeed {
    /// The first rank's port; the others' follow it.
    pub port: u16,
    /// Data-parallel ranks, each with a cache and a port of its own.
    pub ranks: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// What messages begin with.
    pub topic: String,
}

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes the prompt's KV cache.
    Prefill,
    /// Generates from it.
    Decode,
    /// Serves by itself what pairs cannot.
    Other,
}

impl Role {
    /// The role's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a worker did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// No connection could be made.
    Connect,
    /// It answered with a 4xx status: most often the client's fault, but counted to see the difference.
    ClientError,
    /// It answered with another status that is not a success.
    ServerError,
    /// It answered 429 or 503: it is full, or says so.
    Overload,
    /// It closed the connection before its answer was complete.
    Reset,
    /// It was silent for longer than a timeout allows.
    Timeout,
    /// It ended a generation in-band, with an abort event.
    Aborted,
    /// It reported that the KV cache did not get across. Whose fault that is, the pair's two workers cannot know.
    Transfer,
}

impl Blame {
    /// Every kind of blame with its metric label.
    pub const ALL: [(Self, &'static str); 8] = [
        (Self::Connect, "connect"),
        (Self::ClientError, "client_error"),
        (Self::ServerError, "server_error"),
        (Self::Overload, "overload"),
        (Self::Reset, "reset"),
        (Self::Timeout, "timeout"),
        (Self::Aborted, "aborted"),
        (Self::Transfer, "transfer"),
    ];

    /// Whether the failure tells something about the worker's health. A client's mistake, a full worker and a transfer that
    /// either side may have broken do not: breakers that open on them turn a busy hour into an outage.
    pub const fn is_guilt(self) -> bool {
        matches!(
            self,
            Self::Connect | Self::ServerError | Self::Reset | Self::Timeout | Self::Aborted
        )
    }
}

/// What a worker may hold at a time.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkerLimits {
    /// Requests; `None` is no limit.
    pub requests: Option<usize>,
    /// Bytes of request bodies; `None` is no limit. One request may exceed it alone.
    pub bytes: Option<usize>,
}

/// What all workers of a router have in common.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkerSettings {
    /// When a failing one is left out.
    pub breaker: BreakerLimits,
    /// What a prefill worker may hold.
    pub prefill: WorkerLimits,
    /// What a decode worker may hold.
    pub decode: WorkerLimits,
    /// Data-parallel ranks of each prefill worker; `None`: each is asked.
    pub prefill_dp_size: Option<u32>,
}

impl WorkerSettings {
    /// What a configuration says of workers.
    pub fn of(config: &Config) -> Self {
        Self {
            breaker: config.breaker,
            prefill: WorkerLimits {
                requests: config.prefill_requests_max,
                bytes: config.prefill_bytes_max,
            },
            decode: WorkerLimits {
                requests: config.decode_requests_max,
                bytes: None,
            },
            prefill_dp_size: config.prefill_dp_size,
        }
    }

    fn limits(&self, role: Role) -> WorkerLimits {
        match role {
            Role::Prefill => self.prefill,
            Role::Decode => self.decode,
            Role::Other => WorkerLimits::default(),
        }
    }
}

/// A worker of the pool.
#[derive(Debug)]
pub struct Worker {
    name: String,
    role: Role,
    url: WorkerUrl,
    lines: Arc<Lines>,
    dp_size: Option<u32>,
    /// Ports as the worker's source tells them; 0: it does not.
    told_bootstrap_port: AtomicU16,
    assumed_bootstrap_port: AtomicU16,
    telemetry_port: AtomicU16,
    zone: RwLock<Option<String>>,
    cache_feed: RwLock<Option<CacheFeed>>,
    probes_bootstrap: AtomicBool,
    draining: AtomicBool,
    found_bootstrap_port: AtomicU16,
    found_dp_size: AtomicU32,
    /// 0: unknown.
    found_page_tokens: AtomicU64,
    found_kv_tokens: AtomicU64,
    /// Counts what was learned of it.
    version: AtomicU32,
    rank_turn: AtomicU32,
    probed: AtomicBool,
    ready: AtomicBool,
    breaker: Breaker,
    /// `usize::MAX` is no limit.
    requests_max: AtomicUsize,
    bytes_max: AtomicUsize,
    live: AtomicUsize,
    live_bytes: AtomicUsize,
    born: Instant,
    served: AtomicU64,
    failures: [AtomicU64; Blame::ALL.len()],
}

impl Worker {
    /// The worker that `member` describes. It is not ready yet.
    pub fn new(member: &Member, settings: &WorkerSettings) -> Self {
        let worker = Self {
            name: member.name.clone(),
            role: member.role,
            url: member.url.clone(),
            lines: Arc::new(Lines::new(
                member.url.scheme().clone(),
                member.url.authority().clone(),
            )),
            dp_size: settings
                .prefill_dp_size
                .filter(|_| member.role == Role::Prefill),
            told_bootstrap_port: AtomicU16::new(0),
            assumed_bootstrap_port: AtomicU16::new(0),
            telemetry_port: AtomicU16::new(0),
            zone: RwLock::default(),
            cache_feed: RwLock::default(),
            probes_bootstrap: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            found_bootstrap_port: AtomicU16::new(0),
            found_dp_size: AtomicU32::new(0),
            found_page_tokens: AtomicU64::new(0),
            found_kv_tokens: AtomicU64::new(0),
            version: AtomicU32::new(0),
            rank_turn: AtomicU32::new(0),
            probed: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            breaker: Breaker::new(settings.breaker),
            requests_max: AtomicUsize::new(usize::MAX),
            bytes_max: AtomicUsize::new(usize::MAX),
            live: AtomicUsize::new(0),
            live_bytes: AtomicUsize::new(0),
            born: Instant::now(),
            served: AtomicU64::new(0),
            failures: [const { AtomicU64::new(0) }; Blame::ALL.len()],
        };
        worker.learn(member);
        worker.limit(settings);
        worker
    }

    /// Other limits from now on; what it holds beyond them may end.
    pub fn limit(&self, settings: &WorkerSettings) {
        let limits = settings.limits(self.role);
        let most = |limit: Option<usize>| limit.unwrap_or(usize::MAX);
        self.requests_max
            .store(most(limits.requests), Ordering::Relaxed);
        self.bytes_max.store(most(limits.bytes), Ordering::Relaxed);
        self.breaker.set_limits(settings.breaker);
    }

    /// Whether `member` describes this worker and not another one in its place.
    pub fn is(&self, member: &Member) -> bool {
        self.role == member.role && self.name == member.name && self.url == member.url
    }

    /// Takes over what may change of a worker that stays the same.
    pub fn learn(&self, member: &Member) {
        let port = |port: Option<u16>| port.unwrap_or(0);
        self.told_bootstrap_port
            .store(port(member.bootstrap_port), Ordering::Relaxed);
        self.assumed_bootstrap_port
            .store(port(member.bootstrap_port_assumed), Ordering::Relaxed);
        self.telemetry_port
            .store(port(member.telemetry_port), Ordering::Relaxed);
        self.probes_bootstrap
            .store(member.probes_bootstrap, Ordering::Relaxed);
        if self.zone() != member.zone {
            let mut zone = self.zone.write().unwrap_or_else(PoisonError::into_inner);
            zone.clone_from(&member.zone);
            self.version.fetch_add(1, Ordering::Release);
        }
        let was_draining = self.draining.swap(member.draining, Ordering::Relaxed);
        if member.draining && !was_draining {
            tracing::info!(role = %self.role, url = %self.url, "worker is going away, sending it nothing new");
        }
    }

    /// Its name, the same on every replica.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rack or availability zone.
    pub fn zone(&self) -> Option<String> {
        let zone = self.zone.read().unwrap_or_else(PoisonError::into_inner);
        zone.clone()
    }

    /// Whether it is ready only when its bootstrap server knows its ranks.
    pub fn probes_bootstrap(&self) -> bool {
        self.probes_bootstrap.load(Ordering::Relaxed)
    }

    /// The port of its telemetry stream, if its source knows one.
    pub fn telemetry_port(&self) -> Option<u16> {
        some_port(&self.telemetry_port)
    }

    /// Whether it is going away: what it holds may end, it gets nothing new.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// What it does.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Where it listens.
    pub fn url(&self) -> &WorkerUrl {
        &self.url
    }

    /// The connections to it.
    pub fn lines(&self) -> &Arc<Lines> {
        &self.lines
    }

    /// The port of a prefill worker's bootstrap server: told by its source, found, or assumed.
    pub fn bootstrap_port(&self) -> Option<u16> {
        some_port(&self.told_bootstrap_port)
            .or_else(|| some_port(&self.found_bootstrap_port))
            .or_else(|| some_port(&self.assumed_bootstrap_port))
    }

    /// How many data-parallel ranks it has, as far as was configured or found; at least 1.
    pub fn dp_size(&self) -> u32 {
        self.dp_size
            .unwrap_or_else(|| self.found_dp_size.load(Ordering::Relaxed))
            .max(1)
    }

    /// Takes note of what the worker says of itself; numbers out of range are not believed.
    pub fn describe(&self, info: &WorkerInfo) {
        if let Some(size) = info.dp_size.and_then(|size| u32::try_from(size).ok())
            && size <= DP_SIZE_MAX
        {
            self.found_dp_size.store(size, Ordering::Relaxed);
        }
        if let Some(port) = info
            .bootstrap_port
            .and_then(|port| u16::try_from(port).ok())
        {
            self.found_bootstrap_port.store(port, Ordering::Relaxed);
        }
        for (found, said) in [
            (&self.found_page_tokens, info.page_tokens),
            (&self.found_kv_tokens, info.kv_tokens),
        ] {
            if let Some(said) = said.filter(|said| *said <= TOKENS_MAX) {
                found.store(said, Ordering::Relaxed);
            }
        }
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Where it publishes the events of its prefix cache, if it does.
    pub fn cache_feed(&self) -> Option<CacheFeed> {
        let feed = self.cache_feed.read();
        feed.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of where it publishes the events of its prefix cache.
    pub fn publishes(&self, feed: Option<CacheFeed>) {
        let mut known = self
            .cache_feed
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *known = feed;
    }

    /// Changes whenever something that the scheduler depends on was learned of it.
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// Tokens per page of its KV cache, if it told.
    pub fn page_tokens(&self) -> Option<u64> {
        Some(self.found_page_tokens.load(Ordering::Relaxed)).filter(|tokens| *tokens != 0)
    }

    /// Tokens that its KV cache holds over all data-parallel ranks, if it told.
    pub fn kv_tokens(&self) -> Option<u64> {
        let each = self.found_kv_tokens.load(Ordering::Relaxed);
        Some(each.saturating_mul(u64::from(self.dp_size()))).filter(|tokens| *tokens != 0)
    }

    /// The rank whose turn it is.
    pub fn next_rank(&self) -> u32 {
        self.rank_turn.fetch_add(1, Ordering::Relaxed) % self.dp_size()
    }

    /// Whether the worker answered its last probes. False until the first one.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Records what the probes found; true if that is news.
    pub fn mark_ready(&self, ready: bool) -> bool {
        let is_news = self.ready.swap(ready, Ordering::Relaxed) != ready;
        // Whoever sees that it was probed sees the result.
        self.probed.store(true, Ordering::Release);
        is_news
    }

    /// Whether a probe has ended: before that, nobody knows whether it is ready.
    pub fn is_probed(&self) -> bool {
        self.probed.load(Ordering::Acquire)
    }

    fn age(&self) -> Duration {
        self.born.elapsed()
    }

    /// What its breaker lets through now.
    pub fn breaker_state(&self) -> BreakerState {
        if self.breaker.is_closed() {
            // Nearly always; the clock need not be read for it.
            return BreakerState::Closed;
        }
        self.breaker.state(self.age())
    }

    /// Whether a request of `bytes` fits under its limits.
    pub fn has_room(&self, bytes: usize) -> bool {
        let live = self.live.load(Ordering::Relaxed);
        let live_bytes = self.live_bytes.load(Ordering::Relaxed);
        live == 0
            || (live < self.requests_max.load(Ordering::Relaxed)
                && live_bytes.saturating_add(bytes) <= self.bytes_max.load(Ordering::Relaxed))
    }

    /// Requests it holds.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Notes that a request of `bytes` is on its way.
    pub fn sent(&self, bytes: usize) {
        self.live.fetch_add(1, Ordering::Relaxed);
        self.live_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.breaker.sent(self.age());
    }

    /// Notes that this request no longer occupies it.
    pub fn left(&self, bytes: usize) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        self.live_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Counts a complete answer.
    pub fn succeeded(&self) {
        crate::metrics::bump(&self.served);
        if self.breaker.succeeded() {
            tracing::info!(leg = %self.role, url = %self.url, "worker serves again");
        }
    }

    /// Complete answers so far.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Counts a failure this worker is to blame for.
    pub fn blame(&self, blame: Blame) {
        crate::metrics::bump(&self.failures[blame as usize]);
        if blame.is_guilt() && self.breaker.failed(self.age()) {
            tracing::warn!(leg = %self.role, url = %self.url, "worker failed too often, leaving it out for a while");
        }
    }

    /// How often it failed that way.
    pub fn failures(&self, blame: Blame) -> u64 {
        self.failures[blame as usize].load(Ordering::Relaxed)
    }
}

fn some_port(port: &AtomicU16) -> Option<u16> {
    Some(port.load(Ordering::Relaxed)).filter(|port| *port != 0)
}
