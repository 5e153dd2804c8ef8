//! The choice: who may serve the request, and which pair of those does.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::super::decision::{ALTERNATIVES_MAX, Alternative, Decision, NoPair};
use super::super::dice::{mix, unit};
use super::super::facts::{Role, WORKERS_MAX, WorkerId};
use super::super::policy::Policy;
use super::super::request::Request;
use super::Board;
use super::view::{DecodeView, PrefillView, Scratch};

/// A held request asks again after at least and at most this, even if no event frees it.
const RETRY_MIN: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// When a decode's pool is full, nobody can say when a generation ends.
const KV_RETRY: Duration = Duration::from_millis(250);

/// A pair of indices into the scratch's views, with its cost.
#[derive(Clone, Copy, Debug)]
struct Choice {
    prefill: usize,
    decode: usize,
    cost_s: f64,
}

/// What each pair's cost is worked out from, besides its prediction.
struct Weights {
    now: f64,
    seed: u64,
    tie: f64,
}

impl Weights {
    /// Up to half a tie for a worker: the order of pairs that are as good as each other.
    fn chance(&self, id: Option<WorkerId>) -> f64 {
        let number = id.map_or(0, |id| u64::from(id.0) + 1);
        unit(mix(self.seed ^ number)) * self.tie / 2.0
    }
}

impl Board {
    /// Chooses a pair for `request`. Nothing is booked: see [`Board::book`].
    ///
    /// # Errors
    /// [`NoPair`], which says whether and for what the request should be held.
    pub fn pick(&mut self, now: Duration, request: &Request<'_>) -> Result<Decision, NoPair> {
        let now = now.as_secs_f64();
        self.refresh_rows(now);
        let mut scratch = std::mem::take(&mut self.scratch);
        let decision = self.pick_with(&mut scratch, now, request);
        self.scratch = scratch;
        decision
    }

    fn pick_with(
        &mut self,
        scratch: &mut Scratch,
        now: f64,
        request: &Request<'_>,
    ) -> Result<Decision, NoPair> {
        self.match_prefix(scratch, request);
        self.look_at_wire(scratch, now);
        let weights = Weights {
            now,
            seed: mix(self.settings.seed) ^ mix(!request.stream),
            tie: self.settings.tie.as_secs_f64(),
        };
        self.admit_prefills(scratch, &weights, request)?;
        self.admit_decodes(scratch, &weights, request)?;
        let mut alternatives = Vec::new();
        let (choice, sticky) = match self.settings.policy {
            Policy::Fused => self.fused(scratch, &weights, request, &mut alternatives),
            policy => {
                let (prefill, decode) = self.baseline(policy, scratch, request);
                (self.weigh(scratch, &weights, prefill, decode), false)
            }
        };
        Ok(self.decide(scratch, now, request, choice, sticky, alternatives))
    }

    fn match_prefix(&self, scratch: &mut Scratch, request: &Request<'_>) {
        let wanted = self.settings.prefix_credit || self.settings.policy == Policy::CacheAware;
        scratch.matched.clear();
        scratch.reported.clear();
        if !wanted {
            return;
        }
        if !request.chunks.is_empty() {
            self.trie.matches(request.chunks, &mut scratch.matched);
        }
        if !request.blocks.is_empty() {
            self.trie.matches(request.blocks, &mut scratch.reported);
        }
    }

    /// The limit of a shared resource for this request.
    fn limit(&self, request: &Request<'_>, most: f64) -> f64 {
        if request.priority < 0 {
            most * self.settings.low_priority_share
        } else {
            most
        }
    }

    /// Rule 7: what does not fit an egress is held here and not on the wire, where nobody could reorder it.
    fn admit_prefills(
        &self,
        scratch: &mut Scratch,
        weights: &Weights,
        request: &Request<'_>,
    ) -> Result<(), NoPair> {
        let now = weights.now;
        let allowed = self.allowed(Role::Prefill, request.prefill_subset, request.exclude);
        let mut ready = 0;
        let mut full_until = f64::INFINITY;
        let limit = self.limit(request, self.settings.egress_bytes_max as f64);
        scratch.prefills.clear();
        for (slot, prefill) in self.prefills.iter().enumerate() {
            if prefill.id.is_none() || !prefill.ready {
                continue;
            }
            ready += 1;
            if !allowed[slot] {
                continue;
            }
            let mut view = self.view_prefill(scratch, slot, request, now);
            view.penalty_s = self.prefill_penalty(weights, &view);
            let bytes = view.egress_bytes;
            if bytes > 0 && (bytes.saturating_add(view.kv_bytes)) as f64 > limit {
                let first = prefill
                    .jobs
                    .iter()
                    .map(|job| job.ready)
                    .fold(f64::INFINITY, f64::min);
                full_until = full_until.min(first.min(view.egress_free));
                continue;
            }
            scratch.prefills.push(view);
        }
        if !scratch.prefills.is_empty() {
            return Ok(());
        }
        if full_until.is_finite() {
            let wait = Duration::try_from_secs_f64(full_until - now).unwrap_or_default();
            return Err(NoPair::EgressFull {
                retry_after: wait.clamp(RETRY_MIN, RETRY_MAX),
            });
        }
        Err(NoPair::Prefill { ready })
    }

    /// Rule 5: a decode takes pages at dispatch, so one without room for them would only make the wire wait.
    fn admit_decodes(
        &self,
        scratch: &mut Scratch,
        weights: &Weights,
        request: &Request<'_>,
    ) -> Result<(), NoPair> {
        let now = weights.now;
        let allowed = self.allowed(Role::Decode, request.decode_subset, request.exclude);
        let mut ready = 0;
        let mut full = false;
        scratch.decodes.clear();
        for (slot, decode) in self.decodes.iter().enumerate() {
            if decode.id.is_none() || !decode.ready {
                continue;
            }
            ready += 1;
            if !allowed[slot] {
                continue;
            }
            let taken = self.kv_tokens_foreseen(decode, now);
            let needed = taken.saturating_add(self.kv_tokens_needed(slot, request));
            let most = Self::kv_tokens_max(decode);
            let limit =
                most.map(|most| self.limit(request, most as f64 * self.settings.kv_share_max));
            if taken > 0 && limit.is_some_and(|limit| needed as f64 > limit) {
                full = true;
                continue;
            }
            let mut view = self.view_decode(scratch, slot, now);
            view.penalty_s = self.decode_penalty(weights, &view);
            scratch.decodes.push(view);
        }
        if !scratch.decodes.is_empty() {
            return Ok(());
        }
        if full {
            return Err(NoPair::KvFull {
                retry_after: KV_RETRY,
            });
        }
        Err(NoPair::Decode { ready })
    }

    fn kv_tokens_needed(&self, decode: usize, request: &Request<'_>) -> u64 {
        let tokens = request.prompt_tokens.saturating_add(request.output_tokens);
        self.decodes[decode].facts.page_rounded(tokens)
    }

    /// By slot, whom the request itself allows.
    fn allowed(
        &self,
        role: Role,
        subset: Option<&[WorkerId]>,
        exclude: &[WorkerId],
    ) -> [bool; WORKERS_MAX] {
        let mut allowed = [subset.is_none(); WORKERS_MAX];
        let mut mark = |ids: &[WorkerId], value: bool| {
            for id in ids {
                if let Some((_, slot)) = self.ids.get(id).filter(|(known, _)| *known == role) {
                    allowed[*slot] = value;
                }
            }
        };
        mark(subset.unwrap_or_default(), true);
        mark(exclude, false);
        allowed
    }

    /// What a decode costs besides its prediction.
    fn decode_penalty(&self, weights: &Weights, decode: &DecodeView) -> f64 {
        self.settings.decode_load_weight * decode.fullness
            + weights.chance(self.decodes[decode.slot].id)
    }

    /// What a prefill costs besides its prediction.
    fn prefill_penalty(&self, weights: &Weights, prefill: &PrefillView) -> f64 {
        let stale = if prefill.age_s.is_none() {
            self.settings.stale_weight
        } else {
            0.0
        };
        stale + weights.chance(self.prefills[prefill.slot].id)
    }

    /// What the transfer itself costs at this speed.
    fn wire_cost(&self, prefill: &PrefillView, seconds_per_byte: f64) -> f64 {
        let transfer_s = prefill.latency_s + prefill.kv_bytes as f64 * seconds_per_byte;
        transfer_s * (1.0 + self.settings.wire_weight)
    }

    /// A pair's cost: its predicted time to the first token and its penalties.
    fn weigh(&self, scratch: &Scratch, weights: &Weights, p: usize, d: usize) -> Choice {
        let (prefill, decode) = (&scratch.prefills[p], &scratch.decodes[d]);
        let prediction = self.predict(scratch, prefill, decode, weights.now);
        let failures = self.prefills[prefill.slot].links[decode.slot].failures;
        Choice {
            prefill: p,
            decode: d,
            cost_s: prediction.ttft_s()
                + self.settings.wire_weight * prediction.transfer_s
                + prefill.penalty_s
                + decode.penalty_s
                + self.settings.failure_weight * failures.score(weights.now),
        }
    }

    /// The cheapest pair. Prefills are looked at in the order of the least that any pair of theirs could cost, until
    /// that is more than the best pair found.
    fn fused(
        &self,
        scratch: &mut Scratch,
        weights: &Weights,
        request: &Request<'_>,
        alternatives: &mut Vec<Alternative>,
    ) -> (Choice, bool) {
        let now = weights.now;
        let cheapest_decode = scratch
            .decodes
            .iter()
            .map(|decode| decode.admission_s + decode.penalty_s)
            .fold(f64::INFINITY, f64::min);
        let mut order = std::mem::take(&mut scratch.order);
        order.clear();
        order.extend(scratch.prefills.iter().enumerate().map(|(index, view)| {
            let state = &self.prefills[view.slot];
            let wire = self.wire_cost(view, state.fastest);
            (
                view.sendable() - now + wire + view.penalty_s + cheapest_decode,
                index,
            )
        }));
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let mut best: Option<Choice> = None;
        let mut seen: Vec<Choice> = Vec::with_capacity(ALTERNATIVES_MAX + 2);
        for &(least, p) in &order {
            if best.is_some_and(|best| least > best.cost_s) {
                break;
            }
            self.look_at(scratch, weights, p, &mut best, &mut seen);
        }
        scratch.order = order;
        let best = best.expect("invariant: there is a prefill and a decode");
        let kept = self.sticky_choice(scratch, weights, request, best);
        let choice = kept.unwrap_or(best);
        self.explain(scratch, weights, choice, &mut seen, alternatives);
        (choice, kept.is_some())
    }

    /// Weighs the pairs of one prefill that may be better than the best.
    fn look_at(
        &self,
        scratch: &Scratch,
        weights: &Weights,
        p: usize,
        best: &mut Option<Choice>,
        seen: &mut Vec<Choice>,
    ) {
        let view = &scratch.prefills[p];
        let row = &self.prefills[view.slot].seconds_per_byte;
        let fixed = view.sendable() - weights.now + view.penalty_s;
        for (d, decode) in scratch.decodes.iter().enumerate() {
            let least = fixed
                + self.wire_cost(view, row[decode.slot])
                + decode.admission_s
                + decode.penalty_s;
            if best.is_some_and(|best| least > best.cost_s) {
                continue;
            }
            let choice = self.weigh(scratch, weights, p, d);
            if best.is_none_or(|best| choice.cost_s < best.cost_s) {
                *best = Some(choice);
            }
            if seen.len() <= ALTERNATIVES_MAX {
                seen.push(choice);
            } else if let Some(worst) = seen
                .iter_mut()
                .max_by(|a, b| a.cost_s.total_cmp(&b.cost_s))
                .filter(|worst| worst.cost_s > choice.cost_s)
            {
                *worst = choice;
            }
        }
    }

    /// The pair that served the same key before, unless it has become much worse than the best.
    fn sticky_choice(
        &self,
        scratch: &Scratch,
        weights: &Weights,
        request: &Request<'_>,
        best: Choice,
    ) -> Option<Choice> {
        let pair = self.sticky.peek(&request.sticky?)?;
        if weights.now - pair.used_at > self.settings.sticky_ttl.as_secs_f64() {
            return None;
        }
        let id_of = |index: usize| self.prefills[scratch.prefills[index].slot].id;
        let prefill = (0..scratch.prefills.len()).find(|p| id_of(*p) == Some(pair.prefill))?;
        let limit = best.cost_s + self.settings.sticky_slack.as_secs_f64();
        let held = (0..scratch.decodes.len())
            .map(|d| self.weigh(scratch, weights, prefill, d))
            .filter(|choice| choice.cost_s <= limit);
        // What is worth keeping is the prefill's prefix cache; the same decode is merely preferred.
        held.min_by(|a, b| {
            let same = |choice: &Choice| {
                self.decodes[scratch.decodes[choice.decode].slot].id != Some(pair.decode)
            };
            same(a).cmp(&same(b)).then(a.cost_s.total_cmp(&b.cost_s))
        })
    }

    fn explain(
        &self,
        scratch: &Scratch,
        weights: &Weights,
        choice: Choice,
        seen: &mut Vec<Choice>,
        alternatives: &mut Vec<Alternative>,
    ) {
        seen.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
        seen.retain(|other| (other.prefill, other.decode) != (choice.prefill, choice.decode));
        alternatives.extend(seen.iter().take(ALTERNATIVES_MAX).filter_map(|other| {
            let (p, d) = (
                &scratch.prefills[other.prefill],
                &scratch.decodes[other.decode],
            );
            Some(Alternative {
                prefill: self.prefills[p.slot].id?,
                decode: self.decodes[d.slot].id?,
                ttft_s: self.predict(scratch, p, d, weights.now).ttft_s(),
                cost_s: other.cost_s,
            })
        }));
    }

    fn decide(
        &self,
        scratch: &Scratch,
        now: f64,
        request: &Request<'_>,
        choice: Choice,
        sticky: bool,
        alternatives: Vec<Alternative>,
    ) -> Decision {
        let (p, d) = (
            &scratch.prefills[choice.prefill],
            &scratch.decodes[choice.decode],
        );
        let id = |id: Option<WorkerId>| id.expect("invariant: a view's worker is on the board");
        Decision {
            prefill: id(self.prefills[p.slot].id),
            decode: id(self.decodes[d.slot].id),
            dp_rank: u32::try_from(p.rank).expect("invariant: ranks are below RANKS_MAX"),
            dp_size: self.prefills[p.slot].facts.dp_size,
            prediction: self.predict(scratch, p, d, now),
            cost_s: choice.cost_s,
            policy: self.settings.policy,
            sticky,
            cached_tokens: p.cached_tokens,
            sample_age: p
                .age_s
                .and_then(|age| Duration::try_from_secs_f64(age).ok()),
            candidates: scratch.prefills.len() * scratch.decodes.len(),
            alternatives,
            compute_tokens: p.compute_tokens,
            kv_bytes: p.kv_bytes,
            kv_tokens: self.kv_tokens_needed(d.slot, request),
        }
    }
}
