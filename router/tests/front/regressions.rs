//! One test for each group of complaints about other routers that concerns the front door (the numbers are those of the
//! list this project keeps of them).

use std::time::Duration;

use hyper::StatusCode;
use kvrouter::Config;
use kvrouter::pool::breaker::BreakerLimits;
use serde_json::json;

use crate::fakes::{
    FakeWorker, Running, Script, chunk, config, event_stream, next_piece, soon, whole, whole_stream,
};

const WHOLE: &str = r#"{"text":"a"}"#;
const STREAM: &str = r#"{"text":"a","stream":true}"#;

async fn workers(count: usize) -> Vec<FakeWorker> {
    let mut workers = Vec::new();
    for _ in 0..count {
        workers.push(FakeWorker::start().await);
    }
    workers
}

fn urls(workers: &[FakeWorker]) -> Vec<&str> {
    workers.iter().map(|worker| worker.url.as_str()).collect()
}

fn received(worker: &mut FakeWorker) -> usize {
    std::iter::from_fn(|| worker.request_now()).count()
}

#[tokio::test]
async fn group_1_not_everything_lands_on_the_first_prefill() {
    let (mut prefills, decodes) = (workers(4).await, workers(1).await);
    let router = Running::start(config(&urls(&prefills), &urls(&decodes))).await;
    router.ready(4, 1).await;
    for _ in 0..40 {
        assert_eq!(whole(router.post("/generate", WHOLE).await).await.0, 200);
    }
    let counts: Vec<_> = prefills.iter_mut().map(received).collect();
    assert_eq!(counts, [10; 4]);
}

#[tokio::test]
async fn group_2_prefill_is_free_when_the_cache_is_sent() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let load = "kvrouter_worker_requests";
    let (prefill_chunks, script) = event_stream();
    prefill.then(script);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    assert_eq!(router.of_worker(load, &prefill).await, 1);
    assert_eq!(router.of_worker(load, &decode).await, 1);
    drop(prefill_chunks);
    soon(async { while router.of_worker(load, &prefill).await > 0 {} }).await;
    assert_eq!(router.of_worker(load, &decode).await, 1, "still generating");
    drop(chunks);
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    soon(async { while router.of_worker(load, &decode).await > 0 {} }).await;
}

#[tokio::test]
async fn group_5_roles_and_probes_do_not_touch_each_others_load() {
    let (mut prefills, mut decodes) = (workers(2).await, workers(2).await);
    let router = Running::start(config(&urls(&prefills), &urls(&decodes))).await;
    router.ready(2, 2).await;
    let (chunks, script) = event_stream();
    decodes[0].then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    // Probes come and go, one decode stops being ready: neither changes what the other holds.
    decodes[1].set_probe_answers(503, 503);
    router.ready(2, 1).await;
    let probed = decodes[0].probe().await;
    assert_eq!(probed.0, "/ready");
    assert_eq!(
        router
            .of_worker("kvrouter_worker_requests", &decodes[0])
            .await,
        1
    );
    for _ in 0..10 {
        assert_eq!(whole(router.post("/generate", WHOLE).await).await.0, 200);
    }
    // An unbalanced decode side leaves the prefill side balanced.
    let counts: Vec<_> = prefills.iter_mut().map(received).collect();
    assert!(
        counts.iter().all(|count| (4..=7).contains(count)),
        "{counts:?}"
    );
    assert_eq!(received(&mut decodes[1]), 0);
}

#[tokio::test]
async fn group_8_a_prefill_that_aborts_leaves_no_decode_hanging() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let abort = r#"{"meta_info":{"finish_reason":{"type":"abort","message":"kv pool is full","status_code":503}}}"#;
    prefill.then(whole_stream(&[abort]).await);
    decode.then(Script::Hang);
    let (status, text) = whole(router.post("/generate", STREAM).await).await;
    assert_eq!(status, 503);
    assert!(text.contains("kv pool is full"), "{text}");
    let request = decode.request().await;
    decode.dropped().await;
    assert_eq!(decode.abort().await, json!({"rid": request.json()["rid"]}));
}

#[tokio::test]
async fn group_11_the_client_hears_of_prefills_error_while_decode_streams() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let (prefill_chunks, script) = event_stream();
    prefill.then(script);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    let abort = "data: {\"error\":{\"message\":\"prefill lost its card\",\"code\":500}}\n\n";
    prefill_chunks.send(chunk(abort)).await.unwrap();
    let event = next_piece(&mut body).await.unwrap().unwrap();
    assert!(event.contains("prefill lost its card"), "{event}");
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    decode.dropped().await;
}

#[tokio::test]
async fn group_15_a_full_decode_is_waited_for_within_bounds() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        decode_requests_max: Some(1),
        queue_max: 1,
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    decode.request().await;
    let second = router.post("/generate", WHOLE);
    let others = async {
        let waiting = "kvrouter_requests_without_worker";
        soon(async { while router.metric(waiting).await == 0 {} }).await;
        let third = router.post("/generate", WHOLE).await;
        assert_eq!(third.status(), StatusCode::TOO_MANY_REQUESTS);
        assert!(third.headers().contains_key("retry-after"));
        assert!(decode.request_now().is_none(), "nobody overtakes the limit");
        drop(chunks);
        assert_eq!(next_piece(&mut body).await.unwrap(), None);
    };
    let (second, ()) = tokio::join!(second, others);
    assert_eq!(whole(second).await.0, 200);
}

#[tokio::test]
async fn group_15_waiting_ends_in_time() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        requests_max: 1,
        queue_timeout: Duration::from_millis(20),
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    let late = router.post("/generate", WHOLE).await;
    assert_eq!(late.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(late.headers().contains_key("retry-after"));
}

#[tokio::test]
async fn group_20_a_worker_that_recovers_serves_again() {
    let prefills = workers(2).await;
    let decode = FakeWorker::start().await;
    let router = Running::start(Config {
        breaker: BreakerLimits {
            failures: 2,
            open: Duration::from_millis(200),
        },
        ..config(&urls(&prefills), &[&decode.url])
    })
    .await;
    router.ready(2, 1).await;
    prefills[0].set_default(500);
    let state = "kvrouter_breaker_state";
    soon(async {
        while router.of_worker(state, &prefills[0]).await != 1 {
            assert_eq!(whole(router.post("/generate", WHOLE).await).await.0, 200);
        }
    })
    .await;
    prefills[0].set_default(200);
    soon(async {
        while router.of_worker(state, &prefills[0]).await != 0 {
            assert_eq!(whole(router.post("/generate", WHOLE).await).await.0, 200);
        }
    })
    .await;
    assert_eq!(router.of_worker(state, &decode).await, 0);
}

#[tokio::test]
async fn group_23_prefills_lag_costs_nothing_and_blames_nobody() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let mut lagging = Vec::new();
    for _ in 0..20 {
        let (prefill_chunks, script) = event_stream();
        prefill.then(script);
        decode.then(whole_stream(&["1", "2"]).await);
        // Prefill's answer is still open when decode's is complete.
        let answer = whole(router.post("/generate", STREAM).await).await;
        assert_eq!(answer, (200, "data: 1\n\ndata: 2\n\n".to_owned()));
        lagging.push(prefill_chunks);
    }
    drop(lagging);
    let done = "kvrouter_leg_successes_total";
    soon(async { while router.of_worker(done, &prefill).await < 20 {} }).await;
    assert_eq!(router.of_worker(done, &decode).await, 20);
    assert_eq!(
        router.failures(&prefill).await + router.failures(&decode).await,
        0
    );
    assert!(prefill.was_left_alone());
}

#[tokio::test]
async fn group_31_a_silent_worker_does_not_gather_probes() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    decode.ignore_probes();
    let _router = Running::between(&prefill, &decode).await;
    decode.probe().await;
    for _ in 0..20 {
        prefill.probe().await;
    }
    assert!(
        decode.probe_now().is_none(),
        "a second probe before the first one ended"
    );
}

#[tokio::test]
async fn group_32_many_choices_never_share_a_room() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let answer = r#"[{"text":"x"},{"text":"y"}]"#;
    for _ in 0..16 {
        decode.then(Script::Reply(200, answer));
    }
    let body = r#"{"text":["a","b"],"sampling_params":{"n":16},"bootstrap_room":[7,7]}"#;
    let (status, text) = whole(router.post("/generate", body).await).await;
    assert_eq!(status, 200);
    assert_eq!(text.matches("\"text\"").count(), 32);
    let mut rooms = Vec::new();
    for _ in 0..16 {
        let mut json = prefill.request().await.json();
        rooms.extend(serde_json::from_value::<Vec<u64>>(json["bootstrap_room"].take()).unwrap());
    }
    rooms.sort_unstable();
    rooms.dedup();
    assert_eq!(rooms.len(), 32);
    assert_eq!(router.metric("kvrouter_live_rooms").await, 0);
}
