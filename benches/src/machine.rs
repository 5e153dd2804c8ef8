//! What this machine is, beside every figure of `kvbench` and `kvroutebench`.
#![forbid(unsafe_code)]

use std::{fs, thread};

use serde::Serialize;

/// What the figures were measured on.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    /// Transparent huge pages: which of `always`, `madvise`, `never`.
    huge_pages: String,
    /// Runnable threads over the last minute, before the case or the run: how shared the machine was.
    load: f64,
}

impl Machine {
    pub(crate) fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        let cpu = cpus.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_owned())
        });
        let pages = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let chosen = pages.split(['[', ']']).nth(1);
        let load = read("/proc/loadavg");
        let load = load.split(' ').next().and_then(|word| word.parse().ok());
        Self {
            cpu: cpu.unwrap_or_else(|| "unknown".into()),
            cores: thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            huge_pages: chosen.unwrap_or("unknown").to_owned(),
            load: load.unwrap_or(f64::NAN),
        }
    }
}
