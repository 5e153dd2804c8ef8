//! Payload that a device copies out of its peer's memory into ours.
#![forbid(unsafe_code)]

use super::{Inbound, staged::failed};
use crate::{
    error::TransferError,
    memory::{
        Gate,
        device::{DeviceError, Move},
    },
    plan::descriptor::{Descriptor, PairCursor},
    transfer::{BatchIn, Placement},
    transport::{lane::LaneContext, sys::IOV_MAX},
};

/// Most moves of one copy: its list has 1.5 MiB, and a list of 64 Ki pages takes the device some 100 µs at least.
const MOVES_MAX: usize = 1 << 16;

/// Most bytes of one copy: bounds how long closing the gate can take, to less than a millisecond on current devices.
const COPY_BYTES_MAX: u64 = 256 << 20;

impl Inbound {
    /// Copies a batch from the peer's device memory.
    pub(super) fn pull_on_device(
        &mut self,
        context: &LaneContext,
        mut cursor: PairCursor,
        gate: &Gate,
        items: &[i32],
        batch: &BatchIn,
    ) -> Result<(), Placement> {
        if self.descriptors.is_empty() {
            self.descriptors = vec![Descriptor::EMPTY; IOV_MAX].into_boxed_slice();
        }
        let target_items = &batch.items[batch.part.clone()];
        self.moves.clear();
        let mut bytes = 0;
        while cursor.remaining() > 0 {
            let filled = cursor.fill(items, target_items, &mut self.descriptors);
            for at in 0..filled {
                let next = self.move_of(context, at)?;
                let is_full = self.moves.len() == MOVES_MAX || bytes + next.len > COPY_BYTES_MAX;
                if is_full && !self.moves.is_empty() {
                    self.copy_moves(context, gate)?;
                    bytes = 0;
                }
                bytes += next.len;
                self.moves.push(next);
            }
        }
        self.copy_moves(context, gate)
    }

    fn move_of(&self, context: &LaneContext, at: usize) -> Result<Move, Placement> {
        let Descriptor {
            source,
            target,
            len,
        } = self.descriptors[at];
        let attached = context.attached.as_ref();
        let base = attached.and_then(|regions| regions.base(source.region.0));
        let Some(base) = base else {
            let reason = "it asks for a copy out of device memory that it has not shared";
            return Err(Placement::Failed(TransferError::PeerMisbehaved {
                reason: reason.into(),
            }));
        };
        let region = context.hub.region(target.region);
        let piece = region.and_then(|region| region.piece(target.offset, len).ok());
        // Layouts and items were checked against the regions, so this does not happen; if it does, only the room ends.
        let Some(piece) = piece else {
            let reason = format!("region {} is gone", target.region.0);
            return Err(Placement::Failed(TransferError::Device { reason }));
        };
        Ok(Move {
            source: base + source.offset,
            target: piece.address,
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
        copier.copy(&self.moves).map_err(failed)?;
        self.moves.clear();
        Ok(())
    }
}
