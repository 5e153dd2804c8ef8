//! Room numbers: the rendezvous ids of SGLang's prefill/decode pairs.
//!
//! Two live requests with one room corrupt or crash schedulers, so the router remembers which rooms are live and
//! draws again on a collision.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use rand::RngExt;

use super::map::Set;

/// Rooms are below 2^63: SGLang stores them in a signed 64-bit integer.
pub const ROOM_MAX: u64 = (1 << 63) - 1;

/// The rooms that are live on this router.
#[derive(Debug, Default)]
pub struct Rooms {
    live: Mutex<Set<u64>>,
}

impl Rooms {
    /// Reserves `count` distinct rooms with `room % dp_size == dp_rank`: SGLang's prefill side routes a request to that
    /// data-parallel rank by default (`follow_bootstrap_room`), so no further field is needed. They are free again
    /// when the lease is dropped.
    pub fn reserve(self: &Arc<Self>, count: usize, dp_rank: u64, dp_size: u64) -> RoomLease {
        assert!(dp_rank < dp_size, "invariant: a rank lies within its group");
        let mut rng = rand::rng();
        let mut rooms = Vec::with_capacity(count);
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        while rooms.len() < count {
            let room = dp_rank + dp_size * rng.random_range(0..=(ROOM_MAX - dp_rank) / dp_size);
            // Zero is the room of SGLang's own health probes.
            if room != 0 && live.insert(room) {
                rooms.push(room);
            }
        }
        drop(live);
        RoomLease {
            rooms,
            owner: Arc::clone(self),
        }
    }

    /// How many rooms are live now.
    pub fn live(&self) -> usize {
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}

/// Rooms that belong to one request until it ends.
#[derive(Debug)]
pub struct RoomLease {
    rooms: Vec<u64>,
    owner: Arc<Rooms>,
}

impl RoomLease {
    /// The room numbers, one per prompt.
    pub fn rooms(&self) -> &[u64] {
        &self.rooms
    }
}

impl Drop for RoomLease {
    fn drop(&mut self) {
        let mut live = self
            .owner
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for room in &self.rooms {
            live.remove(room);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn live_rooms_are_distinct_and_freed() {
        let rooms = Arc::new(Rooms::default());
        let leases: Vec<_> = (0..1000).map(|_| rooms.reserve(50, 0, 1)).collect();
        let all: HashSet<_> = leases
            .iter()
            .flat_map(|lease| lease.rooms().iter().copied())
            .collect();
        assert_eq!(all.len(), 50_000);
        assert!(all.iter().all(|room| (1..=ROOM_MAX).contains(room)));
        assert_eq!(rooms.live(), 50_000);
        drop(leases);
        assert_eq!(rooms.live(), 0);
    }

    #[test]
    fn rooms_follow_the_rank() {
        let rooms = Arc::new(Rooms::default());
        for (rank, size) in [(0, 2), (1, 2), (7, 8), (2, 3)] {
            let lease = rooms.reserve(200, rank, size);
            assert!(
                lease
                    .rooms()
                    .iter()
                    .all(|room| room % size == rank && *room <= ROOM_MAX)
            );
        }
    }

    #[test]
    fn a_collision_is_drawn_again() {
        // A group so large that only a handful of rooms exist per rank.
        let rooms = Arc::new(Rooms::default());
        let size = ROOM_MAX / 4;
        let lease = rooms.reserve(4, 3, size);
        let distinct: HashSet<_> = lease.rooms().iter().collect();
        assert_eq!(distinct.len(), 4);
    }
}
