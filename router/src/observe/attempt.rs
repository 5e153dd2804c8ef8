//! One pair that a request was given.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use tokio::time::Instant;

use super::context::{SpanId, TRACEPARENT};
use super::otlp::{Event, KeyValue, Link, STATUS_ERROR, Span, SpanKind, Status};
use super::{Tracing, Trail, bare_span, room_attributes};
use crate::metrics::bump;
use crate::metrics::pairs::PairCounts;
use crate::pool::{Blame, Role, Worker};
use crate::proxy::leg::{LegCause, LegFailure};

/// How a leg ended.
#[derive(Debug)]
pub enum LegEnd<'a> {
    /// With a complete answer.
    Complete,
    /// By its own fault.
    Failed(&'a LegFailure),
    /// Because nobody wanted it any more.
    Cancelled,
}

#[derive(Debug)]
struct Leg {
    worker: Arc<Worker>,
    span: SpanId,
    is_over: AtomicBool,
}

impl Leg {
    fn new(worker: &Arc<Worker>, span: SpanId) -> Self {
        Self {
            worker: Arc::clone(worker),
            span,
            is_over: AtomicBool::new(false),
        }
    }
}

/// See the module. Dropping it ends the legs that are still open.
#[derive(Debug)]
pub struct Attempt {
    trail: Arc<Trail>,
    counts: Arc<PairCounts>,
    number: u32,
    began: Instant,
    prefill: Leg,
    decode: Leg,
    room: Option<u64>,
    rid: Option<String>,
    first_byte: Mutex<Option<Instant>>,
    is_failed: AtomicBool,
}

impl Trail {
    /// Notes that the request goes to a pair, under these rooms and ids (raw JSON values), of which the first stand for
    /// all of a batch.
    pub fn attempt(
        self: &Arc<Self>,
        prefill: &Arc<Worker>,
        decode: &Arc<Worker>,
        rooms: &[u64],
        rids: &[String],
    ) -> Arc<Attempt> {
        let counts = self.metrics.pairs.of(prefill, decode);
        bump(&counts.requests);
        let (mut room, mut rid, mut number) = (None, None, 0);
        if self.is_read() {
            room = rooms.first().copied();
            rid = rids.first().map(|rid| rid.trim_matches('"').to_owned());
            let mut facts = self.facts();
            facts.attempts += 1;
            number = facts.attempts;
            facts.prefill = Some(prefill.url().to_string());
            facts.decode = Some(decode.url().to_string());
            (facts.prefill_status, facts.decode_status) = (None, None);
            (facts.room, facts.rid) = (room, rid.clone());
        }
        Arc::new(Attempt {
            trail: Arc::clone(self),
            counts,
            number,
            began: Instant::now(),
            prefill: Leg::new(prefill, self.tracing.next_span()),
            decode: Leg::new(decode, self.tracing.next_span()),
            room,
            rid,
            first_byte: Mutex::default(),
            is_failed: AtomicBool::new(false),
        })
    }
}

impl Attempt {
    fn leg(&self, role: Role) -> &Leg {
        match role {
            Role::Prefill => &self.prefill,
            Role::Decode | Role::Other => &self.decode,
        }
    }

    /// Writes into the headers of a leg's request which span it belongs to.
    pub fn mark(&self, role: Role, headers: &mut HeaderMap) {
        let context = match &self.trail.tracing {
            Tracing::Off => return,
            Tracing::Unsampled(context) => *context,
            Tracing::Sampled { context, .. } => context.with_span(self.leg(role).span),
        };
        if let Ok(value) = HeaderValue::try_from(context.to_string()) {
            headers.insert(HeaderName::from_static(TRACEPARENT), value);
        }
    }

    /// Notes the status of a leg's answer.
    pub fn status(&self, role: Role, status: u16) {
        if !self.trail.is_read() {
            return;
        }
        let mut facts = self.trail.facts();
        match role {
            Role::Prefill => facts.prefill_status = Some(status),
            Role::Decode | Role::Other => facts.decode_status = Some(status),
        }
    }

    /// Notes that decode's answer has begun; `is_stream` says that its first bytes are the first token.
    pub fn first_byte(&self, is_stream: bool) {
        let (now, metrics) = (Instant::now(), self.trail.metrics());
        metrics.decode_first_byte.observe(now - self.began);
        if is_stream {
            metrics.ttft.observe(now - self.trail.began);
        }
        if self.trail.is_read() {
            let mut first = self
                .first_byte
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *first = Some(now);
            self.trail.facts().first_byte.get_or_insert(now);
        }
    }

    /// Notes the end of a leg. Only the first call counts.
    pub fn ended(&self, role: Role, end: &LegEnd<'_>) {
        let leg = self.leg(role);
        if leg.is_over.swap(true, Ordering::Relaxed) {
            return;
        }
        let metrics = self.trail.metrics();
        match end {
            LegEnd::Complete => {
                let times = match role {
                    Role::Prefill => &metrics.prefill_leg,
                    Role::Decode | Role::Other => &metrics.decode_leg,
                };
                times.observe(self.began.elapsed());
            }
            LegEnd::Failed(failure) => {
                if let LegCause::Status(error) = &failure.cause {
                    self.status(role, error.status.as_u16());
                }
                let first = self
                    .first_byte
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if first.is_some() {
                    self.trail.facts().is_cut = true;
                }
                drop(first);
                if !self.is_failed.swap(true, Ordering::Relaxed) {
                    bump(&self.counts.failures);
                }
            }
            LegEnd::Cancelled => {}
        }
        self.export(role, end);
    }

    fn export(&self, role: Role, end: &LegEnd<'_>) {
        let Tracing::Sampled { context, queue, .. } = &self.trail.tracing else {
            return;
        };
        let (leg, other) = match role {
            Role::Prefill => (&self.prefill, &self.decode),
            Role::Decode | Role::Other => (&self.decode, &self.prefill),
        };
        let url = leg.worker.url();
        let mut attributes = vec![
            KeyValue::new("kvrouter.leg", role.name()),
            KeyValue::new("kvrouter.worker", url.to_string()),
            KeyValue::new("server.address", url.host()),
            KeyValue::new("kvrouter.attempt", i64::from(self.number)),
        ];
        let port = url.authority().port_u16();
        attributes.extend(port.map(|port| KeyValue::new("server.port", i64::from(port))));
        attributes.extend(room_attributes(self.room, self.rid.as_deref()));
        let facts = self.trail.facts();
        let status = match role {
            Role::Prefill => facts.prefill_status,
            Role::Decode | Role::Other => facts.decode_status,
        };
        drop(facts);
        let status_code =
            status.map(|status| KeyValue::new("http.response.status_code", i64::from(status)));
        attributes.extend(status_code);
        let mut events = Vec::new();
        let first = *self
            .first_byte
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = first.filter(|_| role == Role::Decode) {
            events.push(Event {
                time_unix_nano: queue.unix_nanos(first),
                name: "first byte".to_owned(),
            });
        }
        let status = match end {
            LegEnd::Complete => None,
            LegEnd::Failed(failure) => {
                let blame = failure.cause.blame();
                let reason = Blame::ALL.iter().find(|(known, _)| *known == blame);
                attributes.extend(reason.map(|(_, name)| KeyValue::new("error.type", *name)));
                Some(Status {
                    message: failure.to_string(),
                    code: STATUS_ERROR,
                })
            }
            LegEnd::Cancelled => {
                attributes.push(KeyValue::new("kvrouter.cancelled", "true"));
                None
            }
        };
        queue.push(Span {
            name: role.name().to_owned(),
            kind: SpanKind::Client.into(),
            parent_span_id: context.span.0.to_vec(),
            attributes,
            events,
            // The legs wait for each other, which no parent tells.
            links: vec![Link {
                trace_id: context.trace.to_vec(),
                span_id: other.span.0.to_vec(),
                attributes: vec![KeyValue::new("kvrouter.leg", other.worker.role().name())],
            }],
            status,
            ..bare_span(context.with_span(leg.span), queue, self.began)
        });
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.ended(Role::Prefill, &LegEnd::Cancelled);
        self.ended(Role::Decode, &LegEnd::Cancelled);
    }
}
