//! Workers of this process on ephemeral ports, and what tests ask of them.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Parser as _;
use hyper::StatusCode;
use kvworker::client::Client;
use kvworker::plane;
use kvworker::settings::Settings;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Long enough for any machine, short enough to end a broken test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Rooms of this process never repeat.
static NEXT_ROOM: AtomicU64 = AtomicU64::new(1);

pub(crate) fn next_room() -> u64 {
    NEXT_ROOM.fetch_add(1, Ordering::Relaxed)
}

/// A worker; it stops when this is dropped, or at [`Worker::stop`].
pub(crate) struct Worker {
    pub(crate) address: SocketAddr,
    bootstrap: Option<SocketAddr>,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl Worker {
    pub(crate) async fn try_start(flags: &[&str]) -> anyhow::Result<Self> {
        let args = ["kvworker", "--port", "0", "--layers", "2"]
            .iter()
            .chain(flags);
        let server = Settings::parse_from(args).build(plane::build).await?;
        let address = server.address()?;
        let bootstrap = server.watch().and_then(|watch| watch.bootstrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            let stopping = async {
                let _dropped = stopped.await;
            };
            server.run(stopping).await.expect("serving");
        });
        Ok(Self {
            address,
            bootstrap,
            stop,
            served,
        })
    }

    pub(crate) async fn start(flags: &[&str]) -> Self {
        let worker = Self::try_start(flags).await.expect("a worker");
        worker.wait_ready().await;
        worker
    }

    pub(crate) async fn prefill(flags: &[&str]) -> Self {
        Self::prefill_at("0", flags).await
    }

    pub(crate) async fn prefill_at(bootstrap_port: &str, flags: &[&str]) -> Self {
        let mode = [
            "--disaggregation-mode",
            "prefill",
            "--disaggregation-bootstrap-port",
            bootstrap_port,
        ];
        Self::start(&[&mode, flags].concat()).await
    }

    pub(crate) async fn decode(flags: &[&str]) -> Self {
        Self::start(&[&["--disaggregation-mode", "decode"], flags].concat()).await
    }

    async fn wait_ready(&self) {
        let start = Instant::now();
        while !self.get("/ready").await.0.is_success() {
            assert!(start.elapsed() < PATIENCE, "never ready");
            sleep(Duration::from_millis(2)).await;
        }
    }

    pub(crate) fn bootstrap_port(&self) -> u16 {
        self.bootstrap.expect("a prefill").port()
    }

    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.served.await.expect("a clean end");
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let url = format!("http://{}{path}", self.address);
        Client::default().get(&url).await.expect("an answer")
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let url = format!("http://{}{path}", self.address);
        Client::default().post(&url, body).await.expect("an answer")
    }

    /// The path of every connection.
    pub(crate) async fn paths(&self) -> Vec<String> {
        let info = self.get("/server_info").await.1;
        let ranks = info["kvtransfer"]["ranks"]
            .as_array()
            .expect("ranks")
            .clone();
        let peers = ranks
            .iter()
            .flat_map(|rank| rank["peers"].as_array().expect("peers").clone());
        peers
            .map(|peer| peer["path"].as_str().expect("a path").to_owned())
            .collect()
    }

    pub(crate) async fn last_transfer(&self) -> Value {
        let listed = self.get("/debug/transfers").await.1;
        listed["transfers"]
            .as_array()
            .expect("a list")
            .last()
            .expect("a transfer")
            .clone()
    }

    /// One number of `/v1/loads`.
    pub(crate) async fn load(&self, path: &str) -> u64 {
        let loads = self.get("/v1/loads").await.1;
        loads["loads"][0]
            .pointer(path)
            .and_then(Value::as_u64)
            .expect("a number")
    }

    /// Waits until a number of `/v1/loads` is `wanted`.
    pub(crate) async fn wait_load(&self, path: &str, wanted: u64) {
        let start = Instant::now();
        while self.load(path).await != wanted {
            assert!(start.elapsed() < PATIENCE, "{path} never became {wanted}");
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// A prefill and a decode that share nothing but the network.
pub(crate) struct Pair {
    pub(crate) prefill: Worker,
    pub(crate) decode: Worker,
}

impl Pair {
    pub(crate) async fn start(prefill: &[&str], decode: &[&str]) -> Self {
        Self {
            prefill: Worker::prefill(prefill).await,
            decode: Worker::decode(decode).await,
        }
    }

    /// Sends both legs as a router does; both must succeed.
    pub(crate) async fn ask(&self, body: &Value) -> (Value, Value) {
        self.ask_over(&self.prefill, body).await
    }

    pub(crate) async fn ask_over(&self, prefill: &Worker, body: &Value) -> (Value, Value) {
        let body = routed(body, prefill.bootstrap_port(), next_room());
        let legs = (
            prefill.post("/generate", &body),
            self.decode.post("/generate", &body),
        );
        let (first, second) = tokio::join!(legs.0, legs.1);
        assert!(
            first.0.is_success() && second.0.is_success(),
            "{first:?} {second:?}"
        );
        (first.1, second.1)
    }

    /// Nothing is leased on either side any more.
    pub(crate) async fn assert_idle(&self) {
        for worker in [&self.prefill, &self.decode] {
            worker.wait_load("/num_used_tokens", 0).await;
        }
    }
}

/// A request with a router's fields.
pub(crate) fn routed(body: &Value, bootstrap_port: u16, room: u64) -> Value {
    let mut body = body.clone();
    body["bootstrap_host"] = json!("127.0.0.1");
    body["bootstrap_port"] = json!(bootstrap_port);
    body["bootstrap_room"] = json!(room);
    body
}

pub(crate) fn generate(prompt: &[u32], max_new_tokens: usize) -> Value {
    json!({ "input_ids": prompt, "sampling_params": { "max_new_tokens": max_new_tokens, "ignore_eos": true } })
}

/// A prompt of exactly `len` tokens.
pub(crate) fn prompt(len: usize, salt: u32) -> Vec<u32> {
    (0_u32..)
        .take(len)
        .map(|i| (i * 31 + salt * 7 + i * i % 11) % 96 + 32)
        .collect()
}
