//! How fast copies by lists are.
#![expect(unsafe_code, reason = "copies between buffers that outlive them")]

use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use kvtransfer::gpu::{
    Blocks, Context, Event, EventKind, KernelOptions, Kernels, Launch, Method, Pair, Piece, Pinned,
    Priority, Rows, Side, Stream, Window, memory::DeviceBuffer,
};

use crate::{
    data::{Random, host_seconds, scattered},
    measure::{RUNS, Table, rate, seconds},
};

/// Options of `kernels`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// GiB on each side.
    #[arg(long, default_value_t = 4)]
    gib: usize,
    /// Numbers of blocks beside 8 % of the multiprocessors, all of them once, and no bound.
    #[arg(long, value_delimiter = ',', default_values_t = [4, 6, 16, 33])]
    blocks: Vec<u32>,
}

struct Bench {
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    stream: Stream,
    source: DeviceBuffer,
    target: DeviceBuffer,
    random: Random,
    plain: f64,
    table: Table,
}

pub(crate) fn run(gpu: u32, options: &Options) -> Result<Table> {
    let context = Context::primary(gpu)?;
    let (load, kernels) = host_seconds(|| Kernels::load(&context, &KernelOptions::default()));
    let kernels = kernels?;
    let stream = Stream::new(&context, Priority::Low)?;
    let bytes = options.gib << 30;
    let mut bench = Bench {
        source: DeviceBuffer::new(&context, bytes)?,
        target: DeviceBuffer::new(&context, bytes)?,
        random: Random::seeded(1),
        plain: 0.0,
        table: Table::default(),
        context,
        kernels,
        stream,
    };
    let all = bench.context.facts().multiprocessors;
    let origin = bench.kernels.origin();
    bench.table.number(
        format!("loading the kernels ({origin:?})"),
        load * 1e3,
        "ms",
    );
    bench.plain()?;
    let mut launches: Vec<(String, Launch)> = Vec::new();
    for method in [Method::Bulk, Method::Vector] {
        let mut add = |name: String, blocks| {
            launches.push((format!("{name} {method:?}"), Launch { blocks, method }))
        };
        add("8 %".to_owned(), Blocks::Polite);
        for blocks in &options.blocks {
            add(format!("{blocks} blocks"), Blocks::Count(*blocks));
        }
        add(format!("{all} blocks"), Blocks::Count(all));
        add("no bound".to_owned(), Blocks::Full);
    }
    for blocks in [all / 2, all, 2 * all] {
        let launch = Launch {
            blocks: Blocks::Count(blocks),
            method: Method::Thin,
        };
        launches.push((format!("{blocks} warps Thin"), launch));
    }
    bench.pages(&launches)?;
    bench.slices()?;
    bench.windows()?;
    bench.batches()?;
    bench.pieces_and_checksums()?;
    bench.small()?;
    bench.host()?;
    Ok(bench.table)
}

const NAMED: [Launch; 4] = [
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

impl Bench {
    fn plain(&mut self) -> Result<()> {
        let len = self.source.len();
        let (from, to) = (self.source.address(), self.target.address());
        // SAFETY: both buffers outlive the synchronisation inside.
        let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
            self.stream.copy(to, from, len)
        })?;
        self.plain = rate(len as u64, took);
        self.table.rate("plain device copy", self.plain, None);
        Ok(())
    }

    fn copy(&mut self, what: String, pairs: &[Pair], rows: Rows, launch: Launch) -> Result<()> {
        let bytes = rows.len_bytes() * pairs.len() as u64;
        // SAFETY: as in `plain`; the pairs lie within the buffers.
        let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
            self.kernels.copy_pages(&self.stream, pairs, rows, launch)
        })?;
        self.table.rate(what, rate(bytes, took), Some(self.plain));
        Ok(())
    }

    fn pages(&mut self, launches: &[(String, Launch)]) -> Result<()> {
        for page in [1024_usize, 4096, 16384, 65536] {
            let count = self.source.len() / page;
            let pairs = scattered(
                &mut self.random,
                self.source.address(),
                self.target.address(),
                count,
                page,
            );
            let rows = Rows::page(u32::try_from(page)?);
            for (name, launch) in launches {
                let is_named = matches!(launch.blocks, Blocks::Polite | Blocks::Full);
                if page != 16384 && !is_named && launch.method != Method::Thin {
                    continue;
                }
                self.copy(format!("pages {page} B, {name}"), &pairs, rows, *launch)?;
            }
        }
        Ok(())
    }

    /// Slices of a quarter of each token's row, packed and unpacked.
    fn slices(&mut self) -> Result<()> {
        for slice in [256_usize, 512, 1024, 4096] {
            let (token, tokens) = (slice * 4, 64);
            let pages = self.source.len() / (token * tokens);
            let order = self.random.order(pages);
            let at = |base: u64, place: usize, span: usize| base + (place * span) as u64;
            let (cache, staging) = (self.source.address(), self.target.address());
            let bytes = u32::try_from(slice)?;
            let count = u32::try_from(tokens)?;
            let (wide, narrow) = (token as u64, slice as u64);
            for is_pack in [true, false] {
                let pair = |(place, page): (usize, &usize)| {
                    let (strided, packed) = (
                        at(cache, *page, token * tokens),
                        at(staging, place, slice * tokens),
                    );
                    if is_pack {
                        Pair {
                            source: strided,
                            target: packed,
                        }
                    } else {
                        Pair {
                            source: packed,
                            target: strided,
                        }
                    }
                };
                let pairs: Vec<Pair> = order
                    .iter()
                    .enumerate()
                    .map(|(place, page)| pair((place, page)))
                    .collect();
                let (source_stride, target_stride) = if is_pack {
                    (wide, narrow)
                } else {
                    (narrow, wide)
                };
                let rows = Rows {
                    count,
                    bytes,
                    source_stride,
                    target_stride,
                };
                let name = if is_pack { "pack" } else { "unpack" };
                for launch in NAMED {
                    let what = format!(
                        "{name} slices {slice} B, {:?} {:?}",
                        launch.blocks, launch.method
                    );
                    self.copy(what, &pairs, rows, launch)?;
                }
            }
        }
        Ok(())
    }

    /// 64 buffers of 4096 items each, packed.
    fn windows(&mut self) -> Result<()> {
        for bytes in [512_u64, 4096, 16384] {
            let (buffers, items) = (64_u64, 4096_u64);
            let buffer_bytes = bytes * items;
            let list = self
                .random
                .order(4096)
                .into_iter()
                .map(i32::try_from)
                .collect::<Result<Vec<_>, _>>()?;
            let (source, target) = (self.source.address(), self.target.address());
            let bases: Vec<Pair> = (0..buffers)
                .map(|buffer| Pair {
                    source: source + buffer * buffer_bytes,
                    target: target + buffer * buffer_bytes,
                })
                .collect();
            let window = Window {
                buffers: &bases,
                items: 4096,
                source: Side {
                    items: Some(&list),
                    stride: bytes,
                },
                target: Side {
                    items: None,
                    stride: bytes,
                },
                rows: Rows::page(u32::try_from(bytes)?),
                range: 0..buffers * buffer_bytes,
            };
            if window.range.end > self.source.len() as u64 {
                continue;
            }
            for launch in NAMED {
                // SAFETY: as in `plain`.
                let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
                    self.kernels.copy_window(&self.stream, &window, launch)
                })?;
                let what = format!(
                    "window 64 x 4096 x {bytes} B, {:?} {:?}",
                    launch.blocks, launch.method
                );
                self.table
                    .rate(what, rate(window.range.end, took), Some(self.plain));
            }
        }
        Ok(())
    }

    /// Windows of 16 KiB pages as an engine launches them, one batch behind the other: what a launch costs beside its bytes is
    /// the difference between batches of different sizes.
    fn batches(&mut self) -> Result<()> {
        const PAGE: u32 = 16384;
        const BUFFERS: u64 = 64;
        let (source, target) = (self.source.address(), self.target.address());
        for mib in [64_u64, 128, 256] {
            let batch = mib << 20;
            let page = u64::from(PAGE);
            let items = batch / BUFFERS / page;
            let count = (self.source.len() as u64 / batch).min(16);
            let order = self.random.order(usize::try_from(items)?);
            let order = order.into_iter().map(i32::try_from);
            let list = order.collect::<Result<Vec<_>, _>>()?;
            let list_len = u32::try_from(list.len())?;
            let base = |buffer: u64| Pair {
                source: source + buffer * items * page,
                target: target + buffer * items * page,
            };
            let bases: Vec<Pair> = (0..count * BUFFERS).map(base).collect();
            let side = Side {
                items: Some(&list[..]),
                stride: page,
            };
            let windows = bases.chunks_exact(usize::try_from(BUFFERS)?);
            let windows: Vec<Window<'_>> = windows
                .map(|buffers| Window {
                    buffers,
                    items: list_len,
                    source: side,
                    target: side,
                    rows: Rows::page(PAGE),
                    range: 0..batch,
                })
                .collect();
            for launch in NAMED {
                // SAFETY: as in `plain`.
                let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
                    windows.iter().try_for_each(|window| {
                        self.kernels.copy_window(&self.stream, window, launch)
                    })
                })?;
                let what = format!(
                    "{count} batches of {mib} MiB, {:?} {:?}",
                    launch.blocks, launch.method
                );
                self.table
                    .rate(what, rate(count * batch, took), Some(self.plain));
                let micros = took * 1e6 / f64::from(u32::try_from(count)?);
                self.table.note(format!("{micros:.0} us each"));
            }
        }
        Ok(())
    }

    fn pieces_and_checksums(&mut self) -> Result<()> {
        let page = 16384;
        let count = (self.source.len() / page).min(65536);
        let pairs = scattered(
            &mut self.random,
            self.source.address(),
            self.target.address(),
            count,
            page,
        );
        let pieces: Vec<Piece> = pairs
            .iter()
            .map(|pair| Piece {
                source: pair.source,
                target: pair.target,
                len: page as u64,
            })
            .collect();
        let sums = DeviceBuffer::new(&self.context, count * 4)?;
        let bytes = (count * page) as u64;
        for blocks in [Blocks::Polite, Blocks::Full] {
            // SAFETY: as in `plain`.
            let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
                self.kernels.copy_pieces(&self.stream, &pieces, blocks)
            })?;
            self.table.rate(
                format!("pieces of {page} B, {blocks:?}"),
                rate(bytes, took),
                Some(self.plain),
            );
            // SAFETY: as in `plain`; the sums outlive it too.
            let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
                self.kernels.copy_pages_checked(
                    &self.stream,
                    &pairs,
                    u32::try_from(page).unwrap_or(0),
                    sums.address(),
                    blocks,
                )
            })?;
            self.table.rate(
                format!("pages {page} B with CRC32C, {blocks:?}"),
                rate(bytes, took),
                Some(self.plain),
            );
        }
        Ok(())
    }

    /// From the call to the event seen by the host.
    fn small(&mut self) -> Result<()> {
        let done = Event::new(&self.context, EventKind::Spin)?;
        for (count, page) in [(1_usize, 16384_usize), (64, 16384), (4096, 16384)] {
            let pairs = scattered(
                &mut self.random,
                self.source.address(),
                self.target.address(),
                count,
                page,
            );
            let rows = Rows::page(u32::try_from(page)?);
            for blocks in [Blocks::Polite, Blocks::Full] {
                let mut times = Vec::new();
                for _ in 0..50 {
                    let (took, result) = host_seconds(|| {
                        // SAFETY: as in `plain`; waited for at once.
                        unsafe { self.kernels.copy_pages(&self.stream, &pairs, rows, blocks) }?;
                        self.stream.record(&done)?;
                        done.synchronize()
                    });
                    result?;
                    times.push(took);
                }
                times.sort_by(f64::total_cmp);
                self.table.number(
                    format!("{count} pages of {page} B, call to done, {blocks:?}"),
                    times[25] * 1e6,
                    "us",
                );
            }
        }
        Ok(())
    }

    /// To pinned host memory and back: by the copy engine, and by kernels straight over PCIe.
    fn host(&mut self) -> Result<()> {
        let bytes = (1_usize << 30).min(self.source.len());
        let (took, pinned) = host_seconds(|| Pinned::allocate(&self.context, bytes));
        let pinned = pinned?;
        self.table
            .number(format!("pinning {} MiB", bytes >> 20), took * 1e3, "ms");
        let (device, host) = (self.source.address(), pinned.device_address());
        let mut plain = Vec::new();
        for (name, to, from) in [
            ("device to pinned", host, device),
            ("pinned to device", device, host),
        ] {
            // SAFETY: as in `plain`; the pinned memory outlives it too.
            let took = seconds(&self.context, &self.stream, RUNS, || unsafe {
                self.stream.copy(to, from, bytes)
            })?;
            plain.push(rate(bytes as u64, took));
            self.table.rate(
                format!("plain copy, {name}"),
                rate(bytes as u64, took),
                None,
            );
        }
        for page in [4096_usize, 16384] {
            let count = bytes / page;
            let rows = Rows::page(u32::try_from(page)?);
            let out = scattered(&mut self.random, device, host, count, page);
            let back: Vec<Pair> = out
                .iter()
                .map(|pair| Pair {
                    source: pair.target,
                    target: pair.source,
                })
                .collect();
            for (name, pairs, plain) in [
                ("pages to pinned", &out, plain[0]),
                ("pages from pinned", &back, plain[1]),
            ] {
                for launch in NAMED {
                    // SAFETY: as above.
                    let took = seconds(&self.context, &self.stream, 3, || unsafe {
                        self.kernels.copy_pages(&self.stream, pairs, rows, launch)
                    })?;
                    let what = format!("{name} {page} B, {:?} {:?}", launch.blocks, launch.method);
                    self.table.rate(what, rate(bytes as u64, took), Some(plain));
                }
            }
        }
        Ok(())
    }
}
