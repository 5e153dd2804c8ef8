//! Copies out of another process's memory: this process owns the pages, a second one maps and pulls them.
#![expect(unsafe_code, reason = "copies between buffers that outlive them")]

use std::{
    io::{Read as _, Write as _},
    os::{
        fd::AsFd as _,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    process::Command,
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use kvtransfer::gpu::{
    Blocks, Context, KernelOptions, Kernels, Launch, Method, Pair, Pinned, Priority, Rows, Side,
    Stream, Window,
    ipc::{self, Handle, Imports, PeerProcess},
    memory::{DeviceBuffer, VirtualBuffer},
};

use crate::{
    data::{POISON, Random, host_seconds},
    measure::{RUNS, Row, Table, rate, seconds},
};

/// Options of `ipc`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// GiB that are pulled.
    #[arg(long, default_value_t = 8)]
    gib: usize,
    /// The GPU of the process that pulls, if it is another one.
    #[arg(long)]
    peer_gpu: Option<u32>,
    /// Times that the receiver maps and unmaps the memory.
    #[arg(long, default_value_t = 100)]
    mappings: usize,
}

/// Options of the other process.
#[derive(Debug, Args)]
pub(crate) struct ReceiverOptions {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    owner_gpu: u32,
    #[arg(long)]
    mappings: usize,
    #[arg(long)]
    seed: u64,
}

/// Every page differs from every other: random bytes that repeat after so many, and in each 4 KiB its own number.
const PATTERN_BYTES: usize = 64 << 20;
const STAMP_SPAN: usize = 4096;

/// Threads that look at what was copied, and bytes that each takes off the GPU at a time: whole pages of every size.
const CHECKERS: usize = 8;
const CHECKED_BYTES: usize = 16 << 20;

pub(crate) fn run(gpu: u32, options: &Options) -> Result<Table> {
    let context = Context::primary(gpu)?;
    let stream = Stream::new(&context, Priority::Low)?;
    let seed = kvtransfer::clock::wall().as_secs();
    let folder = std::env::temp_dir().join(format!("kvgpu-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let socket = folder.join("socket");
    let listener = UnixListener::bind(&socket)?;
    let source = DeviceBuffer::new(&context, options.gib << 30)?;
    fill(&context, &stream, source.address(), source.len(), seed)?;
    let expandable = VirtualBuffer::new(&context, 16, 4)?;
    fill(
        &context,
        &stream,
        expandable.address(),
        expandable.len(),
        seed,
    )?;
    let program = std::env::current_exe()?;
    let mut child = Command::new(program)
        .args([
            "--gpu",
            &options.peer_gpu.unwrap_or(gpu).to_string(),
            "ipc-receiver",
            "--owner-gpu",
            &gpu.to_string(),
            "--seed",
            &seed.to_string(),
        ])
        .args(["--mappings", &options.mappings.to_string(), "--socket"])
        .arg(&socket)
        .spawn()?;
    let (mut peer, _) = listener.accept()?;
    send(&mut peer, &context, source.address(), source.len() as u64)?;
    send(
        &mut peer,
        &context,
        expandable.address(),
        expandable.len() as u64,
    )?;
    let mut answer = String::new();
    peer.read_to_string(&mut answer)?;
    let status = child.wait()?;
    std::fs::remove_dir_all(&folder)?;
    ensure!(status.success(), "the receiver failed: {status}");
    let mut table = Table::default();
    for line in answer.lines() {
        table.push(serde_json::from_str::<Row>(line)?);
    }
    Ok(table)
}

/// The bytes that page-wise copies are checked against.
fn pattern(seed: u64) -> Vec<u8> {
    Random::seeded(seed).bytes(PATTERN_BYTES)
}

fn stamp(seed: u64, place: usize) -> [u8; 16] {
    let number = (place as u64 + 1).wrapping_mul(seed | 1);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&(place as u64).to_le_bytes());
    bytes
}

fn fill(
    context: &Arc<Context>,
    stream: &Stream,
    address: u64,
    len: usize,
    seed: u64,
) -> Result<()> {
    let pattern = pattern(seed);
    let mut at = 0;
    while at < len {
        let part = PATTERN_BYTES.min(len - at);
        let from = pattern.as_ptr().expose_provenance() as u64;
        // SAFETY: both live until the stream is synchronised below.
        unsafe { stream.copy(address + at as u64, from, part) }?;
        at += part;
    }
    stream.synchronize()?;
    let count = len / STAMP_SPAN;
    let stamps: Vec<u8> = (0..count).flat_map(|place| stamp(seed, place)).collect();
    let buffer = DeviceBuffer::new(context, stamps.len())?;
    buffer.write(stream, &stamps)?;
    let pairs: Vec<Pair> = (0..count)
        .map(|place| Pair {
            source: buffer.address() + place as u64 * 16,
            target: address + (place * STAMP_SPAN) as u64,
        })
        .collect();
    let kernels = Kernels::load(context, &KernelOptions::default())?;
    // SAFETY: all live until the stream is synchronised below.
    unsafe { kernels.copy_pages(stream, &pairs, Rows::page(16), Blocks::Full) }?;
    Ok(stream.synchronize()?)
}

fn send(peer: &mut UnixStream, context: &Context, address: u64, len: u64) -> Result<()> {
    let exported = ipc::export(context, address, len)?;
    let bytes = exported.handle.encode();
    peer.write_all(&u32::try_from(bytes.len())?.to_le_bytes())?;
    peer.write_all(&bytes)?;
    for part in exported.descriptors.chunks(ipc::DESCRIPTORS_MAX) {
        let part: Vec<_> = part.iter().map(|descriptor| descriptor.as_fd()).collect();
        ipc::send_descriptors(peer, b"d", &part)?;
    }
    Ok(())
}

/// What a peer exported, with its descriptors each time it is asked for.
struct Received {
    handle: Handle,
    descriptors: Vec<std::os::fd::OwnedFd>,
}

impl Received {
    fn hear(peer: &mut UnixStream) -> Result<Self> {
        let mut len = [0; 4];
        peer.read_exact(&mut len)?;
        let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
        peer.read_exact(&mut bytes)?;
        let handle = Handle::decode(&bytes)?;
        let mut descriptors = Vec::new();
        while descriptors.len() < handle.descriptor_count() {
            let (count, more) = ipc::receive_descriptors(peer, &mut [0])?;
            ensure!(count == 1, "the owner closed");
            descriptors.extend(more);
        }
        Ok(Self {
            handle,
            descriptors,
        })
    }

    fn map(&self, imports: &Imports) -> Result<ipc::Mapping> {
        let copies = self
            .descriptors
            .iter()
            .map(|descriptor| descriptor.try_clone());
        let copies = copies.collect::<Result<_, _>>()?;
        Ok(imports.open(PeerProcess(1), &self.handle, copies)?)
    }
}

pub(crate) fn receive(gpu: u32, options: &ReceiverOptions) -> Result<()> {
    let mut peer = UnixStream::connect(&options.socket)?;
    let plain = Received::hear(&mut peer)?;
    let expandable = Received::hear(&mut peer)?;
    let context = Context::primary(gpu)?;
    let mut table = Table::default();
    if options.owner_gpu != gpu {
        let owner = Context::primary(options.owner_gpu)?;
        let words = if context.reaches(&owner)? {
            "granted by the driver"
        } else {
            "refused by the driver: engines stage"
        };
        table.fact(
            format!("peer access from GPU {gpu} to {}", options.owner_gpu),
            words,
        );
    }
    let mut bench = Bench {
        imports: Imports::new(&context),
        stream: Stream::new(&context, Priority::Low)?,
        kernels: Kernels::load(&context, &KernelOptions::default())?,
        pattern: pattern(options.seed),
        seed: options.seed,
        is_other_gpu: options.owner_gpu != gpu,
        checkers: (0..CHECKERS)
            .map(|_| {
                Ok((
                    Stream::new(&context, Priority::Low)?,
                    Pinned::allocate(&context, CHECKED_BYTES)?,
                ))
            })
            .collect::<Result<_>>()?,
        context,
        table,
    };
    bench.pull("cudaMalloc", &plain)?;
    bench.pull("virtual memory", &expandable)?;
    bench.mappings(&plain, &expandable, options.mappings)?;
    peer.write_all(bench.table.shown(true).as_bytes())
        .context("telling the owner")
}

const LAUNCHES: [Launch; 4] = [
    Launch {
        blocks: Blocks::Polite,
        method: Method::Thin,
    },
    Launch {
        blocks: Blocks::Polite,
        method: Method::Bulk,
    },
    Launch {
        blocks: Blocks::Polite,
        method: Method::Vector,
    },
    Launch {
        blocks: Blocks::Full,
        method: Method::Vector,
    },
];

struct Bench {
    context: Arc<Context>,
    imports: Imports,
    stream: Stream,
    kernels: Arc<Kernels>,
    pattern: Vec<u8>,
    seed: u64,
    is_other_gpu: bool,
    checkers: Vec<(Stream, Pinned)>,
    table: Table,
}

impl Bench {
    fn pull(&mut self, name: &str, received: &Received) -> Result<()> {
        let (took, mapping) = host_seconds(|| received.map(&self.imports));
        let mapping = mapping?;
        let gib = mapping.len() >> 20;
        self.table
            .number(format!("{name}: mapping {gib} MiB"), took * 1e3, "ms");
        let len = usize::try_from(mapping.len())?;
        let target = DeviceBuffer::new(&self.context, len)?;
        let own = DeviceBuffer::new(&self.context, len)?;
        let copy = |to: u64, from: u64| {
            // SAFETY: the buffers and the mapping outlive the synchronisation inside `seconds`.
            seconds(&self.context, &self.stream, RUNS, || unsafe {
                self.stream.copy(to, from, len)
            })
        };
        let plain = rate(len as u64, copy(target.address(), own.address())?);
        let mapped = rate(len as u64, copy(target.address(), mapping.address())?);
        self.table
            .rate(format!("{name}: plain device copy"), plain, None);
        self.table.rate(
            format!("{name}: plain copy of the mapping"),
            mapped,
            Some(plain),
        );
        // Between two GPUs the limit is what the driver's own copy makes of the link.
        let plain = if self.is_other_gpu { mapped } else { plain };
        for page in [1 << 20, 16384_usize, 4096] {
            let count = len / page;
            let mut random = Random::seeded(self.seed + page as u64);
            let (from, to) = (random.order(count), random.order(count));
            let pairs: Vec<Pair> = from
                .iter()
                .zip(&to)
                .map(|(from, to)| Pair {
                    source: mapping.address() + (from * page) as u64,
                    target: target.address() + (to * page) as u64,
                })
                .collect();
            let rows = Rows::page(u32::try_from(page)?);
            for launch in LAUNCHES {
                // SAFETY: as above.
                unsafe { self.stream.fill(target.address(), POISON, len) }?;
                // SAFETY: as above.
                let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
                    self.kernels.copy_pages(&self.stream, &pairs, rows, launch)
                })?;
                let what = format!(
                    "{name}: pages {page} B, {:?} {:?}",
                    launch.blocks, launch.method
                );
                self.table.rate(what, rate(len as u64, took), Some(plain));
                let is_right = self.is_right(&target, page, &from, &to)?;
                self.table.mark(is_right);
            }
            self.window(name, &mapping, &target, plain, page)?;
        }
        Ok(())
    }

    /// The pages of 64 buffers, as a KV cache has them, described without listing each.
    fn window(
        &mut self,
        name: &str,
        mapping: &ipc::Mapping,
        target: &DeviceBuffer,
        plain: f64,
        page: usize,
    ) -> Result<()> {
        const BUFFERS: usize = 64;
        let items = target.len() / BUFFERS / page;
        let buffer_bytes = (items * page) as u64;
        let mut random = Random::seeded(self.seed ^ page as u64);
        let (from, to) = (random.order(items), random.order(items));
        let list = |order: &[usize]| {
            let items = order.iter().map(|item| i32::try_from(*item));
            items.collect::<Result<Vec<_>, _>>()
        };
        let (source_items, target_items) = (list(&from)?, list(&to)?);
        let base = |buffer: u64| Pair {
            source: mapping.address() + buffer * buffer_bytes,
            target: target.address() + buffer * buffer_bytes,
        };
        let buffers: Vec<Pair> = (0..BUFFERS as u64).map(base).collect();
        let side = |items| Side {
            items: Some(items),
            stride: page as u64,
        };
        let window = Window {
            buffers: &buffers,
            items: u32::try_from(items)?,
            source: side(&source_items),
            target: side(&target_items),
            rows: Rows::page(u32::try_from(page)?),
            range: 0..BUFFERS as u64 * buffer_bytes,
        };
        let all = |order: &[usize]| {
            let places = |buffer: usize| order.iter().map(move |item| buffer * items + item);
            (0..BUFFERS).flat_map(places).collect::<Vec<_>>()
        };
        for launch in LAUNCHES {
            // SAFETY: as in `pull`.
            unsafe { self.stream.fill(target.address(), POISON, target.len()) }?;
            // SAFETY: as in `pull`.
            let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
                self.kernels.copy_window(&self.stream, &window, launch)
            })?;
            let (blocks, method) = (launch.blocks, launch.method);
            let what = format!("{name}: window 64 x {items} x {page} B, {blocks:?} {method:?}");
            self.table
                .rate(what, rate(window.range.end, took), Some(plain));
            let is_right = self.is_right(target, page, &all(&from), &all(&to))?;
            self.table.mark(is_right);
        }
        Ok(())
    }

    fn is_right(
        &self,
        target: &DeviceBuffer,
        page: usize,
        from: &[usize],
        to: &[usize],
    ) -> Result<bool> {
        let mut source_of = vec![usize::MAX; target.len() / page];
        for (from, to) in from.iter().zip(to) {
            source_of[*to] = *from;
        }
        let is_whole = !source_of.contains(&usize::MAX);
        ensure!(is_whole, "every page of the target is some page's");
        self.stream.synchronize()?;
        let source_of = &source_of;
        thread::scope(|scope| {
            let checkers = self.checkers.iter().enumerate().map(|(number, checker)| {
                scope.spawn(move || self.is_share_right(checker, number, target, page, source_of))
            });
            let checkers: Vec<_> = checkers.collect();
            let mut is_right = true;
            for checker in checkers {
                is_right &= checker.join().expect("invariant: checkers do not panic")?;
            }
            Ok(is_right)
        })
    }

    /// Looks at every [`CHECKERS`]th piece of the target, from the numbered one on.
    fn is_share_right(
        &self,
        (stream, pinned): &(Stream, Pinned),
        number: usize,
        target: &DeviceBuffer,
        page: usize,
        source_of: &[usize],
    ) -> Result<bool> {
        let mut got = vec![0; CHECKED_BYTES];
        let starts = (0..target.len()).step_by(CHECKED_BYTES);
        for start in starts.skip(number).step_by(CHECKERS) {
            let len = CHECKED_BYTES.min(target.len() - start);
            let from = target.address() + start as u64;
            // SAFETY: both outlive the synchronisation on the next line.
            unsafe { stream.copy(pinned.device_address(), from, len) }?;
            stream.synchronize()?;
            pinned.region().read_at(0, &mut got[..len])?;
            for (place, got) in got[..len].chunks_exact(STAMP_SPAN).enumerate() {
                let at = start + place * STAMP_SPAN;
                let source = source_of[at / page] * page + at % page;
                let repeated = source % PATTERN_BYTES;
                let is_right = got[..16] == stamp(self.seed, source / STAMP_SPAN)
                    && got[16..] == self.pattern[repeated + 16..repeated + STAMP_SPAN];
                if !is_right {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Mapping again and again leaves nothing behind.
    fn mappings(&mut self, plain: &Received, expandable: &Received, times: usize) -> Result<()> {
        for (name, received) in [("cudaMalloc", plain), ("virtual memory", expandable)] {
            let (took, result) = host_seconds(|| {
                for _ in 0..times {
                    let first = received.map(&self.imports)?;
                    let second = received.map(&self.imports)?;
                    ensure!(
                        first.address() == second.address(),
                        "one mapping for both users"
                    );
                    ensure!(self.imports.count() == 1, "one mapping at a time");
                }
                Ok(())
            });
            result?;
            self.table.number(
                format!("{name}: map and unmap, each of {times}"),
                took * 1e3 / times as f64,
                "ms",
            );
            self.table.check(
                format!("{name}: mappings left"),
                self.imports.count() == 0,
                self.imports.count().to_string(),
            );
        }
        Ok(())
    }
}
