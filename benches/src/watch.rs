//! A transfer whose end somebody waits for while this process goes on, or is stopped, and what the pages held at the end.
#![forbid(unsafe_code)]

use std::{
    fs,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use kvtransfer::{clock, engine::Transfer, memory::Region, time::Time};

use crate::{
    case::Case,
    data::{self, Side},
    gpu::GpuMemory,
    protocol::Resources,
};

/// Far more than any watched transfer may take: whoever needs it has not been told at all.
const UNTOLD: Duration = Duration::from_secs(20);

/// The target blocks of a case, wherever the engine has them.
#[derive(Clone)]
pub(crate) struct Blocks {
    pub(crate) case: Case,
    pub(crate) region: Arc<Region>,
    pub(crate) gpu: Option<Arc<GpuMemory>>,
}

impl Blocks {
    /// A checksum of each.
    pub(crate) fn sums(&self) -> anyhow::Result<Vec<u64>> {
        if let Some(gpu) = &self.gpu {
            gpu.store()?;
        }
        data::checksums(&self.region, &self.case, Side::Target)
    }
}

/// How a watched transfer ended.
pub(crate) struct Ended {
    /// Why it failed.
    pub(crate) error: Option<String>,
    /// From its opening.
    pub(crate) millis: u64,
    /// Of the blocks when its end was told; empty where the blocks are not this side's to receive.
    pub(crate) sums: Vec<u64>,
}

/// A thread that waits for an end.
pub(crate) struct Watch(JoinHandle<anyhow::Result<Ended>>);

impl Watch {
    /// Waits for the end of a transfer that was opened at `begun`, and looks at the blocks at once.
    pub(crate) fn start(transfer: Transfer, begun: Time, blocks: Option<Blocks>) -> Self {
        Self(thread::spawn(move || {
            let result = transfer.wait(UNTOLD);
            let millis = clock::now().since(begun).as_millis();
            let error = match result {
                Some(Ok(_)) => None,
                Some(Err(error)) => Some(error.to_string()),
                None => Some("nobody was told".to_owned()),
            };
            let sums = blocks.as_ref().map(Blocks::sums).transpose()?;
            Ok(Ended {
                error,
                millis: u64::try_from(millis)?,
                sums: sums.unwrap_or_default(),
            })
        }))
    }

    pub(crate) fn end(self) -> anyhow::Result<Ended> {
        let ended = self.0.join();
        ended.map_err(|_| anyhow::anyhow!("the watching thread died"))?
    }
}

impl Resources {
    /// Of this process.
    pub(crate) fn here(gpu: Option<&GpuMemory>) -> anyhow::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
            number.unwrap_or(0_u64)
        };
        let maps = fs::read_to_string("/proc/self/maps").context("reading the mappings")?;
        Ok(Self {
            descriptors: fs::read_dir("/proc/self/fd")?.count(),
            mappings: maps.lines().count(),
            pinned_kib: kib("VmPin:") + kib("VmLck:"),
            gpu_free_mib: gpu.map(GpuMemory::free_mib).transpose()?,
        })
    }
}
