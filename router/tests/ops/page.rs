//! The page's parts, and what it reads.

use hyper::Method;
use serde_json::Value as Json;

use crate::fakes::{FakeWorker, Running, config, whole, whole_stream};

#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    for (path, kind) in [
        ("/ui", "text/html; charset=utf-8"),
        ("/ui/", "text/html; charset=utf-8"),
        ("/ui/app.js", "text/javascript; charset=utf-8"),
        ("/ui/style.css", "text/css; charset=utf-8"),
    ] {
        let response = router.send(Method::GET, path, &[], "").await;
        let headers = response.headers().clone();
        assert_eq!(headers["content-type"], kind);
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(
            policy.starts_with("default-src 'none'; script-src 'self';"),
            "{policy}"
        );
        assert!(!policy.contains("unsafe"));
        let (status, text) = whole(response).await;
        assert_eq!(status, 200);
        // SVG's name is no address that anybody loads.
        let text = text.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http://", "https://", "@import", " style=", "onclick"] {
            assert!(!text.contains(outside), "{path} has {outside}");
        }
    }
    assert_eq!(whole(router.post("/ui", "").await).await.0, 405);
}

#[tokio::test]
async fn the_state_tells_pairs_and_workers() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let gone = "http://127.0.0.1:1";
    let router = Running::start(config(&[&prefill.url, gone], &[&decode.url])).await;
    router.ready(1, 1).await;
    decode.then(whole_stream(&["{}", "[DONE]"]).await);
    whole(
        router
            .post("/generate", r#"{"text":"a","stream":true}"#)
            .await,
    )
    .await;
    let response = router.send(Method::GET, "/debug/state", &[], "").await;
    assert_eq!(response.headers()["cache-control"], "no-store");
    let (status, text) = whole(response).await;
    assert_eq!(status, 200);
    let state: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(state["prefills"][0]["url"], prefill.url);
    assert_eq!(state["prefills"][0]["ready"], true);
    assert_eq!(state["prefills"][1]["ready"], false);
    assert_eq!(state["prefills"][0]["breaker"], "closed");
    assert_eq!(
        (&state["ready_prefills"], &state["ready_decodes"]),
        (&1.into(), &1.into())
    );
    assert_eq!(state["matrix"]["requests"], serde_json::json!([[1], [0]]));
    for measure in ["queued_bytes", "in_flight_bytes", "bytes_per_s", "measured"] {
        assert_eq!(
            state["matrix"][measure].as_array().unwrap().len(),
            2,
            "{measure}"
        );
        assert_eq!(
            state["matrix"][measure][1].as_array().unwrap().len(),
            1,
            "{measure}"
        );
    }
    let counts = state["ttft"]["counts"].as_array().unwrap();
    let total: u64 = counts.iter().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(total, 1);
    assert_eq!(
        counts.len(),
        state["ttft"]["edges_s"].as_array().unwrap().len() + 1
    );
}

#[tokio::test]
async fn the_state_of_a_huge_fleet_stays_small() {
    let urls = |port: usize| -> Vec<String> {
        (0..100)
            .map(|at| format!("http://127.0.0.1:{}", port + at))
            .collect()
    };
    let (prefills, decodes) = (urls(1), urls(101));
    let refs = |urls: &'static [String]| urls.iter().map(String::as_str).collect::<Vec<_>>();
    let config = config(&refs(prefills.leak()), &refs(decodes.leak()));
    let router = Running::start(config).await;
    let (status, text) = router.read("/debug/state").await;
    assert_eq!(status, 200);
    let state: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(state["workers_left_out"], 72);
    assert_eq!(state["matrix"]["requests"].as_array().unwrap().len(), 64);
    assert!(text.len() < 256 << 10, "{}", text.len());
}
