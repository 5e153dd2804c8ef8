//! Pinned host memory: what copy engines read and write at full speed, and the bounded pool of staging chunks.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{
    ptr::{self, NonNull},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    driver::{Context, cuda},
    error::GpuError,
};
use crate::memory::Region;

/// Pinned bytes of a staging pool unless its owner says otherwise. Two directions of 128 MiB are eight chunks of 16 MiB
/// each: enough that the copy engine, the wire and the page cache of a 400 Gbit/s link never wait for each other.
pub const POOL_BYTES_DEFAULT: usize = 256 << 20;

/// Most pinned bytes of one pool: what is pinned is lost to the rest of the host.
pub const POOL_BYTES_MAX: usize = 16 << 30;

/// Least bytes of a chunk: below, launching a copy costs more than copying.
pub const CHUNK_BYTES_MIN: usize = 64 << 10;

/// Visible to every context, and mapped so that kernels can use it too.
const PORTABLE_AND_MAPPED: u32 = 1 | 2;

enum Source {
    /// `cuMemHostAlloc`.
    Allocated,
    /// `cuMemHostRegister` of a region.
    Registered,
}

/// Host memory that the GPU reaches directly.
pub struct Pinned {
    context: Arc<Context>,
    region: Arc<Region>,
    device_address: u64,
    source: Source,
}

impl Pinned {
    /// Allocates pinned memory.
    ///
    /// # Errors
    /// The driver's; pinned memory may be limited by the container.
    pub fn allocate(context: &Arc<Context>, len: usize) -> Result<Self, GpuError> {
        let _current = context.enter()?;
        let mut pointer = ptr::null_mut();
        // SAFETY: writes the address; freed once, in `drop`.
        unsafe {
            cuda!(
                context.calls(),
                cuMemHostAlloc(&raw mut pointer, len, PORTABLE_AND_MAPPED)
            )
        }?;
        let base = NonNull::new(pointer.cast::<u8>())
            .ok_or(GpuError::Misuse("no memory was asked for"))?;
        // SAFETY: the memory stays until `drop`, which needs every user of the region gone: it is only ever lent.
        let region = unsafe { Region::external(base, len) };
        let pinned = Self {
            context: Arc::clone(context),
            region: Arc::new(region),
            device_address: 0,
            source: Source::Allocated,
        };
        pinned.with_device_address()
    }

    /// Pins a region that exists already, such as a memfd that another process maps too. It stays pinned until this is
    /// dropped.
    ///
    /// # Errors
    /// The driver's, for memory that is registered already for instance.
    pub fn register(context: &Arc<Context>, region: Arc<Region>) -> Result<Self, GpuError> {
        let _current = context.enter()?;
        let pointer = host_pointer(&region)?;
        let (len, flags) = (region.len(), PORTABLE_AND_MAPPED);
        // SAFETY: the region is mapped and kept by the Arc below; unregistered once, in `drop`.
        unsafe {
            cuda!(
                context.calls(),
                cuMemHostRegister_v2(pointer.cast(), len, flags)
            )
        }?;
        let pinned = Self {
            context: Arc::clone(context),
            region,
            device_address: 0,
            source: Source::Registered,
        };
        pinned.with_device_address()
    }

    fn with_device_address(mut self) -> Result<Self, GpuError> {
        let pointer = host_pointer(&self.region)?;
        let out = &raw mut self.device_address;
        // SAFETY: the memory was pinned and mapped just now.
        unsafe {
            cuda!(
                self.context.calls(),
                cuMemHostGetDevicePointer_v2(out, pointer.cast(), 0)
            )
        }?;
        Ok(self)
    }

    /// The memory, for copies and system calls by the host.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Its address for kernels and copies.
    #[must_use]
    pub fn device_address(&self) -> u64 {
        self.device_address
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.region.len()
    }

    /// The context that pinned it.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let (Ok(_current), Ok(pointer)) = (self.context.enter(), host_pointer(&self.region)) else {
            return;
        };
        let calls = self.context.calls();
        let result = match self.source {
            // SAFETY: allocated in `allocate`, freed once.
            Source::Allocated => unsafe { cuda!(calls, cuMemFreeHost(pointer.cast())) },
            // SAFETY: registered in `register`, and the region is still mapped.
            Source::Registered => unsafe { cuda!(calls, cuMemHostUnregister(pointer.cast())) },
        };
        if let Err(error) = result {
            tracing::debug!(%error, "pinned memory was not given back");
        }
    }
}

fn host_pointer(region: &Region) -> Result<*mut u8, GpuError> {
    let base = region.at(0, 0);
    let base = base.map_err(|_| GpuError::Misuse("a region has a first byte"))?;
    Ok(base.as_ptr())
}

/// Which of a number of places are free, and who waits for one.
struct Places {
    free: Mutex<Vec<usize>>,
    freed: Condvar,
}

impl Places {
    fn new(count: usize) -> Self {
        Self {
            free: Mutex::new((0..count).rev().collect()),
            freed: Condvar::new(),
        }
    }

    fn take(&self, patience: Duration) -> Option<usize> {
        let is_empty = |free: &mut Vec<usize>| free.is_empty();
        let waited = self
            .freed
            .wait_timeout_while(self.lock(), patience, is_empty);
        let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        free.pop()
    }

    fn give(&self, place: usize) {
        self.lock().push(place);
        self.freed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Chunks of pinned memory: as many as fit the pool's bytes, and never more. Who finds none waits.
pub struct ChunkPool {
    pinned: Pinned,
    chunk_bytes: usize,
    chunks: usize,
    places: Places,
}

impl ChunkPool {
    /// A pool of `bytes` pinned bytes in chunks of `chunk_bytes`, both rounded down to what fits.
    ///
    /// # Errors
    /// No chunk fits, too many bytes, or pinning failed.
    pub fn new(
        context: &Arc<Context>,
        bytes: usize,
        chunk_bytes: usize,
    ) -> Result<Arc<Self>, GpuError> {
        let chunks = count_chunks(bytes, chunk_bytes)?;
        let pinned = Pinned::allocate(context, chunks * chunk_bytes)?;
        Ok(Self::over(pinned, chunk_bytes, chunks))
    }

    /// A pool over memory that is pinned already (a memfd's, so that the other process of a shm path sees it).
    ///
    /// # Errors
    /// No chunk fits.
    pub fn of(pinned: Pinned, chunk_bytes: usize) -> Result<Arc<Self>, GpuError> {
        let chunks = count_chunks(pinned.len(), chunk_bytes)?;
        Ok(Self::over(pinned, chunk_bytes, chunks))
    }

    fn over(pinned: Pinned, chunk_bytes: usize, chunks: usize) -> Arc<Self> {
        Arc::new(Self {
            pinned,
            chunk_bytes,
            chunks,
            places: Places::new(chunks),
        })
    }

    /// Takes a chunk if one is free.
    #[must_use]
    pub fn try_take(self: &Arc<Self>) -> Option<Chunk> {
        let place = self.places.take(Duration::ZERO)?;
        let pool = Arc::clone(self);
        Some(Chunk { pool, place })
    }

    /// Takes a chunk, waiting for at most `patience`.
    ///
    /// # Errors
    /// [`GpuError::Exhausted`] when none became free.
    pub fn take(self: &Arc<Self>, patience: Duration) -> Result<Chunk, GpuError> {
        let taken = self.places.take(patience);
        let place = taken.ok_or(GpuError::Exhausted(patience))?;
        let pool = Arc::clone(self);
        Ok(Chunk { pool, place })
    }

    /// Bytes of each chunk.
    #[must_use]
    pub fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// How many chunks there are.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// How many are free now.
    #[must_use]
    pub fn free_chunks(&self) -> usize {
        self.places.lock().len()
    }

    /// All of its memory.
    #[must_use]
    pub fn pinned(&self) -> &Pinned {
        &self.pinned
    }
}

fn count_chunks(bytes: usize, chunk_bytes: usize) -> Result<usize, GpuError> {
    if bytes > POOL_BYTES_MAX {
        return Err(GpuError::Limit {
            what: "bytes of a pinned pool",
            asked: bytes as u64,
            limit: POOL_BYTES_MAX as u64,
        });
    }
    if chunk_bytes < CHUNK_BYTES_MIN {
        return Err(GpuError::Misuse("a staging chunk has at least 64 KiB"));
    }
    match bytes / chunk_bytes {
        0 => Err(GpuError::Misuse("not one chunk fits the pool")),
        chunks => Ok(chunks),
    }
}

/// A chunk in use. Goes back to its pool when dropped: only once no copy and no peer uses it any more.
pub struct Chunk {
    pool: Arc<ChunkPool>,
    place: usize,
}

impl Chunk {
    /// Where it starts in [`ChunkPool::pinned`]'s region.
    #[must_use]
    pub fn offset(&self) -> u64 {
        (self.place * self.pool.chunk_bytes) as u64
    }

    /// Its address for kernels and copies.
    #[must_use]
    pub fn device_address(&self) -> u64 {
        self.pool.pinned.device_address + self.offset()
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "chunks have at least 64 KiB")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.pool.chunk_bytes
    }

    /// Its number in the pool.
    #[must_use]
    pub fn place(&self) -> usize {
        self.place
    }

    /// The pool's memory; this chunk's bytes start at [`Self::offset`].
    #[must_use]
    pub fn region(&self) -> &Region {
        self.pool.pinned.region()
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.pool.places.give(self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_bounded_and_has_at_least_one_chunk() {
        assert_eq!(count_chunks(256 << 20, 16 << 20), Ok(16));
        assert_eq!(count_chunks((256 << 20) - 1, 16 << 20), Ok(15));
        assert!(count_chunks(1 << 20, 2 << 20).is_err());
        assert!(count_chunks(1 << 20, CHUNK_BYTES_MIN - 1).is_err());
        assert!(count_chunks(POOL_BYTES_MAX, 1 << 20).is_ok());
        assert!(matches!(
            count_chunks(POOL_BYTES_MAX + 1, 1 << 20),
            Err(GpuError::Limit { .. })
        ));
    }

    #[test]
    fn who_finds_no_place_waits_until_one_is_given_back() {
        let places = Arc::new(Places::new(2));
        let (first, second) = (places.take(Duration::ZERO), places.take(Duration::ZERO));
        assert_eq!((first, second), (Some(0), Some(1)));
        assert_eq!(places.take(Duration::from_millis(1)), None);
        let waiter = Arc::clone(&places);
        let waiting = std::thread::spawn(move || waiter.take(Duration::from_secs(60)));
        places.give(1);
        assert_eq!(waiting.join().ok(), Some(Some(1)));
        assert_eq!(places.lock().len(), 0);
    }
}
