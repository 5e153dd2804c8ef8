//! Counters of the picker and their Prometheus text.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::StatusCode;

use super::exchange::Closing;
use crate::metrics::bump;

/// What became of a request that was complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A pair serves it.
    Pair,
    /// One worker serves it.
    Worker,
    /// The router's own front serves it.
    Front,
    /// The picker answered.
    Own,
    /// It was refused.
    Refused,
}

const OUTCOMES: [(Outcome, &str); 5] = [
    (Outcome::Pair, "pair"),
    (Outcome::Worker, "worker"),
    (Outcome::Front, "front"),
    (Outcome::Own, "own"),
    (Outcome::Refused, "refused"),
];

const CLOSINGS: [(Closing, &str); 4] = [
    (Closing::Early, "undecided"),
    (Closing::Over, "complete"),
    (Closing::CutOff, "cut_off"),
    (Closing::Unseen, "unseen"),
];

/// Status codes of immediate answers: 100 to 599.
const STATUSES: usize = 500;

/// Upper edges of the buckets of decision times, in microseconds.
const DECISION_BUCKETS_MICROS: [u64; 9] = [
    50, 100, 200, 500, 1_000, 10_000, 100_000, 1_000_000, 10_000_000,
];

/// See the module.
#[derive(Debug)]
pub struct Counters {
    /// Streams begun.
    pub streams: AtomicU64,
    /// Streams ended.
    pub ended: AtomicU64,
    /// Streams that were no ext_proc.
    pub violations: AtomicU64,
    /// Bytes of request bodies that came.
    pub body_bytes: AtomicU64,
    decisions: [AtomicU64; OUTCOMES.len()],
    closings: [AtomicU64; CLOSINGS.len()],
    immediate: Vec<AtomicU64>,
    decided: [AtomicU64; DECISION_BUCKETS_MICROS.len() + 1],
    decided_nanos: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            streams: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            violations: AtomicU64::new(0),
            body_bytes: AtomicU64::new(0),
            decisions: [const { AtomicU64::new(0) }; OUTCOMES.len()],
            closings: [const { AtomicU64::new(0) }; CLOSINGS.len()],
            immediate: (0..STATUSES).map(|_| AtomicU64::new(0)).collect(),
            decided: [const { AtomicU64::new(0) }; DECISION_BUCKETS_MICROS.len() + 1],
            decided_nanos: AtomicU64::new(0),
        }
    }
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Counters {
    /// Counts a decision and the time from the whole request to it, waiting included.
    pub fn decided(&self, outcome: Outcome, took: Duration) {
        bump(&self.decisions[outcome as usize]);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        bump(&self.decided[DECISION_BUCKETS_MICROS.partition_point(|edge| *edge < micros)]);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.decided_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Counts an answer given in the place of a worker's.
    pub fn immediate(&self, status: StatusCode) {
        let slot = usize::from(status.as_u16()).saturating_sub(100);
        bump(&self.immediate[slot.min(STATUSES - 1)]);
    }

    /// Counts how a stream ended.
    pub fn closed(&self, closing: Closing) {
        bump(&self.ended);
        bump(&self.closings[closing as usize]);
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self, out: &mut String) {
        let streams = read(&self.streams);
        let open = streams.saturating_sub(read(&self.ended));
        for (name, kind, help, value) in [
            (
                "kvrouter_epp_streams_total",
                "counter",
                "Requests that Envoy brought.",
                streams,
            ),
            (
                "kvrouter_epp_open_streams",
                "gauge",
                "Requests that Envoy has under way.",
                open,
            ),
            (
                "kvrouter_epp_violations_total",
                "counter",
                "Streams ended because they broke the protocol.",
                read(&self.violations),
            ),
            (
                "kvrouter_epp_request_body_bytes_total",
                "counter",
                "Bytes of request bodies that came.",
                read(&self.body_bytes),
            ),
        ] {
            family(out, name, kind, help);
            line(out, format_args!("{name} {value}"));
        }
        let name = "kvrouter_epp_decisions_total";
        family(
            out,
            name,
            "counter",
            "Decisions by what became of the request.",
        );
        for (outcome, label) in OUTCOMES {
            let count = read(&self.decisions[outcome as usize]);
            line(out, format_args!("{name}{{outcome=\"{label}\"}} {count}"));
        }
        let name = "kvrouter_epp_closed_streams_total";
        family(
            out,
            name,
            "counter",
            "Ended streams by how their answers stood.",
        );
        for (closing, label) in CLOSINGS {
            let count = read(&self.closings[closing as usize]);
            line(out, format_args!("{name}{{answer=\"{label}\"}} {count}"));
        }
        let name = "kvrouter_epp_immediate_responses_total";
        family(
            out,
            name,
            "counter",
            "Answers of the picker's own by status.",
        );
        for (slot, count) in self.immediate.iter().enumerate() {
            let (status, count) = (slot + 100, read(count));
            if count > 0 {
                line(out, format_args!("{name}{{status=\"{status}\"}} {count}"));
            }
        }
        self.render_decided(out);
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "seconds for people; 2^53 ns are 104 days"
    )]
    fn render_decided(&self, out: &mut String) {
        let name = "kvrouter_epp_decision_seconds";
        family(
            out,
            name,
            "histogram",
            "From the whole request to the decision, waiting included.",
        );
        let mut total = 0;
        for (slot, count) in self.decided.iter().enumerate() {
            total += read(count);
            let edge = DECISION_BUCKETS_MICROS
                .get(slot)
                .map_or("+Inf".to_owned(), |micros| {
                    (*micros as f64 / 1e6).to_string()
                });
            line(out, format_args!("{name}_bucket{{le=\"{edge}\"}} {total}"));
        }
        let sum = read(&self.decided_nanos) as f64 / 1e9;
        line(out, format_args!("{name}_sum {sum}"));
        line(out, format_args!("{name}_count {total}"));
    }
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    line(
        out,
        format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"),
    );
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{text}");
}
