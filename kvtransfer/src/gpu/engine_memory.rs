//! A GPU as the engine sees it: [`Device`] over this module's streams, kernels and handles.
#![expect(
    unsafe_code,
    reason = "starts copies between addresses that the engine vouches for"
)]

mod share;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
    thread,
};

use super::{
    Blocks, Context, Event, EventKind, GpuError, KernelOptions, Kernels, Pair, Piece as CopyPiece,
    Pinned as PinnedMemory, Priority, Rows, Stream,
    dmabuf::DmaBuf,
    ipc::{Imports, Mapping, PeerProcess},
    memory::DeviceBuffer,
};
use crate::{
    clock,
    memory::{
        Region,
        device::{
            Attached, Copier, Device, DeviceError, Exported, Move, Piece, Pinned, Share, Visibility,
        },
    },
};

/// Bytes of device memory between pieces and a contiguous copy to or from the host, per copier: a chunk of staging memory.
const BOUNCE_BYTES: u64 = 4 << 20;

/// Pieces up to which each is copied by itself: starting a copy costs about as much as a kernel for all of them.
const PIECES_ALONE_MAX: usize = 4;

/// Bytes from which a move is as fast by the driver's own copy as by a kernel.
const MOVE_ALONE_BYTES: u64 = 8 << 20;

/// How long a thread looks for the end of a copy before it sleeps, in nanoseconds: most copies of a batch are over by then,
/// and being woken takes some 50 µs.
const LOOK_NANOS: u64 = 300_000;

/// Default of [`CudaDevice::open`]'s share of a GPU's multiprocessors, in percent: what a model's own kernels hardly notice.
pub const PERCENT_DEFAULT: u32 = 8;

/// A CUDA device whose memory an engine moves.
pub struct CudaDevice {
    shared: Arc<Opened>,
}

struct Opened {
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    blocks: Blocks,
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
        let context = Context::primary(ordinal)?;
        let kernels = Kernels::load(&context, &KernelOptions::default())?;
        let facts = context.facts();
        let blocks = match percent {
            100.. => Blocks::Full,
            percent => Blocks::Count((facts.multiprocessors * percent / 100).max(1)),
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
                blocks,
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

/// One lane's stream, and device memory between pieces and host memory.
struct CudaCopier {
    shared: Arc<Opened>,
    stream: Stream,
    done: Event,
    sleepy: Event,
    bounce: Option<DeviceBuffer>,
    pairs: Vec<Pair>,
    pieces: Vec<CopyPiece>,
}

/// Which way bytes go between a device and the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToHost,
    ToDevice,
}

impl CudaCopier {
    fn new(shared: &Arc<Opened>) -> Result<Self, GpuError> {
        let context = &shared.context;
        Ok(Self {
            shared: Arc::clone(shared),
            stream: Stream::new(context, Priority::Low)?,
            done: Event::new(context, EventKind::Spin)?,
            sleepy: Event::new(context, EventKind::Sleep)?,
            bounce: None,
            pairs: Vec::new(),
            pieces: Vec::new(),
        })
    }

    /// Waits for what was started, looking first and sleeping then.
    fn finish(&mut self) -> Result<(), GpuError> {
        self.stream.record(&self.done)?;
        self.stream.record(&self.sleepy)?;
        let end = clock::now().nanos() + LOOK_NANOS;
        while !self.done.is_done()? {
            if clock::now().nanos() > end {
                return self.sleepy.synchronize();
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// As [`Self::finish`], also after a failure: what was started must not outlive the gate that the caller holds.
    fn settle(&mut self, started: Result<(), GpuError>) -> Result<(), GpuError> {
        let finished = self.finish();
        started.and(finished)
    }

    fn bounce(&mut self) -> Result<u64, GpuError> {
        if self.bounce.is_none() {
            let len = usize::try_from(BOUNCE_BYTES).unwrap_or(usize::MAX);
            self.bounce = Some(DeviceBuffer::new(&self.shared.context, len)?);
        }
        let bounce = self.bounce.as_ref();
        Ok(bounce.map_or(0, DeviceBuffer::address))
    }

    /// Starts copies between pieces and host memory at `host`, in parts that fit the bounce buffer.
    ///
    /// # Safety
    /// Pieces and host memory must stay valid until the stream has passed this.
    unsafe fn between(&mut self, pieces: &[Piece], host: u64, way: Way) -> Result<(), GpuError> {
        if pieces.len() <= PIECES_ALONE_MAX {
            let mut at = host;
            for piece in pieces {
                // SAFETY: the caller's contract.
                unsafe { self.whole(piece.address, at, piece.len, way) }?;
                at += piece.len;
            }
            return Ok(());
        }
        let bounce = self.bounce()?;
        let mut host = host;
        let mut rest = pieces;
        let mut skipped = 0;
        while let Some(first) = rest.first() {
            self.pieces.clear();
            let mut filled = 0;
            let mut next = 0;
            while let Some(piece) = rest.get(next).filter(|_| filled < BOUNCE_BYTES) {
                let begin = if next == 0 { skipped } else { 0 };
                let len = (piece.len - begin).min(BOUNCE_BYTES - filled);
                let (device, buffer) = (piece.address + begin, bounce + filled);
                let (source, target) = match way {
                    Way::ToHost => (device, buffer),
                    Way::ToDevice => (buffer, device),
                };
                self.pieces.push(CopyPiece {
                    source,
                    target,
                    len,
                });
                filled += len;
                if begin + len < piece.len {
                    skipped = begin + len;
                    break;
                }
                skipped = 0;
                next += 1;
            }
            debug_assert!(first.len > 0, "a piece has bytes");
            match way {
                Way::ToHost => {
                    // SAFETY: the caller's contract; the bounce buffer is ours.
                    unsafe { self.list() }?;
                    // SAFETY: as above; the stream keeps the order.
                    unsafe { self.whole(bounce, host, filled, way) }?;
                }
                Way::ToDevice => {
                    // SAFETY: as above.
                    unsafe { self.whole(bounce, host, filled, way) }?;
                    // SAFETY: as above.
                    unsafe { self.list() }?;
                }
            }
            host += filled;
            rest = &rest[next..];
        }
        Ok(())
    }

    /// Starts the driver's own copy of bytes that lie together on both sides.
    ///
    /// # Safety
    /// As for [`Self::between`].
    unsafe fn whole(&self, device: u64, host: u64, len: u64, way: Way) -> Result<(), GpuError> {
        let len = usize::try_from(len).map_err(|_| GpuError::Misuse("a copy of this length"))?;
        let (target, source) = match way {
            Way::ToHost => (host, device),
            Way::ToDevice => (device, host),
        };
        // SAFETY: the caller's contract.
        unsafe { self.stream.copy(target, source, len) }
    }

    /// Starts the kernel that copies `self.pieces`: as pages where all have one length.
    ///
    /// # Safety
    /// As for [`Self::between`].
    unsafe fn list(&mut self) -> Result<(), GpuError> {
        let Some(first) = self.pieces.first() else {
            return Ok(());
        };
        let len = first.len;
        let blocks = self.shared.blocks;
        let page = u32::try_from(len).ok();
        let page = page.filter(|_| self.pieces.iter().all(|piece| piece.len == len));
        let Some(page) = page else {
            // SAFETY: the caller's contract.
            return unsafe {
                let kernels = &self.shared.kernels;
                kernels.copy_pieces(&self.stream, &self.pieces, blocks)
            };
        };
        self.pairs.clear();
        self.pairs.extend(self.pieces.iter().map(|piece| Pair {
            source: piece.source,
            target: piece.target,
        }));
        // SAFETY: the caller's contract.
        unsafe {
            let kernels = &self.shared.kernels;
            kernels.copy_pages(&self.stream, &self.pairs, Rows::page(page), blocks)
        }
    }

    /// Host bytes as an address for the driver.
    fn host_address(host: &Region, offset: u64, pieces: &[Piece]) -> Result<u64, GpuError> {
        let len = pieces.iter().map(|piece| piece.len).sum::<u64>();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let base = host.at(offset, len);
        let base =
            base.map_err(|_| GpuError::Misuse("host memory that is shorter than the pieces"))?;
        Ok(base.addr().get() as u64)
    }
}

impl Copier for CudaCopier {
    fn gather(&mut self, pieces: &[Piece], host: &Region, offset: u64) -> Result<(), DeviceError> {
        let shared = Arc::clone(&self.shared);
        let failed = |error| shared.refused("copying to the host", &error);
        let host = Self::host_address(host, offset, pieces).map_err(failed)?;
        // SAFETY: the engine's regions are alive, and nothing returns before the stream has passed the copies.
        let started = unsafe { self.between(pieces, host, Way::ToHost) };
        self.settle(started).map_err(failed)
    }

    fn scatter(&mut self, host: &Region, offset: u64, pieces: &[Piece]) -> Result<(), DeviceError> {
        let shared = Arc::clone(&self.shared);
        let failed = |error| shared.refused("copying from the host", &error);
        let host = Self::host_address(host, offset, pieces).map_err(failed)?;
        // SAFETY: as above.
        let started = unsafe { self.between(pieces, host, Way::ToDevice) };
        self.settle(started).map_err(failed)
    }

    fn copy(&mut self, moves: &[Move]) -> Result<(), DeviceError> {
        self.pieces.clear();
        let mut started = Ok(());
        for each in moves {
            if each.len >= MOVE_ALONE_BYTES {
                let len = usize::try_from(each.len).unwrap_or(usize::MAX);
                // SAFETY: the engine keeps both sides mapped, and nothing returns before the stream has passed the copies.
                started = started.and(unsafe { self.stream.copy(each.target, each.source, len) });
            } else {
                self.pieces.push(CopyPiece {
                    source: each.source,
                    target: each.target,
                    len: each.len,
                });
            }
        }
        // SAFETY: as above.
        started = started.and(unsafe { self.list() });
        let shared = Arc::clone(&self.shared);
        self.settle(started)
            .map_err(|error| shared.refused("copying on the device", &error))
    }
}

impl fmt::Debug for CudaCopier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaCopier")
            .field("device", &self.shared.name)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("name", &self.shared.name)
            .field("blocks", &self.shared.blocks)
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
