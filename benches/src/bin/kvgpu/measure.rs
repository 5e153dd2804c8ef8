//! Times on the device, and the table of results.

use std::{fmt::Write as _, sync::Arc};

use anyhow::Result;
use kvtransfer::gpu::{Context, Event, EventKind, GpuError, Stream};
use serde::{Deserialize, Serialize};

/// Times of one thing are medians of so many runs after a first that is not counted.
pub(crate) const RUNS: usize = 5;

/// Median time on the device, in seconds.
pub(crate) fn seconds(
    context: &Arc<Context>,
    stream: &Stream,
    runs: usize,
    mut work: impl FnMut() -> Result<(), GpuError>,
) -> Result<f64> {
    let mut times = Vec::with_capacity(runs);
    for run in 0..=runs {
        let (before, after) = (
            Event::new(context, EventKind::Timing)?,
            Event::new(context, EventKind::Timing)?,
        );
        stream.record(&before)?;
        work()?;
        stream.record(&after)?;
        after.synchronize()?;
        if run > 0 {
            times.push(f64::from(after.milliseconds_since(&before)?) / 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Gigabytes per second, counting each byte once.
#[expect(
    clippy::cast_precision_loss,
    reason = "rates are shown with three digits"
)]
pub(crate) fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / seconds / 1e9
}

/// A row of results.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    /// What was done.
    pub(crate) what: String,
    /// GB/s, milliseconds, or whatever `unit` says; absent for a fact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<f64>,
    /// Of the value.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) unit: String,
    /// The value over the plain copy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<f64>,
    /// Whether the bytes were right, where they were looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) verified: Option<bool>,
    /// In words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) note: String,
}

/// Rows of results.
#[derive(Debug, Default)]
pub(crate) struct Table(Vec<Row>);

impl Table {
    /// A fact in words.
    pub(crate) fn fact(&mut self, what: impl Into<String>, note: impl Into<String>) {
        self.0.push(Row {
            what: what.into(),
            value: None,
            unit: String::new(),
            ratio: None,
            verified: None,
            note: note.into(),
        });
    }

    /// A check.
    pub(crate) fn check(
        &mut self,
        what: impl Into<String>,
        is_right: bool,
        note: impl Into<String>,
    ) {
        self.fact(what, note);
        if let Some(row) = self.0.last_mut() {
            row.verified = Some(is_right);
        }
    }

    /// A rate, and its ratio to the plain copy's.
    pub(crate) fn rate(&mut self, what: impl Into<String>, value: f64, plain: Option<f64>) {
        self.0.push(Row {
            what: what.into(),
            value: Some(value),
            unit: "GB/s".to_owned(),
            ratio: plain.map(|plain| value / plain),
            verified: None,
            note: String::new(),
        });
    }

    /// A number with its unit.
    pub(crate) fn number(&mut self, what: impl Into<String>, value: f64, unit: &str) {
        self.rate(what, value, None);
        if let Some(row) = self.0.last_mut() {
            row.unit = unit.to_owned();
        }
    }

    /// Says something about the last row in words.
    pub(crate) fn note(&mut self, words: String) {
        if let Some(row) = self.0.last_mut() {
            row.note = words;
        }
    }

    /// A row of another process.
    pub(crate) fn push(&mut self, row: Row) {
        self.0.push(row);
    }

    /// Says of the last row whether its bytes were right.
    pub(crate) fn mark(&mut self, is_right: bool) {
        if let Some(row) = self.0.last_mut() {
            row.verified = Some(is_right);
        }
    }

    /// Whether no check failed.
    pub(crate) fn is_right(&self) -> bool {
        self.0.iter().all(|row| row.verified != Some(false))
    }

    /// As text or as JSON lines.
    pub(crate) fn shown(&self, as_json: bool) -> String {
        let mut text = String::new();
        for row in &self.0 {
            if as_json {
                let line = serde_json::to_string(row).unwrap_or_default();
                let _ = writeln!(text, "{line}");
                continue;
            }
            let number = row
                .value
                .map_or(String::new(), |value| format!("{value:.2}"));
            let ratio = row
                .ratio
                .map_or(String::new(), |ratio| format!("{ratio:.3}"));
            let verified = match row.verified {
                Some(true) => "right",
                Some(false) => "WRONG",
                None => "",
            };
            let _ = writeln!(
                text,
                "{:<58} {number:>9} {:<5} {ratio:>6} {verified:<6} {}",
                row.what, row.unit, row.note
            );
        }
        text
    }
}
