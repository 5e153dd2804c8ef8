//! The policies that `fused` is compared with.

use std::collections::HashMap;

use kvrouter::schedule::facts::Role;
use kvrouter::schedule::prefix::{chunks_of_bytes, chunks_of_tokens};
use kvrouter::schedule::sample::KvEvent;
use kvrouter::schedule::{Facts, Policy, Request, Settings};

use crate::fleet::{BYTES_PER_S, Fleet, facts, seconds, tokens};

fn fleet(policy: Policy, prefills: usize, decodes: usize) -> Fleet {
    Fleet::new(
        Settings {
            policy,
            ..Settings::default()
        },
        prefills,
        decodes,
    )
}

/// How often each pair is picked.
fn met(fleet: &mut Fleet, rounds: u64) -> HashMap<(u32, u32), u64> {
    let mut met = HashMap::new();
    for stream in 0..rounds {
        let decision = fleet.pick(
            0.0,
            &Request {
                stream,
                ..tokens(10)
            },
        );
        let pair = (decision.prefill.number(), decision.decode.number());
        *met.entry(pair).or_insert(0) += 1;
    }
    met
}

#[test]
fn random_meets_every_pair() {
    let met = met(&mut fleet(Policy::Random, 3, 4), 2400);
    assert_eq!(met.len(), 12);
    assert!(
        met.values().all(|count| (130..270).contains(count)),
        "{met:?}"
    );
}

#[test]
fn round_robin_pairs_do_not_lock() {
    let met = met(&mut fleet(Policy::RoundRobin, 4, 4), 160);
    assert_eq!(met.len(), 16);
    assert!(met.values().all(|count| *count == 10), "{met:?}");
}

#[test]
fn fused_spreads_over_equal_pairs() {
    let met = met(&mut fleet(Policy::Fused, 3, 3), 900);
    assert_eq!(met.len(), 9);
    assert!(
        met.values().all(|count| (60..150).contains(count)),
        "{met:?}"
    );
}

#[test]
fn power_of_two_avoids_the_busiest() {
    let mut fleet = fleet(Policy::PowerOfTwo, 4, 4);
    for _ in 0..5 {
        fleet.book(0.0, (2, 3), &tokens(10));
    }
    let (p, d) = (fleet.prefills[2].number(), fleet.decodes[3].number());
    let met = met(&mut fleet, 1600);
    let share = |busy: &dyn Fn(&(u32, u32)) -> bool| -> u64 {
        met.iter()
            .filter(|(pair, _)| busy(pair))
            .map(|(_, count)| count)
            .sum()
    };
    // It is taken only when both draws fall on it: one in sixteen.
    assert!((50..160).contains(&share(&|pair| pair.0 == p)), "{met:?}");
    assert!((50..160).contains(&share(&|pair| pair.1 == d)), "{met:?}");
}

#[test]
fn least_tokens_counts_tokens_not_requests() {
    let mut fleet = fleet(Policy::LeastTokens, 2, 2);
    fleet.book(0.0, (0, 0), &tokens(5000));
    fleet.book(0.0, (1, 1), &tokens(100));
    fleet.book(0.0, (1, 1), &tokens(100));
    assert_eq!(
        (
            fleet.prefill(0.0, &tokens(1)),
            fleet.decode(0.0, &tokens(1))
        ),
        (1, 1)
    );
    // Live queues replace what was booked before them.
    fleet.prefill_says(0.5, 0, 10, &[]);
    fleet.prefill_says(0.5, 1, 9000, &[]);
    assert_eq!(fleet.prefill(0.5, &tokens(1)), 0);
}

#[test]
fn cache_aware_follows_the_prompt_until_the_load_is_uneven() {
    let mut fleet = fleet(Policy::CacheAware, 3, 1);
    let chunks = chunks_of_bytes(&vec![1; 2048]);
    let request = Request {
        chunks: &chunks,
        ..tokens(1000)
    };
    fleet.book(0.0, (2, 0), &request);
    assert_eq!(fleet.prefill(0.0, &request), 2);
    let half = [&chunks[..3], &[1, 2, 3, 4, 5][..]].concat();
    let other = Request {
        chunks: &half,
        ..tokens(1000)
    };
    assert_ne!(
        fleet.prefill(0.0, &other),
        2,
        "less than half of it is known there"
    );
    for _ in 0..33 {
        fleet.book(0.0, (2, 0), &tokens(1));
    }
    assert_ne!(fleet.prefill(0.0, &request), 2);
}

#[test]
fn cache_aware_believes_an_engines_own_events() {
    let mut fleet = fleet(Policy::CacheAware, 2, 1);
    let blocks = chunks_of_tokens(&(0..64).collect::<Vec<u32>>(), 16);
    let stored: Vec<(u64, u64)> = (100..).zip(blocks.iter().copied()).collect();
    let event = KvEvent::Stored {
        parent: None,
        blocks: stored,
    };
    fleet.board.cache_event(fleet.prefills[1], 0, &event);
    let request = Request {
        blocks: &blocks,
        block_tokens: 16,
        ..tokens(64)
    };
    let decision = fleet.pick(0.0, &request);
    assert_eq!(
        (decision.prefill, decision.cached_tokens),
        (fleet.prefills[1], 64)
    );
    fleet
        .board
        .cache_event(fleet.prefills[1], 0, &KvEvent::Cleared);
    assert_eq!(fleet.pick(0.0, &request).cached_tokens, 0);
}

#[test]
fn topology_prefers_its_own_zone() {
    let settings = Settings {
        policy: Policy::Topology,
        cross_zone_bytes_per_s: Some(BYTES_PER_S / 4.0),
        ..Settings::default()
    };
    let mut fleet = Fleet::new(settings, 0, 0);
    for (name, role, zone) in [
        ("p0", Role::Prefill, "a"),
        ("d0", Role::Decode, "a"),
        ("p1", Role::Prefill, "b"),
        ("d1", Role::Decode, "b"),
    ] {
        let zoned = Facts {
            zone: Some(zone.into()),
            ..facts(name.into(), role)
        };
        let id = fleet.board.join(zoned).unwrap();
        fleet.board.set_ready(id, true);
    }
    for stream in 0..100 {
        let decision = fleet.pick(
            0.0,
            &Request {
                stream,
                ..tokens(1000)
            },
        );
        let zone = |id| fleet.board.facts(id).unwrap().zone.clone();
        assert_eq!(zone(decision.prefill), zone(decision.decode));
    }
    // It does not see queues on the wire: that is what it is compared for.
    let busy = fleet.board.named("p0").unwrap();
    let load = fleet.board.load(seconds(0.0), busy).unwrap();
    assert_eq!(load.egress_bytes, 0);
}
