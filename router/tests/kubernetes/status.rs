//! What owners of objects are told: conditions and Events, the same from every replica, and never twice.

use std::time::Duration;

use serde_json::{Value as Json, json};

use crate::api::ApiServer;
use crate::cluster::{POLICIES, POOLS, Watching, cluster, hurried, pod, settings};

const EVENTS: &str = "/api/v1/events";
const MODELS: &str = "/apis/inference.networking.x-k8s.io/v1alpha2/inferencemodels";

fn policy() -> Json {
    json!({"apiVersion": "inferenceextension.alibabacloud.com/v1alpha1", "kind": "InferenceTrafficPolicy",
        "metadata": {"name": "policy"},
        "spec": {"poolRef": {"name": "qwen"}, "modelServerRuntime": "sglang", "profile": {"pd": {
            "pdRoleLabelName": "rbg.workloads.x-k8s.io/role-name", "kvTransfer": {"bootstrapPort": 34000}}}}})
}

fn condition(conditions: &Json, kind: &str) -> Json {
    let mut all = conditions.as_array().into_iter().flatten();
    all.find(|one| one["type"] == kind)
        .cloned()
        .unwrap_or_default()
}

/// A condition of the policy.
fn of_policy(server: &ApiServer, kind: &str) -> Json {
    let policy = server.object(POLICIES, "policy").unwrap();
    condition(&policy["status"]["conditions"], kind)
}

/// A condition of the router's entry in the pool.
fn of_pool(server: &ApiServer, kind: &str) -> Json {
    let pool = server.object(POOLS, "qwen").unwrap();
    let parents = pool["status"]["parent"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let own = parents
        .iter()
        .find(|entry| entry["parentRef"]["name"] == "kvrouter");
    own.map(|own| condition(&own["conditions"], kind))
        .unwrap_or_default()
}

fn event(server: &ApiServer, reason: &str) -> Option<Json> {
    server
        .all(EVENTS)
        .into_iter()
        .find(|event| event["reason"] == reason)
}

#[tokio::test]
async fn replicas_write_the_same_conditions_once() {
    let server = cluster().await;
    server.apply(&policy());
    let gateway = json!({"parentRef": {"kind": "Gateway", "name": "g"}, "conditions": []});
    server.change(POOLS, "qwen", |pool| {
        pool["status"] = json!({"parent": [gateway]})
    });
    let mut first = Watching::start(&server, settings(hurried())).await;
    first.members(&["d0", "p0"]).await;
    server
        .until("conditions", |server| {
            of_pool(server, "PairsAvailable")["status"] == "True"
                && of_policy(server, "Accepted")["status"] == "True"
        })
        .await;
    let accepted = of_policy(&server, "Accepted");
    assert_eq!(accepted["observedGeneration"], 1);
    assert!(
        accepted["lastTransitionTime"]
            .as_str()
            .unwrap()
            .ends_with('Z')
    );
    for kind in [
        "Accepted",
        "ResolvedRefs",
        "RolesRecognized",
        "MembersUsable",
    ] {
        assert_eq!(of_pool(&server, kind)["status"], "True", "{kind}");
    }
    let pool = server.object(POOLS, "qwen").unwrap();
    assert_eq!(pool["status"]["parent"][0]["parentRef"]["name"], "g");
    let mut second = Watching::start(&server, settings(hurried())).await;
    second.members(&["d0", "p0"]).await;
    // The next change makes both look again; neither finds anything to write.
    let before = server.writes().len();
    server.apply(&pod("p1", "10.0.0.2", "prefill"));
    first.members(&["d0", "p0", "p1"]).await;
    second.members(&["d0", "p0", "p1"]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.writes().len(), before, "{:?}", server.writes());
    assert!(server.all(EVENTS).is_empty(), "{:?}", server.all(EVENTS));
}

#[tokio::test]
async fn an_unknown_field_is_told_with_its_path_and_taken_back() {
    let server = cluster().await;
    let mut wrong = policy();
    wrong["spec"]["profile"]["pd"]["kvTransfer"]["backend"] = "mooncake".into();
    server.apply(&wrong);
    let mut watching = Watching::start(&server, settings(hurried())).await;
    let fleet = watching.members(&["d0", "p0"]).await;
    assert_eq!(fleet.members[1].bootstrap_port_assumed, Some(34000));
    server
        .until("a refusal", |server| {
            of_policy(server, "Accepted")["reason"] == "UnknownField"
        })
        .await;
    let message = of_policy(&server, "Accepted")["message"].to_string();
    assert!(
        message.contains("spec.profile.pd.kvTransfer.backend"),
        "{message}"
    );
    server
        .until("an Event", |server| event(server, "UnknownField").is_some())
        .await;
    let told = event(&server, "UnknownField").unwrap();
    assert_eq!(
        (&told["type"], &told["involvedObject"]["name"]),
        (&json!("Warning"), &json!("policy"))
    );
    assert!(
        told["message"]
            .as_str()
            .unwrap()
            .contains("spec.profile.pd.kvTransfer.backend")
    );
    server.change(POLICIES, "policy", |object| {
        object["spec"] = policy()["spec"].clone()
    });
    server
        .until("acceptance", |server| {
            of_policy(server, "Accepted")["status"] == "True"
        })
        .await;
    server
        .until("an Event", |server| event(server, "Accepted").is_some())
        .await;
    assert_eq!(event(&server, "Accepted").unwrap()["type"], "Normal");
    assert_eq!(of_policy(&server, "Accepted")["observedGeneration"], 2);
}

#[tokio::test]
async fn pods_without_a_role_and_names_in_use_are_told() {
    let server = cluster().await;
    server.apply(&pod("boss", "10.0.3.1", "leader"));
    for (name, created) in [
        ("older", "2026-01-01T00:00:00Z"),
        ("younger", "2026-02-01T00:00:00Z"),
    ] {
        server.apply(&json!({"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceModel",
            "metadata": {"name": name, "creationTimestamp": created},
            "spec": {"modelName": "m", "poolRef": {"name": "qwen"}}}));
    }
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    server
        .until("Events", |server| {
            event(server, "RoleUnknown").is_some() && event(server, "ModelNameInUse").is_some()
        })
        .await;
    let message = of_pool(&server, "RolesRecognized")["message"].to_string();
    assert!(
        message.contains("boss has the unknown role `leader`"),
        "{message}"
    );
    let younger = server.object(MODELS, "younger").unwrap();
    let accepted = condition(&younger["status"]["conditions"], "Accepted");
    assert_eq!(accepted["reason"], "ModelNameInUse");
}

#[tokio::test]
async fn another_controller_that_disagrees_is_not_fought_for_ever() {
    let server = cluster().await;
    server.apply(&policy());
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    for turn in 0..20 {
        server.change(POLICIES, "policy", |policy| {
            policy["status"]["conditions"] = json!([{"type": "Accepted", "status": "False", "reason": "Mine", "turn": turn}]);
        });
        // A fleet that follows the change shows that the source has looked.
        let name = format!("x{turn}");
        server.apply(&pod(&name, "10.0.0.7", "prefill"));
        watching.members(&["d0", "p0", &name]).await;
        server.delete("/api/v1/pods", &name);
        watching.members(&["d0", "p0"]).await;
    }
    let ours = server
        .writes()
        .into_iter()
        .filter(|(method, path, _)| method == "PATCH" && path.contains("policies"));
    assert!((1..=8).contains(&ours.count()));
}

#[tokio::test]
async fn a_router_that_only_reads_writes_nothing() {
    let server = cluster().await;
    server.apply(&pod("boss", "10.0.3.1", "leader"));
    let mut only_reads = settings(hurried());
    only_reads.writes = false;
    let mut watching = Watching::start(&server, only_reads).await;
    watching.members(&["d0", "p0"]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(server.writes().is_empty());
}
