//! What processes used so far, from `/proc`.
#![forbid(unsafe_code)]

use std::fs;
use std::time::Duration;

use anyhow::Context as _;

/// What a process and those that it started used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// User and system time of all threads, to 10 ms.
    pub(crate) cpu: Duration,
    /// Resident memory in bytes.
    pub(crate) resident: u64,
}

/// What `pid` and its children used so far.
pub(crate) fn of_tree(pid: u32) -> anyhow::Result<Usage> {
    let mut usage = of_one(pid)?;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let children = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
        for child in children.split_ascii_whitespace() {
            // One that has just ended is no longer there.
            if let Ok(theirs) = of_tree(child.parse()?) {
                usage.cpu += theirs.cpu;
                usage.resident += theirs.resident;
            }
        }
    }
    Ok(usage)
}

fn of_one(pid: u32) -> anyhow::Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in brackets, may hold anything.
    let (_, fields) = stat.rsplit_once(") ").context("/proc/PID/stat is odd")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let number = |at: usize| -> anyhow::Result<u64> {
        let text = fields.get(at).context("/proc/PID/stat is short")?;
        Ok(text.parse()?)
    };
    // Fields 14, 15 and 24 of proc(5); the first two were cut off.
    let ticks = number(11)? + number(12)?;
    Ok(Usage {
        cpu: Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64),
        resident: number(21)? * rustix::param::page_size() as u64,
    })
}

/// What the calling thread, and what it starts from now on, may run on; none: as it is.
pub(crate) fn run_on(cores: &[usize]) -> anyhow::Result<()> {
    if cores.is_empty() {
        return Ok(());
    }
    let mut set = rustix::thread::CpuSet::new();
    for core in cores {
        anyhow::ensure!(
            *core < rustix::thread::CpuSet::MAX_CPU,
            "there is no core {core}"
        );
        set.set(*core);
    }
    rustix::thread::sched_setaffinity(None, &set)
        .with_context(|| format!("cannot run on cores {cores:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_and_memory_are_seen() {
        let before = of_tree(std::process::id()).unwrap();
        let began = tokio::time::Instant::now();
        let mut memory = vec![1_u8; 64 << 20];
        while began.elapsed() < Duration::from_millis(100) {
            for page in memory.chunks_mut(4096) {
                page[0] = page[0].wrapping_mul(3);
            }
        }
        let after = of_tree(std::process::id()).unwrap();
        assert!(after.cpu > before.cpu, "{before:?} {after:?}");
        assert!(
            after.resident > before.resident + (32 << 20),
            "{before:?} {after:?}"
        );
    }
}
