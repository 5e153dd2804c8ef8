//! A small PD worker around a real transformer on the CPU: an OpenAI- and SGLang-speaking server whose KV cache is
//! paged, sharded and moved between processes like that of a large one.
//!
//! It exists to prove things without GPUs or downloads: its greedy output is equal, byte for byte, whether one
//! process serves a request or a prefill and a decode share it, at any chunk size, page size and TP size.
//!
//! * [`model`]: the transformer; [`text`]: its byte tokenizer.
//! * [`cache`]: the paged KV memory of all ranks, the page allocator and the prefix cache.
//! * [`pd`]: the seam to whatever moves KV between workers, and a loopback in one process.
//! * [`plane`]: the seam over real transfer engines, the bootstrap registry and telemetry.
//! * [`scheduler`]: the one thread that owns model and cache, and the mailbox in front of it.
//! * [`server`]: HTTP; [`settings`]: the command line.
//! * [`demo`]: a whole cluster of workers and a router, compared with one worker; [`client`]: its HTTP client.

pub mod cache;
pub mod client;
pub mod clock;
pub mod demo;
pub mod model;
pub mod pd;
pub mod plane;
pub mod scheduler;
pub mod server;
pub mod settings;
pub mod text;

use std::ffi::OsString;

/// Runs a worker with the command line `args` (the first is the program's name) until it is asked to stop.
///
/// # Errors
/// When the settings contradict themselves, an address cannot be bound, or this build lacks what a role needs.
pub fn main_from_args(args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    settings::run(args)
}
