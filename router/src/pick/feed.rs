//! What followers have not been told yet of this router's bookings: numbers only, so that a slow follower costs little and
//! always gets the latest state.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::Notify;

use super::Picker;
use crate::schedule::board::{BOOKINGS_MAX, Event, Key, Record};

/// Numbers that may be untold; with more the follower is told everything anew.
const UNTOLD_MAX: usize = 2 * BOOKINGS_MAX;

/// Bookings and ends in one piece of news.
pub const NEWS_MAX: usize = 512;

/// One piece of news.
#[derive(Debug, PartialEq)]
pub struct News {
    /// What was told before is void.
    pub begins: bool,
    /// New and changed bookings.
    pub bookings: Vec<Record>,
    /// Numbers of those that are over.
    pub ended: Vec<u64>,
}

#[derive(Debug)]
struct Follower {
    id: u64,
    untold: BTreeSet<u64>,
    begins: bool,
    bell: Arc<Notify>,
}

/// All followers.
#[derive(Debug, Default)]
pub(super) struct Feed {
    followers: Vec<Follower>,
    next: u64,
}

impl Feed {
    /// Something happened to this booking.
    pub(super) fn touch(&mut self, number: u64) {
        for follower in &mut self.followers {
            if follower.untold.len() >= UNTOLD_MAX {
                follower.untold.clear();
                follower.begins = true;
            }
            if !follower.begins {
                follower.untold.insert(number);
            }
            follower.bell.notify_one();
        }
    }
}

/// Somebody who is told of all bookings, until this is dropped.
#[derive(Debug)]
pub struct Following {
    picker: Arc<Picker>,
    id: u64,
    /// Rings when there is news.
    pub bell: Arc<Notify>,
}

impl Picker {
    /// Begins to tell somebody of all bookings of this router.
    pub fn follow(self: &Arc<Self>) -> Following {
        let bell = Arc::new(Notify::new());
        let mut inner = self.lock();
        let id = inner.feed.next;
        inner.feed.next += 1;
        inner.feed.followers.push(Follower {
            id,
            untold: BTreeSet::new(),
            begins: true,
            bell: Arc::clone(&bell),
        });
        drop(inner);
        Following {
            picker: Arc::clone(self),
            id,
            bell,
        }
    }

    /// This router's number among the replicas.
    pub fn replica(&self) -> u64 {
        self.lock().board.settings().replica
    }

    /// Takes in what another replica tells of its bookings. With `begins`, what it told before is void.
    pub fn hear(&self, replica: u64, begins: bool, records: &[Record], ended: &[u64]) {
        let now = self.now();
        let mut inner = self.lock();
        let board = &mut inner.board;
        if begins {
            board.drop_replica(replica);
        }
        for record in records {
            if let Err(error) = board.adopt(now, record) {
                tracing::trace!(%error, "a sibling's booking is of no use");
            }
        }
        for number in ended {
            let number = *number;
            board.advance(Key { replica, number }, Event::Finished, now);
        }
        // It lives, and so do those of which it told nothing.
        board.keep_replica(now, replica);
        board.expire(now);
    }

    /// Forgets the bookings of a replica that is lost.
    pub fn drop_replica(&self, replica: u64) {
        self.lock().board.drop_replica(replica);
    }

    /// How many are told.
    pub fn followers(&self) -> usize {
        self.lock().feed.followers.len()
    }
}

impl Following {
    /// The next piece of news; none: nothing is new.
    pub fn news(&self) -> Option<News> {
        let now = self.picker.now();
        let mut inner = self.picker.lock();
        let inner = &mut *inner;
        let mut followers = inner.feed.followers.iter_mut();
        let follower = followers.find(|follower| follower.id == self.id)?;
        let begins = std::mem::take(&mut follower.begins);
        if begins {
            follower.untold = inner.board.own_bookings().collect();
        }
        let mut news = News {
            begins,
            bookings: Vec::new(),
            ended: Vec::new(),
        };
        for _ in 0..NEWS_MAX {
            let Some(number) = follower.untold.pop_first() else {
                break;
            };
            let key = Key {
                replica: inner.board.settings().replica,
                number,
            };
            match inner.board.record(now, key) {
                Some(record) => news.bookings.push(record),
                None => news.ended.push(number),
            }
        }
        let is_empty = news.bookings.is_empty() && news.ended.is_empty();
        (begins || !is_empty).then_some(news)
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let mut inner = self.picker.lock();
        inner.feed.followers.retain(|one| one.id != self.id);
    }
}
