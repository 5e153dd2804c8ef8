//! The kernels on the CPU, index by index: what copy.cu computes, over one array of bytes whose indices are the addresses.
//!
//! The tests compare it with naive copies, and on a GPU the kernels with it. It is no fallback: host memory is copied by
//! the engine's own paths.
#![forbid(unsafe_code)]

use super::{
    crc,
    lists::{self, Bulk, BulkShape, Pair, Piece, Rows, Shape, Window, WindowTables},
};
use crate::gpu::GpuError;

/// The kinds of kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twin {
    /// Units through registers.
    Vector,
    /// Rows through shared memory; where the shape does not suit it, units.
    Bulk,
    /// The same in short parts, by blocks of one warp.
    Thin,
}

/// `copy_pages` over an array.
///
/// # Errors
/// Those of the kernel's own checks.
///
/// # Panics
/// If an address is outside the array.
pub fn copy_pages(
    memory: &mut [u8],
    pairs: &[Pair],
    rows: Rows,
    twin: Twin,
) -> Result<(), GpuError> {
    lists::check_rows(&rows)?;
    let bits = pairs
        .iter()
        .fold(0, |bits, pair| bits | pair.source | pair.target);
    let width = lists::width(bits | lists::row_bits(&rows));
    let range = 0..rows.len_bytes() * pairs.len() as u64;
    let piece = |number: u32| pairs[number as usize];
    run(memory, &rows, width, &range, twin, piece)
}

/// `copy_window` over an array.
///
/// # Errors
/// Those of the kernel's own checks.
///
/// # Panics
/// If an address is outside the array.
pub fn copy_window(memory: &mut [u8], window: &Window<'_>, twin: Twin) -> Result<(), GpuError> {
    let width = lists::check_window(window)?;
    let tables = WindowTables::at(window, 0);
    let divisor = tables.item_divisor();
    let place = |side: lists::Side<'_>, item: u32| {
        let index = side
            .items
            .map_or(item, |list| list[item as usize].cast_unsigned());
        u64::from(index).wrapping_mul(side.stride)
    };
    let piece = |number: u32| {
        let buffer = divisor.divide(number);
        let item = number - buffer * divisor.value;
        let base = window.buffers[buffer as usize];
        Pair {
            source: base.source.wrapping_add(place(window.source, item)),
            target: base.target.wrapping_add(place(window.target, item)),
        }
    };
    run(memory, &window.rows, width, &window.range, twin, piece)
}

fn run(
    memory: &mut [u8],
    rows: &Rows,
    width: u32,
    range: &std::ops::Range<u64>,
    twin: Twin,
    piece: impl Fn(u32) -> Pair,
) -> Result<(), GpuError> {
    let kind = match twin {
        Twin::Vector => None,
        Twin::Bulk => Some(Bulk::Wide),
        Twin::Thin => Some(Bulk::Thin),
    };
    let kind = kind.filter(|_| width == 16);
    if let Some(shape) = kind.and_then(|kind| BulkShape::new(rows, range, kind)) {
        copy_rows(memory, &shape, piece);
    } else {
        copy_units(memory, &Shape::new(rows, width, range)?, width, piece);
    }
    Ok(())
}

fn copy_units(memory: &mut [u8], shape: &Shape, width: u32, piece: impl Fn(u32) -> Pair) {
    let (units, rows) = shape.divisors();
    for n in 0..shape.total {
        let row = units.divide(shape.first + n);
        let unit = u64::from(shape.first + n - row * units.value);
        let number = rows.divide(row);
        let within = u64::from(row - number * rows.value);
        let base = piece(number);
        let offset = unit * u64::from(width);
        let source = base
            .source
            .wrapping_add(within * shape.source_stride + offset);
        let target = base
            .target
            .wrapping_add(within * shape.target_stride + offset);
        transfer(memory, source, target, width);
    }
}

fn copy_rows(memory: &mut [u8], shape: &BulkShape, piece: impl Fn(u32) -> Pair) {
    let (parts, rows) = shape.divisors();
    for n in 0..shape.total {
        let row = parts.divide(shape.first + n);
        let offset = (shape.first + n - row * parts.value) * shape.stage_bytes;
        let bytes = shape.stage_bytes.min(shape.bytes - offset);
        let number = rows.divide(row);
        let within = u64::from(row - number * rows.value);
        let base = piece(number);
        let offset = u64::from(offset);
        let source = base
            .source
            .wrapping_add(within * shape.source_stride + offset);
        let target = base
            .target
            .wrapping_add(within * shape.target_stride + offset);
        transfer(memory, source, target, bytes);
    }
}

/// `copy_pieces` over an array.
///
/// # Panics
/// If an address is outside the array.
pub fn copy_pieces(memory: &mut [u8], pieces: &[Piece]) {
    for tile in lists::tiles(pieces) {
        let apart = tile.source ^ tile.target;
        let width = u64::from(lists::width(apart));
        let head = (tile.source.wrapping_neg() & (width - 1)).min(tile.len);
        let body = (tile.len - head) / width * width;
        for (at, len) in [
            (0, head),
            (head, body),
            (head + body, tile.len - head - body),
        ] {
            let len = u32::try_from(len).expect("invariant: a tile is short");
            transfer(memory, tile.source + at, tile.target + at, len);
        }
    }
}

/// `copy_pages_checked` over an array: the copy, and each page's CRC32C.
///
/// # Panics
/// If an address is outside the array.
pub fn copy_checked(memory: &mut [u8], pairs: &[Pair], bytes: u32) -> Vec<u32> {
    let tables = crc::Tables::new();
    let sum = |pair: &Pair| {
        transfer(memory, pair.source, pair.target, bytes);
        let start = index(pair.target);
        tables.by_lanes(&memory[start..start + bytes as usize])
    };
    pairs.iter().map(sum).collect()
}

fn transfer(memory: &mut [u8], source: u64, target: u64, bytes: u32) {
    let (source, target, bytes) = (index(source), index(target), bytes as usize);
    memory.copy_within(source..source + bytes, target);
}

fn index(address: u64) -> usize {
    usize::try_from(address).expect("an address of the array")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gpu::kernels::lists::Side;

    /// Sources in the first half, targets in the second.
    const HALF: usize = 1 << 18;
    const POISON: u8 = 0xa5;

    fn memory(seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut byte = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        };
        let mut bytes: Vec<u8> = (0..HALF).map(|_| byte()).collect();
        bytes.resize(2 * HALF, POISON);
        bytes
    }

    fn naive(memory: &mut [u8], pairs: &[Pair], rows: &Rows) {
        for pair in pairs {
            for row in 0..u64::from(rows.count) {
                let source = index(pair.source + row * rows.source_stride);
                let target = index(pair.target + row * rows.target_stride);
                for at in 0..rows.bytes as usize {
                    memory[target + at] = memory[source + at];
                }
            }
        }
    }

    fn rows() -> impl Strategy<Value = Rows> {
        let unit = prop_oneof![Just(1_u32), Just(4), Just(8), Just(16)];
        (1..6_u32, unit, 1..40_u32, 0..3_u64, 0..3_u64).prop_map(
            |(count, unit, units, more, most)| {
                let bytes = unit * units;
                Rows {
                    count,
                    bytes,
                    source_stride: u64::from(bytes) + more * u64::from(unit),
                    target_stride: u64::from(bytes) + most * u64::from(unit),
                }
            },
        )
    }

    /// Pieces that do not overlap, in a mixed order.
    fn places(rows: &Rows, count: usize, seed: u64, odd: u64) -> Vec<Pair> {
        let span = |stride: u64| stride * u64::from(rows.count) + 64;
        let order = |place: u64| (place * 7 + seed) % count as u64;
        (0..count as u64)
            .map(|place| Pair {
                source: odd + order(place) * span(rows.source_stride).next_multiple_of(64),
                target: HALF as u64 + odd + place * span(rows.target_stride).next_multiple_of(64),
            })
            .collect()
    }

    proptest! {
        #[test]
        fn pages_and_rows_equal_a_naive_copy(
            rows in rows(), count in prop_oneof![Just(1_usize), Just(5), Just(31)], seed in 0..1000_u64,
            odd in prop_oneof![Just(0_u64), Just(8), Just(4), Just(3)], twin in prop_oneof![Just(Twin::Vector), Just(Twin::Bulk), Just(Twin::Thin)],
        ) {
            let pairs = places(&rows, count, seed, odd);
            let (mut ours, mut expected) = (memory(seed), memory(seed));
            copy_pages(&mut ours, &pairs, rows, twin).expect("within bounds");
            naive(&mut expected, &pairs, &rows);
            prop_assert!(ours == expected);
        }

        #[test]
        fn long_pages_are_cut_into_stages(bytes in 1..2000_u32, seed in 0..100_u64) {
            let rows = Rows::page(bytes * 16);
            let pairs = places(&rows, 3, seed, 0);
            let (mut ours, mut expected) = (memory(seed), memory(seed));
            copy_pages(&mut ours, &pairs, rows, Twin::Bulk).expect("within bounds");
            naive(&mut expected, &pairs, &rows);
            prop_assert!(ours == expected);
        }

        #[test]
        fn any_range_of_a_window_packs_and_unpacks(
            rows in rows(), buffers in 1..4_usize, items in 1..9_usize, cut in any::<(u16, u16)>(), seed in 0..1000_u64,
            twin in prop_oneof![Just(Twin::Vector), Just(Twin::Bulk), Just(Twin::Thin)],
        ) {
            let item_bytes = rows.len_bytes();
            let total = item_bytes * (buffers * items) as u64;
            let (low, high) = (u64::from(cut.0) % total, u64::from(cut.1) % total);
            let range = low.min(high)..low.max(high) + 1;
            let stride = (rows.source_stride * u64::from(rows.count)).next_multiple_of(16);
            let list: Vec<i32> = (0..items).rev().map(|item| i32::try_from(item).expect("small")).collect();
            let bases: Vec<Pair> = (0..buffers as u64).map(|buffer| Pair {
                source: buffer * stride * items as u64,
                target: (HALF as u64 + buffer * items as u64 * item_bytes).wrapping_sub(range.start),
            }).collect();
            let packed = Rows { target_stride: u64::from(rows.bytes), ..rows };
            let window = Window {
                buffers: &bases,
                items: u32::try_from(items).expect("small"),
                source: Side { items: Some(&list), stride },
                target: Side { items: None, stride: item_bytes },
                rows: packed,
                range: range.clone(),
            };
            let mut ours = memory(seed);
            let before = ours.clone();
            copy_window(&mut ours, &window, twin).expect("within bounds");
            let mut expected = before.clone();
            for (place, stream) in range.clone().enumerate() {
                let (piece, within) = (stream / item_bytes, stream % item_bytes);
                let (buffer, item) = (piece / items as u64, piece % items as u64);
                let (row, byte) = (within / u64::from(rows.bytes), within % u64::from(rows.bytes));
                let item = u64::from(list[index(item)].cast_unsigned());
                let from = buffer * stride * items as u64 + item * stride + row * rows.source_stride + byte;
                expected[HALF + place] = before[index(from)];
            }
            prop_assert!(ours == expected);
        }

        #[test]
        fn pieces_of_any_length_and_alignment_equal_a_naive_copy(
            lens in prop::collection::vec(0..40_000_u64, 1..6), shifts in any::<(u8, u8)>(), seed in 0..1000_u64,
        ) {
            let (mut source, mut target) = (u64::from(shifts.0), HALF as u64 + u64::from(shifts.1));
            let mut pieces = Vec::new();
            for len in lens {
                pieces.push(Piece { source, target, len });
                source += len + 3;
                target += len + 5;
            }
            let (mut ours, mut expected) = (memory(seed), memory(seed));
            copy_pieces(&mut ours, &pieces);
            for piece in &pieces {
                let (from, to, len) = (index(piece.source), index(piece.target), index(piece.len));
                expected.copy_within(from..from + len, to);
            }
            prop_assert!(ours == expected);
        }
    }
}
