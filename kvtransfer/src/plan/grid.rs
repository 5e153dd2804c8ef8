//! A stream range as a few grids (buffers × items × rows), for a device that works out every address itself: what is said of
//! a batch then grows with its buffers and its items, not with their product.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::{
    pairing::{ComponentPairing, Piece},
    stream::{ItemError, Stream},
};

/// Most bytes from the first byte of a grid's first buffer to the last one of its range: a device numbers them with 31 bits.
pub const REACH_MAX: u64 = 1 << 30;

/// A part of a stream: the bytes `range` of the stream that `items` of the window make with `pieces` alone, whose rows and
/// strides are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// The paired buffers, at least one.
    pub pieces: Range<usize>,
    /// Places in the window's item lists.
    pub items: Range<usize>,
    /// Bytes, counted from the first row of the first item in the first piece.
    pub range: Range<u64>,
}

/// Cuts `range` of the stream of `items` items into grids, in stream order.
///
/// # Errors
/// [`ItemError::TooMany`] for more items than a stream has.
pub fn grids(
    component: &ComponentPairing,
    items: usize,
    range: Range<u64>,
) -> Result<impl Iterator<Item = Grid> + '_, ItemError> {
    let stream = Stream::new(component, items)?;
    let mut at = range.start;
    Ok(std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let (grid, end) = next(component, &stream, items, at..range.end)?;
        at = end;
        Some(grid)
    }))
}

/// The first grid of what is left, and the stream byte behind it.
fn next(
    component: &ComponentPairing,
    stream: &Stream<'_>,
    items: usize,
    range: Range<u64>,
) -> Option<(Grid, u64)> {
    let (piece, spot) = stream.locate(range.start)?;
    let pieces = component.pieces();
    let count = items as u64;
    let start = component.start_of(spot.piece) * count;
    let end_of = |place: usize| range.end.min(component.start_of(place + 1) * count);
    let mut last = spot.piece;
    while end_of(last) < range.end
        && pieces
            .get(last + 1)
            .is_some_and(|next| is_alike(piece, next))
        && end_of(last + 1) - start <= REACH_MAX
    {
        last += 1;
    }
    let end = end_of(last);
    if last > spot.piece {
        let grid = Grid {
            pieces: spot.piece..last + 1,
            items: 0..items,
            range: range.start - start..end - start,
        };
        return Some((grid, end));
    }
    // Of one buffer only the items that the range touches, however many come before them.
    let item_bytes = piece.item_bytes();
    let before = spot.item as u64 * item_bytes;
    let end = end.min(start + before + REACH_MAX.max(item_bytes));
    let behind = usize::try_from((end - start).div_ceil(item_bytes)).ok()?;
    let grid = Grid {
        pieces: spot.piece..spot.piece + 1,
        items: spot.item..behind,
        range: range.start - start - before..end - start - before,
    };
    Some((grid, end))
}

/// Whether one description of rows and strides fits both.
fn is_alike(one: &Piece, other: &Piece) -> bool {
    let strides = |piece: &Piece| {
        let (source, target) = (piece.source, piece.target);
        (
            (source.item_stride, source.row_stride),
            (target.item_stride, target.row_stride),
        )
    };
    (one.rows, one.row_len) == (other.rows, other.row_len) && strides(one) == strides(other)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        layout::RegionId,
        plan::{
            descriptor::{Descriptor, Limits, PairCursor},
            pairing::{Pairing, Side},
        },
    };

    /// Target byte → source byte, as places in regions.
    type Bytes = HashMap<(u32, u64), (u32, u64)>;

    fn by_cursor(pairing: &Arc<Pairing>, lists: [&[i32]; 2], range: &Range<u64>) -> Bytes {
        let [sources, targets] = lists;
        let limits = Limits::default();
        let cursor = PairCursor::new(
            Arc::clone(pairing),
            0,
            sources.len(),
            range.clone(),
            &limits,
        );
        let mut cursor = cursor.expect("within the stream");
        let mut out = [Descriptor::EMPTY; 16];
        let mut bytes = Bytes::new();
        while cursor.remaining() > 0 {
            let filled = cursor.fill(sources, targets, &mut out);
            for Descriptor {
                source,
                target,
                len,
            } in &out[..filled]
            {
                for at in 0..*len {
                    let to = (target.region.0, target.offset + at);
                    bytes.insert(to, (source.region.0, source.offset + at));
                }
            }
        }
        bytes
    }

    /// Every byte of a grid, by its definition.
    fn by_grids(pairing: &Pairing, lists: [&[i32]; 2], range: &Range<u64>) -> (Bytes, usize) {
        let component = &pairing.components[0];
        let mut bytes = Bytes::new();
        let mut count = 0;
        for grid in grids(component, lists[0].len(), range.clone()).expect("few items") {
            count += 1;
            let pieces = &component.pieces()[grid.pieces.clone()];
            let [sources, targets] = lists.map(|list| &list[grid.items.clone()]);
            let first = &pieces[0];
            let (item_bytes, items) = (first.item_bytes(), sources.len() as u64);
            for at in grid.range.clone() {
                let (number, byte) = (at / item_bytes, at % item_bytes);
                let piece = &pieces[usize::try_from(number / items).expect("small")];
                let item = usize::try_from(number % items).expect("small");
                let (row, byte) = (byte / first.row_len, byte % first.row_len);
                let place = |base: u64, side: &Side, item: i32| {
                    let item = u64::from(item.cast_unsigned());
                    base + item * side.item_stride + row * side.row_stride + byte
                };
                // Strides are the first piece's, bases each one's own.
                let to = place(piece.target.base, &first.target, targets[item]);
                let from = place(piece.source.base, &first.source, sources[item]);
                let known =
                    bytes.insert((piece.target.region.0, to), (piece.source.region.0, from));
                assert_eq!(known, None, "a byte is written once");
            }
        }
        (bytes, count)
    }

    fn piece(region: u32, rows: u32, row_len: u64, gap: u64) -> Piece {
        let side = |stride: u64| Side {
            region: RegionId(region),
            base: 3 * u64::from(region),
            item_stride: stride * u64::from(rows) + gap,
            row_stride: stride,
            item_count: 16,
        };
        Piece {
            source: side(row_len + gap),
            target: side(row_len),
            rows,
            row_len,
        }
    }

    proptest! {
        #[test]
        fn grids_name_the_bytes_that_a_cursor_names(
            kinds in prop::collection::vec((1..4_u32, 1..9_u64, 0..3_u64, 1..4_usize), 1..4),
            lists in (1..9_usize).prop_flat_map(|count| {
                let all: Vec<i32> = (0..16).collect();
                let list = || prop::sample::subsequence(all.clone(), count).prop_shuffle();
                (list(), list())
            }),
            cut in any::<(u16, u16)>(),
        ) {
            let mut pieces = Vec::new();
            for (rows, row_len, gap, times) in kinds {
                for _ in 0..times {
                    let region = u32::try_from(pieces.len()).expect("few");
                    pieces.push(piece(region, rows, row_len, gap));
                }
            }
            let most = pieces.len();
            let pairing = Arc::new(Pairing::of_pieces(pieces));
            let total = pairing.components[0].item_bytes() * lists.0.len() as u64;
            let (low, high) = (u64::from(cut.0) % total, u64::from(cut.1) % total);
            let range = low.min(high)..low.max(high) + 1;
            let (ours, count) = by_grids(&pairing, [&lists.0, &lists.1], &range);
            prop_assert!(ours == by_cursor(&pairing, [&lists.0, &lists.1], &range));
            prop_assert!(count <= most);
        }
    }

    #[test]
    fn equal_buffers_are_one_grid_and_a_long_one_is_cut_to_its_items() {
        let equal = Pairing::of_pieces((0..64).map(|region| piece(region, 1, 4096, 0)).collect());
        let all = |pairing: &Pairing, items, range| {
            let found = grids(&pairing.components[0], items, range).expect("few items");
            found.collect::<Vec<_>>()
        };
        let whole = 0..64 * 512 * 4096;
        assert_eq!(
            all(&equal, 512, whole.clone()),
            [Grid {
                pieces: 0..64,
                items: 0..512,
                range: whole,
            }]
        );
        // A million items of 64 KiB: 64 GiB a buffer.
        let long = Pairing::of_pieces(vec![piece(0, 1, 64 << 10, 0), piece(1, 1, 64 << 10, 0)]);
        let items = 1 << 20;
        let buffer = (items as u64) << 16;
        let found = all(&long, items, buffer - 65536..buffer + 65537);
        let expected = [
            Grid {
                pieces: 0..1,
                items: items - 1..items,
                range: 0..65536,
            },
            Grid {
                pieces: 1..2,
                items: 0..2,
                range: 0..65537,
            },
        ];
        assert_eq!(found, expected);
        let found = all(&long, items, 0..3 << 30);
        assert!(found.iter().all(|grid| grid.range.end <= REACH_MAX));
        assert_eq!(found.len(), 3);
    }
}
