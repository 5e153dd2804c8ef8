//! A tiny run of every case: the bytes arrive and the lines can be read. Its figures mean nothing.

use std::process::{Command, Output};

use serde_json::Value;

fn kvbench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvbench"))
        .args(arguments)
        .output()
        .expect("kvbench starts")
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let parse = |line| serde_json::from_str(line).expect("every line is JSON");
    text.lines().map(parse).collect()
}

fn run(path: &str, reference: &str) {
    let output = kvbench(&[
        "--json", "--tiny", "--rounds", "1", "--seed", "9", "--path", path,
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let lines = lines(&output);
    let cases: Vec<_> = lines
        .iter()
        .filter_map(|line| line["case"].as_str())
        .collect();
    assert_eq!(
        cases,
        ["one-1gib", "pages-16k", "pages-4k", "latency-16k"],
        "{said}"
    );
    for line in &lines {
        let reference = if path == "ring" && line["case"] == "latency-16k" {
            "plain-unix-socket"
        } else {
            reference
        };
        assert_eq!(line["verified"], true, "{line}");
        assert_eq!(line["wrong_blocks"], 0, "{line}");
        assert_eq!(line["path"], path);
        assert_eq!(line["reference"], reference);
        assert_eq!((&line["rounds"], &line["seed"]), (&1.into(), &9.into()));
        let number = |name: &str| line[name].as_f64().expect(name);
        for rate in ["gb_per_s", "reference_gb_per_s", "memcpy_gb_per_s"] {
            assert!((1e-5..1e4).contains(&number(rate)), "{rate} in {line}");
        }
        for times in [
            ["p50_us", "p99_us"],
            ["reference_p50_us", "reference_p99_us"],
        ] {
            assert!(number(times[0]) > 0.0, "{line}");
            assert!(number(times[0]) <= number(times[1]), "{line}");
        }
        let ratio = number("gb_per_s") / number("reference_gb_per_s");
        assert!((number("ratio") / ratio - 1.0).abs() < 0.1, "{line}");
        assert!(number("cpu_s_per_gib") >= 0.0);
        assert!(line["machine"]["cores"].as_u64() > Some(0), "{line}");
        let bytes = line["blocks"].as_u64().zip(line["block_bytes"].as_u64());
        assert!(
            bytes.is_some_and(|(blocks, len)| blocks * len > 0),
            "{line}"
        );
    }
}

#[test]
fn every_case_is_verified_over_tcp() {
    run("tcp", "plain-tcp");
}

#[test]
fn every_case_is_verified_over_shm() {
    run("shm", "process_vm_readv");
}

#[test]
fn every_case_is_verified_over_the_ring() {
    run("ring", "memcpy");
}

#[test]
fn help_teaches_and_nonsense_is_refused() {
    let help = kvbench(&["--help"]);
    let text = String::from_utf8_lossy(&help.stdout);
    for word in ["Examples:", "pages-16k", "ratio", "idle", "--lanes"] {
        assert!(text.contains(word), "{word} is missing in {text}");
    }
    let refused = kvbench(&["--path", "pigeon"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2));
    assert!(said.contains("tcp, shm, ring, verbs, all"), "{said}");
}

/// Freezes, kills and restarts, in host memory: nothing is late, wrong or left behind.
fn provoke(path: &str) {
    let output = kvbench(&[
        "--json",
        "--tiny",
        "--seed",
        "9",
        "--path",
        path,
        "--faults",
        "8",
        "--restarts",
        "20",
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said} {:?}", lines(&output));
    let found = &lines(&output)[0];
    for kind in [
        "frozen_receivers",
        "frozen_senders",
        "killed_receivers",
        "killed_senders",
    ] {
        assert_eq!(found[kind], 2, "{found}");
    }
    for bad in ["late_blocks", "wrong_blocks", "told_late"] {
        assert_eq!(found[bad], 0, "{found}");
    }
    assert_eq!(found["restarts"], 20, "{found}");
    assert_eq!(found["leaked"].as_array().map(Vec::len), Some(0), "{found}");
}

#[test]
fn whoever_freezes_or_dies_leaves_nothing_late_over_tcp() {
    provoke("tcp");
}

#[test]
fn whoever_freezes_or_dies_leaves_nothing_late_where_the_receiver_pulls() {
    provoke("shm");
}

#[test]
fn whoever_freezes_or_dies_leaves_nothing_late_over_a_ring() {
    provoke("ring");
}
