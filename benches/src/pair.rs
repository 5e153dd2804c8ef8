//! The initiator: one case over one path, ours and the plain reference in turns, between the same two processes.
#![forbid(unsafe_code)]

pub(crate) mod faults;

use std::sync::Arc;

use anyhow::Context as _;
use kvtransfer::{
    clock,
    config::EngineConfig,
    engine::{Engine, Memory, RailCounts},
    ids::Room,
    memory::Region,
    transfer::{Chunk, SendRequest},
};

use crate::{
    case::{Block, Case, Extent},
    child::TargetProcess,
    data::{self, Side},
    gpu::{Gpu, GpuMemory},
    protocol::{Answer, Command, Path, Rdma, ReferenceAddress, ReferenceKind, Setup, Tuning},
    raw,
    reference::{self, Sender, Waiting},
    target::TRANSFER_MAX,
};

/// What was asked for on the command line.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) extent: Extent,
    pub(crate) lanes: u8,
    /// The initiator's use of RDMA and the target's.
    pub(crate) rdma: Option<[Rdma; 2]>,
    /// Where the initiator engine's memory lies, and the target's, if not in the host's.
    pub(crate) gpu: Option<[Gpu; 2]>,
    pub(crate) tuning: Tuning,
}

/// What one pass over all transfers of a case took.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pass {
    /// Nanoseconds per transfer.
    pub(crate) nanos: Vec<u64>,
    /// Processor seconds of both processes.
    pub(crate) cpu_seconds: f64,
    /// Blocks whose checksum was wrong at the target.
    pub(crate) wrong: usize,
}

/// One round: the passes lie next to each other in time, so a busy machine slows all of them.
#[derive(Clone, Debug)]
pub(crate) struct Round {
    pub(crate) ours: Pass,
    pub(crate) reference: Pass,
    /// Nanoseconds that one thread of the initiator needs to copy the same blocks.
    pub(crate) memcpy_nanos: u64,
}

/// The initiator's side of a case.
pub(crate) struct Pair {
    // Dropped first: the child must not see the engine go before it.
    target: TargetProcess,
    pub(crate) case: Case,
    path: Path,
    plan: Plan,
    source: Arc<Region>,
    /// Where the memcpy figure copies to.
    scratch: Region,
    engine: Engine,
    /// Dropped after the engine, which uses it.
    gpu: Option<Arc<GpuMemory>>,
    reference: Sender,
    next_room: u64,
    pub(crate) path_reason: String,
}

impl Pair {
    /// Starts the child and connects everything.
    pub(crate) fn start(case: Case, path: Path, plan: Plan) -> anyhow::Result<Self> {
        let source = Arc::new(Region::mmap(case.region_bytes())?);
        let scratch = Region::mmap(case.region_bytes())?;
        let mut memory = Memory::new();
        let gpu = plan.gpu.map(|[gpu, _]| GpuMemory::new(gpu, &source));
        let gpu = gpu.transpose()?.map(Arc::new);
        let used = gpu.as_deref().map_or(&source, GpuMemory::region);
        memory.add_shared(Arc::clone(used));
        let mut config = EngineConfig::default();
        config.listen = Some("127.0.0.1:0".parse()?);
        config.same_host = path.same_host(plan.gpu.is_some_and(|[gpu, _]| gpu.refuses));
        if let Some([rdma, _]) = &plan.rdma {
            config.rdma = rdma.config();
        }
        plan.tuning.apply(&mut config);
        let engine = Engine::start(config, memory, case.layout())?;
        let kind = path.reference(case.name);
        let waiting = Waiting::new(kind)?;
        let target = TargetProcess::start()?;
        let mut pair = Self {
            reference: Sender::new(kind, None, &case, &source),
            target,
            case,
            path,
            plan,
            source,
            gpu,
            scratch,
            engine,
            next_room: 1,
            path_reason: String::new(),
        };
        pair.connect_target(waiting.address()?)?;
        pair.reference = Sender::new(kind, waiting.accept()?, &pair.case, &pair.source);
        Ok(pair)
    }

    /// Tells the target process what to do and sees to it that its engine takes the path.
    fn connect_target(&mut self, reference: Option<ReferenceAddress>) -> anyhow::Result<()> {
        let (plan, path) = (&self.plan, self.path);
        let setup = Setup {
            case: self.case.name,
            path,
            extent: plan.extent,
            lanes: plan.lanes,
            rdma: plan.rdma.as_ref().map(|[_, rdma]| rdma.clone()),
            gpu: plan.gpu.map(|[_, gpu]| gpu),
            tuning: plan.tuning.clone(),
            engine: self.engine.local_addr().context("the engine listens")?,
            reference,
            source_pid: std::process::id(),
            source_base: self.source.base_address(),
        };
        let connected = self.target.ask(&Command::Setup(Box::new(setup)))?;
        let Answer::Connected { path: got, reason } = connected else {
            anyhow::bail!("an unexpected answer: {connected:?}");
        };
        let wanted = path.engine_name(plan.gpu.is_some());
        anyhow::ensure!(
            got == wanted,
            "the engines take {got} instead of {wanted}: {reason}"
        );
        self.path_reason = reason;
        Ok(())
    }

    /// Fresh data, then both passes, each into poisoned blocks and checked. They take turns in going first.
    pub(crate) fn round(&mut self, number: usize) -> anyhow::Result<Round> {
        let seed = self.plan.extent.seed.wrapping_add(1 + number as u64);
        data::fill(&self.source, &self.case, seed)?;
        let sums = data::checksums(&self.source, &self.case, Side::Source)?;
        let (ours, (reference, memcpy_nanos)) = if number.is_multiple_of(2) {
            let ours = self.ours(&sums)?;
            (ours, self.both_references(&sums)?)
        } else {
            let references = self.both_references(&sums)?;
            (self.ours(&sums)?, references)
        };
        Ok(Round {
            ours,
            reference,
            memcpy_nanos,
        })
    }

    /// Fresh data, then our pass alone.
    pub(crate) fn ours_alone(&mut self, number: usize) -> anyhow::Result<Pass> {
        let seed = self.plan.extent.seed.wrapping_add(1 + number as u64);
        data::fill(&self.source, &self.case, seed)?;
        let sums = data::checksums(&self.source, &self.case, Side::Source)?;
        self.ours(&sums)
    }

    /// What the initiator's RDMA device was asked to do so far.
    pub(crate) fn rail_counts(&self) -> RailCounts {
        self.engine
            .rail_counts()
            .into_iter()
            .next()
            .unwrap_or_default()
    }

    fn both_references(&mut self, sums: &[u64]) -> anyhow::Result<(Pass, u64)> {
        let memcpy = self.memcpy(sums)?;
        let memcpy_nanos = memcpy.nanos.iter().sum();
        if self.path.reference(self.case.name) == ReferenceKind::Memcpy {
            return Ok((memcpy, memcpy_nanos));
        }
        Ok((self.reference(sums)?, memcpy_nanos))
    }

    /// Our engine: grants are in before the clock starts; a sample goes from the push to the last acknowledgement.
    fn ours(&mut self, sums: &[u64]) -> anyhow::Result<Pass> {
        if let Some(gpu) = &self.gpu {
            gpu.load()?;
        }
        self.target.ask(&Command::Poison)?;
        let first_room = self.next_room;
        let transfers = self.case.transfers();
        self.next_room += transfers as u64;
        self.target.ask(&Command::Grant { first_room })?;
        let mut rooms = Vec::with_capacity(transfers);
        for transfer in 0..transfers {
            let room = Room::new(first_room + transfer as u64).context("rooms count from 1")?;
            let timeout = TRANSFER_MAX;
            let sending = self.engine.send(&SendRequest { room, timeout })?;
            sending.wait_ready(TRANSFER_MAX)?;
            let chunk = Chunk {
                items: vec![self.case.source_items(transfer)],
                last: true,
            };
            rooms.push((sending, chunk));
        }
        let expected = self.case.transfer_bytes() as u64;
        let mut nanos = Vec::with_capacity(transfers);
        let cpu_before = self.cpu_seconds()?;
        for (sending, chunk) in &rooms {
            let start = clock::now();
            sending.push(chunk)?;
            let ended = sending.wait(TRANSFER_MAX);
            nanos.push(clock::now().nanos() - start.nanos());
            let sent = ended.context("a room did not end by its deadline")??.bytes;
            anyhow::ensure!(
                sent == expected,
                "a room of {expected} bytes ended with {sent}"
            );
        }
        self.target.ask(&Command::Await)?;
        let cpu_seconds = self.cpu_seconds()? - cpu_before;
        let wrong = self.check(sums)?;
        Ok(Pass {
            nanos,
            cpu_seconds,
            wrong,
        })
    }

    fn reference(&mut self, sums: &[u64]) -> anyhow::Result<Pass> {
        self.target.ask(&Command::Poison)?;
        let mut nanos = Vec::with_capacity(self.case.transfers());
        let cpu_before = self.cpu_seconds()?;
        self.target.tell(&Command::Reference)?;
        self.reference.wait_ready()?;
        for transfer in 0..self.case.transfers() {
            let start = clock::now();
            self.reference.transfer(transfer)?;
            nanos.push(clock::now().nanos() - start.nanos());
        }
        self.target.answer()?;
        let cpu_seconds = self.cpu_seconds()? - cpu_before;
        let wrong = self.check(sums)?;
        Ok(Pass {
            nanos,
            cpu_seconds,
            wrong,
        })
    }

    fn memcpy(&self, sums: &[u64]) -> anyhow::Result<Pass> {
        data::poison(&self.scratch, &self.case)?;
        let len = self.case.block_bytes;
        let transfers = 0..self.case.transfers();
        let blocks: Vec<Vec<Block>> = transfers
            .map(|transfer| self.case.blocks(transfer).collect())
            .collect();
        let mut nanos = Vec::with_capacity(blocks.len());
        let cpu_before = raw::cpu_seconds();
        for blocks in &blocks {
            let start = clock::now();
            reference::copy(&self.source, &self.scratch, blocks, len);
            nanos.push(clock::now().nanos() - start.nanos());
        }
        let cpu_seconds = raw::cpu_seconds() - cpu_before;
        let found = data::checksums(&self.scratch, &self.case, Side::Target)?;
        let wrong = found.iter().zip(sums).filter(|(a, b)| a != b).count();
        Ok(Pass {
            nanos,
            cpu_seconds,
            wrong,
        })
    }

    fn check(&mut self, sums: &[u64]) -> anyhow::Result<usize> {
        let sums = sums.to_vec();
        match self.target.ask(&Command::Check { sums })? {
            Answer::Checked { wrong } => Ok(wrong),
            other => anyhow::bail!("an unexpected answer: {other:?}"),
        }
    }

    /// Processor seconds of both processes so far.
    fn cpu_seconds(&mut self) -> anyhow::Result<f64> {
        Ok(self.target.cpu_seconds()? + raw::cpu_seconds())
    }
}
