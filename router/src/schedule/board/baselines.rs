//! The policies that `fused` is compared with. They see the same queues and pass the same gates; only the choice differs.
#![forbid(unsafe_code)]

use super::super::dice::Dice;
use super::super::policy::Policy;
use super::super::request::Request;
use super::Board;
use super::view::Scratch;

/// `cache_aware` follows the prefix from this share of the prompt on.
const MATCH_SHARE_MIN: f64 = 0.5;

/// `cache_aware` balances instead when one prefill has more requests than another by this count and this ratio.
const IMBALANCE_COUNT: u64 = 32;
const IMBALANCE_RATIO: f64 = 1.1;

impl Board {
    /// Indices into the scratch's views.
    pub(super) fn baseline(
        &mut self,
        policy: Policy,
        scratch: &Scratch,
        request: &Request<'_>,
    ) -> (usize, usize) {
        let mut dice = Dice::new(self.settings.seed, request.stream);
        let counts = (scratch.prefills.len(), scratch.decodes.len());
        match policy {
            Policy::Random => (dice.below(counts.0), dice.below(counts.1)),
            Policy::RoundRobin => {
                let turn = self.turn;
                self.turn = self.turn.wrapping_add(1);
                turn_pair(turn, counts.0 as u64, counts.1 as u64)
            }
            Policy::PowerOfTwo => power_of_two(scratch, &mut dice),
            Policy::CacheAware => {
                let decode = least_decode(scratch, &mut dice);
                match cached_prefill(scratch, request) {
                    Some(prefill) => (prefill, decode),
                    None => (least_prefill(scratch, &mut dice), decode),
                }
            }
            Policy::Topology => self.nearest(scratch, &mut dice),
            Policy::LeastTokens | Policy::Fused => {
                let prefill = least_prefill(scratch, &mut dice);
                (prefill, least_decode(scratch, &mut dice))
            }
        }
    }

    /// The pair with the shortest queue, computation and transfer at nominal bandwidth on an idle wire.
    fn nearest(&self, scratch: &Scratch, dice: &mut Dice) -> (usize, usize) {
        let mut best = (f64::INFINITY, 0, 0);
        let (first_prefill, first_decode) = (
            dice.below(scratch.prefills.len()),
            dice.below(scratch.decodes.len()),
        );
        for p in turned(scratch.prefills.len(), first_prefill) {
            let prefill = &scratch.prefills[p];
            for d in turned(scratch.decodes.len(), first_decode) {
                let decode = &scratch.decodes[d];
                let wire = prefill.kv_bytes as f64 / self.nominal(prefill.slot, decode.slot);
                let load = self.settings.decode_load_weight * decode.fullness;
                let cost = prefill.ready() + wire + load;
                if cost < best.0 {
                    best = (cost, p, d);
                }
            }
        }
        (best.1, best.2)
    }
}

/// `0..count` from `first` on, around.
fn turned(count: usize, first: usize) -> impl Iterator<Item = usize> {
    (first..count).chain(0..first)
}

/// The index with the least `key`; among equals chance decides.
fn least<K: Ord>(count: usize, dice: &mut Dice, key: impl Fn(usize) -> K) -> usize {
    let first = dice.below(count);
    turned(count, first)
        .min_by_key(|index| key(*index))
        .unwrap_or(0)
}

fn least_prefill(scratch: &Scratch, dice: &mut Dice) -> usize {
    least(scratch.prefills.len(), dice, |p| {
        scratch.prefills[p].queued.0
    })
}

fn least_decode(scratch: &Scratch, dice: &mut Dice) -> usize {
    least(scratch.decodes.len(), dice, |d| {
        scratch.decodes[d].kv_tokens
    })
}

fn power_of_two(scratch: &Scratch, dice: &mut Dice) -> (usize, usize) {
    let mut two = |count: usize| (dice.below(count), dice.below(count));
    let (a, b) = two(scratch.prefills.len());
    let (c, d) = two(scratch.decodes.len());
    let requests = |p: usize| scratch.prefills[p].queued.1;
    let running = |d: usize| scratch.decodes[d].requests;
    (
        if requests(b) < requests(a) { b } else { a },
        if running(d) < running(c) { d } else { c },
    )
}

/// The prefill that has most of the prompt, if it has enough of it and the load is even.
fn cached_prefill(scratch: &Scratch, request: &Request<'_>) -> Option<usize> {
    let counts = scratch.prefills.iter().map(|view| view.queued.1);
    let (most, fewest) = (counts.clone().max()?, counts.min()?);
    if most > fewest.saturating_add(IMBALANCE_COUNT)
        && most as f64 > fewest as f64 * IMBALANCE_RATIO
    {
        return None;
    }
    let views = scratch.prefills.iter().enumerate();
    let (index, view) = views.max_by_key(|(index, view)| {
        (
            view.cached_tokens,
            std::cmp::Reverse((view.queued.0, *index)),
        )
    })?;
    let share = view.cached_tokens as f64 / request.prompt_tokens.max(1) as f64;
    (share >= MATCH_SHARE_MIN).then_some(index)
}

/// Two plain counters would move in lock-step: with as many prefills as decodes, prefill `i` would only ever meet one
/// decode. The decode side therefore shifts by one each time the two cycles meet again.
#[expect(
    clippy::cast_possible_truncation,
    reason = "both results are below a usize argument"
)]
fn turn_pair(turn: u64, prefills: u64, decodes: u64) -> (usize, usize) {
    let cycle = prefills / gcd(prefills, decodes) * decodes;
    let decode = (turn % decodes + turn / cycle % decodes) % decodes;
    ((turn % prefills) as usize, decode as usize)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::turn_pair;

    #[test]
    fn round_robin_meets_every_pair_equally() {
        for (prefills, decodes) in [(1, 1), (2, 2), (3, 2), (4, 6), (4, 4), (1, 5)] {
            let rounds = 5 * prefills * decodes * decodes;
            let mut met = HashMap::new();
            for turn in 0..rounds {
                *met.entry(turn_pair(turn, prefills, decodes)).or_insert(0) += 1;
            }
            assert_eq!(met.len() as u64, prefills * decodes, "{prefills}x{decodes}");
            let expected = rounds / (prefills * decodes);
            assert!(
                met.values().all(|count| *count == expected),
                "{prefills}x{decodes}: {met:?}"
            );
        }
    }
}
