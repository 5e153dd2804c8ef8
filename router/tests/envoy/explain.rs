//! What the router adds for its clients comes through Envoy as from its own front: reasons, and models that only rules know.

use std::sync::Arc;

use hyper::Method;
use hyper::header::HeaderMap;
use kvrouter::config::scheduling::Explain;
use kvrouter::discover::{Fleet, ModelRule, ModelTarget, flags};
use kvrouter::{Config, Router};
use serde_json::{Value as Json, json};

use crate::fakes::{FakeWorker, Script, whole, whole_stream};
use crate::gateway::{Gateway, Picker, Setup, config};

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let value = headers.get(format!("x-kvrouter-{name}"))?;
    Some(value.to_str().unwrap())
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn answers_explain_themselves_through_envoy() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let name = |worker: &FakeWorker| worker.url.strip_prefix("http://").unwrap().to_owned();
    let asked = [("x-kvrouter-explain", "1")];
    for (explain, headers, says) in [
        (Explain::Never, &asked[..], false),
        (Explain::Asked, &[], false),
        (Explain::Asked, &asked, true),
        (Explain::Always, &[], true),
    ] {
        let explaining = Config {
            explain,
            ..config(&[&prefill.url], &[&decode.url])
        };
        let gateway = Gateway::start(Setup::default(), explaining).await;
        for (path, body, script) in [
            ("/generate", r#"{"text":"a"}"#, Script::Reply(200, "{}")),
            (
                "/generate",
                r#"{"text":"a","stream":true}"#,
                whole_stream(&["1", "[DONE]"]).await,
            ),
            (
                "/v1/messages",
                r#"{"model":"m","max_tokens":5,"messages":[{"role":"user","content":"hi"}]}"#,
                Script::Say(
                    r#"{"id":"x","choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}"#
                        .to_owned(),
                ),
            ),
        ] {
            decode.then(script);
            let answer = gateway.send(Method::POST, path, headers, body).await;
            let head = answer.headers().clone();
            assert_eq!(whole(answer).await.0, 200);
            let received = decode.request().await;
            assert!(
                text(&received.headers, "explain").is_none(),
                "not the worker's business"
            );
            assert_eq!(text(&head, "prefill").is_some(), says, "{explain:?} {body}");
            if !says {
                continue;
            }
            assert_eq!(text(&head, "prefill"), Some(name(&prefill).as_str()));
            assert_eq!(text(&head, "decode"), Some(name(&decode).as_str()));
            assert_eq!(text(&head, "policy"), Some("round_robin"));
            let number = |name: &str| text(&head, name).unwrap().parse::<f64>().unwrap();
            let parts = ["wait", "compute", "wire-wait", "transfer", "admission"];
            let parts = parts.map(|part| number(&format!("predicted-{part}-ms")));
            let sum: f64 = parts.iter().sum();
            assert!((sum - number("predicted-ttft-ms")).abs() < 0.01);
            assert!(number("actual-ttft-ms") > 0.0, "{path} {body}");
            assert_eq!(head.get_all("x-kvrouter-prefill").iter().count(), 1);
        }
    }
}

#[tokio::test]
#[ignore = "needs envoy: router/tests/envoy/run.sh"]
async fn rules_of_models_hold_through_envoy() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let own = json!({"object": "list", "data": [{"id": "base", "object": "model"}]});
    prefill.set_models(&own);
    decode.set_models(&own);
    let config = config(&[&prefill.url], &[&decode.url]);
    let mut fleet: Fleet = (**flags::watch(&config).borrow()).clone();
    fleet.models = vec![ModelRule {
        name: "shown".to_owned(),
        priority: 0,
        targets: vec![ModelTarget {
            model: "base".to_owned(),
            weight: 1,
        }],
    }];
    let (_publish, fleet) = tokio::sync::watch::channel(Arc::new(fleet));
    let router = Router::bind_with(config, fleet).await.unwrap();
    let gateway = Gateway::before(Setup::default(), Picker::serve(router), (1, 1)).await;

    let through = whole(gateway.send(Method::GET, "/v1/models", &[], "").await).await;
    let native = gateway.picker.front.read("/v1/models").await;
    assert_eq!(through, native);
    let list: Json = serde_json::from_str(&through.1).unwrap();
    let names: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(names, ["base", "shown"]);

    let body = r#"{ "model" : "shown" , "messages":[], "zzz":1e400}"#;
    assert_eq!(gateway.ask("/v1/chat/completions", body).await.0, 200);
    for worker in [&mut prefill, &mut decode] {
        let received = worker.request().await;
        let body = String::from_utf8(received.body.to_vec()).unwrap();
        assert!(
            body.contains(r#""model" : "base" , "messages":[], "zzz":1e400}"#),
            "{body}"
        );
    }
    let native = gateway
        .picker
        .front
        .post("/v1/chat/completions", body)
        .await;
    assert_eq!(whole(native).await.0, 200);
}
