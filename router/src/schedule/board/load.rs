//! What workers and pairs have to do, for metrics and pages.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::Board;
use crate::schedule::facts::{Role, WorkerId};

/// What a worker has to do, for metrics and pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Bookings: of a prefill until the transfer's end, of a decode until the request's end.
    pub bookings: u64,
    /// Prompt tokens that wait or are computed at a prefill.
    pub queued_tokens: u64,
    /// Bytes dispatched to a prefill that did not yet reach their decode.
    pub egress_bytes: u64,
    /// KV tokens taken at a decode.
    pub kv_tokens: u64,
    /// KV tokens that a decode's pool holds, if that is known.
    pub kv_tokens_max: Option<u64>,
    /// Blocks of a prefill's prefix cache that it told of, if it tells.
    pub cached_blocks: Option<u64>,
    /// Since the worker was last pictured: a prefill's links, a decode's pool. None: never.
    pub sample_age: Option<Duration>,
}

/// What is known of a pair, for metrics and pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairState {
    /// Bytes that wait, by the last sample.
    pub bytes_queued: u64,
    /// Bytes on the wire, by the last sample.
    pub bytes_in_flight: u64,
    /// Bandwidth that the next decision counts with, in bytes per second.
    pub bytes_per_s: f64,
    /// Whether this pair itself was measured.
    pub measured: bool,
    /// What recent failures cost, in failures.
    pub failures: f64,
}

impl Board {
    /// What a worker has to do, as the next decision would see it.
    pub fn load(&self, now: Duration, id: WorkerId) -> Option<Load> {
        let now = now.as_secs_f64();
        let (role, slot) = self.ids.get(&id)?;
        let age = |at: f64| Duration::try_from_secs_f64(now - at).unwrap_or_default();
        Some(match role {
            Role::Prefill => {
                let prefill = &self.prefills[*slot];
                Load {
                    bookings: prefill.jobs.len() as u64,
                    queued_tokens: self.queued(prefill, now).0,
                    egress_bytes: self
                        .egress(prefill, self.links_pictured(prefill, now), now)
                        .0,
                    kv_tokens: 0,
                    kv_tokens_max: None,
                    cached_blocks: self.trie.reported(*slot).map(|count| count as u64),
                    sample_age: prefill.pictured.map(|(at, _)| age(at)),
                }
            }
            Role::Decode => {
                let decode = &self.decodes[*slot];
                Load {
                    bookings: decode.booked_requests,
                    kv_tokens: self.kv_tokens(decode, now).0,
                    kv_tokens_max: decode
                        .pool
                        .map(|pool| pool.tokens)
                        .or(decode.facts.kv_tokens_max),
                    sample_age: decode.pool.map(|pool| age(pool.at)),
                    ..Load::default()
                }
            }
        })
    }

    /// What is known of a pair.
    pub fn pair(
        &mut self,
        now: Duration,
        prefill: WorkerId,
        decode: WorkerId,
    ) -> Option<PairState> {
        let now = now.as_secs_f64();
        let (&(Role::Prefill, p), &(Role::Decode, d)) =
            (self.ids.get(&prefill)?, self.ids.get(&decode)?)
        else {
            return None;
        };
        if self.prefills[p].row_at.is_none() {
            self.refresh_row(p, now);
        }
        let link = &self.prefills[p].links[d];
        Some(PairState {
            bytes_queued: link.bytes_queued,
            bytes_in_flight: link.bytes_in_flight,
            bytes_per_s: 1.0 / self.prefills[p].seconds_per_byte[d],
            measured: link.rate.value().is_some(),
            failures: link.failures.score(now),
        })
    }
}
