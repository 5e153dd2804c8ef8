//! What staging costs without a wire, and engines whose two sides share one process: on one GPU two processes take turns,
//! which two engines of one process need not.
#![expect(unsafe_code, reason = "copies between buffers that outlive the stream")]

use std::{
    net::SocketAddr,
    ops::Range,
    sync::{Arc, mpsc},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use kvtransfer::{
    gpu::{self, CudaDevice, PERCENT_DEFAULT, Pinned, Priority, Stream, memory::DeviceBuffer},
    ids::{PeerId, Room},
    memory::{
        Region,
        device::{Copier, Device, Piece, Pinned as Pin},
    },
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

use crate::{
    data::{POISON, Random, host_seconds},
    measure::{RUNS, Table, rate, seconds},
    ranks::{PATIENCE, Path, RECEIVERS_SEED, Rank, SENDERS_SEED, Shape, items},
};

const PAGE: usize = 16 << 10;

/// Rooms under way at once between engines.
const ROOMS: usize = 16;

/// Options of `staging`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Lanes; each has a thread on each side, and staging memory of its own where there is no wire.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..))]
    lanes: u8,
    /// Bytes of a chunk of staging memory, in KiB.
    #[arg(long, default_value_t = 4096)]
    chunk_kib: usize,
    /// Chunks of each lane where there is no wire.
    #[arg(long, default_value_t = 2)]
    chunks: usize,
    /// Bytes that move, in MiB: a multiple of 16, a room's share of which is whole pages.
    #[arg(long, default_value_t = 1024)]
    mib: usize,
    /// Measurements of each kind after a first that does not count; the median counts.
    #[arg(long, default_value_t = RUNS)]
    rounds: usize,
    /// Only engines, over host memory: shows that everything works.
    #[arg(long)]
    host: bool,
}

pub(crate) fn run(gpu: u32, options: &Options) -> Result<Table> {
    check(options)?;
    let mut table = Table::default();
    let gpu = (!options.host).then_some(gpu);
    if let Some(gpu) = gpu {
        let (plain, beside) = plain_copies(gpu, options)?;
        table.rate("pinned to device, one copy", plain, None);
        table.rate(
            "the same while as much goes the other way",
            beside,
            Some(plain),
        );
        no_wire(gpu, options, plain, &mut table)?;
    }
    for path in [Path::Tcp, Path::Ring] {
        let host = engines(None, path, options, None, &mut table)?;
        if gpu.is_some() {
            engines(gpu, path, options, Some(host), &mut table)?;
        }
    }
    Ok(table)
}

/// What would divide by nothing, or wait for a chunk that there is not.
fn check(options: &Options) -> Result<()> {
    let Options {
        chunk_kib,
        chunks,
        mib,
        rounds,
        ..
    } = *options;
    ensure!(
        mib > 0 && mib.is_multiple_of(ROOMS),
        "--mib is {mib}; it must be a multiple of {ROOMS}"
    );
    ensure!(
        chunk_kib > 0 && (chunk_kib << 10).is_multiple_of(PAGE),
        "--chunk-kib is {chunk_kib}; it must be a multiple of {}",
        PAGE >> 10
    );
    ensure!(
        chunks > 0 && rounds > 0,
        "--chunks and --rounds must be at least 1"
    );
    Ok(())
}

/// Plain copies of as many bytes, GB/s: into the device alone, and while as many go out of it.
fn plain_copies(gpu: u32, options: &Options) -> Result<(f64, f64)> {
    let context = gpu::Context::primary(gpu)?;
    let len = options.mib << 20;
    let pinned = || Pinned::allocate(&context, len);
    let device = || DeviceBuffer::new(&context, len);
    let (into, out) = ((pinned()?, device()?), (pinned()?, device()?));
    let stream = || Stream::new(&context, Priority::Low);
    let (down, up) = (stream()?, stream()?);
    let copy_in = || {
        let ((pinned, device), len) = (&into, len);
        // SAFETY: both outlive the synchronisation of their stream, below.
        unsafe { down.copy(device.address(), pinned.device_address(), len) }
    };
    let alone = seconds(&context, &down, options.rounds, copy_in)?;
    let mut times = Vec::new();
    for _ in 0..options.rounds {
        let (took, copied) = host_seconds(|| -> Result<()> {
            copy_in()?;
            let (pinned, device) = &out;
            // SAFETY: as above.
            unsafe { up.copy(pinned.device_address(), device.address(), len) }?;
            down.synchronize()?;
            Ok(up.synchronize()?)
        });
        copied?;
        times.push(took);
    }
    times.sort_by(f64::total_cmp);
    let beside = times[times.len() / 2];
    Ok((rate(len as u64, alone), rate(len as u64, beside)))
}

/// A chunk of staging memory and what is in it.
struct Filled {
    host: Arc<Region>,
    /// Number of its first page.
    first: usize,
    /// Its pages.
    count: usize,
}

/// Scattered pages out of device memory, through pinned chunks, into other scattered pages of the same device, by the copiers
/// of the engine's lanes.
fn no_wire(gpu: u32, options: &Options, plain: f64, table: &mut Table) -> Result<()> {
    let len = options.mib << 20;
    let pages = len / PAGE;
    let device: Arc<dyn Device> = Arc::new(CudaDevice::open(gpu, PERCENT_DEFAULT)?);
    let region = || -> Result<(DeviceBuffer, Region)> {
        let buffer = DeviceBuffer::new(&gpu::Context::primary(gpu)?, len)?;
        // SAFETY: returned together; the region is dropped at the end of this function, as the buffer is.
        let region = unsafe { Region::device(Arc::clone(&device), buffer.address(), len) }?;
        Ok((buffer, region))
    };
    let ((_from, source), (_to, target)) = (region()?, region()?);
    let bytes = Random::seeded(7).bytes(len);
    source.write_at(0, &bytes)?;
    target.write_at(0, &vec![POISON; len])?;
    let order = |seed| Random::seeded(seed).order(pages);
    let (from, to) = (order(SENDERS_SEED), order(RECEIVERS_SEED));
    let way = Way {
        source: source.base_address(),
        target: target.base_address(),
        from: &from,
        to: &to,
    };
    let lanes = usize::from(options.lanes);
    let share = pages.div_ceil(lanes);
    let lane = |number| {
        Lane::new(
            &device,
            options,
            number * share..pages.min((number + 1) * share),
        )
    };
    let mut state = (0..lanes).map(lane).collect::<Result<Vec<_>>>()?;
    let mut times = Vec::new();
    for round in 0..=options.rounds {
        let (took, moved) = host_seconds(|| {
            thread::scope(|scope| {
                let running = state
                    .iter_mut()
                    .map(|lane| scope.spawn(move || lane.run(way)));
                let running: Vec<_> = running.collect();
                running.into_iter().try_for_each(joined)
            })
        });
        moved?;
        if round > 0 {
            times.push(took);
        }
    }
    times.sort_by(f64::total_cmp);
    let mut got = vec![0; len];
    target.read_at(0, &mut got)?;
    let page = |bytes: &[u8], at: usize| bytes[at * PAGE..(at + 1) * PAGE].to_vec();
    let is_right = (0..pages).all(|at| page(&got, to[at]) == page(&bytes, from[at]));
    let what = format!("no wire, pages of {PAGE} B, {lanes} lanes");
    table.rate(what, rate(len as u64, times[times.len() / 2]), Some(plain));
    table.mark(is_right);
    Ok(())
}

/// What lanes without a wire do.
#[derive(Clone, Copy)]
struct Way<'a> {
    source: u64,
    target: u64,
    from: &'a [usize],
    to: &'a [usize],
}

/// A lane without a wire: what an engine's two lanes have.
struct Lane {
    pages: Range<usize>,
    fetches: Box<dyn Copier>,
    delivers: Box<dyn Copier>,
    hosts: Vec<Arc<Region>>,
    _pinned: Vec<Box<dyn Pin>>,
}

impl Lane {
    fn new(device: &Arc<dyn Device>, options: &Options, pages: Range<usize>) -> Result<Self> {
        let (mut hosts, mut pinned) = (Vec::new(), Vec::new());
        for _ in 0..options.chunks {
            let host = Arc::new(Region::mmap(options.chunk_kib << 10)?);
            pinned.push(device.pin(&host)?);
            hosts.push(host);
        }
        Ok(Self {
            pages,
            fetches: device.copier()?,
            delivers: device.copier()?,
            hosts,
            _pinned: pinned,
        })
    }

    /// All its pages: a thread that fills chunks, and this one, which empties them.
    fn run(&mut self, way: Way<'_>) -> Result<()> {
        let (free, empty) = mpsc::sync_channel::<Arc<Region>>(self.hosts.len());
        let (filled, full) = mpsc::sync_channel::<Filled>(self.hosts.len());
        for host in &self.hosts {
            free.send(Arc::clone(host))?;
        }
        let Self {
            pages,
            fetches,
            delivers,
            ..
        } = self;
        let pages = pages.clone();
        thread::scope(|scope| {
            let fills = scope.spawn(move || fill(fetches.as_mut(), way, pages, &empty, &filled));
            let emptied = empty_chunks(delivers.as_mut(), way, &full, &free);
            drop((full, free));
            emptied.and(joined(fills))
        })
    }
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    let ended = thread.join();
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn pieces(base: u64, places: &[usize]) -> Vec<Piece> {
    let piece = |place: &usize| Piece {
        address: base + (place * PAGE) as u64,
        len: PAGE as u64,
    };
    places.iter().map(piece).collect()
}

fn fill(
    copier: &mut dyn Copier,
    way: Way<'_>,
    pages: Range<usize>,
    empty: &mpsc::Receiver<Arc<Region>>,
    filled: &mpsc::SyncSender<Filled>,
) -> Result<()> {
    let mut first = pages.start;
    while first < pages.end {
        // Closed when the other thread has failed, which says why.
        let Ok(host) = empty.recv() else {
            return Ok(());
        };
        let count = (host.len() / PAGE).min(pages.end - first);
        let pieces = pieces(way.source, &way.from[first..first + count]);
        let flight = copier.fetch(&pieces, &host, 0)?;
        flight.wait((count * PAGE) as u64)?;
        if filled.send(Filled { host, first, count }).is_err() {
            return Ok(());
        }
        first += count;
    }
    Ok(())
}

fn empty_chunks(
    copier: &mut dyn Copier,
    way: Way<'_>,
    full: &mpsc::Receiver<Filled>,
    free: &mpsc::SyncSender<Arc<Region>>,
) -> Result<()> {
    while let Ok(Filled { host, first, count }) = full.recv() {
        let _flight = copier.send(&host, 0..(count * PAGE) as u64)?;
        copier.deliver(&pieces(way.target, &way.to[first..first + count]))?;
        // The other thread may have filled its last.
        let _ = free.send(host);
    }
    Ok(())
}

/// Two engines of this process, rooms queued at once. Gives GB/s.
fn engines(
    gpu: Option<u32>,
    path: Path,
    options: &Options,
    host: Option<f64>,
    table: &mut Table,
) -> Result<f64> {
    let shape = Shape {
        rank: 0,
        ranks: 1,
        pages: options.mib,
    };
    let sender = Rank::start(shape, gpu, path, options.lanes, true)?;
    let receiver = Rank::start(shape, gpu, path, options.lanes, false)?;
    let address: SocketAddr = sender.engine.local_addr().context("the engine listens")?;
    let peer = receiver.engine.connect(address, PATIENCE)?.peer;
    let sources = items(shape.pages, SENDERS_SEED);
    let targets = items(shape.pages, RECEIVERS_SEED);
    sender.region.write_at(0, &shape.image(&sources, 21))?;
    receiver.region.write_at(0, &vec![POISON; shape.bytes()])?;
    let mut times = Vec::new();
    for round in 0..=options.rounds {
        let (took, moved) =
            host_seconds(|| rooms(&sender, &receiver, peer, round, (&sources, &targets)));
        let bytes = moved?;
        if round > 0 {
            times.push(rate(bytes, took));
        }
    }
    times.sort_by(f64::total_cmp);
    let mut got = vec![0; shape.bytes()];
    receiver.region.read_at(0, &mut got)?;
    let median = times[times.len() / 2];
    let memory = if gpu.is_some() { "device" } else { "host" };
    table.rate(
        format!("engines of one process, {memory}, {}", path.name()),
        median,
        host,
    );
    table.mark(got == shape.image(&targets, 21));
    Ok(median)
}

fn rooms(
    sender: &Rank,
    receiver: &Rank,
    peer: PeerId,
    round: usize,
    (sources, targets): (&[i32], &[i32]),
) -> Result<u64> {
    let each = sources.len() / ROOMS;
    let lists = |items: &[i32]| -> Vec<Arc<[i32]>> { items.chunks(each).map(Arc::from).collect() };
    let mut receiving = Vec::new();
    let mut sending = Vec::new();
    for (number, (from, to)) in lists(sources).into_iter().zip(lists(targets)).enumerate() {
        let room = Room::new((round * ROOMS + number + 1) as u64).context("rooms count from 1")?;
        receiving.push(receiver.engine.receive(&ReceiveRequest {
            room,
            sources: vec![Source { peer, dummy: false }],
            receivers_expected: 1,
            prefix_tokens: 0,
            items: vec![to],
            timeout: PATIENCE,
        })?);
        let transfer = sender.engine.send(&SendRequest {
            room,
            timeout: PATIENCE,
        })?;
        transfer.wait_ready(PATIENCE)?;
        sending.push((transfer, from));
    }
    for (transfer, items) in &sending {
        transfer.push(&Chunk {
            items: vec![Arc::clone(items)],
            last: true,
        })?;
    }
    let mut bytes = 0;
    for transfer in &receiving {
        let ended = transfer.wait(PATIENCE);
        bytes += ended.context("a room did not end by its deadline")??.bytes;
    }
    Ok(bytes)
}
