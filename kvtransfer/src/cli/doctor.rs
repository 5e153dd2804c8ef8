//! `kvtransfer doctor`: what this host offers for RDMA, what is wrong with it, and how to put it right.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use clap::error::ErrorKind;
use kvtransfer::doctor::collect::{Host, collect};
use kvtransfer::doctor::engine;
use kvtransfer::doctor::exchange::{Caller, ExchangeError, Served};
use kvtransfer::doctor::findings::Finding;
use kvtransfer::doctor::rails::Rail;
use kvtransfer::doctor::report::{Report, devices_of, is_device_file};
use kvtransfer::doctor::steps;

const EXAMPLES: &str = "\
Examples:
  kvtransfer doctor
      Devices, limits, GPU paths and findings of this host.
  kvtransfer doctor --device erdma_0,erdma_1
      Fail if one of these cannot be used (SGLang's --disaggregation-ib-device).
  kvtransfer doctor --serve 0.0.0.0:8999      on one node, then on the other:
  kvtransfer doctor --peer node-a:8999
      Which path the two would use, why better ones are refused, and how fast it is.
  kvtransfer doctor --peer node-a:30100       (the port of a running engine)
      The same comparison with what that engine uses; nothing is measured.
  kvtransfer doctor --json > report.json
      The same for programs, and for a bug report.

Exit code: 0 nothing fails, 1 something does, 2 wrong usage.
A doctor that serves shows its report to everybody who can connect, and makes small queue pairs for
them: stop it when you are done.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Devices that must be usable: `a`, `a,b`, a JSON map per GPU, or a path to a file with one
    #[arg(long, value_name = "FILTER")]
    device: Option<String>,
    /// Another node's doctor: compare both hosts and measure the path; or an engine: only compare
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "serve")]
    peer: Option<String>,
    /// The token of the engine that --peer names, if it asks for one
    #[arg(long, value_name = "FILE", requires = "peer")]
    token_file: Option<PathBuf>,
    /// Answer other nodes' --peer at this address until stopped
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["json", "device"])]
    serve: Option<SocketAddr>,
    /// Look at the host below this directory (such as a debug pod's /host) instead of this one
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// Looks, judges and prints; or serves until a signal ends the process.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let host = match &options.root {
        Some(root) => Host::below(root),
        None => Host::this(),
    };
    let facts = collect(&host);
    if let Some(addr) = options.serve {
        let served =
            Served::bind(addr, &facts).with_context(|| format!("cannot serve at {addr}"))?;
        tracing::info!(local_addr = %served.local_addr()?, "doctor serves");
        served.run()?;
        return Ok(ExitCode::SUCCESS);
    }
    let wanted = options.device.as_deref().and_then(names);
    let wanted = wanted.as_deref();
    let mut report = Report::of(facts, wanted);
    if let Some(peer) = &options.peer {
        match Caller::connect(peer) {
            Ok(mut caller) => {
                let facts = caller.facts().clone();
                report.add_peer(peer, facts, wanted, |path, rails| {
                    caller.choose(path, rails);
                    steps::run(&steps::steps(path), |step| caller.perform(step))
                });
            }
            Err(ExchangeError::NoDoctor) => match engine::look(peer, &token(options)?) {
                Ok(face) => {
                    let is_wanted =
                        |rail: &&Rail| wanted.is_none_or(|names| names.contains(&rail.device));
                    let ours: Vec<Rail> = report.rails.iter().filter(is_wanted).cloned().collect();
                    report.findings.extend(engine::judge(peer, &face, &ours));
                }
                Err(error) => report.findings.push(unreachable(peer, &error)),
            },
            Err(error) => report.findings.push(unreachable(peer, &error)),
        }
    }
    let text = if options.json {
        report.json() + "\n"
    } else {
        report.text()
    };
    std::io::stdout().write_all(text.as_bytes())?;
    let code = if report.has_failed() { 1 } else { 0 };
    Ok(ExitCode::from(code))
}

/// The token of the engine that is looked at; empty if it asks for none.
fn token(options: &Options) -> anyhow::Result<String> {
    let Some(path) = &options.token_file else {
        return Ok(String::new());
    };
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// The names of a filter; a wrong one is wrong usage.
fn names(filter: &str) -> Option<Vec<String>> {
    let text = if is_device_file(filter) {
        std::fs::read_to_string(filter).map_err(|error| format!("cannot read {filter}: {error}"))
    } else {
        Ok(filter.to_owned())
    };
    match text.and_then(|text| devices_of(&text)) {
        Ok(names) => names,
        Err(why) => {
            clap::Error::raw(ErrorKind::ValueValidation, format!("--device: {why}\n")).exit()
        }
    }
}

fn unreachable(peer: &str, error: &ExchangeError) -> Finding {
    let what = format!("{peer} cannot be asked: {error}");
    let why = "without its report nobody can say which path the two hosts would use";
    let fix = "On that node: kvtransfer doctor --serve 0.0.0.0:PORT, with that TCP port open in security groups and \
               network policies.";
    Finding::fail("peer", what, why, fix)
}
