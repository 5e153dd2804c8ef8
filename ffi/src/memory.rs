//! The engine's memory: giving it up for a while, and writing to a peer's by address.
#![expect(unsafe_code, reason = "exported functions take raw pointers")]

use std::time::Duration;

use kvt::{
    engine::{Block, MemoryError, WriteError},
    ids::PeerId,
    layout::RegionId,
};

use crate::{
    argument::list,
    engine::{Opened, kvt_engine_t},
    handle::on,
    status::{
        Failure, KVT_BAD_ARGUMENT, KVT_OTHER, KVT_RDMA, KVT_SHUTDOWN, KVT_UNSETTLED,
        KVT_WOULD_WAIT, kvt_status_t,
    },
};

/// A stretch of this process's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_range_t {
    /// Where it starts.
    pub address: u64,
    /// Bytes, not 0.
    pub len: u64,
}

/// Some bytes of this process for an address of a peer's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_block_t {
    /// Where to read: inside the buffers of this engine's layout.
    pub source: u64,
    /// Where to write: inside the buffers of the peer's layout.
    pub target: u64,
    /// Bytes; 0 is skipped.
    pub len: u64,
}

/// Gives up buffers, so that the caller may free the memory behind them (SGLang does while it takes new weights). No
/// transfer opens from now on (`KVT_RELEASED`); live ones are waited for. With RDMA the registrations are undone, for which
/// peers are disconnected.
///
/// A range stands for every buffer that it touches, and for those that overlap them; no range at all stands for all
/// buffers. Buffers that are released stay so.
///
/// Ownership: `ranges` is read during the call only. The memory must not be freed before this has returned `KVT_OK`.
/// Threads: any; waits up to `timeout_ms`, and with RDMA some 100 ms more. Errors: `KVT_WOULD_WAIT` (transfers went on;
/// nothing was released), `KVT_RDMA` (still registered; try again), `KVT_BAD_ARGUMENT` (no buffer there),
/// `KVT_SHUTDOWN`.
///
/// # Safety
/// `engine` is NULL or alive; `ranges` is NULL or as long as it says.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_engine_release_memory(
    engine: *const kvt_engine_t,
    ranges: *const kvt_range_t,
    ranges_len: usize,
    timeout_ms: u32,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let ranges = unsafe { list(ranges, ranges_len, "ranges") }?;
        let regions = touched(opened, ranges)?;
        let timeout = Duration::from_millis(timeout_ms.into());
        Ok(opened.engine.release_memory(&regions, timeout)?)
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// Takes buffers back into use, at their old addresses. Peers that were disconnected must be connected again.
///
/// Ownership: `ranges` is read during the call only; from now on the memory must stay usable again until
/// `kvt_engine_free` or another release. Threads: any; registering may take seconds. Errors: `KVT_RDMA` (it stays
/// released), `KVT_BAD_ARGUMENT` (no buffer there), `KVT_SHUTDOWN`.
///
/// # Safety
/// `engine` is NULL or alive; `ranges` is NULL or as long as it says; memory is behind the buffers again.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_engine_restore_memory(
    engine: *const kvt_engine_t,
    ranges: *const kvt_range_t,
    ranges_len: usize,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let ranges = unsafe { list(ranges, ranges_len, "ranges") }?;
        Ok(opened.engine.restore_memory(&touched(opened, ranges)?)?)
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// Writes blocks to addresses of a peer whose configuration says `writable_by_address`, and waits until the peer has
/// confirmed the last byte. Blocks that touch are merged. The order of blocks, and of calls, is not kept.
///
/// `KVT_OK` means that every byte is there. Any other status but `KVT_UNSETTLED` means that none is missing that could
/// still come: nothing will be written any more.
///
/// Ownership: `blocks` is read during the call only. Threads: any, several at a time; waits up to `timeout_ms`, and 1 s
/// more for the peer to confirm that a failed write is over. Errors: `KVT_UNSETTLED` (the peer does not answer, so its
/// memory may still be written), `KVT_BAD_ITEMS` (an address outside of the buffers, or the peer does not allow it),
/// `KVT_UNKNOWN_PEER`, `KVT_TIMEOUT`, `KVT_PEER_FAILED`, `KVT_PEER_LOST`, `KVT_RELEASED`, `KVT_SHUTDOWN`.
///
/// # Safety
/// `engine` is NULL or alive; `blocks` is NULL or as long as it says.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_engine_write(
    engine: *const kvt_engine_t,
    peer: u64,
    blocks: *const kvt_block_t,
    blocks_len: usize,
    timeout_ms: u32,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let blocks = unsafe { list(blocks, blocks_len, "blocks") }?;
        let block = |block: &kvt_block_t| Block {
            source_address: block.source,
            target_address: block.target,
            len: block.len,
        };
        let blocks: Vec<Block> = blocks.iter().map(block).collect();
        let timeout = Duration::from_millis(timeout_ms.into());
        opened.engine.write(PeerId(peer), &blocks, timeout)?;
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// The regions that ranges touch; all of them without any range.
fn touched(opened: &Opened, ranges: &[kvt_range_t]) -> Result<Vec<RegionId>, Failure> {
    let ids = (0..).map(RegionId);
    let known = ids.map_while(|id| {
        let region = opened.engine.region(id)?;
        Some((id, region.base_address(), region.len() as u64))
    });
    let known: Vec<_> = known.collect();
    if ranges.is_empty() {
        return Ok(known.into_iter().map(|(id, ..)| id).collect());
    }
    let mut touched = Vec::new();
    for range in ranges {
        let end = range.address.saturating_add(range.len);
        let before = touched.len();
        for (id, base, len) in &known {
            if *base < end && range.address < base + len {
                touched.push(*id);
            }
        }
        if touched.len() == before {
            let text = format!(
                "no buffer of the layout is in the {} bytes at {:#x}",
                range.len, range.address
            );
            return Err(Failure::new(KVT_BAD_ARGUMENT, text));
        }
    }
    touched.sort_unstable();
    touched.dedup();
    Ok(touched)
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        let status = match &error {
            MemoryError::Unknown { .. } => KVT_BAD_ARGUMENT,
            MemoryError::Busy { .. } => KVT_WOULD_WAIT,
            MemoryError::Rdma(_) => KVT_RDMA,
            MemoryError::Shutdown => KVT_SHUTDOWN,
            _ => KVT_OTHER,
        };
        Self::new(status, error.to_string())
    }
}

impl From<WriteError> for Failure {
    fn from(error: WriteError) -> Self {
        let text = error.to_string();
        match error {
            WriteError::Refused(error) => error.into(),
            WriteError::Failed(error) => error.into(),
            WriteError::Unsettled { .. } => Self::new(KVT_UNSETTLED, text),
            _ => Self::new(KVT_OTHER, text),
        }
    }
}

#[cfg(test)]
mod tests {
    use kvt::{
        engine::{MemoryError, WriteError},
        error::{SubmitError, TransferError},
        layout::RegionId,
    };

    use crate::status::{
        Failure, KVT_BAD_ARGUMENT, KVT_PEER_LOST, KVT_RDMA, KVT_RELEASED, KVT_SHUTDOWN,
        KVT_UNSETTLED, KVT_WOULD_WAIT,
    };

    #[test]
    fn failures_have_their_codes() {
        let code = |error: MemoryError| Failure::from(error).status;
        assert_eq!(
            code(MemoryError::Unknown {
                region: RegionId(1)
            }),
            KVT_BAD_ARGUMENT
        );
        let waited = std::time::Duration::ZERO;
        assert_eq!(
            code(MemoryError::Busy {
                transfers: 1,
                waited
            }),
            KVT_WOULD_WAIT
        );
        assert_eq!(code(MemoryError::Rdma("x".into())), KVT_RDMA);
        assert_eq!(code(MemoryError::Shutdown), KVT_SHUTDOWN);
        let code = |error: WriteError| Failure::from(error).status;
        let refused = WriteError::Refused(SubmitError::Released { region: 0 });
        assert_eq!(code(refused), KVT_RELEASED);
        let error = || TransferError::PeerLost { reason: "x".into() };
        assert_eq!(code(WriteError::Failed(error())), KVT_PEER_LOST);
        assert_eq!(
            code(WriteError::Unsettled { error: error() }),
            KVT_UNSETTLED
        );
    }
}
