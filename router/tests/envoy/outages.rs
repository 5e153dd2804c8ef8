//! Pickers that go away and come back, and what Envoy makes of it.

use serde_json::json;

use crate::fakes::{FakeWorker, Running, Script, chunk, event_stream, next_piece, soon, whole};
use crate::gateway::{Binary, Envoy, Gateway, Setup, config, endpoint};

const GENERATE: &str = r#"{"text":"a"}"#;
const STREAM: &str = r#"{"text":"a","stream":true}"#;

/// What a request gets, asked until `accepts` likes it: Envoy makes a new connection when it is asked.
async fn until(client: &Running, accepts: impl Fn(u16) -> bool) {
    soon(async {
        while !accepts(whole(client.post("/generate", GENERATE).await).await.0) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn closed_failure_refuses_until_the_picker_is_back() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let picker = Binary::start(&prefill, &decode, "0").await;
    let envoy = Envoy::start(&Setup::default(), &picker.address).await;
    let client = Running::elsewhere(&envoy.url);
    assert_eq!(whole(client.post("/generate", GENERATE).await).await.0, 200);
    decode.request().await;
    let port = picker.port().to_owned();
    picker.kill().await;
    for _ in 0..3 {
        let (status, _) = whole(client.post("/generate", GENERATE).await).await;
        assert!((500..505).contains(&status), "{status}");
    }
    assert!(decode.request_now().is_none());
    let _back = Binary::start(&prefill, &decode, &port).await;
    until(&client, |status| status == 200).await;
    assert!(decode.request().await.json()["bootstrap_room"].is_u64());
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn open_failure_lets_requests_pass_without_a_pair() {
    for request_mode in ["FULL_DUPLEX_STREAMED", "BUFFERED"] {
        let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let setup = Setup {
            request_mode,
            failure_mode_allow: true,
            endpoints: vec![endpoint(&decode)],
            ..Setup::default()
        };
        let picker = Binary::start(&prefill, &decode, "0").await;
        let envoy = Envoy::start(&setup, &picker.address).await;
        let client = Running::elsewhere(&envoy.url);
        assert_eq!(whole(client.post("/generate", GENERATE).await).await.0, 200);
        assert!(decode.request().await.json()["bootstrap_room"].is_u64());
        let port = picker.port().to_owned();
        picker.kill().await;
        // Its own policy chooses, and the worker gets the client's bytes: right only for workers that can serve alone.
        let (status, _) = whole(client.send(hyper::Method::GET, "/v1/models", &[], "").await).await;
        assert_eq!(status, 200, "{request_mode}");
        let (status, _) = whole(client.post("/generate", GENERATE).await).await;
        if request_mode == "BUFFERED" {
            assert_eq!(status, 200);
            assert_eq!(decode.request().await.body, GENERATE);
        } else {
            // What it has begun to stream to the picker Envoy cannot take back.
            assert_eq!(status, 500);
        }
        let _back = Binary::start(&prefill, &decode, &port).await;
        soon(async {
            loop {
                let (status, _) = whole(client.post("/generate", GENERATE).await).await;
                if status == 200 && decode.request().await.json()["bootstrap_room"].is_u64() {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_picker_that_crashes_in_a_stream_leaves_nobody_waiting() {
    for failure_mode_allow in [false, true] {
        let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
        let setup = Setup {
            failure_mode_allow,
            ..Setup::default()
        };
        let picker = Binary::start(&prefill, &decode, "0").await;
        let envoy = Envoy::start(&setup, &picker.address).await;
        let client = Running::elsewhere(&envoy.url);
        prefill.then(Script::Hang);
        let (chunks, script) = event_stream();
        decode.then(script);
        chunks.send(chunk("data: 1\n\n")).await.unwrap();
        let mut body = client.post("/generate", STREAM).await.into_body();
        next_piece(&mut body).await.unwrap().unwrap();
        prefill.request().await;
        decode.request().await;
        picker.kill().await;
        // The prefill leg was the picker's: its connection is gone with it.
        prefill.dropped().await;
        let _ = chunks.send(chunk("data: 2\n\n")).await;
        drop(chunks);
        // Cut off or, when Envoy may go on alone, finished: in both cases it ends.
        let ended_well = loop {
            match next_piece(&mut body).await {
                Ok(Some(_)) => {}
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        assert!(
            failure_mode_allow || !ended_well,
            "a cut answer was taken for whole"
        );
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_drain_finishes_what_is_under_way() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut gateway = Gateway::between(&prefill, &decode).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = gateway.post("/generate", STREAM).await.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    gateway.picker.stop();
    chunks.send(chunk("data: 2\n\n")).await.unwrap();
    assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "data: 2\n\n");
    drop(chunks);
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    let Gateway { picker, envoy, .. } = gateway;
    picker.ended().await;
    drop(envoy);
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn a_drain_that_takes_too_long_cancels_what_is_left() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let settings = kvrouter::Config {
        drain_timeout: std::time::Duration::from_millis(200),
        ..config(&[&prefill.url], &[&decode.url])
    };
    let mut gateway = Gateway::start(Setup::default(), settings).await;
    prefill.then(Script::Hang);
    decode.then(Script::Hang);
    let ask = async { whole(gateway.post("/generate", GENERATE).await).await };
    let stop = async {
        let (left, right) = (prefill.request().await, decode.request().await);
        (left, right)
    };
    let request = tokio::select! {
        _ = ask => unreachable!("nobody answers"),
        (left, _) = stop => left,
    };
    // The client has gone with the future; a second one stays.
    assert_eq!(prefill.abort().await, json!({"rid": request.json()["rid"]}));
    prefill.then(Script::Hang);
    decode.then(Script::Hang);
    let mut stream = gateway.connect().await;
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{GENERATE}",
        GENERATE.len()
    );
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes())
        .await
        .unwrap();
    let left = prefill.request().await;
    gateway.picker.stop();
    assert_eq!(prefill.abort().await, json!({"rid": left.json()["rid"]}));
    let mut answer = vec![0; 64];
    let read = soon(tokio::io::AsyncReadExt::read(&mut stream, &mut answer))
        .await
        .unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(answer.starts_with("HTTP/1.1 5"), "{answer}");
}
