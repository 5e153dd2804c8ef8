//! Answers and a page that say why.

use hyper::Method;
use kvrouter::Config;
use kvrouter::config::scheduling::{Explain, Scheduling};
use kvrouter::schedule::Policy;
use serde_json::Value as Json;

use crate::fakes::{FakeWorker, Running, config, whole};

const BODY: &str = r#"{"text":"a prompt of some bytes"}"#;

#[tokio::test]
async fn answers_explain_themselves_when_asked() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let name = |worker: &FakeWorker| worker.url.strip_prefix("http://").unwrap().to_owned();
    let start = |explain| {
        Running::start(Config {
            explain,
            scheduling: Scheduling::with(Policy::Fused),
            ..config(&[&prefill.url], &[&decode.url])
        })
    };
    let asked = [("x-kvrouter-explain", "1")];
    for (explain, headers, says) in [
        (Explain::Never, &asked[..], false),
        (Explain::Asked, &[], false),
        (Explain::Asked, &asked, true),
        (Explain::Always, &[], true),
    ] {
        let router = start(explain).await;
        router.ready(1, 1).await;
        let answer = router.send(Method::POST, "/generate", headers, BODY).await;
        let text = |name: &str| {
            let value = answer.headers().get(format!("x-kvrouter-{name}"))?;
            Some(value.to_str().unwrap().to_owned())
        };
        assert_eq!(text("prefill").is_some(), says, "{explain:?}");
        if !says {
            continue;
        }
        assert_eq!(text("prefill").unwrap(), name(&prefill));
        assert_eq!(text("decode").unwrap(), name(&decode));
        assert_eq!(text("policy").unwrap(), "fused");
        let number = |name: &str| text(name).unwrap().parse::<f64>().unwrap();
        let parts = ["wait", "compute", "wire-wait", "transfer", "admission"];
        let sum: f64 = parts
            .iter()
            .map(|part| number(&format!("predicted-{part}-ms")))
            .sum();
        assert!((sum - number("predicted-ttft-ms")).abs() < 0.01);
        assert!(number("actual-ttft-ms") > 0.0);
        assert_eq!(text("sample-age-ms"), None, "nothing was told");
    }
}

#[tokio::test]
async fn decisions_are_kept_with_what_came_of_them() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(config(&[&prefill.url], &[&decode.url])).await;
    router.ready(1, 1).await;
    for _ in 0..3 {
        whole(router.post("/generate", BODY).await).await;
        assert!(
            !decode
                .request()
                .await
                .headers
                .contains_key("x-kvrouter-explain")
        );
    }
    decode.set_default(400);
    whole(router.post("/generate", BODY).await).await;
    let (_, text) = router.read("/debug/decisions?limit=3").await;
    let page: Json = serde_json::from_str(&text).unwrap();
    let decisions = page["decisions"].as_array().unwrap();
    let numbers: Vec<_> = decisions
        .iter()
        .map(|one| one["decision"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [3, 2, 1], "the latest first");
    assert_eq!(decisions[0]["actual"]["outcome"], "cancelled");
    let last = &decisions[1];
    assert_eq!(last["actual"]["outcome"], "finished");
    assert!(last["actual"]["ttft_s"].as_f64().unwrap() > 0.0);
    assert!(last["predicted"]["ttft_s"].as_f64().unwrap() > 0.0);
    assert_eq!(last["prompt_tokens"], 6);
    assert_eq!(last["candidates"], 1);
}
