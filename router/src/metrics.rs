//! Counters of the router and their Prometheus text.
#![forbid(unsafe_code)]

mod fleet;
pub mod histogram;
pub mod pairs;
pub mod text;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::StatusCode;

use crate::overview::Overview;
use crate::pool::Workers;
use histogram::{ERROR_EDGES, Histogram, OWN_EDGES, TIME_EDGES};
use pairs::Pairs;
use text::{Kind, Labels, Text};

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
    /// What the router answers by itself: `/health`, `/ready`, `/metrics`, `/ui`, `/debug/…`.
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

impl Route {
    /// Its label.
    pub fn name(self) -> &'static str {
        ROUTES[self as usize].1
    }
}

/// Status codes are 100..=999 in the `http` crate; everything from 600 up shares the last counter.
const STATUSES: usize = 501;

/// The router's own counters; failures of workers are counted with the worker.
#[derive(Debug)]
pub struct Metrics {
    requests: Vec<[AtomicU64; STATUSES]>,
    durations: Vec<Histogram>,
    response_bytes: Vec<AtomicU64>,
    added: Histogram,
    /// From the whole request read to the first byte of an event stream.
    pub ttft: Histogram,
    /// From a dispatch to the end of prefill's answer.
    pub prefill_leg: Histogram,
    /// From a dispatch to the first byte of decode's answer.
    pub decode_first_byte: Histogram,
    /// From a dispatch to the last byte of decode's answer.
    pub decode_leg: Histogram,
    /// In the queue for a place.
    pub queue_wait: Histogram,
    /// Actual minus predicted time to the first token.
    pub ttft_error: Histogram,
    /// What was predicted, by part, in nanoseconds.
    predicted_nanos: [AtomicU64; PARTS.len()],
    predictions: AtomicU64,
    /// Requests by pair.
    pub pairs: Pairs,
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
    /// Spans that a collector took.
    pub spans_exported: AtomicU64,
    /// Spans that no collector took.
    pub spans_dropped: AtomicU64,
    /// Reloads that changed settings.
    pub reloads_applied: AtomicU64,
    /// Reloads whose settings could not be used.
    pub reloads_rejected: AtomicU64,
    /// 1 when the last reload could be used.
    pub reload_is_good: AtomicU64,
}

/// The parts of a predicted time to the first token.
const PARTS: [&str; 5] = ["wait", "compute", "wire_wait", "transfer", "admission"];

impl Default for Metrics {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            requests: ROUTES
                .iter()
                .map(|_| [const { AtomicU64::new(0) }; STATUSES])
                .collect(),
            durations: ROUTES.iter().map(|_| Histogram::new(&TIME_EDGES)).collect(),
            response_bytes: ROUTES.iter().map(|_| zero()).collect(),
            added: Histogram::new(&OWN_EDGES),
            ttft: Histogram::new(&TIME_EDGES),
            prefill_leg: Histogram::new(&TIME_EDGES),
            decode_first_byte: Histogram::new(&TIME_EDGES),
            decode_leg: Histogram::new(&TIME_EDGES),
            queue_wait: Histogram::new(&TIME_EDGES),
            ttft_error: Histogram::new(&ERROR_EDGES),
            predicted_nanos: [const { AtomicU64::new(0) }; PARTS.len()],
            predictions: zero(),
            pairs: Pairs::default(),
            broken_streams: zero(),
            client_disconnects: zero(),
            aborts_dropped: zero(),
            retries: zero(),
            retries_refused: zero(),
            inband_aborts: zero(),
            logprobs_unmerged: zero(),
            spans_exported: zero(),
            spans_dropped: zero(),
            reloads_applied: zero(),
            reloads_rejected: zero(),
            reload_is_good: AtomicU64::new(1),
        }
    }
}

/// Adds one to a counter that orders nothing else.
pub(crate) fn bump(counter: &AtomicU64) {
    add(counter, 1);
}

/// Adds to a counter that orders nothing else.
pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "seconds for people; 2^53 ns are 104 days"
)]
fn seconds(nanos: &AtomicU64) -> f64 {
    read(nanos) as f64 / 1e9
}

impl Metrics {
    /// Counts an answered request by the status its client saw.
    pub fn answered(&self, route: Route, status: StatusCode) {
        let slot = usize::from(status.as_u16())
            .saturating_sub(100)
            .min(STATUSES - 1);
        bump(&self.requests[route as usize][slot]);
    }

    /// Records how long a request took, from its head to the last byte of its answer, and how long that answer was.
    pub fn finished(&self, route: Route, took: Duration, bytes: u64) {
        self.durations[route as usize].observe(took);
        add(&self.response_bytes[route as usize], bytes);
    }

    /// Records the time a request spent in the router itself before its first byte went to the client.
    pub fn added_latency(&self, took: Duration) {
        self.added.observe(took);
    }

    /// Records what was predicted of a request whose first token has come, and how long that really took.
    pub fn predicted(&self, parts: [f64; PARTS.len()], actual: Duration) {
        for (sum, part) in self.predicted_nanos.iter().zip(parts) {
            let part = Duration::try_from_secs_f64(part).unwrap_or_default();
            add(sum, u64::try_from(part.as_nanos()).unwrap_or(u64::MAX));
        }
        bump(&self.predictions);
        let predicted: f64 = parts.iter().sum();
        self.ttft_error
            .observe_seconds(actual.as_secs_f64() - predicted);
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self, workers: &Workers, overview: &Overview) -> String {
        let mut text = Text::new();
        let version = Labels::default()
            .with("version", overview.version)
            .with("policy", overview.policy);
        let name = "kvrouter_build_info";
        text.family(name, Kind::Gauge, "Always 1; the labels tell what runs.");
        text.sample(&version, 1);
        self.render_requests(&mut text);
        fleet::render(&mut text, workers, overview);
        self.pairs.render(&mut text, workers);
        self.render_plain(&mut text);
        self.render_settings(&mut text);
        self.render_predictions(&mut text);
        self.render_times(&mut text);
        text.finish()
    }

    fn render_requests(&self, text: &mut Text) {
        let routes = || {
            ROUTES
                .iter()
                .map(|(route, name)| (*route, Labels::default().with("route", name)))
        };
        let name = "kvrouter_requests_total";
        text.family(
            name,
            Kind::Counter,
            "Answered requests by route and status.",
        );
        for (route, labels) in routes() {
            for (slot, count) in self.requests[route as usize].iter().enumerate() {
                let (status, count) = ((slot + 100).to_string(), read(count));
                if count > 0 {
                    text.sample(&labels.clone().with("status", &status), count);
                }
            }
        }
        let name = "kvrouter_response_bytes_total";
        text.family(name, Kind::Counter, "Bytes of answers sent to clients.");
        for (route, labels) in routes() {
            text.sample(&labels, read(&self.response_bytes[route as usize]));
        }
        text.family(
            "kvrouter_request_duration_seconds",
            Kind::Histogram,
            "From a request's head to the last byte of its answer.",
        );
        for (route, labels) in routes() {
            let durations = &self.durations[route as usize];
            // Twenty series each: only for routes in use.
            if durations.counts().iter().any(|count| *count > 0) {
                durations.render_samples(text, &labels);
            }
        }
    }

    fn render_plain(&self, text: &mut Text) {
        let counters: [(&'static str, &str, &AtomicU64); 10] = [
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
            (
                "kvrouter_spans_exported_total",
                "Spans that the collector took.",
                &self.spans_exported,
            ),
            (
                "kvrouter_spans_dropped_total",
                "Spans lost: the queue was full or the collector failed.",
                &self.spans_dropped,
            ),
            (
                "kvrouter_predictions_total",
                "First tokens whose time had been predicted.",
                &self.predictions,
            ),
        ];
        for (name, help, counter) in counters {
            text.single(name, Kind::Counter, help, read(counter));
        }
    }

    fn render_settings(&self, text: &mut Text) {
        let name = "kvrouter_config_reloads_total";
        text.family(name, Kind::Counter, "Reloads by what became of them.");
        for (result, counter) in [
            ("applied", &self.reloads_applied),
            ("rejected", &self.reloads_rejected),
        ] {
            text.sample(&Labels::default().with("result", result), read(counter));
        }
        text.single(
            "kvrouter_config_reload_success",
            Kind::Gauge,
            "1 when the last reload could be used, 0 when the old settings had to stay.",
            read(&self.reload_is_good),
        );
    }

    fn render_predictions(&self, text: &mut Text) {
        let name = "kvrouter_ttft_predicted_seconds_total";
        let help = "Predicted times to the first token, summed by part; divide by kvrouter_predictions_total.";
        text.family(name, Kind::Counter, help);
        for (part, nanos) in PARTS.iter().zip(&self.predicted_nanos) {
            text.sample(&Labels::default().with("part", part), seconds(nanos));
        }
    }

    fn render_times(&self, text: &mut Text) {
        let histograms: [(&'static str, &str, &Histogram); 7] = [
            (
                "kvrouter_added_latency_seconds",
                "Time spent in the router before the first byte.",
                &self.added,
            ),
            (
                "kvrouter_ttft_seconds",
                "From a request's head to the first token of a streamed answer.",
                &self.ttft,
            ),
            (
                "kvrouter_queue_wait_seconds",
                "Time requests waited for a place before they were sent.",
                &self.queue_wait,
            ),
            (
                "kvrouter_prefill_leg_seconds",
                "From the dispatch to the end of prefill's answer.",
                &self.prefill_leg,
            ),
            (
                "kvrouter_decode_first_byte_seconds",
                "From the dispatch to the first byte of decode's answer.",
                &self.decode_first_byte,
            ),
            (
                "kvrouter_decode_leg_seconds",
                "From the dispatch to the last byte of decode's answer.",
                &self.decode_leg,
            ),
            (
                "kvrouter_ttft_prediction_error_seconds",
                "Actual minus predicted time to the first token; below 0 it came earlier.",
                &self.ttft_error,
            ),
        ];
        for (name, help, histogram) in histograms {
            histogram.render(text, name, help);
        }
    }
}
