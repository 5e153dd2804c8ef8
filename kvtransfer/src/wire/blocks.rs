//! Rooms of explicit blocks, as they are asked for on the control stream.

use super::{
    WireError,
    codec::{Reader, Writer},
};
use crate::{
    layout::RegionId,
    plan::{
        blocks::BLOCKS_MAX,
        descriptor::{Descriptor, Place},
    },
};

/// Most rooms of explicit blocks that one peer may have open at once: with the longest lists, 32 MiB of plans.
pub const WRITES_MAX: usize = 32;
/// Longest deadline of one: ten minutes.
pub const WRITE_MILLIS_MAX: u32 = 600_000;

/// Opens a room whose sender names every run of bytes: by region and offset on both sides, never by address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOpen {
    /// Its number, drawn by the sender and its own.
    pub room: u64,
    /// How long the receiver keeps it open, in milliseconds.
    pub timeout_ms: u32,
    /// The runs, 1 to [`BLOCKS_MAX`].
    pub blocks: Vec<Descriptor>,
}

pub(super) fn write_blocks(w: &mut Writer<'_>, open: &WriteOpen) {
    w.u64(open.room);
    w.u32(open.timeout_ms);
    w.count(open.blocks.len());
    for block in &open.blocks {
        for place in [block.source, block.target] {
            w.u32(place.region.0);
            w.u64(place.offset);
        }
        w.u64(block.len);
    }
}

pub(super) fn read_blocks(r: &mut Reader<'_>) -> Result<WriteOpen, WireError> {
    let room = r.u64()?;
    let timeout_ms = r.u32()?;
    if timeout_ms == 0 || timeout_ms > WRITE_MILLIS_MAX {
        return Err(WireError::Value {
            what: "a write's deadline",
            got: timeout_ms.into(),
        });
    }
    let place = |r: &mut Reader<'_>| {
        Ok(Place {
            region: RegionId(r.u32()?),
            offset: r.u64()?,
        })
    };
    let blocks = (0..r.count("block count", BLOCKS_MAX, 32)?)
        .map(|_| {
            Ok(Descriptor {
                source: place(r)?,
                target: place(r)?,
                len: r.u64()?,
            })
        })
        .collect::<Result<_, WireError>>()?;
    Ok(WriteOpen {
        room,
        timeout_ms,
        blocks,
    })
}
