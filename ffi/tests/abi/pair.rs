//! The example: two processes, and pages moved between them over TCP and over the same-host path.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::PathBuf,
    process::{Child, Stdio},
    sync::OnceLock,
};

use crate::build::{Language, command, compile, run};

fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| compile("examples/pair.c", Language::C, "pair"))
}

/// Ends with the test, however that ends.
struct Prefill(Child);

impl Drop for Prefill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn moves_pages(same_host: &str, path: &str) {
    let config = format!("{{\"same_host\": \"{same_host}\", \"listen\": \"127.0.0.1:0\"}}");
    let mut prefill = command(program());
    let prefill = prefill
        .args(["prefill", &config])
        .stdout(Stdio::piped())
        .spawn();
    let mut prefill = Prefill(prefill.expect("it was just compiled"));
    let mut said = BufReader::new(prefill.0.stdout.take().expect("it is piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("it speaks text");
    let address = line
        .strip_prefix("listening ")
        .map(str::trim)
        .expect("its first line");
    let config = format!("{{\"same_host\": \"{same_host}\"}}");
    let decode = run(program(), &["decode", address, &config]);
    assert!(decode.contains("decode: 6291520 bytes"), "{decode}");
    assert!(
        decode.contains(&format!("path {path}, 0 bytes differ\n")),
        "{decode}"
    );
    let mut rest = String::new();
    said.read_to_string(&mut rest).expect("it speaks text");
    assert!(rest.starts_with("prefill: 6291520 bytes"), "{rest}");
    assert!(prefill.0.wait().expect("it is ours").success());
}

#[test]
fn two_processes_move_pages_over_tcp() {
    moves_pages("off", "tcp");
}

#[test]
fn two_processes_move_pages_by_pulling() {
    moves_pages("pull", "shm-pull");
}

#[test]
fn two_processes_move_pages_through_a_ring() {
    moves_pages("ring", "shm-ring");
}

#[test]
fn a_wrong_use_is_told() {
    let ran = command(program()).output().expect("it was just compiled");
    assert_eq!(ran.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&ran.stderr).starts_with("usage: pair prefill"));
}
