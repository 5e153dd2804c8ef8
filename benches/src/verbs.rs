//! The verbs path: our engines between two RDMA devices of this host, in turns with perftest between the same two.
//!
//! perftest is what everybody measures RDMA with, so its figure is the limit of the device as users know it: one queue
//! pair, one work request per doorbell, completions of every hundredth WRITE up to 8 KiB and of every one above.
#![forbid(unsafe_code)]

mod devices;
mod perftest;

use std::io;

use anyhow::Context as _;
use kvtransfer::engine::RailCounts;
use serde::Serialize;

pub(crate) use self::devices::Ends;
use self::perftest::{Perftest, Tool};
use crate::{
    case::{Case, CaseName, Extent},
    machine::Machine,
    pair::{Pair, Pass, Plan},
    protocol::{Path, Rdma, Tuning},
    report::{histogram, median, micros, name, rate, rounded},
};

/// Fewest iterations of a reference: perftest's first messages are slow.
const ITERATIONS_MIN: usize = 100;
/// Iterations of a latency reference.
const LATENCY_ITERATIONS: usize = 200;

/// What is asked of a case.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Goal {
    /// At least so many times perftest's rate.
    AtLeast(f64),
    /// At most so many times perftest's latency.
    AtMost(f64),
}

impl Goal {
    fn of(case: CaseName) -> Self {
        match case {
            CaseName::Write4k | CaseName::Write512 | CaseName::Gather4k => Self::AtLeast(1.5),
            name if name.is_latency() => Self::AtMost(1.3),
            _ => Self::AtLeast(0.95),
        }
    }

    fn is_reached(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(goal) => ratio >= goal,
            Self::AtMost(goal) => ratio <= goal,
        }
    }

    fn words(self) -> String {
        match self {
            Self::AtLeast(goal) => format!(">= {:.0}%", 100.0 * goal),
            Self::AtMost(goal) => format!("<= {:.0}%", 100.0 * goal),
        }
    }
}

/// One line of output. See README.md for what each figure means.
#[derive(Debug, Serialize)]
pub(crate) struct VerbsReport {
    case: CaseName,
    path: Path,
    devices: [String; 2],
    connector: &'static str,
    block_bytes: usize,
    blocks: usize,
    transfers: usize,
    /// Ours: GB/s, or microseconds from push to acknowledged.
    ours: f64,
    /// perftest's in the same unit.
    reference: f64,
    unit: &'static str,
    ratio: f64,
    ratio_median_of_rounds: f64,
    goal: Goal,
    reached: bool,
    p50_us: f64,
    p99_us: f64,
    cpu_s_per_gib: f64,
    /// Of the sending device, per work request that it was given.
    doorbells_per_wr: f64,
    completions_per_wr: f64,
    work_requests: u64,
    pub(crate) verified: bool,
    wrong_blocks: usize,
    rounds: usize,
    tuning: Tuning,
    machine: Machine,
}

/// Measures one case.
pub(crate) fn measure(
    name: CaseName,
    extent: Extent,
    ends: &Ends,
    tuning: &Tuning,
) -> anyhow::Result<VerbsReport> {
    let machine = Machine::here();
    let rdma = [&ends.from, &ends.to].map(|rail| Rdma {
        device: rail.device.clone(),
        is_standard: ends.is_standard,
        tuning: tuning.clone(),
    });
    let plan = Plan {
        extent,
        lanes: 1,
        rdma: Some(rdma),
        gpu: None,
        tuning: tuning.clone(),
    };
    let case = Case::new(name, extent);
    let mut pair = Pair::start(case.clone(), Path::Verbs, plan)?;
    let perftest = Perftest::new(ends)?;
    let warm_up = pair.ours_alone(0)?;
    let before = pair.rail_counts();
    let mut rounds = Vec::with_capacity(extent.rounds);
    for number in 1..=extent.rounds {
        // They take turns in going first.
        let round = if number.is_multiple_of(2) {
            let ours = pair.ours_alone(number)?;
            (ours, reference(&perftest, &case)?)
        } else {
            let reference = reference(&perftest, &case)?;
            (pair.ours_alone(number)?, reference)
        };
        crate::say(&format!(
            "{name:?} over verbs, round {number} of {}: {:.3}, perftest {:.3}",
            extent.rounds,
            figure(&case, &round.0)?,
            round.1,
        ))?;
        rounds.push(round);
    }
    let counts = difference(&pair.rail_counts(), &before);
    let wrong = [&warm_up]
        .into_iter()
        .chain(rounds.iter().map(|(pass, _)| pass))
        .map(|pass| pass.wrong)
        .sum();
    report(&case, (ends, tuning, machine), &rounds, &counts, wrong)
}

fn report(
    case: &Case,
    (ends, tuning, machine): (&Ends, &Tuning, Machine),
    rounds: &[(Pass, f64)],
    counts: &RailCounts,
    wrong_blocks: usize,
) -> anyhow::Result<VerbsReport> {
    let figures = rounds.iter().map(|(pass, _)| figure(case, pass));
    let figures = figures.collect::<anyhow::Result<Vec<_>>>()?;
    let ratios = figures.iter().zip(rounds);
    let ratios = ratios.map(|(ours, (_, reference))| ours / reference);
    let ratio_median_of_rounds = rounded(median(ratios.collect()));
    let ours = median(figures);
    let reference = median(rounds.iter().map(|(_, reference)| *reference).collect());
    let times = histogram(rounds.iter().map(|(pass, _)| pass))?;
    let goal = Goal::of(case.name);
    let seconds: f64 = rounds.iter().map(|(pass, _)| pass.cpu_seconds).sum();
    let gib = (case.bytes() * rounds.len()) as f64 / f64::from(1 << 30);
    let per_wr = |count: u64| rounded(count as f64 / counts.work_requests.max(1) as f64);
    Ok(VerbsReport {
        case: case.name,
        path: Path::Verbs,
        devices: [ends.from.device.clone(), ends.to.device.clone()],
        connector: ends.connector(),
        block_bytes: case.block_bytes,
        blocks: case.bytes() / case.block_bytes,
        transfers: case.transfers(),
        ours: rounded(ours),
        reference: rounded(reference),
        unit: if case.name.is_latency() { "us" } else { "GB/s" },
        ratio: rounded(ours / reference),
        ratio_median_of_rounds,
        goal,
        reached: goal.is_reached(ours / reference),
        p50_us: micros(&times, 0.50),
        p99_us: micros(&times, 0.99),
        cpu_s_per_gib: rounded(seconds / gib),
        doorbells_per_wr: per_wr(counts.doorbells),
        completions_per_wr: per_wr(counts.completions),
        work_requests: counts.work_requests,
        verified: wrong_blocks == 0,
        wrong_blocks,
        rounds: rounds.len(),
        tuning: tuning.clone(),
        machine,
    })
}

/// What a pass is held against perftest by: its rate, or the median time of its transfers.
fn figure(case: &Case, pass: &Pass) -> anyhow::Result<f64> {
    if case.name.is_latency() {
        return Ok(micros(&histogram([pass].into_iter())?, 0.50));
    }
    Ok(rate(case.bytes(), pass.nanos.iter().sum()))
}

/// perftest's figure for a case: a latency is that of the WRITE and of the answer, which is one SEND.
fn reference(perftest: &Perftest, case: &Case) -> anyhow::Result<f64> {
    let bytes = case.block_bytes;
    if case.name.is_latency() {
        let write = perftest.run(Tool::WriteLatency, bytes, LATENCY_ITERATIONS)?;
        let answer = perftest.run(Tool::SendLatency, ANSWER_BYTES, LATENCY_ITERATIONS)?;
        return Ok(write + answer);
    }
    let iterations = (case.bytes() / bytes).max(ITERATIONS_MIN);
    perftest.run(Tool::WriteRate, bytes, iterations)
}

/// About what an acknowledgement has.
const ANSWER_BYTES: usize = 32;

fn difference(after: &RailCounts, before: &RailCounts) -> RailCounts {
    let mut counts = after.clone();
    counts.doorbells -= before.doorbells;
    counts.work_requests -= before.work_requests;
    counts.completions -= before.completions;
    counts.frames_received -= before.frames_received;
    counts
}

/// Prints the lines as a table for people.
pub(crate) fn table(reports: &[VerbsReport], out: &mut impl io::Write) -> io::Result<()> {
    writeln!(
        out,
        "{:<12} {:<15} {:<9} {:>9} {:>9} {:<5} {:>6} {:>8} {:<7} {:>9} {:>9} {:>9} {:>9}",
        "case",
        "devices",
        "connector",
        "ours",
        "perftest",
        "unit",
        "ratio",
        "goal",
        "reached",
        "p50 us",
        "p99 us",
        "bells/WR",
        "CQEs/WR",
    )?;
    for report in reports {
        writeln!(
            out,
            "{:<12} {:<15} {:<9} {:>9.4} {:>9.4} {:<5} {:>5.0}% {:>8} {:<7} {:>9.1} {:>9.1} {:>9.4} {:>9.4}{}",
            name(report.case),
            report.devices.join(" to "),
            report.connector,
            report.ours,
            report.reference,
            report.unit,
            100.0 * report.ratio,
            report.goal.words(),
            if report.reached { "yes" } else { "NO" },
            report.p50_us,
            report.p99_us,
            report.doorbells_per_wr,
            report.completions_per_wr,
            if report.verified { "" } else { "  WRONG BYTES" },
        )?;
    }
    Ok(())
}

/// Finds the devices.
pub(crate) fn ends(devices: &str, connector: Option<&str>) -> anyhow::Result<Ends> {
    Ends::find(devices, connector).context("choosing RDMA devices")
}
