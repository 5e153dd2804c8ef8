//! The dashboard and the alerts use what the router exports, and nothing else.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::exposition;
use crate::fakes::{FakeWorker, Running, whole, whole_stream};

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("deploy")
        .join(path)
}

/// The names of metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    text.match_indices("kvrouter_")
        .map(|(at, _)| {
            text[at..]
                .chars()
                .take_while(|letter| is_part(*letter))
                .collect()
        })
        .collect()
}

async fn exported() -> BTreeSet<String> {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    decode.then(whole_stream(&["{}", "[DONE]"]).await);
    whole(
        router
            .post("/generate", r#"{"text":"a","stream":true}"#)
            .await,
    )
    .await;
    let (_, text) = router.read("/metrics").await;
    let mut names = BTreeSet::new();
    for (name, family) in exposition::parse(&text) {
        if family.kind == "histogram" {
            names.extend(["_bucket", "_sum", "_count"].map(|part| format!("{name}{part}")));
        }
        names.insert(name);
    }
    names
}

#[tokio::test]
async fn dashboard_and_alerts_use_what_is_exported() {
    let exported = exported().await;
    let dashboard = std::fs::read_to_string(deploy("grafana/kvrouter.json")).unwrap();
    let json: Json = serde_json::from_str(&dashboard).unwrap();
    let panels = json["panels"].as_array().unwrap();
    let mut used = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(
            ids.insert(panel["id"].as_u64().unwrap()),
            "{}",
            panel["title"]
        );
        let end = panel["gridPos"]["x"].as_u64().unwrap() + panel["gridPos"]["w"].as_u64().unwrap();
        assert!(end <= 24, "{}", panel["title"]);
        if panel["type"] == "row" {
            continue;
        }
        assert!(
            panel["description"]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{}",
            panel["title"]
        );
        assert!(
            panel["fieldConfig"]["defaults"]["unit"].is_string(),
            "{}",
            panel["title"]
        );
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            let found = names(expression);
            assert!(!found.is_empty(), "{expression}");
            used.extend(found);
        }
    }
    let rules = std::fs::read_to_string(deploy("prometheus/kvrouter.rules.yaml")).unwrap();
    used.extend(names(&rules).into_iter().filter(|name| name != "kvrouter_"));
    let unknown: Vec<_> = used.difference(&exported).collect();
    assert!(unknown.is_empty(), "not exported: {unknown:?}");
    assert!(used.len() > 25, "{used:?}");
}

#[test]
fn every_alert_tells_what_to_do() {
    let rules = std::fs::read_to_string(deploy("prometheus/kvrouter.rules.yaml")).unwrap();
    let alerts: Vec<_> = rules.split("- alert: ").skip(1).collect();
    assert!((4..=10).contains(&alerts.len()));
    for alert in alerts {
        for part in [
            "expr: ",
            "for: ",
            "severity: ",
            "summary: ",
            "description: ",
        ] {
            assert_eq!(alert.matches(part).count(), 1, "{part}\n{alert}");
        }
    }
}
