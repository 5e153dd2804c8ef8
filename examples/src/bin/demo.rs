//! The demo as a program; see the library's `demo` module.

fn main() -> std::process::ExitCode {
    kvworker::demo::main_from_args(std::env::args_os().collect())
}
