//! The state of the whole router at one moment: for `/metrics`, for `/debug/state`, and for the page at `/ui`.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;

use crate::metrics::Metrics;
use crate::metrics::histogram::Histogram;
use crate::pick::Picker;
use crate::pool::breaker::BreakerState;
use crate::pool::{Blame, Role, Worker};
use crate::proxy::Front;
use crate::proxy::request::KIB;
use crate::schedule::board::{Load, PairState};

/// Most workers of one role that are described; a matrix of 64 by 64 is 100 KiB of JSON, and more than a page can show.
pub const WORKERS_SHOWN_MAX: usize = 64;

/// See the module. Field names are those of the JSON at `/debug/state`, times are seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Overview {
    /// The router's version.
    pub version: &'static str,
    /// How pairs are chosen.
    pub policy: &'static str,
    /// Since the router was made.
    pub uptime_s: f64,
    /// It is about to stop.
    pub draining: bool,
    /// Choices of generation requests in flight.
    pub live_requests: usize,
    /// Requests that wait for a place.
    pub queued_requests: usize,
    /// Requests that wait for a worker with room.
    pub requests_without_worker: usize,
    /// Requests that the scheduler counts on.
    pub bookings: usize,
    /// Requests of other replicas that it counts on.
    pub sibling_bookings: usize,
    /// Rooms in use.
    pub rooms: usize,
    /// Request bodies held in memory.
    pub buffered_bytes: usize,
    /// Prefill workers that may be chosen.
    pub ready_prefills: usize,
    /// Decode workers that may be chosen.
    pub ready_decodes: usize,
    /// Workers not described here, because there are more than [`WORKERS_SHOWN_MAX`] of their role.
    pub workers_left_out: usize,
    /// Prefill workers.
    pub prefills: Vec<WorkerView>,
    /// Decode workers.
    pub decodes: Vec<WorkerView>,
    /// Workers outside the pairs.
    pub others: Vec<WorkerView>,
    /// Between them.
    pub matrix: Matrix,
    /// Times to the first token since the start.
    pub ttft: HistogramView,
    /// Counts since the start.
    pub totals: Totals,
}

/// One worker. What is not known is null.
#[derive(Clone, Debug, Serialize)]
pub struct WorkerView {
    /// Its name, the same on every replica.
    pub name: String,
    /// Where it listens.
    pub url: String,
    /// It answered its last probes.
    pub ready: bool,
    /// It is going away and gets nothing new.
    pub draining: bool,
    /// `closed`, `open` or `trial`.
    pub breaker: &'static str,
    /// Requests it holds.
    pub live_requests: usize,
    /// Complete answers since it joined.
    pub served: u64,
    /// Failures since it joined, of all kinds.
    pub failures: u64,
    /// Requests booked at it.
    pub bookings: Option<u64>,
    /// Prompt tokens before a prefill worker.
    pub queued_tokens: Option<u64>,
    /// KV cache that a prefill worker still has to send.
    pub egress_bytes: Option<u64>,
    /// KV tokens taken or booked at a decode worker.
    pub kv_tokens: Option<u64>,
    /// KV tokens that fit into its pool.
    pub kv_tokens_max: Option<u64>,
    /// Blocks in a prefill worker's prefix cache, as far as it tells.
    pub cached_blocks: Option<u64>,
    /// Since its last telemetry.
    pub telemetry_age_s: Option<f64>,
}

/// One number per pair: a row for each prefill worker, a column for each decode worker.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Matrix {
    /// KV cache that waits, by the last telemetry.
    pub queued_bytes: Vec<Vec<u64>>,
    /// KV cache on the wire, by the last telemetry.
    pub in_flight_bytes: Vec<Vec<u64>>,
    /// Bandwidth that the scheduler counts with.
    pub bytes_per_s: Vec<Vec<f64>>,
    /// Whether that bandwidth was measured on this very pair.
    pub measured: Vec<Vec<bool>>,
    /// Requests sent so far.
    pub requests: Vec<Vec<u64>>,
}

/// What is known of a pair's wire.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wire {
    /// See [`Matrix::queued_bytes`].
    pub queued_bytes: u64,
    /// See [`Matrix::in_flight_bytes`].
    pub in_flight_bytes: u64,
    /// See [`Matrix::bytes_per_s`].
    pub bytes_per_s: f64,
    /// See [`Matrix::measured`].
    pub measured: bool,
}

impl From<PairState> for Wire {
    fn from(state: PairState) -> Self {
        Self {
            queued_bytes: state.bytes_queued,
            in_flight_bytes: state.bytes_in_flight,
            bytes_per_s: state.bytes_per_s,
            measured: state.measured,
        }
    }
}

impl Matrix {
    fn begin_row(&mut self) {
        self.queued_bytes.push(Vec::new());
        self.in_flight_bytes.push(Vec::new());
        self.bytes_per_s.push(Vec::new());
        self.measured.push(Vec::new());
        self.requests.push(Vec::new());
    }

    fn push(&mut self, wire: Wire, requests: u64) {
        let put = |rows: &mut Vec<Vec<u64>>, value| {
            if let Some(row) = rows.last_mut() {
                row.push(value);
            }
        };
        put(&mut self.queued_bytes, wire.queued_bytes);
        put(&mut self.in_flight_bytes, wire.in_flight_bytes);
        put(&mut self.requests, requests);
        if let (Some(rates), Some(measured)) =
            (self.bytes_per_s.last_mut(), self.measured.last_mut())
        {
            rates.push(wire.bytes_per_s);
            measured.push(wire.measured);
        }
    }
}

/// A histogram of seconds.
#[derive(Clone, Debug, Serialize)]
pub struct HistogramView {
    /// Upper edges of all buckets but the last.
    pub edges_s: &'static [f64],
    /// How many in each.
    pub counts: Vec<u64>,
}

impl From<&Histogram> for HistogramView {
    fn from(histogram: &Histogram) -> Self {
        Self {
            edges_s: histogram.edges(),
            counts: histogram.counts(),
        }
    }
}

/// Counts since the start.
#[derive(Clone, Debug, Serialize)]
pub struct Totals {
    /// Second and later pairs given.
    pub retries: u64,
    /// Streams ended by an error.
    pub broken_streams: u64,
    /// Clients gone early.
    pub client_disconnects: u64,
}

impl Overview {
    /// The state of `front` now.
    pub fn of(front: &Front) -> Self {
        let workers = front.pool.now();
        let config = front.live.now();
        let shown = |role| {
            let workers = workers.of_role(role);
            &workers[..workers.len().min(WORKERS_SHOWN_MAX)]
        };
        let (prefills, decodes) = (shown(Role::Prefill), shown(Role::Decode));
        let others = shown(Role::Other);
        let all = workers.workers().count();
        let mut matrix = Matrix::default();
        for prefill in prefills {
            matrix.begin_row();
            for decode in decodes {
                let requests = front.metrics.pairs.requests(prefill, decode);
                let wire = front.picker.pair(prefill, decode);
                matrix.push(wire.map(Wire::from).unwrap_or_default(), requests);
            }
        }
        let views = |workers: &[Arc<Worker>]| {
            let workers = workers.iter();
            workers.map(|worker| view(worker, &front.picker)).collect()
        };
        let (bookings, sibling_bookings) = front.picker.bookings();
        let permits = config.buffered_bytes_max.div_ceil(KIB);
        let free = front.body_memory.available_permits();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            policy: front.picker.policy().name(),
            uptime_s: front.began.elapsed().as_secs_f64(),
            draining: front.drain.is_thrown(),
            live_requests: front.admission.taken(),
            queued_requests: front.admission.waiting(),
            requests_without_worker: front.hold.waiting(),
            bookings,
            sibling_bookings,
            rooms: front.rooms.live(),
            buffered_bytes: permits.saturating_sub(free) * KIB,
            ready_prefills: workers.ready(Role::Prefill),
            ready_decodes: workers.ready(Role::Decode),
            workers_left_out: all - prefills.len() - decodes.len() - others.len(),
            prefills: views(prefills),
            decodes: views(decodes),
            others: views(others),
            matrix,
            ttft: HistogramView::from(&front.metrics.ttft),
            totals: Totals::of(&front.metrics),
        }
    }
}

impl Totals {
    fn of(metrics: &Metrics) -> Self {
        Self {
            retries: metrics.retries.load(Ordering::Relaxed),
            broken_streams: metrics.broken_streams.load(Ordering::Relaxed),
            client_disconnects: metrics.client_disconnects.load(Ordering::Relaxed),
        }
    }
}

fn view(worker: &Arc<Worker>, picker: &Picker) -> WorkerView {
    let load = picker.load(worker);
    let of =
        |role, value: fn(&Load) -> u64| load.as_ref().map(value).filter(|_| worker.role() == role);
    WorkerView {
        name: worker.name().to_owned(),
        url: worker.url().to_string(),
        ready: worker.is_ready(),
        draining: worker.is_draining(),
        breaker: match worker.breaker_state() {
            BreakerState::Closed => "closed",
            BreakerState::Open => "open",
            BreakerState::Trial => "trial",
        },
        live_requests: worker.live(),
        served: worker.served(),
        failures: Blame::ALL
            .iter()
            .map(|(blame, _)| worker.failures(*blame))
            .sum(),
        bookings: load.map(|load| load.bookings),
        queued_tokens: of(Role::Prefill, |load| load.queued_tokens),
        egress_bytes: of(Role::Prefill, |load| load.egress_bytes),
        kv_tokens: of(Role::Decode, |load| load.kv_tokens),
        kv_tokens_max: load.and_then(|load| load.kv_tokens_max),
        cached_blocks: load.and_then(|load| load.cached_blocks),
        telemetry_age_s: load
            .and_then(|load| load.sample_age)
            .map(|age| age.as_secs_f64()),
    }
}
