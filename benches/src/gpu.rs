//! A GPU's memory behind a region, beside the host's region that holds the same bytes for filling and checking.
#![expect(
    unsafe_code,
    reason = "makes a region of memory that is allocated beside it, and copies to it"
)]

use std::sync::Arc;

use anyhow::Context as _;
use clap::ValueEnum;
use kvtransfer::{
    gpu::{Context, CudaDevice, Method, Pinned, Priority, Stream, memory::DeviceBuffer},
    memory::{
        Region,
        device::{
            Attached, Awaited, Copier, Device, DeviceError, Exported, Pinned as DevicePinned,
            Share, Visibility,
        },
    },
};
use serde::{Deserialize, Serialize};

/// Which GPU, and how much of it copies may take.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Gpu {
    pub(crate) ordinal: u32,
    pub(crate) percent: u32,
    pub(crate) kernel: Kernel,
    /// Whether mapping the other's memory is refused, as between GPUs that do not reach each other.
    pub(crate) refuses: bool,
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

/// A GPU from which no other's memory can be reached.
#[derive(Debug)]
struct Refusing(CudaDevice);

impl Device for Refusing {
    fn name(&self) -> String {
        self.0.name()
    }

    fn share(&self, address: u64, len: u64) -> Result<Share, DeviceError> {
        self.0.share(address, len)
    }

    fn unshare(&self) {
        self.0.unshare();
    }

    fn attach(&self, _: &[u8]) -> Result<Arc<dyn Attached>, DeviceError> {
        Err(DeviceError {
            call: "mapping a peer's memory",
            device: self.0.name(),
            reason: "refused, as --refuse-mapping asks for".into(),
        })
    }

    fn copier(&self) -> Result<Box<dyn Copier>, DeviceError> {
        self.0.copier()
    }

    fn await_event(&self, event: u64) -> Result<Box<dyn Awaited>, DeviceError> {
        self.0.await_event(event)
    }

    fn pin(&self, region: &Arc<Region>) -> Result<Box<dyn DevicePinned>, DeviceError> {
        self.0.pin(region)
    }

    fn pci_address(&self) -> String {
        self.0.pci_address()
    }

    fn export(&self, address: u64, len: u64) -> Result<Exported, DeviceError> {
        self.0.export(address, len)
    }

    fn visibility(&self) -> Visibility {
        self.0.visibility()
    }

    fn flush_writes(&self) -> Result<(), DeviceError> {
        self.0.flush_writes()
    }
}

/// Memory of a GPU as large as a region of the host.
pub(crate) struct GpuMemory {
    // Dropped before the memory it stands for; engines are dropped before both.
    region: Arc<Region>,
    context: Arc<Context>,
    stream: Stream,
    /// The host's region, pinned: filling and checking would take most of a run's time otherwise.
    host: Pinned,
    buffer: DeviceBuffer,
}

impl GpuMemory {
    pub(crate) fn new(gpu: Gpu, host: &Arc<Region>) -> anyhow::Result<Self> {
        let context = Context::primary(gpu.ordinal)?;
        let buffer = DeviceBuffer::new(&context, host.len())?;
        let device = CudaDevice::open_with(gpu.ordinal, gpu.percent, gpu.kernel.into())?;
        let device: Arc<dyn Device> = if gpu.refuses {
            Arc::new(Refusing(device))
        } else {
            Arc::new(device)
        };
        // SAFETY: the buffer is kept beside the region for as long as anybody can use it.
        let region = unsafe { Region::device(device, buffer.address(), host.len()) }?;
        let pinned = Pinned::register(&context, Arc::clone(host));
        Ok(Self {
            region: Arc::new(region),
            stream: Stream::new(&context, Priority::Low)?,
            host: pinned.context("pinning the host's region")?,
            context,
            buffer,
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
    pub(crate) fn load(&self) -> anyhow::Result<()> {
        self.copy(self.buffer.address(), self.host.device_address())
            .context("to the GPU")
    }

    /// Makes the host region's bytes those of the GPU.
    pub(crate) fn store(&self) -> anyhow::Result<()> {
        self.copy(self.host.device_address(), self.buffer.address())
            .context("from the GPU")
    }

    fn copy(&self, target: u64, source: u64) -> anyhow::Result<()> {
        // SAFETY: both are this one's, as long as each other, and stay until the stream has passed the copy.
        unsafe { self.stream.copy(target, source, self.buffer.len()) }?;
        Ok(self.stream.synchronize()?)
    }
}
