//! Which booking a room belongs to: telemetry speaks of rooms.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::notes::Note;
use crate::schedule::board::Key;
use crate::schedule::map::Map;

/// How far a booking's rooms have come. A batch has one per prompt; it has come as far as the last of them.
#[derive(Debug)]
struct Joined {
    rooms: Vec<u64>,
    to_be_ready: usize,
    to_be_sent: usize,
    note: Arc<Note>,
}

#[derive(Clone, Copy, Debug)]
struct Room {
    key: Key,
    ready: bool,
    sent: bool,
}

/// The rooms of all live bookings. It is as large as those are many.
#[derive(Debug, Default)]
pub(super) struct RoomJoin {
    rooms: Map<u64, Room>,
    bookings: Map<Key, Joined>,
}

impl RoomJoin {
    pub(super) fn enter(&mut self, key: Key, rooms: &[u64], note: &Arc<Note>) {
        for room in rooms {
            let state = Room {
                key,
                ready: false,
                sent: false,
            };
            self.rooms.insert(*room, state);
        }
        let joined = Joined {
            rooms: rooms.to_vec(),
            to_be_ready: rooms.len(),
            to_be_sent: rooms.len(),
            note: Arc::clone(note),
        };
        self.bookings.insert(key, joined);
    }

    pub(super) fn leave(&mut self, key: Key) {
        let rooms = self.bookings.remove(&key).map(|joined| joined.rooms);
        for room in rooms.unwrap_or_default() {
            self.rooms.remove(&room);
        }
    }

    /// A room's KV cache is computed; the booking that is complete with it.
    pub(super) fn ready(&mut self, room: u64) -> Option<(Key, &Note)> {
        let room = self.rooms.get_mut(&room).filter(|room| !room.ready)?;
        room.ready = true;
        let joined = self.bookings.get_mut(&room.key)?;
        joined.to_be_ready -= 1;
        (joined.to_be_ready == 0).then_some((room.key, &*joined.note))
    }

    /// A room's bytes have arrived; the booking that is complete with it.
    pub(super) fn sent(&mut self, room: u64) -> Option<(Key, &Note)> {
        let room = self.rooms.get_mut(&room).filter(|room| !room.sent)?;
        room.sent = true;
        let joined = self.bookings.get_mut(&room.key)?;
        joined.to_be_sent -= 1;
        (joined.to_be_sent == 0).then_some((room.key, &*joined.note))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::scheduling::Scheduling;
    use crate::discover::{Fleet, Member};
    use crate::pick::{Picker, Wish};
    use crate::pool::worker::WorkerSettings;
    use crate::pool::{Pool, Role};

    fn note() -> Arc<Note> {
        let member = |name: &str, role| Member {
            name: name.to_owned(),
            role,
            url: format!("http://{name}:1").parse().unwrap(),
            bootstrap_port: None,
            bootstrap_port_assumed: None,
            probes_bootstrap: false,
            telemetry_port: None,
            zone: None,
            draining: false,
        };
        let pool = Pool::new(WorkerSettings::default());
        pool.sync(&Fleet {
            members: vec![member("p", Role::Prefill), member("d", Role::Decode)],
            ..Fleet::default()
        });
        let picker = Picker::new(&Scheduling::default());
        picker.sync(&pool.now());
        for worker in pool.now().workers() {
            worker.mark_ready(true);
        }
        picker.pick(&Wish::default()).unwrap().note
    }

    #[tokio::test]
    async fn a_batch_is_as_far_as_its_last_room() {
        let key = Key {
            replica: 1,
            number: 2,
        };
        let mut join = RoomJoin::default();
        let note = note();
        join.enter(key, &[10, 11], &note);
        assert!(join.ready(10).is_none());
        assert!(join.ready(10).is_none(), "told again");
        let (found, told) = join.ready(11).unwrap();
        assert_eq!(found, key);
        told.write(note.at + Duration::from_secs(3), |actual| &mut actual.ready);
        assert_eq!(note.actual().ready, Some(Duration::from_secs(3)));
        assert!(join.sent(11).is_none() && join.sent(99).is_none());
        assert_eq!(join.sent(10).unwrap().0, key);
        join.leave(key);
        assert!(join.rooms.is_empty() && join.bookings.is_empty());
    }
}
