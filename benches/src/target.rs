//! The target process: it does what the initiator's lines say, and ends with its stdin.
#![forbid(unsafe_code)]

use std::{
    collections::VecDeque,
    io::{self, BufRead as _, Write as _},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use kvtransfer::{
    clock,
    config::EngineConfig,
    engine::{Engine, Memory, PeerInfo, Transfer},
    ids::Room,
    memory::Region,
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

use crate::{
    case::Case,
    data::{self, Side},
    gpu::GpuMemory,
    protocol::{Answer, Command, Resources, Setup},
    raw::{self, Signal},
    reference::{self, Receiver},
    watch::{Blocks, Watch},
};

/// How long a room may take, and the connection to the initiator.
pub(crate) const TRANSFER_MAX: Duration = Duration::from_secs(60);

/// Runs until stdin ends.
pub(crate) fn run() -> anyhow::Result<()> {
    raw::die_with_parent();
    let mut target: Option<Target> = None;
    for line in io::stdin().lock().lines() {
        let command = serde_json::from_str(&line?).context("reading a command")?;
        let answer = match (command, &mut target) {
            (Command::Setup(setup), _) => Target::start(&setup).map(|(started, info)| {
                target = Some(started);
                Answer::Connected {
                    path: info.path.to_owned(),
                    reason: info.path_reason,
                }
            }),
            (command, Some(target)) => target.obey(command),
            (_, None) => Err(anyhow::anyhow!("the first command must be the setup")),
        };
        let answer = answer.unwrap_or_else(|error| Answer::Failed {
            error: format!("{error:#}"),
        });
        let mut stdout = io::stdout().lock();
        serde_json::to_writer(&mut stdout, &answer)?;
        stdout.write_all(b"\n")?;
        stdout.flush()?;
    }
    Ok(())
}

/// Starts this side's engine and connects it to the initiator's.
fn start_engine(
    setup: &Setup,
    case: &Case,
    region: &Arc<Region>,
) -> anyhow::Result<(Engine, PeerInfo)> {
    let mut memory = Memory::new();
    memory.add_shared(Arc::clone(region));
    let mut config = EngineConfig::default();
    config.same_host = setup
        .path
        .same_host(setup.gpu.is_some_and(|gpu| gpu.refuses));
    config.lanes = setup.lanes;
    if let Some(rdma) = &setup.rdma {
        config.rdma = rdma.config();
    }
    setup.tuning.apply(&mut config);
    let engine = Engine::start(config, memory, case.layout())?;
    let info = engine.connect(setup.engine, TRANSFER_MAX)?;
    Ok((engine, info))
}

/// Stops the initiator, which is this process's parent, after a while and for a while.
fn freeze(after_micros: u64, millis: u64) {
    let parent = std::os::unix::process::parent_id();
    thread::spawn(move || {
        thread::sleep(Duration::from_micros(after_micros));
        let stopped = raw::signal(parent, Signal::Stop);
        thread::sleep(Duration::from_millis(millis));
        let continued = raw::signal(parent, Signal::Continue);
        if let Err(error) = stopped.and(continued) {
            tracing::error!(%error, "the initiator was not stopped");
        }
    });
}

struct Target {
    case: Case,
    region: Arc<Region>,
    engine: Engine,
    /// Dropped after the engine, which uses it.
    gpu: Option<Arc<GpuMemory>>,
    setup: Setup,
    watched: VecDeque<Watch>,
    /// Of the blocks when the watched transfer ended.
    at_end: Vec<u64>,
    /// Whether the GPU's bytes are what is to be checked.
    is_ours: bool,
    source: Source,
    receiver: Receiver,
    rooms: Vec<Transfer>,
}

impl Target {
    fn start(setup: &Setup) -> anyhow::Result<(Self, PeerInfo)> {
        let case = Case::new(setup.case, setup.extent);
        let region = Arc::new(Region::mmap(case.region_bytes())?);
        let gpu = setup.gpu.map(|gpu| GpuMemory::new(gpu, &region));
        let gpu = gpu.transpose()?.map(Arc::new);
        let used = gpu.as_deref().map_or(&region, GpuMemory::region);
        let (engine, info) = start_engine(setup, &case, used)?;
        let socket = setup.reference.as_ref().map(reference::connect);
        let receiver = Receiver::new(
            setup.path.reference(setup.case),
            socket.transpose().context("connecting the reference")?,
            &case,
            &region,
            (setup.source_pid, setup.source_base),
        );
        let target = Self {
            case,
            region,
            engine,
            gpu,
            setup: setup.clone(),
            watched: VecDeque::new(),
            at_end: Vec::new(),
            is_ours: false,
            source: Source {
                peer: info.peer,
                dummy: false,
            },
            receiver,
            rooms: Vec::new(),
        };
        Ok((target, info))
    }

    fn obey(&mut self, command: Command) -> anyhow::Result<Answer> {
        match command {
            Command::End => {
                let watched = self.watched.pop_front();
                let watched = watched.context("nothing is watched")?;
                let ended = watched.end()?;
                self.at_end = ended.sums;
                self.is_ours = true;
                Ok(Answer::Ended {
                    error: ended.error,
                    millis: ended.millis,
                })
            }
            Command::Late => {
                let now = self.blocks().sums()?;
                let wrong = now.iter().zip(&self.at_end).filter(|(a, b)| a != b).count();
                Ok(Answer::Checked { wrong })
            }
            Command::Check { sums } => {
                if let Some(gpu) = self.gpu.as_ref().filter(|_| self.is_ours) {
                    gpu.store()?;
                }
                let found = data::checksums(&self.region, &self.case, Side::Target)?;
                anyhow::ensure!(found.len() == sums.len(), "both sides count blocks alike");
                let wrong = found.iter().zip(&sums).filter(|(a, b)| a != b).count();
                Ok(Answer::Checked { wrong })
            }
            Command::Resources => Ok(Answer::Resources(Resources::here(self.gpu.as_deref())?)),
            Command::Usage => Ok(Answer::Usage {
                cpu_seconds: raw::cpu_seconds(),
            }),
            other => {
                self.perform(other)?;
                Ok(Answer::Done)
            }
        }
    }

    /// Commands that are answered by their being done.
    fn perform(&mut self, command: Command) -> anyhow::Result<()> {
        match command {
            Command::Poison => {
                data::poison(&self.region, &self.case)?;
                if let Some(gpu) = &self.gpu {
                    gpu.load()?;
                }
            }
            Command::Grant { first_room } => self.grant(first_room)?,
            Command::Await => {
                self.await_rooms()?;
                self.is_ours = true;
            }
            Command::Reference => {
                self.receiver.serve(&self.region)?;
                self.is_ours = false;
            }
            Command::GrantBriefly { room, millis } => {
                let blocks = self.blocks();
                self.grant_briefly(room, millis, Some(blocks))?;
            }
            Command::SendBack { room, millis } => self.send_back(room, millis)?,
            Command::GrantMany {
                room,
                count,
                millis,
            } => {
                for room in room..room + count {
                    self.grant_briefly(room, millis, None)?;
                }
            }
            Command::SendMany {
                room,
                count,
                millis,
            } => {
                for room in room..room + count {
                    self.send_back(room, millis)?;
                }
            }
            Command::Freeze {
                after_micros,
                millis,
            } => freeze(after_micros, millis),
            Command::Restart => self.restart()?,
            Command::Setup(_) => anyhow::bail!("already set up"),
            Command::End
            | Command::Late
            | Command::Check { .. }
            | Command::Resources
            | Command::Usage => anyhow::bail!("a question, which is answered elsewhere"),
        }
        Ok(())
    }

    fn grant(&mut self, first_room: u64) -> anyhow::Result<()> {
        for transfer in 0..self.case.transfers() {
            let request = ReceiveRequest {
                room: Room::new(first_room + transfer as u64).context("rooms count from 1")?,
                sources: vec![self.source],
                receivers_expected: 1,
                prefix_tokens: 0,
                items: vec![self.case.target_items(transfer)],
                timeout: TRANSFER_MAX,
            };
            self.rooms.push(self.engine.receive(&request)?);
        }
        Ok(())
    }

    fn blocks(&self) -> Blocks {
        Blocks {
            case: self.case.clone(),
            region: Arc::clone(&self.region),
            gpu: self.gpu.clone(),
        }
    }

    fn grant_briefly(
        &mut self,
        room: u64,
        millis: u64,
        blocks: Option<Blocks>,
    ) -> anyhow::Result<()> {
        let begun = clock::now();
        let request = ReceiveRequest {
            room: Room::new(room).context("rooms count from 1")?,
            sources: vec![self.source],
            receivers_expected: 1,
            prefix_tokens: 0,
            items: vec![self.case.target_items(0)],
            timeout: Duration::from_millis(millis),
        };
        let receiving = self.engine.receive(&request)?;
        let watch = Watch::start(receiving, begun, blocks);
        self.watched.push_back(watch);
        Ok(())
    }

    fn send_back(&mut self, room: u64, millis: u64) -> anyhow::Result<()> {
        let begun = clock::now();
        let timeout = Duration::from_millis(millis);
        let room = Room::new(room).context("rooms count from 1")?;
        let sending = self.engine.send(&SendRequest { room, timeout })?;
        sending.wait_ready(timeout)?;
        sending.push(&Chunk {
            items: vec![self.case.reversed().source_items(0)],
            last: true,
        })?;
        let watch = Watch::start(sending, begun, None);
        self.watched.push_back(watch);
        Ok(())
    }

    /// A new engine over the same memory, connected as the last one was.
    fn restart(&mut self) -> anyhow::Result<()> {
        // A watched transfer keeps the old engine alive.
        while let Some(watched) = self.watched.pop_front() {
            watched.end()?;
        }
        self.rooms.clear();
        let memory = self.gpu.as_deref().map_or(&self.region, GpuMemory::region);
        let (engine, info) = start_engine(&self.setup, &self.case, memory)?;
        self.engine = engine;
        self.source.peer = info.peer;
        Ok(())
    }

    fn await_rooms(&mut self) -> anyhow::Result<()> {
        let expected = self.case.transfer_bytes() as u64;
        for room in self.rooms.drain(..) {
            let ended = room.wait(TRANSFER_MAX);
            let summary = ended.context("a room did not end by its deadline")??;
            let got = summary.bytes;
            anyhow::ensure!(
                got == expected,
                "a room of {expected} bytes ended with {got}"
            );
        }
        Ok(())
    }
}
