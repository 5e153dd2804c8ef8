//! Whole rooms between ranks of unequal tensor-parallel size: two that send to one, and one that sends to two. This process
//! has the sending ranks on one GPU, a second one the receiving ranks, on the same GPU or another.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use kvtransfer::{
    engine::Transfer,
    ids::Room,
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

use crate::{
    data::{POISON, host_seconds},
    measure::{Table, rate},
    ranks::{HEAD_BYTES, HEADS, PATIENCE, Path, RECEIVERS_SEED, Rank, SENDERS_SEED, Shape, items},
};

/// Each rank's connections to each peer.
const LANES: u8 = 2;

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
        Rank::start(shape, (!options.host).then_some(gpu), path, LANES, true)
    };
    let ranks = (0..from).map(start).collect::<Result<Vec<_>>>()?;
    let peer_gpu = (!options.host).then_some(options.peer_gpu.unwrap_or(gpu));
    let mut receivers = Receivers::start(peer_gpu, path, to, &ranks)?;
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
pub(crate) struct Receivers {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Receivers {
    /// So many ranks on a GPU, or in host memory, that fetch from `senders`.
    pub(crate) fn start(
        gpu: Option<u32>,
        path: Path,
        count: usize,
        senders: &[Rank],
    ) -> Result<Self> {
        let pages = senders.first().context("ranks that send")?.shape.pages;
        let addresses = senders.iter().map(|rank| {
            let address = rank.engine.local_addr().context("the engine listens")?;
            Ok(address.to_string())
        });
        let addresses = addresses.collect::<Result<Vec<_>>>()?.join(",");
        let mut command = Command::new(std::env::current_exe()?);
        if let Some(gpu) = gpu {
            command.args(["--gpu", &gpu.to_string()]);
        }
        command
            .args(["heads-receiver", "--ranks", &count.to_string()])
            .args(["--pages", &pages.to_string()])
            .args(["--path", path.name(), "--senders", &addresses]);
        if gpu.is_none() {
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

    pub(crate) fn ask(&mut self, line: &str) -> Result<String> {
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
        let side = Rank::start(shape, gpu, options.path, LANES, false)?;
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
