//! The other body modes of Envoy.

use crate::fakes::{FakeWorker, Script, chunk, event_stream, next_piece, whole_stream};
use crate::gateway::{Gateway, Setup, config};

async fn gateway_with(setup: Setup) -> (FakeWorker, FakeWorker, Gateway) {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gateway = Gateway::start(setup, config(&[&prefill.url], &[&decode.url])).await;
    (prefill, decode, gateway)
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn buffered_and_streamed_requests_are_served() {
    for (request_mode, eager) in [("BUFFERED", false), ("STREAMED", true)] {
        for response_mode in ["FULL_DUPLEX_STREAMED", "BUFFERED", "STREAMED", "NONE"] {
            let setup = Setup {
                request_mode,
                response_mode,
                eager,
                ..Setup::default()
            };
            let (mut prefill, mut decode, gateway) = gateway_with(setup).await;
            for size in [10, 300 << 10] {
                decode.then(Script::Say("\"done\"".to_owned()));
                let body = format!("{{\"text\":\"{}\"}}", "x".repeat(size));
                let answer = gateway.ask("/generate", body).await;
                let case = format!("{request_mode} {response_mode} {size}");
                assert_eq!(answer, (200, "\"done\"".to_owned()), "{case}");
                let (left, right) = (prefill.request().await, decode.request().await);
                assert_eq!(left.body, right.body, "{case}");
                assert!(right.json()["bootstrap_room"].as_u64().unwrap() > 0);
            }
            gateway
                .until("kvrouter_worker_requests{leg=\"decode\"", 0)
                .await;
        }
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn streams_flow_in_every_response_mode_but_buffered() {
    for response_mode in ["STREAMED", "NONE"] {
        let setup = Setup {
            response_mode,
            ..Setup::default()
        };
        let (_prefill, decode, gateway) = gateway_with(setup).await;
        let (chunks, script) = event_stream();
        decode.then(script);
        chunks.send(chunk("data: 1\n\n")).await.unwrap();
        let body = r#"{"text":"a","stream":true}"#;
        let mut answer = gateway.post("/generate", body).await.into_body();
        assert_eq!(
            next_piece(&mut answer).await.unwrap().unwrap(),
            "data: 1\n\n"
        );
        drop(chunks);
        assert_eq!(next_piece(&mut answer).await.unwrap(), None);
        gateway.until("kvrouter_live_requests", 0).await;
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn what_a_mode_cannot_do_is_said_with_the_fix() {
    let setup = Setup {
        response_mode: "STREAMED",
        ..Setup::default()
    };
    let (_prefill, mut decode, gateway) = gateway_with(setup).await;
    let message = r#"{"model":"m","max_tokens":5,"messages":[{"role":"user","content":"hi"}]}"#;
    for (path, body) in [
        ("/v1/messages", message),
        ("/generate", r#"{"text":"a","return_logprob":true}"#),
    ] {
        let (status, text) = gateway.ask(path, body).await;
        assert_eq!(status, 501, "{text}");
        assert!(text.contains("FULL_DUPLEX_STREAMED"), "{text}");
    }
    assert!(decode.request_now().is_none());
    // A body that the picker may not hold back is one it cannot change.
    let setup = Setup {
        request_mode: "STREAMED",
        ..Setup::default()
    };
    let (_prefill, _decode, gateway) = gateway_with(setup).await;
    let (status, text) = gateway.ask("/generate", r#"{"text":"a"}"#).await;
    assert_eq!(status, 500, "{text}");
    assert!(text.contains("request_body_mode"), "{text}");
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn messages_and_logprobs_come_back_as_from_the_front() {
    let (prefill, mut decode, gateway) = gateway_with(Setup::default()).await;
    let chat = r#"{"id":"x","choices":[{"message":{"content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#;
    let ask = |streams: bool| {
        format!(
            r#"{{"model":"m","max_tokens":5,"stream":{streams},"messages":[{{"role":"user","content":"hi"}}]}}"#
        )
    };
    decode.then(Script::Say(chat.to_owned()));
    let through = gateway.ask("/v1/messages", ask(false)).await;
    assert_eq!(decode.request().await.target, "/v1/chat/completions");
    decode.then(Script::Say(chat.to_owned()));
    let native =
        crate::fakes::whole(gateway.picker.front.post("/v1/messages", ask(false)).await).await;
    assert_eq!(through, native);
    let events = [
        r#"{"id":"x","choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}"#,
        "[DONE]",
    ];
    decode.then(whole_stream(&events).await);
    let through = gateway.ask("/v1/messages", ask(true)).await;
    decode.then(whole_stream(&events).await);
    let native =
        crate::fakes::whole(gateway.picker.front.post("/v1/messages", ask(true)).await).await;
    assert_eq!(through, native);
    assert!(through.1.contains("message_stop"), "{through:?}");
    let told = r#"{"text":"","meta_info":{"input_token_logprobs":[[-1.0,7,null]]}}"#;
    let own = r#"{"text":"b","meta_info":{"input_token_logprobs":[[-2.0,8,null]]}}"#;
    let body = r#"{"text":"a","return_logprob":true}"#;
    let mut answers = Vec::new();
    for through in [true, false] {
        prefill.then(Script::Say(told.to_owned()));
        decode.then(Script::Say(own.to_owned()));
        answers.push(if through {
            gateway.ask("/generate", body).await
        } else {
            crate::fakes::whole(gateway.picker.front.post("/generate", body).await).await
        });
    }
    assert!(
        answers[0].1.contains("[[-1.0,7,null],[-2.0,8,null]]"),
        "{answers:?}"
    );
    assert_eq!(answers[0], answers[1]);
}
