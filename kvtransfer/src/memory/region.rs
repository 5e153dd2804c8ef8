//! Regions: heap, anonymous mappings, huge pages, memfds, files, and memory owned by somebody else.
#![expect(
    unsafe_code,
    reason = "raw memory that peers may change must not be behind references"
)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    fs::OpenOptions,
    io,
    os::fd::OwnedFd,
    path::Path,
    ptr::NonNull,
    sync::Arc,
};

use memmap2::{MmapOptions, MmapRaw};
use thiserror::Error;

use super::device::{Device, DeviceError, Piece};

/// Alignment of heap regions: a page, so that no two regions share one.
const PAGE: usize = 4096;

/// Why a region could not be made or accessed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegionError {
    /// A region must have at least one byte and at most `isize::MAX`.
    #[error("a region of {0} bytes is not possible")]
    Length(usize),
    /// The system refused memory.
    #[error("{what} of {len} bytes failed: {source}{fix}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// How much.
        len: usize,
        /// The system's answer.
        source: io::Error,
        /// What the user can do about it.
        fix: &'static str,
    },
    /// An access outside the region.
    #[error("bytes {offset}..{offset}+{len} are outside the region of {region} bytes")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: usize,
        /// The region's length.
        region: usize,
    },
    /// Processor instructions cannot reach the memory of a device.
    #[error("the memory of {device} is its device's to copy")]
    OnDevice {
        /// The device's name.
        device: String,
    },
    /// The device that should copy did not.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

enum Backing {
    Heap(Layout),
    Map(#[expect(dead_code, reason = "keeps the mapping alive")] MmapRaw),
    /// Memory of somebody who promised to keep it.
    External,
    /// The same, on a device.
    Device(Arc<dyn Device>),
}

/// A range of memory that transfers read from and write to.
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    backing: Backing,
    memfd: Option<OwnedFd>,
}

// SAFETY: the region is plain bytes behind a pointer that stays valid for its whole life (upheld by `backing`); it is
// accessed by copies only, and torn values are acceptable: what a peer writes is trusted after its completion only.
unsafe impl Send for Region {}
// SAFETY: as above; concurrent copies of the same bytes may tear, which no invariant depends on.
unsafe impl Sync for Region {}

impl Region {
    /// Zeroed memory from the allocator, page-aligned.
    ///
    /// # Errors
    /// An impossible length, or the allocator has none.
    pub fn heap(len: usize) -> Result<Self, RegionError> {
        let layout = Layout::from_size_align(len, PAGE).map_err(|_| RegionError::Length(len))?;
        if len == 0 {
            return Err(RegionError::Length(len));
        }
        // SAFETY: the layout has a non-zero size, checked above.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).ok_or_else(|| RegionError::System {
            what: "a heap allocation",
            len,
            source: io::ErrorKind::OutOfMemory.into(),
            fix: "",
        })?;
        Ok(Self {
            base,
            len,
            backing: Backing::Heap(layout),
            memfd: None,
        })
    }

    /// A zeroed anonymous mapping; its pages exist when touched.
    ///
    /// # Errors
    /// An impossible length, or the system refuses.
    pub fn mmap(len: usize) -> Result<Self, RegionError> {
        Self::anonymous(len, None, "an anonymous mapping", "")
    }

    /// An anonymous mapping of 2 MiB huge pages.
    ///
    /// # Errors
    /// The system has not enough of them reserved, or the length is impossible.
    pub fn huge(len: usize) -> Result<Self, RegionError> {
        const FIX: &str = " (reserve huge pages: sysctl vm.nr_hugepages)";
        const HUGE_2M_BITS: u8 = 21;
        let len = len
            .checked_next_multiple_of(2 << 20)
            .ok_or(RegionError::Length(len))?;
        Self::anonymous(len, Some(HUGE_2M_BITS), "a mapping of huge pages", FIX)
    }

    fn anonymous(
        len: usize,
        huge_bits: Option<u8>,
        what: &'static str,
        fix: &'static str,
    ) -> Result<Self, RegionError> {
        if len == 0 {
            return Err(RegionError::Length(len));
        }
        let mut options = MmapOptions::new();
        options.len(len);
        if huge_bits.is_some() {
            options.huge(huge_bits);
        }
        let map = options.map_anon().map_err(|source| RegionError::System {
            what,
            len,
            source,
            fix,
        })?;
        Ok(Self::mapped(map.into(), None))
    }

    /// A memfd mapping, which can be handed to another process by its descriptor.
    ///
    /// # Errors
    /// An impossible length, or the system refuses.
    pub fn memfd(name: &str, len: usize) -> Result<Self, RegionError> {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        if len == 0 {
            return Err(RegionError::Length(len));
        }
        let failed = |error: rustix::io::Errno| RegionError::System {
            what: "a memfd",
            len,
            source: error.into(),
            fix: "",
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create(name, flags).map_err(failed)?;
        ftruncate(&fd, len as u64).map_err(failed)?;
        // Whoever maps it can rely on its length: no SIGBUS by a peer that shrinks it.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&fd, seals).map_err(failed)?;
        let map =
            MmapOptions::new()
                .len(len)
                .map_raw(&fd)
                .map_err(|source| RegionError::System {
                    what: "mapping a memfd",
                    len,
                    source,
                    fix: "",
                })?;
        Ok(Self::mapped(map, Some(fd)))
    }

    /// Maps a memfd that a peer sent, if it is sealed against shrinking and at least `len` long.
    ///
    /// # Errors
    /// It is not sealed or too short, or the system refuses.
    pub fn peer_memfd(fd: OwnedFd, len: usize) -> Result<Self, RegionError> {
        use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
        let failed = |what, source: io::Error| RegionError::System {
            what,
            len,
            source,
            fix: "",
        };
        let seals = fcntl_get_seals(&fd).map_err(|e| failed("reading a peer's seals", e.into()))?;
        let stat = fstat(&fd).map_err(|e| failed("measuring a peer's memfd", e.into()))?;
        let long_enough = usize::try_from(stat.st_size).is_ok_and(|size| size >= len);
        if !seals.contains(SealFlags::SHRINK) || !long_enough || len == 0 {
            let source = io::Error::new(io::ErrorKind::InvalidData, "not sealed, or too short");
            return Err(failed("taking a peer's memfd", source));
        }
        let map = MmapOptions::new()
            .len(len)
            .map_raw(&fd)
            .map_err(|source| failed("mapping a peer's memfd", source))?;
        Ok(Self::mapped(map, Some(fd)))
    }

    /// A shared mapping of a file, grown to `len`.
    ///
    /// # Errors
    /// An impossible length, or the file cannot be opened, grown or mapped.
    pub fn file(path: &Path, len: usize) -> Result<Self, RegionError> {
        if len == 0 {
            return Err(RegionError::Length(len));
        }
        let failed = |source| RegionError::System {
            what: "mapping a file",
            len,
            source,
            fix: "",
        };
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let file = file.map_err(failed)?;
        if file.metadata().map_err(failed)?.len() < len as u64 {
            file.set_len(len as u64).map_err(failed)?;
        }
        let map = MmapOptions::new().len(len).map_raw(&file).map_err(failed)?;
        Ok(Self::mapped(map, None))
    }

    /// Memory that somebody else owns.
    ///
    /// # Safety
    /// `base..base + len` must be readable and writable by copies from any thread until the region is dropped, which the
    /// engine does no earlier than its shutdown.
    pub unsafe fn external(base: NonNull<u8>, len: usize) -> Self {
        Self {
            base,
            len,
            backing: Backing::External,
            memfd: None,
        }
    }

    /// Memory of `device` that somebody else owns.
    ///
    /// # Errors
    /// An impossible length, or address 0.
    ///
    /// # Safety
    /// `address..address + len` must be memory of the device, allocated until the region is dropped, which the engine does no
    /// earlier than its shutdown; with released memory (`Engine::release_memory`) until that has returned.
    pub unsafe fn device(
        device: Arc<dyn Device>,
        address: u64,
        len: usize,
    ) -> Result<Self, RegionError> {
        let base = usize::try_from(address).ok();
        let base = base.and_then(|base| NonNull::new(std::ptr::without_provenance_mut(base)));
        let fits = isize::try_from(len).is_ok() && address.checked_add(len as u64).is_some();
        let base = base.filter(|_| fits && len > 0);
        Ok(Self {
            base: base.ok_or(RegionError::Length(len))?,
            len,
            backing: Backing::Device(device),
            memfd: None,
        })
    }

    /// The device whose memory it is; `None` for host memory.
    pub fn on_device(&self) -> Option<&Arc<dyn Device>> {
        match &self.backing {
            Backing::Device(device) => Some(device),
            _ => None,
        }
    }

    fn mapped(map: MmapRaw, memfd: Option<OwnedFd>) -> Self {
        let base = NonNull::new(map.as_mut_ptr()).expect("invariant: a mapping is never at null");
        let len = map.len();
        Self {
            base,
            len,
            backing: Backing::Map(map),
            memfd,
        }
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Virtual address in this process.
    pub fn base_address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// The descriptor of a memfd region.
    pub fn memfd_fd(&self) -> Option<&OwnedFd> {
        self.memfd.as_ref()
    }

    /// Pointer to `len` bytes at `offset` of host memory, for a system call or copy.
    ///
    /// # Errors
    /// The range is not inside the region, or the region is a device's.
    pub(crate) fn at(&self, offset: u64, len: usize) -> Result<NonNull<u8>, RegionError> {
        let start = self.start_of(offset, len)?;
        if let Backing::Device(device) = &self.backing {
            let device = device.name();
            return Err(RegionError::OnDevice { device });
        }
        // SAFETY: `start <= self.len`, so the result is within the allocation or one past its end.
        Ok(unsafe { self.base.add(start) })
    }

    /// The device's address of `len` bytes at `offset`.
    ///
    /// # Errors
    /// The range is not inside the region.
    pub(crate) fn piece(&self, offset: u64, len: u64) -> Result<Piece, RegionError> {
        let bytes = usize::try_from(len).map_err(|_| RegionError::Length(usize::MAX))?;
        self.start_of(offset, bytes)?;
        let address = self.base_address() + offset;
        Ok(Piece { address, len })
    }

    fn start_of(&self, offset: u64, len: usize) -> Result<usize, RegionError> {
        let outside = || RegionError::OutOfBounds {
            offset,
            len,
            region: self.len,
        };
        let start = usize::try_from(offset).map_err(|_| outside())?;
        match start.checked_add(len) {
            Some(end) if end <= self.len => Ok(start),
            _ => Err(outside()),
        }
    }

    /// Copies bytes in. Where the region is a device's, each call makes a stream for itself: good for filling and looking, not for
    /// data paths.
    ///
    /// # Errors
    /// The range is not inside the region, or its device fails.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), RegionError> {
        if let Backing::Device(device) = &self.backing {
            let piece = self.piece(offset, bytes.len() as u64)?;
            if bytes.is_empty() {
                return Ok(());
            }
            let host = Self::heap(bytes.len())?;
            host.write_at(0, bytes)?;
            return Ok(device.copier()?.scatter(&host, 0, &[piece])?);
        }
        let target = self.at(offset, bytes.len())?;
        // SAFETY: `at` checked the range; `bytes` is an ordinary slice that cannot overlap raw region memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies bytes out; see [`Region::write_at`] for devices.
    ///
    /// # Errors
    /// The range is not inside the region, or its device fails.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), RegionError> {
        if let Backing::Device(device) = &self.backing {
            let piece = self.piece(offset, out.len() as u64)?;
            if out.is_empty() {
                return Ok(());
            }
            let host = Self::heap(out.len())?;
            device.copier()?.gather(&[piece], &host, 0)?;
            return host.read_at(0, out);
        }
        let source = self.at(offset, out.len())?;
        // SAFETY: `at` checked the range; `out` is an ordinary slice that cannot overlap raw region memory.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies bytes from another region, both of host memory.
    ///
    /// # Errors
    /// A range is not inside its region, or one is a device's.
    pub fn copy_from(
        &self,
        offset: u64,
        source: &Self,
        source_offset: u64,
        len: usize,
    ) -> Result<(), RegionError> {
        let target = self.at(offset, len)?;
        let from = source.at(source_offset, len)?;
        // SAFETY: `at` checked both ranges; `copy` allows them to overlap.
        unsafe { std::ptr::copy(from.as_ptr(), target.as_ptr(), len) };
        Ok(())
    }

    /// Sets a range of host memory to one byte value.
    ///
    /// # Errors
    /// The range is not inside the region, or that is a device's.
    pub fn fill(&self, offset: u64, len: usize, value: u8) -> Result<(), RegionError> {
        let target = self.at(offset, len)?;
        // SAFETY: `at` checked the range.
        unsafe { std::ptr::write_bytes(target.as_ptr(), value, len) };
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Backing::Heap(layout) = self.backing {
            // SAFETY: `base` came from `alloc_zeroed` with this layout and is freed once, here.
            unsafe { dealloc(self.base.as_ptr(), layout) };
        }
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.backing {
            Backing::Heap(_) => "heap",
            Backing::Map(_) => "mapping",
            Backing::External => "external",
            Backing::Device(_) => "device",
        };
        f.debug_struct("Region")
            .field("kind", &kind)
            .field("len", &self.len)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{Region, RegionError};

    #[test]
    fn every_kind_reads_back_what_was_written() {
        let folder = std::env::temp_dir().join(format!("kvt-region-{}", std::process::id()));
        let regions = [
            Region::heap(10_000),
            Region::mmap(10_000),
            Region::memfd("test", 10_000),
            Region::file(&folder, 10_000),
        ];
        for region in regions {
            let region = region.expect("this host has memory");
            region.write_at(9_990, b"0123456789").expect("in bounds");
            let mut out = [0; 12];
            region.read_at(9_988, &mut out).expect("in bounds");
            assert_eq!(&out, b"\0\x000123456789", "{region:?}");
            assert!(matches!(
                region.write_at(9_991, &out),
                Err(RegionError::OutOfBounds { .. })
            ));
            assert!(matches!(
                region.at(u64::MAX, 2),
                Err(RegionError::OutOfBounds { .. })
            ));
        }
        std::fs::remove_file(folder).expect("the file region made it");
    }

    #[test]
    fn a_memfd_is_shared_with_whoever_maps_its_descriptor() {
        let mine = Region::memfd("shared", 8192).expect("memfd");
        let fd = mine
            .memfd_fd()
            .expect("it has one")
            .try_clone()
            .expect("dup");
        let theirs = Region::peer_memfd(fd, 8192).expect("sealed and long enough");
        mine.write_at(100, b"seen").expect("in bounds");
        let mut out = [0; 4];
        theirs.read_at(100, &mut out).expect("in bounds");
        assert_eq!(&out, b"seen");
        let again = mine
            .memfd_fd()
            .expect("it has one")
            .try_clone()
            .expect("dup");
        assert!(
            Region::peer_memfd(again, 8193).is_err(),
            "longer than it is"
        );
    }

    #[test]
    fn empty_and_absurd_lengths_are_refused() {
        for region in [
            Region::heap(0),
            Region::mmap(0),
            Region::memfd("x", 0),
            Region::heap(usize::MAX),
        ] {
            assert!(region.is_err());
        }
    }

    #[test]
    fn huge_pages_work_or_say_how_to_get_them() {
        match Region::huge(1) {
            Ok(region) => assert_eq!(region.len(), 2 << 20),
            Err(error) => assert!(error.to_string().contains("vm.nr_hugepages"), "{error}"),
        }
    }
}
