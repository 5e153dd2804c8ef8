//! Our GPU paths beside plain copies: gather and scatter by page size and blocks, to pinned memory and back, pulling from a
//! mapping, exports. Where there is no GPU it says why and measures nothing.
//!
//! `kvgpu` verifies bytes; here only time is measured. Goals: gather of 16 KiB pages at least 0.80 of the plain device copy,
//! head slices of 1 KiB at least 0.60.
#![expect(unsafe_code, reason = "copies between buffers that outlive them")]
#![expect(clippy::print_stderr, reason = "a bench says why it measures nothing")]

use std::{sync::Arc, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvtransfer::gpu::{
    Blocks, Context, Event, EventKind, GpuError, KernelOptions, Kernels, Pair, Pinned, Priority,
    Rows, Stream, dmabuf::DmaBuf, ipc, memory::DeviceBuffer,
};

const BYTES: usize = 1 << 30;

struct Gpu {
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    stream: Stream,
    source: DeviceBuffer,
    target: DeviceBuffer,
}

impl Gpu {
    fn open() -> Result<Self, GpuError> {
        let context = Context::primary(0)?;
        Ok(Self {
            kernels: Kernels::load(&context, &KernelOptions::default())?,
            stream: Stream::new(&context, Priority::Low)?,
            source: DeviceBuffer::new(&context, BYTES)?,
            target: DeviceBuffer::new(&context, BYTES)?,
            context,
        })
    }

    /// Time on the device of so many runs.
    fn time(&self, runs: u64, mut work: impl FnMut() -> Result<(), GpuError>) -> Duration {
        let mut timed = || {
            let begin = Event::new(&self.context, EventKind::Timing)?;
            let end = Event::new(&self.context, EventKind::Timing)?;
            self.stream.record(&begin)?;
            for _ in 0..runs {
                work()?;
            }
            self.stream.record(&end)?;
            end.synchronize()?;
            end.milliseconds_since(&begin)
        };
        let milliseconds: Result<f32, GpuError> = timed();
        Duration::from_secs_f32(milliseconds.expect("the GPU worked a moment ago") / 1e3)
    }

    /// Pages of the source in an order that no two neighbours share, to pages of the target.
    fn pairs(&self, source: u64, target: u64, page: usize) -> Vec<Pair> {
        let count = (BYTES / page) as u64;
        let place = |at: u64| (at.wrapping_mul(2_654_435_761) | 1) % count;
        let pair = |at: u64| Pair {
            source: source + place(at) * page as u64,
            target: target + at * page as u64,
        };
        (0..count).map(pair).collect()
    }
}

fn gpu(criterion: &mut Criterion) {
    let gpu = match Gpu::open() {
        Ok(gpu) => gpu,
        Err(reason) => {
            eprintln!("gpu: nothing measured: {reason}");
            return;
        }
    };
    copies(criterion, &gpu);
    staging(criterion, &gpu);
    exports(criterion, &gpu);
}

fn copies(criterion: &mut Criterion, gpu: &Gpu) {
    let (source, target) = (gpu.source.address(), gpu.target.address());
    let mut group = criterion.benchmark_group("copy");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    group.bench_function("plain", |bench| {
        bench.iter_custom(|runs| {
            // SAFETY: the buffers outlive the synchronisation in `time`.
            gpu.time(runs, || unsafe { gpu.stream.copy(target, source, BYTES) })
        });
    });
    for page in [1024_usize, 4096, 16384, 65536] {
        let pairs = gpu.pairs(source, target, page);
        let rows = Rows::page(u32::try_from(page).expect("small"));
        for blocks in [Blocks::Polite, Blocks::Full] {
            let id = BenchmarkId::new(format!("pages, {blocks:?}"), page);
            group.bench_function(id, |bench| {
                bench.iter_custom(|runs| {
                    // SAFETY: the buffers outlive the synchronisation in `time`.
                    gpu.time(runs, || unsafe {
                        gpu.kernels.copy_pages(&gpu.stream, &pairs, rows, blocks)
                    })
                });
            });
        }
    }
    group.finish();
}

fn staging(criterion: &mut Criterion, gpu: &Gpu) {
    let pinned = Pinned::allocate(&gpu.context, BYTES).expect("a GiB of pinned memory");
    let (device, host) = (gpu.source.address(), pinned.device_address());
    let mut group = criterion.benchmark_group("staging");
    group
        .throughput(Throughput::Bytes(BYTES as u64))
        .sample_size(10);
    for (name, to, from) in [("out", host, device), ("in", device, host)] {
        group.bench_function(format!("plain {name}"), |bench| {
            // SAFETY: as above, and the pinned memory outlives it too.
            bench
                .iter_custom(|runs| gpu.time(runs, || unsafe { gpu.stream.copy(to, from, BYTES) }));
        });
        let pairs = gpu.pairs(from, to, 16384);
        group.bench_function(format!("pages of 16384 {name}"), |bench| {
            bench.iter_custom(|runs| {
                // SAFETY: the buffers outlive the synchronisation in `time`.
                gpu.time(runs, || unsafe {
                    gpu.kernels
                        .copy_pages(&gpu.stream, &pairs, Rows::page(16384), Blocks::Polite)
                })
            });
        });
    }
    group.finish();
}

fn exports(criterion: &mut Criterion, gpu: &Gpu) {
    let (address, len) = (gpu.source.address(), BYTES as u64);
    let mut group = criterion.benchmark_group("export");
    group.bench_function("IPC handle", |bench| {
        bench.iter(|| {
            ipc::export(&gpu.context, address, len).map(|exported| exported.handle.encode())
        });
    });
    match DmaBuf::export(&gpu.context, address, len) {
        Ok(_) => {
            group.bench_function("dma-buf", |bench| {
                bench.iter(|| DmaBuf::export(&gpu.context, address, len))
            });
        }
        Err(reason) => eprintln!("export/dma-buf: nothing measured: {reason}"),
    }
    group.finish();
}

criterion_group!(benches, gpu);
criterion_main!(benches);
