//! The YAML of the guide that this router follows, unchanged, from its objects to a chat completion.

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::api::ApiServer;
use crate::cluster::POLICIES;
use crate::documents::documents;
use crate::fakes::{FakeWorker, Running, Script, event_stream, soon, whole};

const SEED: &str = include_str!("seed.yaml");

/// The guide's text as it was copied from its page, which lost the line breaks of its YAML.
const PAGE: &str = include_str!("seed.txt");

const SEED_POOLS: &str = "/apis/inference.networking.x-k8s.io/v1alpha2/inferencepools";

/// Answers of a chat as SGLang gives them.
const ANSWER: &str = r#"{"id":"1","object":"chat.completion","model":"/models/Qwen3-32B","choices":[{"index":0,"message":{"role":"assistant","content":"Hello"}}]}"#;

/// Loopback addresses of this test's own, so that its pods can all have the seed's ports.
fn ip(last: u8) -> String {
    let [low, high, ..] = std::process::id().to_le_bytes();
    format!("127.{}.{low}.{last}", 64 + high % 128)
}

fn pod(name: &str, ip: &str, role: &str) -> serde_json::Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {
            "alibabacloud.com/inference_backend": "sglang",
            "rolebasedgroup.workloads.x-k8s.io/role": role}},
        "status": {"podIP": ip, "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}})
}

async fn start(server: &ApiServer, options: &[&str]) -> (Child, Running) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvrouter"))
        .args([
            "--kubernetes",
            "--pool",
            "qwen-inference-pool",
            "--kubeconfig",
        ])
        .arg(server.kubeconfig())
        .args([
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--log-plain",
            "--probe-interval",
            "20ms",
        ])
        .args(options)
        .stderr(std::process::Stdio::piped())
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
            if let Some(at) = line.find("listening on http://127.0.0.1:") {
                return line[at + 13..]
                    .split_whitespace()
                    .next()
                    .unwrap()
                    .to_owned();
            }
        }
    })
    .await;
    // Reads on, so that the child never meets a closed or full pipe.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (child, Running::elsewhere(&url))
}

#[test]
fn the_copy_is_the_guides_word_for_word() {
    // What stands between two blocks is the page's next bullet.
    let words = |text: &'static str| {
        let lines = text.lines().map(|line| line.trim_end_matches(" -"));
        let words = lines
            .flat_map(str::split_whitespace)
            .filter(|word| *word != "---");
        words.collect::<Vec<_>>()
    };
    assert_eq!(words(SEED), words(PAGE));
    assert_eq!(documents(SEED).len(), 5);
}

/// Waits until the policy and the pool say that all is well.
async fn accepted(server: &ApiServer) {
    server
        .until("the policy is accepted", |server| {
            let policy = server.object(POLICIES, "inference-policy").unwrap();
            let conditions = policy["status"]["conditions"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            conditions
                .iter()
                .any(|one| one["type"] == "Accepted" && one["status"] == "True")
        })
        .await;
    server
        .until("the pool is accepted", |server| {
            let pool = server.object(SEED_POOLS, "qwen-inference-pool").unwrap();
            pool["status"]["parent"][0]["conditions"]
                .as_array()
                .is_some_and(|all| all.iter().all(|one| one["status"] == "True"))
        })
        .await;
}

#[tokio::test]
async fn the_guides_yaml_is_accepted_and_routes() {
    let server = ApiServer::start().await;
    for object in documents(SEED) {
        server.apply(&object);
    }
    let (first, second, third) = (ip(1), ip(2), ip(3));
    let mut prefills = [
        FakeWorker::start_at(&format!("{first}:8000")).await,
        FakeWorker::start_at(&format!("{second}:8000")).await,
    ];
    let mut decode = FakeWorker::start_at(&format!("{third}:8000")).await;
    // Their bootstrap servers, of which one does not know its ranks yet.
    let _bootstrap = FakeWorker::start_at(&format!("{first}:34000")).await;
    let late = FakeWorker::start_at(&format!("{second}:34000")).await;
    late.set_get_status(503);
    for (name, ip, role) in [
        ("prefill-0", &first, "prefill"),
        ("prefill-1", &second, "prefill"),
        ("decode-0", &third, "decode"),
    ] {
        server.apply(&pod(name, ip, role));
    }
    let (_child, router) = start(&server, &[]).await;
    router.ready(1, 1).await;
    let request = r#"{"model": "/models/Qwen3-32B", "messages": [{"role": "user", "content": "Hello, this is a test"}], "max_tokens": 50}"#;
    for _ in 0..3 {
        decode.then(Script::Reply(200, ANSWER));
        let (status, body) = whole(router.post("/v1/chat/completions", request).await).await;
        assert_eq!((status, body.as_str()), (200, ANSWER));
        let told = decode.request().await.json();
        let asked = prefills[0].request().await.json();
        assert_eq!(
            (&told["bootstrap_host"], &told["bootstrap_port"]),
            (&json!(first), &json!(34000))
        );
        assert_eq!(told["bootstrap_room"], asked["bootstrap_room"]);
        assert_eq!(told["max_tokens"], 50);
    }
    assert!(prefills[1].request_now().is_none());
    late.set_get_status(200);
    router.ready(2, 1).await;
    accepted(&server).await;
    // Pods that RoleBasedGroup makes today carry its new label only.
    server.change("/api/v1/pods", "prefill-0", |pod| {
        let labels = pod["metadata"]["labels"].as_object_mut().unwrap();
        labels.remove("rolebasedgroup.workloads.x-k8s.io/role");
        labels.insert(
            "rbg.workloads.x-k8s.io/role-name".to_owned(),
            "prefill".into(),
        );
    });
    server.delete("/api/v1/pods", "prefill-1");
    router.ready(1, 1).await;
    assert_eq!(
        whole(router.post("/v1/chat/completions", request).await)
            .await
            .0,
        200
    );
    assert_eq!(soon(prefills[0].request()).await.json()["max_tokens"], 50);
}

#[tokio::test]
async fn models_are_rewritten_in_place() {
    let server = ApiServer::start().await;
    for object in documents(SEED) {
        server.apply(&object);
    }
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    for (name, worker, role) in [
        ("prefill-0", &prefill, "prefill"),
        ("decode-0", &decode, "decode"),
    ] {
        let mut pod = pod(name, "127.0.0.1", role);
        let port = worker.url.rsplit(':').next().unwrap();
        // The prefill worker's fake serves its bootstrap questions too.
        pod["metadata"]["annotations"] =
            json!({"kvtransfer.io/port": port, "kvtransfer.io/bootstrap-port": port});
        server.apply(&pod);
    }
    server.apply(&json!({"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceModel",
        "metadata": {"name": "food"}, "spec": {"modelName": "food-review", "criticality": "Critical",
            "poolRef": {"name": "qwen-inference-pool"}, "targetModels": [{"name": "/models/Qwen3-32B"}]}}));
    let (_child, router) = start(&server, &[]).await;
    router.ready(1, 1).await;
    let body = r#"{"seed":12345678901234567890, "model" :"food-review","messages":[]}"#;
    assert_eq!(
        whole(router.post("/v1/chat/completions", body).await)
            .await
            .0,
        200
    );
    let told = decode.request().await;
    let text = std::str::from_utf8(&told.body).unwrap();
    assert!(
        text.ends_with(
            r#""seed":12345678901234567890, "model" :"/models/Qwen3-32B","messages":[]}"#
        ),
        "{text}"
    );
    assert_eq!(
        told.json()["bootstrap_port"],
        json!(
            prefill
                .url
                .rsplit(':')
                .next()
                .unwrap()
                .parse::<u16>()
                .unwrap()
        )
    );
}

#[tokio::test]
async fn objectives_order_the_queue() {
    let server = ApiServer::start().await;
    for object in documents(SEED) {
        server.apply(&object);
    }
    server.apply(&json!({"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceObjective",
        "metadata": {"name": "batch"}, "spec": {"priority": -10, "poolRef": {"name": "qwen-inference-pool"}}}));
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    for (name, worker, role) in [("p", &prefill, "prefill"), ("d", &decode, "decode")] {
        let mut pod = pod(name, "127.0.0.1", role);
        let port = worker.url.rsplit(':').next().unwrap();
        pod["metadata"]["annotations"] =
            json!({"kvtransfer.io/port": port, "kvtransfer.io/bootstrap-port": port});
        server.apply(&pod);
    }
    let (_child, router) = start(&server, &["--max-concurrent-requests", "1"]).await;
    router.ready(1, 1).await;
    let router = std::sync::Arc::new(router);
    let (chunks, script) = event_stream();
    decode.then(script);
    let mut asked = tokio::task::JoinSet::new();
    let requests = [
        ("first", [("x-none", "none")]),
        // Its own priority cannot lift it above its objective.
        ("batch", [("x-gateway-inference-objective", "batch")]),
        ("usual", [("x-gateway-inference-objective", "unknown")]),
    ];
    for (waiting, (text, headers)) in requests.into_iter().enumerate() {
        let router_here = std::sync::Arc::clone(&router);
        asked.spawn(async move {
            let priority = if text == "batch" { 100 } else { 0 };
            let body = format!(r#"{{"text":"{text}","priority":{priority}}}"#);
            let answer = router_here
                .send(hyper::Method::POST, "/generate", &headers, body)
                .await;
            assert_eq!(whole(answer).await.0, 200);
        });
        if waiting == 0 {
            assert_eq!(decode.request().await.json()["text"], "first");
        } else {
            let waiting = u64::try_from(waiting).unwrap();
            soon(async {
                while router.metric("kvrouter_queued_requests").await != waiting {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        }
    }
    chunks.send(Ok("data: [DONE]\n\n".into())).await.unwrap();
    drop(chunks);
    assert_eq!(decode.request().await.json()["text"], "usual");
    assert_eq!(decode.request().await.json()["text"], "batch");
    while let Some(done) = asked.join_next().await {
        done.unwrap();
    }
}
