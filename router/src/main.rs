//! The `kvrouter` command; see `kvrouter --help`.
#![forbid(unsafe_code)]

fn main() -> anyhow::Result<()> {
    kvrouter::main_from_args(std::env::args_os())
}
