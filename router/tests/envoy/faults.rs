//! Who fails behind Envoy, what the client gets, who is cancelled, who is blamed.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::fakes::{
    FakeWorker, Received, Script, breakage, chunk, event_stream, next_piece, soon, whole,
    whole_stream,
};
use crate::gateway::{Gateway, Setup, config};

const WHOLE: &str = r#"{"text":"a"}"#;
const STREAM: &str = r#"{"text":"a","stream":true}"#;
const ABORT: &str = r#"{"text":"","meta_info":{"finish_reason":{"type":"abort","message":"out of memory","status_code":500}}}"#;

/// What a fault may take from the worker's refusal to the client's answer, on a machine that does much else.
const BOUND: Duration = Duration::from_secs(2);

async fn assert_cancelled(worker: &mut FakeWorker, request: &Received) {
    worker.dropped().await;
    assert_eq!(worker.abort().await, json!({"rid": request.json()["rid"]}));
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test measures how long a person would wait"
)]
fn now() -> Instant {
    Instant::now()
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_failed_prefill_answers_the_client_at_once() {
    for (body, decode_begins) in [(WHOLE, false), (STREAM, false), (STREAM, true)] {
        let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let gateway = Gateway::between(&prefill, &decode).await;
        prefill.then(Script::Reply(500, r#"{"message":"boom"}"#));
        let (chunks, script) = event_stream();
        // SGLang answers streams with their head at once, and the first event comes after the transfer.
        decode.then(if decode_begins { script } else { Script::Hang });
        let begin = now();
        let answer = gateway.ask("/generate", body).await;
        assert_eq!(
            answer,
            (500, r#"{"message":"boom"}"#.to_owned()),
            "{decode_begins}"
        );
        assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
        // Whether Envoy had sent decode's request by then or not, decode is told.
        let request = prefill.request().await;
        assert_eq!(decode.abort().await, json!({"rid": request.json()["rid"]}));
        let front = &gateway.picker.front;
        assert_eq!(front.failures(&prefill).await, 1);
        assert_eq!(front.failures(&decode).await, 0);
        drop(chunks);
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_prefill_that_breaks_off_becomes_502() {
    for (body, decode_begins) in [(WHOLE, false), (STREAM, true)] {
        let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let gateway = Gateway::between(&prefill, &decode).await;
        let (chunks, script) = event_stream();
        prefill.then(script);
        let (_head_only, script) = event_stream();
        decode.then(if decode_begins { script } else { Script::Hang });
        let ask = gateway.ask("/generate", body);
        let fail = async {
            let request = decode.request().await;
            chunks.send(breakage()).await.unwrap();
            (request, now())
        };
        let ((status, text), (request, begin)) = tokio::join!(ask, fail);
        assert_eq!(status, 502, "{text}");
        assert!(text.contains("worker_error"), "{text}");
        assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
        assert_cancelled(&mut decode, &request).await;
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_prefill_lost_in_the_stream_ends_it_with_an_error_event() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::between(&prefill, &decode).await;
    let (prefill_chunks, script) = event_stream();
    prefill.then(script);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = gateway.post("/generate", STREAM).await.into_body();
    assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "data: 1\n\n");
    prefill_chunks.send(breakage()).await.unwrap();
    let event = next_piece(&mut body).await.unwrap().unwrap();
    assert!(event.contains("\"code\":502"), "{event}");
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    let request = decode.request().await;
    assert_eq!(decode.abort().await, json!({"rid": request.json()["rid"]}));
    assert_eq!(gateway.metric("kvrouter_broken_streams_total").await, 1);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn decodes_refusal_is_the_clients_and_frees_prefill() {
    for (status, blamed) in [
        (400, "client_error"),
        (500, "server_error"),
        (503, "overload"),
    ] {
        let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let gateway = Gateway::between(&prefill, &decode).await;
        prefill.then(Script::Hang);
        decode.then(Script::Reply(status, r#"{"message":"no"}"#));
        let answer = gateway.ask("/generate", WHOLE).await;
        assert_eq!(answer, (status, r#"{"message":"no"}"#.to_owned()));
        let request = prefill.request().await;
        assert_cancelled(&mut prefill, &request).await;
        let line = format!(
            "kvrouter_leg_failures_total{{leg=\"decode\",worker=\"{}\",reason=\"{blamed}\"}}",
            decode.url
        );
        gateway.until(&line, 1).await;
        assert_eq!(gateway.picker.front.failures(&prefill).await, 0);
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn an_abort_in_the_first_event_becomes_a_status() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::between(&prefill, &decode).await;
    prefill.then(Script::Hang);
    decode.then(whole_stream(&[ABORT]).await);
    let (status, text) = gateway.ask("/generate", STREAM).await;
    assert_eq!(status, 500, "{text}");
    assert!(text.contains("out of memory"), "{text}");
    let request = prefill.request().await;
    assert_cancelled(&mut prefill, &request).await;
    assert_eq!(gateway.picker.front.failures(&decode).await, 1);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_decode_that_dies_in_its_stream_breaks_it_off_and_frees_prefill() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::between(&prefill, &decode).await;
    prefill.then(Script::Hang);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = gateway.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    chunks.send(breakage()).await.unwrap();
    // Envoy has no event for it; the client must not take the answer for whole.
    next_piece(&mut body).await.unwrap_err();
    let request = prefill.request().await;
    assert_cancelled(&mut prefill, &request).await;
    gateway
        .until("kvrouter_epp_closed_streams_total{answer=\"cut_off\"}", 1)
        .await;
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_client_that_leaves_cancels_both_legs() {
    for (text, decode_begins) in [(WHOLE, false), (STREAM, false), (STREAM, true)] {
        let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let gateway = Gateway::between(&prefill, &decode).await;
        prefill.then(Script::Hang);
        let (chunks, script) = event_stream();
        decode.then(if decode_begins { script } else { Script::Hang });
        if decode_begins {
            chunks.send(chunk("data: 1\n\n")).await.unwrap();
        }
        let mut stream = gateway.connect().await;
        let head = format!(
            "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{text}",
            text.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let (left, right) = (prefill.request().await, decode.request().await);
        if decode_begins {
            soon(stream.readable()).await.unwrap();
        }
        drop(stream);
        assert_cancelled(&mut prefill, &left).await;
        assert_cancelled(&mut decode, &right).await;
        let front = &gateway.picker.front;
        assert_eq!(
            front.failures(&prefill).await + front.failures(&decode).await,
            0
        );
        gateway.until("kvrouter_client_disconnects_total", 1).await;
        gateway.until("kvrouter_live_requests", 0).await;
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_time_limit_is_told_and_cancels_both_legs() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let limited = kvrouter::Config {
        first_byte_timeout: Some(Duration::from_millis(300)),
        ..config(&[&prefill.url], &[&decode.url])
    };
    let gateway = Gateway::start(Setup::default(), limited).await;
    prefill.then(Script::Hang);
    decode.then(Script::Hang);
    let (status, text) = whole(gateway.post("/generate", WHOLE).await).await;
    assert_eq!(status, 504, "{text}");
    let (left, right) = (prefill.request().await, decode.request().await);
    assert_cancelled(&mut prefill, &left).await;
    assert_cancelled(&mut decode, &right).await;
}
