//! Command line: one subcommand per service.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

mod bootstrap;
mod doctor;

#[derive(Debug, Parser)]
#[command(
    name = "kvtransfer",
    version,
    about = "Services around KV-cache transfer for prefill/decode serving"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the bootstrap registry: where prefill ranks register and decode ranks look them up
    Bootstrap(bootstrap::Options),
    /// Say what this host offers for RDMA, what is wrong with it, and how to put it right
    Doctor(doctor::Options),
}

/// Parses the command line and runs it to its end.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("KVTRANSFER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match cli.command {
        Command::Bootstrap(options) => bootstrap::run(options).map(|()| ExitCode::SUCCESS),
        Command::Doctor(options) => doctor::run(&options),
    }
}
