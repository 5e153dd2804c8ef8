//! A picture as Prometheus text (exposition format 0.0.4).
//!
//! Metrics are named `kvtransfer_*` in base units (bytes, seconds). Labels are the peer, the rail and the path; rooms
//! are never labels, they are counted by role and state. The number of series is bounded by [`RAIL_SERIES_MAX`] and
//! [`ROOM_STATES_MAX`], whatever the engine does.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use super::snapshot::{REASON_OTHER, RailStat, RoomRole, Snapshot};

/// Renders a picture.
#[must_use]
pub fn render(picture: &Snapshot) -> String {
    let mut page = Page(String::new());
    page.head(
        "engine_info",
        "gauge",
        "The engine: instance id and start number.",
    );
    let epoch = picture.epoch.to_string();
    page.sample(
        "engine_info",
        &[("instance", &picture.instance), ("epoch", &epoch)],
        1,
    );
    page.head(
        "sample_timestamp_seconds",
        "gauge",
        "When these numbers were read, in seconds since 1970.",
    );
    page.sample("sample_timestamp_seconds", &[], seconds(picture.wall_ns));
    page.head(
        "failures_total",
        "counter",
        "Failures of the whole engine by reason.",
    );
    for (reason, count) in &picture.failures {
        page.sample("failures_total", &[("reason", reason)], count);
    }
    rooms(&mut page, picture);
    rails(&mut page, picture);
    page.0
}

/// Content type of [`render`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Rails with series of their own; the others are added up under peer and rail `"other"`.
pub const RAIL_SERIES_MAX: usize = 256;

/// Room states with series of their own; others are counted as `"other"`. The engine has fewer.
pub const ROOM_STATES_MAX: usize = 16;

/// Label values of what has no series of its own.
const OTHER: &str = REASON_OTHER;

/// How a number is read off a rail.
type Column = (
    &'static str,
    &'static str,
    &'static str,
    fn(&RailStat, u64) -> f64,
);

/// The numbers that can be added up over rails.
const SUMMABLE: [Column; 8] = [
    ("rail_queued_bytes", "gauge", "Bytes waiting.", |rail, _| {
        lossy(rail.bytes_queued)
    }),
    (
        "rail_in_flight_bytes",
        "gauge",
        "Bytes sent and not yet confirmed.",
        |rail, _| lossy(rail.bytes_in_flight),
    ),
    (
        "rail_queued_transfers",
        "gauge",
        "Transfers waiting.",
        |rail, _| lossy(rail.transfers_queued),
    ),
    (
        "rail_rate_bytes_per_second",
        "gauge",
        "Bytes per second while busy.",
        |rail, _| rail.rate_bytes_per_s,
    ),
    (
        "rail_transferred_bytes_total",
        "counter",
        "Bytes delivered.",
        |rail, _| lossy(rail.bytes_total),
    ),
    (
        "rail_batches_total",
        "counter",
        "Batches delivered.",
        |rail, _| lossy(rail.batches_total),
    ),
    (
        "rail_wire_operations_total",
        "counter",
        "Work requests posted to an RDMA device.",
        |rail, _| lossy(rail.wire_operations_total),
    ),
    (
        "rail_packed_batches_total",
        "counter",
        "Batches sent packed over RDMA.",
        |rail, _| lossy(rail.packed_batches_total),
    ),
];

/// The numbers that cannot.
const SINGULAR: [Column; 3] = [
    (
        "rail_oldest_queued_seconds",
        "gauge",
        "How long the oldest transfer has waited.",
        |rail, now| seconds(rail.oldest_age_ns(now)),
    ),
    (
        "rail_latency_p50_seconds",
        "gauge",
        "Median latency of recent transfers.",
        |rail, _| seconds(rail.p50_ns),
    ),
    (
        "rail_latency_p99_seconds",
        "gauge",
        "99th percentile latency of recent transfers.",
        |rail, _| seconds(rail.p99_ns),
    ),
];

fn rails(page: &mut Page, picture: &Snapshot) {
    let (shown, folded) = picture
        .rails
        .split_at(picture.rails.len().min(RAIL_SERIES_MAX));
    page.head(
        "rail_info",
        "gauge",
        "Where a rail leads, its path, and why better paths were refused.",
    );
    for rail in shown {
        let [peer, name, path] = labels(rail);
        let more = [
            ("peer_addr", rail.peer_addr.as_str()),
            ("reason", &rail.path_reason),
        ];
        page.sample("rail_info", &[peer, name, path, more[0], more[1]], 1);
    }
    page.head(
        "rails_folded",
        "gauge",
        "Rails without series of their own, counted under \"other\".",
    );
    page.sample("rails_folded", &[], folded.len());
    for (metric, kind, help, read) in SUMMABLE {
        page.head(metric, kind, help);
        for rail in shown {
            page.sample(metric, &labels(rail), read(rail, picture.monotonic_ns));
        }
        if !folded.is_empty() {
            let sum: f64 = folded
                .iter()
                .map(|rail| read(rail, picture.monotonic_ns))
                .sum();
            page.sample(
                metric,
                &[("peer", OTHER), ("rail", OTHER), ("path", OTHER)],
                sum,
            );
        }
    }
    for (metric, kind, help, read) in SINGULAR {
        page.head(metric, kind, help);
        for rail in shown {
            page.sample(metric, &labels(rail), read(rail, picture.monotonic_ns));
        }
    }
    page.head(
        "rail_failures_total",
        "counter",
        "Failures on a rail by reason.",
    );
    for rail in shown {
        let [peer, name, path] = labels(rail);
        for (reason, count) in &rail.failures {
            page.sample(
                "rail_failures_total",
                &[peer, name, path, ("reason", reason)],
                count,
            );
        }
    }
}

fn labels(rail: &RailStat) -> [(&'static str, &str); 3] {
    [
        ("peer", &rail.peer),
        ("rail", &rail.rail),
        ("path", &rail.path),
    ]
}

fn rooms(page: &mut Page, picture: &Snapshot) {
    let mut counts = BTreeMap::<(&str, &str), u64>::new();
    for room in &picture.rooms {
        let role = match room.role {
            RoomRole::Sender => "sender",
            RoomRole::Receiver => "receiver",
        };
        let known = counts.contains_key(&(role, room.state.as_str()));
        // Both roles keep a place for "other".
        let room_left = counts.len() < 2 * (ROOM_STATES_MAX - 1);
        let state = if known || room_left {
            room.state.as_str()
        } else {
            OTHER
        };
        *counts.entry((role, state)).or_default() += 1;
    }
    page.head("rooms", "gauge", "Rooms by role and state.");
    for ((role, state), count) in counts {
        page.sample("rooms", &[("role", role), ("state", state)], count);
    }
}

/// The text so far.
struct Page(String);

impl Page {
    fn head(&mut self, metric: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP kvtransfer_{metric} {help}"));
        self.line(format_args!("# TYPE kvtransfer_{metric} {kind}"));
    }

    fn sample(&mut self, metric: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str("kvtransfer_");
        self.0.push_str(metric);
        for (place, (name, text)) in labels.iter().enumerate() {
            self.0.push(if place == 0 { '{' } else { ',' });
            self.0.push_str(name);
            self.0.push_str("=\"");
            self.escaped(text);
            self.0.push('"');
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        self.line(format_args!(" {value}"));
    }

    /// The format escapes exactly these three characters in a label's value.
    fn escaped(&mut self, text: &str) {
        for character in text.chars() {
            match character {
                '\\' => self.0.push_str("\\\\"),
                '"' => self.0.push_str("\\\""),
                '\n' => self.0.push_str("\\n"),
                other => self.0.push(other),
            }
        }
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{text}").expect("invariant: writing to a String cannot fail");
    }
}

fn seconds(ns: u64) -> f64 {
    lossy(ns) / 1e9
}

/// Prometheus values are 64-bit floats.
#[expect(clippy::cast_precision_loss, reason = "the format has no other number")]
fn lossy(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests;
