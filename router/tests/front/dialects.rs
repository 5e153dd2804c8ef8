//! Messages, responses, ranks, override headers, and what one worker answers alone.

use hyper::Method;
use kvrouter::Config;
use serde_json::{Value as Json, json};

use crate::fakes::{
    FakeWorker, Running, Script, breakage, chunk, config, event_stream, events_of, next_piece,
    whole, whole_stream,
};

const MESSAGES: &str = "/v1/messages";

#[tokio::test]
async fn messages_are_served_as_chat() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    decode.then(Script::Reply(
        200,
        r#"{"id":"c","model":"m","choices":[{"index":0,"message":{"content":"hi"},"finish_reason":"length"}],
            "usage":{"prompt_tokens":3,"completion_tokens":2}}"#,
    ));
    let body = r#"{"model":"m","max_tokens":50,"system":"be","zzz":1e400,"messages":[{"role":"user","content":"hello"}]}"#;
    let headers = [("x-api-key", "k"), ("anthropic-version", "2023-06-01")];
    let response = router.send(Method::POST, MESSAGES, &headers, body).await;
    let (status, text) = whole(response).await;
    assert_eq!(status, 200, "{text}");
    let message: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(message["content"], json!([{"type": "text", "text": "hi"}]));
    assert_eq!(message["stop_reason"], "max_tokens");
    assert_eq!(
        message["usage"],
        json!({"input_tokens": 3, "output_tokens": 2})
    );
    let (left, right) = (prefill.request().await, decode.request().await);
    assert_eq!(left.body, right.body);
    assert_eq!(left.target, "/v1/chat/completions");
    assert_eq!(left.headers["authorization"], "Bearer k");
    assert!(!left.headers.contains_key("anthropic-version"));
    let text = std::str::from_utf8(&left.body).unwrap();
    assert!(text.contains(r#""max_tokens":50,"zzz":1e400"#), "{text}");
    assert!(
        text.contains("bootstrap_room") && text.contains(r#"{"role":"system","content":"be"}"#)
    );
}

#[tokio::test]
async fn messages_stream_in_their_own_events() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    decode.then(
        whole_stream(&[
            r#"{"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"h"}}]}"#,
            r#"{"id":"c","choices":[{"index":0,"delta":{"content":"i"},"finish_reason":"stop"}]}"#,
            r#"{"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#,
            "[DONE]",
        ])
        .await,
    );
    let body =
        r#"{"model":"m","max_tokens":5,"stream":true,"messages":[{"role":"user","content":"x"}]}"#;
    let (status, text) = whole(router.post(MESSAGES, body).await).await;
    assert_eq!(status, 200);
    let kinds: Vec<_> = events_of(&text)
        .iter()
        .map(|event| event["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        kinds,
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop"
        ]
    );
    assert!(text.starts_with("event: message_start\ndata: {"), "{text}");
    assert_eq!(router.metric("kvrouter_live_requests").await, 0);
}

#[tokio::test]
async fn failed_messages_speak_anthropic() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let body = r#"{"model":"m","max_tokens":5,"stream":true,"messages":[]}"#;
    prefill.then(Script::Hang);
    decode.then(Script::Reply(400, r#"{"message":"too long"}"#));
    let (status, text) = whole(router.post(MESSAGES, body).await).await;
    let error: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 400);
    assert_eq!(
        error,
        json!({"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}})
    );
    let (_, text) = whole(router.post(MESSAGES, "{}").await).await;
    assert!(text.contains("`messages` is missing"), "{text}");
    // Decode dies in the stream: the open block is closed, the error told, prefill cancelled.
    prefill.request().await;
    prefill.dropped().await;
    prefill.then(Script::Hang);
    let (chunks, script) = event_stream();
    decode.then(script);
    let event = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"x\"}}]}\n\n";
    chunks.send(chunk(event)).await.unwrap();
    let mut body = router.post(MESSAGES, body).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    chunks.send(breakage()).await.unwrap();
    let mut rest = String::new();
    while let Some(piece) = next_piece(&mut body).await.unwrap() {
        rest.push_str(&piece);
    }
    let events = events_of(&rest);
    assert_eq!(events[0]["type"], "content_block_stop");
    assert_eq!(events[1]["type"], "error");
    assert_eq!(events.len(), 2);
    prefill.dropped().await;
}

#[tokio::test]
async fn responses_are_served_by_pairs_and_found_again() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let body = r#"{"model":"m","input":["a","b"],"n":1e0,"temperature":1.0}"#;
    assert_eq!(whole(router.post("/v1/responses", body).await).await.0, 200);
    let (left, right) = (prefill.request().await, decode.request().await);
    assert_eq!(left.body, right.body);
    assert_eq!(left.target, "/v1/responses");
    let text = std::str::from_utf8(&left.body).unwrap();
    assert!(text.ends_with(&body[1..]), "{text}");
    assert!(left.json()["bootstrap_room"].is_u64());
    let path = "/v1/responses/resp_1";
    assert_eq!(
        router.read(path).await,
        (200, format!("worker answers {path}"))
    );
}

#[tokio::test]
async fn one_worker_answers_what_needs_no_pair() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut other = FakeWorker::start().await;
    let router = Running::between(&prefill, &decode).await;
    let answer = whole(router.post("/tokenize", "{\"prompt\":\"a\"}").await).await;
    assert_eq!(answer.0, 200);
    assert_eq!(prefill.request().await.body, "{\"prompt\":\"a\"}");
    assert_eq!(whole(router.post("/v1/rerank", "{}").await).await.0, 501);
    assert_eq!(whole(router.post("/flush_cache", "{}").await).await.0, 501);
    assert_eq!(router.read("/tokenize").await.0, 405);

    let router = Running::start(Config {
        others: vec![other.url.parse().unwrap()],
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    let body = r#"{"input":"a","zzz":1e400}"#;
    assert_eq!(
        whole(router.post("/v1/embeddings", body).await).await.0,
        200
    );
    let seen = other.request().await;
    assert_eq!(
        (seen.target.as_str(), &seen.body[..]),
        ("/v1/embeddings", body.as_bytes())
    );
    assert!(prefill.request_now().is_none());
}

#[tokio::test]
async fn rooms_follow_the_rank_that_the_worker_tells_of() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    prefill.set_info(&json!({"dp_size": 4, "disaggregation_bootstrap_port": 34000}));
    let mut unknown_port = config(&[&prefill.url], &[&decode.url]);
    unknown_port.prefills[0].bootstrap_port = None;
    let router = Running::start(unknown_port).await;
    router.ready(1, 1).await;
    let mut ranks = Vec::new();
    for _ in 0..8 {
        let headers = [("x-data-parallel-rank", "3")];
        let body = r#"{"text":["a","b"],"routed_dp_rank":3}"#;
        whole(router.send(Method::POST, "/generate", &headers, body).await).await;
        let request = prefill.request().await;
        assert!(!request.headers.contains_key("x-data-parallel-rank"));
        let json = request.json();
        assert!(json.get("routed_dp_rank").is_none());
        assert_eq!(json["bootstrap_port"], json!([34000, 34000]));
        let rooms = json["bootstrap_room"].as_array().unwrap();
        let of: Vec<_> = rooms
            .iter()
            .map(|room| room.as_u64().unwrap() % 4)
            .collect();
        assert_eq!(of[0], of[1], "one request, one rank");
        ranks.push(of[0]);
    }
    // All are idle, so chance decides.
    assert!(ranks.iter().any(|rank| *rank != ranks[0]), "{ranks:?}");
}

#[tokio::test]
async fn trusted_clients_choose_their_rank() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        trusts_dp_rank: true,
        prefill_dp_size: Some(8),
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    for (headers, body) in [
        (&[][..], r#"{"text":"a","routed_dp_rank":5}"#),
        (&[("x-data-parallel-rank", "5")][..], r#"{"text":"a"}"#),
    ] {
        whole(router.send(Method::POST, "/generate", headers, body).await).await;
        let request = prefill.request().await;
        let room = request.json()["bootstrap_room"].as_u64().unwrap();
        assert_eq!(room % 8, 5);
        if headers.is_empty() {
            assert_eq!(request.json()["routed_dp_rank"], 5);
        } else {
            assert_eq!(request.headers["x-data-parallel-rank"], "5");
        }
    }
}

#[tokio::test]
async fn override_headers_leave_the_body_untouched() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        header_overrides: true,
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    let headers = [
        ("x-override-bootstrap-room", "7"),
        ("x-override-rid", "evil"),
    ];
    let body = " {\"messages\":[{\"role\":\"user\",\"content\":\"h\u{e9}\"}],\n\"zzz\":1e400} ";
    let path = "/v1/chat/completions";
    whole(router.send(Method::POST, path, &headers, body).await).await;
    let (left, right) = (prefill.request().await, decode.request().await);
    assert_eq!(left.body, body);
    assert_eq!(right.body, body);
    for name in ["bootstrap-host", "bootstrap-port", "bootstrap-room", "rid"] {
        let name = format!("x-override-{name}");
        assert_eq!(left.headers[&name], right.headers[&name]);
        assert_eq!(left.headers.get_all(&name).iter().count(), 1);
    }
    assert_eq!(left.headers["x-override-bootstrap-host"], "127.0.0.1");
    assert_eq!(left.headers["x-override-bootstrap-port"], "8998");
    assert_ne!(left.headers["x-override-bootstrap-room"], "7");
    assert_eq!(left.headers["x-override-rid"].len(), 32);

    // The abort names the id of the header.
    prefill.then(Script::Reply(400, "{}"));
    decode.then(Script::Hang);
    whole(router.post(path, body).await).await;
    let rid = decode.request().await.headers["x-override-rid"].clone();
    assert_eq!(decode.abort().await["rid"], rid.to_str().unwrap());

    // What is not surely plain is edited as ever.
    prefill.request().await;
    whole(
        router
            .post(path, r#"{"messages":[],"bootstrap_room":7}"#)
            .await,
    )
    .await;
    let request = prefill.request().await;
    assert!(!request.headers.contains_key("x-override-rid"));
    assert_ne!(request.json()["bootstrap_room"], 7);
}
