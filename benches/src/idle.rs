//! What an engine that does nothing costs in memory.
#![forbid(unsafe_code)]

use std::{fs, sync::Arc};

use anyhow::Context as _;
use kvtransfer::{
    config::EngineConfig,
    engine::{Engine, Memory},
    memory::Region,
};
use serde::Serialize;

use crate::{
    case::{Case, CaseName, Extent},
    machine::Machine,
};

/// Most resident memory of an idle engine, without the region's own pages.
const GOAL_MIB: f64 = 32.0;

/// One line of output.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Idle {
    case: &'static str,
    region_bytes: usize,
    /// Whether the region's pages exist.
    touched: bool,
    /// Resident memory of the process.
    rss_mib: f64,
    /// Of that, the region's pages.
    region_mib: f64,
    /// The rest: program, runtime and engine.
    own_mib: f64,
    /// Resident memory before the engine was started.
    before_mib: f64,
    goal_mib: f64,
    reached: bool,
    machine: Machine,
}

/// Starts an engine over 1 GiB and reads its resident memory, before and after the region is touched.
pub(crate) fn measure() -> anyhow::Result<Vec<Idle>> {
    let extent = Extent {
        rounds: 1,
        seed: 0,
        tiny: false,
        mib: 1,
        samples: 100,
    };
    let case = Case::new(CaseName::One1Gib, extent);
    let before_mib = rss_mib()?;
    let region = Arc::new(Region::mmap(case.region_bytes())?);
    let mut memory = Memory::new();
    memory.add_shared(Arc::clone(&region));
    let mut config = EngineConfig::default();
    config.listen = Some("127.0.0.1:0".parse()?);
    let engine = Engine::start(config, memory, case.layout())?;
    let mut lines = Vec::new();
    for touched in [false, true] {
        if touched {
            region.fill(0, region.len(), 1)?;
        }
        let rss_mib = rss_mib()?;
        let region_mib = if touched { mib(region.len()) } else { 0.0 };
        let own_mib = rss_mib - region_mib;
        lines.push(Idle {
            case: "idle",
            region_bytes: region.len(),
            touched,
            rss_mib,
            region_mib,
            own_mib,
            before_mib,
            goal_mib: GOAL_MIB,
            reached: own_mib <= GOAL_MIB,
            machine: Machine::here(),
        });
    }
    engine.shut_down();
    Ok(lines)
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// `VmRSS` of this process (proc(5)).
fn rss_mib() -> anyhow::Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: f64 = kib.context("no VmRSS in the process's status")?.parse()?;
    Ok(kib / 1024.0)
}
