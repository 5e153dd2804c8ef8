//! Payload that a device copies out of its peer's memory into ours.
#![forbid(unsafe_code)]

use super::{Inbound, staged::failed};
use crate::{
    error::TransferError,
    layout::RegionId,
    memory::{
        Gate,
        device::{DeviceError, Ends, Grid, Move, Strides},
    },
    plan::{
        descriptor::{Descriptor, PairCursor},
        grid,
        pairing::{ComponentPairing, Piece, Side},
    },
    transfer::{BatchIn, Placement},
    transport::{lane::LaneContext, sys::IOV_MAX},
};

/// Bytes that lie together on both sides from which copies are listed: few of them are a batch, and the driver copies each
/// faster than a kernel, without taking a multiprocessor from anybody. Shorter ones the device works out for itself, which
/// costs neither the processor nor the bus anything per row.
const LISTED_BYTES: u64 = 4 << 20;

/// Most moves of one copy: its list has 1.5 MiB, and a list of 64 Ki pages takes the device some 100 µs at least.
const MOVES_MAX: usize = 1 << 16;

/// Most bytes of one copy: bounds how long closing the gate can take, to less than a millisecond on current devices.
const COPY_BYTES_MAX: u64 = 256 << 20;

/// What the next copy is made of.
#[derive(Default)]
pub(super) struct Copies {
    pub(super) descriptors: Box<[Descriptor]>,
    moves: Vec<Move>,
    ends: Vec<Ends>,
}

impl Inbound {
    /// Copies a batch from the peer's device memory.
    pub(super) fn pull_on_device(
        &mut self,
        context: &LaneContext,
        cursor: PairCursor,
        gate: &Gate,
        items: &[i32],
        batch: &BatchIn,
    ) -> Result<(), Placement> {
        let paired = batch.pairing.components.get(batch.component);
        let target_items = &batch.items[batch.part.clone()];
        let is_run = is_one_run(items) && is_one_run(target_items);
        let is_short = |piece: &Piece| {
            let together = if is_run && piece.is_dense() {
                items.len() as u64 * piece.row_len
            } else {
                piece.row_len
            };
            together < LISTED_BYTES
        };
        match paired.filter(|paired| paired.pieces().iter().all(is_short)) {
            Some(paired) => self.pull_by_grids(context, paired, gate, items, batch),
            None => self.pull_by_lists(context, cursor, gate, items, batch),
        }
    }

    /// Copies a batch whose rows the device works out.
    fn pull_by_grids(
        &mut self,
        context: &LaneContext,
        paired: &ComponentPairing,
        gate: &Gate,
        items: &[i32],
        batch: &BatchIn,
    ) -> Result<(), Placement> {
        let Some(device) = context.hub.devices.device() else {
            return Ok(());
        };
        let target_items = &batch.items[batch.part.clone()];
        let parts = grid::grids(paired, items.len(), batch.range.clone());
        let parts = parts.map_err(|error| misbehaved(&error.to_string()))?;
        let failed = |error: DeviceError| failed(&error);
        for part in parts {
            let pieces = &paired.pieces()[part.pieces];
            self.copies.ends.clear();
            for piece in pieces {
                self.copies.ends.push(ends(context, piece)?);
            }
            let first = &pieces[0];
            let strides = |side: &Side| Strides {
                item: side.item_stride,
                row: side.row_stride,
            };
            let grid = Grid {
                buffers: &self.copies.ends,
                source_items: &items[part.items.clone()],
                target_items: &target_items[part.items],
                source: strides(&first.source),
                target: strides(&first.target),
                rows: first.rows,
                row_len: u32::try_from(first.row_len)
                    .expect("invariant: rows that are not listed are short"),
                range: part.range,
            };
            let copier = self.stager.copier(&**device).map_err(failed)?;
            let Some(_pass) = gate.pass() else {
                return Err(Placement::GateClosed);
            };
            copier.copy_grid(&grid).map_err(failed)?;
        }
        Ok(())
    }

    /// Copies a batch move by move.
    fn pull_by_lists(
        &mut self,
        context: &LaneContext,
        mut cursor: PairCursor,
        gate: &Gate,
        items: &[i32],
        batch: &BatchIn,
    ) -> Result<(), Placement> {
        if self.copies.descriptors.is_empty() {
            self.copies.descriptors = vec![Descriptor::EMPTY; IOV_MAX].into_boxed_slice();
        }
        let target_items = &batch.items[batch.part.clone()];
        self.copies.moves.clear();
        let mut bytes = 0;
        while cursor.remaining() > 0 {
            let filled = cursor.fill(items, target_items, &mut self.copies.descriptors);
            for at in 0..filled {
                let next = self.move_of(context, at)?;
                let is_full =
                    self.copies.moves.len() == MOVES_MAX || bytes + next.len > COPY_BYTES_MAX;
                if is_full && !self.copies.moves.is_empty() {
                    self.copy_moves(context, gate)?;
                    bytes = 0;
                }
                bytes += next.len;
                self.copies.moves.push(next);
            }
        }
        self.copy_moves(context, gate)
    }

    fn move_of(&self, context: &LaneContext, at: usize) -> Result<Move, Placement> {
        let Descriptor {
            source,
            target,
            len,
        } = self.copies.descriptors[at];
        Ok(Move {
            source: source_base(context, source.region)? + source.offset,
            target: target_address(context, target.region, target.offset, len)?,
            len,
        })
    }

    /// Makes the moves so far, under the gate.
    fn copy_moves(&mut self, context: &LaneContext, gate: &Gate) -> Result<(), Placement> {
        let Some(device) = context.hub.devices.device() else {
            return Ok(());
        };
        let failed = |error: DeviceError| failed(&error);
        let copier = self.stager.copier(&**device).map_err(failed)?;
        let Some(_pass) = gate.pass() else {
            return Err(Placement::GateClosed);
        };
        copier.copy(&self.copies.moves).map_err(failed)?;
        self.copies.moves.clear();
        Ok(())
    }
}

/// Whether items follow each other.
fn is_one_run(items: &[i32]) -> bool {
    items.windows(2).all(|pair| pair[0] + 1 == pair[1])
}

/// Where both sides' first row of item 0 begins.
fn ends(context: &LaneContext, piece: &Piece) -> Result<Ends, Placement> {
    let Side {
        region,
        base,
        item_stride,
        row_stride,
        item_count,
    } = piece.target;
    let last = item_count.saturating_sub(1) * item_stride;
    let extent = last + u64::from(piece.rows - 1) * row_stride + piece.row_len;
    Ok(Ends {
        source: source_base(context, piece.source.region)? + piece.source.base,
        target: target_address(context, region, base, extent)?,
    })
}

/// Where a region of the peer's begins in this process's view of the device.
fn source_base(context: &LaneContext, region: RegionId) -> Result<u64, Placement> {
    let attached = context.attached.as_ref();
    let base = attached.and_then(|regions| regions.base(region.0));
    base.ok_or_else(|| misbehaved("it asks for a copy out of device memory that it has not shared"))
}

fn target_address(
    context: &LaneContext,
    region: RegionId,
    offset: u64,
    len: u64,
) -> Result<u64, Placement> {
    let found = context.hub.region(region);
    let piece = found.and_then(|found| found.piece(offset, len).ok());
    // Layouts and items were checked against the regions, so this does not happen; if it does, only the room ends.
    piece.map(|piece| piece.address).ok_or_else(|| {
        let reason = format!("region {} is gone", region.0);
        Placement::Failed(TransferError::Device { reason })
    })
}

fn misbehaved(reason: &str) -> Placement {
    Placement::Failed(TransferError::PeerMisbehaved {
        reason: reason.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::is_one_run;

    #[test]
    fn items_that_follow_each_other_are_one_run() {
        assert!(is_one_run(&[]) && is_one_run(&[7]) && is_one_run(&[7, 8, 9]));
        assert!(!is_one_run(&[7, 9]) && !is_one_run(&[8, 7]) && !is_one_run(&[7, 8, 8]));
    }
}
