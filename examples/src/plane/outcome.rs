//! What a room's end on several ranks amounts to.

use std::sync::Arc;
use std::time::Duration;

use kvtransfer::engine::Transfer;
use kvtransfer::error::TransferError as EngineError;

use crate::cache::PageIndex;
use crate::cache::aux::AuxSlot;
use crate::pd::TransferError;

/// What a room moved, over all ranks of this worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// Payload bytes.
    pub(super) bytes: u64,
    /// Opening to first byte, of the slowest rank.
    pub(super) waited: Duration,
    /// First byte to end, of the slowest rank. With a chunked prompt the computing in between counts.
    pub(super) moving: Duration,
}

/// The combined end of a room's ranks, if it has come. As soon as one rank has failed the others are stopped, so that
/// whoever sees the end may reuse the memory of all.
pub(super) fn settle(transfers: &[Transfer]) -> Option<Result<Moved, EngineError>> {
    let mut moved = Moved::default();
    let mut missing = false;
    for transfer in transfers {
        match transfer.result() {
            None => missing = true,
            Some(Ok(summary)) => {
                moved.bytes += summary.bytes;
                moved.waited = moved.waited.max(summary.waited);
                moved.moving = moved.moving.max(summary.moving);
            }
            Some(Err(error)) => {
                transfers.iter().for_each(Transfer::cancel);
                return Some(Err(error));
            }
        }
    }
    (!missing).then_some(Ok(moved))
}

/// An engine's error in the seam's words.
pub(super) fn failure(error: EngineError, timeout: Duration) -> TransferError {
    match error {
        EngineError::Cancelled | EngineError::CancelledBecause { .. } => TransferError::Cancelled,
        EngineError::Timeout { stage, .. } => TransferError::Timeout {
            stage,
            after: timeout,
        },
        other => TransferError::Peer {
            reason: other.to_string(),
        },
    }
}

/// Pages as the engine counts items. The settings keep page numbers below 2^31.
pub(super) fn page_items(pages: &[PageIndex]) -> Arc<[i32]> {
    pages.iter().map(|page| item(page.0)).collect()
}

/// An aux row as the engine counts items.
pub(super) fn aux_items(slot: Option<AuxSlot>) -> Arc<[i32]> {
    slot.iter().map(|slot| item(slot.0)).collect()
}

fn item(number: u32) -> i32 {
    i32::try_from(number).expect("invariant: the settings bound pages and slots")
}
