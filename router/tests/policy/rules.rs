//! The rules of `fused`, one by one, and what belongs to them.

use kvrouter::schedule::board::{Event, Leg};
use kvrouter::schedule::decision::{FreedBy, NoPair};
use kvrouter::schedule::facts::{Facts, Role};
use kvrouter::schedule::prefix::chunks_of_bytes;
use kvrouter::schedule::{Request, Settings};

use crate::fleet::{Fleet, facts, seconds, tokens};

/// No ties, so that every difference decides.
fn sharp() -> Settings {
    Settings {
        tie: std::time::Duration::ZERO,
        ..Settings::default()
    }
}

#[test]
fn rule_1_dispatches_are_booked_and_samples_replace_what_they_contain() {
    let mut fleet = Fleet::new(sharp(), 2, 2);
    // Booked at dispatch: the other prefill is better at once, before any sample.
    let key = fleet.book(0.0, (0, 0), &tokens(1000));
    assert_eq!(fleet.prefill(0.0, &tokens(500)), 1);
    let wait = |fleet: &mut Fleet, now: f64| {
        let only = ([fleet.prefills[0]], [fleet.decodes[1]]);
        let request = Request {
            prefill_subset: Some(&only.0),
            decode_subset: Some(&only.1),
            ..tokens(1)
        };
        fleet.pick(now, &request).prediction.wire_wait_s
    };
    // The booking will be ready at 1.0 and moves for 1 s, so what is ready at 1.001 waits for 0.999.
    assert!((wait(&mut fleet, 0.0) - 0.999).abs() < 1e-6);
    // A picture from before its prefill ended keeps it …
    fleet.prefill_says(0.5, 0, 500, &[]);
    assert!((wait(&mut fleet, 0.5) - 0.999).abs() < 1e-6);
    // … one from after that replaces it by the picture's backlog: half a second is left.
    fleet.board.advance(key, Event::PrefillDone, seconds(1.0));
    fleet.prefill_says(1.5, 0, 0, &[(0, 500_000_000, 0.0)]);
    assert!((wait(&mut fleet, 1.5) - 0.499).abs() < 1e-3);
    // Released by the measured end.
    fleet
        .board
        .advance(key, Event::TransferDone { seconds: None }, seconds(1.6));
    fleet.prefill_says(1.6, 0, 0, &[]);
    assert_eq!(wait(&mut fleet, 1.6), 0.0);
}

#[test]
fn rule_1_a_booking_that_no_room_was_told_of_is_still_computed() {
    let mut fleet = Fleet::new(sharp(), 1, 1);
    fleet.book(0.0, (0, 0), &tokens(1000));
    // Predicted to be ready at 1.0, but at 5.0 the engine has not told its room: its bytes are still to come.
    fleet.prefill_says(5.0, 0, 10, &[]);
    let load = fleet.board.load(seconds(5.0), fleet.prefills[0]).unwrap();
    assert_eq!(load.egress_bytes, 1_000_000_000);
}

#[test]
fn rule_2_measured_rates_replace_the_table() {
    let mut fleet = Fleet::new(sharp(), 2, 2);
    fleet.prefill_says(0.0, 0, 0, &[(0, 0, 0.25e9), (1, 0, 0.25e9)]);
    fleet.prefill_says(0.0, 1, 0, &[(0, 0, 1e9), (1, 0, 1e9)]);
    assert_eq!(fleet.prefill(0.0, &tokens(1000)), 1);
    let pair = |fleet: &mut Fleet, p: usize, d: usize| {
        let (p, d) = (fleet.prefills[p], fleet.decodes[d]);
        fleet.board.pair(seconds(0.0), p, d).unwrap()
    };
    assert!((pair(&mut fleet, 0, 1).bytes_per_s / 0.25e9 - 1.0).abs() < 1e-9);
    // A worker that is new inherits: a prefill's own pairs from it, a new prefill from the fleet.
    let new = fleet.board.join(facts("d2".into(), Role::Decode)).unwrap();
    fleet.decodes.push(new);
    let inherited = pair(&mut fleet, 0, 2);
    assert!(!inherited.measured && (inherited.bytes_per_s / 0.25e9 - 1.0).abs() < 0.05);
    let new = fleet.board.join(facts("p2".into(), Role::Prefill)).unwrap();
    fleet.prefills.push(new);
    let rate = pair(&mut fleet, 2, 0).bytes_per_s;
    assert!((0.25e9..1e9).contains(&rate), "{rate}");
    // And the router's own measurements count as well.
    let key = fleet.book(0.0, (1, 0), &tokens(1000));
    let before = pair(&mut fleet, 1, 0).bytes_per_s;
    let slow = Event::TransferDone {
        seconds: Some(10.0),
    };
    fleet.board.advance(key, slow, seconds(0.0));
    assert!(pair(&mut fleet, 1, 0).bytes_per_s < before * 0.95);
}

#[test]
fn rule_2_small_transfers_show_latency_not_bandwidth() {
    let mut fleet = Fleet::new(sharp(), 1, 1);
    let mut small = facts("p9".into(), Role::Prefill);
    small.kv_bytes_per_token = 10;
    let id = fleet.board.join(small).unwrap();
    fleet.board.set_ready(id, true);
    fleet.prefills.push(id);
    let key = fleet.book(0.0, (1, 0), &tokens(100));
    let event = Event::TransferDone {
        seconds: Some(0.004),
    };
    fleet.board.advance(key, event, seconds(1.0));
    let pair = fleet
        .board
        .pair(seconds(1.0), id, fleet.decodes[0])
        .unwrap();
    assert!(!pair.measured);
    let only = [id];
    let request = Request {
        prefill_subset: Some(&only),
        ..tokens(1)
    };
    assert!((fleet.pick(1.0, &request).prediction.transfer_s - 0.004).abs() < 1e-6);
}

#[test]
fn rule_3_old_samples_say_nothing() {
    let mut fleet = Fleet::new(sharp(), 2, 1);
    fleet.prefill_says(0.0, 0, 50_000, &[]);
    fleet.prefill_says(0.0, 1, 0, &[]);
    assert_eq!(fleet.prefill(2.4, &tokens(100)), 1);
    assert_eq!(fleet.pick(2.4, &tokens(100)).sample_age, Some(seconds(2.4)));
    // Two and a half periods later the queue is unknown, and a single booking decides.
    fleet.book(2.6, (1, 0), &tokens(10));
    assert_eq!(fleet.prefill(2.6, &tokens(100)), 0);
    assert_eq!(fleet.pick(2.6, &tokens(100)).sample_age, None);
}

#[test]
fn rule_4_siblings_bookings_count_like_own_ones() {
    let mut here = Fleet::new(sharp(), 2, 2);
    let mut there = Fleet::new(
        Settings {
            replica: 7,
            ..sharp()
        },
        2,
        2,
    );
    let key = there.book(100.0, (0, 0), &tokens(3000));
    let record = there.board.record(seconds(100.5), key).unwrap();
    here.board.adopt(seconds(3.0), &record).unwrap();
    assert_eq!(here.prefill(3.0, &tokens(500)), 1);
    // Heard again, it is still one booking; its end releases it, and late news do not revive it.
    here.board.adopt(seconds(3.1), &record).unwrap();
    assert_eq!(here.board.bookings(), (0, 1));
    assert!(here.board.advance(key, Event::Finished, seconds(3.2)));
    assert_eq!(
        here.board
            .adopt(seconds(3.3), &record)
            .unwrap_err()
            .to_string(),
        "this booking has ended already"
    );
    assert_eq!(here.board.bookings(), (0, 0));
    // A silent sibling's bookings expire; one that is gone loses them at once.
    for (number, ends) in [(900, true), (901, false)] {
        let mut other = record.clone();
        other.key.number = number;
        here.board.adopt(seconds(4.0), &other).unwrap();
        if ends {
            here.board.expire(seconds(200.0));
        } else {
            here.board.drop_replica(7);
        }
        assert_eq!(here.board.bookings(), (0, 0));
    }
}

#[test]
fn rule_5_decode_memory_is_taken_at_dispatch_or_at_the_prefills_end() {
    for early in [true, false] {
        let settings = Settings {
            decode_allocates_early: early,
            ..sharp()
        };
        let mut fleet = Fleet::new(settings, 1, 1);
        let key = fleet.book(0.0, (0, 0), &tokens(1000));
        // The pool's picture at 0.5 is empty: with early allocation the booking must be in it (and was freed since).
        fleet.decode_says(0.5, 0, 0, 10_000);
        let load = fleet.board.load(seconds(0.5), fleet.decodes[0]).unwrap();
        assert_eq!(load.kv_tokens, if early { 0 } else { 1000 });
        fleet.board.advance(key, Event::PrefillDone, seconds(1.0));
        fleet.decode_says(1.2, 0, 1000, 10_000);
        let load = fleet.board.load(seconds(1.2), fleet.decodes[0]).unwrap();
        assert_eq!(load.kv_tokens, 1000);
    }
}

#[test]
fn rule_5_a_full_decode_is_not_chosen_and_full_ones_hold() {
    let mut fleet = Fleet::new(sharp(), 1, 2);
    fleet.decode_says(0.0, 0, 900, 1000);
    fleet.decode_says(0.0, 1, 100, 1000);
    assert_eq!(fleet.decode(0.0, &tokens(200)), 1);
    fleet.decode_says(0.1, 1, 850, 1000);
    let hold = fleet.board.pick(seconds(0.1), &tokens(200)).unwrap_err();
    assert!(matches!(hold, NoPair::KvFull { .. }) && hold.hold().is_some());
    assert_eq!(hold.freed_by(), FreedBy::Generation);
    assert_eq!(fleet.decode(0.1, &tokens(150)), 1);
    // Low priority must leave room, and what can never fit is let through to an empty decode.
    let low = Request {
        priority: -1,
        ..tokens(10)
    };
    assert!(matches!(
        fleet.board.pick(seconds(0.1), &low),
        Err(NoPair::KvFull { .. })
    ));
    fleet.decode_says(0.2, 1, 0, 1000);
    assert_eq!(fleet.decode(0.2, &tokens(5000)), 1);
}

#[test]
fn rule_5_a_decode_must_have_room_for_what_its_requests_grow_to() {
    let mut fleet = Fleet::new(sharp(), 1, 2);
    let growing = Request {
        output_tokens: 600,
        ..tokens(100)
    };
    let key = fleet.book(0.0, (0, 0), &growing);
    // It holds 100 tokens by now, and the other one, of which nothing is booked, 250.
    fleet.decode_says(0.5, 0, 100, 1000);
    fleet.decode_says(0.5, 1, 250, 1000);
    assert_eq!(fleet.decode(0.5, &growing), 1, "700 and 700 do not fit");
    fleet.board.advance(key, Event::Finished, seconds(0.6));
    assert_eq!(fleet.decode(0.6, &growing), 0);
}

#[test]
fn rule_6_even_a_short_prompt_is_computed_by_a_prefill() {
    let mut fleet = Fleet::new(sharp(), 1, 3);
    fleet.prefill_says(0.0, 0, 1_000_000, &[]);
    let decision = fleet.pick(0.0, &tokens(1));
    assert_eq!(decision.prefill, fleet.prefills[0]);
    assert!(fleet.decodes.contains(&decision.decode));
    fleet.board.set_ready(fleet.prefills[0], false);
    let refused = fleet.board.pick(seconds(0.0), &tokens(1)).unwrap_err();
    assert_eq!(
        (refused, refused.freed_by()),
        (NoPair::Prefill { ready: 0 }, FreedBy::Ready)
    );
}

#[test]
fn rule_7_full_egresses_hold_requests_in_the_router() {
    let settings = Settings {
        egress_bytes_max: 1_500_000_000,
        ..sharp()
    };
    let mut fleet = Fleet::new(settings, 2, 2);
    let first = fleet.book(0.0, (0, 0), &tokens(1000));
    assert_eq!(fleet.prefill(0.0, &tokens(600)), 1, "0 has no room for it");
    fleet.book(0.0, (1, 1), &tokens(1200));
    let hold = fleet.board.pick(seconds(0.0), &tokens(600)).unwrap_err();
    assert_eq!(hold.freed_by(), FreedBy::Transfer);
    assert!(
        hold.hold().is_some_and(|wait| wait <= seconds(1.0)),
        "{hold:?}"
    );
    let small = fleet.pick(0.0, &tokens(400)).prefill;
    assert_eq!(small, fleet.prefills[0], "only 0 has room for this one");
    fleet
        .board
        .advance(first, Event::TransferDone { seconds: None }, seconds(2.0));
    assert_eq!(fleet.prefill(2.0, &tokens(600)), 0);
    // Bytes that only telemetry knows of count, and an oversized request passes where nothing waits.
    fleet.prefill_says(2.0, 0, 0, &[(0, 1_400_000_000, 0.0)]);
    assert!(fleet.board.pick(seconds(2.0), &tokens(600)).is_err());
    fleet.prefill_says(2.1, 0, 0, &[]);
    assert_eq!(fleet.prefill(2.1, &tokens(9000)), 0);
}

#[test]
fn the_data_parallel_rank_with_the_shortest_queue_is_told() {
    let mut fleet = Fleet::new(sharp(), 0, 1);
    let four = Facts {
        dp_size: 4,
        ..facts("p".into(), Role::Prefill)
    };
    let id = fleet.board.join(four).unwrap();
    fleet.board.set_ready(id, true);
    fleet.prefills.push(id);
    let mut seen = std::collections::HashSet::new();
    for stream in 0..4 {
        let request = Request {
            stream,
            ..tokens(1000)
        };
        let decision = fleet.pick(0.0, &request);
        assert_eq!(decision.dp_size, 4);
        seen.insert(decision.dp_rank);
        fleet.board.book(seconds(0.0), &decision, &request).unwrap();
    }
    assert_eq!(seen.len(), 4, "each rank got one");
}

#[test]
fn failures_of_a_pair_make_way_for_others_and_fade() {
    let mut fleet = Fleet::new(sharp(), 1, 2);
    let key = fleet.book(0.0, (0, 0), &tokens(10));
    fleet
        .board
        .advance(key, Event::Failed(Leg::Transfer), seconds(0.1));
    fleet.decode_says(0.1, 0, 0, 1 << 20);
    fleet.decode_says(0.1, 1, 1000, 1 << 20);
    assert_eq!(fleet.decode(0.1, &tokens(10)), 1);
    fleet.decode_says(400.0, 0, 0, 1 << 20);
    fleet.decode_says(400.0, 1, 1000, 1 << 20);
    assert_eq!(fleet.decode(400.0, &tokens(10)), 0);
}

#[test]
fn a_sticky_key_keeps_its_prefill_until_that_costs_too_much() {
    let mut fleet = Fleet::new(Settings::default(), 4, 4);
    let request = |stream| Request {
        sticky: Some(99),
        stream,
        ..tokens(100)
    };
    let first = fleet.pick(0.0, &request(0));
    let key = fleet.board.book(seconds(0.0), &first, &request(0)).unwrap();
    fleet.board.advance(key, Event::Finished, seconds(1.0));
    for stream in 1..50 {
        let again = fleet.pick(1.0, &request(stream));
        assert_eq!(
            (again.prefill, again.decode, again.sticky),
            (first.prefill, first.decode, true)
        );
    }
    let busy = fleet
        .prefills
        .iter()
        .position(|id| *id == first.prefill)
        .unwrap();
    fleet.prefill_says(1.0, busy, 5000, &[]);
    let moved = fleet.pick(1.0, &request(60));
    assert!(moved.prefill != first.prefill && !moved.sticky);
    assert!(
        !fleet.pick(4000.0, &request(61)).sticky,
        "forgotten after an hour"
    );
}

#[test]
fn a_known_prefix_shortens_the_prompt() {
    let mut fleet = Fleet::new(sharp(), 2, 1);
    let chunks = chunks_of_bytes(&vec![7; 4096]);
    let request = Request {
        chunks: &chunks,
        ..tokens(1000)
    };
    let key = fleet.book(0.0, (1, 0), &request);
    fleet.board.advance(key, Event::Finished, seconds(3.0));
    let decision = fleet.pick(3.0, &request);
    assert_eq!(
        (decision.prefill, decision.cached_tokens),
        (fleet.prefills[1], 1000)
    );
    assert!(decision.prediction.compute_s < 0.01);
    assert!(
        (decision.prediction.transfer_s - 1.0).abs() < 1e-6,
        "decode needs all pages"
    );
}

#[test]
fn predictions_learn_how_long_prompts_compute() {
    let mut fleet = Fleet::new(sharp(), 1, 1);
    for round in 0..30 {
        let now = f64::from(round) * 100.0;
        let key = fleet.book(now, (0, 0), &tokens(1000));
        fleet
            .board
            .advance(key, Event::PrefillDone, seconds(now + 3.0));
        fleet.board.advance(
            key,
            Event::TransferDone { seconds: Some(1.0) },
            seconds(now + 4.0),
        );
        fleet
            .board
            .advance(key, Event::FirstToken, seconds(now + 4.5));
        fleet
            .board
            .advance(key, Event::Finished, seconds(now + 5.0));
    }
    let prediction = fleet.pick(2905.0, &tokens(1000)).prediction;
    assert!((prediction.compute_s - 3.0).abs() < 0.1, "{prediction:?}");
    assert!(
        (0.2..0.6).contains(&prediction.admission_s),
        "{prediction:?}"
    );
}

#[test]
fn decisions_name_their_alternatives() {
    let mut fleet = Fleet::new(sharp(), 3, 3);
    fleet.prefill_says(0.0, 0, 4000, &[]);
    let decision = fleet.pick(0.0, &tokens(1000));
    assert_eq!(decision.candidates, 9);
    assert!(!decision.alternatives.is_empty());
    for other in &decision.alternatives {
        assert_ne!(
            (other.prefill, other.decode),
            (decision.prefill, decision.decode)
        );
        assert!(other.cost_s >= decision.cost_s && other.ttft_s > 0.0);
    }
    assert!(
        decision
            .alternatives
            .is_sorted_by(|a, b| a.cost_s <= b.cost_s)
    );
}
