//! What a picker must do behind Envoy, case by case.

use hyper::Method;
use serde_json::json;

use crate::fakes::{FakeWorker, Script, chunk, event_stream, next_piece, soon, whole};
use crate::gateway::{Gateway, Setup, config, endpoint, with_epp};

const GENERATE: &str = r#"{"text":"a","zzz":1}"#;

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_get_without_a_body_goes_to_one_worker() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::between(&prefill, &decode).await;
    let answer = gateway.send(Method::GET, "/v1/models?x=1", &[], "").await;
    assert_eq!(
        whole(answer).await,
        (200, "worker answers /v1/models?x=1".to_owned())
    );
    let answer = gateway.send(Method::GET, "/ready", &[], "").await;
    let (status, text) = whole(answer).await;
    assert_eq!(status, 200, "{text}");
    assert!(text.contains("\"ready\":true"), "{text}");
    for (outcome, count) in [("worker", 1), ("own", 1), ("pair", 0)] {
        let line = format!("kvrouter_epp_decisions_total{{outcome=\"{outcome}\"}}");
        assert_eq!(gateway.metric(&line).await, count, "{outcome}");
    }
    // The counters are not for the gateway's clients.
    let answer = gateway.send(Method::GET, "/metrics", &[], "").await;
    assert_eq!(whole(answer).await.0, 501);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn both_workers_get_bodies_of_every_size() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::between(&prefill, &decode).await;
    // One byte is no object: the picker says so, in the front's words.
    let (status, text) = gateway.ask("/generate", "1").await;
    assert_eq!(status, 400, "{text}");
    assert!(text.contains("invalid_request_error"), "{text}");
    for size in [20, 64 << 10, 300 << 10, (10 << 20) + 1] {
        let frame = r#"{"text":""}"#.len();
        let body = format!("{{\"text\":\"{}\"}}", "x".repeat(size - frame));
        decode.then(Script::Say("\"done\"".to_owned()));
        let answer = gateway.ask("/generate", body).await;
        assert_eq!(answer, (200, "\"done\"".to_owned()), "{size}");
        let (left, right) = (prefill.request().await, decode.request().await);
        assert_eq!(left.body, right.body, "{size}");
        let json = left.json();
        assert_eq!(json["text"].as_str().unwrap().len(), size - frame);
        assert_eq!(json["bootstrap_host"], "127.0.0.1");
        assert_eq!(json["bootstrap_port"], 8998);
        assert!(json["bootstrap_room"].as_u64().unwrap() > 0);
        assert_eq!(json["rid"].as_str().unwrap().len(), 32);
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_body_above_the_limit_is_refused() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let limited = kvrouter::Config {
        body_bytes_max: 10 << 20,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let gateway = Gateway::start(Setup::default(), limited).await;
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        (10 << 20) + 1
    );
    let body = "x".repeat((10 << 20) + 1);
    let answer = gateway.raw(format!("{head}{body}").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{}", &answer[..200]);
    assert!(decode.request_now().is_none());
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn chunked_uploads_and_trailers_arrive() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::between(&prefill, &decode).await;
    let head =
        "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n";
    for (more, end) in [
        ("", "0\r\n\r\n"),
        ("trailer: x-end\r\n", "0\r\nx-end: yes\r\n\r\n"),
    ] {
        let request = format!("{head}{more}\r\n8\r\n{{\"text\":\r\n4\r\n\"a\"}}\r\n{end}");
        let answer = gateway.raw(request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let (left, right) = (prefill.request().await, decode.request().await);
        assert_eq!(left.body, right.body);
        assert_eq!(right.json()["text"], "a");
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn events_flow_one_by_one() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::between(&prefill, &decode).await;
    prefill.then(Script::Hang);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let answer = gateway
        .post("/generate", r#"{"text":"a","stream":true}"#)
        .await;
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut body = answer.into_body();
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), event);
        if event.contains('1') {
            // Decode's first bytes do not wait for prefill.
            assert!(prefill.was_left_alone());
            chunks.send(chunk("data: 2\n\n")).await.unwrap();
        }
    }
    drop(chunks);
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    gateway
        .until("kvrouter_epp_closed_streams_total{answer=\"complete\"}", 1)
        .await;
    let served = "kvrouter_leg_successes_total";
    assert_eq!(gateway.picker.front.of_worker(served, &decode).await, 1);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_subset_hint_is_obeyed() {
    let prefill = FakeWorker::start().await;
    let mut decodes = [FakeWorker::start().await, FakeWorker::start().await];
    let both = config(&[&prefill.url], &[&decodes[0].url, &decodes[1].url]);
    let second = endpoint(&decodes[1]);
    for hint in [
        json!([second.clone()]),
        json!(format!("10.9.9.9:1, {second}")),
    ] {
        let setup = Setup {
            subset: Some(hint.clone()),
            ..Setup::default()
        };
        let gateway = Gateway::start(setup, both.clone()).await;
        for _ in 0..4 {
            assert_eq!(gateway.ask("/generate", GENERATE).await.0, 200, "{hint}");
            decodes[1].request().await;
        }
        assert!(decodes[0].request_now().is_none(), "{hint}");
    }
    for hint in [json!([]), json!("10.9.9.9:1")] {
        let setup = Setup {
            subset: Some(hint.clone()),
            ..Setup::default()
        };
        let gateway = Gateway::start(setup, both.clone()).await;
        let answer = gateway.post("/generate", GENERATE).await;
        assert_eq!(answer.headers()["retry-after"], "1");
        assert_eq!(whole(answer).await.0, 503, "{hint}");
        let own = "kvrouter_epp_immediate_responses_total{status=\"503\"}";
        assert_eq!(gateway.metric(own).await, 1);
    }
}

/// A worker that passes its probes and then stops to listen.
async fn dead_after(probes: usize) -> (String, tokio::task::JoinHandle<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let served = tokio::spawn(async move {
        for _ in 0..probes {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut seen = [0; 1024];
            let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut seen).await;
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
            tokio::io::AsyncWriteExt::write_all(&mut stream, answer)
                .await
                .unwrap();
        }
    });
    (url, served)
}

/// Probes once, so that a worker that dies keeps its good name for the test's time.
fn probed_once(config: kvrouter::Config) -> kvrouter::Config {
    kvrouter::Config {
        probe_interval: std::time::Duration::from_secs(3600),
        ..config
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_dead_first_endpoint_is_replaced_by_the_next() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    // One probe and one question what it is.
    let (dead, served) = dead_after(2).await;
    let both = config(&[&prefill.url], &[&dead, &decode.url]);
    let both = probed_once(with_epp(both, |epp| {
        epp.fallbacks = 4;
        epp.conformance = true;
    }));
    let setup = Setup {
        endpoints: vec![
            dead.trim_start_matches("http://").to_owned(),
            endpoint(&decode),
        ],
        ..Setup::default()
    };
    let gateway = Gateway::start(setup, both).await;
    soon(served).await.unwrap();
    // Whichever is named first, the living one serves, and Envoy says so.
    for _ in 0..6 {
        let answer = gateway.post("/generate", GENERATE).await;
        let name = "x-conformance-test-served-endpoint";
        assert_eq!(answer.headers()[name], endpoint(&decode).as_str());
        assert_eq!(whole(answer).await.0, 200);
        decode.request().await;
    }
    let name = "kvrouter_leg_successes_total";
    assert_eq!(gateway.picker.front.of_worker(name, &decode).await, 6);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_dead_endpoint_without_fallbacks_is_told_and_blamed() {
    let mut prefill = FakeWorker::start().await;
    let (dead, served) = dead_after(2).await;
    let alone = probed_once(config(&[&prefill.url], &[&dead]));
    let gateway = Gateway::start(Setup::default(), alone).await;
    soon(served).await.unwrap();
    prefill.then(Script::Hang);
    let (status, _) = gateway.ask("/generate", GENERATE).await;
    assert_eq!(status, 503, "Envoy's own answer");
    let request = prefill.request().await;
    prefill.dropped().await;
    assert_eq!(prefill.abort().await, json!({"rid": request.json()["rid"]}));
    let blamed = format!(
        "kvrouter_leg_failures_total{{leg=\"decode\",worker=\"{dead}\",reason=\"connect\"}}"
    );
    gateway.until(&blamed, 1).await;
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn the_conformance_headers_choose_and_tell() {
    let prefill = FakeWorker::start().await;
    let mut decodes = [FakeWorker::start().await, FakeWorker::start().await];
    let urls = [decodes[0].url.clone(), decodes[1].url.clone()];
    let both = config(&[&prefill.url], &[&urls[0], &urls[1]]);
    let setup = Setup {
        endpoints: vec![endpoint(&decodes[0]), endpoint(&decodes[1])],
        ..Setup::default()
    };
    let conforming = with_epp(both.clone(), |epp| epp.conformance = true);
    let gateway = Gateway::start(setup.clone(), conforming).await;
    for turn in [1, 1, 0, 1] {
        let wanted = endpoint(&decodes[turn]);
        let headers = [
            ("test-epp-endpoint-selection", wanted.as_str()),
            // What a client says of the destination counts for nothing.
            ("x-gateway-destination-endpoint", "10.9.9.9:1"),
        ];
        let answer = gateway
            .send(Method::POST, "/generate", &headers, GENERATE)
            .await;
        assert_eq!(
            answer.headers()["x-conformance-test-served-endpoint"],
            wanted.as_str()
        );
        assert_eq!(whole(answer).await.0, 200);
        decodes[turn].request().await;
        assert!(decodes[1 - turn].request_now().is_none());
    }
    // Without the option it is a header like any other.
    let gateway = Gateway::start(setup, both).await;
    let headers = [("test-epp-endpoint-selection", "10.9.9.9:1")];
    let answer = gateway
        .send(Method::POST, "/generate", &headers, GENERATE)
        .await;
    assert!(
        !answer
            .headers()
            .contains_key("x-conformance-test-served-endpoint")
    );
    assert_eq!(whole(answer).await.0, 200);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn overload_is_told_with_429_and_503() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let small = kvrouter::Config {
        requests_max: 1,
        queue_max: 0,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let gateway = Gateway::start(Setup::default(), small).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut first = gateway
        .post("/generate", r#"{"text":"a","stream":true}"#)
        .await
        .into_body();
    next_piece(&mut first).await.unwrap().unwrap();
    decode.request().await;
    let answer = gateway.post("/generate", GENERATE).await;
    assert_eq!(answer.headers()["retry-after"], "1");
    assert_eq!(answer.headers()["content-type"], "application/json");
    let (status, text) = whole(answer).await;
    assert_eq!(status, 429, "{text}");
    assert!(text.contains("overloaded_error"), "{text}");
    drop(chunks);
    assert_eq!(next_piece(&mut first).await.unwrap(), None);
    gateway.until("kvrouter_live_requests", 0).await;
    assert_eq!(gateway.ask("/generate", GENERATE).await.0, 200);
    // Nobody is ready: the protocol asks for 503.
    prefill.set_probe_answers(503, 503);
    gateway.picker.front.ready(0, 1).await;
    let answer = gateway.post("/generate", GENERATE).await;
    assert_eq!(answer.headers()["retry-after"], "1");
    assert_eq!(whole(answer).await.0, 503);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn what_one_upstream_request_cannot_serve_goes_to_the_front_or_is_refused() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let body = r#"{"text":"a","sampling_params":{"n":2}}"#;
    let gateway = Gateway::between(&prefill, &decode).await;
    let (status, text) = gateway.ask("/generate", body).await;
    assert_eq!(status, 501);
    assert!(text.contains("--front-endpoint"), "{text}");
    assert!(decode.request_now().is_none());
    // The front's port must be known before it starts.
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let with_front = with_epp(config(&[&prefill.url], &[&decode.url]), |epp| {
        epp.front_endpoint = Some(([127, 0, 0, 1], port).into());
    });
    let with_front = kvrouter::Config { port, ..with_front };
    let gateway = Gateway::start(Setup::default(), with_front).await;
    for _ in 0..2 {
        decode.then(Script::Say(r#"{"text":"b","meta_info":{}}"#.to_owned()));
    }
    let (status, text) = gateway.ask("/generate", body).await;
    assert_eq!(status, 200, "{text}");
    let rooms = [decode.request().await, decode.request().await]
        .map(|one| one.json()["bootstrap_room"].clone());
    assert_ne!(rooms[0], rooms[1]);
    assert_eq!(
        gateway
            .metric("kvrouter_epp_decisions_total{outcome=\"front\"}")
            .await,
        1
    );
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_decision_may_take_longer_than_envoys_patience_for_messages() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let small = kvrouter::Config {
        requests_max: 1,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let gateway = Gateway::start(Setup::default(), small).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut first = gateway
        .post("/generate", r#"{"text":"a","stream":true}"#)
        .await
        .into_body();
    next_piece(&mut first).await.unwrap().unwrap();
    let second = gateway.ask("/generate", GENERATE);
    let release = async {
        gateway.until("kvrouter_queued_requests", 1).await;
        // Five times Envoy's default of 200 ms: its clock is the thing under test.
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        drop(chunks);
        assert_eq!(next_piece(&mut first).await.unwrap(), None);
    };
    let (answer, ()) = tokio::join!(second, release);
    assert_eq!(answer.0, 200, "{answer:?}");
    decode.request().await;
    let body = decode.request().await.body;
    assert!(!body.is_empty());
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn the_example_configuration_is_valid() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/envoy/envoy.yaml");
    let binary = std::env::var_os("KVROUTER_ENVOY").unwrap();
    let checked = tokio::process::Command::new(binary)
        .args(["--mode", "validate", "-c", example])
        .output();
    let checked = checked.await.unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
}
