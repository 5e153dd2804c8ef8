//! From rounds to the line that is printed.
#![forbid(unsafe_code)]

use std::io;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    case::{Case, CaseName},
    machine::Machine,
    pair::{Pass, Plan, Round},
    protocol::{Path, ReferenceKind},
};

/// One line of output. See README.md for what each figure means.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) case: CaseName,
    pub(crate) path: Path,
    block_bytes: usize,
    blocks: usize,
    transfers: usize,
    pub(crate) gb_per_s: f64,
    pub(crate) reference: ReferenceKind,
    pub(crate) reference_gb_per_s: f64,
    /// Ratio of the two medians above.
    pub(crate) ratio: f64,
    /// Median of the rounds' own ratios.
    ratio_median_of_rounds: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) reference_p50_us: f64,
    pub(crate) reference_p99_us: f64,
    pub(crate) cpu_s_per_gib: f64,
    pub(crate) reference_cpu_s_per_gib: f64,
    memcpy_gb_per_s: f64,
    pub(crate) verified: bool,
    wrong_blocks: usize,
    rounds: usize,
    lanes: u8,
    seed: u64,
    tiny: bool,
    path_reason: String,
    machine: Machine,
}

impl Report {
    /// `rounds` must not be empty; `warm_up` counts for the check only.
    pub(crate) fn new(
        case: &Case,
        path: Path,
        plan: &Plan,
        path_reason: &str,
        machine: Machine,
        (warm_up, rounds): (&Round, &[Round]),
    ) -> anyhow::Result<Self> {
        let bytes = case.bytes();
        let rates = |pass: fn(&Round) -> &Pass| -> Vec<f64> {
            let nanos = |round| pass(round).nanos.iter().sum();
            rounds.iter().map(|r| rate(bytes, nanos(r))).collect()
        };
        let (ours, theirs) = (rates(|r| &r.ours), rates(|r| &r.reference));
        let memcpy = rounds.iter().map(|r| rate(bytes, r.memcpy_nanos));
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
        let times = histogram(rounds.iter().map(|r| &r.ours))?;
        let reference_times = histogram(rounds.iter().map(|r| &r.reference))?;
        let cpu = |pass: fn(&Round) -> &Pass| {
            let seconds: f64 = rounds.iter().map(|r| pass(r).cpu_seconds).sum();
            seconds / (gib(bytes) * rounds.len() as f64)
        };
        let checked = rounds.iter().chain([warm_up]);
        let wrong_blocks = checked.map(|r| r.ours.wrong + r.reference.wrong).sum();
        let (gb_per_s, reference_gb_per_s) = (median(ours), median(theirs));
        Ok(Self {
            case: case.name,
            path,
            block_bytes: case.block_bytes,
            blocks: bytes / case.block_bytes,
            transfers: case.transfers(),
            gb_per_s: rounded(gb_per_s),
            reference: path.reference(case.name),
            reference_gb_per_s: rounded(reference_gb_per_s),
            ratio: rounded(gb_per_s / reference_gb_per_s),
            ratio_median_of_rounds: rounded(median(ratios)),
            p50_us: micros(&times, 0.50),
            p99_us: micros(&times, 0.99),
            reference_p50_us: micros(&reference_times, 0.50),
            reference_p99_us: micros(&reference_times, 0.99),
            cpu_s_per_gib: rounded(cpu(|r| &r.ours)),
            reference_cpu_s_per_gib: rounded(cpu(|r| &r.reference)),
            memcpy_gb_per_s: rounded(median(memcpy.collect())),
            verified: wrong_blocks == 0,
            wrong_blocks,
            rounds: rounds.len(),
            lanes: plan.lanes,
            seed: plan.extent.seed,
            tiny: plan.extent.tiny,
            path_reason: path_reason.to_owned(),
            machine,
        })
    }
}

/// Prints the lines as a table for people.
pub(crate) fn table(reports: &[Report], out: &mut impl io::Write) -> io::Result<()> {
    writeln!(
        out,
        "{:<12} {:<5} {:>7} {:>7} {:>6}  {:>10} {:>10}  {:>10} {:>10}  {:>7} {:>7}  reference",
        "case",
        "path",
        "GB/s",
        "plain",
        "ratio",
        "p50 us",
        "p99 us",
        "plain p50",
        "plain p99",
        "cpu/GiB",
        "plain",
    )?;
    for report in reports {
        writeln!(
            out,
            "{:<12} {:<5} {:>7.2} {:>7.2} {:>5.0}%  {:>10.1} {:>10.1}  {:>10.1} {:>10.1}  {:>7.3} {:>7.3}  {}{}",
            name(report.case),
            name(report.path),
            report.gb_per_s,
            report.reference_gb_per_s,
            100.0 * report.ratio,
            report.p50_us,
            report.p99_us,
            report.reference_p50_us,
            report.reference_p99_us,
            report.cpu_s_per_gib,
            report.reference_cpu_s_per_gib,
            name(report.reference),
            if report.verified { "" } else { "  WRONG BYTES" },
        )?;
    }
    Ok(())
}

/// A name as it is spelled in JSON.
pub(crate) fn name(value: impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// Four decimals: more would be noise.
pub(crate) fn rounded(figure: f64) -> f64 {
    (figure * 1e4).round() / 1e4
}

/// GB/s (1e9).
pub(crate) fn rate(bytes: usize, nanos: u64) -> f64 {
    bytes as f64 / nanos.max(1) as f64
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// The middle value, or the mean of the middle two. Zero of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

pub(crate) fn histogram<'a>(
    passes: impl Iterator<Item = &'a Pass>,
) -> anyhow::Result<Histogram<u64>> {
    const DIGITS: u8 = 3;
    let mut histogram = Histogram::new(DIGITS)?;
    for nanos in passes.flat_map(|pass| &pass.nanos) {
        histogram.record(*nanos)?;
    }
    Ok(histogram)
}

pub(crate) fn micros(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::{Report, median};
    use crate::machine::Machine;
    use crate::{
        case::{Case, CaseName, Extent},
        pair::{Pass, Plan, Round},
        protocol::{Path, Tuning},
    };

    fn pass(nanos: u64, wrong: usize) -> Pass {
        Pass {
            nanos: vec![nanos],
            cpu_seconds: 0.5,
            wrong,
        }
    }

    fn round(ours: u64, reference: u64) -> Round {
        Round {
            ours: pass(ours, 0),
            reference: pass(reference, 0),
            memcpy_nanos: 1 << 27,
        }
    }

    fn report(warm_up: &Round, rounds: &[Round]) -> Report {
        let extent = Extent {
            rounds: 3,
            seed: 1,
            tiny: false,
            mib: 1,
            samples: 100,
        };
        let case = Case::new(CaseName::One1Gib, extent);
        let plan = Plan {
            extent,
            lanes: 2,
            rdma: None,
            gpu: None,
            tuning: Tuning::default(),
        };
        Report::new(
            &case,
            Path::Tcp,
            &plan,
            "",
            Machine::here(),
            (warm_up, rounds),
        )
        .unwrap()
    }

    #[test]
    fn ratios_are_of_medians_and_of_rounds_and_the_warm_up_is_not_timed() {
        let second = 1 << 30;
        let rounds = [
            round(second, second),
            round(4 * second, second),
            round(2 * second, 8 * second),
        ];
        let report = report(&round(1, 1), &rounds);
        assert!((report.gb_per_s - 0.5).abs() < 1e-9);
        assert!((report.reference_gb_per_s - 1.0).abs() < 1e-9);
        assert!((report.ratio - 0.5).abs() < 1e-9);
        assert!((report.ratio_median_of_rounds - 1.0).abs() < 1e-9);
        assert!((report.cpu_s_per_gib - 0.5).abs() < 1e-9);
        assert!((report.memcpy_gb_per_s - 8.0).abs() < 1e-9);
        assert!(report.verified);
    }

    #[test]
    fn one_wrong_block_anywhere_spoils_the_report() {
        let fine = round(1, 1);
        let mut spoilt = fine.clone();
        spoilt.reference.wrong = 1;
        assert!(!report(&spoilt, std::slice::from_ref(&fine)).verified);
        assert!(!report(&fine, &[spoilt]).verified);
    }

    #[test]
    fn the_median_of_an_even_count_lies_between() {
        assert!((median(vec![4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < 1e-9);
        assert!((median(vec![3.0, 9.0, 1.0]) - 3.0).abs() < 1e-9);
    }
}
