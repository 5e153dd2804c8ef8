//! What the policies are worth, on traces and fleets that every machine simulates alike.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

use std::io::Write;

use clap::Parser;
use kvrouter::schedule::Policy;
use kvrouter::simulate::command::{self, Arguments};
use kvrouter::simulate::outcome::Outcome;
use kvrouter::simulate::scenario::Scenario;
use kvrouter::simulate::trace::{Arrival, Made};
use kvrouter::simulate::world;

macro_rules! scenario {
    ($name:literal) => {
        Scenario::from_toml(include_str!(concat!("../../scenarios/", $name, ".toml"))).unwrap()
    };
}

/// As Mooncake's conversation trace in rate and lengths, but a quarter as long.
fn arrivals() -> Vec<Arrival> {
    let made = Made {
        requests: 3000,
        ..Made::default()
    };
    made.arrivals(11)
}

fn run(scenario: &Scenario, policy: Policy) -> Outcome {
    let arrivals = arrivals();
    let outcome = world::run(scenario, &arrivals, policy, 1, &mut |_| {});
    assert_eq!(
        outcome.ttft_s.len(),
        arrivals.len(),
        "every request is served"
    );
    assert_eq!(outcome.decisions, arrivals.len() as u64);
    outcome
}

fn mean(scenario: &Scenario, policy: Policy) -> f64 {
    run(scenario, policy).mean_ttft_s
}

/// `fused`'s mean as a share of `least_tokens`'s.
fn share(scenario: &Scenario) -> f64 {
    mean(scenario, Policy::Fused) / mean(scenario, Policy::LeastTokens)
}

#[test]
fn one_router_before_a_fan_in_gains_a_quarter() {
    let share = share(&scenario!("G1"));
    assert!(share <= 0.75, "{share}");
}

#[test]
fn four_routers_before_a_fan_in_gain_from_telemetry() {
    let share = share(&scenario!("G4"));
    assert!(share <= 0.85, "{share}");
    let fused = mean(&scenario!("G4"), Policy::Fused);
    let blind = Scenario {
        telemetry: false,
        ..scenario!("G4")
    };
    let alone = mean(&blind, Policy::Fused);
    assert!(
        fused <= 0.95 * alone,
        "{fused} with samples, {alone} with own bookings alone"
    );
    let gossip = Scenario {
        gossip: true,
        ..scenario!("G4")
    };
    let gossip = mean(&gossip, Policy::Fused);
    assert!(
        gossip <= 0.95 * fused,
        "{gossip} with gossip, {fused} without"
    );
}

#[test]
fn healthy_links_cost_nothing() {
    let share = share(&scenario!("A"));
    assert!(share <= 1.02, "{share}");
}

#[test]
fn a_wrong_table_is_put_right_by_measured_rates() {
    let right = mean(&scenario!("G1"), Policy::Fused);
    let wrong = mean(&scenario!("Gx"), Policy::Fused);
    assert!(
        wrong <= 1.03 * right,
        "{wrong} with a wrong table, {right} with the right one"
    );
    let blind = Scenario {
        telemetry: false,
        ..scenario!("Gx")
    };
    let blind = mean(&blind, Policy::Fused);
    assert!(
        wrong <= 0.95 * blind,
        "{wrong} with samples, {blind} without"
    );
}

#[test]
fn a_degraded_sender_is_survived() {
    let fused = run(&scenario!("H4"), Policy::Fused);
    let tokens = run(&scenario!("H4"), Policy::LeastTokens);
    assert!(
        fused.mean_ttft_s <= 0.3 * tokens.mean_ttft_s,
        "{} against {}",
        fused.mean_ttft_s,
        tokens.mean_ttft_s
    );
    assert!(fused.p99_ttft_s <= 25.0, "{}", fused.p99_ttft_s);
}

#[test]
fn the_same_seed_gives_the_same_outcome() {
    let scenario = Scenario {
        gossip: true,
        ..scenario!("G4")
    };
    let arrivals = &arrivals()[..400];
    let run = |seed| world::run(&scenario, arrivals, Policy::Fused, seed, &mut |_| {});
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

#[test]
fn what_is_held_is_served_later() {
    let scenario = Scenario {
        // Room for two mean requests on each egress, and for a dozen in each pool.
        egress_bytes_max: Some(6 << 30),
        decode_kv_tokens: 150_000,
        ..scenario!("G4")
    };
    for policy in [Policy::Fused, Policy::LeastTokens] {
        assert!(run(&scenario, policy).held > 100);
    }
}

#[test]
fn cached_prefixes_are_found() {
    // Ten long prompts that come again and again, so that where they go decides everything.
    let mut arrivals = arrivals();
    for (index, arrival) in arrivals.iter_mut().enumerate() {
        arrival.input = 20_480;
        arrival.blocks = (0..40)
            .map(|block| (index as u64 % 10) * 1000 + block)
            .collect();
    }
    let scenario = Scenario {
        prefix_cache_tokens: 100_000,
        ..scenario!("A")
    };
    let mean = |policy| world::run(&scenario, &arrivals, policy, 1, &mut |_| {}).mean_ttft_s;
    let (tokens, cached, fused) = (
        mean(Policy::LeastTokens),
        mean(Policy::CacheAware),
        mean(Policy::Fused),
    );
    assert!(
        cached < 0.8 * tokens && fused < 0.8 * tokens,
        "{tokens} {cached} {fused}"
    );
}

#[test]
fn every_scenario_runs_every_policy() {
    let arrivals = &arrivals()[..60];
    for scenario in [
        scenario!("A"),
        scenario!("B"),
        scenario!("F"),
        scenario!("G1"),
        scenario!("G4"),
        scenario!("G8"),
        scenario!("Gx"),
        scenario!("H"),
        scenario!("H4"),
    ] {
        assert!(!scenario.description.is_empty());
        for (policy, name) in Policy::ALL {
            let outcome = world::run(&scenario, arrivals, policy, 1, &mut |_| {});
            assert_eq!(outcome.ttft_s.len(), 60, "{name}");
            assert!(outcome.ttft_s[0] > 0.0);
        }
    }
}

/// Runs the command with these arguments; its output, and how many lines of progress.
fn command(arguments: &[&str]) -> anyhow::Result<(String, usize)> {
    let words = ["kvrouter simulate"].iter().chain(arguments);
    let (mut out, mut progress) = (Vec::new(), Vec::new());
    command::run(&Arguments::try_parse_from(words)?, &mut out, &mut progress)?;
    Ok((
        String::from_utf8(out)?,
        progress.iter().filter(|byte| **byte == b'\n').count(),
    ))
}

#[test]
fn the_command_reads_packed_traces_and_writes_what_it_found() {
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("simulate");
    std::fs::create_dir_all(&dir).unwrap();
    let trace = dir.join("small.jsonl.gz");
    let file = std::fs::File::create(&trace).unwrap();
    let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    for n in 0..50 {
        let ms = n / 10 * 3000;
        writeln!(packed, "{{\"timestamp\": {ms}, \"input_length\": 5000, \"output_length\": 20, \"hash_ids\": [{n}]}}").unwrap();
    }
    packed.finish().unwrap();
    let scenario = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/Gx.toml");
    let (trace, out) = (trace.to_str().unwrap(), dir.to_str().unwrap());
    let base = [
        "--scenario",
        scenario,
        "--trace",
        trace,
        "--policy",
        "fused,round_robin",
        "--out",
        out,
    ];
    let (table, progress) = command(&base).unwrap();
    assert!(
        table.starts_with("Gx: 8P4D") && table.contains("round_robin"),
        "{table}"
    );
    assert_eq!(progress, 20);
    let (json, _) = command(&[&base[..], &["--json", "--speed", "2"]].concat()).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    for field in [
        "mean_ttft_s",
        "p50_ttft_s",
        "p90_ttft_s",
        "p99_ttft_s",
        "share_under_3s",
        "decisions",
        "mean_sample_age_s",
    ] {
        assert!(
            json["policies"]["fused"][field].is_number(),
            "{field}: {json}"
        );
    }
    assert_eq!(
        (&json["requests"], &json["policies"]["fused"]["decisions"]),
        (&50.into(), &50.into())
    );
    assert!(
        std::fs::read_to_string(dir.join("Gx.svg"))
            .unwrap()
            .starts_with("<svg")
    );
    assert!(
        std::fs::read_to_string(dir.join("Gx.json"))
            .unwrap()
            .contains("mean_ttft_s")
    );
    for (wrong, part) in [
        (
            &["--scenario", scenario, "--trace", "/nowhere.jsonl"][..],
            "/nowhere.jsonl",
        ),
        (&["--scenario", "/nowhere.toml"], "/nowhere.toml"),
        (&["--scenario", scenario, "--policy", "best"], "best"),
        (&["--scenario", scenario, "--speed", "0"], "--speed"),
    ] {
        let error = format!("{:#}", command(wrong).unwrap_err());
        assert!(error.contains(part), "{error}");
    }
}
