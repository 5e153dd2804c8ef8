//! One leg fails: the other is cancelled, the guilty one is blamed, the client is told.

use std::time::{Duration, Instant};

use kvrouter::Config;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::fakes::{
    FakeWorker, Received, Running, Script, breakage, chunk, config, event_stream, next_piece, whole,
};

const PROMPT: &str = r#"{"text":"a","stream":true}"#;

/// The partner of a failed leg must see its connection close and an abort for its id.
async fn assert_cancelled(worker: &mut FakeWorker, request: &Received) {
    worker.dropped().await;
    assert_eq!(worker.abort().await, json!({"rid": request.json()["rid"]}));
}

#[tokio::test]
#[expect(
    clippy::disallowed_methods,
    reason = "the 50 ms promise is about real time"
)]
async fn a_prefill_error_cancels_decode_and_reaches_the_client() {
    for status in [500, 400] {
        let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
        prefill.then(Script::Reply(status, r#"{"error":"no room"}"#));
        decode.then(Script::Hang);
        let router = Running::between(&prefill, &decode).await;
        let begin = Instant::now();
        let answer = whole(router.post("/generate", PROMPT).await).await;
        assert_eq!(answer, (status, r#"{"error":"no room"}"#.to_owned()));
        let request = decode.request().await;
        assert_cancelled(&mut decode, &request).await;
        // The promise is 50 ms; a busy build machine gets ten times that.
        assert!(
            begin.elapsed() < Duration::from_millis(500),
            "{:?}",
            begin.elapsed()
        );
        assert_eq!(
            (
                router.failures(&prefill).await,
                router.failures(&decode).await
            ),
            (1, 0)
        );
    }
}

#[tokio::test]
async fn a_decode_error_cancels_prefill_and_reaches_the_client() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    prefill.then(Script::Hang);
    decode.then(Script::Reply(503, r#"{"error":"full"}"#));
    let router = Running::between(&prefill, &decode).await;
    let answer = whole(router.post("/generate", PROMPT).await).await;
    assert_eq!(answer, (503, r#"{"error":"full"}"#.to_owned()));
    let request = prefill.request().await;
    assert_cancelled(&mut prefill, &request).await;
    assert_eq!(
        (
            router.failures(&prefill).await,
            router.failures(&decode).await
        ),
        (0, 1)
    );
}

#[tokio::test]
async fn a_dead_decode_stream_ends_with_an_error_event() {
    for (cut, close) in [("data: 1\n\n", ""), ("data: 1\n\ndata: {\"te", "\n\n")] {
        let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let (_open, script) = event_stream();
        prefill.then(script);
        let (chunks, script) = event_stream();
        decode.then(script);
        let router = Running::between(&prefill, &decode).await;
        chunks.send(chunk(cut)).await.unwrap();
        let mut body = router.post("/generate", PROMPT).await.into_body();
        assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), cut);
        chunks.send(breakage()).await.unwrap();
        let event = next_piece(&mut body).await.unwrap().unwrap();
        let event = event
            .strip_prefix(close)
            .unwrap()
            .strip_prefix("data: ")
            .unwrap();
        let event: serde_json::Value = serde_json::from_str(event.trim_end()).unwrap();
        assert_eq!(event["error"]["code"], 502);
        assert!(
            event["error"]["message"]
                .as_str()
                .unwrap()
                .contains("decode"),
            "{event}"
        );
        assert_eq!(next_piece(&mut body).await.unwrap(), None);
        let request = prefill.request().await;
        assert_cancelled(&mut prefill, &request).await;
        assert_eq!(
            (
                router.failures(&prefill).await,
                router.failures(&decode).await
            ),
            (0, 1)
        );
    }
}

#[tokio::test]
async fn a_dead_prefill_stream_ends_decode_with_an_error_event() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let (prefill_chunks, script) = event_stream();
    prefill.then(script);
    let (chunks, script) = event_stream();
    decode.then(script);
    let router = Running::between(&prefill, &decode).await;
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", PROMPT).await.into_body();
    assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "data: 1\n\n");
    prefill_chunks.send(breakage()).await.unwrap();
    assert!(
        next_piece(&mut body)
            .await
            .unwrap()
            .unwrap()
            .contains("the prefill worker broke off")
    );
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    let request = decode.request().await;
    assert_cancelled(&mut decode, &request).await;
    assert_eq!(
        (
            router.failures(&prefill).await,
            router.failures(&decode).await
        ),
        (1, 0)
    );
}

#[tokio::test]
async fn a_broken_json_answer_is_never_complete() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let (chunks, receiver) = tokio::sync::mpsc::channel(4);
    decode.then(Script::Stream("application/json", receiver));
    let router = Running::between(&prefill, &decode).await;
    chunks.send(chunk("{\"half\":")).await.unwrap();
    let mut body = router.post("/generate", PROMPT).await.into_body();
    assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "{\"half\":");
    chunks.send(breakage()).await.unwrap();
    assert!(next_piece(&mut body).await.is_err());
}

#[tokio::test]
async fn a_client_that_leaves_cancels_both_legs() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;

    // In the middle of a stream.
    let (_open, script) = event_stream();
    prefill.then(script);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", PROMPT).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    let (left, right) = (prefill.request().await, decode.request().await);
    drop(body);
    assert_cancelled(&mut prefill, &left).await;
    assert_cancelled(&mut decode, &right).await;

    // Before any answer, with a batch: one abort per id.
    prefill.then(Script::Hang);
    decode.then(Script::Hang);
    let mut waiting = Box::pin(router.post("/generate", r#"{"text":["a","b"]}"#));
    let left = tokio::select! {
        _ = &mut waiting => panic!("nobody answered"),
        left = prefill.request() => left,
    };
    let right = tokio::select! {
        _ = &mut waiting => panic!("nobody answered"),
        right = decode.request() => right,
    };
    drop(waiting);
    for (worker, request) in [(&mut prefill, left), (&mut decode, right)] {
        worker.dropped().await;
        for item in 0..2 {
            assert_eq!(
                worker.abort().await,
                json!({"rid": request.json()["rid"][item]})
            );
        }
    }
    assert_eq!(
        (
            router.failures(&prefill).await,
            router.failures(&decode).await
        ),
        (0, 0)
    );
    assert_eq!(router.metric("kvrouter_client_disconnects_total").await, 2);
}

/// The address of a worker that says it is ready and then is gone.
async fn dies_after_its_probe() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        // The probe and the question what it is.
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 4096];
            let _ = stream.read(&mut head).await.unwrap();
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
            stream.write_all(answer).await.unwrap();
        }
    });
    url
}

#[tokio::test]
async fn a_refused_connection_is_tried_with_another_pair_once() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let decode_url = decode.url.clone();
    let patient = |prefills: &[&str]| Config {
        probe_interval: Duration::from_secs(3600),
        ..config(prefills, &[&decode_url])
    };
    let dead = dies_after_its_probe().await;
    let router = Running::start(patient(&[&dead, &prefill.url])).await;
    router.ready(2, 1).await;
    // Nobody has noticed yet, so some of these meet the dead one.
    for _ in 0..4 {
        assert_eq!(whole(router.post("/generate", PROMPT).await).await.0, 200);
        let served = prefill.request().await.json();
        loop {
            let seen = decode.request().await.json();
            if seen["bootstrap_room"] == served["bootstrap_room"] {
                break;
            }
            // The first try of the same request: it had a room and an id of its own.
            assert_ne!(seen["rid"], served["rid"]);
        }
    }

    let dead = dies_after_its_probe().await;
    let lonely = Running::start(patient(&[&dead])).await;
    lonely.ready(1, 1).await;
    decode.then(Script::Hang);
    let (status, body) = whole(lonely.post("/generate", PROMPT).await).await;
    assert_eq!(status, 502, "{body}");
    assert!(
        body.contains("the prefill worker cannot be reached"),
        "{body}"
    );
    assert_eq!(lonely.metric("kvrouter_retries_total").await, 0);
    assert_eq!(lonely.failures(&decode).await, 0);
}

#[tokio::test]
async fn time_limits_cancel_both_legs() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        first_byte_timeout: Some(Duration::from_millis(60)),
        stall_timeout: Some(Duration::from_millis(60)),
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    prefill.then(Script::Hang);
    decode.then(Script::Hang);
    let (status, body) = whole(router.post("/generate", PROMPT).await).await;
    assert_eq!(status, 504);
    assert!(body.contains("first-byte timeout"), "{body}");
    let (left, right) = (prefill.request().await, decode.request().await);
    assert_cancelled(&mut prefill, &left).await;
    assert_cancelled(&mut decode, &right).await;
    assert_eq!(
        (
            router.failures(&prefill).await,
            router.failures(&decode).await
        ),
        (0, 0)
    );

    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let (_, text) = whole(router.post("/generate", PROMPT).await).await;
    assert!(text.starts_with("data: 1\n\ndata: {\"error\":"), "{text}");
    assert!(text.contains("stall timeout"), "{text}");
    assert_eq!(
        (
            router.failures(&prefill).await,
            router.failures(&decode).await
        ),
        (0, 1)
    );
}
