//! Mappings of other processes' GPU memory: each made once, shared by whoever copies from it, and closed by the last.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use super::{
    handle::{Handle, Memory},
    map_pieces,
};
use crate::gpu::{
    GpuError,
    device::DeviceUuid,
    driver::{Context, cuda},
    memory,
    sys::IpcHandle,
};

/// Most mappings at a time: 64 peers with 64 buffers each. A peer that wants more is refused and staged.
pub const IMPORTS_MAX: usize = 4096;

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the only flag there is and one that must be given.
const LAZY_ENABLE_PEER_ACCESS: u32 = 1;

/// Which process a handle is from: whatever tells two lives of a peer apart (a cookie that it makes at its start).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerProcess(pub u128);

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    peer: PeerProcess,
    device: DeviceUuid,
    allocation: u64,
    memory: Memory,
}

/// The mappings of one device.
pub struct Imports {
    context: Arc<Context>,
    table: Mutex<HashMap<Key, Weak<Opened>>>,
}

impl Imports {
    /// An empty table.
    #[must_use]
    pub fn new(context: &Arc<Context>) -> Self {
        Self {
            context: Arc::clone(context),
            table: Mutex::new(HashMap::new()),
        }
    }

    /// Maps a peer's range, or shares the mapping of its allocation if there is one. `descriptors` are those that came with the
    /// handle; they are closed in either case.
    ///
    /// # Errors
    /// [`GpuError::Peer`] if the handle and what it names do not fit, [`GpuError::Refused`] with the driver's reason if this
    /// GPU or process cannot map it, [`GpuError::Limit`] when [`IMPORTS_MAX`] are in use.
    pub fn open(
        &self,
        peer: PeerProcess,
        handle: &Handle,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Mapping, GpuError> {
        if descriptors.len() != handle.descriptor_count() {
            return Err(GpuError::Peer(
                "it came with too few descriptors, or too many",
            ));
        }
        let key = Key {
            peer,
            device: handle.device,
            allocation: handle.allocation,
            memory: handle.memory.clone(),
        };
        // Held while mapping: a second opener of the same handle waits instead of mapping it twice.
        let mut table = self.lock();
        if let Some(opened) = table.get(&key).and_then(Weak::upgrade) {
            return Ok(Mapping::of(opened, handle));
        }
        table.retain(|_, opened| opened.strong_count() > 0);
        if table.len() >= IMPORTS_MAX {
            return Err(GpuError::Limit {
                what: "mapped allocations of other processes",
                asked: IMPORTS_MAX as u64 + 1,
                limit: IMPORTS_MAX as u64,
            });
        }
        let opened = Arc::new(self.map(handle, &descriptors)?);
        table.insert(key, Arc::downgrade(&opened));
        Ok(Mapping::of(opened, handle))
    }

    /// Forgets a peer that is gone: its handles are mapped anew if they ever come again. Mappings in use stay until their last
    /// user is done.
    pub fn forget(&self, peer: PeerProcess) {
        self.lock().retain(|key, _| key.peer != peer);
    }

    /// How many allocations are mapped.
    #[must_use]
    pub fn count(&self) -> usize {
        let table = self.lock();
        table
            .values()
            .filter(|opened| opened.strong_count() > 0)
            .count()
    }

    fn map(&self, handle: &Handle, descriptors: &[OwnedFd]) -> Result<Opened, GpuError> {
        let refused = |error: GpuError| GpuError::Refused {
            what: "mapping another process's memory",
            address: 0,
            reason: format!("{error}; bytes go through pinned host memory"),
        };
        match &handle.memory {
            Memory::Plain { handle: raw, total } => {
                let opened = Opened::plain(&self.context, *raw).map_err(refused)?;
                // A lie about the length would end in a memory fault, which costs the whole context.
                if opened.mapped_bytes()? < *total {
                    return Err(GpuError::Peer("its allocation is shorter than it says"));
                }
                Ok(opened)
            }
            Memory::Virtual { pieces } => {
                let pieces = map_pieces(&self.context, pieces, descriptors).map_err(refused)?;
                Ok(Opened {
                    context: Arc::clone(&self.context),
                    base: pieces.base,
                    pieces: Some(pieces),
                })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Weak<Opened>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mapped allocation.
struct Opened {
    context: Arc<Context>,
    base: u64,
    /// For virtual memory.
    pieces: Option<Pieces>,
}

impl Opened {
    fn plain(context: &Arc<Context>, raw: [u8; 64]) -> Result<Self, GpuError> {
        let _current = context.enter()?;
        let mut base = 0;
        let handle = IpcHandle(raw);
        // SAFETY: the driver checks the handle; what it maps is closed once, in `drop`.
        unsafe {
            cuda!(
                context.calls(),
                cuIpcOpenMemHandle_v2(&raw mut base, handle, LAZY_ENABLE_PEER_ACCESS)
            )
        }?;
        Ok(Self {
            context: Arc::clone(context),
            base,
            pieces: None,
        })
    }

    fn mapped_bytes(&self) -> Result<u64, GpuError> {
        let _current = self.context.enter()?;
        let (mut base, mut bytes) = (0, 0);
        let (at, calls) = (self.base, self.context.calls());
        // SAFETY: writes two numbers.
        unsafe {
            cuda!(
                calls,
                cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, at)
            )
        }?;
        Ok((bytes as u64).saturating_sub(at - base))
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if self.pieces.is_some() {
            return;
        }
        let Ok(_current) = self.context.enter() else {
            return;
        };
        // SAFETY: opened once; every copy from it is done, as its users promised.
        let result = unsafe { cuda!(self.context.calls(), cuIpcCloseMemHandle(self.base)) };
        if let Err(error) = result {
            tracing::warn!(%error, "another process's memory stays mapped");
        }
    }
}

/// Physical pieces mapped one behind the other.
pub(super) struct Pieces {
    context: Arc<Context>,
    base: u64,
    reserved: usize,
    mapped: Vec<usize>,
}

impl Pieces {
    /// Reserves addresses for all of them.
    pub(super) fn reserve(context: &Arc<Context>, pieces: &[u64]) -> Result<Self, GpuError> {
        let total: u64 = pieces.iter().sum();
        let reserved = usize::try_from(total)
            .map_err(|_| GpuError::Peer("its pieces are longer than the address space"))?;
        let base = memory::reserve(context, reserved)?;
        Ok(Self {
            context: Arc::clone(context),
            base,
            reserved,
            mapped: Vec::with_capacity(pieces.len()),
        })
    }

    fn len(&self) -> usize {
        self.mapped.iter().sum()
    }

    /// Maps the next piece.
    pub(super) fn push(&mut self, bytes: u64, handle: u64) -> Result<(), GpuError> {
        let bytes = usize::try_from(bytes)
            .map_err(|_| GpuError::Peer("a piece is longer than the address space"))?;
        let at = self.base + self.len() as u64;
        memory::map(&self.context, at, bytes, handle)?;
        self.mapped.push(bytes);
        Ok(())
    }

    /// Lets the device use what is mapped.
    pub(super) fn allow_access(&self) -> Result<(), GpuError> {
        memory::allow_access(&self.context, self.base, self.len())
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        let mut at = self.base;
        for bytes in &self.mapped {
            memory::unmap(&self.context, at, *bytes);
            at += *bytes as u64;
        }
        memory::free_addresses(&self.context, self.base, self.reserved);
    }
}

/// A peer's range, mapped. Its clones share the mapping; keep one until every copy from it is done.
#[derive(Clone)]
pub struct Mapping {
    opened: Arc<Opened>,
    offset: u64,
    len: u64,
}

impl Mapping {
    fn of(opened: Arc<Opened>, handle: &Handle) -> Self {
        Self {
            opened,
            offset: handle.offset,
            len: handle.len,
        }
    }

    /// Where the exported range starts, for kernels and copies of this device.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.opened.base + self.offset
    }

    /// Bytes of the exported range.
    #[expect(clippy::len_without_is_empty, reason = "an exported range has bytes")]
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }
}
