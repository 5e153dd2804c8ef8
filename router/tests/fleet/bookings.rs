//! What the scheduler counts on ends with the request, whatever becomes of it.

use std::time::Duration;

use hyper::Method;
use kvrouter::Config;
use kvrouter::config::scheduling::Scheduling;
use kvrouter::config::telemetry::Telemetry;
use kvrouter::schedule::Policy;
use serde_json::json;

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
async fn a_decodes_pool_is_booked_with_what_requests_may_grow_to() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut scheduling = Scheduling::with(Policy::RoundRobin);
    scheduling.nominal.kv_tokens = Some(10_000);
    let telemetry = Telemetry {
        loads_interval: Some(Duration::from_millis(20)),
        ..Telemetry::default()
    };
    let router = Running::start(Config {
        scheduling,
        telemetry,
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    router.ready(1, 1).await;
    // Each may have 4000 tokens, of which decode holds next to nothing yet.
    let bounded = r#"{"text":"a","stream":true,"sampling_params":{"max_new_tokens":4000}}"#;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let (chunks, script) = event_stream();
        decode.then(script);
        chunks.send(chunk("data: 1\n\n")).await.unwrap();
        let mut body = router.post("/generate", bounded).await.into_body();
        next_piece(&mut body).await.unwrap().unwrap();
        decode.request().await;
        streams.push((chunks, body));
    }
    let used = router
        .of_worker("kvrouter_worker_kv_used_tokens", &decode)
        .await;
    assert!((8000..8100).contains(&used), "{used}");
    // Its own picture of itself, in which they are small, changes nothing.
    decode.set_loads(
        &json!({"loads": [{"dp_rank": 0, "num_running_reqs": 2, "num_used_tokens": 10,
                                        "max_total_num_tokens": 10_000}]}),
    );
    soon(async {
        while router
            .of_worker("kvrouter_worker_kv_used_tokens", &decode)
            .await
            != 10
        {}
    })
    .await;
    let third = router.post("/generate", bounded);
    let freeing = async {
        soon(async { while router.metric("kvrouter_requests_without_worker").await == 0 {} }).await;
        assert!(decode.request_now().is_none(), "it has to wait");
        drop(streams.pop());
    };
    let (answer, ()) = tokio::join!(third, freeing);
    assert_eq!(answer.status(), 200);
    drop(streams);
}

#[tokio::test]
async fn answers_without_a_bound_are_booked_with_an_estimate() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut scheduling = Scheduling::with(Policy::RoundRobin);
    scheduling.nominal.output_tokens = 700;
    let router = Running::start(Config {
        scheduling,
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    router.ready(1, 1).await;
    // The prompt itself has a token, or some of one.
    for (path, body, tokens) in [
        (
            "/v1/chat/completions",
            r#"{"messages":[],"stream":true}"#,
            701,
        ),
        (
            "/v1/chat/completions",
            r#"{"messages":[],"stream":true,"max_completion_tokens":9}"#,
            10,
        ),
        (
            "/v1/chat/completions",
            r#"{"messages":[],"stream":true,"max_tokens":1000000}"#,
            4097,
        ),
        (
            "/v1/responses",
            r#"{"input":"a","stream":true,"max_output_tokens":30}"#,
            31,
        ),
        (
            "/v1/completions",
            r#"{"prompt":["a","b"],"stream":true}"#,
            35,
        ),
        ("/generate", r#"{"text":"a","stream":true}"#, 129),
    ] {
        let (chunks, script) = event_stream();
        decode.then(script);
        chunks.send(chunk("data: 1\n\n")).await.unwrap();
        let mut answer = router.post(path, body).await.into_body();
        next_piece(&mut answer).await.unwrap().unwrap();
        let used = router
            .of_worker("kvrouter_worker_kv_used_tokens", &decode)
            .await;
        assert_eq!(used, tokens, "{path} {body}");
        drop(answer);
        soon(chunks.closed()).await;
        assert_nothing_left(&router, path).await;
        decode.request().await;
    }
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
