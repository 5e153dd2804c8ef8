//! The same request through Envoy and through the router's own front: the workers must see the same.

use hyper::Method;
use serde_json::Value as Json;

use crate::fakes::{FakeWorker, Received, whole};
use crate::gateway::{Gateway, Setup, config};

/// What may differ: rooms and ids, which are drawn.
fn without_drawn(received: &Received) -> (String, String) {
    let mut text = String::from_utf8(received.body.to_vec()).unwrap();
    let json: Json = received.json();
    for name in ["bootstrap_room", "rid"] {
        let values = match &json[name] {
            Json::Array(items) => items.clone(),
            one => vec![one.clone()],
        };
        for value in values {
            text = text.replacen(&value.to_string(), "*", 1);
        }
    }
    (received.target.clone(), text)
}

/// Headers that a client or the router gave; what each hop writes of itself is left out.
fn own_headers(received: &Received) -> Vec<(String, String)> {
    const HOPS: [&str; 8] = [
        "host",
        "content-length",
        "transfer-encoding",
        "x-forwarded-proto",
        "x-request-id",
        "x-envoy-expected-rq-timeout-ms",
        "x-gateway-destination-endpoint",
        "connection",
    ];
    let mut headers: Vec<_> = received
        .headers
        .iter()
        .filter(|(name, _)| !HOPS.contains(&name.as_str()))
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    headers.sort();
    headers
}

const CASES: [(&str, &str); 14] = [
    (
        "/generate",
        r#"{"text":"hi","sampling_params":{"max_new_tokens":4}}"#,
    ),
    (
        "/generate?trace=1",
        r#"{ "text" : "hi" , "stream" : true }"#,
    ),
    ("/generate", r#"{"input_ids":[[1,2],[3,4],[5]]}"#),
    ("/generate", r#"{"text":["a","b"],"rid":["x","y"]}"#),
    (
        "/generate",
        r#"{"text":"a","kv_hints":{"a":1.500E+02},"zzz":"\u00e9\t","priority":7}"#,
    ),
    (
        "/generate",
        r#"{"text":"a","bootstrap_room":7,"bootstrap_host":"evil","routed_dp_rank":3,"rid":null}"#,
    ),
    ("/generate", r#"{"text":"a","rid":"mine"}"#),
    ("/generate", "{}"),
    (
        "/v1/chat/completions",
        r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":5}"#,
    ),
    (
        "/v1/chat/completions",
        r#"{"model":"m","messages":[],"stream":true,"n":1}"#,
    ),
    (
        "/v1/completions",
        r#"{"model":"m","prompt":["a","b"],"max_tokens":2}"#,
    ),
    ("/v1/completions", r#"{"prompt":[1,2,3]}"#),
    ("/v1/responses", r#"{"model":"m","input":"hi"}"#),
    (
        "/v1/messages",
        r#"{"model":"m","max_tokens":5,"messages":[{"role":"user","content":"hi"}]}"#,
    ),
];

const HEADERS: [(&str, &str); 6] = [
    ("content-type", "application/json"),
    ("authorization", "Bearer client"),
    ("x-custom", "a"),
    ("x-override-bootstrap-room", "7"),
    ("x-data-parallel-rank", "1"),
    (
        "traceparent",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
];

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn workers_see_the_same_through_envoy_and_the_front() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let dp = kvrouter::Config {
        prefill_dp_size: Some(4),
        ..config(&[&prefill.url], &[&decode.url])
    };
    let gateway = Gateway::start(Setup::default(), dp).await;
    for (path, body) in CASES {
        let through = gateway.send(Method::POST, path, &HEADERS, body).await;
        let through = whole(through).await;
        let native = gateway
            .picker
            .front
            .send(Method::POST, path, &HEADERS, body)
            .await;
        let native = whole(native).await;
        assert_eq!(through, native, "{path} {body}");
        let case = format!("{path} {body}");
        let (left, right) = (prefill.request().await, decode.request().await);
        assert_eq!(left.body, right.body, "{case}");
        for (worker, by_envoy) in [(&mut prefill, left), (&mut decode, right)] {
            let by_front = worker.request().await;
            assert_eq!(without_drawn(&by_envoy), without_drawn(&by_front), "{case}");
            assert_eq!(own_headers(&by_envoy), own_headers(&by_front), "{case}");
        }
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn header_overrides_and_the_workers_key_pass_alike() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let overriding = kvrouter::Config {
        header_overrides: true,
        api_key: Some("secret".to_owned()),
        ..config(&[&prefill.url], &[&decode.url])
    };
    let gateway = Gateway::start(Setup::default(), overriding).await;
    let body = r#"{ "text": "untouched" }"#;
    assert_eq!(gateway.ask("/generate", body).await.0, 200);
    let native = gateway.picker.front.post("/generate", body).await;
    assert_eq!(whole(native).await.0, 200);
    for worker in [&mut prefill, &mut decode] {
        let (by_envoy, by_front) = (worker.request().await, worker.request().await);
        assert_eq!(by_envoy.body, body);
        assert_eq!(by_front.body, body);
        let names = |one: &Received| -> Vec<_> {
            own_headers(one).into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names(&by_envoy), names(&by_front));
        assert_eq!(by_envoy.headers["authorization"], "Bearer secret");
        assert_eq!(by_envoy.headers["x-override-bootstrap-host"], "127.0.0.1");
    }
}
