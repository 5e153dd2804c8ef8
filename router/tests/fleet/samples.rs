//! What workers tell changes where requests go.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvrouter::Config;
use kvrouter::config::WorkerUrl;
use kvrouter::config::scheduling::Scheduling;
use kvrouter::config::telemetry::Telemetry;
use kvrouter::schedule::Policy;
use kvtransfer::serve::telemetry::{TelemetryConfig, TelemetryServer};
use kvtransfer::telemetry::snapshot::{RailStat, RoomStat, Snapshot};
use kvtransfer::token::BearerToken;
use serde_json::{Value as Json, json};

use crate::fakes::{FakeWorker, Running, Script, config, event_stream, soon, whole};

const BODY: &str = r#"{"text":"a"}"#;

/// The engine of a worker, of which the test draws the picture.
struct Engine {
    server: TelemetryServer,
    picture: Arc<Mutex<Snapshot>>,
}

impl Engine {
    fn start(instance: &str, token: &BearerToken) -> Self {
        let picture = Arc::new(Mutex::new(Snapshot {
            instance: instance.to_owned(),
            epoch: 1,
            ..Snapshot::default()
        }));
        let mut config = TelemetryConfig::default();
        config.token = Some(token.clone());
        config.interval = Duration::from_millis(5);
        let drawn = Arc::clone(&picture);
        let source = Arc::new(move || drawn.lock().unwrap().clone());
        Self {
            server: TelemetryServer::start(config, source).unwrap(),
            picture,
        }
    }

    fn port(&self, worker: &FakeWorker) -> (WorkerUrl, u16) {
        (worker.url.parse().unwrap(), self.server.addr().port())
    }

    /// So many bytes wait for `peer`.
    fn queue(&self, peer: &str, bytes: u64) {
        let rail = RailStat {
            peer: peer.to_owned(),
            peer_addr: "127.0.0.1:9".to_owned(),
            rail: "tcp/0".to_owned(),
            bytes_queued: bytes,
            rate_bytes_per_s: 1e9,
            ..RailStat::default()
        };
        self.picture.lock().unwrap().rails = vec![rail];
    }
}

async fn decisions(router: &Running, count: usize) -> Vec<Json> {
    let (_, text) = router
        .read(&format!("/debug/decisions?limit={count}"))
        .await;
    let page: Json = serde_json::from_str(&text).unwrap();
    page["decisions"].as_array().unwrap().clone()
}

/// Sends requests until a decision was made with a fresh sample, and further ones until all go to `decode`.
async fn until_all_go_to(router: &Running, decode: &FakeWorker) {
    let name = decode.url.strip_prefix("http://").unwrap();
    soon(async {
        loop {
            for _ in 0..8 {
                whole(router.post("/generate", BODY).await).await;
            }
            let made = decisions(router, 8).await;
            let all = made
                .iter()
                .all(|one| one["decode"] == name && one["sample_age_s"].is_f64());
            if all {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn bytes_before_a_wire_send_requests_elsewhere() {
    let (prefill, left, right) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let token = BearerToken::new("secret").unwrap();
    let (p, l, r) = (
        Engine::start("p", &token),
        Engine::start("l", &token),
        Engine::start("r", &token),
    );
    r.picture.lock().unwrap().engines = vec!["r".to_owned(), "r1".to_owned()];
    let router = Running::start(Config {
        telemetry: Telemetry {
            ports: vec![p.port(&prefill), l.port(&left), r.port(&right)],
            token: Some(token),
            ..Telemetry::default()
        },
        scheduling: Scheduling::with(Policy::Fused),
        ..config(&[&prefill.url], &[&left.url, &right.url])
    })
    .await;
    router.ready(1, 2).await;
    p.queue("l", 4 << 30);
    until_all_go_to(&router, &right).await;
    // The second engine of the other worker is known too.
    p.queue("r1", 4 << 30);
    until_all_go_to(&router, &left).await;
    // Another start of the engine: its numbers replace the former ones.
    {
        let mut picture = p.picture.lock().unwrap();
        picture.epoch = 2;
        picture.rails[0].peer = "l".to_owned();
    }
    until_all_go_to(&router, &right).await;
}

#[tokio::test]
async fn rooms_in_telemetry_are_joined_to_their_bookings() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let token = BearerToken::new("secret").unwrap();
    let engine = Engine::start("p", &token);
    let router = Running::start(Config {
        telemetry: Telemetry {
            ports: vec![engine.port(&prefill)],
            token: Some(token),
            ..Telemetry::default()
        },
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    router.ready(1, 1).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    prefill.then(Script::Hang);
    let answer = router.post("/generate", r#"{"text":"a","stream":true}"#);
    let telling = async {
        let room = prefill.request().await.json()["bootstrap_room"]
            .as_u64()
            .unwrap();
        {
            let mut picture = engine.picture.lock().unwrap();
            picture.monotonic_ns = 2_000_000_000;
            picture.rooms = vec![RoomStat {
                room,
                state: "success".to_owned(),
                enqueued_ns: 1_000_000_000,
                first_byte_ns: 1_100_000_000,
                pushed_ns: 1_999_000_000,
                done_ns: 1_999_500_000,
                bytes: 4096,
                ..RoomStat::default()
            }];
        }
        soon(async {
            loop {
                let actual = &decisions(&router, 1).await[0]["actual"];
                if actual["sent_s"].is_f64() {
                    assert!(actual["ready_s"].as_f64() <= actual["sent_s"].as_f64());
                    assert!(actual["ttft_s"].is_null());
                    return;
                }
            }
        })
        .await;
        drop(chunks);
    };
    let (_, ()) = tokio::join!(async { whole(answer.await).await }, telling);
}

#[tokio::test]
async fn full_kv_pools_in_loads_send_requests_elsewhere() {
    let (prefill, full, free) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let loads = |used: u64| {
        json!({"loads": [{"dp_rank": 0, "num_running_reqs": 1, "num_used_tokens": used,
                          "num_total_tokens": used, "max_total_num_tokens": 10_000}]})
    };
    full.set_loads(&loads(10_000));
    free.set_loads(&loads(10));
    let router = Running::start(Config {
        telemetry: Telemetry {
            loads_interval: Some(Duration::from_millis(20)),
            ..Telemetry::default()
        },
        scheduling: Scheduling::with(Policy::RoundRobin),
        ..config(&[&prefill.url], &[&full.url, &free.url])
    })
    .await;
    router.ready(1, 2).await;
    let name = free.url.strip_prefix("http://").unwrap();
    soon(async {
        loop {
            for _ in 0..6 {
                assert_eq!(whole(router.post("/generate", BODY).await).await.0, 200);
            }
            let made = decisions(&router, 6).await;
            if made.iter().all(|one| one["decode"] == name) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
