//! Counters of the router and their Prometheus text.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::StatusCode;

use crate::pool::{Blame, Worker, Workers};

/// What a request asked for, as a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/generate`
    Generate,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`
    Messages,
    /// What one worker answers by itself.
    Pass,
    /// `/health`, `/ready`, `/metrics`
    Own,
    /// Anything else.
    Other,
}

const ROUTES: [(Route, &str); 8] = [
    (Route::Generate, "/generate"),
    (Route::Chat, "/v1/chat/completions"),
    (Route::Completions, "/v1/completions"),
    (Route::Responses, "/v1/responses"),
    (Route::Messages, "/v1/messages"),
    (Route::Pass, "passthrough"),
    (Route::Own, "own"),
    (Route::Other, "other"),
];

/// Status codes are 100..=999 in the `http` crate; everything from 600 up shares the last counter.
const STATUSES: usize = 501;

/// Upper edges of the buckets of added latency, in microseconds.
const ADDED_BUCKETS_MICROS: [u64; 9] = [25, 50, 100, 200, 500, 1_000, 5_000, 50_000, 1_000_000];

/// The router's own counters; failures of workers are counted with the worker.
#[derive(Debug)]
pub struct Metrics {
    requests: Vec<[AtomicU64; STATUSES]>,
    added: [AtomicU64; ADDED_BUCKETS_MICROS.len() + 1],
    added_nanos: AtomicU64,
    /// Streams that ended with an error after their first byte.
    pub broken_streams: AtomicU64,
    /// Requests dropped because the client went away.
    pub client_disconnects: AtomicU64,
    /// Abort calls that did not fit into their queue.
    pub aborts_dropped: AtomicU64,
    /// Second and later pairs that requests were given.
    pub retries: AtomicU64,
    /// Requests not tried again because too many others were.
    pub retries_refused: AtomicU64,
    /// Generations that a worker ended with an error inside its answer.
    pub inband_aborts: AtomicU64,
    /// Answers that should hold the prompt's log-probabilities and do not.
    pub logprobs_unmerged: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: ROUTES
                .iter()
                .map(|_| [const { AtomicU64::new(0) }; STATUSES])
                .collect(),
            added: [const { AtomicU64::new(0) }; ADDED_BUCKETS_MICROS.len() + 1],
            added_nanos: AtomicU64::new(0),
            broken_streams: AtomicU64::new(0),
            client_disconnects: AtomicU64::new(0),
            aborts_dropped: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            retries_refused: AtomicU64::new(0),
            inband_aborts: AtomicU64::new(0),
            logprobs_unmerged: AtomicU64::new(0),
        }
    }
}

/// Adds one to a counter that orders nothing else.
pub(crate) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Metrics {
    /// Counts an answered request by the status its client saw.
    pub fn answered(&self, route: Route, status: StatusCode) {
        let slot = usize::from(status.as_u16())
            .saturating_sub(100)
            .min(STATUSES - 1);
        bump(&self.requests[route as usize][slot]);
    }

    /// Records the time a request spent in the router itself before its first byte went to the client.
    pub fn added_latency(&self, added: Duration) {
        let micros = u64::try_from(added.as_micros()).unwrap_or(u64::MAX);
        let bucket = ADDED_BUCKETS_MICROS.partition_point(|edge| *edge < micros);
        bump(&self.added[bucket]);
        let nanos = u64::try_from(added.as_nanos()).unwrap_or(u64::MAX);
        self.added_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self, pool: &Workers, gauges: &Gauges) -> String {
        let mut text = Text {
            out: String::with_capacity(4096),
            family: "",
        };
        text.family(
            "kvrouter_requests_total",
            "counter",
            "Answered requests by route and status.",
        );
        for (route, name) in ROUTES {
            for (slot, count) in self.requests[route as usize].iter().enumerate() {
                let (status, count) = (slot + 100, read(count));
                if count > 0 {
                    text.sample(&format!("{{route=\"{name}\",status=\"{status}\"}}"), count);
                }
            }
        }
        render_workers(&mut text, pool);
        for (name, help, value) in [
            (
                "kvrouter_live_requests",
                "Choices of generation requests in flight.",
                gauges.live,
            ),
            (
                "kvrouter_queued_requests",
                "Requests that wait for a place.",
                gauges.queued,
            ),
            (
                "kvrouter_requests_without_worker",
                "Requests that wait for a worker with room.",
                gauges.waiting_for_room,
            ),
            ("kvrouter_live_rooms", "Rooms in use.", gauges.rooms),
            (
                "kvrouter_bookings",
                "Requests that the scheduler counts on.",
                gauges.bookings.0,
            ),
            (
                "kvrouter_sibling_bookings",
                "Requests of other replicas that the scheduler counts on.",
                gauges.bookings.1,
            ),
        ] {
            text.gauge(name, help, value as u64);
        }
        self.render_plain(&mut text);
        self.render_added(&mut text);
        text.out
    }

    fn render_plain(&self, text: &mut Text) {
        for (name, help, counter) in [
            (
                "kvrouter_broken_streams_total",
                "Streams ended by an error.",
                &self.broken_streams,
            ),
            (
                "kvrouter_client_disconnects_total",
                "Clients gone early.",
                &self.client_disconnects,
            ),
            (
                "kvrouter_aborts_dropped_total",
                "Abort calls not sent.",
                &self.aborts_dropped,
            ),
            (
                "kvrouter_retries_total",
                "Second and later pairs given.",
                &self.retries,
            ),
            (
                "kvrouter_retries_refused_total",
                "Retries not made because too many were.",
                &self.retries_refused,
            ),
            (
                "kvrouter_inband_aborts_total",
                "Generations ended by an error event.",
                &self.inband_aborts,
            ),
            (
                "kvrouter_logprobs_unmerged_total",
                "Answers without the prompt's logprobs.",
                &self.logprobs_unmerged,
            ),
        ] {
            text.family(name, "counter", help);
            text.sample("", read(counter));
        }
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "seconds for people; 2^53 ns are 104 days"
    )]
    fn render_added(&self, text: &mut Text) {
        let name = "kvrouter_added_latency_seconds";
        text.family(
            name,
            "histogram",
            "Time spent in the router before the first byte.",
        );
        let mut total = 0;
        for (slot, count) in self.added.iter().enumerate() {
            total += read(count);
            let edge = ADDED_BUCKETS_MICROS
                .get(slot)
                .map_or("+Inf".to_owned(), |micros| {
                    (*micros as f64 / 1e6).to_string()
                });
            text.line(format_args!("{name}_bucket{{le=\"{edge}\"}} {total}"));
        }
        text.line(format_args!(
            "{name}_sum {}",
            read(&self.added_nanos) as f64 / 1e9
        ));
        text.line(format_args!("{name}_count {total}"));
    }
}

/// What is counted elsewhere, at the time of a scrape.
#[derive(Clone, Copy, Debug)]
pub struct Gauges {
    /// Choices of generation requests in flight.
    pub live: usize,
    /// Requests that wait for a place.
    pub queued: usize,
    /// Requests that wait for a worker with room.
    pub waiting_for_room: usize,
    /// Rooms in use.
    pub rooms: usize,
    /// The scheduler's bookings: this router's, its siblings'.
    pub bookings: (usize, usize),
}

fn render_workers(text: &mut Text, pool: &Workers) {
    text.family(
        "kvrouter_leg_failures_total",
        "counter",
        "Failures by the leg and worker to blame.",
    );
    for worker in pool.workers() {
        let (leg, url) = (worker.role(), worker.url());
        for (blame, reason) in Blame::ALL {
            let labels = format!("{{leg=\"{leg}\",worker=\"{url}\",reason=\"{reason}\"}}");
            text.sample(&labels, worker.failures(blame));
        }
    }
    type Series = (&'static str, &'static str, &'static str, fn(&Worker) -> u64);
    let series: [Series; 4] = [
        (
            "kvrouter_leg_successes_total",
            "counter",
            "Complete answers.",
            Worker::served,
        ),
        (
            "kvrouter_worker_ready",
            "gauge",
            "1 when the worker answered its last probes.",
            |worker| u64::from(worker.is_ready()),
        ),
        (
            "kvrouter_breaker_state",
            "gauge",
            "0 closed, 1 open, 2 waiting for a trial.",
            |worker| worker.breaker_state() as u64,
        ),
        (
            "kvrouter_worker_requests",
            "gauge",
            "Requests that the worker holds.",
            |worker| worker.live() as u64,
        ),
    ];
    for (name, kind, help, value) in series {
        text.family(name, kind, help);
        for worker in pool.workers() {
            let labels = format!("{{leg=\"{}\",worker=\"{}\"}}", worker.role(), worker.url());
            text.sample(&labels, value(worker));
        }
    }
}

/// The text so far, and the family that the next samples belong to.
struct Text {
    out: String,
    family: &'static str,
}

impl Text {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "{line}");
    }

    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.family = name;
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn sample(&mut self, labels: &str, value: u64) {
        let family = self.family;
        self.line(format_args!("{family}{labels} {value}"));
    }

    fn gauge(&mut self, name: &'static str, help: &str, value: u64) {
        self.family(name, "gauge", help);
        self.sample("", value);
    }
}
