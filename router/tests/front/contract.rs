//! What workers and clients get when all goes well.

use std::collections::HashSet;

use hyper::Method;
use serde_json::json;

use crate::fakes::{FakeWorker, Running, Script, chunk, config, event_stream, next_piece, whole};

#[tokio::test]
async fn both_legs_get_the_same_edited_bytes() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    decode.then(Script::Reply(200, r#"{"answer":1}"#));
    let router = Running::between(&prefill, &decode).await;
    let sent = "{ \"model\": \"m\" , \"zzz\":1e400, \"big\":12345678901234567890123,\"bootstrap_room\":7,\
        \"bootstrap_\\u0068ost\":\"evil\", \"messages\":[{\"role\":\"user\",\"content\":\"h\\u00e9 \\ud83d\\ude00\"}] }";
    let headers = [
        ("content-type", "application/json"),
        ("authorization", "Bearer mine"),
        ("x-custom", "kept"),
        ("connection", "x-hop"),
        ("x-hop", "gone"),
        ("x-override-bootstrap-room", "9"),
    ];
    let path = "/v1/chat/completions?trace=1";
    let response = router.send(Method::POST, path, &headers, sent).await;
    assert_eq!(response.headers()["x-worker"], "yes");
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(whole(response).await, (200, r#"{"answer":1}"#.to_owned()));

    let (left, right) = (prefill.request().await, decode.request().await);
    assert_eq!(left.body, right.body);
    assert_eq!((left.target.as_str(), right.target.as_str()), (path, path));
    for leg in [&left, &right] {
        assert_eq!(leg.headers["authorization"], "Bearer mine");
        assert_eq!(leg.headers["x-custom"], "kept");
        assert!(!leg.headers.contains_key("x-hop"));
        assert!(!leg.headers.contains_key("x-override-bootstrap-room"));
    }
    let text = std::str::from_utf8(&left.body).unwrap();
    let ours = text
        .find(", \"model\"")
        .or_else(|| text.find(",\"model\""))
        .unwrap();
    let members: serde_json::Value = serde_json::from_str(&format!("{}}}", &text[..ours])).unwrap();
    assert_eq!(members["bootstrap_host"], "127.0.0.1");
    assert_eq!(members["bootstrap_port"], 8998);
    let room = members["bootstrap_room"].as_u64().unwrap();
    assert!(room > 0 && room < 1 << 63 && room != 7);
    assert_eq!(members["rid"].as_str().unwrap().len(), 32);
    assert_eq!(
        &text[ours + 1..],
        "\"model\": \"m\" , \"zzz\":1e400, \"big\":12345678901234567890123,\
         \"messages\":[{\"role\":\"user\",\"content\":\"h\\u00e9 \\ud83d\\ude00\"}]}"
    );
}

#[tokio::test]
async fn a_batch_gets_one_room_per_item() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    for (path, body, items) in [
        ("/generate", r#"{"text":["a","b","c"]}"#, 3),
        ("/generate", r#"{"input_ids":[[1,2],[3]]}"#, 2),
        ("/v1/completions", r#"{"prompt":["a"]}"#, 1),
    ] {
        assert_eq!(whole(router.post(path, body).await).await.0, 200);
        let (left, right) = (
            prefill.request().await.json(),
            decode.request().await.json(),
        );
        assert_eq!(left, right);
        let rooms = left["bootstrap_room"].as_array().unwrap();
        let distinct: HashSet<_> = rooms.iter().map(|room| room.as_u64().unwrap()).collect();
        assert_eq!((rooms.len(), distinct.len()), (items, items));
        assert_eq!(left["bootstrap_host"], json!(vec!["127.0.0.1"; items]));
        assert_eq!(left["bootstrap_port"], json!(vec![8998; items]));
        assert_eq!(left["rid"].as_array().unwrap().len(), items);
    }
    for body in [r#"{"input_ids":[1,2,3]}"#, r#"{"text":"a","rid":"mine"}"#] {
        assert_eq!(whole(router.post("/generate", body).await).await.0, 200);
        let left = prefill.request().await.json();
        assert!(
            left["bootstrap_room"].is_u64() && left["bootstrap_host"].is_string(),
            "{left}"
        );
        if body.contains("mine") {
            assert_eq!(left["rid"], "mine");
        }
    }
}

#[tokio::test]
async fn rooms_and_ids_are_never_shared() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let (mut rooms, mut rids) = (HashSet::new(), HashSet::new());
    for _ in 0..300 {
        assert_eq!(
            whole(router.post("/generate", r#"{"text":"a"}"#).await)
                .await
                .0,
            200
        );
        let body = prefill.request().await.json();
        assert!(rooms.insert(body["bootstrap_room"].as_u64().unwrap()));
        assert!(rids.insert(body["rid"].as_str().unwrap().to_owned()));
    }
}

#[tokio::test]
async fn decode_bytes_do_not_wait_for_prefill() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    // Prefill's body stays open (it has accepted), or prefill does not even answer.
    let (prefill_chunks, open) = event_stream();
    for script in [open, Script::Hang] {
        prefill.then(script);
        let (chunks, script) = event_stream();
        decode.then(script);
        chunks.send(chunk("data: 1\n\n")).await.unwrap();
        let response = router
            .post("/generate", r#"{"text":"a","stream":true}"#)
            .await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut body = response.into_body();
        assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "data: 1\n\n");
        chunks.send(chunk("data: 2\n\n")).await.unwrap();
        assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "data: 2\n\n");
        drop(chunks);
        assert_eq!(next_piece(&mut body).await.unwrap(), None);
    }
    drop(prefill_chunks);
    assert!(prefill.was_left_alone() && decode.was_left_alone());
    assert_eq!(
        router.failures(&prefill).await + router.failures(&decode).await,
        0
    );
}

#[tokio::test]
async fn complete_answers_cancel_nothing_and_keep_connections() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut router = Running::between(&prefill, &decode).await;
    for _ in 0..50 {
        // An answer of known length, then a chunked one.
        assert_eq!(
            whole(router.post("/generate", r#"{"text":"a"}"#).await)
                .await
                .0,
            200
        );
        let (chunks, script) = event_stream();
        decode.then(script);
        chunks.send(chunk("data: [DONE]\n\n")).await.unwrap();
        drop(chunks);
        assert_eq!(
            whole(router.post("/generate", r#"{"text":"a"}"#).await)
                .await
                .0,
            200
        );
    }
    assert_eq!(router.metric("kvrouter_client_disconnects_total").await, 0);
    // The drain carries out every abort that is queued; there must be none.
    router.stop();
    router.ended().await;
    assert!(prefill.was_left_alone() && decode.was_left_alone());
    for worker in [&prefill, &decode] {
        assert!(
            worker.connections() < 10,
            "{} connections for 100 requests",
            worker.connections()
        );
    }
}

#[tokio::test]
async fn large_bodies_arrive_whole() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let text: String = (0..300_000).map(|number| format!("{number:010}")).collect();
    let body = format!("{{\"text\":\"{text}\"}}");
    assert_eq!(whole(router.post("/generate", body).await).await.0, 200);
    for leg in [prefill.request().await, decode.request().await] {
        assert!(
            leg.json()["text"] == text.as_str(),
            "three megabytes were changed on the way"
        );
    }
}

#[tokio::test]
async fn an_answer_without_a_byte_is_an_answer() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let (prefill_chunks, script) = event_stream();
    prefill.then(script);
    let (chunks, script) = event_stream();
    decode.then(script);
    drop(chunks);
    let response = router
        .post("/generate", r#"{"text":"a","stream":true}"#)
        .await;
    assert_eq!(whole(response).await, (200, String::new()));
    drop(prefill_chunks);
}

#[tokio::test]
async fn questions_go_to_one_worker_that_answers() {
    let decode = FakeWorker::start().await;
    let router = Running::start(config(&["http://127.0.0.1:1"], &[&decode.url])).await;
    for path in ["/v1/models", "/model_info?x=1", "/server_info"] {
        assert_eq!(
            router.read(path).await,
            (200, format!("worker answers {path}"))
        );
    }
}

#[tokio::test]
async fn pairs_do_not_lock() {
    let mut prefills = [FakeWorker::start().await, FakeWorker::start().await];
    let mut decodes = [FakeWorker::start().await, FakeWorker::start().await];
    let router = Running::start(config(
        &[&prefills[0].url, &prefills[1].url],
        &[&decodes[0].url, &decodes[1].url],
    ))
    .await;
    while router.metric("kvrouter_worker_ready{leg=\"prefill\"").await == 0
        && router.read("/ready").await.1.contains("\":1")
    {}
    let mut rooms_of = Vec::new();
    for _ in 0..8 {
        assert_eq!(
            whole(router.post("/generate", r#"{"text":"a"}"#).await)
                .await
                .0,
            200
        );
    }
    for worker in prefills.iter_mut().chain(&mut decodes) {
        let mut rooms = HashSet::new();
        for _ in 0..4 {
            rooms.insert(
                worker.request().await.json()["bootstrap_room"]
                    .as_u64()
                    .unwrap(),
            );
        }
        rooms_of.push(rooms);
    }
    for prefill in 0..2 {
        for decode in 2..4 {
            let shared = rooms_of[prefill].intersection(&rooms_of[decode]).count();
            assert_eq!(shared, 2, "prefill {prefill} with decode {decode}");
        }
    }
}
