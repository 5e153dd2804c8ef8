//! The logical stream of a chunk: a number for every byte that one component moves for one window of items.
//!
//! The order is *for each piece, for each item, for each row*. Both ranks derive it from the agreed pairing and
//! the number of items alone, so a batch is named by a range of the stream, and each side finds its own bytes with its
//! own item list. No address ever crosses the wire.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::mismatch::End;
use super::pairing::{ComponentPairing, Pairing, Piece, Side};

/// Items of one chunk. A million tokens at SGLang's smallest page (one token) fit; together with the layout's limits
/// it keeps every stream offset within 2^63.
pub const ITEMS_MAX: usize = 1 << 20;

/// Why a list of item indices cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ItemError {
    /// An index is negative or not below the item count.
    #[error("item index {index} at position {position} is outside the buffer's {item_count} items")]
    OutOfRange {
        /// The index.
        index: i32,
        /// Where it stands in the list.
        position: usize,
        /// Items of the shortest buffer concerned.
        item_count: u64,
    },
    /// The list is longer than [`ITEMS_MAX`].
    #[error("the chunk has {count} items, the limit is {ITEMS_MAX}")]
    TooMany {
        /// Length of the list.
        count: usize,
    },
}

/// Why a cursor cannot be made. Ranges come from batch headers, so this blames the peer, not the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The pairing has no such component.
    #[error("component {component} does not exist, the pairing has {count}")]
    Component {
        /// The place asked for.
        component: usize,
        /// Components of the pairing.
        count: usize,
    },
    /// Too many items.
    #[error(transparent)]
    Items(#[from] ItemError),
    /// The range is reversed or ends beyond the stream.
    #[error("stream range {start}..{end} is not within the chunk's {len} bytes")]
    Range {
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        /// Bytes of the stream.
        len: u64,
    },
}

/// Checks a list of item indices once, so that the cursors need not check each.
///
/// # Errors
/// [`ItemError::TooMany`] for more than [`ITEMS_MAX`] items, [`ItemError::OutOfRange`] for the first index that is
/// negative or not below `item_count`.
pub fn check_items(items: &[i32], item_count: u64) -> Result<(), ItemError> {
    let count = items.len();
    if count > ITEMS_MAX {
        return Err(ItemError::TooMany { count });
    }
    let is_outside = |index: &i32| u64::try_from(*index).map_or(true, |index| index >= item_count);
    match items.iter().position(is_outside) {
        Some(position) => Err(ItemError::OutOfRange {
            index: items[position],
            position,
            item_count,
        }),
        None => Ok(()),
    }
}

/// The stream of one chunk: a component and a number of items. Which items is each side's own matter.
#[derive(Clone, Copy, Debug)]
pub struct Stream<'a> {
    component: &'a ComponentPairing,
    items: u64,
}

impl<'a> Stream<'a> {
    /// The stream of a window of `items` items.
    ///
    /// # Errors
    /// [`ItemError::TooMany`].
    pub fn new(component: &'a ComponentPairing, items: usize) -> Result<Self, ItemError> {
        if items > ITEMS_MAX {
            return Err(ItemError::TooMany { count: items });
        }
        Ok(Self {
            component,
            items: items as u64,
        })
    }

    /// Bytes of the stream.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.component.item_bytes() * self.items
    }

    /// The largest place in `(floor, at]` that is good to cut at: between two items, else between two rows, else `at`
    /// itself. Requires `at` to be within the stream.
    pub(super) fn cut(&self, floor: u64, at: u64) -> u64 {
        let Some((piece, spot)) = self.locate(at) else {
            return at;
        };
        let into_row = spot.byte % piece.row_len;
        [at - spot.byte, at - into_row]
            .into_iter()
            .find(|cut| *cut > floor)
            .unwrap_or(at)
    }

    /// The piece that holds a byte of the stream, and where in it; `None` at the end of the stream.
    pub(super) fn locate(&self, at: u64) -> Option<(&'a Piece, Spot)> {
        let place = self.component.piece_at(at, self.items);
        let piece = self.component.pieces().get(place)?;
        let within = at - self.component.start_of(place) * self.items;
        let item_bytes = piece.item_bytes();
        let item = usize::try_from(within / item_bytes).ok()?;
        Some((
            piece,
            Spot {
                piece: place,
                item,
                byte: within % item_bytes,
            },
        ))
    }
}

/// A byte of the stream, found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// Place in the component's pieces.
    pub(super) piece: usize,
    /// Position in the item list.
    pub(super) item: usize,
    /// Byte within the item's moved bytes.
    pub(super) byte: u64,
}

/// Checks what a cursor is asked for and finds where it starts. An empty range needs no spot.
pub(super) fn open(
    pairing: &Pairing,
    component: usize,
    items: usize,
    range: &Range<u64>,
) -> Result<Spot, StreamError> {
    let count = pairing.components.len();
    let chosen = pairing.components.get(component);
    let chosen = chosen.ok_or(StreamError::Component { component, count })?;
    let stream = Stream::new(chosen, items)?;
    let len = stream.len_bytes();
    let Range { start, end } = *range;
    if start > end || end > len {
        return Err(StreamError::Range { start, end, len });
    }
    let at_end = Spot {
        piece: chosen.pieces().len(),
        item: 0,
        byte: 0,
    };
    Ok(stream.locate(start).map_or(at_end, |(_, spot)| spot))
}

/// The bytes of one piece on one side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// Where row 0 of item 0 starts in its region.
    pub(super) base: u64,
    /// Bytes from one item to the next.
    pub(super) item_stride: u64,
    /// Bytes from one row to the next.
    pub(super) row_stride: u64,
    /// Rows per item.
    pub(super) rows: u64,
    /// Bytes per row.
    pub(super) row_len: u64,
}

impl Rows {
    /// Stands in while no piece is loaded.
    pub(super) const NONE: Self = Self {
        base: 0,
        item_stride: 0,
        row_stride: 0,
        rows: 1,
        row_len: 1,
    };

    /// One side of a piece, row by row.
    pub(super) fn plain(piece: &Piece, end: End) -> Self {
        let Side {
            base,
            item_stride,
            row_stride,
            ..
        } = *piece.side(end);
        Self {
            base,
            item_stride,
            row_stride,
            rows: u64::from(piece.rows),
            row_len: piece.row_len,
        }
    }

    /// One side of a piece, touching rows merged: what is strided at one end is often whole items at the other.
    pub(super) fn merged(piece: &Piece, end: End) -> Self {
        let plain = Self::plain(piece, end);
        if plain.row_stride != plain.row_len {
            return plain;
        }
        Self {
            rows: 1,
            row_len: plain.rows * plain.row_len,
            ..plain
        }
    }

    /// Where an item starts. An index that was never checked gives a place beyond any buffer, not an overflow: a
    /// negative one counts as its 32-bit pattern.
    #[inline]
    pub(super) fn item(&self, index: i32) -> u64 {
        self.base + u64::from(index.cast_unsigned()) * self.item_stride
    }
}
