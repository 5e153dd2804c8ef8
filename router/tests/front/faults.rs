//! The fault table of the PD routing contract: who fails, what the client gets, who is cancelled, who is blamed.
//!
//! The other leg would take for ever, so whatever these tests see happens because of the fault, not of its end.

use std::time::Duration;

use kvrouter::pool::breaker::BreakerLimits;
use serde_json::json;

use crate::fakes::{
    FakeWorker, Received, Running, Script, breakage, chunk, config, event_stream, next_piece,
    whole, whole_stream,
};

const WHOLE: &str = r#"{"text":"a"}"#;
const STREAM: &str = r#"{"text":"a","stream":true}"#;
const ABORT: &str = r#"{"text":"","meta_info":{"finish_reason":{"type":"abort","message":"out of memory","status_code":500}}}"#;

const LOST: &str =
    r#"{"error":{"message":"Decode transfer failed for request rank=0","code":500}}"#;

async fn assert_cancelled(worker: &mut FakeWorker, request: &Received) {
    worker.dropped().await;
    assert_eq!(worker.abort().await, json!({"rid": request.json()["rid"]}));
}

struct Cluster {
    prefills: [FakeWorker; 2],
    decodes: [FakeWorker; 2],
    router: Running,
}

impl Cluster {
    /// Two and two; the first request goes to the first of each.
    async fn start() -> Self {
        let prefills = [FakeWorker::start().await, FakeWorker::start().await];
        let decodes = [FakeWorker::start().await, FakeWorker::start().await];
        let router = Running::start(kvrouter::Config {
            // A trial while a slow machine still runs the test would count as one more failure.
            breaker: BreakerLimits {
                failures: 5,
                open: Duration::from_secs(3600),
            },
            ..config(
                &[&prefills[0].url, &prefills[1].url],
                &[&decodes[0].url, &decodes[1].url],
            )
        })
        .await;
        router.ready(2, 2).await;
        Self {
            prefills,
            decodes,
            router,
        }
    }
}

#[tokio::test]
async fn a_and_b_a_failed_prefill_is_replaced_and_decode_kept() {
    for (body, streams) in [(WHOLE, false), (STREAM, true)] {
        let mut cluster = Cluster::start().await;
        cluster.prefills[0].then(Script::Reply(500, "{}"));
        cluster.decodes[0].then(Script::Hang);
        cluster.decodes[0].then(if streams {
            whole_stream(&["1"]).await
        } else {
            Script::Reply(200, "1")
        });
        let expected = if streams { "data: 1\n\n" } else { "1" };
        let answer = whole(cluster.router.post("/generate", body).await).await;
        assert_eq!(answer, (200, expected.to_owned()));
        let [first, second] = [
            cluster.decodes[0].request().await,
            cluster.decodes[0].request().await,
        ];
        assert_cancelled(&mut cluster.decodes[0], &first).await;
        let [refused, served] = [
            cluster.prefills[0].request().await,
            cluster.prefills[1].request().await,
        ];
        assert_eq!(refused.body, first.body);
        assert_eq!(served.body, second.body);
        for name in ["bootstrap_room", "rid"] {
            assert_ne!(first.json()[name], second.json()[name], "{name}");
        }
        assert!(cluster.decodes[1].request_now().is_none());
        assert_eq!(cluster.router.failures(&cluster.prefills[0]).await, 1);
        assert_eq!(cluster.router.failures(&cluster.decodes[0]).await, 0);
        assert_eq!(cluster.router.metric("kvrouter_retries_total").await, 1);
    }
}

#[tokio::test]
async fn c_a_failed_decode_is_replaced_and_prefill_kept() {
    for status in [503, 500] {
        let mut cluster = Cluster::start().await;
        cluster.prefills[0].then(Script::Hang);
        cluster.decodes[0].then(Script::Reply(status, "{}"));
        let answer = whole(cluster.router.post("/generate", WHOLE).await).await;
        assert_eq!(answer.0, 200);
        let [first, second] = [
            cluster.prefills[0].request().await,
            cluster.prefills[0].request().await,
        ];
        assert_cancelled(&mut cluster.prefills[0], &first).await;
        assert_eq!(cluster.decodes[1].request().await.body, second.body);
        assert!(cluster.prefills[1].request_now().is_none());
        assert_eq!(cluster.router.failures(&cluster.prefills[0]).await, 0);
        assert_eq!(cluster.router.failures(&cluster.decodes[0]).await, 1);
    }
}

#[tokio::test]
async fn d_the_first_byte_does_not_wait_for_prefill() {
    let mut cluster = Cluster::start().await;
    cluster.prefills[0].then(Script::Hang);
    let (chunks, script) = event_stream();
    cluster.decodes[0].then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = cluster.router.post("/generate", STREAM).await.into_body();
    assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "data: 1\n\n");
    assert!(cluster.prefills[0].was_left_alone());
}

#[tokio::test]
async fn e_a_decode_that_dies_in_its_stream_is_told_of() {
    let mut cluster = Cluster::start().await;
    cluster.prefills[0].then(Script::Hang);
    let (chunks, script) = event_stream();
    cluster.decodes[0].then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = cluster.router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    chunks.send(breakage()).await.unwrap();
    let event = next_piece(&mut body).await.unwrap().unwrap();
    assert!(event.contains("\"code\":502"), "{event}");
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    let request = cluster.prefills[0].request().await;
    assert_cancelled(&mut cluster.prefills[0], &request).await;
    // Bytes are out: there is no second try.
    assert_eq!(cluster.router.metric("kvrouter_retries_total").await, 0);
}

#[tokio::test]
async fn f_a_4xx_is_the_clients_and_is_not_tried_again() {
    for (status, from_prefill) in [(400, true), (422, true), (404, false), (429, false)] {
        let mut cluster = Cluster::start().await;
        let (guilty, healthy) = if from_prefill {
            (&cluster.prefills[0], &mut cluster.decodes[0])
        } else {
            (&cluster.decodes[0], &mut cluster.prefills[0])
        };
        guilty.then(Script::Reply(status, r#"{"message":"no"}"#));
        healthy.then(Script::Hang);
        let answer = whole(cluster.router.post("/generate", WHOLE).await).await;
        assert_eq!(answer, (status, r#"{"message":"no"}"#.to_owned()));
        let request = healthy.request().await;
        assert_cancelled(healthy, &request).await;
        assert_eq!(cluster.router.metric("kvrouter_retries_total").await, 0);
    }
}

/// Sends `body`, waits until both workers have it and `begun` bytes are back, and leaves.
async fn leave(cluster: &mut Cluster, body: &'static str, reads: bool) -> [Received; 2] {
    let Cluster {
        prefills,
        decodes,
        router,
    } = cluster;
    let client = async {
        let mut body = router.post("/generate", body).await.into_body();
        if reads {
            next_piece(&mut body).await.unwrap().unwrap();
        }
        std::future::pending::<()>().await;
    };
    let workers = async {
        let seen = [prefills[0].request().await, decodes[0].request().await];
        if reads {
            // The byte is on its way; the stream is what the client leaves.
            while router.metric("kvrouter_added_latency_seconds_count").await == 0 {}
        }
        seen
    };
    tokio::select! {
        () = client => unreachable!(),
        seen = workers => seen,
    }
}

#[tokio::test]
async fn g_h_i_a_client_that_leaves_cancels_both_legs() {
    // Before any answer; in decode's stream; in a stream that waits for prefill.
    for (body, decode_begins) in [(WHOLE, false), (STREAM, true), (STREAM, false)] {
        let mut cluster = Cluster::start().await;
        cluster.prefills[0].then(Script::Hang);
        let (chunks, script) = event_stream();
        cluster.decodes[0].then(if decode_begins { script } else { Script::Hang });
        if decode_begins {
            chunks.send(chunk("data: 1\n\n")).await.unwrap();
        }
        let [left, right] = leave(&mut cluster, body, decode_begins).await;
        assert_cancelled(&mut cluster.prefills[0], &left).await;
        assert_cancelled(&mut cluster.decodes[0], &right).await;
        for worker in cluster.prefills.iter().chain(&cluster.decodes) {
            assert_eq!(cluster.router.failures(worker).await, 0);
        }
        let gone = "kvrouter_client_disconnects_total";
        assert_eq!(cluster.router.metric(gone).await, 1);
    }
}

#[tokio::test]
async fn only_the_guilty_breaker_opens() {
    let cluster = Cluster::start().await;
    cluster.prefills[0].set_default(500);
    for _ in 0..40 {
        let answer = whole(cluster.router.post("/generate", WHOLE).await).await;
        assert_eq!(answer.0, 200);
    }
    let state = "kvrouter_breaker_state";
    let router = &cluster.router;
    assert_eq!(router.of_worker(state, &cluster.prefills[0]).await, 1);
    for innocent in [
        &cluster.prefills[1],
        &cluster.decodes[0],
        &cluster.decodes[1],
    ] {
        assert_eq!(router.of_worker(state, innocent).await, 0);
        assert_eq!(router.failures(innocent).await, 0);
    }
    // Five failures opened it; after that nobody was sent there.
    assert_eq!(router.failures(&cluster.prefills[0]).await, 5);
}

#[tokio::test]
async fn an_abort_before_the_first_byte_is_tried_elsewhere() {
    for by_prefill in [true, false] {
        let mut cluster = Cluster::start().await;
        let guilty = if by_prefill {
            cluster.decodes[0].then(Script::Hang);
            &cluster.prefills[0]
        } else {
            &cluster.decodes[0]
        };
        guilty.then(whole_stream(&[ABORT]).await);
        let served = if by_prefill {
            &cluster.decodes[0]
        } else {
            &cluster.decodes[1]
        };
        served.then(whole_stream(&["1"]).await);
        let answer = whole(cluster.router.post("/generate", STREAM).await).await;
        assert_eq!(answer, (200, "data: 1\n\n".to_owned()));
        let router = &cluster.router;
        assert_eq!(router.metric("kvrouter_inband_aborts_total").await, 1);
        assert_eq!(router.failures(guilty).await, 1);
        if by_prefill {
            let first = cluster.decodes[0].request().await;
            assert_cancelled(&mut cluster.decodes[0], &first).await;
        }
    }
}

#[tokio::test]
async fn an_abort_without_another_worker_becomes_a_status() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    decode.then(whole_stream(&[ABORT]).await);
    let (status, text) = whole(router.post("/generate", STREAM).await).await;
    assert_eq!(status, 500);
    assert!(text.contains("out of memory"), "{text}");
}

#[tokio::test]
async fn an_abort_in_the_stream_is_passed_on_and_counted() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    prefill.then(Script::Hang);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    let request = prefill.request().await;
    chunks
        .send(Ok(format!("data: {ABORT}\n\n").into()))
        .await
        .unwrap();
    let event = next_piece(&mut body).await.unwrap().unwrap();
    assert_eq!(event, format!("data: {ABORT}\n\n"));
    assert_cancelled(&mut prefill, &request).await;
    drop(chunks);
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    let aborted = format!(
        "kvrouter_leg_failures_total{{leg=\"decode\",worker=\"{}\",reason=\"aborted\"}}",
        decode.url
    );
    assert_eq!(router.metric(&aborted).await, 1);
    assert_eq!(
        router
            .of_worker("kvrouter_leg_successes_total", &decode)
            .await,
        0
    );
}

#[tokio::test]
async fn a_broken_transfer_blames_nobody_and_changes_both() {
    let mut cluster = Cluster::start().await;
    cluster.prefills[0].then(Script::Hang);
    cluster.decodes[0].then(Script::Reply(500, LOST));
    let answer = whole(cluster.router.post("/generate", WHOLE).await).await;
    assert_eq!(answer.0, 200);
    cluster.prefills[1].request().await;
    cluster.decodes[1].request().await;
    // Again and again: what neither side can be blamed for opens no breaker.
    let mut lost = 0;
    for _ in 0..20 {
        for worker in &cluster.decodes {
            worker.then(Script::Reply(500, LOST));
        }
        let (status, _) = whole(cluster.router.post("/generate", WHOLE).await).await;
        lost += u32::from(status == 500);
    }
    assert_eq!(lost, 20, "both pairs lost it");
    for worker in cluster.prefills.iter().chain(&cluster.decodes) {
        let state = cluster.router.of_worker("kvrouter_breaker_state", worker);
        assert_eq!(state.await, 0);
    }
}
