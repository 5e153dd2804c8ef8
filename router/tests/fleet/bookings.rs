//! What the scheduler counts on ends with the request, whatever becomes of it.

use std::time::Duration;

use hyper::Method;
use kvrouter::Config;
use kvrouter::config::scheduling::Scheduling;
use kvrouter::schedule::Policy;

use crate::fakes::{
    FakeWorker, Running, Script, breakage, chunk, config, event_stream, next_piece, soon, whole,
};

const STREAM: &str = r#"{"text":"a","stream":true}"#;

async fn assert_nothing_left(router: &Running, after: &str) {
    let left = async {
        let mut left = Vec::new();
        for name in [
            "kvrouter_bookings",
            "kvrouter_live_rooms",
            "kvrouter_requests_without_worker",
        ] {
            left.push(router.metric(name).await);
        }
        left
    };
    let all = left.await;
    if all != [0, 0, 0] {
        // Cancelled requests end as soon as their tasks are dropped, which is soon and not at once.
        let none = async { while router.metric("kvrouter_bookings").await > 0 {} };
        let none = tokio::time::timeout(Duration::from_secs(10), none).await;
        assert!(none.is_ok(), "bookings are left after {after}: {all:?}");
    }
}

#[tokio::test]
async fn no_fate_of_a_request_leaves_a_booking() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        first_byte_timeout: Some(Duration::from_millis(300)),
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    router.ready(1, 1).await;

    whole(router.post("/generate", STREAM).await).await;
    assert_nothing_left(&router, "an answer").await;

    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    assert_eq!(router.metric("kvrouter_bookings").await, 1);
    chunks.send(breakage()).await.unwrap();
    while let Ok(Some(_)) = next_piece(&mut body).await {}
    assert_nothing_left(&router, "a decode that died").await;

    prefill.then(Script::Reply(500, "{}"));
    decode.then(Script::Hang);
    whole(router.post("/generate", STREAM).await).await;
    assert_nothing_left(&router, "a prefill that failed").await;

    decode.then(Script::Reply(400, "{}"));
    prefill.then(Script::Hang);
    whole(router.post("/generate", STREAM).await).await;
    assert_nothing_left(&router, "a client's mistake").await;

    prefill.then(Script::Hang);
    decode.then(Script::Hang);
    let (status, _) = whole(router.post("/generate", STREAM).await).await;
    assert_eq!(status, 504);
    assert_nothing_left(&router, "a timeout").await;

    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    drop(body);
    soon(chunks.closed()).await;
    assert_nothing_left(&router, "a client that left").await;

    decode.then(Script::Reply(500, "{}")).then(Script::Hang);
    prefill.then(Script::Hang).then(Script::Hang);
    let body = r#"{"messages":[],"n":2}"#;
    whole(router.post("/v1/chat/completions", body).await).await;
    assert_nothing_left(&router, "choices of which one failed").await;
    while prefill.request_now().is_some() || decode.request_now().is_some() {}
}

#[tokio::test]
async fn every_policy_serves_and_tells_its_name() {
    for (policy, name) in Policy::ALL {
        let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let other = FakeWorker::start().await;
        let router = Running::start(Config {
            scheduling: Scheduling::with(policy),
            ..config(&[&prefill.url], &[&decode.url, &other.url])
        })
        .await;
        router.ready(1, 2).await;
        // One decode is not ready any more: nobody sends anything there.
        other.set_probe_answers(503, 503);
        router.ready(1, 1).await;
        for _ in 0..8 {
            let (status, _) = whole(router.post("/generate", STREAM).await).await;
            assert_eq!(status, 200, "{name}");
            decode.request().await;
        }
        let (_, text) = router.read("/debug/decisions?limit=1").await;
        assert!(text.contains(&format!("\"policy\":\"{name}\"")), "{text}");
        assert_nothing_left(&router, name).await;
    }
}

#[tokio::test]
async fn those_who_wait_for_a_worker_go_by_priority() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        decode_requests_max: Some(1),
        queue_max: 3,
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    router.ready(1, 1).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut first = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut first).await.unwrap().unwrap();
    decode.request().await;
    let ask = |name: &'static str, priority: i64| {
        let body = format!(r#"{{"text":"{name}","priority":{priority}}}"#);
        router.send(Method::POST, "/generate", &[], body)
    };
    let waiting = async |count: u64| {
        let wait =
            async { while router.metric("kvrouter_requests_without_worker").await != count {} };
        soon(wait).await;
    };
    let order = async {
        waiting(3).await;
        // The fourth is more important than the least important one, which is shed.
        let ((urgent, _), shed) =
            tokio::join!(async { whole(ask("urgent", 9).await).await }, async {
                waiting(3).await;
                drop(chunks);
                while next_piece(&mut first).await.unwrap().is_some() {}
                let mut order = Vec::new();
                for _ in 0..3 {
                    order.push(decode.request().await.json()["text"].to_string());
                }
                order
            });
        assert_eq!(urgent, 200);
        shed
    };
    let (low, (high, (normal, order))) =
        tokio::join!(async { whole(ask("low", -5).await).await }, async {
            waiting(1).await;
            tokio::join!(async { whole(ask("high", 5).await).await }, async {
                waiting(2).await;
                tokio::join!(async { whole(ask("normal", 0).await).await }, order)
            })
        });
    assert_eq!((low.0, high.0, normal.0), (429, 200, 200));
    assert_eq!(order, [r#""urgent""#, r#""high""#, r#""normal""#]);
}
