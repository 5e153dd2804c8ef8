//! From measurements to what is printed: medians, goals, a table.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use crate::cases::{Case, Figures, Resident, Size};
use crate::machine::Machine;
use crate::routers::Who;

/// A router in a case.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) who: Who,
    pub(crate) case: Case,
    /// Of each figure the median over the rounds.
    pub(crate) median: Figures,
    pub(crate) rounds: Vec<Figures>,
}

impl Row {
    /// `rounds` must not be empty.
    pub(crate) fn new(who: Who, case: Case, rounds: Vec<Figures>) -> Self {
        let of = |figure: fn(&Figures) -> Option<f64>| {
            median(rounds.iter().filter_map(figure).collect())
        };
        let time = |figure: fn(&Figures) -> f64| median(rounds.iter().map(figure).collect());
        let last = rounds.last().cloned().unwrap_or_default();
        let median = Figures {
            answers: rounds.iter().map(|round| round.answers).sum(),
            errors: rounds.iter().map(|round| round.errors).sum(),
            error: rounds.iter().find_map(|round| round.error.clone()),
            per_second: time(|round| round.per_second).unwrap_or_default(),
            cpu_us: of(|round| round.cpu_us),
            cpu_us_per_token: of(|round| round.cpu_us_per_token),
            first_p50_us: time(|round| round.first_p50_us).unwrap_or_default(),
            first_p99_us: time(|round| round.first_p99_us).unwrap_or_default(),
            total_p50_us: time(|round| round.total_p50_us).unwrap_or_default(),
            total_p99_us: time(|round| round.total_p99_us).unwrap_or_default(),
            resident_mib: of(|round| round.resident_mib),
            resident: last.resident,
            open_max: last.open_max,
        };
        Self {
            who,
            case,
            median,
            rounds,
        }
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Criterion's folders of the two benchmarks that have goals.
const DECISION: &str = "decision at 64P x 64D/fused";
const SAMPLE: &str = "samples/64 links, every rate changed";

/// What criterion measured of the scheduler alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Scheduler {
    /// One choice among 64 prefill and 64 decode workers, all loaded.
    decision_us: f64,
    /// One sample of 64 links entering the board.
    sample_us: f64,
}

impl Scheduler {
    /// Reads it from criterion's `folder`.
    pub(crate) fn read(folder: &Path) -> anyhow::Result<Self> {
        let median_us = |benchmark: &str| {
            let file = folder.join(benchmark).join("new/estimates.json");
            let text = fs::read_to_string(&file);
            let text = text.with_context(|| format!("cannot read {}", file.display()))?;
            median_us(&text).with_context(|| format!("{} is odd", file.display()))
        };
        Ok(Self {
            decision_us: median_us(DECISION)?,
            sample_us: median_us(SAMPLE)?,
        })
    }
}

impl Scheduler {
    fn goals(self) -> [(&'static str, f64, Option<f64>); 2] {
        let per_second = 1e6 / self.sample_us;
        [
            (
                "choice of a pair at 64P x 64D, us",
                20.0,
                Some(self.decision_us),
            ),
            (
                "samples taken in per second and core",
                -100_000.0,
                Some(per_second),
            ),
        ]
    }
}

fn median_us(estimates: &str) -> Option<f64> {
    let estimates: serde_json::Value = serde_json::from_str(estimates).ok()?;
    Some(estimates["median"]["point_estimate"].as_f64()? / 1e3)
}

/// A goal and what came of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Goal {
    name: &'static str,
    /// At most so much; at least, if `is_least`.
    limit: f64,
    is_least: bool,
    value: f64,
    reached: bool,
}

impl Goal {
    /// A negative `limit` is the least that is wanted.
    fn new(name: &'static str, limit: f64, value: f64) -> Self {
        let is_least = limit < 0.0;
        let limit = limit.abs();
        let reached = if is_least {
            value >= limit
        } else {
            value <= limit
        };
        Self {
            name,
            limit,
            is_least,
            value,
            reached,
        }
    }
}

/// All that a run found.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) versions: Vec<String>,
    pub(crate) router_cores: Vec<usize>,
    pub(crate) load_cores: Vec<usize>,
    pub(crate) rounds: usize,
    pub(crate) size: Size,
    /// Requests that reached one prefill and one decode worker under one room, and those that did not.
    pub(crate) paired: u64,
    pub(crate) unpaired: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scheduler: Option<Scheduler>,
    pub(crate) rows: Vec<Row>,
    pub(crate) goals: Vec<Goal>,
}

impl Report {
    fn of(&self, who: Who, case: Case) -> Option<&Figures> {
        let mut rows = self.rows.iter();
        let row = rows.find(|row| row.who == who && row.case == case)?;
        Some(&row.median)
    }

    /// Holds what was measured against the goals; those whose cases were not run are left out.
    pub(crate) fn judge(&mut self) {
        let ours = |case| self.of(Who::Ours, case);
        let cpu = |who, case| self.of(who, case)?.cpu_us;
        let over_direct = |case, figure: fn(&Figures) -> f64| {
            Some(figure(ours(case)?) - figure(self.of(Who::Direct, case)?))
        };
        let fewer = || Some(cpu(Who::Smg, Case::Small)? / cpu(Who::Ours, Case::Small)?);
        let streams = self.size.streams as f64;
        let found = [
            (
                "CPU per small request, us",
                80.0,
                cpu(Who::Ours, Case::Small),
            ),
            ("smg's CPU per small request over ours", -3.0, fewer()),
            (
                "CPU per streamed token, us",
                10.0,
                ours(Case::Tokens).and_then(|figures| figures.cpu_us_per_token),
            ),
            (
                "p50 over direct at c=1, us",
                100.0,
                over_direct(Case::Single, |figures| figures.total_p50_us),
            ),
            (
                "first byte of a stream over direct, us",
                200.0,
                over_direct(Case::FirstByte, |figures| figures.first_p50_us),
            ),
            (
                "CPU per request of 32 KiB, us",
                120.0,
                cpu(Who::Ours, Case::Large),
            ),
            (
                "resident memory after the soak, MiB",
                40.0,
                ours(Case::Soak).and_then(|figures| figures.resident_mib),
            ),
            (
                "its growth over the last nine tenths, MiB",
                2.0,
                ours(Case::Soak).and_then(|figures| growth(&figures.resident)),
            ),
            (
                "streams open at one time",
                -streams,
                ours(Case::Many)
                    .and_then(|figures| figures.open_max)
                    .map(|open| open as f64),
            ),
            ("errors of all requests", 0.0, Some(self.errors() as f64)),
        ];
        let scheduler = self.scheduler.into_iter().flat_map(Scheduler::goals);
        let goals = found
            .into_iter()
            .chain(scheduler)
            .filter_map(|(name, limit, value)| Some(Goal::new(name, limit, value?)));
        self.goals = goals.collect();
    }

    /// Errors of our own, and requests of anybody's that did not reach a pair.
    pub(crate) fn errors(&self) -> u64 {
        let ours = self.rows.iter().filter(|row| row.who == Who::Ours);
        ours.map(|row| row.median.errors).sum::<u64>() + self.unpaired
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let number =
            |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.1}"));
        let _ = writeln!(
            out,
            "| case | router | CPU µs/request | µs/token | requests/s | first byte p50 / p99 µs | whole p50 / p99 µs | RSS MiB | errors |\n\
             |---|---|---|---|---|---|---|---|---|"
        );
        for row in &self.rows {
            let figures = &row.median;
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {:.0} | {:.0} / {:.0} | {:.0} / {:.0} | {} | {} |",
                row.case.title(),
                row.who.name(),
                number(figures.cpu_us),
                number(figures.cpu_us_per_token),
                figures.per_second,
                figures.first_p50_us,
                figures.first_p99_us,
                figures.total_p50_us,
                figures.total_p99_us,
                number(figures.resident_mib),
                figures.errors,
            );
        }
        for row in self
            .rows
            .iter()
            .filter(|row| !row.median.resident.is_empty())
        {
            let _ = write!(out, "\nRSS of {} in MiB (after requests):", row.who.name());
            for Resident {
                after_requests,
                mib,
            } in &row.median.resident
            {
                let _ = write!(out, " {mib:.1} ({after_requests})");
            }
        }
        let _ = writeln!(
            out,
            "\n\n| goal | limit | found | reached |\n|---|---|---|---|"
        );
        for goal in &self.goals {
            let sign = if goal.is_least { "≥" } else { "≤" };
            let reached = if goal.reached { "yes" } else { "**no**" };
            let _ = writeln!(
                out,
                "| {} | {sign} {:.0} | {:.1} | {reached} |",
                goal.name, goal.limit, goal.value
            );
        }
        out
    }
}

/// How much more memory is taken at the end than after the first tenth.
fn growth(resident: &[Resident]) -> Option<f64> {
    let last = resident.last()?;
    let tenth = resident
        .iter()
        .find(|one| one.after_requests * 10 >= last.after_requests)?;
    Some(last.mib - tenth.mib)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(cpu_us: f64) -> Figures {
        Figures {
            cpu_us: Some(cpu_us),
            ..Figures::default()
        }
    }

    #[test]
    fn medians_decide_over_goals() {
        let rounds = |all: &[f64]| all.iter().map(|cpu| figures(*cpu)).collect();
        let mut report = Report {
            machine: Machine::here(),
            versions: Vec::new(),
            router_cores: Vec::new(),
            load_cores: Vec::new(),
            rounds: 3,
            size: Size {
                scale: 1.0,
                soak: 1,
                streams: 1,
            },
            paired: 1,
            unpaired: 0,
            scheduler: Some(Scheduler {
                decision_us: 8.0,
                sample_us: 12.5,
            }),
            rows: vec![
                Row::new(Who::Ours, Case::Small, rounds(&[500.0, 60.0, 70.0])),
                Row::new(Who::Smg, Case::Small, rounds(&[200.0, 209.0, 300.0])),
            ],
            goals: Vec::new(),
        };
        report.judge();
        let goals: Vec<_> = report
            .goals
            .iter()
            .map(|goal| (goal.value, goal.reached))
            .collect();
        let expected = [
            (70.0, true),
            (209.0 / 70.0, false),
            (0.0, true),
            (8.0, true),
            (80_000.0, false),
        ];
        assert_eq!(goals, expected);
        assert!(report.table().contains("| **no** |"), "{}", report.table());
    }

    #[test]
    fn criterion_tells_nanoseconds() {
        let text = r#"{"mean":{"point_estimate":9.0},"median":{"point_estimate":8250.0}}"#;
        assert_eq!(median_us(text), Some(8.25));
        assert_eq!(median_us("{}"), None);
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let error = Scheduler::read(here).unwrap_err().to_string();
        assert!(error.contains("fused/new/estimates.json"), "{error}");
    }

    #[test]
    fn growth_leaves_the_warm_up_out() {
        let at = |after_requests, mib| Resident {
            after_requests,
            mib,
        };
        assert_eq!(
            growth(&[at(1, 5.0), at(10, 20.0), at(50, 22.0), at(100, 21.0)]),
            Some(1.0)
        );
        assert_eq!(growth(&[]), None);
    }
}
