//! The built demo from end to end, and that nothing outlives it.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

/// Long enough for any machine, short enough to end a broken test.
const PATIENCE: Duration = Duration::from_secs(60);

fn demo(flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.args(flags).stdin(Stdio::null());
    command
}

#[test]
fn the_demo_ends_with_ok() {
    let output = demo(&["--any-ports"]).output().expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(text.lines().last(), Some("demo: ok"), "{text}");
    let rows: Vec<&str> = text
        .lines()
        .filter(|line| line.ends_with("  yes"))
        .collect();
    assert_eq!(rows.len(), 6, "{text}");
    assert!(text.contains("ready after"), "{text}");
}

#[test]
fn a_taken_port_is_named_and_nothing_is_started() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let output = demo(&["--strict-ports", "--router-port", &port])
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains(&format!("demo: failed: port {port} (router)")),
        "{text}"
    );
    assert!(!text.contains("ready after"), "{text}");
}

#[test]
fn a_child_that_cannot_start_fails_the_run_with_its_words() {
    let output = demo(&["--any-ports", "--decode-tp", "3"])
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("decode ended") && text.contains("--tp must divide --kv-heads"),
        "{text}"
    );
    let logs = text
        .split("the logs are in ")
        .nth(1)
        .and_then(|rest| rest.split(':').next());
    std::fs::remove_dir_all(logs.expect("a folder").trim()).expect("logs are kept");
}

#[test]
fn an_interrupt_ends_every_process() {
    let (mut demo, mut out, children) = started();
    signal(demo.id(), "INT");
    let status = demo.wait().expect("an end");
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("text");
    assert_eq!(status.code(), Some(130), "{rest}");
    assert!(rest.contains("interrupted"), "{rest}");
    // The demo waits for its children, so they are gone by now.
    assert_eq!(children.iter().filter(|pid| lives(**pid)).count(), 0);
}

#[test]
fn a_killed_demo_leaves_nobody_behind() {
    let (mut demo, _out, children) = started();
    demo.kill().expect("it lives");
    demo.wait().expect("an end");
    let begun = Instant::now();
    while children.iter().any(|pid| lives(*pid)) {
        assert!(begun.elapsed() < PATIENCE, "{children:?} live on");
        std::thread::sleep(Duration::from_millis(5));
    }
    // It had no chance to remove its logs.
    let logs = std::env::temp_dir().join(format!("kvtransfer-demo-{}", demo.id()));
    std::fs::remove_dir_all(logs).expect("its logs");
}

/// A demo whose cluster is up, its output, and its children.
fn started() -> (Child, BufReader<ChildStdout>, Vec<u32>) {
    let mut demo = demo(&["--any-ports", "--keep"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("a process");
    let mut out = BufReader::new(demo.stdout.take().expect("a pipe"));
    let mut line = String::new();
    while !line.starts_with("ready after") {
        line.clear();
        assert_ne!(out.read_line(&mut line).expect("text"), 0, "it ended early");
    }
    let listed = line.split(['(', ')']).nth(1).expect("process ids");
    let children: Vec<u32> = listed
        .split(' ')
        .map(|pid| pid.parse().expect("a number"))
        .collect();
    assert_eq!(children.len(), 5, "{line}");
    assert!(children.iter().all(|pid| lives(*pid)), "{line}");
    (demo, out, children)
}

/// Whether a process exists and is not merely waiting to be reaped.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status();
    assert!(status.expect("a shell tool").success());
}
