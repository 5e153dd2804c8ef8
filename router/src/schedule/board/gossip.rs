//! Bookings of sibling replicas: what they tell, and how long it is believed.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::super::facts::Role;
use super::Board;
use super::ledger::{BOOKINGS_MAX, BookError, Booking, Key};

/// A prediction of more than this is not believed from a sibling.
const READY_IN_MAX_S: f64 = 3600.0;

/// A booking as replicas tell it to each other. Times are relative, because their clocks have nothing in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its name.
    pub key: Key,
    /// The prefill's name.
    pub prefill: String,
    /// The decode's name.
    pub decode: String,
    /// The prefill's data-parallel rank.
    pub dp_rank: u32,
    /// Tokens to compute.
    pub compute_tokens: u64,
    /// Bytes to move.
    pub kv_bytes: u64,
    /// KV tokens at the decode.
    pub kv_tokens: u64,
    /// How long ago it was dispatched.
    pub age: Duration,
    /// When its KV cache is expected to be computed, in seconds from now; negative: it was so long ago.
    pub ready_in_s: f64,
    /// Whether that was measured.
    pub ready_known: bool,
    /// Whether its bytes have arrived.
    pub transferred: bool,
}

impl Board {
    /// Ends all bookings of a sibling that is gone.
    pub fn drop_replica(&mut self, replica: u64) {
        if replica != self.ledger.replica {
            self.release_where(|key, _| key.replica == replica);
        }
    }

    /// A sibling lives: its bookings are believed for another while.
    pub fn keep_replica(&mut self, now: Duration, replica: u64) {
        let expires_at = now.as_secs_f64() + self.settings.sibling_ttl.as_secs_f64();
        if replica == self.ledger.replica || self.ledger.siblings == 0 {
            return;
        }
        for (key, booking) in &mut self.ledger.bookings {
            if key.replica == replica {
                booking.expires_at = expires_at;
            }
        }
    }

    /// The numbers of this router's own bookings.
    pub fn own_bookings(&self) -> impl Iterator<Item = u64> {
        let own = self.ledger.replica;
        let keys = self.ledger.bookings.keys();
        keys.filter(move |key| key.replica == own)
            .map(|key| key.number)
    }

    /// Ends siblings' bookings of which nothing was heard for [`sibling_ttl`](super::Settings::sibling_ttl).
    pub fn expire(&mut self, now: Duration) {
        let now = now.as_secs_f64();
        self.release_where(|_, booking| booking.expires_at <= now);
    }

    /// A booking as siblings should hear of it.
    pub fn record(&self, now: Duration, key: Key) -> Option<Record> {
        let now_s = now.as_secs_f64();
        let booking = self.ledger.bookings.get(&key)?;
        let age = (now_s - booking.booked_at).max(0.0);
        Some(Record {
            key,
            prefill: self.prefills[booking.prefill].facts.name.clone(),
            decode: self.decodes[booking.decode].facts.name.clone(),
            dp_rank: u32::try_from(booking.rank).unwrap_or(0),
            compute_tokens: booking.compute_tokens,
            kv_bytes: booking.kv_bytes,
            kv_tokens: booking.kv_tokens,
            age: Duration::try_from_secs_f64(age).unwrap_or_default(),
            ready_in_s: booking.ready - now_s,
            ready_known: booking.known,
            transferred: booking.transferred_at.is_some(),
        })
    }

    /// Takes in a sibling's booking. One that is known already is refreshed and, if the record says more, advanced.
    ///
    /// # Errors
    /// [`BookError`]; nothing is booked. A record of this router's own is refused as unknown.
    pub fn adopt(&mut self, now: Duration, record: &Record) -> Result<(), BookError> {
        let now_s = now.as_secs_f64();
        let key = record.key;
        if self.ledger.ended.peek(&key).is_some() {
            return Err(BookError::Ended);
        }
        let expires_at = now_s + self.settings.sibling_ttl.as_secs_f64();
        let ready_in_s = if record.ready_in_s.is_finite() {
            record.ready_in_s.clamp(-READY_IN_MAX_S, READY_IN_MAX_S)
        } else {
            0.0
        };
        if key.replica == self.ledger.replica {
            return Err(BookError::UnknownWorker);
        }
        if let Some(booking) = self.ledger.bookings.get_mut(&key) {
            booking.expires_at = expires_at;
            if record.transferred {
                self.transfer_done(key, None, now_s);
            } else if record.ready_known {
                self.prefill_done(key, now_s + ready_in_s.min(0.0));
            }
            return Ok(());
        }
        let place = |name: &str| self.names.get(name).and_then(|id| self.ids.get(id));
        let (Some(&(Role::Prefill, prefill)), Some(&(Role::Decode, decode))) =
            (place(&record.prefill), place(&record.decode))
        else {
            return Err(BookError::UnknownWorker);
        };
        if self.ledger.siblings >= BOOKINGS_MAX {
            return Err(BookError::Full);
        }
        let ranks = self.prefills[prefill].facts.dp_size;
        let compute_s = self.compute_s(prefill, record.compute_tokens).0;
        let booking = Booking {
            prefill,
            decode,
            rank: record.dp_rank.min(ranks - 1) as usize,
            compute_tokens: record.compute_tokens,
            kv_bytes: record.kv_bytes,
            kv_tokens: record.kv_tokens,
            booked_at: now_s - record.age.as_secs_f64(),
            ready: now_s + ready_in_s,
            known: record.ready_known,
            transferred_at: record.transferred.then_some(now_s),
            first_token: false,
            // Its dispatcher learns from it; hearing the same measurement from every sibling would count it twice.
            predicted_s: f64::INFINITY,
            compute_s,
            factor: 1.0,
            expires_at,
        };
        self.insert(key, booking);
        Ok(())
    }
}
