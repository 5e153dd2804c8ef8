//! What is discovered while the API server misbehaves.

use std::sync::Arc;
use std::time::Duration;

use kvrouter::discover::cluster::Scope;
use kvrouter::discover::kubernetes::{self, Settings, Timing};
use kvrouter::discover::{Fleet, FleetWatch};
use serde_json::{Value as Json, json};
use tokio::task::JoinSet;

use crate::api::ApiServer;
use crate::fakes::soon;

pub const PODS: &str = "/api/v1/pods";
pub const POOLS: &str = "/apis/inference.networking.x-k8s.io/v1alpha2/inferencepools";
pub const POLICIES: &str =
    "/apis/inferenceextension.alibabacloud.com/v1alpha1/inferencetrafficpolicies";

/// Times of tests: nobody waits for anything longer than it takes.
pub fn hurried() -> Timing {
    Timing {
        resync: Duration::from_secs(600),
        list_timeout: Duration::from_secs(10),
        watch_timeout: Duration::from_secs(600),
        retry_min: Duration::from_millis(5),
        retry_max: Duration::from_millis(40),
        absent_retry: Duration::from_millis(50),
        settle: Duration::from_millis(1),
    }
}

pub fn settings(timing: Timing) -> Settings {
    Settings {
        scope: Scope::new("default", "qwen"),
        reads_nodes: false,
        writes: true,
        service: "kvrouter".to_owned(),
        timing,
    }
}

/// A source of workers that watches the server.
pub struct Watching {
    pub fleet: FleetWatch,
    _tasks: JoinSet<()>,
}

impl Watching {
    pub async fn start(server: &ApiServer, settings: Settings) -> Self {
        let (client, namespace) = kubernetes::connect(Some(server.kubeconfig()))
            .await
            .unwrap();
        assert_eq!(namespace, "default");
        let mut tasks = JoinSet::new();
        let fleet = kubernetes::start(client, settings, &mut tasks);
        Self {
            fleet,
            _tasks: tasks,
        }
    }

    /// Waits for a fleet of these members.
    pub async fn members(&mut self, names: &[&str]) -> Arc<Fleet> {
        let same = |fleet: &Arc<Fleet>| {
            let found = fleet.members.iter().map(|member| member.name.as_str());
            found.eq(names.iter().copied())
        };
        let found = soon(self.fleet.wait_for(same)).await.unwrap();
        Arc::clone(&found)
    }

    pub fn names(&self) -> Vec<String> {
        let fleet = self.fleet.borrow();
        fleet
            .members
            .iter()
            .map(|member| member.name.clone())
            .collect()
    }
}

pub fn pool(labels: &Json) -> Json {
    json!({"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferencePool",
        "metadata": {"name": "qwen"}, "spec": {"selector": labels, "targetPortNumber": 8000}})
}

pub fn pod(name: &str, ip: &str, role: &str) -> Json {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "sglang", "rbg.workloads.x-k8s.io/role-name": role}},
        "status": {"podIP": ip, "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}})
}

/// A cluster with a pool, a prefill and a decode pod.
pub async fn cluster() -> ApiServer {
    let server = ApiServer::start().await;
    server.apply(&pool(&json!({"app": "sglang"})));
    server.apply(&pod("p0", "10.0.0.1", "prefill"));
    server.apply(&pod("d0", "10.0.1.1", "decode"));
    server
}

#[tokio::test]
async fn pods_are_followed_as_they_come_change_and_go() {
    let server = cluster().await;
    let mut watching = Watching::start(&server, settings(hurried())).await;
    let fleet = watching.members(&["d0", "p0"]).await;
    assert_eq!(fleet.members[1].url.to_string(), "http://10.0.0.1:8000");
    server.apply(&pod("p1", "10.0.0.2", "prefill"));
    watching.members(&["d0", "p0", "p1"]).await;
    server.change(PODS, "p0", |pod| {
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    });
    let drains = |fleet: &Arc<Fleet>| {
        fleet
            .members
            .iter()
            .any(|one| one.name == "p0" && one.draining)
    };
    soon(watching.fleet.wait_for(drains)).await.unwrap();
    server.delete(PODS, "p0");
    watching.members(&["d0", "p1"]).await;
    server.change(PODS, "p1", |pod| {
        pod["status"]["conditions"][0]["status"] = "False".into()
    });
    watching.members(&["d0"]).await;
    // A pod without the pool's label any more is none of its pods.
    server.change(PODS, "d0", |pod| {
        pod["metadata"]["labels"]["app"] = "other".into()
    });
    watching.members(&[]).await;
    assert_eq!((server.lists(PODS), server.watches(PODS)), (1, 1));
}

#[tokio::test]
async fn a_pool_for_other_pods_gets_other_pods() {
    let server = cluster().await;
    let mut other = pod("x", "10.0.2.1", "decode");
    other["metadata"]["labels"]["app"] = "new".into();
    server.apply(&other);
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    server.apply(&pool(&json!({"app": "new"})));
    watching.members(&["x"]).await;
    server.delete(POOLS, "qwen");
    watching.members(&[]).await;
    server.apply(&pool(&json!({"app": "sglang"})));
    watching.members(&["d0", "p0"]).await;
    assert_eq!(server.lists(PODS), 3);
}

#[tokio::test]
async fn a_pool_of_the_newer_version_goes_first() {
    let server = cluster().await;
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    server.apply(&json!({"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool",
        "metadata": {"name": "qwen"},
        "spec": {"selector": {"matchLabels": {"app": "sglang"}}, "targetPorts": [{"number": 9000}]}}));
    let moved = |fleet: &Arc<Fleet>| {
        fleet
            .members
            .first()
            .is_some_and(|one| one.url.to_string().ends_with(":9000"))
    };
    let fleet = soon(watching.fleet.wait_for(moved)).await.unwrap();
    assert_eq!(fleet.members.len(), 2);
}

#[tokio::test]
async fn a_deletion_that_a_watch_lost_is_found_by_the_next_list() {
    let server = cluster().await;
    let timing = Timing {
        resync: Duration::from_millis(100),
        ..hurried()
    };
    let mut watching = Watching::start(&server, settings(timing)).await;
    watching.members(&["d0", "p0"]).await;
    server.lose(PODS, "d0");
    watching.members(&["p0"]).await;
    assert!(server.lists(PODS) > 1);
}

#[tokio::test]
async fn forgotten_versions_lead_to_a_new_list() {
    for by_status in [false, true] {
        let server = cluster().await;
        server.set_gone_by_status(by_status);
        let mut watching = Watching::start(&server, settings(hurried())).await;
        watching.members(&["d0", "p0"]).await;
        server
            .until("a watch", |server| server.watches(PODS) == 1)
            .await;
        server.lose(PODS, "p0");
        server.compact();
        server.drop_watches(true);
        watching.members(&["d0"]).await;
        assert_eq!(server.lists(PODS), 2);
        // And the new watch works.
        server.apply(&pod("p1", "10.0.0.2", "prefill"));
        watching.members(&["d0", "p1"]).await;
    }
}

#[tokio::test]
async fn broken_watches_miss_nothing() {
    let server = cluster().await;
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    for (turn, cleanly) in [true, false, true, false].into_iter().enumerate() {
        let turns = turn + 1;
        server
            .until("a watch", |server| server.watches(PODS) >= turns)
            .await;
        server.drop_watches(cleanly);
        let name = format!("p{turns}");
        server.apply(&pod(&name, &format!("10.0.0.{}", turns + 10), "prefill"));
        let has = |fleet: &Arc<Fleet>| fleet.members.iter().any(|member| member.name == name);
        soon(watching.fleet.wait_for(has)).await.unwrap();
    }
    // A clean end is gone on from, after a break all is listed.
    assert_eq!(server.lists(PODS), 3);
}

#[tokio::test]
async fn bookmarks_spare_lists() {
    let server = cluster().await;
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    server
        .until("a watch", |server| server.watches(PODS) == 1)
        .await;
    // Nothing of pods happens, and all older versions are forgotten: only the bookmark tells where to go on.
    server.compact();
    server.bookmark();
    server.drop_watches(true);
    server
        .until("another watch", |server| server.watches(PODS) == 2)
        .await;
    server.apply(&pod("p1", "10.0.0.2", "prefill"));
    watching.members(&["d0", "p0", "p1"]).await;
    assert_eq!(server.lists(PODS), 1);
}

#[tokio::test]
async fn when_the_server_is_gone_the_last_fleet_stays() {
    let server = cluster().await;
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    for status in [500, 503, 401, 403, 404] {
        server.set_broken(status);
        server.drop_watches(false);
        // Long enough for several more tries of every watch.
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(watching.names(), ["d0", "p0"], "{status}");
        server.set_broken(0);
        let name = format!("q{status}");
        server.apply(&pod(&name, "10.0.0.9", "prefill"));
        watching.members(&["d0", "p0", &name]).await;
        server.delete(PODS, &name);
        watching.members(&["d0", "p0"]).await;
    }
}

#[tokio::test]
async fn nothing_is_published_before_all_is_listed() {
    let server = cluster().await;
    server.hold_lists(true);
    let mut watching = Watching::start(&server, settings(hurried())).await;
    server
        .until("a question", |server| server.lists(POOLS) == 1)
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!watching.fleet.has_changed().unwrap());
    server.hold_lists(false);
    watching.members(&["d0", "p0"]).await;
}

#[tokio::test]
async fn a_list_without_an_answer_is_asked_for_again() {
    let server = cluster().await;
    server.hold_lists(true);
    let timing = Timing {
        list_timeout: Duration::from_millis(50),
        ..hurried()
    };
    let mut watching = Watching::start(&server, settings(timing)).await;
    server
        .until("a second question", |server| server.lists(POOLS) > 1)
        .await;
    assert!(watching.names().is_empty());
    server.hold_lists(false);
    watching.members(&["d0", "p0"]).await;
}

#[tokio::test]
async fn events_arrive_in_pieces_of_any_size() {
    let server = cluster().await;
    server.set_piece_bytes(7);
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["d0", "p0"]).await;
    server.apply(&pod("p1", "10.0.0.2", "prefill"));
    watching.members(&["d0", "p0", "p1"]).await;
    assert_eq!((server.lists(PODS), server.watches(PODS)), (1, 1));
}

#[tokio::test]
async fn kinds_that_the_cluster_does_not_have_are_done_without_until_they_come() {
    let server = ApiServer::start().await;
    for plural in [
        "inferencemodels",
        "inferenceobjectives",
        "inferencemodelrewrites",
        "inferencetrafficpolicies",
    ] {
        server.forget_kind(plural);
    }
    server.apply(&pool(&json!({"app": "sglang"})));
    server.apply(&pod("p0", "10.0.0.1", "prefill"));
    let mut watching = Watching::start(&server, settings(hurried())).await;
    watching.members(&["p0"]).await;
    server.learn_kinds();
    server.apply(
        &json!({"apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceModel",
        "metadata": {"name": "m"}, "spec": {"modelName": "m", "poolRef": {"name": "qwen"}}}),
    );
    let has = |fleet: &Arc<Fleet>| fleet.model("m").is_some();
    let fleet = soon(watching.fleet.wait_for(has)).await.unwrap();
    assert_eq!(fleet.members.len(), 1);
}
