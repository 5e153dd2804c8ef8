//! Explicit blocks: a room whose sender names every run of bytes, instead of items that both sides' layouts place.
//!
//! Each block is a piece of a pairing made for this one room, and the room moves item 0 of it. So batches, lanes,
//! acknowledgements and failures are those of any other room.
#![forbid(unsafe_code)]

use super::{
    descriptor::{Descriptor, Place},
    pairing::{Pairing, Piece, Side},
};
use crate::layout::{ITEM_LEN_MAX, RegionId};

/// Most blocks of one room: half a megabyte of message and two of memory on either side.
pub const BLOCKS_MAX: usize = 16_384;

/// Some bytes of this process for an address range of a peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Where to read: an address in a region of the writing engine.
    pub source_address: u64,
    /// Where to write: an address in a region that the peer allows to be written by address.
    pub target_address: u64,
    /// How many bytes; 0 is skipped.
    pub len: u64,
}

/// Where a region lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first address.
    pub base: u64,
    /// Its bytes.
    pub len: u64,
}

/// Why blocks cannot be written, each a sentence with the block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// A range is not within the regions of one side.
    #[error(
        "block {block}: {len} bytes at {address:#x} are not inside the memory that {whose} has registered"
    )]
    Outside {
        /// Place in the list.
        block: usize,
        /// First byte that is not.
        address: u64,
        /// Bytes from there to the end of the block.
        len: u64,
        /// `this engine` or `the peer`.
        whose: &'static str,
    },
    /// A block of a room that is longer than [`ITEM_LEN_MAX`], empty, or outside of its region.
    #[error("block {block}: {len} bytes at {offset} of region {region} of {whose}")]
    Piece {
        /// Place in the list.
        block: usize,
        /// The region named.
        region: u32,
        /// First byte named.
        offset: u64,
        /// Bytes named.
        len: u64,
        /// `this engine` or `the peer`.
        whose: &'static str,
    },
    /// More than [`BLOCKS_MAX`] blocks in one room, or none.
    #[error("{count} blocks in one room, it must be 1 to {BLOCKS_MAX}")]
    Count {
        /// How many.
        count: usize,
    },
}

/// Finds the regions of address ranges, remembering the last one: neighbouring blocks mostly share it.
struct Finder<'a> {
    /// Sorted by base.
    spans: Vec<(Span, u32)>,
    last: usize,
    all: &'a [Span],
}

impl<'a> Finder<'a> {
    fn new(all: &'a [Span]) -> Self {
        let mut spans: Vec<(Span, u32)> = all.iter().copied().zip(0..).collect();
        // Of two that start together the longer one serves more.
        spans.sort_by_key(|(span, _)| (span.base, span.len));
        Self {
            spans,
            last: 0,
            all,
        }
    }

    /// The place of an address, and how many bytes from there its region has.
    fn find(&mut self, address: u64) -> Option<(Place, u64)> {
        let within = |span: &Span| address.checked_sub(span.base).filter(|at| *at < span.len);
        let (span, region) = match self
            .spans
            .get(self.last)
            .filter(|(s, _)| within(s).is_some())
        {
            Some(known) => *known,
            None => {
                let after = self.spans.partition_point(|(span, _)| span.base <= address);
                // Regions may overlap, so one that starts earlier may still reach here.
                let found = self.spans[..after]
                    .iter()
                    .rposition(|(s, _)| within(s).is_some())?;
                self.last = found;
                self.spans[found]
            }
        };
        debug_assert!(self.all.len() == self.spans.len());
        let offset = within(&span)?;
        let place = Place {
            region: RegionId(region),
            offset,
        };
        Some((place, span.len - offset))
    }
}

/// Resolves blocks to regions: split where a region or [`ITEM_LEN_MAX`] ends, merged where both sides touch.
///
/// # Errors
/// [`BlockError::Outside`] for the first block that leaves the memory of a side.
pub fn resolve(
    blocks: &[Block],
    sources: &[Span],
    targets: &[Span],
) -> Result<Vec<Descriptor>, BlockError> {
    let (mut source, mut target) = (Finder::new(sources), Finder::new(targets));
    let mut found: Vec<Descriptor> = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let (mut from, mut to, mut left) = (block.source_address, block.target_address, block.len);
        let outside = |whose, address, len| BlockError::Outside {
            block: index,
            address,
            len,
            whose,
        };
        while left > 0 {
            let (from_place, from_len) = source
                .find(from)
                .ok_or_else(|| outside("this engine", from, left))?;
            let (to_place, to_len) = target
                .find(to)
                .ok_or_else(|| outside("the peer", to, left))?;
            let len = left.min(from_len).min(to_len).min(ITEM_LEN_MAX);
            push_merged(&mut found, from_place, to_place, len);
            left -= len;
            if left > 0 {
                // A region ends at 2^64 at the latest, so what is left has no address.
                from = from
                    .checked_add(len)
                    .ok_or_else(|| outside("this engine", from, left))?;
                to = to
                    .checked_add(len)
                    .ok_or_else(|| outside("the peer", to, left))?;
            }
        }
    }
    Ok(found)
}

fn push_merged(found: &mut Vec<Descriptor>, source: Place, target: Place, len: u64) {
    if let Some(last) = found.last_mut()
        && last.source.region == source.region
        && last.target.region == target.region
        && last.source.offset + last.len == source.offset
        && last.target.offset + last.len == target.offset
        && last.len + len <= ITEM_LEN_MAX
    {
        last.len += len;
        return;
    }
    found.push(Descriptor {
        source,
        target,
        len,
    });
}

/// The pairing of a room that moves these blocks, whoever sent them.
///
/// # Errors
/// [`BlockError::Count`], or [`BlockError::Piece`] for the first block that is not within its regions, whose lengths are
/// given.
pub fn pairing(
    blocks: &[Descriptor],
    source_lens: &[u64],
    target_lens: &[u64],
) -> Result<Pairing, BlockError> {
    if blocks.is_empty() || blocks.len() > BLOCKS_MAX {
        return Err(BlockError::Count {
            count: blocks.len(),
        });
    }
    let mut pieces = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let sides = [
            (block.source, source_lens, "the sender"),
            (block.target, target_lens, "the receiver"),
        ];
        for (place, lens, whose) in sides {
            let region = lens.get(place.region.0 as usize);
            let end = place.offset.checked_add(block.len);
            let is_inside = region.zip(end).is_some_and(|(len, end)| end <= *len);
            if !is_inside || block.len == 0 || block.len > ITEM_LEN_MAX {
                return Err(BlockError::Piece {
                    block: index,
                    region: place.region.0,
                    offset: place.offset,
                    len: block.len,
                    whose,
                });
            }
        }
        let side = |place: Place| Side {
            region: place.region,
            base: place.offset,
            item_stride: block.len,
            row_stride: block.len,
            item_count: 1,
        };
        pieces.push(Piece {
            source: side(block.source),
            target: side(block.target),
            rows: 1,
            row_len: block.len,
        });
    }
    Ok(Pairing::of_pieces(pieces))
}

#[cfg(test)]
mod tests {
    use super::{BLOCKS_MAX, Block, BlockError, Span, pairing, resolve};
    use crate::{
        layout::{ITEM_LEN_MAX, RegionId},
        plan::descriptor::{Descriptor, Place},
    };

    fn block(source_address: u64, target_address: u64, len: u64) -> Block {
        Block {
            source_address,
            target_address,
            len,
        }
    }

    fn run(source: (u32, u64), target: (u32, u64), len: u64) -> Descriptor {
        let place = |(region, offset)| Place {
            region: RegionId(region),
            offset,
        };
        Descriptor {
            source: place(source),
            target: place(target),
            len,
        }
    }

    const SOURCES: [Span; 2] = [
        Span {
            base: 1000,
            len: 100,
        },
        Span {
            base: 1100,
            len: 50,
        },
    ];
    const TARGETS: [Span; 3] = [
        Span {
            base: 5000,
            len: 10,
        },
        Span {
            base: 4000,
            len: 500,
        },
        Span {
            base: 4100,
            len: 20,
        },
    ];

    #[test]
    fn blocks_are_split_at_regions_and_merged_where_both_sides_touch() {
        let found = resolve(
            &[
                block(1000, 4000, 10),
                block(1010, 4010, 10),
                block(1020, 4040, 0),
                block(1095, 4200, 10),
                block(1000, 5000, 4),
            ],
            &SOURCES,
            &TARGETS,
        );
        assert_eq!(
            found,
            Ok(vec![
                run((0, 0), (1, 0), 20),
                run((0, 95), (1, 200), 5),
                run((1, 0), (1, 205), 5),
                run((0, 0), (0, 0), 4),
            ])
        );
    }

    #[test]
    fn an_overlapped_region_still_serves_what_the_other_does_not() {
        // 4100..4120 is also a region of its own; 4119..4121 leaves it but not the one around it.
        let found = resolve(&[block(1000, 4119, 2)], &SOURCES, &TARGETS).expect("inside");
        assert_eq!(found.iter().map(|run| run.len).sum::<u64>(), 2);
    }

    #[test]
    fn a_block_outside_is_refused_with_its_first_lost_byte() {
        let refused = |source, target, len| {
            resolve(&[block(source, target, len)], &SOURCES, &TARGETS)
                .expect_err("outside")
                .to_string()
        };
        assert_eq!(
            refused(1140, 4000, 20),
            "block 0: 10 bytes at 0x47e are not inside the memory that this engine has registered"
        );
        assert_eq!(
            refused(1000, 5008, 4),
            "block 0: 2 bytes at 0x1392 are not inside the memory that the peer has registered"
        );
        assert!(refused(u64::MAX, u64::MAX, u64::MAX).contains("this engine"));
    }

    #[test]
    fn a_hostile_list_is_refused() {
        let lens = ([100], [50]);
        let paired = |blocks: &[Descriptor]| pairing(blocks, &lens.0, &lens.1);
        let good = run((0, 90), (0, 40), 10);
        assert_eq!(paired(&[good; 2]).expect("inside").components.len(), 1);
        for wrong in [
            run((0, 91), (0, 40), 10),
            run((0, 90), (0, 41), 10),
            run((1, 0), (0, 0), 1),
            run((0, 0), (1, 0), 1),
            run((0, 0), (0, 0), 0),
            run((0, u64::MAX), (0, 0), 2),
            run((0, 0), (0, 0), ITEM_LEN_MAX + 1),
        ] {
            let error = paired(&[good, wrong]).expect_err("refused");
            assert!(
                matches!(error, BlockError::Piece { block: 1, .. }),
                "{error}"
            );
        }
        let count = |count| Err(BlockError::Count { count });
        assert_eq!(paired(&[]), count(0));
        assert_eq!(paired(&vec![good; BLOCKS_MAX + 1]), count(BLOCKS_MAX + 1));
        assert!(paired(&vec![good; BLOCKS_MAX]).is_ok());
    }
}
