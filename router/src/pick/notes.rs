//! Why each request went where it went, and what came of it: a bounded ring for `/debug/decisions` and response headers.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use serde_json::{Value, json};

use crate::pool::Worker;
use crate::schedule::Decision;

/// Decisions that are remembered; about 1 MiB.
pub const NOTES_MAX: usize = 1024;

/// Decisions that are shown if not told otherwise.
pub const SHOWN_DEFAULT: usize = 100;

/// What all response headers of a decision begin with.
pub const PREFIX: &str = "x-kvrouter-";

/// A pair that was not taken: prefill, decode, predicted time to the first token, cost; in seconds.
pub type Other = (Arc<Worker>, Arc<Worker>, f64, f64);

/// A decision.
#[derive(Debug)]
pub struct Note {
    /// Its number on this router.
    pub number: u64,
    /// When it was made, on the scheduler's clock.
    pub at: Duration,
    /// The prefill worker.
    pub prefill: Arc<Worker>,
    /// The decode worker.
    pub decode: Arc<Worker>,
    /// The reasons.
    pub decision: Decision,
    /// What else was looked at, the best first.
    pub others: Vec<Other>,
    /// Tokens of the prompt, counted or guessed.
    pub prompt_tokens: u64,
    /// Workers that had failed the request before.
    pub excluded: usize,
    actual: Mutex<Actual>,
}

/// What came of it, in time since the decision. Each is told once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// The KV cache was computed; only telemetry knows.
    pub ready: Option<Duration>,
    /// Its last byte had arrived.
    pub sent: Option<Duration>,
    /// Decode's first byte came.
    pub first_byte: Option<Duration>,
    /// It was over.
    pub ended: Option<Duration>,
    /// How.
    pub outcome: Option<&'static str>,
}

impl Note {
    /// The note of a decision just made.
    pub(super) fn new(
        number: u64,
        at: Duration,
        pair: (Arc<Worker>, Arc<Worker>),
        decision: Decision,
    ) -> Self {
        Self {
            number,
            at,
            prefill: pair.0,
            decode: pair.1,
            decision,
            others: Vec::new(),
            prompt_tokens: 0,
            excluded: 0,
            actual: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Actual> {
        self.actual.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What came of it so far.
    pub fn actual(&self) -> Actual {
        *self.lock()
    }

    /// Writes down what happened at `at` on the scheduler's clock, unless that was told before.
    pub(super) fn write(&self, at: Duration, slot: fn(&mut Actual) -> &mut Option<Duration>) {
        let mut actual = self.lock();
        slot(&mut actual).get_or_insert(at.saturating_sub(self.at));
    }

    pub(super) fn end(&self, at: Duration, outcome: &'static str) {
        let mut actual = self.lock();
        if actual.ended.is_none() {
            actual.ended = Some(at.saturating_sub(self.at));
            actual.outcome = Some(outcome);
        }
    }

    /// The decision in response headers, with what is known when the answer begins.
    pub fn put_headers(&self, headers: &mut HeaderMap) {
        let mut put = |name: &str, value: String| {
            let name = HeaderName::try_from(format!("{PREFIX}{name}"));
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        };
        let (decision, actual) = (&self.decision, self.actual());
        let parts = &decision.prediction;
        put("decision", self.number.to_string());
        put("prefill", self.prefill.name().to_owned());
        put("decode", self.decode.name().to_owned());
        put("policy", decision.policy.name().to_owned());
        for (name, seconds) in [
            ("predicted-ttft-ms", parts.ttft_s()),
            ("predicted-wait-ms", parts.wait_s),
            ("predicted-compute-ms", parts.compute_s),
            ("predicted-wire-wait-ms", parts.wire_wait_s),
            ("predicted-transfer-ms", parts.transfer_s),
            ("predicted-admission-ms", parts.admission_s),
        ] {
            put(name, milliseconds(seconds));
        }
        for (name, time) in [
            ("sample-age-ms", decision.sample_age),
            ("actual-ready-ms", actual.ready),
            ("actual-sent-ms", actual.sent),
            ("actual-ttft-ms", actual.first_byte),
        ] {
            if let Some(time) = time {
                put(name, milliseconds(time.as_secs_f64()));
            }
        }
    }

    /// The decision for people and programs, at `now` on the scheduler's clock.
    pub fn json(&self, now: Duration) -> Value {
        let (decision, actual) = (&self.decision, self.actual());
        let parts = &decision.prediction;
        let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
        let others: Vec<_> = self
            .others
            .iter()
            .map(|(prefill, decode, ttft_s, cost_s)| {
                json!({"prefill": prefill.name(), "decode": decode.name(), "ttft_s": ttft_s, "cost_s": cost_s})
            })
            .collect();
        json!({
            "decision": self.number,
            "age_s": now.saturating_sub(self.at).as_secs_f64(),
            "policy": decision.policy.name(),
            "prefill": self.prefill.name(),
            "decode": self.decode.name(),
            "dp_rank": decision.dp_rank,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": decision.cached_tokens,
            "kv_bytes": decision.kv_bytes(),
            "sticky": decision.sticky,
            "candidates": decision.candidates,
            "excluded": self.excluded,
            "sample_age_s": seconds(decision.sample_age),
            "cost_s": decision.cost_s,
            "predicted": {
                "wait_s": parts.wait_s,
                "compute_s": parts.compute_s,
                "wire_wait_s": parts.wire_wait_s,
                "transfer_s": parts.transfer_s,
                "admission_s": parts.admission_s,
                "ttft_s": parts.ttft_s(),
            },
            "actual": {
                "ready_s": seconds(actual.ready),
                "sent_s": seconds(actual.sent),
                "ttft_s": seconds(actual.first_byte),
                "ended_s": seconds(actual.ended),
                "outcome": actual.outcome,
            },
            "alternatives": others,
        })
    }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.3}", seconds * 1e3)
}

/// The latest decisions.
#[derive(Debug, Default)]
pub(super) struct Ring {
    notes: VecDeque<Arc<Note>>,
}

impl Ring {
    pub(super) fn push(&mut self, note: Arc<Note>) {
        if self.notes.len() == NOTES_MAX {
            self.notes.pop_front();
        }
        self.notes.push_back(note);
    }

    /// The last `count`, the latest first.
    pub(super) fn last(&self, count: usize) -> Vec<Arc<Note>> {
        self.notes.iter().rev().take(count).cloned().collect()
    }
}
