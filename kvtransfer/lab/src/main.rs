//! `cargo rdma-test`: kvtransfer's RDMA tests on any Debian machine, without RDMA hardware.
//!
//! The host half builds a small image out of the host's own programs and boots it under emulation; the guest half is
//! this same program, which makes software RDMA devices (siw for iWARP, rxe for RoCE) and runs the jobs on them.
#![forbid(unsafe_code)]

mod build;
mod clock;
mod guest;
mod image;
mod jobs;
mod kernel;
mod machine;
mod order;
mod packages;
mod plan;
mod protocol;
mod report;
mod run;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;

/// Run kvtransfer's RDMA tests in a virtual machine with software RDMA devices
///
/// Needs Debian 12 on x86-64. Missing packages are installed if this runs as root, otherwise the command to install
/// them is shown. The first run builds the siw driver for the kernel (about 35 s); later ones are at their first job
/// in 10 to 15 s, plus what cargo has to build.
#[derive(Debug, Parser)]
#[command(name = "rdma-test", bin_name = "cargo rdma-test", after_long_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Show the jobs and what they are for; run nothing
    #[arg(long)]
    list: bool,
    /// Run this job only; may be repeated, and takes the names of rdma_* test targets too
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Run only the jobs that show that the lab itself works
    #[arg(long, conflicts_with_all = ["only", "run"])]
    self_test: bool,
    /// Run this shell line in the guest instead of the jobs; may be repeated
    #[arg(long, value_name = "COMMAND", conflicts_with = "only")]
    run: Vec<String>,
    /// Put this file on the guest's PATH, with the libraries it needs; may be repeated
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
    /// Build this binary of the workspace and put it on the guest's PATH; may be repeated
    #[arg(long, value_name = "PACKAGE:BINARY")]
    build: Vec<String>,
    /// Build this test target of kvtransfer and put it on the guest's PATH; `lib` means the unit tests
    #[arg(long, value_name = "TARGET")]
    build_test: Vec<String>,
    /// Take programs from a build of `cargo test --workspace`, which has been made before
    #[arg(long)]
    as_tested: bool,
    /// Leave the image and the logs in their folder
    #[arg(long)]
    keep: bool,
    /// Seconds for everything in the machine; it is ended after that
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    limit: u64,
    /// Seconds for one `--run` command
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    run_limit: u64,
    #[command(subcommand)]
    inside: Option<Inside>,
}

/// What this program does inside the guest; nothing to call by hand.
#[derive(Debug, clap::Subcommand)]
enum Inside {
    /// The guest's half
    #[command(hide = true)]
    Guest,
    /// A server and its client
    #[command(hide = true)]
    Pair(guest::Pair),
}

const EXAMPLES: &str = "\
Examples:
  cargo rdma-test                                  everything; the last line counts passed, failed and skipped
  cargo rdma-test --list                           the jobs
  cargo rdma-test --only rdma_conformance          one job
  cargo rdma-test --run 'ibv_devinfo; rdma link'   try something in the guest
  cargo rdma-test --build-test lib --run 'kvtransfer-lib transport::verbs --ignored --nocapture'
  cargo rdma-test --with ./probe --run 'probe siw0 & probe rxe0; dmesg | tail'

In the guest: siw0 10.77.0.1 and siw1 10.77.1.1 (iWARP, connection manager only), rxe0 10.77.2.1 and rxe1 10.77.2.2
(RoCE v2, GID index 1, both ways of connecting). Any pair of one kind can talk, and each device with itself. The
environment has KVTRANSFER_RDMA_LAB=1; files that a job leaves in $LAB_OUT come back to the host. The exit code is 0
only if something ran, everything that ran passed, and everything named by --only ran.";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.inside {
        Some(Inside::Guest) => guest::run().map(|()| true),
        Some(Inside::Pair(pair)) => guest::run_pair(pair).map(|()| true),
        None => host(&arguments),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            show_error(&format!("rdma-test: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn host(arguments: &Arguments) -> Result<bool> {
    if arguments.list {
        show(&plan::listing()?);
        return Ok(true);
    }
    run::run(arguments)
}

/// A line about the lab itself.
pub(crate) fn say(line: &str) {
    show(&format!("lab: {line}"));
}

#[expect(clippy::print_stdout, reason = "this is what the command is for")]
pub(crate) fn show(line: &str) {
    println!("{line}");
}

#[expect(clippy::print_stderr, reason = "a command's errors go there")]
fn show_error(line: &str) {
    eprintln!("{line}");
}
