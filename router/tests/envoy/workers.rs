//! Real workers with a real model behind a real Envoy: a pair answers, through Envoy and through the router's own front, what one
//! worker answers that does all by itself.

use std::process::Stdio;

use bytes::Bytes;
use hyper::Method;
use kvrouter::Config;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::fakes::{Running, events_of, soon, whole};
use crate::gateway::{Gateway, Setup, config};

/// An example worker. It ends when this is dropped.
struct Example {
    url: String,
    _child: Child,
}

impl Example {
    async fn start(mode: &str) -> Self {
        let binary = std::env::var_os("KVROUTER_EXAMPLE_WORKER").expect(
            "KVROUTER_EXAMPLE_WORKER must name kvworker's binary: use router/tests/envoy/run.sh",
        );
        let mut child = Command::new(binary)
            .args(["--port", "0", "--layers", "2", "--model-path", "m"])
            .args(["--disaggregation-bootstrap-port", "0"])
            .args(["--disaggregation-mode", mode])
            .stdin(Stdio::null())
            .env_remove("RUST_LOG")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let url = soon(async {
            loop {
                let line = lines.next_line().await.unwrap();
                let line = line.expect("it ended without listening");
                let mut words = line.split_whitespace();
                if let Some(address) = words.find_map(|word| word.strip_prefix("address=")) {
                    return format!("http://{address}");
                }
            }
        })
        .await;
        // Reads on, so that the child never meets a closed or full pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { url, _child: child }
    }
}

/// What a client reads, in the order in which it reads it.
fn texts(answer: &Json) -> Vec<String> {
    let text = |one: &Json| {
        let places = ["/text", "/message/content", "/delta/content"];
        let found = places.iter().find_map(|place| one.pointer(place));
        found.and_then(Json::as_str).unwrap_or_default().to_owned()
    };
    match (answer, &answer["choices"]) {
        (Json::Array(all), _) | (_, Json::Array(all)) => all.iter().map(text).collect(),
        (one, _) => vec![text(one)],
    }
}

async fn ask(router: &Running, path: &str, body: &Json) -> Json {
    let (status, text) = whole(router.post(path, body.to_string()).await).await;
    assert_eq!(status, 200, "{path} {body}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// All of a stream's texts, joined by choice; SGLang's own events repeat what was said before.
async fn stream(answer: hyper::Response<hyper::body::Incoming>, repeats: bool) -> String {
    let (status, text) = whole(answer).await;
    assert_eq!(status, 200, "{text}");
    let events = events_of(&text);
    let said = events.iter().filter(|event| !event.is_null());
    let said: Vec<String> = said.flat_map(texts).collect();
    if repeats {
        said.last().cloned().unwrap_or_default()
    } else {
        said.concat()
    }
}

fn chat() -> Json {
    json!({"model": "m", "max_tokens": 12, "temperature": 0,
           "messages": [{"role": "user", "content": "Tell me of bridges"}]})
}

fn questions() -> [(&'static str, Json); 6] {
    let params = json!({"max_new_tokens": 12, "temperature": 0});
    [
        (
            "/generate",
            json!({"text": "Once upon a time", "sampling_params": params}),
        ),
        (
            "/generate",
            json!({"text": ["one", "two", "three"], "sampling_params": params}),
        ),
        (
            "/generate",
            json!({"input_ids": [[72, 105], [66, 121, 101]], "sampling_params": params}),
        ),
        (
            "/v1/completions",
            json!({"model": "m", "prompt": ["a", "b"], "max_tokens": 7, "temperature": 0}),
        ),
        (
            "/v1/completions",
            json!({"model": "m", "prompt": [72, 105], "max_tokens": 7, "temperature": 0}),
        ),
        ("/v1/chat/completions", chat()),
    ]
}

#[tokio::test]
#[ignore = "needs envoy and kvworker: router/tests/envoy/run.sh"]
async fn a_pair_of_real_workers_answers_like_a_single_one() {
    let (prefill, decode, single) = (
        Example::start("prefill").await,
        Example::start("decode").await,
        Example::start("null").await,
    );
    let mut settings: Config = config(&[&prefill.url], &[&decode.url]);
    // Their bootstrap port is the system's choice, which they tell.
    settings.prefills[0].bootstrap_port = None;
    let gateway = Gateway::start(Setup::default(), settings).await;
    let single = Running::elsewhere(&single.url);
    let through = Running::elsewhere(&gateway.envoy.url);
    let front = &gateway.picker.front;
    for (path, body) in questions() {
        let alone = texts(&ask(&single, path, &body).await);
        assert!(alone.iter().all(|text| !text.is_empty()), "{body}");
        assert_eq!(
            texts(&ask(&through, path, &body).await),
            alone,
            "{path} {body}"
        );
        assert_eq!(
            texts(&ask(front, path, &body).await),
            alone,
            "{path} {body}"
        );
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        if alone.len() > 1 {
            continue;
        }
        for router in [&single, &through, front] {
            let answer = router.post(path, Bytes::from(streamed.to_string())).await;
            let text = stream(answer, path == "/generate").await;
            assert_eq!(text, alone[0], "{path} {streamed}");
        }
    }
    // Several choices are several pairs' work; they come from the front, and Envoy's clients are told so.
    let chat = chat();
    let mut several = chat.clone();
    several["n"] = 3.into();
    let alone = texts(&ask(&single, "/v1/chat/completions", &chat).await);
    let choices = ask(front, "/v1/chat/completions", &several).await;
    assert_eq!(texts(&choices), vec![alone[0].clone(); 3]);
    let indices: Vec<_> = choices["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["index"])
        .collect();
    assert_eq!(indices, [0, 1, 2]);
    let refused = gateway
        .send(
            Method::POST,
            "/v1/chat/completions",
            &[],
            several.to_string(),
        )
        .await;
    assert_eq!(refused.status(), 501);
}
