//! A bound on memory that many queue pairs take parts of.
#![forbid(unsafe_code)]

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Bytes that may still be taken.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<AtomicU64>);

/// A part of a budget; it goes back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Budget,
    bytes: u64,
}

impl Budget {
    /// So many bytes in all.
    pub(crate) fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// Takes a part, if there is so much.
    pub(crate) fn take(&self, bytes: u64) -> Option<Share> {
        let (taken, seen) = (Ordering::AcqRel, Ordering::Acquire);
        let left = self
            .0
            .fetch_update(taken, seen, |left| left.checked_sub(bytes));
        left.ok().map(|_| Share {
            budget: self.clone(),
            bytes,
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

/// Registered memory for packed batches, of all queue pairs of an engine.
#[derive(Debug)]
pub(crate) struct PackingBudgets {
    /// Where peers write.
    pub(crate) landing: Budget,
    /// Where ours are gathered.
    pub(crate) packing: Budget,
}

impl PackingBudgets {
    /// Half of so many bytes for each direction: two engines that are full of each other's batches still take answers.
    pub(crate) fn new(bytes: u64) -> Self {
        Self {
            landing: Budget::new(bytes / 2),
            packing: Budget::new(bytes / 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Budget;

    #[test]
    fn what_is_taken_is_missing_until_it_goes_back() {
        let budget = Budget::new(100);
        let first = budget.take(60).expect("there is more");
        assert!(budget.take(41).is_none());
        let second = budget.take(40).expect("exactly so much is left");
        assert!(budget.take(1).is_none());
        drop(first);
        assert!(budget.take(60).is_some());
        drop(second);
        assert!(budget.take(100).is_some(), "all of it is back");
    }
}
