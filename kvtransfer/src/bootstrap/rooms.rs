//! Which data-parallel rank of the prefill instance serves a room, for instances that do not follow `room % dp`.
//!
//! SGLang 0.5.23 keeps an entry for one to two sweeps (120 to 240 s); here it ends exactly one time to live after it was
//! written, and the table has a bound.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

/// The table of rooms.
#[derive(Debug)]
pub struct Rooms {
    ttl: Duration,
    rooms_max: usize,
    entries: HashMap<u64, (i64, Duration)>,
    // The same rooms in the order they end, so that a sweep touches only what it removes.
    by_age: BTreeSet<(Duration, u64)>,
}

/// The table holds as many rooms as it may; the caller should try again once some have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the room table is full: {rooms_max} rooms were registered within {ttl:?}")]
pub struct RoomsFull {
    /// The bound.
    pub rooms_max: usize,
    /// How long an entry is kept.
    pub ttl: Duration,
}

impl Rooms {
    /// An empty table of at most `rooms_max` rooms, each kept for `ttl`.
    #[must_use]
    pub fn new(rooms_max: usize, ttl: Duration) -> Self {
        Self {
            ttl,
            rooms_max,
            entries: HashMap::new(),
            by_age: BTreeSet::new(),
        }
    }

    /// Remembers the rank of a room, or renews it.
    ///
    /// # Errors
    /// [`RoomsFull`] when the room is new and the bound is reached.
    pub fn insert(&mut self, room: u64, dp_rank: i64, now: Duration) -> Result<(), RoomsFull> {
        self.sweep(now);
        if let Some(&(_, written)) = self.entries.get(&room) {
            self.by_age.remove(&(written, room));
        } else if self.entries.len() >= self.rooms_max {
            return Err(RoomsFull {
                rooms_max: self.rooms_max,
                ttl: self.ttl,
            });
        }
        self.entries.insert(room, (dp_rank, now));
        self.by_age.insert((now, room));
        Ok(())
    }

    /// The rank of a room, unless it was never registered or has ended.
    pub fn dp_rank(&mut self, room: u64, now: Duration) -> Option<i64> {
        self.sweep(now);
        self.entries.get(&room).map(|&(dp_rank, _)| dp_rank)
    }

    /// Rooms held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no room is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn sweep(&mut self, now: Duration) {
        while let Some(&(written, room)) = self.by_age.first() {
            if now.saturating_sub(written) < self.ttl {
                break;
            }
            self.by_age.pop_first();
            self.entries.remove(&room);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_end_one_ttl_after_the_last_write() {
        let at = Duration::from_secs;
        let mut rooms = Rooms::new(10, at(120));
        rooms.insert(5, 1, at(0)).unwrap();
        rooms.insert(6, 2, at(1)).unwrap();
        assert_eq!(rooms.dp_rank(5, at(119)), Some(1));
        rooms.insert(5, 3, at(119)).unwrap();
        assert_eq!(rooms.dp_rank(5, at(121)), Some(3));
        assert_eq!(rooms.dp_rank(6, at(121)), None);
        assert_eq!(rooms.dp_rank(5, at(239)), None);
        assert!(rooms.is_empty() && rooms.by_age.is_empty());
    }

    #[test]
    fn a_full_table_refuses_new_rooms_but_renews_old_ones() {
        let mut rooms = Rooms::new(3, Duration::from_secs(10));
        for room in 0..3 {
            rooms.insert(room, 0, Duration::ZERO).unwrap();
        }
        assert!(rooms.insert(3, 0, Duration::from_secs(1)).is_err());
        for second in 1..9 {
            rooms.insert(1, 7, Duration::from_secs(second)).unwrap();
        }
        assert_eq!((rooms.len(), rooms.by_age.len()), (3, 3));
        rooms.insert(3, 0, Duration::from_secs(10)).unwrap();
        assert_eq!(rooms.dp_rank(1, Duration::from_secs(10)), Some(7));
    }
}
