//! Lines for collectors.

use hyper::Method;
use serde_json::Value as Json;

use crate::fakes::{FakeWorker, Script, chunk, event_stream, soon, whole};
use crate::process::Process;

#[tokio::test]
async fn each_answer_is_one_json_line() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut process = Process::start(&prefill, &decode, |command| {
        command.args(["--log-format", "json", "--access-log"]);
    })
    .await;
    let router = &process.router;
    router.ready(1, 1).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: {\"a\":1}\n\n")).await.unwrap();
    let headers = [("x-request-id", "my \"id\"")];
    let body = r#"{"messages":[],"stream":true}"#;
    let answer = router
        .send(Method::POST, "/v1/chat/completions", &headers, body)
        .await;
    // Both statuses are known when prefill is done before decode.
    soon(async { while router.metric("kvrouter_prefill_leg_seconds_count").await < 1 {} }).await;
    chunks.send(chunk("data: [DONE]\n\n")).await.unwrap();
    drop(chunks);
    let (_, text) = whole(answer).await;
    let sent = prefill.request().await.json();
    prefill.then(Script::Reply(400, r#"{"message":"no"}"#));
    decode.then(Script::Hang);
    assert_eq!(
        whole(process.router.post("/generate", r#"{"text":"a"}"#).await)
            .await
            .0,
        400
    );

    let line: Json = serde_json::from_str(&process.line("kvrouter::access").await).unwrap();
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["message"], "request");
    assert_eq!(line["request_id"], "my \"id\"");
    assert_eq!(line["route"], "/v1/chat/completions");
    assert_eq!(
        (&line["status"], &line["outcome"]),
        (&200.into(), &"complete".into())
    );
    assert_eq!(line["prefill"], prefill.url);
    assert_eq!(line["decode"], decode.url);
    assert_eq!(
        (&line["prefill_status"], &line["decode_status"]),
        (&200.into(), &200.into())
    );
    assert_eq!(line["room"], sent["bootstrap_room"]);
    assert_eq!(line["rid"], sent["rid"]);
    assert_eq!(line["bytes"], text.len());
    assert_eq!(line["attempts"], 1);
    let (ttft, whole) = (
        line["ttft_ms"].as_f64().unwrap(),
        line["duration_ms"].as_f64().unwrap(),
    );
    assert!(0.0 < ttft && ttft <= whole, "{ttft} of {whole}");
    assert!(line.get("trace_id").is_none());

    let line: Json = serde_json::from_str(&process.line("kvrouter::access").await).unwrap();
    assert_eq!(
        (&line["status"], &line["prefill_status"]),
        (&400.into(), &400.into())
    );
    assert!(line.get("ttft_ms").is_none(), "{line}");
    assert_eq!(line["request_id"], line["rid"]);
}
