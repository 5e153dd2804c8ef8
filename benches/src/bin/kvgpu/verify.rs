//! Every kernel against its twin.
#![expect(unsafe_code, reason = "copies between buffers that outlive them")]

use anyhow::{Result, ensure};
use clap::Args;
use kvtransfer::gpu::{
    Blocks, Context, KernelOptions, Kernels, Launch, Method, Pair, Piece, Priority, Rows, Side,
    Stream, Window,
    kernels::{
        crc32c,
        twin::{self, Twin},
    },
    memory::DeviceBuffer,
};

use crate::{
    data::{POISON, Random},
    measure::Table,
};

/// Options of `verify`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// An eighth of the bytes.
    #[arg(long)]
    small: bool,
    /// A 32nd of the bytes, for checkers under which everything is a hundred times slower.
    #[arg(long)]
    tiny: bool,
    /// Only the PTX that is built in.
    #[arg(long)]
    built_in: bool,
    /// Only kernels through registers: a checker that does not know bulk copies.
    #[arg(long)]
    vector_only: bool,
    /// Of the random bytes; a fresh one if it is not given.
    #[arg(long)]
    seed: Option<u64>,
}

/// The twin of a kind of kernel.
fn twin_of(method: Method) -> Twin {
    match method {
        Method::Bulk => Twin::Bulk,
        Method::Thin => Twin::Thin,
        Method::Auto | Method::Vector => Twin::Vector,
    }
}

/// Bytes of both halves in host and device memory: sources in the first, targets in the second.
struct Bench {
    kernels: std::sync::Arc<Kernels>,
    stream: Stream,
    arena: DeviceBuffer,
    random: Random,
    half: usize,
    launches: Vec<Launch>,
    table: Table,
}

pub(crate) fn run(gpu: u32, options: &Options) -> Result<Table> {
    let context = Context::primary(gpu)?;
    let kernel_options = KernelOptions {
        is_built_in_only: options.built_in,
        ..KernelOptions::default()
    };
    let kernels = Kernels::load(&context, &kernel_options)?;
    let seed = options.seed.unwrap_or_else(|| {
        u64::from(std::process::id()) << 32 | kvtransfer::clock::wall().as_secs()
    });
    let half = match (options.tiny, options.small) {
        (true, _) => 256 << 10,
        (false, true) => 1 << 20,
        (false, false) => 8 << 20,
    };
    let mut table = Table::default();
    table.fact("seed", seed.to_string());
    table.fact(
        "kernels",
        format!("{:?}, bulk {}", kernels.origin(), kernels.has_bulk()),
    );
    let methods = if options.vector_only {
        &[Method::Vector][..]
    } else {
        &[Method::Vector, Method::Bulk, Method::Thin][..]
    };
    let blocks = [Blocks::Polite, Blocks::Full, Blocks::Count(3)];
    let launches = methods
        .iter()
        .flat_map(|method| {
            blocks.map(|blocks| Launch {
                blocks,
                method: *method,
            })
        })
        .collect();
    let mut bench = Bench {
        stream: Stream::new(&context, Priority::Low)?,
        arena: DeviceBuffer::new(&context, 2 * half)?,
        random: Random::seeded(seed),
        kernels,
        half,
        launches,
        table,
    };
    bench.pages()?;
    bench.rows()?;
    bench.windows()?;
    bench.pieces()?;
    bench.checked()?;
    Ok(bench.table)
}

impl Bench {
    /// Fresh random sources and poisoned targets, on both sides.
    fn fresh(&mut self) -> Result<Vec<u8>> {
        let mut bytes = self.random.bytes(self.half);
        bytes.resize(2 * self.half, POISON);
        self.arena.write(&self.stream, &bytes)?;
        Ok(bytes)
    }

    fn compare(&mut self, what: String, expected: &[u8]) -> Result<()> {
        let got = self.arena.read(&self.stream)?;
        let wrong = got
            .iter()
            .zip(expected)
            .position(|(got, expected)| got != expected);
        let note = wrong.map_or(String::new(), |at| format!("first wrong byte at {at}"));
        self.table.check(what, wrong.is_none(), note);
        Ok(())
    }

    /// Places of as many pieces as fit, `span` apart, shuffled; both relative to the arena.
    fn places(
        &mut self,
        source_span: usize,
        target_span: usize,
        most: usize,
        odd: usize,
    ) -> Vec<Pair> {
        let room = (self.half - 64) / source_span.max(target_span).max(1);
        let count = room.min(most);
        let (from, to) = (self.random.order(count), self.random.order(count));
        let pair = |(from, to): (&usize, &usize)| Pair {
            source: (odd + from * source_span) as u64,
            target: (self.half + odd + to * target_span) as u64,
        };
        from.iter().zip(&to).map(pair).collect()
    }

    fn on_device(&self, pairs: &[Pair]) -> Vec<Pair> {
        let base = self.arena.address();
        let moved = |pair: &Pair| Pair {
            source: pair.source.wrapping_add(base),
            target: pair.target.wrapping_add(base),
        };
        pairs.iter().map(moved).collect()
    }

    fn one(&mut self, what: &str, pairs: &[Pair], rows: Rows) -> Result<()> {
        for launch in self.launches.clone() {
            let mut expected = self.fresh()?;
            twin::copy_pages(&mut expected, pairs, rows, twin_of(launch.method))?;
            // SAFETY: all places are within the arena, which outlives the synchronisation in `compare`.
            unsafe {
                self.kernels
                    .copy_pages(&self.stream, &self.on_device(pairs), rows, launch)
            }?;
            self.compare(
                format!("{what}, {:?} {:?}", launch.method, launch.blocks),
                &expected,
            )?;
        }
        Ok(())
    }

    fn pages(&mut self) -> Result<()> {
        for (bytes, odd) in [
            (16, 0),
            (256, 0),
            (1024, 0),
            (4096, 0),
            (4112, 0),
            (16384, 0),
            (65536, 0),
            (1000, 8),
            (1004, 4),
            (333, 1),
            (16384, 8),
        ] {
            let span = usize::next_multiple_of(bytes + odd, 16);
            let pairs = self.places(span, span, 70_000, odd);
            ensure!(!pairs.is_empty(), "the arena holds a page");
            let rows = Rows::page(u32::try_from(bytes)?);
            self.one(
                &format!("{} pages of {bytes} B at +{odd}", pairs.len()),
                &pairs,
                rows,
            )?;
        }
        Ok(())
    }

    fn rows(&mut self) -> Result<()> {
        for (bytes, token, count) in [
            (256_u32, 1024_u64, 64_u32),
            (512, 4096, 16),
            (1024, 4096, 64),
            (4096, 16384, 7),
            (24, 80, 5),
        ] {
            let spread = usize::try_from(token)? * count as usize;
            let packed = bytes as usize * count as usize;
            let pack = Rows {
                count,
                bytes,
                source_stride: token,
                target_stride: u64::from(bytes),
            };
            let pairs = self.places(spread, packed, 2000, 0);
            self.one(
                &format!("pack {count} x {bytes} B of {token}"),
                &pairs,
                pack,
            )?;
            let unpack = Rows {
                count,
                bytes,
                source_stride: u64::from(bytes),
                target_stride: token,
            };
            let pairs = self.places(packed, spread, 2000, 0);
            self.one(
                &format!("unpack {count} x {bytes} B to {token}"),
                &pairs,
                unpack,
            )?;
        }
        Ok(())
    }

    fn one_window(&mut self, what: &str, window: &Window<'_>) -> Result<()> {
        let buffers = self.on_device(window.buffers);
        let on_device = Window {
            buffers: &buffers,
            ..window.clone()
        };
        for launch in self.launches.clone() {
            let mut expected = self.fresh()?;
            twin::copy_window(&mut expected, window, twin_of(launch.method))?;
            // SAFETY: as in `one`.
            unsafe { self.kernels.copy_window(&self.stream, &on_device, launch) }?;
            let what = format!("{what}, {:?} {:?}", launch.method, launch.blocks);
            self.compare(what, &expected)?;
        }
        Ok(())
    }

    fn items(&mut self, count: usize) -> Result<Vec<i32>> {
        let order = self.random.order(count).into_iter().map(i32::try_from);
        Ok(order.collect::<Result<_, _>>()?)
    }

    fn windows(&mut self) -> Result<()> {
        for (bytes, cut) in [
            (16384_u32, 0_u64),
            (4096, 4096),
            (512, 16),
            (1000, 40),
            (96, 7),
        ] {
            let item_bytes = u64::from(bytes);
            let items = (self.half / 4 / bytes as usize).min(500);
            let count = u32::try_from(items)?;
            let (from, to) = (self.items(items)?, self.items(items)?);
            let buffer_bytes = item_bytes * items as u64;
            let range = cut..3 * buffer_bytes - cut;
            let half = self.half as u64;
            for packed in [false, true] {
                // A packed side starts with the range's first byte.
                let skipped = if packed { range.start } else { 0 };
                let base = |buffer: u64| Pair {
                    source: buffer * buffer_bytes,
                    target: (half + buffer * buffer_bytes).wrapping_sub(skipped),
                };
                let buffers: Vec<Pair> = (0..3).map(base).collect();
                let window = Window {
                    buffers: &buffers,
                    items: count,
                    source: Side {
                        items: Some(&from),
                        stride: item_bytes,
                    },
                    target: Side {
                        items: (!packed).then_some(to.as_slice()),
                        stride: item_bytes,
                    },
                    rows: Rows::page(bytes),
                    range: range.clone(),
                };
                let kind = if packed { "packed" } else { "pages" };
                let what = format!("window 3 x {count} x {bytes} B from {cut}, {kind}");
                self.one_window(&what, &window)?;
            }
        }
        Ok(())
    }

    fn pieces(&mut self) -> Result<()> {
        for launch in self.launches.clone() {
            if matches!(launch.method, Method::Bulk | Method::Thin) {
                continue;
            }
            let mut pieces = Vec::new();
            let (mut source, mut target) =
                (self.random.below(64), self.half + self.random.below(64));
            loop {
                let bits = self.random.below(18);
                let len = self.random.below(1 << bits);
                if source + len >= self.half || target + len >= 2 * self.half {
                    break;
                }
                pieces.push(Piece {
                    source: source as u64,
                    target: target as u64,
                    len: len as u64,
                });
                source += len + self.random.below(20);
                target += len + self.random.below(20);
            }
            let base = self.arena.address();
            let device: Vec<Piece> = pieces
                .iter()
                .map(|piece| Piece {
                    source: piece.source + base,
                    target: piece.target + base,
                    len: piece.len,
                })
                .collect();
            let mut expected = self.fresh()?;
            twin::copy_pieces(&mut expected, &pieces);
            // SAFETY: as in `one`.
            unsafe { self.kernels.copy_pieces(&self.stream, &device, launch) }?;
            self.compare(
                format!("{} pieces of any length, {:?}", pieces.len(), launch.blocks),
                &expected,
            )?;
        }
        Ok(())
    }

    fn checked(&mut self) -> Result<()> {
        for bytes in [16_usize, 512, 528, 4096, 16384] {
            let pairs = self.places(bytes, bytes, 300, 0);
            let sums = DeviceBuffer::new(self.kernels.context(), pairs.len() * 4)?;
            let mut expected = self.fresh()?;
            let bytes = u32::try_from(bytes)?;
            let by_twin = twin::copy_checked(&mut expected, &pairs, bytes);
            let device = self.on_device(&pairs);
            // SAFETY: as in `one`; the sums live until they are read.
            unsafe {
                self.kernels.copy_pages_checked(
                    &self.stream,
                    &device,
                    bytes,
                    sums.address(),
                    Blocks::Polite,
                )
            }?;
            let got = sums.read(&self.stream)?;
            let got: Vec<u32> = got
                .chunks_exact(4)
                .map(|sum| u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]))
                .collect();
            let source = usize::try_from(pairs[0].source)?;
            let is_right =
                got == by_twin && got[0] == crc32c(&expected[source..source + bytes as usize]);
            self.table.check(
                format!("CRC32C of {} pages of {bytes} B", pairs.len()),
                is_right,
                "",
            );
            self.compare(
                format!("{} checked pages of {bytes} B", pairs.len()),
                &expected,
            )?;
        }
        Ok(())
    }
}
