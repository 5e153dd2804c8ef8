//! A GPU's memory behind a region, beside the host's region that holds the same bytes for filling and checking.
#![expect(
    unsafe_code,
    reason = "makes a region of memory that is allocated beside it"
)]

use std::sync::Arc;

use anyhow::Context as _;
use kvtransfer::{
    gpu::{Context, CudaDevice, memory::DeviceBuffer},
    memory::{Region, device::Device},
};
use serde::{Deserialize, Serialize};

/// Which GPU, and how much of it copies may take.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Gpu {
    pub(crate) ordinal: u32,
    pub(crate) percent: u32,
}

/// Memory of a GPU as large as a region of the host.
pub(crate) struct GpuMemory {
    // Dropped before the memory it stands for; engines are dropped before both.
    region: Arc<Region>,
    _buffer: DeviceBuffer,
}

impl GpuMemory {
    pub(crate) fn new(gpu: Gpu, len: usize) -> anyhow::Result<Self> {
        let context = Context::primary(gpu.ordinal)?;
        let buffer = DeviceBuffer::new(&context, len)?;
        let device: Arc<dyn Device> = Arc::new(CudaDevice::open(gpu.ordinal, gpu.percent)?);
        // SAFETY: the buffer is kept beside the region for as long as anybody can use it.
        let region = unsafe { Region::device(device, buffer.address(), len) }?;
        Ok(Self {
            region: Arc::new(region),
            _buffer: buffer,
        })
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
