//! The command line of `kvrouter simulate`.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Parser;
use serde::Serialize;

use super::outcome::{self, Outcome};
use super::plot;
use super::scenario::Scenario;
use super::trace::{self, Arrival, Made};
use super::world;
use crate::schedule::Policy;

/// Largest trace file, unpacked: room for two million requests.
const TRACE_BYTES_MAX: u64 = 4 << 30;

const EXAMPLE: &str = "\
Examples:

  kvrouter simulate --scenario router/scenarios/G4.toml --trace synthetic:requests=5000 \\
    --policy fused,least_tokens,round_robin
  kvrouter simulate --scenario router/scenarios/H4.toml --trace conversation_trace.jsonl.gz \\
    --policy fused,least_tokens --out results --json

A trace has one JSON object per line: timestamp (ms), input_length, output_length, hash_ids (Mooncake's format),
also packed with gzip. A made-up one is described as synthetic:requests=…,rate=…,input=…,input_sigma=…,output=…,
output_sigma=…,input_max=…; what is left out is as in Mooncake's conversation trace.";

/// Replays a trace against a fleet that exists only as arithmetic, with the router's own policies.
#[derive(Debug, Parser)]
#[command(name = "kvrouter simulate", after_help = EXAMPLE)]
pub struct Arguments {
    /// A trace file (.jsonl, .jsonl.gz), or synthetic:… for a made-up one.
    #[arg(long, value_name = "FILE|synthetic:…", default_value = "synthetic:")]
    trace: String,
    /// The fleet, a TOML file.
    #[arg(long, value_name = "FILE")]
    scenario: PathBuf,
    /// Policies to compare, with commas between.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "fused,least_tokens,topology,round_robin"
    )]
    policy: Vec<Policy>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// A directory for SCENARIO.json and SCENARIO.svg.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Seed of all chance.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Arrivals come so many times faster, besides the scenario's own load.
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Use only the first so many requests.
    #[arg(long, value_name = "COUNT")]
    requests: Option<usize>,
}

#[derive(Serialize)]
struct Report<'a> {
    scenario: &'a str,
    trace: &'a str,
    seed: u64,
    speed: f64,
    requests: usize,
    policies: serde_json::Map<String, serde_json::Value>,
}

/// Does what the arguments say; the first one is the program's name. Help and mistakes in them end the process.
///
/// # Errors
/// When a file cannot be read, understood or written.
pub fn main_from_args(
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> anyhow::Result<()> {
    let arguments = Arguments::try_parse_from(args).unwrap_or_else(|error| error.exit());
    run(
        &arguments,
        &mut io::stdout().lock(),
        &mut io::stderr().lock(),
    )
}

/// Simulates, with results to `out` and progress to `progress`.
///
/// # Errors
/// When a file cannot be read, understood or written.
pub fn run(
    arguments: &Arguments,
    out: &mut dyn Write,
    progress: &mut dyn Write,
) -> anyhow::Result<()> {
    if !(arguments.speed.is_finite() && arguments.speed > 0.0) {
        bail!("--speed must be above 0");
    }
    let path = &arguments.scenario;
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut scenario =
        Scenario::from_toml(&text).with_context(|| format!("cannot use {}", path.display()))?;
    scenario.load *= arguments.speed;
    let mut arrivals = arrivals(&arguments.trace, arguments.seed)?;
    arrivals.truncate(arguments.requests.unwrap_or(usize::MAX));
    let mut outcomes: Vec<(&str, Outcome)> = Vec::new();
    for policy in &arguments.policy {
        let name = policy.name();
        let mut shown = 0;
        let outcome = world::run(&scenario, &arrivals, *policy, arguments.seed, &mut |done| {
            let percent = done * 100 / arrivals.len().max(1);
            if percent >= shown + 10 {
                shown = percent;
                // Progress is a courtesy; a closed stderr must not end a long run.
                drop(writeln!(progress, "{name}: {percent} %"));
            }
        });
        outcomes.push((name, outcome));
    }
    let name = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("scenario");
    let json = report(arguments, name, arrivals.len(), &outcomes)?;
    if arguments.json {
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "{name}: {}", scenario.description)?;
        write!(out, "{}", outcome::table(&outcomes))?;
    }
    if let Some(dir) = &arguments.out {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        store(&dir.join(format!("{name}.json")), &json)?;
        store(
            &dir.join(format!("{name}.svg")),
            &plot::svg(name, &outcomes),
        )?;
    }
    Ok(())
}

fn store(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn report(
    arguments: &Arguments,
    scenario: &str,
    requests: usize,
    outcomes: &[(&str, Outcome)],
) -> anyhow::Result<String> {
    let mut policies = serde_json::Map::new();
    for (name, outcome) in outcomes {
        policies.insert((*name).to_owned(), serde_json::to_value(outcome)?);
    }
    let report = Report {
        scenario,
        trace: &arguments.trace,
        seed: arguments.seed,
        speed: arguments.speed,
        requests,
        policies,
    };
    Ok(serde_json::to_string_pretty(&report)?)
}

fn arrivals(name: &str, seed: u64) -> anyhow::Result<Vec<Arrival>> {
    if let Some(spec) = name.strip_prefix("synthetic:") {
        return Ok(Made::parse(spec)?.arrivals(seed));
    }
    let file = File::open(name).with_context(|| format!("cannot open {name}"))?;
    let mut text = String::new();
    let packed = Path::new(name)
        .extension()
        .is_some_and(|ending| ending == "gz");
    let reader: Box<dyn Read> = if packed {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };
    reader
        .take(TRACE_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {name}"))?;
    trace::read(&text, seed).with_context(|| format!("cannot use {name}"))
}
