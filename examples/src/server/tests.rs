use std::net::SocketAddr;

use axum::http::{Method, Request, StatusCode};
use bytes::Bytes;
use clap::Parser as _;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::*;
use crate::cache::heap::heap_ranks;
use crate::cache::{RankMemory, RankShape};
use crate::pd::loopback::Hub;
use crate::pd::{Doorbell, Plane, Role};
use crate::settings::Settings;

/// A worker on an ephemeral port; it stops when this is dropped.
struct Worker {
    address: SocketAddr,
    mailbox: Arc<Mailbox>,
    _stop: oneshot::Sender<()>,
}

async fn worker(flags: &[&str], role: impl FnOnce(Vec<RankMemory>, Doorbell) -> Role) -> Worker {
    let args = ["kvworker", "--port", "0", "--layers", "2"]
        .iter()
        .chain(flags);
    let settings = Settings::parse_from(args);
    let plane = |settings: &Settings, bell| {
        let whole = RankShape {
            kv_heads: settings.kv_heads as usize,
            ..settings.rank()
        };
        let ranks = heap_ranks(whole, settings.tp as usize);
        Ok(Plane {
            ranks: ranks.clone(),
            role: role(ranks, bell),
            watch: None,
        })
    };
    let server = settings.build(plane).await.expect("a worker");
    let (address, mailbox) = (
        server.address().expect("bound"),
        server.app.mailbox().clone(),
    );
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(server.run(async {
        let _dropped = stopped.await;
    }));
    Worker {
        address,
        mailbox,
        _stop: stop,
    }
}

async fn null(flags: &[&str]) -> Worker {
    worker(flags, |_, _| Role::Null).await
}

async fn pair(prefill: &[&str], decode: &[&str]) -> (Hub, Worker, Worker) {
    let hub = Hub::default();
    let flags = |mode, rest: &[&'static str]| [&["--disaggregation-mode", mode], rest].concat();
    let leak = |s: &[&str]| -> Vec<&'static str> {
        s.iter()
            .map(|s| &*Box::leak((*s).to_owned().into_boxed_str()))
            .collect()
    };
    let prefill = worker(&flags("prefill", &leak(prefill)), |ranks, bell| {
        Role::Prefill(Box::new(hub.prefill(ranks, bell)))
    })
    .await;
    let decode = worker(&flags("decode", &leak(decode)), |ranks, bell| {
        Role::Decode(Box::new(hub.decode(ranks, bell)))
    })
    .await;
    (hub, prefill, decode)
}

impl Worker {
    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> (StatusCode, Incoming) {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("a request");
        let response = client.request(request).await.expect("a response");
        (response.status(), response.into_body())
    }

    async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let (status, body) = self
            .send(Method::POST, path, body.to_string().into_bytes())
            .await;
        let bytes = body.collect().await.expect("a body").to_bytes();
        (
            status,
            serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        )
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        let (status, body) = self.send(Method::GET, path, vec![]).await;
        let bytes = body.collect().await.expect("a body").to_bytes();
        (
            status,
            serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        )
    }

    /// The events of a stream; the last must be `[DONE]`.
    async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, body) = self
            .send(Method::POST, path, body.to_string().into_bytes())
            .await;
        assert_eq!(status, StatusCode::OK);
        let bytes = body.collect().await.expect("a body").to_bytes();
        let text = std::str::from_utf8(&bytes).expect("streams are UTF-8");
        let mut events: Vec<&str> = text
            .split_terminator("\n\n")
            .map(|e| e.strip_prefix("data: ").expect("an event"))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events
            .iter()
            .map(|e| serde_json::from_str(e).expect("JSON"))
            .collect()
    }

    async fn refuses(&self, path: &str, body: &Value, words: &str) {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body} {answer}");
        assert_eq!(
            (&answer["object"], &answer["code"]),
            (&json!("error"), &json!(400))
        );
        let message = answer["message"].as_str().expect("a message");
        assert!(message.contains(words), "{body}: {message}");
    }
}

fn generate(text: &str, new: usize) -> Value {
    json!({ "text": text, "sampling_params": { "max_new_tokens": new, "temperature": 0 } })
}

fn with(mut body: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn generate_answers_in_sglang_s_shape() {
    let worker = null(&[]).await;
    let (status, answer) = worker
        .post("/generate", &with(generate("Hi", 5), json!({"rid": "r1"})))
        .await;
    assert_eq!(status, StatusCode::OK);
    let meta = &answer["meta_info"];
    assert_eq!(meta["id"], "r1");
    assert_eq!(
        meta["finish_reason"],
        json!({ "type": "length", "length": 5 })
    );
    assert_eq!(
        (&meta["prompt_tokens"], &meta["completion_tokens"]),
        (&json!(3), &json!(5))
    );
    assert_eq!(answer["output_ids"].as_array().map(Vec::len), Some(5));
    // Token ids in, the same tokens out.
    let ids = json!({ "input_ids": [256, 72, 105], "sampling_params": { "max_new_tokens": 5 } });
    assert_eq!(
        worker.post("/generate", &ids).await.1["output_ids"],
        answer["output_ids"]
    );
    // A stream repeats the whole text.
    let events = worker
        .stream(
            "/generate",
            &with(generate("Hi", 5), json!({"stream": true})),
        )
        .await;
    let last = events.last().expect("events");
    assert_eq!(
        (&last["text"], &last["output_ids"]),
        (&answer["text"], &answer["output_ids"])
    );
    assert_eq!(last["meta_info"]["finish_reason"]["type"], "length");
    for pair in events.windows(2) {
        let text = |e: &Value| e["text"].as_str().expect("text").to_owned();
        assert!(text(&pair[1]).starts_with(&text(&pair[0])));
        assert!(pair[0]["meta_info"]["finish_reason"].is_null());
    }
}

#[tokio::test]
async fn a_batch_is_answered_in_order() {
    let worker = null(&[]).await;
    let single = worker.post("/generate", &generate("two", 4)).await.1;
    let body = json!({
        "text": ["one", "two"], "rid": "b",
        "sampling_params": [{ "max_new_tokens": 6 }, { "max_new_tokens": 4 }],
    });
    let (_, answers) = worker.post("/generate", &body).await;
    assert_eq!(answers.as_array().map(Vec::len), Some(2));
    assert_eq!(answers[1]["text"], single["text"]);
    assert_eq!(answers[1]["meta_info"]["id"], "b_1");
    assert_eq!(answers[0]["meta_info"]["completion_tokens"], 6);
    let events = worker
        .stream("/generate", &with(body, json!({ "stream": true })))
        .await;
    for index in 0..2 {
        let last = events
            .iter()
            .rfind(|e| e["index"] == index)
            .expect("an event of the member");
        assert_eq!(last["text"], answers[index]["text"]);
    }
}

#[tokio::test]
async fn chat_answers_in_openai_s_shape() {
    let worker = null(&["--model-path", "/models/Qwen3-32B"]).await;
    let body = json!({
        "model": "/models/Qwen3-32B", "max_tokens": 12,
        "messages": [{ "role": "user", "content": "Hello, this is a test" }],
    });
    let (status, answer) = worker.post("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(
        (&answer["object"], &answer["model"]),
        (&json!("chat.completion"), &body["model"])
    );
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["matched_stop"]),
        (&json!("length"), &Value::Null)
    );
    assert_eq!(choice["message"]["role"], "assistant");
    let usage = &answer["usage"];
    let prompt = usage["prompt_tokens"].as_u64().expect("a count");
    assert_eq!(
        (&usage["completion_tokens"], &usage["total_tokens"]),
        (&json!(12), &json!(prompt + 12))
    );
    assert!(usage["prompt_tokens_details"].is_null());
    // The same in parts, streamed: the pieces make up the text.
    let parts = json!([{ "role": "user", "content": [{ "type": "text", "text": "Hello, this is a test" }] }]);
    let options =
        json!({ "messages": parts, "stream": true, "stream_options": { "include_usage": true } });
    let events = worker
        .stream("/v1/chat/completions", &with(body, options))
        .await;
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(
        events
            .iter()
            .all(|e| e["object"] == "chat.completion.chunk" && e["id"] == events[0]["id"])
    );
    let text: String = events
        .iter()
        .filter_map(|e| e["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(json!(text), choice["message"]["content"]);
    let reasons: Vec<&Value> = events
        .iter()
        .map(|e| &e["choices"][0]["finish_reason"])
        .filter(|r| !r.is_null())
        .collect();
    assert_eq!(reasons, ["length"]);
    assert_eq!(
        events.last().expect("usage")["usage"]["completion_tokens"],
        12
    );
}

#[tokio::test]
async fn completions_take_text_tokens_and_lists_and_stop() {
    let worker = null(&[]).await;
    let ask = |prompt: Value| json!({ "prompt": prompt, "max_tokens": 20 });
    let (_, answer) = worker.post("/v1/completions", &ask(json!("ab"))).await;
    let text = answer["choices"][0]["text"]
        .as_str()
        .expect("text")
        .to_owned();
    assert_eq!(answer["object"], "text_completion");
    for prompt in [json!([256, 97, 98]), json!(["ab"]), json!([[256, 97, 98]])] {
        let (_, other) = worker.post("/v1/completions", &ask(prompt)).await;
        assert_eq!(other["choices"][0]["text"], json!(text));
    }
    let (_, two) = worker
        .post("/v1/completions", &ask(json!(["ab", "cd"])))
        .await;
    assert_eq!(
        (
            &two["choices"][1]["index"],
            &two["usage"]["completion_tokens"]
        ),
        (&json!(1), &json!(40))
    );
    let events = worker
        .stream(
            "/v1/completions",
            &with(ask(json!("ab")), json!({"stream": true})),
        )
        .await;
    let streamed: String = events
        .iter()
        .filter_map(|e| e["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(streamed, text);
    let stop: String = text.chars().skip(5).take(1).collect();
    let (_, stopped) = worker
        .post(
            "/v1/completions",
            &with(ask(json!("ab")), json!({"stop": stop})),
        )
        .await;
    let choice = &stopped["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["matched_stop"]),
        (&json!("stop"), &json!(stop))
    );
    assert_eq!(choice["text"].as_str(), text.split(&stop).next());
}

#[tokio::test]
async fn identity_health_and_load_are_told() {
    let worker = null(&[
        "--tp",
        "2",
        "--page-size",
        "8",
        "--max-total-tokens",
        "1001",
    ])
    .await;
    for path in ["/health", "/ready"] {
        assert_eq!(worker.get(path).await.0, StatusCode::OK);
    }
    assert_eq!(
        worker.get("/v1/models").await.1["data"][0]["id"],
        "kvworker-random"
    );
    assert_eq!(
        worker.get("/model_info").await.1["disaggregation_mode"],
        "null"
    );
    let info = worker.get("/server_info").await.1;
    assert_eq!(
        (&info["tp_size"], &info["page_size"]),
        (&json!(2), &json!(8))
    );
    assert_eq!(info["disaggregation_bootstrap_port"], 34000);
    assert_eq!(info["max_total_num_tokens"], 1000);
    worker.post("/generate", &generate("load", 3)).await;
    let loads = worker.get("/v1/loads?include=core,disagg,queues").await.1;
    let load = &loads["loads"][0];
    for name in [
        "prefill_bootstrap_queue_reqs",
        "prefill_inflight_queue_reqs",
        "decode_prealloc_queue_reqs",
        "decode_transfer_queue_reqs",
    ] {
        assert_eq!(load["disaggregation"][name], 0, "{name}");
    }
    assert_eq!(load["queues"]["waiting"], 0);
    let core = worker.get("/v1/loads?include=core").await.1;
    assert!(core["loads"][0]["disaggregation"].is_null());
    assert_eq!(
        worker.get("/v1/loads?include=nonsense").await.0,
        StatusCode::BAD_REQUEST
    );
    worker.mailbox.stop();
    assert_eq!(
        worker.get("/health").await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
    assert_eq!(
        worker.post("/generate", &generate("x", 1)).await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
}

#[tokio::test]
async fn bad_requests_are_refused_in_words() {
    let worker = null(&["--context-length", "64"]).await;
    let long = "x".repeat(64);
    for (body, words) in [
        (json!({}), "text or input_ids"),
        (
            json!({ "text": "a", "input_ids": [1] }),
            "text or input_ids",
        ),
        (json!({ "input_ids": [260] }), "vocabulary"),
        (json!({ "input_ids": [] }), "no tokens"),
        (generate(&long, 1), "longer"),
        (generate("a", 0), "max_new_tokens"),
        (generate("a", 63), "max_new_tokens"),
        (
            json!({ "text": vec!["a"; intake::BATCH_MAX + 1] }),
            "prompts",
        ),
        (
            json!({ "text": "a", "sampling_params": { "temperature": -1 } }),
            "temperature",
        ),
        (
            json!({ "text": "a", "sampling_params": { "stop": [""] } }),
            "stop",
        ),
        (
            json!({ "text": "a", "sampling_params": { "stop": vec!["s"; 17] } }),
            "stop",
        ),
        (json!({ "text": "a", "rid": "" }), "rid"),
        (
            json!({ "text": ["a", "b"], "rid": ["same", "same"] }),
            "Duplicate",
        ),
        (json!({ "text": 5 }), "invalid"),
    ] {
        worker.refuses("/generate", &body, words).await;
    }
    let (status, _) = worker.send(Method::POST, "/generate", b"{".to_vec()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    worker
        .refuses("/v1/chat/completions", &json!({ "messages": [] }), "empty")
        .await;
    let image = json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] });
    worker
        .refuses("/v1/chat/completions", &image, "image_url")
        .await;
    worker
        .refuses(
            "/v1/completions",
            &json!({ "prompt": "a", "n": 2 }),
            "n must be 1",
        )
        .await;
    worker.refuses("/abort_request", &json!({}), "rid").await;
}

#[tokio::test]
async fn a_full_queue_says_so() {
    let worker = null(&["--max-queued-requests", "2", "--max-running-requests", "1"]).await;
    let body = json!({ "text": ["a", "b", "c"], "sampling_params": { "max_new_tokens": 4 } });
    let (status, answer) = worker.post("/generate", &body).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    assert!(
        answer["message"]
            .as_str()
            .is_some_and(|m| m.contains("full"))
    );
    assert_eq!(
        worker.post("/generate", &generate("a", 4)).await.0,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_request_is_aborted_by_name_or_by_hanging_up() {
    let worker = null(&[]).await;
    let body = with(
        generate("long", 3000),
        json!({ "rid": "long", "stream": true }),
    );
    let (_, mut stream) = worker
        .send(Method::POST, "/generate", body.to_string().into_bytes())
        .await;
    assert!(stream.frame().await.is_some());
    // The id is in use.
    worker
        .refuses(
            "/generate",
            &with(generate("x", 1), json!({ "rid": "long" })),
            "Duplicate",
        )
        .await;
    assert_eq!(
        worker
            .post("/abort_request", &json!({ "rid": "long" }))
            .await
            .0,
        StatusCode::OK
    );
    let rest = stream.collect().await.expect("the end").to_bytes();
    let text = String::from_utf8_lossy(&rest);
    assert!(
        text.contains("\"type\":\"abort\"") && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    let (_, mut stream) = worker
        .send(Method::POST, "/generate", body.to_string().into_bytes())
        .await;
    assert!(stream.frame().await.is_some());
    drop(stream);
    let mailbox = worker.mailbox.clone();
    let idle =
        tokio::task::spawn_blocking(move || mailbox.wait_until_idle(Duration::from_secs(60)));
    assert!(
        idle.await.expect("no panic"),
        "a hung-up request kept running"
    );
}

#[tokio::test]
async fn a_pd_pair_answers_like_a_single_worker() {
    let single = null(&[]).await;
    let (hub, prefill, decode) = pair(&["--tp", "2", "--chunked-prefill-size", "16"], &[]).await;
    let chat = json!({
        "max_tokens": 20, "messages": [{ "role": "user", "content": "Hello, this is a test" }],
    });
    let expected = single.post("/v1/chat/completions", &chat).await.1;
    let room = |n: u64| json!({ "bootstrap_host": "localhost", "bootstrap_port": 34000, "bootstrap_room": n });
    let body = with(chat, room(1));
    let (first, second) = tokio::join!(
        prefill.post("/v1/chat/completions", &body),
        decode.post("/v1/chat/completions", &body)
    );
    assert_eq!(
        (first.0, second.0),
        (StatusCode::OK, StatusCode::OK),
        "{first:?}"
    );
    assert_eq!(first.1["usage"]["completion_tokens"], 1);
    assert_eq!(second.1["choices"], expected["choices"]);
    assert_eq!(
        second.1["usage"]["total_tokens"],
        expected["usage"]["total_tokens"]
    );
    // A batch with one room takes consecutive rooms.
    let batch = json!({ "text": ["one", "two"], "sampling_params": { "max_new_tokens": 7 } });
    let expected = single.post("/generate", &batch).await.1;
    let body = with(batch, room(10));
    let (_, answers) = tokio::join!(
        prefill.post("/generate", &body),
        decode.post("/generate", &body)
    );
    for i in 0..2 {
        assert_eq!(answers.1[i]["output_ids"], expected[i]["output_ids"]);
    }
    assert_eq!(hub.open_rooms(), 0);
}

#[tokio::test]
async fn a_pd_worker_insists_on_its_bootstrap_fields() {
    let (hub, prefill, decode) = pair(&[], &[]).await;
    for worker in [&prefill, &decode] {
        worker
            .refuses("/generate", &generate("a", 2), "without bootstrap room id")
            .await;
        let no_host = with(generate("a", 2), json!({ "bootstrap_room": 5 }));
        worker
            .refuses("/generate", &no_host, "without bootstrap host")
            .await;
        let host = json!({ "bootstrap_host": "h", "bootstrap_room": 0 });
        worker
            .refuses(
                "/v1/completions",
                &with(json!({ "prompt": "a" }), host),
                "2^63",
            )
            .await;
        let uneven = json!({ "bootstrap_host": "h", "bootstrap_room": [1, 2] });
        worker
            .refuses(
                "/generate",
                &with(generate("a", 2), uneven),
                "bootstrap_room has 2",
            )
            .await;
    }
    // A live room cannot be taken again; an abort of one leg is a sentence on the other.
    let body = with(
        generate("a", 2),
        json!({ "bootstrap_host": "h", "bootstrap_room": 7, "rid": "x" }),
    );
    let second = async {
        let duplicate = with(body.clone(), json!({ "rid": "y" }));
        while hub.open_rooms() == 0 {
            tokio::task::yield_now().await;
        }
        prefill
            .refuses("/generate", &duplicate, "Duplicate bootstrap_room: 7")
            .await;
        hub.sever(crate::pd::Room::new(7).expect("valid"), "cable cut");
    };
    let (first, ()) = tokio::join!(prefill.post("/generate", &body), second);
    assert_eq!(first.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(first.1["message"], "the KV transfer failed: cable cut");
}

#[tokio::test]
async fn tokens_do_not_wait_for_acknowledgements() {
    let bound = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = bound.local_addr().expect("bound");
    let mut listener = prompt(bound);
    let _client = TcpStream::connect(address).await.expect("a connection");
    let (accepted, _) = listener.accept().await;
    assert!(accepted.nodelay().expect("an option"));
}
