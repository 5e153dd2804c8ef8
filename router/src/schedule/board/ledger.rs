//! Bookings: what was dispatched and has not ended, by this router and by its siblings.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::super::decision::Decision;
use super::super::facts::Role;
use super::super::map::Map;
use super::super::model::SMALL_BYTES;
use super::super::recent::Recent;
use super::super::request::Request;
use super::{Board, Inbound, Job, StickyPair};

/// Most bookings of this router and, counted apart, of all siblings.
pub const BOOKINGS_MAX: usize = 1 << 16;

/// Ended bookings that are remembered, so that news of their beginning which arrives late does not revive them.
const ENDED_MAX: usize = 1 << 14;

/// A measured time to ready teaches the prefill model only if at least this share of it should have been computing.
const COMPUTE_SHARE_MIN: f64 = 0.4;

/// Names a booking on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The replica that dispatched it.
    pub replica: u64,
    /// Its number there.
    pub number: u64,
}

/// Which half of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// The prefill failed.
    Prefill,
    /// The transfer failed: the pair is to blame.
    Transfer,
    /// The decode failed.
    Decode,
}

/// What happened to a booking. Events may come late, twice or in any order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// Its KV cache is computed and waits for the wire.
    PrefillDone,
    /// Its last byte arrived. `seconds`: how long the bytes moved, if that was measured.
    TransferDone {
        /// From the first byte to the last.
        seconds: Option<f64>,
    },
    /// Decode gave its first token.
    FirstToken,
    /// The answer is complete.
    Finished,
    /// It was given up.
    Cancelled,
    /// It failed, and who is to blame.
    Failed(Leg),
}

/// Why a booking was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BookError {
    /// There are [`BOOKINGS_MAX`].
    #[error("there are {BOOKINGS_MAX} bookings already")]
    Full,
    /// A worker is not on this board (any more).
    #[error("a worker of this booking is not on the board")]
    UnknownWorker,
    /// It has ended already.
    #[error("this booking has ended already")]
    Ended,
}

#[derive(Clone, Debug)]
pub(super) struct Booking {
    pub(super) prefill: usize,
    pub(super) decode: usize,
    pub(super) rank: usize,
    pub(super) compute_tokens: u64,
    pub(super) kv_bytes: u64,
    pub(super) kv_tokens: u64,
    pub(super) booked_at: f64,
    pub(super) ready: f64,
    pub(super) known: bool,
    pub(super) transferred_at: Option<f64>,
    pub(super) first_token: bool,
    /// What was predicted from the dispatch to ready: waiting and computing.
    pub(super) predicted_s: f64,
    pub(super) compute_s: f64,
    pub(super) factor: f64,
    pub(super) expires_at: f64,
}

#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) replica: u64,
    pub(super) next: u64,
    pub(super) bookings: Map<Key, Booking>,
    pub(super) siblings: usize,
    pub(super) ended: Recent<Key, ()>,
}

impl Ledger {
    pub(super) fn new(replica: u64) -> Self {
        Self {
            replica,
            next: 0,
            bookings: Map::default(),
            siblings: 0,
            ended: Recent::new(ENDED_MAX),
        }
    }
}

impl Board {
    /// Books a decision at its dispatch (rule 1). The booking lasts until an event ends it.
    ///
    /// # Errors
    /// [`BookError`]; nothing is booked.
    pub fn book(
        &mut self,
        now: Duration,
        decision: &Decision,
        request: &Request<'_>,
    ) -> Result<Key, BookError> {
        let now = now.as_secs_f64();
        let (Some(&(Role::Prefill, prefill)), Some(&(Role::Decode, decode))) = (
            self.ids.get(&decision.prefill),
            self.ids.get(&decision.decode),
        ) else {
            return Err(BookError::UnknownWorker);
        };
        if self.ledger.bookings.len() - self.ledger.siblings >= BOOKINGS_MAX {
            return Err(BookError::Full);
        }
        let key = Key {
            replica: self.ledger.replica,
            number: self.ledger.next,
        };
        self.ledger.next += 1;
        let prediction = &decision.prediction;
        let predicted_s = prediction.wait_s + prediction.compute_s;
        let nominal = self.nominal_compute_s(prefill, decision.compute_tokens);
        self.insert(
            key,
            Booking {
                prefill,
                decode,
                rank: decision.dp_rank as usize,
                compute_tokens: decision.compute_tokens,
                kv_bytes: decision.kv_bytes,
                kv_tokens: decision.kv_tokens,
                booked_at: now,
                ready: now + predicted_s,
                known: false,
                transferred_at: None,
                first_token: false,
                predicted_s,
                compute_s: prediction.compute_s,
                factor: prediction.compute_s / nominal,
                expires_at: f64::INFINITY,
            },
        );
        self.trie.learn(prefill, request.chunks);
        if let Some(sticky) = request.sticky {
            let pair = StickyPair {
                prefill: decision.prefill,
                decode: decision.decode,
                used_at: now,
            };
            self.sticky.insert(sticky, pair);
        }
        Ok(key)
    }

    pub(super) fn insert(&mut self, key: Key, booking: Booking) {
        if booking.transferred_at.is_none() {
            self.prefills[booking.prefill].jobs.push(Job {
                key,
                rank: booking.rank,
                tokens: booking.compute_tokens,
                compute_s: booking.compute_s,
                bytes: booking.kv_bytes,
                decode: booking.decode,
                booked_at: booking.booked_at,
                ready: booking.ready,
                known: booking.known,
            });
            let inbound = &mut self.decodes[booking.decode].inbound;
            let place = inbound.partition_point(|other| other.ready <= booking.ready);
            inbound.insert(
                place,
                Inbound {
                    key,
                    prefill: booking.prefill,
                    bytes: booking.kv_bytes,
                    ready: booking.ready,
                    known: booking.known,
                },
            );
        }
        let takes_pages_at = if self.settings.decode_allocates_early {
            booking.booked_at
        } else {
            booking.ready
        };
        let decode = &mut self.decodes[booking.decode];
        decode.booked_tokens = decode.booked_tokens.saturating_add(booking.kv_tokens);
        decode.booked_requests += 1;
        if decode.pool.is_none_or(|pool| takes_pages_at > pool.at) {
            decode
                .unpictured
                .push((key, takes_pages_at, booking.kv_tokens));
        }
        self.ledger.siblings += usize::from(key.replica != self.ledger.replica);
        self.ledger.bookings.insert(key, booking);
    }

    /// Tells what happened to a booking, of this router or a sibling. Returns whether it was known.
    pub fn advance(&mut self, key: Key, event: Event, at: Duration) -> bool {
        let at = at.as_secs_f64();
        if !self.ledger.bookings.contains_key(&key) {
            if matches!(event, Event::Finished | Event::Cancelled | Event::Failed(_)) {
                self.ledger.ended.insert(key, ());
            }
            return false;
        }
        match event {
            Event::PrefillDone => self.prefill_done(key, at),
            Event::TransferDone { seconds } => self.transfer_done(key, seconds, at),
            Event::FirstToken => self.first_token(key, at),
            Event::Finished | Event::Cancelled => self.release(key),
            Event::Failed(leg) => {
                self.blame(key, leg, at);
                self.release(key);
            }
        }
        true
    }

    pub(super) fn prefill_done(&mut self, key: Key, at: f64) {
        let Some(booking) = self.ledger.bookings.get_mut(&key) else {
            return;
        };
        if booking.known || booking.transferred_at.is_some() {
            return;
        }
        booking.known = true;
        booking.ready = at;
        let (prefill, decode) = (booking.prefill, booking.decode);
        let share = booking.compute_s / booking.predicted_s;
        let taken_s = at - booking.booked_at;
        if share >= COMPUTE_SHARE_MIN && taken_s > 0.0 {
            let factor = booking.factor * taken_s / booking.predicted_s;
            let tokens = booking.compute_tokens;
            let own = &mut self.prefills[prefill].model;
            own.observe(tokens, factor, share, at);
            self.fleet.prefill.observe(tokens, factor, share, at);
        }
        for job in &mut self.prefills[prefill].jobs {
            if job.key == key {
                job.ready = at;
                job.known = true;
            }
        }
        let inbound = &mut self.decodes[decode].inbound;
        if let Some(index) = inbound.iter().position(|entry| entry.key == key) {
            let mut entry = inbound.remove(index);
            entry.ready = at;
            entry.known = true;
            let place = inbound.partition_point(|other| other.ready <= at);
            inbound.insert(place, entry);
        }
    }

    pub(super) fn transfer_done(&mut self, key: Key, seconds: Option<f64>, at: f64) {
        let Some(booking) = self.ledger.bookings.get_mut(&key) else {
            return;
        };
        if booking.transferred_at.is_some() {
            return;
        }
        booking.transferred_at = Some(at);
        let (prefill, decode, bytes) = (booking.prefill, booking.decode, booking.kv_bytes);
        self.clear_wire(key, prefill, decode);
        match seconds {
            Some(seconds) if seconds > 0.0 && bytes > 0 => {
                if bytes < SMALL_BYTES {
                    self.fleet.latency.observe(seconds, at);
                } else {
                    self.learn_rate(prefill, decode, bytes as f64 / seconds, at);
                }
            }
            _ => {}
        }
    }

    fn clear_wire(&mut self, key: Key, prefill: usize, decode: usize) {
        self.prefills[prefill].jobs.retain(|job| job.key != key);
        self.decodes[decode]
            .inbound
            .retain(|entry| entry.key != key);
    }

    fn first_token(&mut self, key: Key, at: f64) {
        self.transfer_done(key, None, at);
        let Some(booking) = self.ledger.bookings.get_mut(&key) else {
            return;
        };
        if std::mem::replace(&mut booking.first_token, true) {
            return;
        }
        let since = booking.transferred_at.map_or(0.0, |then| at - then);
        // Without news of the transfer's end both fall together, which says nothing.
        if since > 0.0 {
            self.decodes[booking.decode].admission.observe(since, at);
        }
    }

    fn blame(&mut self, key: Key, leg: Leg, at: f64) {
        let Some(booking) = self.ledger.bookings.get(&key) else {
            return;
        };
        let (prefill, decode) = (booking.prefill, booking.decode);
        match leg {
            Leg::Transfer => self.prefills[prefill].links[decode].failures.record(at),
            Leg::Prefill => {
                let links = &mut self.prefills[prefill].links;
                links.iter_mut().for_each(|link| link.failures.record(at));
            }
            Leg::Decode => {
                for prefill in &mut self.prefills {
                    prefill.links[decode].failures.record(at);
                }
            }
        }
    }

    fn release(&mut self, key: Key) {
        let Some(booking) = self.ledger.bookings.remove(&key) else {
            return;
        };
        self.ledger.ended.insert(key, ());
        self.ledger.siblings -= usize::from(key.replica != self.ledger.replica);
        self.clear_wire(key, booking.prefill, booking.decode);
        let decode = &mut self.decodes[booking.decode];
        decode.booked_tokens = decode.booked_tokens.saturating_sub(booking.kv_tokens);
        decode.booked_requests -= 1;
        decode.unpictured.retain(|(other, _, _)| *other != key);
    }

    /// Ends every booking of a worker that leaves.
    pub(super) fn release_worker(&mut self, role: Role, slot: usize) {
        self.release_where(|_, booking| match role {
            Role::Prefill => booking.prefill == slot,
            Role::Decode => booking.decode == slot,
        });
    }

    pub(super) fn release_where(&mut self, ends: impl Fn(&Key, &Booking) -> bool) {
        let mut keys: Vec<Key> = self
            .ledger
            .bookings
            .iter()
            .filter(|(key, booking)| ends(key, booking))
            .map(|(key, _)| *key)
            .collect();
        // The map's order is chance, and what is remembered as ended depends on the order.
        keys.sort_unstable();
        for key in keys {
            self.release(key);
        }
    }

    /// How many bookings there are: of this router, of its siblings.
    pub fn bookings(&self) -> (usize, usize) {
        let siblings = self.ledger.siblings;
        (self.ledger.bookings.len() - siblings, siblings)
    }

    /// Which pair a booking has.
    pub fn pair_of(&self, key: Key) -> Option<(super::WorkerId, super::WorkerId)> {
        let booking = self.ledger.bookings.get(&key)?;
        let prefill = self.prefills[booking.prefill].id?;
        Some((prefill, self.decodes[booking.decode].id?))
    }
}
