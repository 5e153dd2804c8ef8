//! The binary as a process of its own.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::fakes::{FakeWorker, Running, soon, whole};

/// Starts the binary on a free port and waits until it says where it listens.
async fn start(prefill: &FakeWorker, decode: &FakeWorker) -> (Child, Running) {
    start_by("exec \"$0\" \"$@\"", prefill, decode).await
}

/// The same by a line of shell, whose `$0` and `$@` are the command.
async fn start_by(shell: &str, prefill: &FakeWorker, decode: &FakeWorker) -> (Child, Running) {
    let mut child = Command::new("sh")
        .args(["-c", shell, env!("CARGO_BIN_EXE_kvrouter")])
        .args([
            "--pd-disaggregation",
            "--prefill",
            &prefill.url,
            "8998",
            "--decode",
            &decode.url,
        ])
        .args(["--host", "127.0.0.1", "--port", "0", "--log-plain"])
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let url = soon(async {
        loop {
            let line = lines
                .next_line()
                .await
                .unwrap()
                .expect("it ended without listening");
            if let Some((_, url)) = line.split_once("listening on ") {
                return url.split_whitespace().next().unwrap().to_owned();
            }
        }
    })
    .await;
    // Reads on, so that the child never meets a closed or full pipe.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (child, Running::elsewhere(&url))
}

#[tokio::test]
async fn the_binary_serves_until_sigterm() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let (mut child, router) = start(&prefill, &decode).await;
    assert_eq!(
        whole(router.post("/generate", r#"{"text":"a"}"#).await)
            .await
            .0,
        200
    );
    assert_eq!(decode.request().await.json()["text"], "a");
    let pid = child.id().unwrap().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .await
            .unwrap()
            .success()
    );
    assert!(soon(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn the_binary_takes_the_file_descriptors_that_it_may_have() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let limits = |pid: u32| {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"));
        let numbers: Vec<String> = line
            .unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        (numbers[0].clone(), numbers[1].clone())
    };
    let (mut child, _router) =
        start_by("ulimit -S -n 99; exec \"$0\" \"$@\"", &prefill, &decode).await;
    let (soft, hard) = limits(child.id().unwrap());
    assert_ne!(hard, "99", "a limit below that of this test says nothing");
    assert_eq!(soft, hard);
    child.kill().await.unwrap();
}

/// User and system time of a process, in microseconds, from `/proc/PID/stat` (100 ticks a second on Linux).
fn cpu_micros(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    let fields: Vec<u64> = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse().unwrap())
        .collect();
    (fields[0] + fields[1]) * 10_000
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo nextest run --release -p kvrouter --run-ignored only --no-capture"]
#[expect(clippy::disallowed_methods, reason = "it measures real time")]
async fn cpu_per_request() {
    const REQUESTS: u64 = 20_000;
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let (child, router) = start(&prefill, &decode).await;
    let router = std::sync::Arc::new(router);
    for (name, bytes) in [("200 B", 200), ("32 KiB", 32 << 10)] {
        for concurrency in [1, 32] {
            let body = bytes::Bytes::from(format!("{{\"text\":\"{}\"}}", "x".repeat(bytes)));
            let requests = if concurrency == 1 {
                REQUESTS / 4
            } else {
                REQUESTS
            };
            let (before, begin) = (cpu_micros(child.id().unwrap()), std::time::Instant::now());
            let mut clients = tokio::task::JoinSet::new();
            for _ in 0..concurrency {
                let (router, body) = (router.clone(), body.clone());
                clients.spawn(async move {
                    for _ in 0..requests / concurrency {
                        assert_eq!(
                            whole(router.post("/generate", body.clone()).await).await.0,
                            200
                        );
                    }
                });
            }
            while let Some(client) = clients.join_next().await {
                client.unwrap();
            }
            let wall = begin.elapsed();
            let cpu = cpu_micros(child.id().unwrap()) - before;
            println!(
                "{name} c={concurrency}: {} us CPU per request, {:.0} requests/s, {:?} each",
                cpu / requests,
                requests as f64 / wall.as_secs_f64(),
                wall * u32::try_from(concurrency).unwrap() / u32::try_from(requests).unwrap(),
            );
        }
    }
    let (_, text) = router.read("/metrics").await;
    for line in text
        .lines()
        .filter(|line| line.starts_with("kvrouter_added_latency"))
    {
        println!("{line}");
    }
}
