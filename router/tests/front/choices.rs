//! Several choices, several prompts, and what only prefill knows of them.

use std::collections::HashSet;

use serde_json::{Value as Json, json};

use crate::fakes::{
    FakeWorker, Received, Running, Script, chunk, config, event_stream, events_of, next_piece,
    soon, whole, whole_stream,
};

fn chat_answer(id: &str, text: &str, tokens: u64) -> Script {
    Script::Say(
        json!({"id": id, "object": "chat.completion", "model": "m",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}})
        .to_string(),
    )
}

async fn requests(worker: &mut FakeWorker, count: usize) -> Vec<Received> {
    let mut seen = Vec::new();
    for _ in 0..count {
        seen.push(worker.request().await);
    }
    seen
}

/// All rooms in these requests, each of which has one of its own.
fn rooms(requests: &[Received]) -> HashSet<u64> {
    let all: Vec<u64> = requests
        .iter()
        .flat_map(|request| match request.json()["bootstrap_room"].take() {
            Json::Array(rooms) => rooms,
            room => vec![room],
        })
        .map(|room| room.as_u64().unwrap())
        .collect();
    let distinct: HashSet<u64> = all.iter().copied().collect();
    assert_eq!(distinct.len(), all.len(), "{all:?}");
    distinct
}

#[tokio::test]
async fn choices_get_requests_and_rooms_of_their_own() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    for (number, text) in ["a", "b", "c"].into_iter().enumerate() {
        decode.then(chat_answer(&format!("c{number}"), text, number as u64 + 1));
    }
    let body = r#"{"model":"m","zzz":0.10,"messages":[], "n" : 3,"rid":"mine"}"#;
    let (status, text) = whole(router.post("/v1/chat/completions", body).await).await;
    assert_eq!(status, 200, "{text}");
    let answer: Json = serde_json::from_str(&text).unwrap();
    let indices: Vec<_> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2]);
    let texts: HashSet<_> = (0..3)
        .map(|choice| {
            answer["choices"][choice]["message"]["content"]
                .as_str()
                .unwrap()
        })
        .collect();
    assert_eq!(texts, HashSet::from(["a", "b", "c"]));
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13})
    );
    let (left, right) = (
        requests(&mut prefill, 3).await,
        requests(&mut decode, 3).await,
    );
    assert_eq!(rooms(&left), rooms(&right));
    for request in &left {
        let text = std::str::from_utf8(&request.body).unwrap();
        // All but our members, the client's id and the number of choices is as it was.
        assert!(
            text.ends_with(r#","model":"m","zzz":0.10,"messages":[], "n" : 1}"#),
            "{text}"
        );
        assert_ne!(request.json()["rid"], "mine");
    }
    assert_eq!(router.metric("kvrouter_live_requests").await, 0);
}

#[tokio::test]
async fn choices_of_a_batch_are_numbered_prompt_by_prompt() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    for _ in 0..2 {
        decode.then(Script::Reply(
            200,
            r#"{"id":"x","choices":[{"index":0,"text":"p"},{"index":1,"text":"q"}]}"#,
        ));
    }
    let body = r#"{"prompt":["p","q"],"n":2}"#;
    let (_, text) = whole(router.post("/v1/completions", body).await).await;
    assert_eq!(
        text,
        concat!(
            r#"{"id":"x","choices":[{"index":0,"text":"p"},{"index":1,"text":"p"},"#,
            r#"{"index":2,"text":"q"},{"index":3,"text":"q"}]}"#
        )
    );
    assert_eq!(rooms(&requests(&mut decode, 2).await).len(), 4);
    requests(&mut prefill, 2).await;

    // `/generate` says it in the sampling parameters and answers with a list.
    for _ in 0..2 {
        decode.then(Script::Reply(200, r#"{"text":"x"}"#));
    }
    let body = r#"{"text":"a","sampling_params":{"n":2,"temperature":0.70}}"#;
    let (_, text) = whole(router.post("/generate", body).await).await;
    assert_eq!(text, r#"[{"text":"x"},{"text":"x"}]"#);
    let seen = requests(&mut decode, 2).await;
    assert_eq!(rooms(&seen), rooms(&requests(&mut prefill, 2).await));
    assert!(seen[0].json()["bootstrap_room"].is_u64());
    assert!(
        std::str::from_utf8(&seen[0].body)
            .unwrap()
            .ends_with(r#""sampling_params":{"n":1,"temperature":0.70}}"#)
    );
}

#[tokio::test]
async fn streams_of_choices_become_one() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    for id in ["a", "b"] {
        let text =
            format!(r#"{{"id":"{id}","choices":[{{"index":0,"delta":{{"content":"{id}"}}}}]}}"#);
        let usage = format!(
            r#"{{"id":"{id}","choices":[],"usage":{{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6}}}}"#
        );
        decode.then(whole_stream(&[&text, &usage, "[DONE]"]).await);
    }
    let body = r#"{"messages":[],"n":2,"stream":true,"stream_options":{"include_usage":true}}"#;
    let response = router.post("/v1/chat/completions", body).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let (status, text) = whole(response).await;
    assert_eq!(status, 200);
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let events = events_of(&text);
    assert_eq!(events.len(), 4, "{text}");
    let ids: HashSet<_> = events[..3]
        .iter()
        .map(|event| event["id"].to_string())
        .collect();
    assert_eq!(ids.len(), 1, "one answer, one id");
    let mut indices: Vec<_> = events[..2]
        .iter()
        .map(|event| event["choices"][0]["index"].as_u64().unwrap())
        .collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1]);
    assert_eq!(
        events[2]["usage"],
        json!({"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8})
    );
    assert_eq!(
        rooms(&requests(&mut prefill, 2).await),
        rooms(&requests(&mut decode, 2).await)
    );
}

#[tokio::test]
async fn a_choice_that_fails_cancels_the_others() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    // Before anything is out: the client gets the status.
    decode
        .then(Script::Hang)
        .then(Script::Reply(400, r#"{"m":1}"#));
    prefill.then(Script::Hang).then(Script::Hang);
    let body = r#"{"messages":[],"n":2}"#;
    let (status, text) = whole(router.post("/v1/chat/completions", body).await).await;
    assert_eq!((status, text.as_str()), (400, r#"{"m":1}"#));
    decode.dropped().await;
    decode.abort().await;
    for _ in 0..2 {
        prefill.dropped().await;
        prefill.abort().await;
    }
    // In the stream: an error event ends it.
    let (first, script) = event_stream();
    decode.then(script);
    let (second, script) = event_stream();
    decode.then(script);
    for chunks in [&first, &second] {
        let event = "data: {\"id\":\"x\",\"choices\":[{\"index\":0}]}\n\n";
        chunks.send(chunk(event)).await.unwrap();
    }
    let body = r#"{"messages":[],"n":2,"stream":true}"#;
    let mut body = router.post("/v1/chat/completions", body).await.into_body();
    for _ in 0..2 {
        next_piece(&mut body).await.unwrap().unwrap();
    }
    first.send(crate::fakes::breakage()).await.unwrap();
    let event = next_piece(&mut body).await.unwrap().unwrap();
    assert!(event.contains("\"error\""), "{event}");
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    decode.dropped().await;
    decode.abort().await;
    soon(second.closed()).await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_every_choice() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    for _ in 0..3 {
        prefill.then(Script::Hang);
        decode.then(Script::Hang);
    }
    {
        let waiting = router.post("/v1/chat/completions", r#"{"messages":[],"n":3}"#);
        tokio::select! {
            _ = waiting => panic!("nobody answered"),
            seen = requests(&mut decode, 3) => assert_eq!(seen.len(), 3),
        }
    }
    for worker in [&mut prefill, &mut decode] {
        for _ in 0..3 {
            worker.dropped().await;
            worker.abort().await;
        }
    }
}

const PREFILL: &str =
    r#"{"text":"x","meta_info":{"id":"1","input_token_logprobs":[[null,5,null],[-1.50,6,null]]}}"#;
const DECODE: &str =
    r#"{"text":"xy","meta_info":{"input_token_logprobs":[[-2.0,7,null]],"completion_tokens":2}}"#;
const MERGED: &str = r#"{"text":"xy","meta_info":{"input_token_logprobs":[[null,5,null],[-1.50,6,null],[-2.0,7,null]],"completion_tokens":2}}"#;

#[tokio::test]
async fn log_probabilities_of_the_prompt_come_from_prefill() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    prefill.then(Script::Reply(200, PREFILL));
    decode.then(Script::Reply(200, DECODE));
    let body = r#"{"text":"a","return_logprob":true,"logprob_start_len":0}"#;
    let answer = whole(router.post("/generate", body).await).await;
    assert_eq!(answer, (200, MERGED.to_owned()));

    // Not asked for, not touched.
    prefill.then(Script::Reply(200, PREFILL));
    decode.then(Script::Reply(200, DECODE));
    let answer = whole(router.post("/generate", r#"{"text":"a"}"#).await).await;
    assert_eq!(answer, (200, DECODE.to_owned()));

    // Prefill does not tell: decode's own answer is what there is.
    decode.then(Script::Reply(200, DECODE));
    let answer = whole(router.post("/generate", body).await).await;
    assert_eq!(answer, (200, DECODE.to_owned()));
    assert_eq!(router.metric("kvrouter_logprobs_unmerged_total").await, 1);
}

#[tokio::test]
async fn log_probabilities_are_in_every_event_of_a_stream() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let (prefill_chunks, script) = event_stream();
    prefill.then(script);
    let (chunks, script) = event_stream();
    decode.then(script);
    // Decode is ahead, and its second event comes in two pieces.
    let event = format!("data: {DECODE}\n\n");
    chunks.send(Ok(event.clone().into())).await.unwrap();
    let body = r#"{"text":"a","return_logprob":true,"stream":true}"#;
    let answer = async {
        let mut body = router.post("/generate", body).await.into_body();
        let first = next_piece(&mut body).await.unwrap().unwrap();
        assert_eq!(first, format!("data: {MERGED}\n\n"));
        let (start, end) = event.split_at(40);
        for part in [start, end] {
            chunks.send(Ok(part.to_owned().into())).await.unwrap();
        }
        drop(chunks);
        let mut rest = String::new();
        while let Some(piece) = next_piece(&mut body).await.unwrap() {
            rest.push_str(&piece);
        }
        assert_eq!(rest, format!("data: {MERGED}\n\n"));
    };
    let telling = async {
        prefill.request().await;
        let told = format!("data: {PREFILL}\n\ndata: [DONE]\n\n");
        prefill_chunks.send(Ok(told.into())).await.unwrap();
        drop(prefill_chunks);
    };
    tokio::join!(answer, telling);
}

#[tokio::test]
async fn choices_and_log_probabilities_work_together() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(config(&[&prefill.url], &[&decode.url])).await;
    for _ in 0..2 {
        prefill.then(Script::Reply(200, PREFILL));
        decode.then(Script::Reply(200, DECODE));
    }
    let body = r#"{"text":"a","return_logprob":true,"sampling_params":{"n":2}}"#;
    let (_, text) = whole(router.post("/generate", body).await).await;
    assert_eq!(text, format!("[{MERGED},{MERGED}]"));
}

#[tokio::test]
async fn an_echoed_prompt_has_log_probabilities_in_completions() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let told = r#"{"choices":[{"index":0,"text":"a b","logprobs":{"tokens":["a"," b"],"token_logprobs":[null,-1.50],"top_logprobs":[null,{}]}}]}"#;
    let own = r#"{"choices":[{"index":0,"text":"a b c","logprobs":{"tokens":[" b"," c"],"token_logprobs":[-1.50,-2.0],"top_logprobs":[{},{}]}}]}"#;
    let whole_one = r#"{"choices":[{"index":0,"text":"a b c","logprobs":{"tokens":["a"," b"," c"],"token_logprobs":[null,-1.50,-2.0],"top_logprobs":[null,{},{}]}}]}"#;
    for (body, wanted) in [
        (r#"{"prompt":"a","echo":true,"logprobs":1}"#, whole_one),
        (r#"{"prompt":"a","echo":false,"logprobs":1}"#, own),
        (r#"{"prompt":"a","echo":true}"#, own),
        (r#"{"prompt":"a","echo":true,"logprobs":0}"#, own),
    ] {
        prefill.then(Script::Reply(200, told));
        decode.then(Script::Reply(200, own));
        let answer = whole(router.post("/v1/completions", body).await).await;
        assert_eq!(answer, (200, wanted.to_owned()), "{body}");
    }
    // In a stream the prompt is told of once.
    prefill.then(whole_stream(&[told, "[DONE]"]).await);
    decode.then(whole_stream(&[own, own, "[DONE]"]).await);
    let body = r#"{"prompt":"a","echo":true,"logprobs":1,"stream":true}"#;
    let (status, text) = whole(router.post("/v1/completions", body).await).await;
    let wanted = format!("data: {whole_one}\n\ndata: {own}\n\ndata: [DONE]\n\n");
    assert_eq!((status, text), (200, wanted));
}
