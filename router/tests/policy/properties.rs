//! What holds for every fleet and every order of events.

use kvrouter::schedule::board::{Event, Key, Leg, Load};
use kvrouter::schedule::{Board, Decision, NoPair, Policy, Request, Settings, WorkerId};
use proptest::prelude::*;

use crate::fleet::{Fleet, seconds, tokens};

const PREFILLS: usize = 4;
const DECODES: usize = 3;
/// Tokens of every decode's pool in these tests.
const POOL: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Step {
    Book(u64),
    Happen(usize, u8),
    Adopt(u64, usize, usize),
    DropReplica(u64),
    Prefill(usize, u64, usize, u64),
    Decode(usize, u64),
    Leave(usize),
    Expire,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..5000_u64).prop_map(Step::Book),
        6 => (0..20_usize, 0..8_u8).prop_map(|(booking, event)| Step::Happen(booking, event)),
        2 => (0..6_u64, 0..PREFILLS, 0..DECODES).prop_map(|(n, p, d)| Step::Adopt(n, p, d)),
        1 => (1..3_u64).prop_map(Step::DropReplica),
        2 => (0..PREFILLS, 0..9000_u64, 0..DECODES, 0..2_000_000_000_u64)
            .prop_map(|(p, queued, d, bytes)| Step::Prefill(p, queued, d, bytes)),
        2 => (0..DECODES, 0..POOL / 2).prop_map(|(d, used)| Step::Decode(d, used)),
        1 => (0..PREFILLS + DECODES).prop_map(Step::Leave),
        1 => Just(Step::Expire),
    ]
}

fn event(number: u8) -> Event {
    match number {
        0 => Event::PrefillDone,
        1 => Event::TransferDone { seconds: None },
        2 => Event::TransferDone { seconds: Some(0.3) },
        3 => Event::FirstToken,
        4 => Event::Finished,
        5 => Event::Cancelled,
        6 => Event::Failed(Leg::Transfer),
        _ => Event::Failed(Leg::Decode),
    }
}

/// Plays the steps, and returns the bookings and the decisions made.
fn play(fleet: &mut Fleet, steps: &[Step]) -> (Vec<Key>, Vec<Result<Decision, NoPair>>) {
    let (mut keys, mut decisions) = (Vec::new(), Vec::new());
    for (number, step) in (1_u32..).zip(steps) {
        let now = f64::from(number) * 0.1;
        match *step {
            Step::Book(count) => {
                let request = Request {
                    stream: u64::from(number),
                    sticky: Some(count % 3),
                    ..tokens(count)
                };
                let decision = fleet.board.pick(seconds(now), &request);
                if let Ok(decision) = &decision {
                    keys.push(fleet.board.book(seconds(now), decision, &request).unwrap());
                }
                decisions.push(decision);
            }
            Step::Happen(booking, number) => {
                if let Some(key) = keys.get(booking) {
                    // Sometimes told late, with a time that has long passed.
                    let at = now - f64::from(number % 3) * 0.05;
                    fleet.board.advance(*key, event(number), seconds(at));
                }
            }
            Step::Adopt(number, p, d) => {
                let record = kvrouter::schedule::board::Record {
                    key: Key {
                        replica: 1 + number % 2,
                        number,
                    },
                    prefill: format!("p{p}"),
                    decode: format!("d{d}"),
                    dp_rank: 9,
                    compute_tokens: 700,
                    kv_bytes: 700_000_000,
                    kv_tokens: 700,
                    age: seconds(0.1),
                    ready_in_s: 0.5,
                    ready_known: number % 3 == 0,
                    transferred: number % 4 == 0,
                };
                let known = fleet.board.adopt(seconds(now), &record).is_ok();
                if known {
                    keys.push(record.key);
                }
            }
            Step::DropReplica(replica) => fleet.board.drop_replica(replica),
            Step::Prefill(p, queued, d, bytes) => {
                if fleet.board.facts(fleet.prefills[p]).is_some() {
                    fleet.prefill_says(now, p, queued, &[(d, bytes, 0.0)]);
                }
            }
            Step::Decode(d, used) => {
                if fleet.board.facts(fleet.decodes[d]).is_some() {
                    fleet.decode_says(now, d, used, POOL);
                }
            }
            Step::Leave(index) => {
                let all = [fleet.prefills.clone(), fleet.decodes.clone()].concat();
                fleet.board.leave(all[index]);
            }
            Step::Expire => fleet.board.expire(seconds(now)),
        }
    }
    (keys, decisions)
}

fn workers(fleet: &Fleet) -> Vec<WorkerId> {
    let all = [fleet.prefills.clone(), fleet.decodes.clone()].concat();
    all.into_iter()
        .filter(|id| fleet.board.facts(*id).is_some())
        .collect()
}

fn loads(fleet: &Fleet, now: f64) -> Vec<Load> {
    let load = |id: &WorkerId| fleet.board.load(seconds(now), *id).unwrap();
    workers(fleet).iter().map(load).collect()
}

fn policies() -> impl Strategy<Value = Policy> {
    prop::sample::select(Policy::ALL.map(|(policy, _)| policy).to_vec())
}

fn mask() -> impl Strategy<Value = Vec<bool>> {
    prop::collection::vec(any::<bool>(), PREFILLS + DECODES)
}

fn of(ids: &[WorkerId], mask: &[bool]) -> Vec<WorkerId> {
    let chosen = ids.iter().zip(mask).filter(|(_, chosen)| **chosen);
    chosen.map(|(id, _)| *id).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn bookings_never_leak(steps in prop::collection::vec(step(), 1..80)) {
        let mut fleet = Fleet::new(Settings::default(), PREFILLS, DECODES);
        let (keys, _) = play(&mut fleet, &steps);
        for key in &keys {
            // All end, by one event or another, and some are told again.
            fleet.board.advance(*key, [Event::Finished, Event::Cancelled, Event::Failed(Leg::Prefill)][key.number as usize % 3], seconds(100.0));
            fleet.board.advance(*key, Event::PrefillDone, seconds(100.0));
            fleet.board.advance(*key, Event::Finished, seconds(100.0));
        }
        prop_assert_eq!(fleet.board.bookings(), (0, 0));
        // Without fresh samples and with empty ones nothing is left.
        for load in loads(&fleet, 1000.0) {
            let load = Load {
                sample_age: None,
                kv_tokens_max: None,
                ..load
            };
            prop_assert_eq!(load, Load::default());
        }
        for p in 0..PREFILLS {
            if fleet.board.facts(fleet.prefills[p]).is_some() {
                fleet.prefill_says(1000.0, p, 0, &[]);
            }
        }
        for d in 0..DECODES {
            if fleet.board.facts(fleet.decodes[d]).is_some() {
                fleet.decode_says(1000.0, d, 0, POOL);
            }
        }
        for load in loads(&fleet, 1000.0) {
            let load = Load {
                sample_age: None,
                kv_tokens_max: None,
                ..load
            };
            prop_assert_eq!(load, Load::default());
        }
    }

    #[test]
    fn only_ready_and_allowed_workers_are_picked(
        steps in prop::collection::vec(step(), 0..30),
        policy in policies(),
        (ready, excluded, subset) in (mask(), mask(), mask()),
        limited in any::<bool>(),
        sticky in 0..3_u64,
    ) {
        let settings = Settings { policy, ..Settings::default() };
        let mut fleet = Fleet::new(settings, PREFILLS, DECODES);
        play(&mut fleet, &steps);
        let all = [fleet.prefills.clone(), fleet.decodes.clone()].concat();
        for (id, ready) in all.iter().zip(&ready) {
            fleet.board.set_ready(*id, *ready);
        }
        let exclude = of(&all, &excluded);
        let only = of(&all, &subset);
        let request = Request {
            exclude: &exclude,
            prefill_subset: limited.then_some(&only),
            decode_subset: limited.then_some(&only),
            sticky: Some(sticky),
            ..tokens(100)
        };
        let may = |id: &WorkerId, index: usize| {
            fleet.board.facts(*id).is_some() && ready[index] && !excluded[index] && (!limited || subset[index])
        };
        let served = |range: std::ops::Range<usize>| range.clone().any(|index| may(&all[index], index));
        let possible = served(0..PREFILLS) && served(PREFILLS..PREFILLS + DECODES);
        let now = seconds(steps.len() as f64 * 0.1 + 0.1);
        match fleet.board.pick(now, &request) {
            Ok(decision) => {
                let index = |id| all.iter().position(|known| *known == id).unwrap();
                let (p, d) = (index(decision.prefill), index(decision.decode));
                prop_assert!(p < PREFILLS && d >= PREFILLS);
                prop_assert!(ready[p] && ready[d] && !excluded[p] && !excluded[d]);
                prop_assert!(!limited || (subset[p] && subset[d]));
                prop_assert!(decision.prediction.ttft_s().is_finite());
            }
            Err(no_pair) => prop_assert!(!possible || no_pair.hold().is_some(), "{no_pair}"),
        }
    }

    #[test]
    fn the_same_seed_and_events_give_the_same_decisions(
        steps in prop::collection::vec(step(), 1..60),
        policy in policies(),
    ) {
        let settings = Settings { policy, seed: 5, ..Settings::default() };
        let run = || play(&mut Fleet::new(settings.clone(), PREFILLS, DECODES), &steps).1;
        prop_assert_eq!(run(), run());
    }

    #[test]
    fn stale_samples_decide_like_none(
        before in prop::collection::vec(step(), 1..40),
        after in prop::collection::vec(step(), 1..40),
        policy in policies(),
    ) {
        let is_sample = |step: &Step| matches!(step, Step::Prefill(..) | Step::Decode(..));
        let mut told = Fleet::new(Settings { policy, ..Settings::default() }, PREFILLS, DECODES);
        let mut untold = Fleet::new(Settings { policy, ..Settings::default() }, PREFILLS, DECODES);
        for fleet in [&mut told, &mut untold] {
            for decode in 0..DECODES {
                // Both know the pools' sizes; one of them will know nothing more.
                fleet.decode_says(0.0, decode, 0, POOL);
            }
        }
        let samples: Vec<Step> = before.iter().filter(|step| is_sample(step)).cloned().collect();
        let rest: Vec<Step> = after.iter().filter(|step| !is_sample(step)).cloned().collect();
        play(&mut told, &samples);
        // As long as a sample lives, nothing happens.
        let quiet = vec![Step::Expire; 80];
        let late = [quiet, rest].concat();
        prop_assert_eq!(play(&mut told, &late), play(&mut untold, &late));
    }

    #[test]
    fn more_bytes_on_an_egress_never_make_it_preferred(
        steps in prop::collection::vec(step(), 0..30),
        (prefill, bytes, more) in (0..PREFILLS, 0..3_000_000_000_u64, 1..3_000_000_000_u64),
        stream in any::<u64>(),
        count in 1..5000_u64,
    ) {
        // The bytes go to a decode that may not serve the request, so that they weigh on this egress alone.
        let decide = |bytes: u64| -> Option<(WorkerId, WorkerId)> {
            let mut fleet = Fleet::new(Settings::default(), PREFILLS, DECODES);
            let kept: Vec<Step> = steps.iter().filter(|step| !matches!(step, Step::Leave(_))).cloned().collect();
            play(&mut fleet, &kept);
            let now = kept.len() as f64 * 0.1 + 0.2;
            fleet.prefill_says(now, prefill, 300, &[(DECODES - 1, bytes, 0.0)]);
            let subset = fleet.decodes[..DECODES - 1].to_vec();
            let request = Request { decode_subset: Some(&subset), stream, ..tokens(count) };
            let decision = fleet.board.pick(seconds(now), &request).ok()?;
            Some((decision.prefill, decision.decode))
        };
        let probe = Fleet::new(Settings::default(), PREFILLS, DECODES).prefills[prefill];
        let (light, heavy) = (decide(bytes), decide(bytes + more));
        if light.is_some_and(|(chosen, _)| chosen != probe) {
            prop_assert_eq!(light, heavy);
        }
    }
}

#[test]
fn a_full_ledger_refuses() {
    let settings = Settings {
        egress_bytes_max: u64::MAX,
        ..Settings::default()
    };
    let mut fleet = Fleet::new(settings, 1, 1);
    let decision = fleet.pick(0.0, &tokens(1));
    let book = |board: &mut Board, decision| board.book(seconds(0.0), decision, &tokens(1));
    // Ended transfers keep this fast; the bookings stay until their requests end.
    for _ in 0..kvrouter::schedule::board::BOOKINGS_MAX {
        let key = book(&mut fleet.board, &decision).unwrap();
        fleet.board.advance(key, Event::FirstToken, seconds(0.0));
    }
    let refused = book(&mut fleet.board, &decision).unwrap_err();
    assert_eq!(refused, kvrouter::schedule::board::BookError::Full);
}
