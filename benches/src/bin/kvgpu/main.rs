//! `kvgpu`: what this host's GPU does with our kernels, our mappings of another process's memory and our exports, beside
//! the plain copies of the same bytes in the same run.
//!
//! Every subcommand prints its table last, or one JSON object per row with `--json`. Wrong bytes anywhere make the exit
//! status 1.

mod data;
mod event;
mod facts;
mod heads;
mod ipc;
mod kernels;
mod measure;
mod ranks;
mod staging;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Proofs on a real GPU.
#[derive(Debug, Parser)]
#[command(name = "kvgpu", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// The GPU, as this process counts them.
    #[arg(long, global = true, default_value_t = 0)]
    gpu: u32,
    /// One JSON object per row instead of a table.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What the driver says of the GPU and of each kind of memory, and whether it is exported.
    Facts,
    /// Every kernel against its twin on the CPU: random bytes, poisoned targets.
    Verify(verify::Options),
    /// Copies by lists against a plain device copy, by page size, blocks and kind of kernel.
    Kernels(kernels::Options),
    /// Copies out of another process's memory.
    Ipc(ipc::Options),
    /// Rooms between ranks of unequal tensor-parallel size.
    Heads(heads::Options),
    /// Rooms pushed behind an event of a stream that is late.
    Event(event::Options),
    /// Staging without a wire, and engines that share a process.
    Staging(staging::Options),
    /// The other process of `heads` and `event`.
    #[command(hide = true)]
    HeadsReceiver(heads::ReceiverOptions),
    /// The other process of `ipc`.
    #[command(hide = true)]
    IpcReceiver(ipc::ReceiverOptions),
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let table = match cli.command {
        Command::Facts => facts::run(cli.gpu)?,
        Command::Verify(options) => verify::run(cli.gpu, &options)?,
        Command::Kernels(options) => kernels::run(cli.gpu, &options)?,
        Command::Ipc(options) => ipc::run(cli.gpu, &options)?,
        Command::Heads(options) => heads::run(cli.gpu, &options)?,
        Command::Event(options) => event::run(cli.gpu, &options)?,
        Command::Staging(options) => staging::run(cli.gpu, &options)?,
        Command::HeadsReceiver(options) => {
            heads::receive(cli.gpu, &options)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::IpcReceiver(options) => {
            ipc::receive(cli.gpu, &options)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    print(&table.shown(cli.json));
    Ok(if table.is_right() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[expect(
    clippy::print_stdout,
    reason = "a command's result goes to standard output"
)]
fn print(text: &str) {
    print!("{text}");
}
