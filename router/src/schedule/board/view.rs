//! What a request would meet at each worker: live samples where they are fresh, bookings for what they cannot know.
//!
//! *Fuse* (rule 1): a sample replaces every booking whose KV cache was computed before the sample was taken, since its
//! bytes are in the sample's backlog or gone. Bookings computed later are kept beside it. Without a fresh sample all
//! bookings count.
#![forbid(unsafe_code)]

use super::super::decision::Prediction;
use super::super::dice::Dice;
use super::super::request::Request;
use super::{ADMISSION_HALF_LIFE_S, ADMISSION_S, Board, Decode, Job, Prefill};

/// What a request would meet at a prefill. Times are absolute seconds on the board's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefillView {
    pub(super) slot: usize,
    pub(super) rank: usize,
    /// Tokens and requests in its queues.
    pub(super) queued: (u64, u64),
    /// When its rank can begin, and how long it computes.
    pub(super) begin: f64,
    pub(super) compute_s: f64,
    pub(super) compute_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) egress_bytes: u64,
    /// When its egress has sent everything that is ready before.
    pub(super) egress_free: f64,
    pub(super) kv_bytes: u64,
    pub(super) latency_s: f64,
    pub(super) age_s: Option<f64>,
    /// What it costs besides its prediction.
    pub(super) penalty_s: f64,
}

impl PrefillView {
    pub(super) fn ready(&self) -> f64 {
        self.begin + self.compute_s
    }

    /// The earliest time at which its egress could carry the request.
    pub(super) fn sendable(&self) -> f64 {
        self.ready().max(self.egress_free)
    }
}

/// What a request would meet at a decode.
#[derive(Clone, Copy, Debug)]
pub(super) struct DecodeView {
    pub(super) slot: usize,
    /// When its ingress has taken in the backlog of all samples.
    base: f64,
    /// Its kept bookings in `Scratch::steps`.
    steps: (usize, usize),
    pub(super) admission_s: f64,
    pub(super) kv_tokens: u64,
    pub(super) requests: u64,
    /// Share of its KV pool that is taken.
    pub(super) fullness: f64,
    /// What it costs besides its prediction.
    pub(super) penalty_s: f64,
}

/// Memory that decisions use again.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) prefills: Vec<PrefillView>,
    pub(super) decodes: Vec<DecodeView>,
    /// Per decode, for each kept booking: when it is ready, when the ingress has taken it in.
    steps: Vec<(f64, f64)>,
    /// By prefill slot: when its links were pictured and whether rooms are told; none: not fresh.
    pictured: Vec<Option<(f64, bool)>>,
    /// By decode slot: seconds of backlog, and the sum of those times the picture's time.
    backlog: Vec<(f64, f64)>,
    rank_free: Vec<f64>,
    /// By prefill slot: chunks of the prompt that were sent there before.
    pub(super) matched: Vec<u32>,
    /// By prefill slot: blocks of the prompt that its own events told of.
    pub(super) reported: Vec<u32>,
    pub(super) order: Vec<(f64, usize)>,
    pub(super) rates: Vec<(f64, f64)>,
}

impl Scratch {
    /// When the ingress is free for a request that can be sent at `sendable`: all that is ready before goes first.
    pub(super) fn ingress_free(&self, decode: &DecodeView, sendable: f64) -> f64 {
        let steps = &self.steps[decode.steps.0..decode.steps.1];
        let before = steps.partition_point(|(ready, _)| *ready <= sendable);
        match before.checked_sub(1) {
            Some(last) => steps[last].1,
            None => decode.base,
        }
    }
}

/// When a booking's bytes are or will be ready, if the prefill's picture does not contain them already.
fn kept_ready(ready: f64, known: bool, pictured: Option<(f64, bool)>, now: f64) -> Option<f64> {
    match pictured {
        None => Some(ready),
        Some((at, _)) if known => (ready > at).then_some(ready),
        // Its room would have been told: it is still being computed, however long that was predicted to take.
        Some((_, true)) => Some(ready.max(now)),
        Some((at, false)) => (ready > at).then_some(ready),
    }
}

impl Board {
    /// Nominal seconds for so many tokens.
    pub(super) fn nominal_compute_s(&self, prefill: usize, tokens: u64) -> f64 {
        tokens.max(1) as f64 / self.prefills[prefill].facts.prefill_tokens_per_s
    }

    /// Predicted seconds of computing, and the learned factor in it.
    pub(super) fn compute_s(&self, prefill: usize, tokens: u64) -> (f64, f64) {
        let factor = self.prefills[prefill]
            .model
            .factor(tokens, &self.fleet.prefill);
        (self.nominal_compute_s(prefill, tokens) * factor, factor)
    }

    /// Tokens and requests that a prefill has in its queues: its picture and what was booked since.
    pub(super) fn queued(&self, prefill: &Prefill, now: f64) -> (u64, u64) {
        let mut sum = self.pictured_queue(prefill, now);
        for job in prefill.jobs.iter().filter(|job| !job.known) {
            if self.is_newer(prefill, job, now) {
                sum = (sum.0.saturating_add(job.tokens), sum.1 + 1);
            }
        }
        sum
    }

    fn pictured_queue(&self, prefill: &Prefill, now: f64) -> (u64, u64) {
        let fresh = prefill
            .queues
            .iter()
            .filter(|queue| self.is_fresh(queue.at, now));
        fresh.fold((0, 0), |sum, queue| {
            (
                sum.0.saturating_add(queue.tokens),
                sum.1.saturating_add(queue.requests),
            )
        })
    }

    /// Whether the picture of its rank's queue cannot contain a job.
    fn is_newer(&self, prefill: &Prefill, job: &Job, now: f64) -> bool {
        self.rank_pictured(prefill, job.rank, now)
            .is_none_or(|at| job.booked_at > at)
    }

    /// When a rank's queue was pictured, if that is fresh.
    fn rank_pictured(&self, prefill: &Prefill, rank: usize, now: f64) -> Option<f64> {
        let queue = prefill.queues.get(rank)?;
        self.is_fresh(queue.at, now).then_some(queue.at)
    }

    pub(super) fn links_pictured(&self, prefill: &Prefill, now: f64) -> Option<(f64, bool)> {
        prefill.pictured.filter(|(at, _)| self.is_fresh(*at, now))
    }

    /// Bytes that were dispatched to a prefill and have not reached their decode, and when its egress has sent them.
    pub(super) fn egress(
        &self,
        prefill: &Prefill,
        pictured: Option<(f64, bool)>,
        now: f64,
    ) -> (u64, f64) {
        let (mut bytes, mut free) = (0_u64, now);
        if let Some((at, _)) = pictured {
            let mut backlog_s = 0.0;
            for (slot, seconds) in &prefill.busy {
                let link = &prefill.links[*slot];
                let link_bytes = link.bytes_queued.saturating_add(link.bytes_in_flight);
                bytes = bytes.saturating_add(link_bytes);
                backlog_s += seconds;
            }
            free = free.max(at + backlog_s);
        }
        let ranks = f64::from(prefill.facts.dp_size);
        for job in &prefill.jobs {
            if let Some(ready) = kept_ready(job.ready, job.known, pictured, now) {
                bytes = bytes.saturating_add(job.bytes);
                // Before the first decision no row is worked out yet.
                let spb = prefill
                    .seconds_per_byte
                    .get(job.decode)
                    .copied()
                    .unwrap_or(0.0);
                // It has not arrived, so it cannot end before now.
                free = (free.max(ready) + job.bytes as f64 * spb / ranks).max(now);
            }
        }
        (bytes, free)
    }

    /// KV tokens and requests of a decode: its picture and what was booked since.
    pub(super) fn kv_tokens(&self, decode: &Decode, now: f64) -> (u64, u64) {
        match decode.pool.filter(|pool| self.is_fresh(pool.at, now)) {
            None => (decode.booked_tokens, decode.booked_requests),
            Some(pool) => {
                let newer = decode.unpictured.iter().map(|(_, _, tokens)| *tokens);
                (
                    newer.fold(pool.tokens_used, u64::saturating_add),
                    pool.requests.saturating_add(decode.unpictured.len() as u64),
                )
            }
        }
    }

    /// The same at most: what all bookings of a decode may grow to, however little of it they hold by now.
    pub(super) fn kv_tokens_foreseen(&self, decode: &Decode, now: f64) -> u64 {
        self.kv_tokens(decode, now).0.max(decode.booked_tokens)
    }

    /// Tokens that fit a decode's pool, if that is known.
    pub(super) fn kv_tokens_max(decode: &Decode) -> Option<u64> {
        decode
            .pool
            .map(|pool| pool.tokens)
            .or(decode.facts.kv_tokens_max)
    }

    /// Prepares the look at decodes: backlog by ingress, and which prefills have fresh pictures.
    pub(super) fn look_at_wire(&self, scratch: &mut Scratch, now: f64) {
        scratch.steps.clear();
        scratch.pictured.clear();
        scratch.backlog.clear();
        scratch.backlog.resize(self.decodes.len(), (0.0, 0.0));
        for prefill in &self.prefills {
            let pictured = prefill.id.and_then(|_| self.links_pictured(prefill, now));
            scratch.pictured.push(pictured);
            let Some((at, _)) = pictured else { continue };
            for (slot, seconds) in &prefill.busy {
                scratch.backlog[*slot].0 += seconds;
                scratch.backlog[*slot].1 += seconds * at;
            }
        }
    }

    /// What the request would meet at the prefill in `slot`.
    pub(super) fn view_prefill(
        &self,
        scratch: &mut Scratch,
        slot: usize,
        request: &Request<'_>,
        now: f64,
    ) -> PrefillView {
        let prefill = &self.prefills[slot];
        let cached_tokens = self.cached_tokens(scratch, slot, request);
        let compute_tokens = request.prompt_tokens.saturating_sub(cached_tokens).max(1);
        let (rank, begin, queued) = self.shortest_rank(&mut scratch.rank_free, slot, request, now);
        let pictured = scratch.pictured[slot];
        let (egress_bytes, egress_free) = self.egress(prefill, pictured, now);
        let tokens = prefill.facts.page_rounded(request.prompt_tokens);
        PrefillView {
            slot,
            rank,
            queued,
            begin,
            compute_s: self.compute_s(slot, compute_tokens).0,
            compute_tokens,
            cached_tokens,
            egress_bytes,
            egress_free,
            kv_bytes: tokens.saturating_mul(prefill.facts.kv_bytes_per_token),
            latency_s: self.fleet.latency.value().unwrap_or(0.0),
            penalty_s: 0.0,
            age_s: pictured.map(|(at, _)| (now - at).max(0.0)),
        }
    }

    /// What the prefill is believed to have of the prompt: what it told, and where it did not tell all, no less than what was
    /// sent to it before.
    fn cached_tokens(&self, scratch: &Scratch, slot: usize, request: &Request<'_>) -> u64 {
        let count = |matched: &[u32]| matched.get(slot).map_or(0, |count| u64::from(*count));
        let guessed = match request.chunks.len() as u64 {
            0 => 0,
            chunks => {
                request
                    .prompt_tokens
                    .saturating_mul(count(&scratch.matched).min(chunks))
                    / chunks
            }
        };
        if request.blocks.is_empty() || !self.trie.reports(slot) {
            return guessed;
        }
        let told = count(&scratch.reported)
            .saturating_mul(request.block_tokens)
            .min(request.prompt_tokens);
        if self.trie.reports_all(slot) {
            told
        } else {
            told.max(guessed)
        }
    }

    /// The data-parallel rank that can begin first, when, and what all ranks have queued.
    fn shortest_rank(
        &self,
        free: &mut Vec<f64>,
        slot: usize,
        request: &Request<'_>,
        now: f64,
    ) -> (usize, f64, (u64, u64)) {
        let prefill = &self.prefills[slot];
        let ranks = prefill.facts.dp_size as usize;
        free.clear();
        free.extend((0..ranks).map(|rank| match prefill.queues.get(rank) {
            Some(queue) if self.is_fresh(queue.at, now) && queue.requests > 0 => {
                let each = self.compute_s(slot, queue.tokens / queue.requests).0;
                queue.at.min(now) + queue.requests as f64 * each
            }
            _ => now,
        }));
        let mut queued = self.pictured_queue(prefill, now);
        for job in &prefill.jobs {
            if job.known || !self.is_newer(prefill, job, now) {
                continue;
            }
            queued = (queued.0.saturating_add(job.tokens), queued.1 + 1);
            let rank = job.rank.min(ranks - 1);
            free[rank] = match self.rank_pictured(prefill, rank, now) {
                Some(_) => free[rank].max(job.booked_at) + job.compute_s,
                None => self.after(free[rank], job, prefill, now),
            };
        }
        let first = Dice::new(self.settings.seed, !request.stream).below(ranks);
        let mut best = first;
        for rank in (0..ranks).map(|step| (first + step) % ranks) {
            if free[rank] < free[best] {
                best = rank;
            }
        }
        (best, free[best].max(now), queued)
    }

    /// When a job that only its booking knows of leaves the rank free.
    fn after(&self, free: f64, job: &Job, prefill: &Prefill, now: f64) -> f64 {
        let told = self
            .links_pictured(prefill, now)
            .is_some_and(|(_, rooms)| rooms);
        if job.ready <= now && !told {
            // It was predicted to be done, and nothing could have told otherwise.
            return free;
        }
        free.max(job.ready)
    }

    /// What the request would meet at the decode in `slot`.
    pub(super) fn view_decode(&self, scratch: &mut Scratch, slot: usize, now: f64) -> DecodeView {
        let decode = &self.decodes[slot];
        let (seconds, weighted) = scratch.backlog[slot];
        let base = if seconds > 0.0 {
            (weighted / seconds + seconds).max(now)
        } else {
            now
        };
        let start = scratch.steps.len();
        let mut free = base;
        for entry in &decode.inbound {
            let pictured = scratch.pictured[entry.prefill];
            let Some(ready) = kept_ready(entry.ready, entry.known, pictured, now) else {
                continue;
            };
            let seconds = entry.bytes as f64 * self.spb(entry.prefill, slot);
            // It has not arrived, so it cannot end before now.
            free = (free.max(ready) + seconds).max(now);
            scratch.steps.push((ready, free));
        }
        let (kv_tokens, requests) = self.kv_tokens(decode, now);
        let pool = Self::kv_tokens_max(decode).unwrap_or(1 << 20).max(1);
        DecodeView {
            slot,
            base,
            steps: (start, scratch.steps.len()),
            admission_s: decode.admission.or(ADMISSION_S, now, ADMISSION_HALF_LIFE_S),
            kv_tokens,
            requests,
            fullness: kv_tokens as f64 / pool as f64,
            penalty_s: 0.0,
        }
    }

    fn spb(&self, prefill: usize, decode: usize) -> f64 {
        self.prefills[prefill].seconds_per_byte[decode]
    }

    /// The parts of the time to the first token, for a pair of views.
    pub(super) fn predict(
        &self,
        scratch: &Scratch,
        prefill: &PrefillView,
        decode: &DecodeView,
        now: f64,
    ) -> Prediction {
        let sendable = prefill.sendable();
        let wire = sendable.max(scratch.ingress_free(decode, sendable));
        let transfer_s =
            prefill.latency_s + prefill.kv_bytes as f64 * self.spb(prefill.slot, decode.slot);
        Prediction {
            wait_s: prefill.begin - now,
            compute_s: prefill.compute_s,
            wire_wait_s: wire - prefill.ready(),
            transfer_s,
            admission_s: decode.admission_s,
        }
    }
}
