//! A GPU's memory behind a region, beside the host's region that holds the same bytes for filling and checking.
#![expect(
    unsafe_code,
    reason = "makes a region of memory that is allocated beside it"
)]

use std::sync::Arc;

use anyhow::Context as _;
use clap::ValueEnum;
use kvtransfer::{
    gpu::{Context, CudaDevice, Method, memory::DeviceBuffer},
    memory::{Region, device::Device},
};
use serde::{Deserialize, Serialize};

/// Which GPU, and how much of it copies may take.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Gpu {
    pub(crate) ordinal: u32,
    pub(crate) percent: u32,
    pub(crate) kernel: Kernel,
}

/// Which kind of kernel copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kernel {
    /// The engine's choice
    Auto,
    /// Through registers
    Vector,
    /// Through shared memory, blocks that have a multiprocessor to themselves
    Bulk,
    /// Through shared memory, one warp beside whatever else runs on every multiprocessor
    Thin,
}

impl From<Kernel> for Method {
    fn from(kernel: Kernel) -> Self {
        match kernel {
            Kernel::Auto => Self::Auto,
            Kernel::Vector => Self::Vector,
            Kernel::Bulk => Self::Bulk,
            Kernel::Thin => Self::Thin,
        }
    }
}

/// Memory of a GPU as large as a region of the host.
pub(crate) struct GpuMemory {
    // Dropped before the memory it stands for; engines are dropped before both.
    region: Arc<Region>,
    context: Arc<Context>,
    _buffer: DeviceBuffer,
}

impl GpuMemory {
    pub(crate) fn new(gpu: Gpu, len: usize) -> anyhow::Result<Self> {
        let context = Context::primary(gpu.ordinal)?;
        let buffer = DeviceBuffer::new(&context, len)?;
        let device: Arc<dyn Device> = Arc::new(CudaDevice::open_with(
            gpu.ordinal,
            gpu.percent,
            gpu.kernel.into(),
        )?);
        // SAFETY: the buffer is kept beside the region for as long as anybody can use it.
        let region = unsafe { Region::device(device, buffer.address(), len) }?;
        Ok(Self {
            region: Arc::new(region),
            context,
            _buffer: buffer,
        })
    }

    /// Free MiB of the GPU.
    pub(crate) fn free_mib(&self) -> anyhow::Result<u64> {
        Ok(self.context.free_bytes()? >> 20)
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Makes the GPU's bytes those of the host's region.
    pub(crate) fn load(&self, host: &Region) -> anyhow::Result<()> {
        let mut bytes = vec![0; host.len()];
        host.read_at(0, &mut bytes)?;
        self.region.write_at(0, &bytes).context("to the GPU")
    }

    /// Makes the host region's bytes those of the GPU.
    pub(crate) fn store(&self, host: &Region) -> anyhow::Result<()> {
        let mut bytes = vec![0; host.len()];
        self.region.read_at(0, &mut bytes).context("from the GPU")?;
        Ok(host.write_at(0, &bytes)?)
    }
}
