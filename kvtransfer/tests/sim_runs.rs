//! Whole clusters under virtual time, by the thousand: every promise is checked after every event.
//!
//! `KVT_SIM_SEED=n` runs one seed in every weather, `KVT_SIM_RUNS=n` so many seeds per weather.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "a run says what it has seen")]

use std::panic::catch_unwind;

use kvtransfer::testing::sim::scenario::{Report, Weather, run};

/// Seeds per weather; together about ten seconds of one core.
const RUNS: u64 = 2_250;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

fn runs(weather: Weather) -> Report {
    let seeds = match number("KVT_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("KVT_SIM_RUNS").unwrap_or(RUNS),
    };
    let mut report = Report::default();
    for seed in seeds {
        match catch_unwind(|| run(weather, seed)) {
            Ok(one) => report.add(&one),
            Err(_) => panic!(
                "{weather:?} seed {seed} broke a promise (see above); again: KVT_SIM_SEED={seed} cargo test -p kvtransfer --test sim_runs"
            ),
        }
    }
    println!("{weather:?}: {report:?}");
    report
}

/// One seed cannot show everything.
fn is_one_seed() -> bool {
    number("KVT_SIM_SEED").is_some() || number("KVT_SIM_RUNS").is_some()
}

#[test]
fn calm_weather_lets_every_transfer_succeed() {
    let report = runs(Weather::Calm);
    assert!(report.failures.is_empty());
    if !is_one_seed() {
        assert!(report.bytes > 1_000_000 && report.full > 10, "{report:?}");
    }
}

#[test]
fn a_lost_lane_costs_no_transfer() {
    let report = runs(Weather::Lanes);
    assert!(report.failures.is_empty());
    assert!(is_one_seed() || report.lanes_reset > 500, "{report:?}");
}

#[test]
fn no_storm_breaks_a_promise() {
    let report = runs(Weather::Storm);
    if !is_one_seed() {
        for name in ["cancelled", "timeout", "peer_failed", "peer_lost"] {
            let count = report.failures.get(name).copied().unwrap_or(0);
            assert!(count > 50, "{name} was hardly seen: {report:?}");
        }
        assert!(report.successes > 500, "{report:?}");
        assert!(report.freezes > 100 && report.restarts > 30, "{report:?}");
    }
}

#[test]
fn no_card_touches_pages_after_the_end() {
    let report = runs(Weather::Cards);
    if !is_one_seed() {
        assert!(report.successes > 500, "{report:?}");
        assert!(
            report.lanes_reset > 500 && report.fences > 100,
            "{report:?}"
        );
        assert!(report.freezes > 100 && report.restarts > 30, "{report:?}");
    }
}

#[test]
fn a_seed_decides_everything() {
    for weather in [
        Weather::Calm,
        Weather::Lanes,
        Weather::Storm,
        Weather::Cards,
    ] {
        assert_eq!(run(weather, 4), run(weather, 4));
    }
}
