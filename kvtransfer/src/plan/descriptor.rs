//! Both sides' bytes of a stream range at once, for one-sided writes (verbs) and same-host pulls, where one process
//! names the memory of both ranks.
#![forbid(unsafe_code)]

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use super::mismatch::End;
use super::pairing::Pairing;
use super::stream::{self, Rows, StreamError};
use crate::layout::RegionId;

/// Where bytes start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The region.
    pub region: RegionId,
    /// Byte offset in it.
    pub offset: u64,
}

/// Bytes that lie together on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Where to read.
    pub source: Place,
    /// Where to write.
    pub target: Place,
    /// How many bytes.
    pub len: u64,
}

impl Descriptor {
    /// Fills the buffer that a cursor writes to.
    pub const EMPTY: Self = Self {
        source: Place::ZERO,
        target: Place::ZERO,
        len: 0,
    };
}

impl Place {
    const ZERO: Self = Self {
        region: RegionId(0),
        offset: 0,
    };

    /// Whether bytes at `offset` of `region` follow `len` bytes from here.
    fn meets(&self, len: u64, region: RegionId, offset: u64) -> bool {
        self.offset + len == offset && self.region == region
    }
}

/// What one descriptor must not exceed. The default sets no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Limits {
    /// Bytes of one descriptor (a device's largest message).
    pub len_max: Option<NonZeroU64>,
    /// A source region is registered in chunks of so many bytes from its start; no descriptor crosses from one to
    /// the next. Any number will do, a power of two is not needed.
    pub source_chunk: Option<NonZeroU64>,
    /// The same for target regions.
    pub target_chunk: Option<NonZeroU64>,
}

/// Walks a stream range on both sides and yields [`Descriptor`]s in stream order, merged where both sides touch and
/// split at the [`Limits`].
///
/// The walk can stop and go on at any descriptor: however the buffers given to [`PairCursor::fill`] are sized, the
/// descriptors are the same. It allocates nothing.
#[derive(Clone, Debug)]
pub struct PairCursor {
    pairing: Arc<Pairing>,
    component: usize,
    items: usize,
    piece: usize,
    item: usize,
    row: u64,
    /// Byte within the row.
    byte: u64,
    shape: Shape,
    splitter: Splitter,
    /// Bytes of the range that are not in `run` yet.
    left: u64,
    /// The bytes in the making, before splitting.
    run: Descriptor,
}

/// Both sides of the current piece.
#[derive(Clone, Copy, Debug)]
struct Shape {
    source: Rows,
    target: Rows,
    source_region: RegionId,
    target_region: RegionId,
}

impl PairCursor {
    /// A cursor over `range` of the stream of `items` items of a component.
    ///
    /// # Errors
    /// [`StreamError`] if there is no such component, too many items, or the range is not within the stream.
    pub fn new(
        pairing: Arc<Pairing>,
        component: usize,
        items: usize,
        range: Range<u64>,
        limits: &Limits,
    ) -> Result<Self, StreamError> {
        let spot = stream::open(&pairing, component, items, &range)?;
        let left = range.end - range.start;
        let splitter = Splitter::new(limits);
        let (piece, item, shape) = (spot.piece, spot.item, Shape::NONE);
        let (row, byte, run) = (0, 0, Descriptor::EMPTY);
        let mut cursor = Self {
            pairing,
            component,
            items,
            piece,
            item,
            row,
            byte,
            shape,
            splitter,
            left,
            run,
        };
        if left > 0 {
            cursor.load_piece();
            cursor.row = spot.byte / cursor.shape.source.row_len;
            cursor.byte = spot.byte % cursor.shape.source.row_len;
        }
        Ok(cursor)
    }

    /// Bytes of the range not yet yielded.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.left + self.run.len
    }

    /// Writes the next descriptors to `out` and says how many; fewer than `out` holds only at the end of the range.
    ///
    /// The items are the two sides' indices, the same ones at every call, checked by
    /// [`check_items`](super::stream::check_items) before.
    ///
    /// # Panics
    /// If a list is not as long as the cursor was told.
    pub fn fill(
        &mut self,
        source_items: &[i32],
        target_items: &[i32],
        out: &mut [Descriptor],
    ) -> usize {
        let lengths = (source_items.len(), target_items.len());
        assert_eq!(
            lengths,
            (self.items, self.items),
            "the item lists must be those the cursor was made for"
        );
        let mut filled = 0;
        while self.left > 0 {
            if self.item == self.items {
                self.piece += 1;
                self.item = 0;
                self.load_piece();
            }
            if !self.walk_piece(source_items, target_items, out, &mut filled) {
                return filled;
            }
        }
        self.splitter.flush(&mut self.run, out, &mut filled);
        filled
    }

    /// Walks to the end of the piece or of the range. False if `out` was full first; the position then is the first
    /// byte that is not part of `run`.
    fn walk_piece(
        &mut self,
        source_items: &[i32],
        target_items: &[i32],
        out: &mut [Descriptor],
        filled: &mut usize,
    ) -> bool {
        // The compiler keeps locals in registers, where fields would be stored at every row.
        let Shape {
            source,
            target,
            source_region,
            target_region,
        } = self.shape;
        let (mut run, mut left) = (self.run, self.left);
        let (mut row, mut byte) = (self.row, self.byte);
        let cut = self.shape.cut();
        let pairs = source_items.iter().zip(target_items).enumerate();
        for (place, (from, to)) in pairs.skip(self.item) {
            let (source_item, target_item) = (source.item(*from), target.item(*to));
            if let Some(cut) = &cut
                && byte == 0
                && (source.rows - row) * source.row_len < left
                && let Some(slots) = out.get_mut(*filled..)
            {
                let first = (source_item, target_item, row);
                let (taken, used) = self.splitter.rows(cut, first, &mut run, slots);
                left -= taken * source.row_len;
                row += taken;
                *filled += used;
            }
            while row < source.rows {
                let source_at = source_item + row * source.row_stride + byte;
                let target_at = target_item + row * target.row_stride + byte;
                let len = (source.row_len - byte).min(left);
                if run.source.meets(run.len, source_region, source_at)
                    && run.target.meets(run.len, target_region, target_at)
                {
                    run.len += len;
                } else {
                    if run.len > 0 && !self.splitter.flush(&mut run, out, filled) {
                        (self.item, self.row, self.byte) = (place, row, byte);
                        (self.run, self.left) = (run, left);
                        return false;
                    }
                    run = Descriptor {
                        source: Place {
                            region: source_region,
                            offset: source_at,
                        },
                        target: Place {
                            region: target_region,
                            offset: target_at,
                        },
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
        (self.item, self.row, self.byte) = (source_items.len(), 0, 0);
        (self.run, self.left) = (run, left);
        true
    }

    fn load_piece(&mut self) {
        let pieces = self.pairing.components[self.component].pieces();
        let piece = pieces
            .get(self.piece)
            .expect("invariant: the range ends within the stream");
        self.shape = Shape {
            source: Rows::plain(piece, End::Source),
            target: Rows::plain(piece, End::Target),
            source_region: piece.source.region,
            target_region: piece.target.region,
        };
    }
}

/// Items of which no two rows touch on both sides: every row is a descriptor, which need not be found out for each.
#[derive(Clone, Copy, Debug)]
struct Cut {
    shape: Shape,
    /// From the first byte of an item's first row to the last one of its last row.
    source_extent: u64,
    target_extent: u64,
}

impl Shape {
    fn cut(&self) -> Option<Cut> {
        let (source, target) = (&self.source, &self.target);
        let touches = |rows: &Rows| rows.row_stride == rows.row_len;
        if source.rows < 2 || (touches(source) && touches(target)) {
            return None;
        }
        let extent = |rows: &Rows| (rows.rows - 1) * rows.row_stride + rows.row_len;
        Some(Cut {
            shape: *self,
            source_extent: extent(source),
            target_extent: extent(target),
        })
    }

    /// Stands in while no piece is loaded.
    const NONE: Self = Self {
        source: Rows::NONE,
        target: Rows::NONE,
        source_region: RegionId(0),
        target_region: RegionId(0),
    };
}

/// Cuts runs at the limits. Each side remembers the chunk it wrote to last, because a division per block would cost as
/// much as the rest of the walk.
#[derive(Clone, Copy, Debug)]
struct Splitter {
    len_max: u64,
    source: Chunk,
    target: Chunk,
}

impl Splitter {
    fn new(limits: &Limits) -> Self {
        let len_max = limits.len_max.map_or(u64::MAX, NonZeroU64::get);
        let (source, target) = (
            Chunk::new(limits.source_chunk),
            Chunk::new(limits.target_chunk),
        );
        Self {
            len_max,
            source,
            target,
        }
    }

    /// Yields the run, then rows of a cut item from `row` on except for the last one that is taken, which becomes the run.
    /// How many rows were taken and slots used: none where it must go row by row, because a limit falls into the item, or
    /// the row goes on from the run.
    #[inline]
    fn rows(
        &mut self,
        cut: &Cut,
        (source_item, target_item, row): (u64, u64, u64),
        run: &mut Descriptor,
        out: &mut [Descriptor],
    ) -> (u64, usize) {
        let Shape { source, target, .. } = &cut.shape;
        let next = Descriptor {
            source: Place {
                region: cut.shape.source_region,
                offset: source_item + row * source.row_stride,
            },
            target: Place {
                region: cut.shape.target_region,
                offset: target_item + row * target.row_stride,
            },
            len: source.row_len,
        };
        let joins = run
            .source
            .meets(run.len, next.source.region, next.source.offset)
            && run
                .target
                .meets(run.len, next.target.region, next.target.offset);
        let whole = source.row_len <= self.len_max
            && self.source.fits(source_item) >= cut.source_extent
            && self.target.fits(target_item) >= cut.target_extent;
        if joins || !whole {
            return (0, 0);
        }
        let mut used = 0;
        if run.len > 0 && !self.flush(run, out, &mut used) {
            return (0, used);
        }
        let slots = &mut out[used..];
        let taken = (source.rows - row).min(slots.len() as u64 + 1);
        let mut next = next;
        for slot in slots
            .iter_mut()
            .take(usize::try_from(taken - 1).unwrap_or(0))
        {
            *slot = next;
            next.source.offset += source.row_stride;
            next.target.offset += target.row_stride;
            used += 1;
        }
        *run = next;
        (taken, used)
    }

    /// Moves the run into `out`, split. False if `out` is full first; the run then is what is left of it.
    #[inline]
    fn flush(&mut self, run: &mut Descriptor, out: &mut [Descriptor], filled: &mut usize) -> bool {
        while run.len > 0 {
            let Some(slot) = out.get_mut(*filled) else {
                return false;
            };
            let fits = self
                .source
                .fits(run.source.offset)
                .min(self.target.fits(run.target.offset));
            let len = run.len.min(self.len_max).min(fits);
            *slot = Descriptor { len, ..*run };
            *filled += 1;
            run.source.offset += len;
            run.target.offset += len;
            run.len -= len;
        }
        true
    }
}

/// One registration chunk of a region, `start..start + size`.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    size: NonZeroU64,
    start: u64,
}

impl Chunk {
    fn new(size: Option<NonZeroU64>) -> Self {
        Self {
            size: size.unwrap_or(NonZeroU64::MAX),
            start: 0,
        }
    }

    /// Bytes from `offset` to the end of its chunk, at least 1.
    #[inline]
    fn fits(&mut self, offset: u64) -> u64 {
        let into = offset.wrapping_sub(self.start);
        if into < self.size.get() {
            return self.size.get() - into;
        }
        let into = offset % self.size;
        self.start = offset - into;
        self.size.get() - into
    }
}
