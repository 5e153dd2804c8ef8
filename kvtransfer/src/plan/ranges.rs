//! Cuts a stream range into batches, and stripes it over rails. Both only choose numbers: every byte of the range is in
//! exactly one result, in order.
#![forbid(unsafe_code)]

use std::num::NonZeroU64;
use std::ops::Range;

use super::stream::Stream;

/// The batches of a stream range, see [`batches`].
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    stream: Stream<'a>,
    next: u64,
    end: u64,
    bytes_max: u64,
}

/// Splits `range` into consecutive batches of at most `bytes_max`, cut between two items where an item fits a batch,
/// else between two rows, else anywhere. What of the range lies beyond the stream is left out.
#[must_use]
pub fn batches<'a>(stream: &Stream<'a>, range: Range<u64>, bytes_max: NonZeroU64) -> Batches<'a> {
    let end = range.end.min(stream.len_bytes());
    Batches {
        stream: *stream,
        next: range.start,
        end,
        bytes_max: bytes_max.get(),
    }
}

impl Iterator for Batches<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.next;
        if start >= self.end {
            return None;
        }
        self.next = match start.checked_add(self.bytes_max) {
            Some(full) if full < self.end => self.stream.cut(start, full),
            _ => self.end,
        };
        Some(start..self.next)
    }
}

/// Splits `range` over rails in proportion to their weights (measured rates, credits, …), one consecutive range per
/// rail, cut between items or rows where that is possible. A rail of weight 0 gets an empty range. What of the range
/// lies beyond the stream is left out.
///
/// `None` if no rail has any weight: then there is nobody to carry the bytes.
#[must_use]
pub fn stripe(stream: &Stream<'_>, range: Range<u64>, weights: &[u32]) -> Option<Vec<Range<u64>>> {
    let total: u64 = weights.iter().copied().map(u64::from).sum();
    let last = weights.iter().rposition(|weight| *weight > 0)?;
    let end = range.end.min(stream.len_bytes());
    let start = range.start.min(end);
    let mut stripes = Vec::with_capacity(weights.len());
    let (mut from, mut weight_before) = (start, 0);
    for (rail, weight) in weights.iter().enumerate() {
        weight_before += u64::from(*weight);
        let to = if rail >= last {
            end
        } else if *weight == 0 {
            from
        } else {
            let ideal = start + share(end - start, weight_before, total);
            // A cut that would fall at or before the previous one leaves this rail without bytes.
            if ideal <= from {
                from
            } else {
                stream.cut(from, ideal)
            }
        };
        stripes.push(from..to);
        from = to;
    }
    Some(stripes)
}

/// `bytes * part / total`, rounded down, without overflow.
fn share(bytes: u64, part: u64, total: u64) -> u64 {
    let share = u128::from(bytes) * u128::from(part) / u128::from(total);
    u64::try_from(share).expect("invariant: a part is not more than the total")
}
