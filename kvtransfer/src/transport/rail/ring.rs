//! Where packed batches lie in landing memory: one behind the other, or at the start where the rest is too short. Both ends work
//! the places out by this one rule, so a notice can name no other.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use thiserror::Error;

/// Why a notice of a packed batch is not followed: its sender broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum RingError {
    #[error("a packed batch of {len} bytes; the landing memory takes 1 to {most}")]
    Length { len: u64, most: u64 },
    #[error("a packed batch at {place} of the landing memory, where {expected} was next")]
    Place { place: u64, expected: u64 },
}

/// The next place.
#[derive(Clone, Copy, Debug)]
struct Head {
    capacity: u64,
    next: u64,
}

impl Head {
    /// The longest batch. With half of the memory at most, an empty ring has place for any batch, wherever its head is.
    fn most(self) -> u64 {
        self.capacity / 2
    }

    /// Where a batch goes, and what it takes of the memory with the rest that it leaves at the end. `None`: it is empty or
    /// too long.
    fn place(self, len: u64) -> Option<(u64, u64)> {
        if len == 0 || len > self.most() {
            None
        } else if self.next + len <= self.capacity {
            Some((self.next, len))
        } else {
            Some((0, self.capacity - self.next + len))
        }
    }
}

/// What a packed batch belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) room: u64,
    pub(super) component: u8,
}

/// A batch in the sender's ring.
#[derive(Clone, Copy, Debug)]
struct Span {
    batch: u64,
    part: Part,
    bytes: u64,
    /// Where the head was before.
    before: u64,
}

/// The sender's account of the receiver's memory.
#[derive(Debug)]
pub(super) struct Outgoing {
    head: Head,
    used: u64,
    /// Batches without an answer, in their order.
    spans: VecDeque<Span>,
}

impl Outgoing {
    /// Nothing is written yet.
    pub(super) fn new(capacity: u64) -> Self {
        let head = Head { capacity, next: 0 };
        Self {
            head,
            used: 0,
            spans: VecDeque::new(),
        }
    }

    /// Bytes of the longest batch.
    pub(super) fn most(&self) -> u64 {
        self.head.most()
    }

    /// Takes the place of batch number `batch`, which counts all batches of the queue pair. `None`: not before some are answered.
    pub(super) fn take(&mut self, batch: u64, part: Part, len: u64) -> Option<u64> {
        let (at, bytes) = self.head.place(len)?;
        if self.used + bytes > self.head.capacity {
            return None;
        }
        self.spans.push_back(Span {
            batch,
            part,
            bytes,
            before: self.head.next,
        });
        self.used += bytes;
        self.head.next = at + len;
        Some(at)
    }

    /// Whether the receiver may still have to move bytes that must be there before a batch of `part`: earlier components of its
    /// room.
    pub(super) fn holds_before(&self, part: Part) -> bool {
        let is_before =
            |span: &Span| span.part.room == part.room && span.part.component < part.component;
        self.spans.iter().any(is_before)
    }

    /// Gives back the place that was taken last: its batch will not be written.
    pub(super) fn take_back(&mut self) {
        if let Some(span) = self.spans.pop_back() {
            self.used -= span.bytes;
            self.head.next = span.before;
        }
    }

    /// The first `count` batches of the queue pair are answered.
    pub(super) fn answered(&mut self, count: u64) {
        while let Some(span) = self.spans.front().filter(|span| span.batch <= count) {
            self.used -= span.bytes;
            self.spans.pop_front();
        }
    }
}

/// The receiver's view of its own memory.
#[derive(Debug)]
pub(super) struct Incoming(Head);

impl Incoming {
    /// Nothing has arrived yet.
    pub(super) fn new(capacity: u64) -> Self {
        Self(Head { capacity, next: 0 })
    }

    /// A notice says that a batch of `len` bytes lies at `place`.
    ///
    /// # Errors
    /// It cannot lie there.
    pub(super) fn arrived(&mut self, place: u64, len: u64) -> Result<(), RingError> {
        let most = self.0.most();
        let (expected, _) = self.0.place(len).ok_or(RingError::Length { len, most })?;
        if place != expected {
            return Err(RingError::Place { place, expected });
        }
        self.0.next = place + len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::{Incoming, Outgoing, Part, RingError};

    const KV: Part = Part {
        room: 1,
        component: 0,
    };

    #[test]
    fn a_place_twice_a_wrong_one_and_a_batch_too_long_are_refused() {
        let mut ring = Incoming::new(100);
        assert_eq!(ring.arrived(0, 40), Ok(()));
        for place in [0, 39, 41, 100, u64::MAX] {
            let expected = 40;
            let refused = Err(RingError::Place { place, expected });
            assert_eq!(ring.arrived(place, 40), refused);
        }
        for len in [0, 51, u64::MAX] {
            let refused = Err(RingError::Length { len, most: 50 });
            assert_eq!(ring.arrived(40, len), refused);
        }
        assert_eq!(ring.arrived(40, 50), Ok(()));
        assert_eq!(
            ring.arrived(0, 11),
            Ok(()),
            "the last ten bytes are too few"
        );
        let refused = Incoming::new(0).arrived(0, 1);
        assert_eq!(refused, Err(RingError::Length { len: 1, most: 0 }));
    }

    #[test]
    fn an_empty_ring_takes_the_longest_batch_wherever_its_head_is() {
        for first in 1..=50 {
            let mut ring = Outgoing::new(100);
            assert_eq!(ring.take(1, KV, first), Some(0));
            assert_eq!(ring.take(2, KV, 50), Some(first));
            ring.answered(2);
            assert!(ring.take(3, KV, 50).is_some(), "after {first}");
        }
    }

    #[test]
    fn later_components_of_a_room_wait_for_its_packed_batches() {
        let part = |room, component| Part { room, component };
        let mut ring = Outgoing::new(100);
        assert_eq!(ring.take(1, part(7, 1), 10), Some(0));
        assert!(ring.holds_before(part(7, 2)));
        assert!(!ring.holds_before(part(7, 1)) && !ring.holds_before(part(7, 0)));
        assert!(!ring.holds_before(part(8, 2)), "another room");
        ring.answered(1);
        assert!(!ring.holds_before(part(7, 2)));
    }

    fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
        a.start < b.end && b.start < a.end
    }

    proptest! {
        /// No batch is written over one that was not answered, the receiver expects each where it lies, and nothing is lost.
        #[test]
        fn both_ends_agree_and_nothing_is_written_over(
            capacity in 2..200_u64,
            turns in prop::collection::vec((1..110_u64, 0..4_u8), 1..200),
        ) {
            let (mut ours, mut theirs) = (Outgoing::new(capacity), Incoming::new(capacity));
            let mut live: Vec<(u64, Range<u64>)> = Vec::new();
            let (mut given, mut answered) = (0, 0);
            for (len, turn) in turns {
                if turn == 0 && answered < given {
                    answered += 1;
                    ours.answered(answered);
                    live.retain(|(batch, _)| *batch > answered);
                    continue;
                }
                let len = len.min(capacity / 2);
                let Some(at) = ours.take(given + 1, KV, len) else {
                    prop_assert!(!live.is_empty(), "an empty ring has place");
                    continue;
                };
                if turn == 1 {
                    // Its room ended: it is never written, and the next one takes its place.
                    ours.take_back();
                    continue;
                }
                given += 1;
                let range = at..at + len;
                prop_assert!(range.end <= capacity);
                prop_assert!(!live.iter().any(|(_, other)| overlap(other, &range)));
                prop_assert_eq!(theirs.arrived(at, len), Ok(()));
                live.push((given, range));
            }
            ours.answered(given);
            prop_assert_eq!(ours.used, 0);
        }
    }
}
