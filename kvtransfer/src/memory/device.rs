//! Memory that processor instructions cannot reach: a GPU's. The engine sees it through these traits alone, so that it needs
//! no CUDA to build, to start or to be tested (`testing::fake_device`).
#![forbid(unsafe_code)]

use std::{fmt::Debug, ops::Range, os::fd::OwnedFd, sync::Arc};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Region;

/// Most bytes with which an allocation is described to another process: a CUDA IPC handle has 64; virtual memory has 12 for each
/// of its physical pieces, so that torch's largest buffers fit (16 GiB in pieces of 20 MiB).
pub const SHARE_BYTES_MAX: usize = 10 << 10;

/// Bytes that a flight to the host brings first, and after which a receiving lane lets a part start for the device: a wire takes
/// some 100 µs for them, and PCIe 20.
pub const PART_BYTES: usize = 1 << 20;

/// What a device refused, in its driver's words.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{call} on {device}: {reason}")]
pub struct DeviceError {
    /// The driver call.
    pub call: &'static str,
    /// The device's name.
    pub device: String,
    /// What the driver said, and what helps.
    pub reason: String,
}

/// Bytes that lie together in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Address on the device.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// A copy within device memory, or from another process's device memory into ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Address to read.
    pub source: u64,
    /// Address to write.
    pub target: u64,
    /// Bytes.
    pub len: u64,
}

/// Where both sides of a buffer begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Address to read.
    pub source: u64,
    /// Address to write.
    pub target: u64,
}

/// Bytes from one item, and from one row of an item, to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// From item to item.
    pub item: u64,
    /// From row to row.
    pub row: u64,
}

/// Many copies in few words: *for each buffer, for each item, for each row* `row_len` bytes, of all of which the bytes numbered
/// `range` are copied. Row `r` of the item numbered `i` in a list starts at `begin + i * stride.item + r * stride.row`.
#[derive(Clone, Debug)]
pub struct Grid<'a> {
    /// Where each buffer's item 0 begins.
    pub buffers: &'a [Ends],
    /// The items to read.
    pub source_items: &'a [i32],
    /// The items to write, as many.
    pub target_items: &'a [i32],
    /// Where they are read.
    pub source: Strides,
    /// Where they are written.
    pub target: Strides,
    /// Rows of an item, at least one.
    pub rows: u32,
    /// Bytes of a row, at least one.
    pub row_len: u32,
    /// Bytes, counted from the first row of the first item in the first buffer.
    pub range: Range<u64>,
}

/// An allocation as another process on this host can take it into use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// What [`Device::attach`] takes, at most [`SHARE_BYTES_MAX`] bytes; equal for all addresses of one allocation.
    pub allocation: Vec<u8>,
    /// Where the address lies in the allocation.
    pub offset: u64,
}

/// A range of device memory as RDMA devices take it into use: a dma-buf.
#[derive(Debug)]
pub struct Exported {
    /// Serves every RDMA device, and may be closed after the last registration.
    pub descriptor: OwnedFd,
    /// Where the range starts in the buffer, in bytes.
    pub offset: u64,
}

/// What must happen between the notice of a peer's WRITEs and a kernel that reads them (erdma.md §5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Visibility {
    /// Nothing: work started after the notice sees the bytes.
    AtOnce,
    /// [`Device::flush_writes`], once for each completed transfer.
    AfterFlush,
    /// The device orders nothing and flushes nothing from the host: such memory is staged.
    Never,
}

/// A device with memory.
pub trait Device: Send + Sync + Debug {
    /// What logs call it, for example `cuda:0 (NVIDIA H200)`.
    fn name(&self) -> String;

    /// Describes `len` bytes at `address` to another process on this host.
    ///
    /// # Errors
    /// The allocation's kind cannot be shared, in words.
    fn share(&self, address: u64, len: u64) -> Result<Share, DeviceError>;

    /// The memory is about to go away: what sharing keeps alive is let go.
    fn unshare(&self);

    /// Takes another process's allocation into use.
    ///
    /// # Errors
    /// It is gone, or its device cannot be reached from here.
    fn attach(&self, allocation: &[u8]) -> Result<Arc<dyn Attached>, DeviceError>;

    /// Something that copies, for one thread at a time.
    ///
    /// # Errors
    /// The driver has no stream or memory for it.
    fn copier(&self) -> Result<Box<dyn Copier>, DeviceError>;

    /// Watches for what an application's event stands for now. The event, an integer of the driver, may be recorded anew or
    /// destroyed when this returns.
    ///
    /// # Errors
    /// The driver does not know it.
    fn await_event(&self, event: u64) -> Result<Box<dyn Awaited>, DeviceError>;

    /// Pins host memory for as long as the result lives, so that the device reads and writes it at full speed.
    ///
    /// # Errors
    /// The driver cannot pin so much; copies work all the same, only slower.
    fn pin(&self, region: &Arc<Region>) -> Result<Box<dyn Pinned>, DeviceError>;

    /// Its PCI address, as verdicts name it.
    fn pci_address(&self) -> String;

    /// Exports `len` bytes at `address` as a dma-buf.
    ///
    /// # Errors
    /// The device, its driver or the kind of memory has none, in words.
    fn export(&self, address: u64, len: u64) -> Result<Exported, DeviceError>;

    /// When its kernels see what RDMA devices write.
    fn visibility(&self) -> Visibility;

    /// Makes everything that RDMA devices wrote before the call visible to work started after it. Takes some microseconds.
    ///
    /// # Errors
    /// The driver's reasons.
    fn flush_writes(&self) -> Result<(), DeviceError>;
}

/// Another process's allocation, in use here. Dropping it gives it up.
pub trait Attached: Send + Sync + Debug {
    /// Where it begins in this process's view of the device.
    fn address(&self) -> u64;
    /// Its bytes.
    fn len(&self) -> u64;
    /// Never: an allocation has bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Something on the device that is waited for.
pub trait Awaited: Send + Sync + Debug {
    /// Whether it has happened.
    ///
    /// # Errors
    /// It failed, and with it whatever was to be written.
    fn is_done(&self) -> Result<bool, DeviceError>;
}

/// Host memory that is pinned until this is dropped.
pub trait Pinned: Send + Sync + Debug {}

/// Bytes on their way between host memory and a buffer that is the copier's own. The host memory must not be used otherwise
/// before [`Flight::wait`] says so; a copier that is dropped waits for its flights.
pub trait Flight: Send + Sync + Debug {
    /// Waits until the first `bytes` bytes have arrived (or all, if there are fewer).
    ///
    /// # Errors
    /// The copy failed, and with it everything behind it.
    fn wait(&self, bytes: u64) -> Result<(), DeviceError>;
}

/// Copies between device and host memory (pinned or not), and within device memory. Each call touches pages of the device only
/// until it returns, so that a gate held over the call bounds it; [`Copier::fetch`] and [`Copier::send`] go on with a
/// buffer of their own.
pub trait Copier: Send + Debug {
    /// Device pieces, one behind the other, into `host` from `offset` on.
    ///
    /// # Errors
    /// The copy failed; what was written is not known.
    fn gather(&mut self, pieces: &[Piece], host: &Region, offset: u64) -> Result<(), DeviceError>;

    /// The bytes of `host` from `offset` on, into device pieces.
    ///
    /// # Errors
    /// As for [`Copier::gather`].
    fn scatter(&mut self, host: &Region, offset: u64, pieces: &[Piece]) -> Result<(), DeviceError>;

    /// Moves within device memory; targets do not overlap each other or the sources.
    ///
    /// # Errors
    /// As for [`Copier::gather`].
    fn copy(&mut self, moves: &[Move]) -> Result<(), DeviceError>;

    /// As [`Copier::copy`], for copies that are described rather than listed.
    ///
    /// # Errors
    /// As for [`Copier::gather`].
    fn copy_grid(&mut self, grid: &Grid<'_>) -> Result<(), DeviceError>;

    /// As [`Copier::gather`], but the bytes reach `host` in the background and in order, the first [`PART_BYTES`] of them by
    /// themselves. The flight of the last call must have ended.
    ///
    /// # Errors
    /// As for [`Copier::gather`].
    fn fetch(
        &mut self,
        pieces: &[Piece],
        host: &Arc<Region>,
        offset: u64,
    ) -> Result<Box<dyn Flight>, DeviceError>;

    /// Lets the bytes `range` of `host` start for the device in the background. What was sent since the last
    /// [`Copier::deliver`] began at `host`'s first byte and goes on at this one.
    ///
    /// # Errors
    /// As for [`Copier::gather`].
    fn send(
        &mut self,
        host: &Arc<Region>,
        range: Range<u64>,
    ) -> Result<Box<dyn Flight>, DeviceError>;

    /// Writes what was sent into device pieces, one behind the other.
    ///
    /// # Errors
    /// As for [`Copier::gather`].
    fn deliver(&mut self, pieces: &[Piece]) -> Result<(), DeviceError>;
}
