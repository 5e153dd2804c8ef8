//! GPU memory as a dma-buf: a descriptor that RDMA devices register.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{
    ffi::c_int,
    os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd},
};

use cudarc::driver::sys::CUmemRangeHandleType;

use super::{
    driver::{self, Context},
    error::GpuError,
    memory::known,
    pointer,
};
use crate::memory::device::Exported;

/// An exported range. The descriptor serves every RDMA device and may be closed after the last registration; the memory
/// must stay as long as any.
#[derive(Debug)]
pub struct DmaBuf {
    descriptor: OwnedFd,
    range: Rounded,
}

/// A range, and the host pages around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rounded {
    base: u64,
    bytes: u64,
    offset: u64,
}

impl Rounded {
    /// Rounds a range out to pages.
    fn around(address: u64, len: u64, page: u64) -> Option<Self> {
        let base = address - address % page;
        let end = address.checked_add(len)?.checked_next_multiple_of(page)?;
        (len > 0).then_some(Self {
            base,
            bytes: end - base,
            offset: address - base,
        })
    }
}

impl DmaBuf {
    /// Exports the host pages around `len` bytes at `address`: exactly the caller's range, because the driver's own idea of the
    /// allocation is one physical piece where memory is virtual.
    ///
    /// # Errors
    /// [`GpuError::Refused`] with the reason where this GPU, driver or memory exports none.
    pub fn export(context: &Context, address: u64, len: u64) -> Result<Self, GpuError> {
        const OP: &str = "cuMemGetHandleForAddressRange";
        const PLAIN_MAPPING: u64 = 0;
        let refused = |reason: String| GpuError::Refused {
            what: "a dma-buf",
            address,
            reason,
        };
        if !context.facts().exports_dmabuf {
            return Err(refused(
                "the GPU's driver exports none (needs NVIDIA's open kernel modules and Linux 5.12)"
                    .to_owned(),
            ));
        }
        let page = host_page()?;
        let range = Rounded::around(address, len, page).ok_or(GpuError::Misuse(
            "an exported range has bytes and does not wrap",
        ))?;
        let facts = pointer::inspect(context, address)?;
        if !facts.kind.is_device() {
            return Err(refused(format!("it is {}", facts.kind.words())));
        }
        let call = known(context.calls().cuMemGetHandleForAddressRange, OP)?;
        let bytes = usize::try_from(range.bytes)
            .map_err(|_| GpuError::Misuse("a range is longer than the address space"))?;
        let kind = CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD as u32;
        let _current = context.enter()?;
        let mut number: c_int = -1;
        let out = (&raw mut number).cast();
        // SAFETY: writes a descriptor, which nobody else owns.
        let code = unsafe { call(out, range.base, bytes, kind, PLAIN_MAPPING) };
        driver::check(context.calls(), OP, code)
            .map_err(|error| refused(format!("{error} ({})", facts.kind.words())))?;
        // SAFETY: the driver made the descriptor for us just now.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        Ok(Self { descriptor, range })
    }

    /// A descriptor that is none of a GPU's, for devices that only look whether it is open.
    #[cfg(test)]
    pub(super) fn of_memfd(address: u64, len: u64) -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let descriptor = rustix::fs::memfd_create("no-dmabuf", flags).expect("memfd");
        let range = Rounded::around(address, len, 4096).expect("no wrap");
        Self { descriptor, range }
    }

    /// Where the caller's range starts in the buffer, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.range.offset
    }

    /// Bytes of the buffer: the range, rounded out to host pages.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.range.bytes
    }

    /// Its size as the kernel knows it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kernel_bytes(&self) -> Result<u64, GpuError> {
        let end = rustix::fs::seek(&self.descriptor, rustix::fs::SeekFrom::End(0));
        end.map_err(|error| GpuError::system("measuring a dma-buf", error))
    }
}

/// Bytes of a page of the host's.
fn host_page() -> Result<u64, GpuError> {
    // SAFETY: asking has no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes)
        .ok()
        .filter(|bytes| bytes.is_power_of_two())
        .ok_or(GpuError::Misuse("the host says no page size"))
}

impl From<DmaBuf> for Exported {
    fn from(buffer: DmaBuf) -> Self {
        Self {
            offset: buffer.offset(),
            descriptor: buffer.descriptor,
        }
    }
}

impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rounding_covers_the_range_and_no_page_more(
            address in 0..1_u64 << 48, len in 1..1_u64 << 40, page in prop_oneof![Just(4096_u64), Just(65536)],
        ) {
            let rounded = Rounded::around(address, len, page).expect("no wrap");
            prop_assert_eq!(rounded.base % page, 0);
            prop_assert_eq!(rounded.bytes % page, 0);
            prop_assert_eq!(rounded.base + rounded.offset, address);
            prop_assert!(rounded.offset < page);
            prop_assert!(rounded.offset + len <= rounded.bytes);
            prop_assert!(rounded.bytes - rounded.offset - len < page);
        }
    }

    #[test]
    fn empty_and_wrapping_ranges_are_none() {
        assert_eq!(Rounded::around(4096, 0, 4096), None);
        assert_eq!(Rounded::around(u64::MAX - 5, 5, 4096), None);
        assert_eq!(Rounded::around(u64::MAX - 5, 10, 4096), None);
    }
}
