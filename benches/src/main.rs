//! `kvbench`: whole transfers between two processes, held against what the machine can do without an engine.
//!
//! The program starts itself again as the target. Each round moves fresh random data twice, once with two engines and
//! once with plain system calls between the same regions of the same processes, into poisoned blocks that are checked
//! afterwards. So the ratio of the two says what the engine costs, even where a busy machine spoils the rates.

mod case;
mod child;
mod data;
mod gpu;
mod idle;
mod machine;
mod pair;
mod protocol;
mod raw;
mod reference;
mod report;
mod target;
mod verbs;
mod watch;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum as _};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::{
    case::{Case, CaseName, Extent},
    gpu::{Gpu, Kernel},
    machine::Machine,
    pair::{Pair, Plan},
    protocol::{Path, Tuning},
    report::Report,
};

/// How the program starts itself as the target.
const TARGET_SUBCOMMAND: &str = "target";

/// Measures transfers between two processes of this machine, in turns with plain system calls that move the same bytes.
///
/// Prints one JSON object per case on stdout. `ratio` is the figure to read: our rate over the plain one. Every block of
/// every round is checked; a wrong one makes `verified` false and the exit status 1.
#[derive(Debug, Parser)]
#[command(name = "kvbench", version, args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  kvbench --json > figures.jsonl        every case over every path; about three minutes
  kvbench --path tcp --case pages-16k   one case, with a table at the end
  kvbench --path shm --rounds 25        more rounds for a noisy machine
  kvbench --path verbs --mib 256        RDMA beside perftest, between the devices that are found
  kvbench --path verbs --rdma-devices rxe1,rxe0 --mib 8
  kvbench --gpu 0 --peer-gpu 1          between the memories of two GPUs
  kvbench --gpu 0 --faults 40 --restarts 1000
                                        what is late and what is left when either side freezes, dies or starts again
  kvbench idle                          resident memory of an idle engine
Latency over verbs goes from push to acknowledged: one WRITE of the page, one SEND with its notice, one SEND with the
answer, and both engines' work. Beside it stands perftest's typical time of one way of `ib_write_lat` with the page's
size plus that of `ib_send_lat` with 32 bytes, about an answer: the least that a WRITE and its answer can take on the
same devices. The notice after the WRITE is not in it. Both look for completions without sleeping; ours for
`--rdma-spin-us` after the last one.
KVTRANSFER_LOG=info shows what the engines say. Needs up to 3 GiB of memory. See benches/README.md for the columns.")]
struct Cli {
    #[command(subcommand)]
    mode: Option<Mode>,
    /// JSON only: no table for people on stderr
    #[arg(long, global = true)]
    json: bool,
    /// Path to measure; `all` is every path but verbs, which needs RDMA devices [default: all]
    #[arg(long, value_parser = path_names())]
    path: Option<String>,
    /// Case to measure; may be repeated [default: all of the path]
    #[arg(long, value_enum)]
    case: Vec<CaseName>,
    /// Timed rounds per case and path; figures are medians over them. One more goes before to warm up
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Seed of page lists and data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Data connections of our engines (the plain reference always has one)
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    lanes: u8,
    /// A 64th of the size: shows that everything works, its figures mean nothing
    #[arg(long)]
    tiny: bool,
    /// MiB per round of the throughput cases over verbs
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=2048))]
    mib: u16,
    /// Transfers per round of a latency case [default: 2000 over all rounds, at least 100 in each]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    samples: Option<u16>,
    /// RDMA devices for verbs: the sender's and the receiver's with a comma, or one for both [default: the first usable
    /// one and the next that speaks its protocol]
    #[arg(long, value_name = "LIST", default_value = "")]
    rdma_devices: String,
    /// How queue pairs are connected over verbs [default: as the device's mode asks for]
    #[arg(long, value_parser = ["compat", "standard"])]
    rdma_connector: Option<String>,
    /// Our engines' regions in the memory of this GPU; the plain references stay in host memory (tcp, shm, ring)
    #[arg(long, value_name = "NUMBER")]
    gpu: Option<u32>,
    /// Share of the GPU that our copies may take, in percent; 100 is all of it
    #[arg(long, default_value_t = kvtransfer::gpu::PERCENT_DEFAULT, value_parser = clap::value_parser!(u32).range(1..=100))]
    gpu_percent: u32,
    /// The target's GPU, if it is another one
    #[arg(long, value_name = "NUMBER", requires = "gpu")]
    peer_gpu: Option<u32>,
    /// Kind of kernel that copies on the GPU
    #[arg(long, value_enum, default_value_t = Kernel::Auto)]
    gpu_kernel: Kernel,
    /// Mapping the other's GPU memory is refused, so that the engines choose another way by themselves: `--path ring` says
    /// which it must be
    #[arg(long, requires = "gpu")]
    refuse_mapping: bool,
    /// Freeze and kill either side in the middle of so many transfers over each path instead of measuring single ones, and
    /// count what arrives late and what is told too late; before, many transfers at once, one way and both ways
    #[arg(long, value_name = "COUNT")]
    faults: Option<usize>,
    /// Replace the target's engine so many times over each path, and count what is left behind
    #[arg(long, value_name = "COUNT")]
    restarts: Option<usize>,
    #[command(flatten)]
    tuning: Tuning,
}

impl Cli {
    fn extent(&self) -> Extent {
        Extent {
            rounds: self.rounds.into(),
            seed: self.seed,
            tiny: self.tiny,
            mib: self.mib.into(),
            samples: self
                .samples
                .map_or_else(|| Extent::samples(self.rounds.into()), usize::from),
        }
    }
}

impl Cli {
    fn plan(&self) -> Plan {
        let gpu = |ordinal| Gpu {
            ordinal,
            percent: self.gpu_percent,
            kernel: self.gpu_kernel,
            refuses: self.refuse_mapping,
        };
        let gpus = self
            .gpu
            .map(|first| [gpu(first), gpu(self.peer_gpu.unwrap_or(first))]);
        Plan {
            extent: self.extent(),
            lanes: self.lanes,
            rdma: None,
            gpu: gpus,
            tuning: self.tuning.clone(),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// Resident memory of a process with an idle engine over a region of 1 GiB
    Idle,
    /// The other process; started by this program itself
    #[command(name = TARGET_SUBCOMMAND, hide = true)]
    Target,
}

fn path_names() -> clap::builder::PossibleValuesParser {
    let paths = Path::value_variants().iter();
    let mut names: Vec<_> = paths.filter_map(Path::to_possible_value).collect();
    names.push(clap::builder::PossibleValue::new("all"));
    names.into()
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("KVTRANSFER_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    match cli.mode {
        Some(Mode::Target) => {
            target::run()?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Mode::Idle) => {
            for line in idle::measure()? {
                print_line(&line)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        None => measure(&cli),
    }
}

fn measure(cli: &Cli) -> anyhow::Result<ExitCode> {
    let paths: Vec<Path> = match cli.path.as_deref() {
        None | Some("all") => Path::SAME_HOST.to_vec(),
        Some("verbs") => return measure_verbs(cli),
        Some(name) => vec![Path::from_str(name, false).map_err(anyhow::Error::msg)?],
    };
    if cli.faults.is_some() || cli.restarts.is_some() {
        return provoke(cli, &paths);
    }
    let mut reports = Vec::new();
    let mut sound = true;
    for path in paths {
        let all = path.cases();
        let cases = if cli.case.is_empty() { all } else { &cli.case };
        for case in cases {
            match one(cli, *case, path) {
                Ok(report) => {
                    sound &= report.verified;
                    print_line(&report)?;
                    reports.push(report);
                }
                // One path that this host refuses leaves the others worth measuring.
                Err(error) => {
                    sound = false;
                    say(&format!("{case:?} over {path:?} failed: {error:#}"))?;
                }
            }
        }
    }
    if !cli.json {
        report::table(&reports, &mut io::stderr())?;
    }
    Ok(if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Freezes, kills and restarts.
fn provoke(cli: &Cli, paths: &[Path]) -> anyhow::Result<ExitCode> {
    let mut sound = true;
    for path in paths {
        let found = pair::faults::run(
            *path,
            cli.case.first().copied().unwrap_or(CaseName::Short16k),
            &cli.plan(),
            cli.faults.unwrap_or(0),
            cli.restarts.unwrap_or(0),
        );
        let found = found.with_context(|| format!("over {path:?}"))?;
        sound &= found.is_sound();
        print_line(&found)?;
    }
    Ok(if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn measure_verbs(cli: &Cli) -> anyhow::Result<ExitCode> {
    let ends = verbs::ends(&cli.rdma_devices, cli.rdma_connector.as_deref())?;
    let all = Path::Verbs.cases();
    let cases = if cli.case.is_empty() { all } else { &cli.case };
    let mut reports = Vec::new();
    for case in cases {
        let report = verbs::measure(*case, cli.extent(), &ends, &cli.tuning);
        let report = report.with_context(|| format!("{case:?} over verbs"))?;
        print_line(&report)?;
        reports.push(report);
    }
    if !cli.json {
        verbs::table(&reports, &mut io::stderr())?;
    }
    // A missed goal is a figure; a wrong byte is a failure.
    Ok(if reports.iter().all(|report| report.verified) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn one(cli: &Cli, name: CaseName, path: Path) -> anyhow::Result<Report> {
    let plan = cli.plan();
    let machine = Machine::here();
    let case = Case::new(name, plan.extent);
    let mut pair = Pair::start(case, path, plan.clone())?;
    let warm_up = pair.round(0)?;
    let mut rounds = Vec::with_capacity(plan.extent.rounds);
    for number in 1..=plan.extent.rounds {
        let round = pair.round(number)?;
        let micros = |pass: &pair::Pass| pass.nanos.iter().sum::<u64>() / 1000;
        say(&format!(
            "{name:?} over {path:?}, round {number} of {}: {} us, plain {} us",
            plan.extent.rounds,
            micros(&round.ours),
            micros(&round.reference)
        ))?;
        rounds.push(round);
    }
    Report::new(
        &pair.case,
        path,
        &plan,
        &pair.path_reason,
        machine,
        (&warm_up, &rounds),
    )
}

fn print_line(line: &impl Serialize) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, line)?;
    writeln!(stdout)?;
    Ok(())
}

/// A line of progress.
fn say(line: &str) -> io::Result<()> {
    writeln!(io::stderr(), "{line}")
}
