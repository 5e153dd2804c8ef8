//! What is seen of one request: its spans, its line in the access log, and its times in the metrics.
//!
//! A [`Trail`] follows a client's request from its head to the last byte of the answer; an [`Attempt`] follows one pair that
//! it was given. The proxy tells them what happens, and nothing depends on what they do with it.
#![forbid(unsafe_code)]

mod attempt;
mod body;
pub mod context;
pub mod export;
pub mod otlp;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper::header::{HeaderName, HeaderValue};
use hyper::{HeaderMap, StatusCode};
use tokio::time::Instant;

use crate::metrics::{Metrics, Route};
use crate::proxy::Front;
use context::{SpanId, TRACEPARENT, TraceContext};
use export::SpanQueue;
use otlp::{KeyValue, STATUS_ERROR, Span, SpanKind, Status};

pub use attempt::{Attempt, LegEnd};
pub use body::WatchedBody;

/// Clients and proxies name their requests in this header.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A longer request id is cut: it is logged, and clients choose it.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// What makes spans.
#[derive(Clone, Debug)]
pub struct Tracer {
    /// Where they go.
    pub queue: SpanQueue,
    /// The share of requests that get some when their client did not decide.
    pub ratio: f64,
}

/// How it stands with the spans of a request.
#[derive(Debug)]
enum Tracing {
    /// Nothing is traced; headers pass as they are.
    Off,
    /// This request is not; workers are told so.
    Unsampled(TraceContext),
    /// This request is.
    Sampled {
        context: TraceContext,
        parent: Option<SpanId>,
        queue: SpanQueue,
    },
}

/// One request of a client.
#[derive(Debug)]
pub struct Trail {
    metrics: Arc<Metrics>,
    route: Route,
    began: Instant,
    logs_access: bool,
    tracing: Tracing,
    request_id: Option<HeaderValue>,
    facts: Mutex<Facts>,
}

/// What becomes known on the way. Of several pairs the last one counts.
#[derive(Debug, Default)]
struct Facts {
    is_over: bool,
    status: Option<StatusCode>,
    attempts: u32,
    prefill: Option<String>,
    decode: Option<String>,
    prefill_status: Option<u16>,
    decode_status: Option<u16>,
    room: Option<u64>,
    rid: Option<String>,
    first_byte: Option<Instant>,
    /// A leg failed after the answer had begun.
    is_cut: bool,
    bytes: u64,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The client got all of it.
    Complete,
    /// The router had to cut it off.
    Broken,
    /// The client did not wait for the end.
    ClientGone,
}

impl Outcome {
    const fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Broken => "broken",
            Self::ClientGone => "client_gone",
        }
    }
}

impl Trail {
    /// The trail of a request to `route` with these headers.
    pub fn begin(front: &Front, route: Route, headers: &HeaderMap) -> Arc<Self> {
        let is_own = route == Route::Own;
        let tracing = match &front.tracer {
            Some(tracer) if !is_own => Tracing::of(tracer, headers),
            _ => Tracing::Off,
        };
        let logs_access = !is_own && front.live.now().access_log;
        let request_id = headers.get(REQUEST_ID);
        let request_id =
            request_id.filter(|_| logs_access || matches!(tracing, Tracing::Sampled { .. }));
        Arc::new(Self {
            metrics: Arc::clone(&front.metrics),
            route,
            began: Instant::now(),
            logs_access,
            tracing,
            request_id: request_id.cloned(),
            facts: Mutex::default(),
        })
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody reads the facts.
    fn is_read(&self) -> bool {
        self.logs_access || matches!(self.tracing, Tracing::Sampled { .. })
    }

    /// The counters.
    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Notes the status that the client sees.
    pub fn answered(&self, status: StatusCode) {
        self.facts().status = Some(status);
    }

    /// Notes that the answer is over, after `bytes` of it. Only the first call counts.
    pub fn finish(&self, outcome: Outcome, bytes: u64) {
        let mut facts = self.facts();
        if std::mem::replace(&mut facts.is_over, true) {
            return;
        }
        facts.bytes = bytes;
        let outcome = if facts.is_cut {
            Outcome::Broken
        } else {
            outcome
        };
        self.metrics
            .finished(self.route, self.began.elapsed(), bytes);
        if self.logs_access {
            self.log(&facts, outcome);
        }
        if let Tracing::Sampled {
            context,
            parent,
            queue,
        } = &self.tracing
        {
            queue.push(self.span(&facts, outcome, *context, *parent, queue));
        }
    }

    fn trace_id(&self) -> Option<String> {
        match &self.tracing {
            Tracing::Sampled { context, .. } => {
                Some(format!("{:032x}", u128::from_be_bytes(context.trace)))
            }
            _ => None,
        }
    }

    fn request_id(&self) -> Option<String> {
        let bytes = self.request_id.as_ref()?.as_bytes();
        let bytes = &bytes[..bytes.len().min(REQUEST_ID_BYTES_MAX)];
        Some(String::from_utf8_lossy(bytes).into_owned())
    }

    fn log(&self, facts: &Facts, outcome: Outcome) {
        let millis = |until: Instant| {
            let time = until.saturating_duration_since(self.began);
            (time.as_secs_f64() * 1e6).round() / 1e3
        };
        tracing::info!(
            target: "kvrouter::access",
            request_id = self.request_id().or_else(|| facts.rid.clone()),
            route = self.route.name(),
            status = facts.status.map(|status| status.as_u16()),
            outcome = outcome.name(),
            prefill = facts.prefill,
            decode = facts.decode,
            prefill_status = facts.prefill_status,
            decode_status = facts.decode_status,
            attempts = facts.attempts,
            room = facts.room,
            rid = facts.rid,
            ttft_ms = facts.first_byte.map(millis),
            duration_ms = millis(Instant::now()),
            bytes = facts.bytes,
            trace_id = self.trace_id(),
            "request"
        );
    }

    fn span(
        &self,
        facts: &Facts,
        outcome: Outcome,
        context: TraceContext,
        parent: Option<SpanId>,
        queue: &SpanQueue,
    ) -> Span {
        let mut attributes = vec![
            KeyValue::new("http.route", self.route.name()),
            KeyValue::new("kvrouter.outcome", outcome.name()),
            KeyValue::new("kvrouter.attempts", i64::from(facts.attempts)),
            KeyValue::new(
                "http.response.body.size",
                i64::try_from(facts.bytes).unwrap_or(i64::MAX),
            ),
        ];
        attributes.extend(room_attributes(facts.room, facts.rid.as_deref()));
        let texts = [
            ("kvrouter.prefill", &facts.prefill),
            ("kvrouter.decode", &facts.decode),
            ("kvrouter.request_id", &self.request_id()),
        ];
        for (key, text) in texts {
            attributes.extend(text.as_deref().map(|text| KeyValue::new(key, text)));
        }
        if let Some(status) = facts.status {
            let status = i64::from(status.as_u16());
            attributes.push(KeyValue::new("http.response.status_code", status));
        }
        if let Some(first) = facts.first_byte {
            let ttft = first.saturating_duration_since(self.began).as_secs_f64();
            attributes.push(KeyValue::new("kvrouter.ttft_seconds", ttft));
        }
        let is_error = outcome == Outcome::Broken
            || facts.status.is_some_and(|status| status.is_server_error());
        Span {
            name: match self.route {
                Route::Pass | Route::Own | Route::Other => self.route.name().to_owned(),
                _ => format!("POST {}", self.route.name()),
            },
            kind: SpanKind::Server.into(),
            parent_span_id: parent.map(|span| span.0.to_vec()).unwrap_or_default(),
            attributes,
            status: is_error.then(|| Status {
                message: String::new(),
                code: STATUS_ERROR,
            }),
            ..bare_span(context, queue, self.began)
        }
    }
}

impl Drop for Trail {
    /// A request that was never answered: its client went away first.
    fn drop(&mut self) {
        self.finish(Outcome::ClientGone, 0);
    }
}

impl Tracing {
    /// A name for a span, if there will be one.
    fn next_span(&self) -> SpanId {
        match self {
            Self::Sampled { .. } => SpanId::random(),
            Self::Off | Self::Unsampled(_) => SpanId([0; 8]),
        }
    }

    fn of(tracer: &Tracer, headers: &HeaderMap) -> Self {
        let text = headers
            .get(TRACEPARENT)
            .and_then(|value| value.to_str().ok());
        let incoming = text.and_then(|text| TraceContext::parse(text.trim()));
        match incoming {
            // Passed on as it came: the sender is the last one who traced.
            Some(context) if !context.is_sampled => Self::Unsampled(context),
            Some(context) => Self::Sampled {
                context: context.with_span(SpanId::random()),
                parent: Some(context.span),
                queue: tracer.queue.clone(),
            },
            None => {
                let context = TraceContext::begin(tracer.ratio);
                if context.is_sampled {
                    Self::Sampled {
                        context,
                        parent: None,
                        queue: tracer.queue.clone(),
                    }
                } else {
                    Self::Unsampled(context)
                }
            }
        }
    }
}

/// A span of `context` from `began` to now, without a name.
fn bare_span(context: TraceContext, queue: &SpanQueue, began: Instant) -> Span {
    Span {
        trace_id: context.trace.to_vec(),
        span_id: context.span.0.to_vec(),
        start_time_unix_nano: queue.unix_nanos(began),
        end_time_unix_nano: queue.unix_nanos(Instant::now()),
        flags: u32::from(context.is_sampled),
        ..Span::default()
    }
}

fn room_attributes(room: Option<u64>, rid: Option<&str>) -> Vec<KeyValue> {
    // Rooms have 63 bits.
    let room = room.and_then(|room| i64::try_from(room).ok());
    let room = room.map(|room| KeyValue::new("kvrouter.room", room));
    let rid = rid.map(|rid| KeyValue::new("kvrouter.rid", rid));
    room.into_iter().chain(rid).collect()
}
