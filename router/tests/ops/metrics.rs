//! Every series, by the rules.

use hyper::Method;
use kvrouter::Config;

use crate::exposition;
use crate::fakes::{FakeWorker, Running, Script, config, soon, whole, whole_stream};

#[tokio::test]
async fn every_series_has_help_and_unit_and_the_text_is_valid() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        attempts_max: 1,
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    router.ready(1, 1).await;
    for _ in 0..3 {
        decode.then(whole_stream(&["{\"a\":1}", "[DONE]"]).await);
        let answer = router.post("/v1/chat/completions", r#"{"messages":[],"stream":true}"#);
        assert_eq!(whole(answer.await).await.0, 200);
    }
    whole(router.post("/generate", r#"{"text":"a"}"#).await).await;
    prefill.set_default(500);
    decode.then(Script::Hang);
    assert_eq!(
        whole(router.post("/generate", r#"{"text":"a"}"#).await)
            .await
            .0,
        500
    );
    whole(router.send(Method::GET, "/v1/models", &[], "").await).await;
    // Prefill's answers may end after decode's.
    soon(async { while router.metric("kvrouter_prefill_leg_seconds_count").await < 4 {} }).await;

    let (_, text) = router.read("/metrics").await;
    let families = exposition::parse(&text);
    let value = |name: &str, labels: &[(&str, &str)]| {
        let family = &families[name.trim_end_matches("_count")];
        let fits = |have: &std::collections::BTreeMap<String, String>| {
            labels.iter().all(|(name, value)| have[*name] == *value)
        };
        let mut found = family.samples.iter();
        let found = found.find(|sample| sample.0 == name && fits(&sample.1));
        found
            .unwrap_or_else(|| panic!("{name} {labels:?}\n{text}"))
            .2
    };
    assert_eq!(value("kvrouter_ttft_seconds_count", &[]), 3.0);
    assert_eq!(value("kvrouter_decode_first_byte_seconds_count", &[]), 4.0);
    assert_eq!(value("kvrouter_prefill_leg_seconds_count", &[]), 4.0);
    assert_eq!(value("kvrouter_queue_wait_seconds_count", &[]), 5.0);
    let chat = [("route", "/v1/chat/completions")];
    assert_eq!(value("kvrouter_request_duration_seconds_count", &chat), 3.0);
    assert!(value("kvrouter_response_bytes_total", &chat) > 3.0 * 20.0);
    let name = |url: &str| url.strip_prefix("http://").unwrap().to_owned();
    let (p, d) = (name(&prefill.url), name(&decode.url));
    let pair = [("prefill", p.as_str()), ("decode", d.as_str())];
    assert_eq!(value("kvrouter_pair_requests_total", &pair), 5.0);
    assert_eq!(value("kvrouter_pair_failures_total", &pair), 1.0);
    let other = [("prefill", "other"), ("decode", "other")];
    assert_eq!(value("kvrouter_pair_requests_total", &other), 0.0);
    assert_eq!(value("kvrouter_ready_workers", &[("leg", "decode")]), 1.0);
    assert_eq!(value("kvrouter_pair_queued_bytes", &pair), 0.0);
}

#[tokio::test]
async fn names_cannot_break_the_text() {
    use kvrouter::metrics::text::{Kind, Labels, Text};
    let mut text = Text::new();
    text.family("kvrouter_odd_bytes", Kind::Gauge, "Odd.");
    let odd = "a\"b\\c\nd,e=\"}";
    text.sample(&Labels::default().with("name", odd).with("b", ""), 1.5);
    let families = exposition::parse(&text.finish());
    let (_, labels, value) = &families["kvrouter_odd_bytes"].samples[0];
    assert_eq!(
        (labels["name"].as_str(), labels["b"].as_str(), *value),
        (odd, "", 1.5)
    );
}
