//! The `kvtransfer` command: runs the services of a deployment that belong to no engine.
mod cli;

fn main() -> anyhow::Result<std::process::ExitCode> {
    cli::run()
}
