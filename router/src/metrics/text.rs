//! The Prometheus text format, version 0.0.4.
#![forbid(unsafe_code)]

use std::fmt::Write;

/// What kind of numbers a family holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until a restart.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

/// The text so far, and the family that the next samples belong to.
#[derive(Debug, Default)]
pub struct Text {
    out: String,
    family: &'static str,
}

/// Labels that are written once and used by many samples, without the braces.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Labels {
    text: String,
}

impl Labels {
    /// Adds a label.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        if !self.text.is_empty() {
            self.text.push(',');
        }
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{name}=\"");
        for letter in value.chars() {
            match letter {
                '\\' => self.text.push_str("\\\\"),
                '"' => self.text.push_str("\\\""),
                '\n' => self.text.push_str("\\n"),
                other => self.text.push(other),
            }
        }
        self.text.push('"');
        self
    }
}

impl Text {
    /// An empty text.
    pub fn new() -> Self {
        Self {
            out: String::with_capacity(16 << 10),
            family: "",
        }
    }

    /// The whole text.
    pub fn finish(self) -> String {
        self.out
    }

    /// Begins a family; its samples follow.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        self.family = name;
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One sample of the family.
    pub fn sample(&mut self, labels: &Labels, value: impl std::fmt::Display) {
        self.named_sample("", labels, value);
    }

    /// One sample of a part of the family, as `_bucket`.
    pub fn named_sample(&mut self, part: &str, labels: &Labels, value: impl std::fmt::Display) {
        let (family, labels) = (self.family, &labels.text);
        // Writing to a String cannot fail.
        let _ = if labels.is_empty() {
            writeln!(self.out, "{family}{part} {value}")
        } else {
            writeln!(self.out, "{family}{part}{{{labels}}} {value}")
        };
    }

    /// A family of one sample without labels.
    pub fn single(
        &mut self,
        name: &'static str,
        kind: Kind,
        help: &str,
        value: impl std::fmt::Display,
    ) {
        self.family(name, kind, help);
        self.sample(&Labels::default(), value);
    }
}
