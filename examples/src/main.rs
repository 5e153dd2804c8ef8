//! The worker as a program; see the library `kvworker`.

fn main() -> anyhow::Result<()> {
    kvworker::main_from_args(std::env::args_os())
}
