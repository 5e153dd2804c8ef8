//! Which work requests of a queue pair are outstanding, by our own count.
//!
//! The eRDMA provider neither notices an overfull send queue nor frees its space before a signalled completion is
//! polled, and drops the completions of a destroyed queue pair. So every batch of requests that ends in a signalled
//! one is entered here before it is posted; only its completion frees its space; and whatever is left when the queue
//! pair goes is failed from this table.
#![forbid(unsafe_code)]

/// Why a batch was not entered, or a completion not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SlotError {
    /// The send queue has no space for the batch now.
    #[error("the send queue has {free} of {asked} places free")]
    Full {
        /// Places free now.
        free: u32,
        /// Places asked for.
        asked: u32,
    },
    /// A batch of no requests, or of more than the whole send queue.
    #[error("a batch of {0} requests can never fit")]
    Size(u32),
    /// The completion names no batch: one that ended, or another queue pair's.
    #[error("no batch has the request id {0:#x}")]
    Unknown(u64),
    /// The completion of a later batch came first; the adapter lost one, and the queue pair with it.
    #[error("the batch {0:#x} completed before an earlier one")]
    OutOfOrder(u64),
}

struct Slot<T> {
    generation: u32,
    batch: Option<Batch<T>>,
}

struct Batch<T> {
    wrs: u32,
    payload: T,
}

/// The outstanding batches of one send queue, in order.
pub(crate) struct Slots<T> {
    slots: Box<[Slot<T>]>,
    /// Where the oldest batch lies.
    head: u32,
    /// How many batches are outstanding.
    live: u32,
    depth: u32,
    outstanding: u32,
}

impl<T> Slots<T> {
    /// A table for a send queue of `depth` requests, with room for `batches` at a time.
    ///
    /// `generation` is where the ids' counters start: give each queue pair another, so that late completions of one
    /// that is gone are known as such.
    pub(crate) fn new(depth: u32, batches: u32, generation: u32) -> Self {
        let slot = || Slot {
            generation,
            batch: None,
        };
        Self {
            slots: (0..batches.max(1)).map(|_| slot()).collect(),
            head: 0,
            live: 0,
            depth,
            outstanding: 0,
        }
    }

    /// Requests outstanding.
    pub(crate) fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// Batches outstanding.
    pub(crate) fn batches(&self) -> u32 {
        self.live
    }

    /// Requests that can be entered now, in one batch.
    pub(crate) fn free(&self) -> u32 {
        if self.live == self.capacity() {
            0
        } else {
            self.depth - self.outstanding
        }
    }

    fn capacity(&self) -> u32 {
        // Built from a u32.
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    fn at(&self, offset: u32) -> u32 {
        let sum = u64::from(self.head) + u64::from(offset);
        u32::try_from(sum % u64::from(self.capacity())).unwrap_or(0)
    }

    /// Enters a batch of `wrs` requests, the last of them signalled; the id that all of them are posted with.
    pub(crate) fn enter(&mut self, wrs: u32, payload: T) -> Result<u64, SlotError> {
        if wrs == 0 || wrs > self.depth {
            return Err(SlotError::Size(wrs));
        }
        let free = self.free();
        if wrs > free {
            return Err(SlotError::Full { free, asked: wrs });
        }
        let index = self.at(self.live);
        let slot = &mut self.slots[index as usize];
        debug_assert!(slot.batch.is_none(), "a place past the newest is empty");
        slot.batch = Some(Batch { wrs, payload });
        self.live += 1;
        self.outstanding += wrs;
        Ok(wr_id(slot.generation, index))
    }

    /// Takes the newest batch back, of which nothing was posted.
    pub(crate) fn withdraw(&mut self, id: u64) -> Result<T, SlotError> {
        let index = self.find(id)?;
        if index != self.at(self.live - 1) {
            return Err(SlotError::OutOfOrder(id));
        }
        self.live -= 1;
        self.take(index, id)
    }

    /// Accepts the completion of the oldest batch: its space is free again.
    pub(crate) fn complete(&mut self, id: u64) -> Result<T, SlotError> {
        let index = self.find(id)?;
        if index != self.head {
            return Err(SlotError::OutOfOrder(id));
        }
        let payload = self.take(index, id)?;
        self.head = self.at(1);
        self.live -= 1;
        Ok(payload)
    }

    /// The payload of an outstanding batch, to say what failed.
    pub(crate) fn payload(&self, id: u64) -> Option<&T> {
        let index = self.find(id).ok()?;
        let batch = self.slots[index as usize].batch.as_ref()?;
        Some(&batch.payload)
    }

    /// Fails everything, oldest first: the queue pair is gone.
    pub(crate) fn fail_all(&mut self, mut failed: impl FnMut(T)) {
        while self.live > 0 {
            let index = self.head;
            let id = wr_id(self.slots[index as usize].generation, index);
            self.head = self.at(1);
            self.live -= 1;
            if let Ok(payload) = self.take(index, id) {
                failed(payload);
            }
        }
        debug_assert_eq!(self.outstanding, 0, "every request was in a batch");
    }

    fn find(&self, id: u64) -> Result<u32, SlotError> {
        let (generation, index) = split(id);
        let found = self
            .slots
            .get(index as usize)
            .is_some_and(|slot| slot.generation == generation && slot.batch.is_some());
        if found {
            Ok(index)
        } else {
            Err(SlotError::Unknown(id))
        }
    }

    fn take(&mut self, index: u32, id: u64) -> Result<T, SlotError> {
        let slot = &mut self.slots[index as usize];
        let batch = slot.batch.take().ok_or(SlotError::Unknown(id))?;
        slot.generation = slot.generation.wrapping_add(1);
        self.outstanding -= batch.wrs;
        Ok(batch.payload)
    }
}

fn wr_id(generation: u32, index: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the two halves of the id are what is wanted"
)]
const fn split(id: u64) -> (u32, u32) {
    ((id >> 32) as u32, id as u32)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Enter(u32),
        Complete,
        CompleteNewest,
        Withdraw,
        Late(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0u32..12).prop_map(Step::Enter),
            4 => Just(Step::Complete),
            1 => Just(Step::CompleteNewest),
            1 => Just(Step::Withdraw),
            1 => any::<u64>().prop_map(Step::Late),
        ]
    }

    proptest! {
        // The oracle is a plain queue; the generations start near the wrap of their counter.
        #[test]
        fn agrees_with_a_plain_queue(
            depth in 1u32..40,
            batches in 1u32..8,
            back in 0u32..4,
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let mut slots = Slots::new(depth, batches, u32::MAX - back);
            let mut queue: VecDeque<(u64, u32, usize)> = VecDeque::new();
            let mut ended = Vec::new();
            for (payload, step) in steps.into_iter().enumerate() {
                let used: u32 = queue.iter().map(|entry| entry.1).sum();
                match step {
                    Step::Enter(wrs) => {
                        let fits = wrs > 0 && wrs <= depth - used
                            && queue.len() < batches as usize;
                        let result = slots.enter(wrs, payload);
                        prop_assert_eq!(result.is_ok(), fits, "{:?}", result);
                        if let Ok(id) = result {
                            prop_assert!(queue.iter().all(|entry| entry.0 != id));
                            prop_assert_eq!(slots.payload(id), Some(&payload));
                            queue.push_back((id, wrs, payload));
                        }
                    }
                    Step::Complete => if let Some((id, _, payload)) = queue.pop_front() {
                        prop_assert_eq!(slots.complete(id), Ok(payload));
                        prop_assert_eq!(slots.complete(id), Err(SlotError::Unknown(id)));
                        ended.push(id);
                    },
                    Step::CompleteNewest => if queue.len() > 1 {
                        let id = queue.back().expect("two").0;
                        prop_assert_eq!(slots.complete(id), Err(SlotError::OutOfOrder(id)));
                        let oldest = queue[0].0;
                        prop_assert_eq!(slots.withdraw(oldest), Err(SlotError::OutOfOrder(oldest)));
                    },
                    Step::Withdraw => if let Some((id, _, payload)) = queue.pop_back() {
                        prop_assert_eq!(slots.withdraw(id), Ok(payload));
                        ended.push(id);
                    },
                    Step::Late(id) => if queue.iter().all(|entry| entry.0 != id) {
                        prop_assert_eq!(slots.complete(id), Err(SlotError::Unknown(id)));
                    },
                }
                let used: u32 = queue.iter().map(|entry| entry.1).sum();
                prop_assert_eq!(slots.outstanding(), used);
                prop_assert!(used <= depth);
                prop_assert_eq!(slots.batches() as usize, queue.len());
                for &id in ended.iter().rev().take(batches as usize) {
                    prop_assert!(slots.payload(id).is_none(), "an ended id lives on");
                }
            }
            let mut failed = Vec::new();
            slots.fail_all(|payload| failed.push(payload));
            let expected: Vec<_> = queue.iter().map(|entry| entry.2).collect();
            prop_assert_eq!(failed, expected);
            prop_assert_eq!(slots.free(), depth);
        }
    }

    #[test]
    fn ids_survive_the_wrap_of_their_generation() {
        let mut slots = Slots::new(4, 1, u32::MAX);
        let first = slots.enter(4, 'a').expect("empty");
        assert_eq!(first, 0xffff_ffff_0000_0000);
        assert_eq!(
            slots.enter(1, 'b'),
            Err(SlotError::Full { free: 0, asked: 1 })
        );
        assert_eq!(slots.complete(first), Ok('a'));
        let second = slots.enter(1, 'b').expect("freed");
        assert_eq!(second, 0);
        assert_eq!(slots.complete(first), Err(SlotError::Unknown(first)));
        assert_eq!(slots.enter(5, 'c'), Err(SlotError::Size(5)));
    }
}
