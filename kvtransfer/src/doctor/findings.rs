//! Turns facts into findings: sentences that say what is right, what is wrong, why that matters and how to put it right.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::facts::Facts;
use super::gpus::Verdict;
use super::rails::Rail;

mod device;
mod host;
mod peer;

pub use host::ERDMA_PORTS;
pub use peer::{PeerPath, Side, compare};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works; something to know or to improve.
    Note,
    /// Works, but slowly, partly, or until something else changes.
    Warn,
    /// Does not work.
    Fail,
}

impl Level {
    /// The word of reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What it is about: a device's name, `memlock`, `libraries`, ...
    pub subject: String,
    /// What was found.
    pub what: String,
    /// Why that matters.
    pub why: String,
    /// What to do. Every finding that is not ok has it.
    pub fix: Option<String>,
}

impl Finding {
    /// Something that does not work.
    pub fn fail(
        subject: &str,
        what: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::not_ok(Level::Fail, subject, what, why, fix)
    }

    pub(super) fn ok(subject: &str, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            subject: subject.to_owned(),
            what: what.into(),
            why: why.into(),
            fix: None,
        }
    }

    /// A finding that is not ok; so the fix is no option.
    pub(super) fn not_ok(
        level: Level,
        subject: &str,
        what: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            level,
            subject: subject.to_owned(),
            what: what.into(),
            why: why.into(),
            fix: Some(fix.into()),
        }
    }
}

/// Devices that were asked for with `--device`, by name; `None`: every device counts.
pub type Wanted<'a> = Option<&'a [String]>;

/// All findings about one host, in the order of a report: the host first, then its devices and GPUs.
pub fn examine(
    facts: &Facts,
    rails: &[Rail],
    gpus: &[Verdict],
    wanted: Wanted<'_>,
) -> Vec<Finding> {
    let mut found = Vec::new();
    host::libraries(facts, rails, &mut found);
    host::presence(facts, &mut found);
    host::nodes(facts, rails, &mut found);
    host::memlock(facts, &mut found);
    host::hugepages(facts, &mut found);
    host::namespaces(facts, &mut found);
    host::ports(facts, rails, &mut found);
    host::cut(facts, &mut found);
    device::each(facts, rails, wanted, &mut found);
    device::together(rails, &mut found);
    device::gpus(facts, rails, gpus, &mut found);
    found
}

/// The worst level among findings; [`Level::Ok`] if there are none.
pub fn worst(findings: &[Finding]) -> Level {
    findings
        .iter()
        .map(|finding| finding.level)
        .max()
        .unwrap_or(Level::Ok)
}

/// Bytes in the largest unit that leaves a whole number; the largest number is how devices say that they have no limit.
pub(crate) fn bytes(count: u64) -> String {
    if count == u64::MAX {
        return "no limit".to_owned();
    }
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let whole = units
        .iter()
        .find(|(shift, _)| count != 0 && count.trailing_zeros() >= *shift);
    match whole {
        Some((shift, unit)) => format!("{} {unit}", count >> shift),
        None => format!("{count} bytes"),
    }
}
