//! `kvroutebench`: what kvrouter costs, beside other routers and beside no router at all.
//!
//! One process pretends to be two prefill and two decode workers, this one is the client, and the routers between them
//! take turns. The figure to read is the router's processor time per request: it survives a busy machine.

mod cases;
mod client;
mod http;
#[path = "../../machine.rs"]
mod machine;
mod relay;
mod report;
mod routers;
mod usage;
mod worker;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum as _};

use crate::cases::{Case, Figures, Size};
use crate::machine::Machine;
use crate::report::{Report, Row, Scheduler};
use crate::routers::{Process, Program, Running, Who};
use crate::worker::Addresses;

/// How the program starts itself as the workers.
const WORKER_SUBCOMMAND: &str = "worker";

/// And as the relay.
const RELAY_SUBCOMMAND: &str = "relay";

/// File descriptors that a router needs besides two per stream: kvrouter keeps 512 idle connections to each prefill worker.
const DESCRIPTORS_SPARE: u64 = 1200;

/// Requests of a rival's soak, as a share of ours: they are slower.
const RIVALS_SOAK_SHARE: u64 = 20;

/// Measures routers between pretended workers and this client, in turns.
///
/// Prints one JSON object on stdout and a table on stderr. The exit status is 1 if an answer of kvrouter's was wrong or
/// a request did not reach a pair; a missed goal is a figure.
#[derive(Debug, Parser)]
#[command(name = "kvroutebench", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    mode: Option<Mode>,
    /// kvrouter's binary
    #[arg(long, value_name = "FILE", required = true)]
    kvrouter: Option<PathBuf>,
    /// A Python with sglang-router installed
    #[arg(long, value_name = "FILE")]
    sglang_router: Option<PathBuf>,
    /// A Python with smg installed
    #[arg(long, value_name = "FILE")]
    smg: Option<PathBuf>,
    /// Case to measure; may be repeated [default: all]
    #[arg(long, value_enum)]
    case: Vec<Case>,
    /// Rounds of each case; figures are medians over them
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Share of the requests of each round
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Requests of the soak; of a rival's a twentieth
    #[arg(long, default_value_t = 1_000_000)]
    soak: u64,
    /// Streams at one time; fewer where the limit on file descriptors is lower
    #[arg(long, default_value_t = 10_000)]
    streams: usize,
    /// Cores for routers (`many` takes those of the load too)
    #[arg(long, value_delimiter = ',', default_value = "0")]
    router_cores: Vec<usize>,
    /// Cores for the workers and the client
    #[arg(long, value_delimiter = ',', default_value = "1")]
    load_cores: Vec<usize>,
    /// Criterion's folder, if `cargo bench -p kvrouter --bench decision` has been run: its goals are judged too
    #[arg(long, value_name = "FOLDER")]
    criterion: Option<PathBuf>,
    /// Where what the routers say goes
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    logs: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// The workers; started by this program itself
    #[command(name = WORKER_SUBCOMMAND, hide = true)]
    Worker,
    /// A relay that looks at nothing; started by this program itself
    #[command(name = RELAY_SUBCOMMAND, hide = true)]
    Relay {
        /// Where it listens
        port: u16,
        /// Where connections go
        worker: SocketAddr,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.mode {
        Some(Mode::Worker) => {
            worker::run()?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Mode::Relay { port, worker }) => {
            relay::run(port, worker)?;
            return Ok(ExitCode::SUCCESS);
        }
        None => {}
    }
    let machine = Machine::here();
    let wanted = u64::try_from(cli.streams)? * 2 + DESCRIPTORS_SPARE;
    let descriptors = raise_descriptors(wanted)?;
    usage::run_on(&cli.load_cores)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(Bench::start(cli, descriptors)?.run(machine))?;
    writeln!(
        std::io::stdout(),
        "{}",
        serde_json::to_string_pretty(&report)?
    )?;
    say(&report.table());
    Ok(if report.errors() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn say(text: &str) {
    // Without a reader there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Takes as many file descriptors as this process may have, or `wanted` where the privileged may have more; its children
/// inherit the limit.
fn raise_descriptors(wanted: u64) -> anyhow::Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let set = |limit| {
        let limits = Rlimit {
            current: limit,
            maximum: limit,
        };
        setrlimit(Resource::Nofile, limits)
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    if maximum.is_some_and(|maximum| maximum < wanted) && set(Some(wanted)).is_ok() {
        return Ok(wanted);
    }
    set(maximum)?;
    Ok(maximum.unwrap_or(u64::MAX))
}

struct Bench {
    cli: Cli,
    size: Size,
    programs: Vec<Program>,
    workers: Addresses,
    _worker_process: Process,
}

impl Bench {
    fn start(cli: Cli, descriptors: u64) -> anyhow::Result<Self> {
        let relay = Some(std::env::current_exe()?);
        let programs = [
            (Who::Relay, &relay),
            (Who::Ours, &cli.kvrouter),
            (Who::Sglang, &cli.sglang_router),
            (Who::Smg, &cli.smg),
        ];
        let programs = programs.into_iter().filter_map(|(who, path)| {
            let path = path.clone()?;
            Some(Program { who, path })
        });
        let most = usize::try_from(descriptors.saturating_sub(DESCRIPTORS_SPARE) / 2)?;
        if most < cli.streams {
            say(&format!(
                "{descriptors} file descriptors are enough for {most} streams only"
            ));
        }
        let size = Size {
            scale: cli.scale,
            soak: cli.soak,
            streams: cli.streams.min(most),
        };
        let (worker_process, workers) = routers::start_workers()?;
        Ok(Self {
            size,
            programs: programs.collect(),
            workers,
            _worker_process: worker_process,
            cli,
        })
    }

    async fn run(self, machine: Machine) -> anyhow::Result<Report> {
        let scheduler = self.cli.criterion.as_deref().map(Scheduler::read);
        let scheduler = scheduler.transpose()?;
        let cases = match self.cli.case.as_slice() {
            [] => Case::value_variants(),
            some => some,
        };
        let (alone, together): (Vec<Case>, Vec<Case>) =
            cases.iter().partition(|case| case.wants_fresh_router());
        let mut rows = Vec::new();
        if !together.is_empty() {
            rows = self.take_turns(&together).await?;
        }
        for case in alone {
            rows.extend(self.one_by_one(case).await?);
        }
        let counts = routers::counts(&self.workers).await?;
        let routed = rows.iter().filter(|row| row.who.pairs());
        let routed: u64 = routed.map(|row| row.median.answers).sum();
        let mut report = Report {
            machine,
            versions: self.programs.iter().filter_map(Program::version).collect(),
            router_cores: self.cli.router_cores.clone(),
            load_cores: self.cli.load_cores.clone(),
            rounds: self.cli.rounds.into(),
            size: self.size,
            paired: counts.paired,
            unpaired: counts.alone
                + counts.doubled
                + counts.roomless
                + routed.saturating_sub(counts.paired),
            scheduler,
            rows,
            goals: Vec::new(),
        };
        report.judge();
        Ok(report)
    }

    async fn start_router(&self, program: &Program, cores: &[usize]) -> anyhow::Result<Running> {
        let cores = (cores, self.cli.load_cores.as_slice());
        Running::start(program, &self.workers, cores, &self.cli.logs).await
    }

    /// All routers at once, each measured while the others rest, in an order that turns.
    async fn take_turns(&self, cases: &[Case]) -> anyhow::Result<Vec<Row>> {
        let mut routers = vec![Running::direct(&self.workers)];
        for program in &self.programs {
            routers.push(self.start_router(program, &self.cli.router_cores).await?);
        }
        let mut rows = Vec::new();
        for case in cases {
            let mut found: Vec<Vec<Figures>> = vec![Vec::new(); routers.len()];
            for round in 0..usize::from(self.cli.rounds) {
                for turn in 0..routers.len() {
                    let at = (round + turn) % routers.len();
                    let router = &routers[at];
                    if router.who == Who::Direct && !case.has_direct() {
                        continue;
                    }
                    say(&format!(
                        "{}: {}, round {}",
                        case.title(),
                        router.who.name(),
                        round + 1
                    ));
                    let figures = cases::measure(*case, router, self.size).await;
                    found[at]
                        .push(figures.with_context(|| format!("measuring {}", router.who.name()))?);
                }
            }
            let made = routers
                .iter()
                .zip(found)
                .filter(|(_, found)| !found.is_empty());
            rows.extend(made.map(|(router, found)| Row::new(router.who, *case, found)));
        }
        Ok(rows)
    }

    /// Each router by itself, newly started.
    async fn one_by_one(&self, case: Case) -> anyhow::Result<Vec<Row>> {
        let mut rows = Vec::new();
        let both: Vec<usize> = self
            .cli
            .router_cores
            .iter()
            .chain(&self.cli.load_cores)
            .copied()
            .collect();
        for program in &self.programs {
            let (mut size, is_ours) = (self.size, program.who == Who::Ours);
            if !program.who.pairs() || (case == Case::Many && !is_ours) {
                continue;
            }
            if !is_ours {
                size.soak /= RIVALS_SOAK_SHARE;
            }
            let cores = if case == Case::Many {
                &both
            } else {
                &self.cli.router_cores
            };
            let router = self.start_router(program, cores).await?;
            say(&format!("{}: {}", case.title(), program.who.name()));
            let figures = cases::measure(case, &router, size).await?;
            rows.push(Row::new(program.who, case, vec![figures]));
        }
        Ok(rows)
    }
}
