//! Real workers, a real router, one slow link: what the workers tell of their queues decides where requests go.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser as _;
use kvrouter::discover::{Fleet, FleetWatch, Member};
use kvrouter::pool::Role;
use kvrouter::{Config, Router};
use kvworker::client::Client;
use kvworker::plane;
use kvworker::settings::Settings;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Long enough for any machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Prefills tell decodes to come here, where the wire stands in between.
const WIRE_IP: &str = "127.0.0.2";

/// Bytes per second of the slow link; the prompt below needs some ten seconds.
const SLOW: usize = 200_000;

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A worker on ports of its own, until the test ends.
struct Worker {
    url: String,
    info: Value,
}

impl Worker {
    async fn start(mode: &str, flags: &[&str]) -> Self {
        let args = [
            "kvworker",
            "--port",
            "0",
            "--layers",
            "2",
            "--transfer-path",
            "tcp",
            "--telemetry-port",
            "0",
            "--disaggregation-bootstrap-port",
            "0",
            "--disaggregation-mode",
            mode,
        ];
        let settings = Settings::parse_from(args.iter().chain(flags));
        let server = settings.build(plane::build).await.expect("a worker");
        let url = format!("http://{}", server.address().expect("an address"));
        tokio::spawn(server.run(std::future::pending::<()>()));
        let info = until("never ready", async || {
            let (status, _) = Client::default().get(&format!("{url}/ready")).await.ok()?;
            if !status.is_success() {
                return None;
            }
            let (_, info) = Client::default()
                .get(&format!("{url}/server_info"))
                .await
                .ok()?;
            Some(info)
        })
        .await;
        Self { url, info }
    }

    fn member(&self, name: &str, role: Role) -> Member {
        let plane = &self.info["kvtransfer"];
        let port = |address: &Value| {
            let address: SocketAddr = address.as_str()?.parse().ok()?;
            Some(address.port())
        };
        Member {
            name: name.to_owned(),
            role,
            url: self.url.parse().expect("a URL"),
            bootstrap_port: port(&plane["bootstrap"]),
            telemetry_port: Some(port(&plane["telemetry"]).expect("telemetry")),
            zone: None,
            draining: false,
        }
    }
}

/// Carries the connections of decodes to the prefill, those made while `slow` slowly for ever.
async fn wire(listener: TcpListener, to: SocketAddr, slow: Arc<AtomicBool>) {
    while let Ok((decode, _)) = listener.accept().await {
        let is_slow = slow.load(Ordering::Relaxed);
        let prefill = TcpStream::connect(to).await.expect("the prefill listens");
        for stream in [&decode, &prefill] {
            stream.set_nodelay(true).expect("a socket");
        }
        let (from_decode, to_decode) = decode.into_split();
        let (from_prefill, to_prefill) = prefill.into_split();
        tokio::spawn(carry(from_decode, to_prefill, false));
        tokio::spawn(carry(from_prefill, to_decode, is_slow));
    }
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    is_slow: bool,
) {
    let mut buffer = vec![0; SLOW / 50];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        if is_slow {
            sleep(Duration::from_secs_f64(count as f64 / SLOW as f64)).await;
        }
    }
}

fn fleet(members: &[&Member]) -> FleetWatch {
    let members = members.iter().map(|member| (*member).clone()).collect();
    let fleet = Fleet {
        members,
        models: Vec::new(),
    };
    tokio::sync::watch::channel(Arc::new(fleet)).1
}

/// A router in front of these workers; they are ready.
async fn router(members: &[&Member]) -> String {
    let mut config = Config::new(Vec::new(), Vec::new());
    config.host = "127.0.0.1".to_owned();
    config.port = 0;
    config.probe_interval = Duration::from_millis(100);
    let router = Router::bind_with(config, fleet(members))
        .await
        .expect("a router");
    let url = format!("http://{}", router.local_addr());
    tokio::spawn(router.serve(std::future::pending::<()>()));
    let decodes = members.len() - 1;
    until("the router never saw its workers", async || {
        let (_, state) = Client::default().get(&format!("{url}/ready")).await.ok()?;
        (state["ready_decode_workers"] == decodes && state["ready_prefill_workers"] == 1)
            .then_some(())
    })
    .await;
    url
}

async fn generate(router: &str, length: usize) {
    let body = json!({
        "input_ids": (0..length).map(|at| at % 250).collect::<Vec<_>>(),
        "sampling_params": {"max_new_tokens": 2},
    });
    let (status, answer) = Client::default()
        .post(&format!("{router}/generate"), &body)
        .await
        .expect("an answer");
    assert!(status.is_success(), "{answer}");
}

async fn decisions(router: &str, count: usize) -> Vec<Value> {
    let url = format!("{router}/debug/decisions?limit={count}");
    let (_, page) = Client::default().get(&url).await.expect("a page");
    page["decisions"].as_array().expect("a list").clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_link_is_avoided_by_a_router_that_never_used_it() {
    let prefill = Worker::start("prefill", &["--advertise-ip", WIRE_IP]).await;
    let (slow, fast) = (
        Worker::start("decode", &[]).await,
        Worker::start("decode", &[]).await,
    );
    let rank = &prefill.info["kvtransfer"]["ranks"][0]["address"];
    let rank: SocketAddr = rank
        .as_str()
        .expect("an address")
        .parse()
        .expect("an address");
    let listener = TcpListener::bind((WIRE_IP, rank.port()))
        .await
        .expect("loopback");
    let is_slow = Arc::new(AtomicBool::new(true));
    tokio::spawn(wire(listener, rank, Arc::clone(&is_slow)));
    let (p, s, f) = (
        prefill.member("prefill", Role::Prefill),
        slow.member("slow", Role::Decode),
        fast.member("fast", Role::Decode),
    );

    // One router knows the slow decode alone, and makes its connections slow ones.
    let busy = router(&[&p, &s]).await;
    generate(&busy, 4).await;
    is_slow.store(false, Ordering::Relaxed);
    // The other one sees no booking of the first; only the prefill itself can tell.
    let fresh = router(&[&p, &s, &f]).await;
    let long = tokio::spawn({
        let busy = busy.clone();
        async move { generate(&busy, 1000).await }
    });
    // Those that were sent before anything was told may stand behind the long one; they are not waited for here.
    let mut short = JoinSet::new();
    until("the slow link is not avoided", async || {
        for _ in 0..6 {
            let fresh = fresh.clone();
            short.spawn(async move { generate(&fresh, 4).await });
            sleep(Duration::from_millis(30)).await;
        }
        let made = decisions(&fresh, 6).await;
        let told = |one: &Value| one["decode"] == "fast" && one["sample_age_s"].is_f64();
        made.iter().all(told).then_some(())
    })
    .await;
    assert!(!long.is_finished(), "the slow link was busy meanwhile");
    // Rooms in telemetry belong to bookings.
    until("no room was joined to its booking", async || {
        let made = decisions(&fresh, 1).await;
        let actual = &made[0]["actual"];
        (actual["ready_s"].is_f64() && actual["sent_s"].is_f64()).then_some(())
    })
    .await;
    long.await.expect("the long prompt is served too");
    while let Some(served) = short.join_next().await {
        served.expect("a short prompt is served");
    }
}
