//! The `kvrouter` command; see `kvrouter --help`.
#![forbid(unsafe_code)]

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    kvrouter::main_from_args(std::env::args_os())
}
