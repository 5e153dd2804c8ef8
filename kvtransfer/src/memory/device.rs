//! Memory that processor instructions cannot reach: a GPU's. The engine sees it through these traits alone, so that it needs
//! no CUDA to build, to start or to be tested (`testing::fake_device`).
#![forbid(unsafe_code)]

use std::{fmt::Debug, os::fd::OwnedFd, sync::Arc};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Region;

/// Most bytes with which an allocation is described to another process: a CUDA IPC handle has 64; virtual memory has 12 for each
/// of its physical pieces, so that torch's largest buffers fit (16 GiB in pieces of 20 MiB).
pub const SHARE_BYTES_MAX: usize = 10 << 10;

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

/// Host memory that is pinned until this is dropped.
pub trait Pinned: Send + Sync + Debug {}

/// Copies between device and host memory (pinned or not), and within device memory. Each call returns when its bytes are where they belong and
/// reads and writes nothing afterwards, so that a gate held over the call bounds it.
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
}
