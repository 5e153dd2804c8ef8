use serde_json::{Value as Json, json};

use super::*;
use crate::pool::Role;

fn scope() -> Scope {
    Scope::new("default", "qwen")
}

fn pool() -> Json {
    json!({
        "metadata": {"name": "qwen", "generation": 1, "uid": "pool"},
        "spec": {"selector": {"app": "sglang"}, "targetPortNumber": 8000},
    })
}

fn policy(spec: &Json) -> Json {
    json!({"metadata": {"name": "policy", "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": spec})
}

fn seed_policy() -> Json {
    policy(&json!({
        "poolRef": {"name": "qwen"},
        "modelServerRuntime": "sglang",
        "profile": {"pd": {"pdRoleLabelName": "my/role", "kvTransfer": {"bootstrapPort": 34000}}},
    }))
}

fn pod(name: &str, ip: &str, labels: &Json) -> Json {
    let mut pod = json!({
        "metadata": {"name": name, "uid": name, "creationTimestamp": "2026-01-01T00:00:00Z", "labels": labels},
        "spec": {"nodeName": "n1"},
        "status": {"podIP": ip, "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    });
    pod["metadata"]["labels"]["app"] = "sglang".into();
    pod
}

fn objects(all: &[(Kind, Json)]) -> Objects {
    let mut objects = Objects::default();
    for (kind, json) in all {
        objects.put(*kind, Object::read(*kind, json));
    }
    objects
}

fn seen(all: &[(Kind, Json)]) -> View {
    view(&scope(), &objects(all))
}

/// A condition of an object in the view.
fn judged(view: &View, kind: Kind, name: &str, condition: &str) -> (bool, &'static str, String) {
    let report = view
        .reports
        .iter()
        .find(|one| one.kind == kind && one.name == name);
    let conditions = &report.expect("a report").conditions;
    let found = conditions.iter().find(|one| one.kind == condition);
    let found = found.expect("the condition");
    (found.holds, found.reason, found.message.clone())
}

#[test]
fn roles_come_from_the_policys_label_or_from_rolebasedgroups() {
    let (new, old) = (ROLE_LABELS[0], ROLE_LABELS[1]);
    let all = vec![
        (Kind::PoolV1Alpha2, pool()),
        (Kind::TrafficPolicy, seed_policy()),
        (
            Kind::Pod,
            pod(
                "a",
                "10.0.0.1",
                &json!({"my/role": "prefill", new: "decode"}),
            ),
        ),
        (Kind::Pod, pod("b", "10.0.0.2", &json!({new: "prefill"}))),
        (Kind::Pod, pod("c", "fd00::3", &json!({old: "decode"}))),
        (
            Kind::Pod,
            pod("d", "10.0.0.4", &json!({"my/role": "boss", old: "d"})),
        ),
        (Kind::Pod, pod("r", "10.0.0.5", &json!({new: "router"}))),
    ];
    let view = seen(&all);
    let members = &view.fleet.members;
    let told: Vec<_> = members
        .iter()
        .map(|one| (one.name.as_str(), one.role))
        .collect();
    assert_eq!(
        told,
        [
            ("a", Role::Prefill),
            ("b", Role::Prefill),
            ("c", Role::Decode),
            ("d", Role::Decode)
        ]
    );
    assert_eq!(members[2].url.to_string(), "http://[fd00::3]:8000");
    assert_eq!(
        (members[0].bootstrap_port, members[0].bootstrap_port_assumed),
        (None, Some(34000))
    );
    assert!(members[0].probes_bootstrap && !members[2].probes_bootstrap);
    assert_eq!(members[2].bootstrap_port_assumed, None);
    assert_eq!(view.pod_labels.as_deref(), Some("app=sglang"));
    for name in [
        "Accepted",
        "ResolvedRefs",
        "RolesRecognized",
        "MembersUsable",
        "PairsAvailable",
    ] {
        assert!(judged(&view, Kind::PoolV1Alpha2, "qwen", name).0, "{name}");
    }
}

#[test]
fn pods_without_a_role_are_named_with_what_they_lack() {
    let (new, old) = (ROLE_LABELS[0], ROLE_LABELS[1]);
    let worse = seen(&[
        (Kind::PoolV1Alpha2, pool()),
        (Kind::TrafficPolicy, seed_policy()),
        (Kind::Pod, pod("x", "10.0.0.6", &json!({"my/role": "boss"}))),
        (Kind::Pod, pod("y", "10.0.0.7", &json!({}))),
    ]);
    assert!(worse.fleet.members.is_empty());
    let (holds, reason, message) = judged(&worse, Kind::PoolV1Alpha2, "qwen", "RolesRecognized");
    assert_eq!((holds, reason), (false, "RoleUnknown"));
    assert!(
        message.contains("x has the unknown role `boss` in its label my/role"),
        "{message}"
    );
    assert!(
        message.contains("y has no label that tells its role"),
        "{message}"
    );
    assert!(message.contains(new) && message.contains(old), "{message}");
}

#[test]
fn only_ready_leaders_serve_and_those_that_go_drain() {
    let with = |name: &str, change: fn(&mut Json)| {
        let mut pod = pod(name, "10.0.0.1", &json!({"my/role": "decode"}));
        change(&mut pod);
        pod["status"]["podIP"] = format!("10.0.1.{}", name.len()).into();
        (Kind::Pod, pod)
    };
    let view = seen(&[
        (Kind::PoolV1Alpha2, pool()),
        (Kind::TrafficPolicy, seed_policy()),
        with("a", |_| ()),
        with("bb", |pod| {
            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into()
        }),
        with("ccc", |pod| {
            pod["status"]["conditions"][0]["status"] = "False".into()
        }),
        with("dddd", |pod| pod["status"]["phase"] = "Failed".into()),
        with("eeeee", |pod| {
            pod["metadata"]["labels"]["leaderworkerset.sigs.k8s.io/worker-index"] = "1".into();
        }),
        with("ffffff", |pod| {
            pod["metadata"]["labels"]["leaderworkerset.sigs.k8s.io/worker-index"] = "0".into();
        }),
        with("ggggggg", |pod| {
            pod["metadata"]["labels"]["rbg.workloads.x-k8s.io/component-name"] = "worker".into();
            pod["metadata"]["labels"]["rbg.workloads.x-k8s.io/component-index"] = "1".into();
        }),
        with("hhhhhhhh", |pod| {
            pod["metadata"]["labels"]["rbg.workloads.x-k8s.io/component-name"] = "leader".into();
        }),
        with("iiiiiiiii", |pod| {
            pod["metadata"]["labels"]["app"] = "other".into()
        }),
    ]);
    let members = view.fleet.members.iter();
    let told: Vec<_> = members
        .map(|one| (one.name.as_str(), one.draining))
        .collect();
    assert_eq!(
        told,
        [
            ("a", false),
            ("bb", true),
            ("ffffff", false),
            ("hhhhhhhh", false)
        ]
    );
    let (holds, reason, _) = judged(&view, Kind::PoolV1Alpha2, "qwen", "PairsAvailable");
    assert_eq!((holds, reason), (false, "NoPrefill"));
}

#[test]
fn annotations_nodes_and_several_ports_are_heeded() {
    let mut v1 = pool();
    v1["spec"] = json!({
        "selector": {"matchLabels": {"app": "sglang"}},
        "targetPorts": [{"number": 8000}, {"number": 8001}],
    });
    let mut annotated = pod("a", "10.0.0.1", &json!({"my/role": "prefill"}));
    annotated["metadata"]["annotations"] = json!({
        "kvtransfer.io/port": "9000",
        "kvtransfer.io/bootstrap-port": "9001",
        "kvtransfer.io/telemetry-port": "9002",
    });
    let mut broken = pod("b", "10.0.0.2", &json!({"my/role": "prefill"}));
    broken["metadata"]["annotations"] = json!({"kvtransfer.io/bootstrap-port": "many"});
    let zoned = json!({"my/role": "decode", "topology.kubernetes.io/zone": "z2"});
    let node = json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}}});
    let view = seen(&[
        (Kind::PoolV1, v1),
        (Kind::PoolV1Alpha2, pool()),
        (Kind::TrafficPolicy, seed_policy()),
        (Kind::Node, node),
        (Kind::Pod, annotated),
        (Kind::Pod, broken),
        (Kind::Pod, pod("c", "10.0.0.3", &zoned)),
    ]);
    let members = &view.fleet.members;
    let names: Vec<_> = members.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["a", "c:8000", "c:8001"]);
    assert_eq!(members[0].url.to_string(), "http://10.0.0.1:9000");
    assert_eq!(
        (members[0].bootstrap_port, members[0].telemetry_port),
        (Some(9001), Some(9002))
    );
    let zones: Vec<_> = members.iter().map(|one| one.zone.as_deref()).collect();
    assert_eq!(zones, [Some("z1"), Some("z2"), Some("z2")]);
    let (holds, _, message) = judged(&view, Kind::PoolV1, "qwen", "MembersUsable");
    assert!(
        !holds && message.contains("b has `many` for a port"),
        "{message}"
    );
    let (holds, _, message) = judged(&view, Kind::PoolV1Alpha2, "qwen", "Accepted");
    assert!(
        !holds && message.contains("v1 is used instead"),
        "{message}"
    );
}

#[test]
fn an_address_used_again_belongs_to_the_pod_that_lives_on() {
    let mut gone = pod("z-old", "10.0.0.1", &json!({"my/role": "decode"}));
    gone["metadata"]["deletionTimestamp"] = "2026-01-02T00:00:00Z".into();
    let mut young = pod("b", "10.0.0.2", &json!({"my/role": "decode"}));
    young["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    let view = seen(&[
        (Kind::PoolV1Alpha2, pool()),
        (Kind::TrafficPolicy, seed_policy()),
        (
            Kind::Pod,
            pod("a-new", "10.0.0.1", &json!({"my/role": "decode"})),
        ),
        (Kind::Pod, gone),
        (
            Kind::Pod,
            pod("c", "10.0.0.2", &json!({"my/role": "decode"})),
        ),
        (Kind::Pod, young),
    ]);
    let names: Vec<_> = view
        .fleet
        .members
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    assert_eq!(names, ["a-new", "b"]);
    let (holds, _, message) = judged(&view, Kind::PoolV1Alpha2, "qwen", "MembersUsable");
    assert!(
        !holds && message.contains("c and b share 10.0.0.2:8000"),
        "{message}"
    );
}

#[test]
fn no_more_members_than_may_be() {
    let mut all = vec![
        (Kind::PoolV1Alpha2, pool()),
        (Kind::TrafficPolicy, seed_policy()),
    ];
    for number in 0..crate::discover::MEMBERS_MAX + 3 {
        let ip = format!("10.1.{}.{}", number / 256, number % 256);
        all.push((
            Kind::Pod,
            pod(&format!("p{number:05}"), &ip, &json!({"my/role": "decode"})),
        ));
    }
    let view = seen(&all);
    assert_eq!(view.fleet.members.len(), crate::discover::MEMBERS_MAX);
    let (holds, _, message) = judged(&view, Kind::PoolV1Alpha2, "qwen", "MembersUsable");
    assert!(!holds && message.contains("above the 4096"), "{message}");
}

#[test]
fn mistakes_in_a_policy_are_named_by_their_path_and_the_rest_counts() {
    for (change, reason, part) in [
        (
            json!({"profile": {"pd": {"pdRoleLabelName": "my/role", "kvTransfer": {"bootstrapPort": 34000, "backend": "x"}}}}),
            "UnknownField",
            "spec.profile.pd.kvTransfer.backend is no known field; known here: bootstrapPort",
        ),
        (
            json!({"retries": 3}),
            "UnknownField",
            "spec.retries is no known field",
        ),
        (
            json!({"modelServerRuntime": "vllm"}),
            "Unsupported",
            "spec.modelServerRuntime is not supported",
        ),
        (
            json!({"profile": {"single": {}, "pd": {"pdRoleLabelName": "my/role"}}}),
            "Unsupported",
            "spec.profile.single is not supported",
        ),
        (
            json!({"profile": {"pd": {"pdRoleLabelName": "my/role", "kvTransfer": {"bootstrapPort": 70000}}}}),
            "Invalid",
            "spec.profile.pd.kvTransfer.bootstrapPort is 70000, and must be a port from 1 to 65535",
        ),
    ] {
        let mut mistaken = seed_policy();
        for (key, value) in change.as_object().expect("an object") {
            mistaken["spec"][key] = value.clone();
        }
        let view = seen(&[
            (Kind::PoolV1Alpha2, pool()),
            (Kind::TrafficPolicy, mistaken),
            (
                Kind::Pod,
                pod("a", "10.0.0.1", &json!({"my/role": "prefill"})),
            ),
        ]);
        let (holds, why, message) = judged(&view, Kind::TrafficPolicy, "policy", "Accepted");
        assert_eq!((holds, why), (false, reason), "{message}");
        assert!(message.contains(part), "{message}");
        assert!(
            message.contains("The other fields are in force"),
            "{message}"
        );
        assert_eq!(view.fleet.members.len(), 1, "{change}");
    }
    let missing = policy(&json!({"poolRef": {"name": "qwen"}, "profile": {}}));
    let view = seen(&[(Kind::TrafficPolicy, missing)]);
    let (_, _, message) = judged(&view, Kind::TrafficPolicy, "policy", "Accepted");
    assert!(message.contains("spec.profile.pd is missing"), "{message}");
    let (holds, reason, _) = judged(&view, Kind::TrafficPolicy, "policy", "ResolvedRefs");
    assert_eq!((holds, reason), (false, "PoolNotFound"));
}

#[test]
fn of_two_policies_the_older_or_the_named_one_counts() {
    let mut younger = seed_policy();
    younger["metadata"] = json!({"name": "younger", "creationTimestamp": "2026-05-01T00:00:00Z"});
    younger["spec"]["profile"]["pd"]["kvTransfer"]["bootstrapPort"] = 1234.into();
    let mut stranger = seed_policy();
    stranger["metadata"]["name"] = "stranger".into();
    stranger["spec"]["poolRef"]["name"] = "another".into();
    let all = [
        (Kind::PoolV1Alpha2, pool()),
        (Kind::TrafficPolicy, seed_policy()),
        (Kind::TrafficPolicy, younger),
        (Kind::TrafficPolicy, stranger),
        (
            Kind::Pod,
            pod("a", "10.0.0.1", &json!({"my/role": "prefill"})),
        ),
    ];
    let view = seen(&all);
    assert_eq!(view.fleet.members[0].bootstrap_port_assumed, Some(34000));
    assert_eq!(
        judged(&view, Kind::TrafficPolicy, "younger", "Accepted").1,
        "Conflicted"
    );
    assert!(!view.reports.iter().any(|report| report.name == "stranger"));
    let named = Scope {
        policy: Some("younger".to_owned()),
        ..scope()
    };
    let view = super::view(&named, &objects(&all));
    assert_eq!(view.fleet.members[0].bootstrap_port_assumed, Some(1234));
    assert_eq!(
        judged(&view, Kind::TrafficPolicy, "policy", "Accepted").1,
        "Conflicted"
    );
}

/// An object about the pool; the day of its birth orders them.
fn about_pool(name: &str, day: u32, spec: Json) -> Json {
    let created = format!("2026-01-{day:02}T00:00:00Z");
    let mut object =
        json!({"metadata": {"name": name, "creationTimestamp": created}, "spec": spec});
    object["spec"]["poolRef"] = json!({"name": "qwen"});
    object
}

fn model_objects() -> Vec<(Kind, Json)> {
    let rewrite = |model: Json, target: &str| json!({"matches": model, "targets": [{"modelRewrite": target}]});
    let exact = |name: &str| json!([{"model": {"type": "Exact", "value": name}}]);
    let food = json!({"modelName": "food", "criticality": "Critical",
        "targetModels": [{"name": "food-v1", "weight": 90}, {"name": "food-v2", "weight": 10}]});
    let batch = json!({"modelName": "batch", "criticality": "Sheddable"});
    let half =
        json!({"modelName": "half", "targetModels": [{"name": "a", "weight": 1}, {"name": "b"}]});
    let regex = json!({"matches": [{"model": {"type": "Regex", "value": ".*"}}], "targets": [{"modelRewrite": "x"}]});
    let young = rewrite(exact("alias"), "young");
    let v2 = rewrite(exact("batch"), "batch-v2");
    let rest = rewrite(json!([]), "rest");
    let old = rewrite(exact("alias"), "old");
    vec![
        (Kind::PoolV1Alpha2, pool()),
        (Kind::Model, about_pool("m1", 1, food)),
        (
            Kind::Model,
            about_pool("m2", 2, json!({"modelName": "food"})),
        ),
        (Kind::Model, about_pool("m3", 2, batch)),
        (Kind::Model, about_pool("m4", 2, half)),
        (
            Kind::Objective,
            about_pool("urgent", 1, json!({"priority": 10})),
        ),
        (
            Kind::LlmdObjective,
            about_pool("later", 1, json!({"priority": -5})),
        ),
        (
            Kind::Rewrite,
            about_pool("r1", 2, json!({"rules": [young, v2, rest]})),
        ),
        (
            Kind::LlmdRewrite,
            about_pool("r0", 1, json!({"rules": [old]})),
        ),
        (
            Kind::Rewrite,
            about_pool("r2", 3, json!({"rules": [regex]})),
        ),
    ]
}

#[test]
fn models_objectives_and_rewrites_become_rules() {
    let view = seen(&model_objects());
    let fleet = &view.fleet;
    let told: Vec<_> = fleet
        .models
        .iter()
        .map(|rule| {
            let targets: Vec<_> = rule
                .targets
                .iter()
                .map(|one| (one.model.as_str(), one.weight))
                .collect();
            (rule.name.as_str(), rule.priority, targets)
        })
        .collect();
    assert_eq!(
        told,
        [
            ("alias", 0, vec![("old", 0)]),
            ("batch", -1, vec![("batch-v2", 0)]),
            ("food", 1, vec![("food-v1", 90), ("food-v2", 10)]),
        ]
    );
    assert_eq!(fleet.other_models[0].model, "rest");
    assert_eq!(
        (fleet.objective("urgent"), fleet.objective("later")),
        (Some(10), Some(-5))
    );
    assert!(fleet.model("food").is_some() && fleet.model("foo").is_none());
    assert_eq!(judged(&view, Kind::Model, "m1", "Accepted").1, "Accepted");
    assert_eq!(
        judged(&view, Kind::Model, "m2", "Accepted").1,
        "ModelNameInUse"
    );
    let (_, _, message) = judged(&view, Kind::Model, "m4", "Accepted");
    assert!(
        message.contains("spec.targetModels is a list in which some have a weight"),
        "{message}"
    );
    let (_, _, message) = judged(&view, Kind::Rewrite, "r2", "Accepted");
    assert!(
        message.contains("spec.rules[0].matches[0].model.type is `Regex`, and must be Exact"),
        "{message}"
    );
}

#[test]
fn a_pool_that_is_wrong_says_where() {
    let mut wrong = pool();
    wrong["spec"] = json!({"selector": {"matchLabels": {"app": 3}}, "targetPorts": [{"number": 0}], "appProtocol": "http"});
    let view = seen(&[(Kind::PoolV1, wrong)]);
    let (holds, _, message) = judged(&view, Kind::PoolV1, "qwen", "Accepted");
    assert!(
        !holds
            && message.contains("spec.selector.matchLabels")
            && message.contains("spec.targetPorts[0].number"),
        "{message}"
    );
    // A pool that selects nothing does not select everything.
    assert_eq!(view.pod_labels, None);
    let mut odd = pool();
    odd["spec"]["extensionRef"] = json!({"kind": "Deployment", "name": "epp"});
    let view = seen(&[(Kind::PoolV1Alpha2, odd)]);
    assert_eq!(
        judged(&view, Kind::PoolV1Alpha2, "qwen", "ResolvedRefs").1,
        "InvalidExtensionRef"
    );
}
