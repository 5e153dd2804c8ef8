//! The YAML of the guide, unchanged, to a chat completion: a scripted API server, the router, and real workers that move a
//! real KV cache.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    missing_docs,
    reason = "a test binary that shares files with the router's"
)]

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser as _;
use kvrouter::config::CommandLine;
use kvrouter::discover::source;
use kvworker::client::Client;
use kvworker::plane;
use kvworker::settings::Settings;
use serde_json::{Value as Json, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

#[allow(
    dead_code,
    reason = "written for the router's tests, which use all of it"
)]
#[path = "../../router/tests/kubernetes/api.rs"]
mod api;
#[path = "../../router/tests/kubernetes/documents.rs"]
mod documents;

const SEED: &str = include_str!("../../router/tests/kubernetes/seed.yaml");

/// Long enough for any machine, short enough to end a broken test.
const PATIENCE: Duration = Duration::from_secs(60);

/// Loopback addresses of this test's own, so that all of its pods can have the guide's ports.
fn ip(last: u8) -> String {
    let [low, high, ..] = std::process::id().to_le_bytes();
    format!("127.{}.{low}.{last}", 64 + high % 128)
}

/// Starts a worker with the guide's ports at the address of a pod.
async fn worker(ip: &str, mode: &str, tasks: &mut JoinSet<()>) {
    let flags = [
        "kvworker",
        "--host",
        ip,
        "--port",
        "8000",
        "--layers",
        "2",
        "--disaggregation-mode",
        mode,
        "--disaggregation-bootstrap-port",
        "34000",
        "--model-path",
        "/models/Qwen3-32B",
    ];
    let server = Settings::parse_from(flags)
        .build(plane::build)
        .await
        .unwrap();
    tasks.spawn(async move { server.run(std::future::pending()).await.unwrap() });
}

fn pod(name: &str, ip: &str, role: &str) -> Json {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {
            "alibabacloud.com/inference_backend": "sglang",
            "rolebasedgroup.workloads.x-k8s.io/role": role}},
        "status": {"podIP": ip, "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}})
}

/// The router as its command line starts it, on a port of the system's choice.
async fn router(server: &api::ApiServer, tasks: &mut JoinSet<()>) -> SocketAddr {
    let line = [
        "kvrouter",
        "--kubernetes",
        "--pool",
        "default/qwen-inference-pool",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--probe-interval",
        "50ms",
    ];
    let line = line.map(std::ffi::OsString::from).into_iter();
    let kubeconfig = ["--kubeconfig".into(), server.kubeconfig().into()];
    let line = CommandLine::from_args(line.chain(kubeconfig)).unwrap();
    let fleet = source::follow(line.source, &line.config, tasks)
        .await
        .unwrap();
    let router = kvrouter::Router::bind_with(line.config, fleet)
        .await
        .unwrap();
    let address = router.local_addr();
    tasks.spawn(router.serve(std::future::pending()));
    address
}

async fn until(url: &str, what: impl Fn(&Json) -> bool) {
    let begun = Instant::now();
    loop {
        let (_, answer) = Client::default().get(url).await.unwrap();
        if what(&answer) {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "it never came to this: {answer}"
        );
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guides_yaml_ends_in_a_chat_completion_by_real_workers() {
    let mut tasks = JoinSet::new();
    let server = api::ApiServer::start().await;
    for object in documents::documents(SEED) {
        server.apply(&object);
    }
    server.apply(&json!({"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceModel",
        "metadata": {"name": "qwen"}, "spec": {"modelName": "qwen", "poolRef": {"name": "qwen-inference-pool"},
            "targetModels": [{"name": "/models/Qwen3-32B"}]}}));
    let address = router(&server, &mut tasks).await;
    let pods = [
        ("prefill-0", ip(1), "prefill"),
        ("prefill-1", ip(2), "prefill"),
        ("decode-0", ip(3), "decode"),
    ];
    for (name, ip, role) in &pods {
        worker(ip, role, &mut tasks).await;
        server.apply(&pod(name, ip, role));
    }
    until(&format!("http://{address}/ready"), |state| {
        state["ready_prefill_workers"] == 2 && state["ready_decode_workers"] == 1
    })
    .await;
    let chat = format!("http://{address}/v1/chat/completions");
    for model in ["/models/Qwen3-32B", "qwen"] {
        let request = json!({"model": model, "max_tokens": 50,
            "messages": [{"role": "user", "content": "Hello, this is a test"}]});
        let (status, answer) = Client::default().post(&chat, &request).await.unwrap();
        assert!(status.is_success(), "{status} {answer}");
        assert_eq!(answer["model"], "/models/Qwen3-32B", "{answer}");
        assert!(
            !answer["choices"][0]["message"]["content"]
                .as_str()
                .unwrap()
                .is_empty(),
            "{answer}"
        );
        assert!(
            answer["usage"]["completion_tokens"].as_u64().unwrap() > 0,
            "{answer}"
        );
    }
    let (_, models) = Client::default()
        .get(&format!("http://{address}/v1/models"))
        .await
        .unwrap();
    let names: Vec<&Json> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(names, ["/models/Qwen3-32B", "qwen"]);
    // Both prefill workers are needed: when one goes, the other serves on.
    server.delete("/api/v1/pods", "prefill-0");
    until(&format!("http://{address}/ready"), |state| {
        state["ready_prefill_workers"] == 1
    })
    .await;
    let request = json!({"model": "qwen", "max_tokens": 5, "messages": [{"role": "user", "content": "Again"}]});
    let (status, answer) = Client::default().post(&chat, &request).await.unwrap();
    assert!(status.is_success(), "{status} {answer}");
}
