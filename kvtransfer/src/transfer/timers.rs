//! Deadlines in order of time. Every timer can be taken back, so the set is bounded by what is live.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    ids::{PeerId, TransferId},
    time::Time,
};

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// A transfer's deadline.
    Transfer(TransferId),
    /// A grant or cancellation kept for a room whose sender is not open.
    Orphan(u64),
    /// A failed transfer's pages must not be in use any longer.
    Ebb(TransferId),
    /// A peer's heartbeat.
    Heartbeat(PeerId),
}

/// Names a timer for taking it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TimerKey(Time, u64);

impl TimerKey {
    /// When it is due.
    pub(super) fn due(self) -> Time {
        self.0
    }
}

#[derive(Debug, Default)]
pub(super) struct Timers {
    due: BTreeMap<TimerKey, Due>,
    next: u64,
}

impl Timers {
    pub(super) fn set(&mut self, now: Time, delay: Duration, due: Due) -> TimerKey {
        let key = TimerKey(now + delay, self.next);
        self.next = self.next.wrapping_add(1);
        self.due.insert(key, due);
        key
    }

    pub(super) fn clear(&mut self, key: TimerKey) {
        self.due.remove(&key);
    }

    /// When the next timer is due.
    pub(super) fn next(&self) -> Time {
        self.due
            .first_key_value()
            .map_or(Time::NEVER, |(key, _)| key.0)
    }

    pub(super) fn pop(&mut self, now: Time) -> Option<Due> {
        let first = self.due.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    #[cfg(feature = "testing")]
    pub(super) fn len(&self) -> usize {
        self.due.len()
    }
}
