//! Whole rooms between ranks of unequal tensor-parallel size: two that send to one, and one that sends to two. This process
//! has the sending ranks on one GPU, a second one the receiving ranks, on the same GPU or another.
#![expect(unsafe_code, reason = "gives engines device memory that outlives them")]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use kvtransfer::{
    config::{EngineConfig, SameHost},
    engine::{Engine, Memory, Transfer},
    gpu::{self, CudaDevice, PERCENT_DEFAULT, memory::DeviceBuffer},
    ids::Room,
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

use crate::{
    data::{POISON, Random, host_seconds},
    measure::{Table, rate},
};

/// Of the model: K and V of so many layers, pages of so many tokens, so many heads of so many bytes.
const LAYERS: usize = 32;
const TOKENS: usize = 16;
const HEADS: usize = 8;
const HEAD_BYTES: usize = 128;

const PATIENCE: Duration = Duration::from_secs(30);

/// Options of `heads`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The GPU of the ranks that receive, if it is another one.
    #[arg(long)]
    peer_gpu: Option<u32>,
    /// Pages of 16 tokens; each has 1 MiB over all layers.
    #[arg(long, default_value_t = 512)]
    pages: usize,
    /// Rooms of each kind; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Host memory instead of a GPU's: shows that everything works.
    #[arg(long)]
    host: bool,
}

/// Options of the other process.
#[derive(Debug, Args)]
pub(crate) struct ReceiverOptions {
    #[arg(long)]
    ranks: u32,
    #[arg(long)]
    pages: usize,
    #[arg(long, value_enum)]
    path: Path,
    #[arg(long)]
    host: bool,
    /// Addresses of the sending ranks.
    #[arg(long, value_delimiter = ',')]
    senders: Vec<SocketAddr>,
}

/// The way that bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Path {
    Pull,
    Tcp,
    Ring,
}

impl Path {
    fn same_host(self) -> SameHost {
        match self {
            Self::Pull => SameHost::PullOnly,
            Self::Tcp => SameHost::Off,
            Self::Ring => SameHost::RingOnly,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Tcp => "tcp",
            Self::Ring => "ring",
        }
    }
}

/// One rank of some.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rank: usize,
    ranks: usize,
    pages: usize,
}

impl Shape {
    fn heads(self) -> usize {
        HEADS / self.ranks
    }

    fn item_len(self) -> usize {
        TOKENS * self.heads() * HEAD_BYTES
    }

    /// Twice as many pages as move, so that no two of them are neighbours.
    fn pool(self) -> usize {
        2 * self.pages
    }

    fn bytes(self) -> usize {
        2 * LAYERS * self.pool() * self.item_len()
    }

    fn layout(self) -> Layout {
        let entry = |index: usize| Entry {
            region: RegionId(0),
            offset: (index * self.pool() * self.item_len()) as u64,
            item_len: self.item_len() as u64,
            item_count: self.pool() as u64,
            layer_id: None,
        };
        let narrow = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let size = narrow(self.ranks);
        Layout {
            page_size: narrow(TOKENS),
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention: Attention::Heads {
                total_kv_heads: narrow(HEADS),
                rank_kv_heads: narrow(self.heads()),
            },
            tp: Shard {
                rank: narrow(self.rank),
                size,
            },
            pp: Shard::ONE,
            layers: 0..narrow(LAYERS),
            components: vec![Component {
                kind: ComponentKind::Kv,
                entries: (0..2 * LAYERS).map(entry).collect(),
                draft_entries: 0,
                state: StateShape::default(),
            }],
        }
    }

    /// The bytes of a rank whose page number `n` in the room is item `items[n]`: every head of every token is different, and
    /// the same on whatever rank it lies.
    fn image(self, items: &[i32], seed: u64) -> Vec<u8> {
        let mut bytes = vec![POISON; self.bytes()];
        let first = self.rank * self.heads();
        for entry in 0..2 * LAYERS {
            for (page, item) in items.iter().enumerate() {
                let item = usize::try_from(*item).unwrap_or(0);
                let at = (entry * self.pool() + item) * self.item_len();
                let heads = bytes[at..at + self.item_len()].chunks_exact_mut(HEAD_BYTES);
                for (place, head) in heads.enumerate() {
                    let (token, head_number) = (place / self.heads(), first + place % self.heads());
                    let number = ((entry * self.pages + page) * TOKENS + token) * HEADS;
                    let stamp = (number + head_number) as u64;
                    for (word, out) in head.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                        let value = (stamp << 8 | word as u64).wrapping_mul(seed | 1);
                        *out = (value ^ value >> 29).to_le_bytes();
                    }
                }
            }
        }
        bytes
    }
}

/// Odd pages in random order, the same in both processes for each side.
fn items(pages: usize, seed: u64) -> Arc<[i32]> {
    let order = Random::seeded(seed).order(pages);
    let odd = |place: &usize| i32::try_from(2 * place + 1).unwrap_or(i32::MAX);
    order.iter().map(odd).collect()
}

const SENDERS_SEED: u64 = 11;
const RECEIVERS_SEED: u64 = 12;

/// An engine with its memory.
struct Rank {
    shape: Shape,
    engine: Engine,
    region: Arc<Region>,
    /// Dropped after the engine, which uses it.
    _buffer: Option<DeviceBuffer>,
}

impl Rank {
    fn start(shape: Shape, gpu: Option<u32>, path: Path, listens: bool) -> Result<Self> {
        let len = shape.bytes();
        let (region, buffer) = match gpu {
            None => (Region::mmap(len)?, None),
            Some(gpu) => {
                let context = gpu::Context::primary(gpu)?;
                let buffer = DeviceBuffer::new(&context, len)?;
                let device = Arc::new(CudaDevice::open(gpu, PERCENT_DEFAULT)?);
                // SAFETY: the buffer is kept beside the region, and dropped after the engine.
                let region = unsafe { Region::device(device, buffer.address(), len) }?;
                (region, Some(buffer))
            }
        };
        let region = Arc::new(region);
        let mut memory = Memory::new();
        memory.add_shared(Arc::clone(&region));
        let mut config = EngineConfig::default();
        config.same_host = path.same_host();
        config.listen = listens.then(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        config.lanes = 2;
        Ok(Self {
            shape,
            engine: Engine::start(config, memory, shape.layout())?,
            region,
            _buffer: buffer,
        })
    }
}

pub(crate) fn run(gpu: u32, options: &Options) -> Result<Table> {
    let mut table = Table::default();
    for path in [Path::Pull, Path::Tcp, Path::Ring] {
        for (from, to) in [(2, 1), (1, 2)] {
            one(gpu, options, path, (from, to), &mut table)
                .with_context(|| format!("{path:?}, {from} to {to}"))?;
        }
    }
    Ok(table)
}

fn one(
    gpu: u32,
    options: &Options,
    path: Path,
    (from, to): (usize, usize),
    table: &mut Table,
) -> Result<()> {
    let pages = options.pages;
    let start = |rank| {
        let shape = Shape {
            rank,
            ranks: from,
            pages,
        };
        Rank::start(shape, (!options.host).then_some(gpu), path, true)
    };
    let ranks = (0..from).map(start).collect::<Result<Vec<_>>>()?;
    let mut receivers = Receivers::start(gpu, options, path, to, &ranks)?;
    let sources = items(pages, SENDERS_SEED);
    let (mut times, mut batches, mut bytes, mut is_right) = (Vec::new(), 0, 0, true);
    for round in 0..=options.rounds as u64 {
        for rank in &ranks {
            let image = rank.shape.image(&sources, 100 + round);
            rank.region.write_at(0, &image)?;
        }
        receivers.ask(&format!("grant {}", round + 1))?;
        let room = Room::new(round + 1).context("rooms count from 1")?;
        let open = |rank: &Rank| {
            let request = SendRequest {
                room,
                timeout: PATIENCE,
            };
            let sending = rank.engine.send(&request)?;
            sending.wait_ready(PATIENCE)?;
            Ok(sending)
        };
        let sending = ranks.iter().map(open).collect::<Result<Vec<_>>>()?;
        let chunk = Chunk {
            items: vec![Arc::clone(&sources)],
            last: true,
        };
        let (took, sent) = host_seconds(|| push_all(&sending, &chunk));
        let (moved, operations) = sent?;
        receivers.ask("wait")?;
        let wrong = receivers.ask(&format!("check {}", 100 + round))?;
        is_right &= wrong == "0";
        // The first warms up.
        if round > 0 {
            times.push(took);
        }
        (bytes, batches) = (moved, operations);
    }
    times.sort_by(f64::total_cmp);
    let what = format!("heads {from} to {to}, {}, {} MiB", path.name(), bytes >> 20);
    table.rate(what, rate(bytes, times[times.len() / 2]), None);
    let slices = bytes / (HEADS / from.max(to) * HEAD_BYTES) as u64;
    table.note(format!(
        "{batches} wire operations for {slices} slices: {} times fewer",
        slices / batches.max(1)
    ));
    table.mark(is_right);
    Ok(())
}

/// Bytes and batches of all of them.
fn push_all(sending: &[Transfer], chunk: &Chunk) -> Result<(u64, u64)> {
    for each in sending {
        each.push(chunk)?;
    }
    let (mut bytes, mut batches) = (0, 0);
    for each in sending {
        let ended = each.wait(PATIENCE);
        let summary = ended.context("a room did not end by its deadline")??;
        bytes += summary.bytes;
        batches += summary.batches;
    }
    Ok((bytes, batches))
}

/// The other process.
struct Receivers {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Receivers {
    fn start(
        gpu: u32,
        options: &Options,
        path: Path,
        count: usize,
        senders: &[Rank],
    ) -> Result<Self> {
        let addresses = senders.iter().map(|rank| {
            let address = rank.engine.local_addr().context("the engine listens")?;
            Ok(address.to_string())
        });
        let addresses = addresses.collect::<Result<Vec<_>>>()?.join(",");
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["--gpu", &options.peer_gpu.unwrap_or(gpu).to_string()])
            .args(["heads-receiver", "--ranks", &count.to_string()])
            .args(["--pages", &options.pages.to_string()])
            .args(["--path", path.name(), "--senders", &addresses]);
        if options.host {
            command.arg("--host");
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().context("the receivers' stdin")?;
        let stdout = child.stdout.take().context("the receivers' stdout")?;
        let stdout = BufReader::new(stdout);
        let mut receivers = Self {
            child,
            stdin,
            stdout,
        };
        receivers.ask("hello")?;
        Ok(receivers)
    }

    fn ask(&mut self, line: &str) -> Result<String> {
        writeln!(self.stdin, "{line}")?;
        let mut answer = String::new();
        let read = self.stdout.read_line(&mut answer)?;
        ensure!(read > 0, "the receivers' process ended");
        Ok(answer.trim().to_owned())
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        // It has nothing to lose, and ends with its stdin otherwise.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The receiving ranks: they do what the lines on stdin say, and answer each with a line.
pub(crate) fn receive(gpu: u32, options: &ReceiverOptions) -> Result<()> {
    let ranks = usize::try_from(options.ranks)?;
    let targets = items(options.pages, RECEIVERS_SEED);
    let mut sides = Vec::new();
    for rank in 0..ranks {
        let shape = Shape {
            rank,
            ranks,
            pages: options.pages,
        };
        let gpu = (!options.host).then_some(gpu);
        let side = Rank::start(shape, gpu, options.path, false)?;
        let mut sources = Vec::new();
        for sender in &options.senders {
            let info = side.engine.connect(*sender, PATIENCE)?;
            sources.push(Source {
                peer: info.peer,
                dummy: false,
            });
        }
        sides.push((side, sources));
    }
    let mut open: Vec<Transfer> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (word, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let number: u64 = number.parse()?;
        let answer = match word {
            "hello" => "hello".to_owned(),
            "grant" => {
                for (side, sources) in &sides {
                    side.region.write_at(0, &vec![POISON; side.shape.bytes()])?;
                    open.push(side.engine.receive(&ReceiveRequest {
                        room: Room::new(number).context("rooms count from 1")?,
                        sources: sources.clone(),
                        receivers_expected: u16::try_from(ranks)?,
                        prefix_tokens: 0,
                        items: vec![Arc::clone(&targets)],
                        timeout: PATIENCE,
                    })?);
                }
                "granted".to_owned()
            }
            "wait" => {
                for each in open.drain(..) {
                    let ended = each.wait(PATIENCE);
                    ended.context("a room did not end by its deadline")??;
                }
                "done".to_owned()
            }
            "check" => {
                let mut wrong = 0;
                for (side, _) in &sides {
                    let mut got = vec![0; side.shape.bytes()];
                    side.region.read_at(0, &mut got)?;
                    // Every byte of the region, those between the pages too.
                    let expected = side.shape.image(&targets, number);
                    wrong += got.iter().zip(&expected).filter(|(a, b)| a != b).count();
                }
                wrong.to_string()
            }
            other => bail!("an unknown word: {other}"),
        };
        say(&answer)?;
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}
