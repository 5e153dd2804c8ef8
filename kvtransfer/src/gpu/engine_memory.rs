//! A GPU as the engine sees it: [`Device`] over this module's streams, kernels and handles.

mod copier;
mod flight;
mod foreign;
mod share;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
};

use self::copier::CudaCopier;
use super::{
    Blocks, Context, GpuError, KernelOptions, Kernels, Launch, Method, Pinned as PinnedMemory,
    Priority, Stream,
    dmabuf::DmaBuf,
    ipc::{Imports, Mapping, PeerProcess},
};
use crate::memory::{
    Region,
    device::{Attached, Awaited, Copier, Device, DeviceError, Exported, Pinned, Share, Visibility},
};

/// Default of [`CudaDevice::open`]'s share of a GPU's multiprocessors, in percent: what a model's own kernels hardly notice.
pub const PERCENT_DEFAULT: u32 = 8;

/// A CUDA device whose memory an engine moves.
pub struct CudaDevice {
    shared: Arc<Opened>,
}

struct Opened {
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    launch: Launch,
    /// Copies from device to device of all lanes, one after the other: together they take no more of the device than one, and
    /// while one runs the next waits on the device, not for a thread. Without a bound each lane has its own stream instead, so
    /// that one lane's copy begins while the last blocks of another's end.
    pulls: Option<Arc<Stream>>,
    /// Streams that have waited for an application's event, for the next one.
    idle_streams: Mutex<Vec<Stream>>,
    name: String,
    imports: Imports,
    /// Tells this life of this process from others.
    process: PeerProcess,
    /// Descriptors of virtual-memory allocations that peers fetch from this process, by allocation.
    exports: Mutex<HashMap<u64, share::Export>>,
}

impl CudaDevice {
    /// Opens the GPU `ordinal`, as this process counts them, and loads the copy kernels, which use at most `percent` of its
    /// multiprocessors; with 100 as many threads as it holds.
    ///
    /// # Errors
    /// [`GpuError`]: no driver, no such GPU, or one that is too old.
    pub fn open(ordinal: u32, percent: u32) -> Result<Self, GpuError> {
        Self::open_with(ordinal, percent, Method::Auto)
    }

    /// As [`Self::open`], with a kind of kernel.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_with(ordinal: u32, percent: u32, method: Method) -> Result<Self, GpuError> {
        let context = Context::primary(ordinal)?;
        let kernels = Kernels::load(&context, &KernelOptions::default())?;
        let facts = context.facts();
        let blocks = match percent {
            _ if method == Method::Thin => Blocks::Polite,
            100.. => Blocks::Full,
            percent => Blocks::Count((facts.multiprocessors * percent / 100).max(1)),
        };
        let pulls = match blocks {
            Blocks::Full => None,
            _ => Some(Arc::new(Stream::new(&context, Priority::Low)?)),
        };
        let name = format!("cuda:{ordinal} ({}, {})", facts.name, facts.pci_address);
        let imports = Imports::new(&context);
        let mut cookie = [0; 16];
        getrandom::fill(&mut cookie).map_err(|error| GpuError::System {
            what: "drawing a random number",
            reason: error.to_string(),
        })?;
        Ok(Self {
            shared: Arc::new(Opened {
                context,
                kernels,
                launch: Launch { blocks, method },
                pulls,
                idle_streams: Mutex::default(),
                name,
                imports,
                process: PeerProcess(u128::from_le_bytes(cookie)),
                exports: Mutex::default(),
            }),
        })
    }
}

impl Opened {
    fn refused(&self, call: &'static str, error: &GpuError) -> DeviceError {
        DeviceError {
            call,
            device: self.name.clone(),
            reason: error.to_string(),
        }
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("name", &self.shared.name)
            .field("launch", &self.shared.launch)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PinnedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl Pinned for PinnedMemory {}

/// Another process's allocation, mapped.
struct CudaAttached {
    mapping: Mapping,
    name: String,
}

impl fmt::Debug for CudaAttached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaAttached")
            .field("device", &self.name)
            .field("len", &self.mapping.len())
            .finish_non_exhaustive()
    }
}

impl Attached for CudaAttached {
    fn address(&self) -> u64 {
        self.mapping.address()
    }

    fn len(&self) -> u64 {
        self.mapping.len()
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        self.shared.name.clone()
    }

    fn share(&self, address: u64, len: u64) -> Result<Share, DeviceError> {
        let shared = &self.shared;
        let share = share::export(shared, address, len);
        share.map_err(|error| shared.refused("sharing memory", &error))
    }

    fn unshare(&self) {
        share::forget(&self.shared);
    }

    fn attach(&self, allocation: &[u8]) -> Result<Arc<dyn Attached>, DeviceError> {
        let shared = &self.shared;
        let mapping = share::import(shared, allocation);
        let mapping = mapping.map_err(|error| shared.refused("mapping a peer's memory", &error))?;
        Ok(Arc::new(CudaAttached {
            mapping,
            name: shared.name.clone(),
        }))
    }

    fn copier(&self) -> Result<Box<dyn Copier>, DeviceError> {
        let copier = CudaCopier::new(&self.shared);
        let copier = copier.map_err(|error| self.shared.refused("making a stream", &error))?;
        Ok(Box::new(copier))
    }

    fn await_event(&self, event: u64) -> Result<Box<dyn Awaited>, DeviceError> {
        let awaited = foreign::CudaAwaited::new(&self.shared, event);
        let awaited =
            awaited.map_err(|error| self.shared.refused("waiting for an event", &error))?;
        Ok(Box::new(awaited))
    }

    fn pin(&self, region: &Arc<Region>) -> Result<Box<dyn Pinned>, DeviceError> {
        let pinned = PinnedMemory::register(&self.shared.context, Arc::clone(region));
        let pinned = pinned.map_err(|error| self.shared.refused("pinning", &error))?;
        Ok(Box::new(pinned))
    }

    fn pci_address(&self) -> String {
        self.shared.context.facts().pci_address.clone()
    }

    fn export(&self, address: u64, len: u64) -> Result<Exported, DeviceError> {
        let exported = DmaBuf::export(&self.shared.context, address, len);
        let exported = exported.map_err(|error| self.shared.refused("exporting", &error))?;
        Ok(exported.into())
    }

    fn visibility(&self) -> Visibility {
        self.shared.context.facts().visibility()
    }

    fn flush_writes(&self) -> Result<(), DeviceError> {
        let flushed = self.shared.context.flush_writes();
        flushed.map_err(|error| self.shared.refused("flushing writes", &error))
    }
}
