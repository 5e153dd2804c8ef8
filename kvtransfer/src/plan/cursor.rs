//! One side's bytes of a stream range, for a sender that writes its own pages to a socket and a receiver that reads
//! from the socket into its own pages.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use super::mismatch::End;
use super::pairing::Pairing;
use super::stream::{self, Rows, StreamError};
use crate::layout::RegionId;

/// Bytes that lie together in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The region.
    pub region: RegionId,
    /// Where the bytes start in it.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
}

impl Segment {
    /// Fills the buffer that a cursor writes to.
    pub const EMPTY: Self = Self {
        region: RegionId(0),
        offset: 0,
        len: 0,
    };
}

/// Walks a stream range on one side and yields its [`Segment`]s in stream order, touching ones merged.
///
/// The walk can stop and go on at any segment: however the buffers given to [`SideCursor::fill`] are sized, the
/// segments are the same. It allocates nothing.
#[derive(Clone, Debug)]
pub struct SideCursor {
    pairing: Arc<Pairing>,
    component: usize,
    end: End,
    items: usize,
    piece: usize,
    item: usize,
    row: u64,
    /// Byte within the row.
    byte: u64,
    rows: Rows,
    region: RegionId,
    /// Bytes of the range that are not in `run` yet.
    left: u64,
    /// The segment in the making.
    run: Segment,
}

impl SideCursor {
    /// A cursor over `range` of the stream of `items` items of a component.
    ///
    /// # Errors
    /// [`StreamError`] if there is no such component, too many items, or the range is not within the stream.
    pub fn new(
        pairing: Arc<Pairing>,
        component: usize,
        end: End,
        items: usize,
        range: Range<u64>,
    ) -> Result<Self, StreamError> {
        let spot = stream::open(&pairing, component, items, &range)?;
        let left = range.end - range.start;
        let (piece, item) = (spot.piece, spot.item);
        let (rows, region) = (Rows::NONE, RegionId(0));
        let (row, byte, run) = (0, 0, Segment::EMPTY);
        let mut cursor = Self {
            pairing,
            component,
            end,
            items,
            piece,
            item,
            row,
            byte,
            rows,
            region,
            left,
            run,
        };
        if left > 0 {
            cursor.load_piece();
            cursor.row = spot.byte / cursor.rows.row_len;
            cursor.byte = spot.byte % cursor.rows.row_len;
        }
        Ok(cursor)
    }

    /// Bytes of the range not yet yielded.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.left + self.run.len
    }

    /// Writes the next segments to `out` and says how many; fewer than `out` holds only at the end of the range.
    ///
    /// `items` are this side's item indices, the same ones at every call, checked by
    /// [`check_items`](super::stream::check_items) before.
    ///
    /// # Panics
    /// If `items` is not as long as the cursor was told.
    pub fn fill(&mut self, items: &[i32], out: &mut [Segment]) -> usize {
        assert_eq!(
            items.len(),
            self.items,
            "the item list must be the one the cursor was made for"
        );
        let mut filled = 0;
        while self.left > 0 {
            if self.item == self.items {
                self.piece += 1;
                self.item = 0;
                self.load_piece();
            }
            if !self.walk_piece(items, out, &mut filled) {
                return filled;
            }
        }
        if self.run.len > 0 && filled < out.len() {
            out[filled] = self.run;
            filled += 1;
            self.run = Segment::EMPTY;
        }
        filled
    }

    /// Walks to the end of the piece or of the range. False if `out` was full first; the position then is the first
    /// byte that is not part of `run`.
    fn walk_piece(&mut self, items: &[i32], out: &mut [Segment], filled: &mut usize) -> bool {
        // The compiler keeps locals in registers, where fields would be stored at every row.
        let (rows, region) = (self.rows, self.region);
        let (mut run, mut left) = (self.run, self.left);
        let (mut row, mut byte) = (self.row, self.byte);
        for (place, index) in items.iter().enumerate().skip(self.item) {
            let item = rows.item(*index);
            while row < rows.rows {
                let offset = item + row * rows.row_stride + byte;
                let len = (rows.row_len - byte).min(left);
                if run.offset + run.len == offset && run.region == region {
                    run.len += len;
                } else {
                    if run.len > 0 {
                        let Some(slot) = out.get_mut(*filled) else {
                            (self.item, self.row, self.byte) = (place, row, byte);
                            (self.run, self.left) = (run, left);
                            return false;
                        };
                        *slot = run;
                        *filled += 1;
                    }
                    run = Segment {
                        region,
                        offset,
                        len,
                    };
                }
                left -= len;
                if left == 0 {
                    (self.run, self.left) = (run, 0);
                    return true;
                }
                byte = 0;
                row += 1;
            }
            row = 0;
        }
        (self.item, self.row, self.byte) = (items.len(), 0, 0);
        (self.run, self.left) = (run, left);
        true
    }

    fn load_piece(&mut self) {
        let pieces = self.pairing.components[self.component].pieces();
        let piece = pieces
            .get(self.piece)
            .expect("invariant: the range ends within the stream");
        self.rows = Rows::merged(piece, self.end);
        self.region = piece.side(self.end).region;
    }
}
