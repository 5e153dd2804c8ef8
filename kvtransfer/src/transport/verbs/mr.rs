//! Registered memory: what the adapter may read and write.
//!
//! A large region is registered in chunks of at most 2 GiB. eRDMA drivers have truncated longer ones to 32 bits, and
//! devices bound the size of one registration; a work request therefore stays within a chunk.
#![expect(unsafe_code, reason = "calls into libibverbs")]

use std::{
    ffi::c_void,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::Arc,
};

use super::{
    error::{VerbsError, check, check_pointer},
    pd::Pd,
    sys::{self, ibv_mr},
};

/// The longest chunk, in bytes (erdma.md §1.4: never 4 GiB or more in one registration).
pub(crate) const CHUNK_BYTES_MAX: u64 = 2 << 30;

/// Most chunks of a region: 4 TiB of the longest ones, more than a host has.
pub(crate) const CHUNKS_MAX: usize = 2048;

/// What the adapter may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// A source of WRITEs and SENDs, or a buffer for receives.
    Local,
    /// A target of the peer's WRITEs.
    WriteTarget,
}

impl Access {
    /// `IBV_ACCESS_*`. Relaxed ordering is requested where `relaxed`; a completion still follows its bytes.
    const fn bits(self, relaxed: bool) -> u32 {
        let bits = match self {
            Self::Local => sys::IBV_ACCESS_LOCAL_WRITE,
            Self::WriteTarget => sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_REMOTE_WRITE,
        };
        if relaxed {
            bits | sys::IBV_ACCESS_RELAXED_ORDERING
        } else {
            bits
        }
    }
}

/// One registration. The memory stays pinned and reachable by its keys until this is dropped.
pub(crate) struct Mr {
    pd: Arc<Pd>,
    raw: NonNull<ibv_mr>,
    lkey: u32,
    rkey: u32,
}

// SAFETY: a registration is only read after it is made, and libibverbs allows freeing it on any thread.
unsafe impl Send for Mr {}
// SAFETY: as above.
unsafe impl Sync for Mr {}

impl Mr {
    /// Registers `len` bytes at `address` (host memory, or device memory where the kernel has a peer-memory module).
    ///
    /// # Safety
    /// Until the result is dropped the memory must stay mapped, and nobody may hold a Rust reference to bytes that
    /// the adapter writes: with [`Access::WriteTarget`] a peer that knows the key writes at any time.
    pub(crate) unsafe fn register(
        pd: &Arc<Pd>,
        address: u64,
        len: u64,
        access: Access,
    ) -> Result<Self, VerbsError> {
        let length = checked_len(len)?;
        let pointer = pointer(address)?;
        let verbs = &pd.context().library().verbs;
        if let Some(register) = verbs.ibv_reg_mr_iova2 {
            let bits = access.bits(true);
            // SAFETY: the caller vouches for the memory; the domain is alive.
            let raw = unsafe { register(pd.raw(), pointer, length, address, bits) };
            if let Some(raw) = NonNull::new(raw) {
                return Ok(Self::new(pd, raw));
            }
            let error = VerbsError::last("ibv_reg_mr_iova2");
            if !matches!(error.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP)) {
                return Err(error);
            }
        }
        let bits = access.bits(false).cast_signed();
        // SAFETY: as above.
        let raw = unsafe { (verbs.ibv_reg_mr)(pd.raw(), pointer, length, bits) };
        Ok(Self::new(pd, check_pointer("ibv_reg_mr", raw)?))
    }

    /// Registers `len` bytes of a dma-buf from `offset`, to be addressed from `address`.
    ///
    /// # Safety
    /// As for [`Self::register`], for the memory behind the dma-buf. The descriptor may be closed afterwards.
    pub(crate) unsafe fn register_dmabuf(
        pd: &Arc<Pd>,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        address: u64,
        access: Access,
    ) -> Result<Self, VerbsError> {
        const OP: &str = "ibv_reg_dmabuf_mr";
        let length = checked_len(len)?;
        let verbs = &pd.context().library().verbs;
        let register = verbs
            .ibv_reg_dmabuf_mr
            .ok_or_else(|| VerbsError::call(OP, libc::EOPNOTSUPP))?;
        let bits = access.bits(false).cast_signed();
        // SAFETY: the caller vouches for the memory; the domain is alive.
        let raw = unsafe { register(pd.raw(), offset, length, address, fd.as_raw_fd(), bits) };
        Ok(Self::new(pd, check_pointer(OP, raw)?))
    }

    fn new(pd: &Arc<Pd>, raw: NonNull<ibv_mr>) -> Self {
        // SAFETY: the library returned a live registration, whose keys never change.
        let lkey = unsafe { (*raw.as_ptr()).lkey };
        // SAFETY: as above.
        let rkey = unsafe { (*raw.as_ptr()).rkey };
        Self {
            pd: Arc::clone(pd),
            raw,
            lkey,
            rkey,
        }
    }

    /// The key of local elements.
    pub(crate) fn lkey(&self) -> u32 {
        self.lkey
    }

    /// The key that peers use.
    pub(crate) fn rkey(&self) -> u32 {
        self.rkey
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: the registration is ours and dropped once; the adapter stops using it before this returns.
        let code = unsafe { (self.pd.context().library().verbs.ibv_dereg_mr)(self.raw.as_ptr()) };
        if let Err(error) = check("ibv_dereg_mr", code) {
            tracing::error!(%error, lkey = self.lkey, "a registration was not freed: its memory must not be reused");
        }
    }
}

fn checked_len(len: u64) -> Result<usize, VerbsError> {
    if len == 0 {
        return Err(VerbsError::Misuse("an empty range cannot be registered"));
    }
    if len > CHUNK_BYTES_MAX {
        return Err(VerbsError::Limit {
            what: "bytes of one registration",
            asked: len,
            limit: CHUNK_BYTES_MAX,
        });
    }
    usize::try_from(len).map_err(|_| VerbsError::Misuse("a range is longer than the address space"))
}

fn pointer(address: u64) -> Result<*mut c_void, VerbsError> {
    let address = usize::try_from(address)
        .map_err(|_| VerbsError::Misuse("an address is outside of the address space"))?;
    Ok(std::ptr::with_exposed_provenance_mut(address))
}

/// A place in a registered region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its address, as work requests name it.
    pub(crate) address: u64,
    /// Bytes from it to the end of its chunk.
    pub(crate) bytes: u64,
    /// The chunk's local key.
    pub(crate) lkey: u32,
    /// The chunk's remote key.
    pub(crate) rkey: u32,
}

/// A region of any length, registered in chunks.
pub(crate) struct RegisteredRegion {
    base: u64,
    len: u64,
    chunk_bytes: u64,
    chunks: Vec<Mr>,
}

impl RegisteredRegion {
    /// Registers `len` bytes at `base` in chunks of `chunk_bytes`, a power of two of at most [`CHUNK_BYTES_MAX`].
    ///
    /// # Safety
    /// As for [`Mr::register`].
    pub(crate) unsafe fn register(
        pd: &Arc<Pd>,
        base: u64,
        len: u64,
        chunk_bytes: u64,
        access: Access,
    ) -> Result<Self, VerbsError> {
        Self::build(base, len, chunk_bytes, |offset, bytes| {
            // SAFETY: the caller vouches for the whole range, of which this is a part.
            unsafe { Mr::register(pd, base + offset, bytes, access) }
        })
    }

    /// Registers `len` bytes of a dma-buf from `offset`, to be addressed from `base`.
    ///
    /// # Safety
    /// As for [`Mr::register_dmabuf`].
    pub(crate) unsafe fn register_dmabuf(
        pd: &Arc<Pd>,
        fd: BorrowedFd<'_>,
        offset: u64,
        base: u64,
        len: u64,
        chunk_bytes: u64,
        access: Access,
    ) -> Result<Self, VerbsError> {
        let end = offset.checked_add(len);
        if end.is_none() {
            return Err(VerbsError::Misuse("a dma-buf range wraps around"));
        }
        Self::build(base, len, chunk_bytes, |at, bytes| {
            // SAFETY: the caller vouches for the whole range, of which this is a part.
            unsafe { Mr::register_dmabuf(pd, fd, offset + at, bytes, base + at, access) }
        })
    }

    fn build(
        base: u64,
        len: u64,
        chunk_bytes: u64,
        mut register: impl FnMut(u64, u64) -> Result<Mr, VerbsError>,
    ) -> Result<Self, VerbsError> {
        let chunks = cut(base, len, chunk_bytes)?
            .map(|(offset, bytes)| register(offset, bytes))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            base,
            len,
            chunk_bytes,
            chunks,
        })
    }

    /// The address of its first byte.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The length of each chunk but the last, in bytes: peers need it to find the key of an offset.
    pub(crate) fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// The remote keys of the chunks, in order.
    pub(crate) fn rkeys(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.chunks.iter().map(Mr::rkey)
    }

    /// The place of `offset`; `None` past the end.
    pub(crate) fn piece(&self, offset: u64) -> Option<Piece> {
        let (index, bytes) = locate(self.len, self.chunk_bytes, offset)?;
        let chunk = self.chunks.get(index)?;
        Some(Piece {
            address: self.base + offset,
            bytes,
            lkey: chunk.lkey,
            rkey: chunk.rkey,
        })
    }
}

/// The (offset, length) of each chunk.
fn cut(
    base: u64,
    len: u64,
    chunk_bytes: u64,
) -> Result<impl Iterator<Item = (u64, u64)>, VerbsError> {
    if !chunk_bytes.is_power_of_two() || chunk_bytes > CHUNK_BYTES_MAX {
        return Err(VerbsError::Misuse(
            "a chunk must be a power of two of at most 2 GiB",
        ));
    }
    if len == 0 || base.checked_add(len).is_none() {
        return Err(VerbsError::Misuse(
            "a region must have bytes and not wrap around",
        ));
    }
    let count = len.div_ceil(chunk_bytes);
    if count > CHUNKS_MAX as u64 {
        return Err(VerbsError::Limit {
            what: "chunks of a region",
            asked: count,
            limit: CHUNKS_MAX as u64,
        });
    }
    Ok((0..count).map(move |index| {
        let offset = index * chunk_bytes;
        (offset, chunk_bytes.min(len - offset))
    }))
}

/// The chunk of `offset` and the bytes from there to the chunk's end.
fn locate(len: u64, chunk_bytes: u64, offset: u64) -> Option<(usize, u64)> {
    if offset >= len {
        return None;
    }
    let index = offset / chunk_bytes;
    let end = len.min((index + 1) * chunk_bytes);
    Some((usize::try_from(index).ok()?, end - offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_tile_the_region_and_every_offset_lies_in_its_own(
            base in 0..u64::MAX / 2,
            len in 1..1u64 << 20,
            shift in 10u32..22,
            at in any::<prop::sample::Index>(),
        ) {
            let chunk_bytes = 1 << shift;
            let chunks: Vec<_> = cut(base, len, chunk_bytes).expect("within bounds").collect();
            let mut next = 0;
            for &(offset, bytes) in &chunks {
                prop_assert_eq!(offset, next);
                prop_assert!(bytes > 0 && bytes <= chunk_bytes);
                next += bytes;
            }
            prop_assert_eq!(next, len);
            let offset = at.index(usize::try_from(len).expect("small")) as u64;
            let (index, left) = locate(len, chunk_bytes, offset).expect("inside");
            let (start, bytes) = chunks[index];
            prop_assert!((start..start + bytes).contains(&offset));
            prop_assert_eq!(offset + left, start + bytes);
            prop_assert_eq!(locate(len, chunk_bytes, len), None);
        }
    }

    #[test]
    fn bounds_hold_at_their_edges() {
        let most = CHUNKS_MAX as u64;
        assert_eq!(
            cut(0, most * 4096, 4096).map(Iterator::count),
            Ok(CHUNKS_MAX)
        );
        assert!(cut(0, most * 4096 + 1, 4096).is_err());
        assert!(cut(0, 4096, CHUNK_BYTES_MAX).is_ok());
        assert!(cut(0, 4096, CHUNK_BYTES_MAX * 2).is_err());
        assert!(cut(0, 4096, 3000).is_err());
        assert!(cut(0, 0, 4096).is_err());
        assert!(cut(u64::MAX - 10, 4096, 4096).is_err());
        assert!(checked_len(CHUNK_BYTES_MAX).is_ok());
        assert!(checked_len(CHUNK_BYTES_MAX + 1).is_err());
        assert!(checked_len(0).is_err());
    }

    #[test]
    fn only_targets_are_remotely_writable() {
        assert_eq!(Access::Local.bits(false), 1);
        assert_eq!(Access::WriteTarget.bits(false), 3);
        assert_eq!(Access::WriteTarget.bits(true), 3 | 1 << 20);
    }
}
