//! What is copied, and how a copy becomes launches: pure arithmetic over addresses that nobody here follows.
#![forbid(unsafe_code)]

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::divide::{DIVIDEND_END, Divisor};
use crate::gpu::GpuError;

/// A source and a target address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct Pair {
    /// Where to read.
    pub source: u64,
    /// Where to write.
    pub target: u64,
}

/// A source, a target and a length in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct Piece {
    /// Where to read.
    pub source: u64,
    /// Where to write.
    pub target: u64,
    /// How many bytes.
    pub len: u64,
}

/// What lies behind each pair of addresses: rows that are contiguous, their starts a stride apart on each side.
///
/// A page is one row. The head slice of a page of 64 tokens is 64 rows of a few hundred bytes: strided in the cache,
/// contiguous in a staging buffer (stride = bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Rows of each pair.
    pub count: u32,
    /// Bytes of each row.
    pub bytes: u32,
    /// Bytes from one row's start to the next, where they are read.
    pub source_stride: u64,
    /// The same where they are written.
    pub target_stride: u64,
}

impl Rows {
    /// One contiguous run.
    #[must_use]
    pub fn page(bytes: u32) -> Self {
        Self {
            count: 1,
            bytes,
            source_stride: u64::from(bytes),
            target_stride: u64::from(bytes),
        }
    }

    /// Bytes behind each pair.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.count) * u64::from(self.bytes)
    }
}

/// The items of one side of a [`Window`].
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// The item indices (pages, slots), none negative; `None`: item number n lies at n strides.
    pub items: Option<&'a [i32]>,
    /// Bytes from one item to the next.
    pub stride: u64,
}

/// A part of a logical stream (see [`crate::plan`]): *for each buffer, for each item, for each row*, the bytes numbered
/// `range`. It costs a table of its buffers and items, whatever their product.
///
/// A contiguous side (packed) has no item list, an item stride of the item's bytes, and as base of buffer `b`
/// `address + b × items × item bytes - range.start`, wrapping.
#[derive(Clone, Debug)]
pub struct Window<'a> {
    /// Both sides' base of each buffer.
    pub buffers: &'a [Pair],
    /// How many items.
    pub items: u32,
    /// Where they are read.
    pub source: Side<'a>,
    /// Where they are written.
    pub target: Side<'a>,
    /// The rows of an item in a buffer.
    pub rows: Rows,
    /// Bytes of the stream.
    pub range: Range<u64>,
}

/// Bytes of a unit: the widest access that all of `bits` (addresses, strides and lengths, or-ed) are multiples of.
pub(super) fn width(bits: u64) -> u32 {
    match bits.trailing_zeros() {
        4.. => 16,
        3 => 8,
        2 => 4,
        _ => 1,
    }
}

/// `Shape` of copy.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) source_stride: u64,
    pub(super) target_stride: u64,
    pub(super) first: u32,
    pub(super) total: u32,
    pub(super) units: u32,
    units_factor: u32,
    units_shift: u32,
    pub(super) rows: u32,
    rows_factor: u32,
    rows_shift: u32,
}

impl Shape {
    /// The shape of a launch over bytes `range` of pieces with these rows, in units of `width` bytes.
    pub(super) fn new(rows: &Rows, width: u32, range: &Range<u64>) -> Result<Self, GpuError> {
        let width = u64::from(width);
        let (units, per_piece) = (
            Divisor::new(narrow(u64::from(rows.bytes) / width)?),
            Divisor::new(rows.count),
        );
        // What is divided stays below the bound: first + total.
        narrow(range.end / width)?;
        Ok(Self {
            source_stride: rows.source_stride,
            target_stride: rows.target_stride,
            first: narrow(range.start / width)?,
            total: narrow((range.end - range.start) / width)?,
            units: units.value,
            units_factor: units.factor,
            units_shift: units.shift,
            rows: per_piece.value,
            rows_factor: per_piece.factor,
            rows_shift: per_piece.shift,
        })
    }

    /// The divisors, as the kernels are given them.
    pub(super) fn divisors(&self) -> (Divisor, Divisor) {
        let units = Divisor {
            value: self.units,
            factor: self.units_factor,
            shift: self.units_shift,
        };
        let rows = Divisor {
            value: self.rows,
            factor: self.rows_factor,
            shift: self.rows_shift,
        };
        (units, rows)
    }
}

/// Longest part of a row that the bulk kernels move at once, in bytes (`BULK_PART_BYTES` of copy.cu). A warp takes some 360 ns
/// to turn from one part to the next: ten blocks on an H200 copy 450 GB/s in parts of 4 KiB, 493 in 8 and 502 in 16.
const PART_BYTES: u32 = 16 << 10;

/// Bytes of a warp's ring of stages (`BULK_RING_BYTES`), and most stages of it (`BULK_STAGES_MAX`).
pub(super) const RING_BYTES: u32 = 12 * 4096;
const STAGES_MAX: u32 = 32;

/// The same of the thin kernels (`THIN_PART_BYTES`, `THIN_RING_BYTES`).
const THIN_PART_BYTES: u32 = 2048;
pub(super) const THIN_RING_BYTES: u32 = 6 * 2048;

/// The two kinds of bulk kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bulk {
    /// Blocks that have a multiprocessor to themselves.
    Wide,
    /// Blocks of one warp beside other kernels' blocks.
    Thin,
}

impl Bulk {
    /// Longest part of a row, and bytes of a warp's ring.
    fn sizes(self) -> (u32, u32) {
        match self {
            Self::Wide => (PART_BYTES, RING_BYTES),
            Self::Thin => (THIN_PART_BYTES, THIN_RING_BYTES),
        }
    }
}

/// `BulkShape` of copy.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BulkShape {
    pub(super) source_stride: u64,
    pub(super) target_stride: u64,
    pub(super) first: u32,
    pub(super) total: u32,
    pub(super) bytes: u32,
    pub(super) stage_bytes: u32,
    stages: u32,
    storing: u32,
    pub(super) parts: u32,
    parts_factor: u32,
    parts_shift: u32,
    pub(super) rows: u32,
    rows_factor: u32,
    rows_shift: u32,
}

impl BulkShape {
    /// The shape of a bulk launch, if these rows and this range suit one: rows of whole vectors, the range of whole rows.
    pub(super) fn new(rows: &Rows, range: &Range<u64>, bulk: Bulk) -> Option<Self> {
        let (part_bytes, ring_bytes) = bulk.sizes();
        let bytes = u64::from(rows.bytes);
        let parts = rows.bytes.div_ceil(part_bytes);
        let stage_bytes = rows.bytes.min(part_bytes);
        let stages = (ring_bytes / stage_bytes.max(1)).min(STAGES_MAX);
        let whole_rows = range.start.is_multiple_of(bytes) && range.end.is_multiple_of(bytes);
        if !rows.bytes.is_multiple_of(16) || !whole_rows {
            return None;
        }
        let (parts, per_piece) = (Divisor::new(parts), Divisor::new(rows.count));
        let count = |bytes_before: u64| narrow(bytes_before / bytes * u64::from(parts.value)).ok();
        let (first, end) = (count(range.start)?, count(range.end)?);
        Some(Self {
            source_stride: rows.source_stride,
            target_stride: rows.target_stride,
            first,
            total: end - first,
            bytes: rows.bytes,
            stage_bytes,
            stages,
            storing: stages / 3,
            parts: parts.value,
            parts_factor: parts.factor,
            parts_shift: parts.shift,
            rows: per_piece.value,
            rows_factor: per_piece.factor,
            rows_shift: per_piece.shift,
        })
    }

    /// The divisors, as the kernels are given them.
    pub(super) fn divisors(&self) -> (Divisor, Divisor) {
        let parts = Divisor {
            value: self.parts,
            factor: self.parts_factor,
            shift: self.parts_shift,
        };
        let rows = Divisor {
            value: self.rows,
            factor: self.rows_factor,
            shift: self.rows_shift,
        };
        (parts, rows)
    }
}

/// `Window` of copy.cu: the tables' addresses and the divisor by items.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WindowTables {
    pub(super) buffers: u64,
    pub(super) source_items: u64,
    pub(super) target_items: u64,
    pub(super) source_item_stride: u64,
    pub(super) target_item_stride: u64,
    items: u32,
    items_factor: u32,
    items_shift: u32,
    reserved: u32,
}

impl WindowTables {
    /// The tables of `window` laid out from `address` as [`WindowTables::bytes`] counts them: buffers, source items, target
    /// items.
    pub(super) fn at(window: &Window<'_>, address: u64) -> Self {
        let items = Divisor::new(window.items);
        let list_bytes = u64::from(window.items) * 4;
        let source = address + size_of_val(window.buffers) as u64;
        let (source_items, target) = match window.source.items {
            Some(_) => (source, source + list_bytes),
            None => (0, source),
        };
        Self {
            buffers: address,
            source_items,
            target_items: window.target.items.map_or(0, |_| target),
            source_item_stride: window.source.stride,
            target_item_stride: window.target.stride,
            items: items.value,
            items_factor: items.factor,
            items_shift: items.shift,
            reserved: 0,
        }
    }

    /// Bytes of the tables.
    pub(super) fn bytes(window: &Window<'_>) -> usize {
        let lists = [window.source.items, window.target.items];
        let lists: usize = lists.into_iter().flatten().map(size_of_val).sum();
        size_of_val(window.buffers) + lists
    }

    pub(super) fn item_divisor(&self) -> Divisor {
        Divisor {
            value: self.items,
            factor: self.items_factor,
            shift: self.items_shift,
        }
    }
}

// What copy.cu's compiler lays out; its structs have no padding either.
const _: () = {
    assert!(size_of::<Shape>() == 2 * 8 + 8 * 4, "Shape");
    assert!(size_of::<BulkShape>() == 2 * 8 + 12 * 4, "BulkShape");
    assert!(size_of::<WindowTables>() == 5 * 8 + 4 * 4, "Window");
};

/// Most rows, and most bytes of one, so that a shape's numbers fit.
pub(super) fn check_rows(rows: &Rows) -> Result<(), GpuError> {
    if rows.count == 0 || rows.bytes == 0 {
        return Err(GpuError::Misuse("a piece has at least one row of one byte"));
    }
    narrow(rows.len_bytes())?;
    Ok(())
}

/// Checks a window and says the width of its units.
pub(super) fn check_window(window: &Window<'_>) -> Result<u32, GpuError> {
    check_rows(&window.rows)?;
    let Range { start, end } = window.range;
    let per_item = window.rows.len_bytes();
    let items = u64::from(window.items);
    let len = per_item
        .checked_mul(items)
        .and_then(|bytes| bytes.checked_mul(window.buffers.len() as u64));
    if items == 0 || start >= end || len.is_none_or(|len| end > len) {
        return Err(GpuError::Misuse(
            "a window's range is not within its stream",
        ));
    }
    narrow(items * window.buffers.len() as u64 * u64::from(window.rows.count))?;
    for side in [window.source, window.target] {
        let Some(list) = side.items else { continue };
        if list.len() as u64 != items {
            return Err(GpuError::Misuse(
                "a window's item list is not as long as it says",
            ));
        }
        if list.iter().any(|item| *item < 0) {
            return Err(GpuError::Misuse("an item index is negative"));
        }
    }
    let rows = &window.rows;
    let bases = window
        .buffers
        .iter()
        .fold(0, |bits, pair| bits | pair.source | pair.target);
    let strides = window.source.stride | window.target.stride;
    Ok(width(bases | strides | row_bits(rows) | start | end))
}

/// The bits of rows that limit the width.
pub(super) fn row_bits(rows: &Rows) -> u64 {
    let strides = if rows.count > 1 {
        rows.source_stride | rows.target_stride
    } else {
        0
    };
    strides | u64::from(rows.bytes)
}

/// How many pairs of so many bytes each one launch may take, by its arithmetic.
pub(super) fn pairs_per_launch(rows: &Rows, width: u32) -> usize {
    let units = rows.len_bytes() / u64::from(width);
    let most = (DIVIDEND_END - 1) / units.max(1);
    usize::try_from(most).map_or(usize::MAX, |most| most.max(1))
}

/// Pairs of the first launch of a list: few where there are many, so that the device has something to do while the host lists the
/// rest.
pub(super) fn first_launch(pairs: usize, slot_pairs: usize) -> usize {
    if pairs > slot_pairs / 4 {
        slot_pairs / 16
    } else {
        slot_pairs
    }
}

/// Longest tile of a piece, in bytes: long enough that its table entry costs nothing, short enough that the last ones do not leave
/// the other warps idle.
pub(super) const TILE_BYTES: u64 = 16 << 10;

/// Cuts pieces of any length into tiles.
pub(super) fn tiles(pieces: &[Piece]) -> impl Iterator<Item = Piece> + '_ {
    pieces.iter().flat_map(|piece| {
        (0..piece.len.div_ceil(TILE_BYTES)).map(|place| {
            let at = place * TILE_BYTES;
            Piece {
                source: piece.source + at,
                target: piece.target + at,
                len: TILE_BYTES.min(piece.len - at),
            }
        })
    })
}

/// A number that the kernels can divide.
fn narrow(number: u64) -> Result<u32, GpuError> {
    let too_many = GpuError::Limit {
        what: "units in one launch",
        asked: number,
        limit: DIVIDEND_END - 1,
    };
    match u32::try_from(number) {
        Ok(small) if number < DIVIDEND_END => Ok(small),
        _ => Err(too_many),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_access_that_everything_allows_is_chosen() {
        assert_eq!(width(0x1000 | 16384), 16);
        assert_eq!(width(0x1008), 8);
        assert_eq!(width(0x1004 | 16), 4);
        assert_eq!(width(0x1002), 1);
        assert_eq!(width(0x1001), 1);
    }

    #[test]
    fn a_launch_never_divides_more_than_it_can() {
        let page = Rows::page(16384);
        let most = (1 << 31) * 16 - 16384;
        assert!(Shape::new(&page, 16, &(0..most)).is_ok());
        assert!(matches!(
            Shape::new(&page, 16, &(0..most + 16384)),
            Err(GpuError::Limit { .. })
        ));
        assert_eq!(pairs_per_launch(&Rows::page(1 << 20), 16), 32767);
        assert_eq!(pairs_per_launch(&Rows::page(1 << 20), 1), 2047);
        assert_eq!(pairs_per_launch(&Rows::page(1 << 30), 1), 1);
        assert_eq!(first_launch(4096, 65536), 65536);
        assert_eq!(first_launch(1 << 20, 65536), 4096);
        assert!(check_rows(&Rows::page(0)).is_err());
        assert!(
            check_rows(&Rows {
                count: 1 << 20,
                ..Rows::page(1 << 20)
            })
            .is_err()
        );
    }

    #[test]
    fn the_kernels_numbers_are_ours() {
        let defined = |name: &str| {
            let line = format!("#define {name} ");
            let value = crate::gpu::kernels::source::SOURCE
                .lines()
                .find_map(|text| text.strip_prefix(&line));
            value.and_then(|value| value.parse().ok())
        };
        assert_eq!(defined("BULK_PART_BYTES"), Some(PART_BYTES));
        assert_eq!(defined("BULK_RING_BYTES"), Some(RING_BYTES));
        assert_eq!(defined("BULK_STAGES_MAX"), Some(STAGES_MAX));
        let threads = crate::gpu::kernels::module::BULK_THREADS;
        assert_eq!(defined("BULK_WARPS"), Some(threads / 32));
        // Stages of the shortest and the longest parts; a warp's lane stores at most one of them at a time.
        for (bytes, stages) in [
            (16, 32),
            (2048, 24),
            (4096, 12),
            (8192, 6),
            (16384, 3),
            (1 << 20, 3),
        ] {
            let shape = BulkShape::new(&Rows::page(bytes), &(0..u64::from(bytes)), Bulk::Wide);
            let shape = shape.expect("whole vectors");
            assert_eq!((shape.stages, shape.storing), (stages, stages / 3));
            assert!(shape.stages * shape.stage_bytes <= RING_BYTES);
        }
        assert_eq!(defined("THIN_PART_BYTES"), Some(THIN_PART_BYTES));
        assert_eq!(defined("THIN_RING_BYTES"), Some(THIN_RING_BYTES));
        for (bytes, stages) in [(16, 32), (512, 24), (2048, 6), (1 << 20, 6)] {
            let shape = BulkShape::new(&Rows::page(bytes), &(0..u64::from(bytes)), Bulk::Thin);
            let shape = shape.expect("whole vectors");
            assert_eq!((shape.stages, shape.storing), (stages, stages / 3));
            assert!(shape.stages * shape.stage_bytes <= THIN_RING_BYTES);
        }
    }

    #[test]
    fn windows_are_checked_against_their_lists() {
        let items = [3, 1, 2];
        let window = Window {
            buffers: &[Pair {
                source: 4096,
                target: 8192,
            }],
            items: 3,
            source: Side {
                items: Some(&items),
                stride: 512,
            },
            target: Side {
                items: None,
                stride: 512,
            },
            rows: Rows::page(512),
            range: 0..1536,
        };
        assert_eq!(check_window(&window), Ok(16));
        let with = |range| {
            check_window(&Window {
                range,
                ..window.clone()
            })
        };
        assert_eq!(with(8..1536), Ok(8));
        assert!(with(0..1537).is_err());
        assert!(with(5..5).is_err());
        let short = Window {
            items: 4,
            ..window.clone()
        };
        assert!(check_window(&short).is_err());
        let negative = [3, -1, 2];
        let negative = Side {
            items: Some(&negative),
            stride: 512,
        };
        assert!(
            check_window(&Window {
                source: negative,
                ..window
            })
            .is_err()
        );
    }

    #[test]
    fn tiles_cover_their_pieces() {
        let piece = Piece {
            source: 5,
            target: 9,
            len: 2 * TILE_BYTES + 1,
        };
        let cut: Vec<_> =
            tiles(&[piece, Piece { len: 0, ..piece }, Piece { len: 3, ..piece }]).collect();
        assert_eq!(cut.len(), 4);
        assert_eq!(
            cut[2],
            Piece {
                source: 5 + 2 * TILE_BYTES,
                target: 9 + 2 * TILE_BYTES,
                len: 1
            }
        );
        assert_eq!(cut[3].len, 3);
    }
}
