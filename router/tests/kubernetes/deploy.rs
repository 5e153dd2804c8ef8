//! The files in `deploy/`: that they are what an API server takes, and fit each other, the guide and the router.

use std::collections::BTreeSet;

use kvrouter::config::CommandLine;
use kvrouter::discover::cluster::{self, Objects, Scope};
use kvrouter::discover::objects::{Kind, Object};
use serde_json::{Value as Json, json};

use crate::documents::documents;
use crate::schema::{faults, schema_of};

const CRDS: &str = include_str!("../../deploy/crds.yaml");
const POOL: &str = include_str!("../../deploy/pool.yaml");
const GATEWAY: &str = include_str!("../../deploy/gateway.yaml");
const ROUTER: &str = include_str!("../../deploy/kvrouter.yaml");
const RBAC: &str = include_str!("../../deploy/rbac.yaml");
const NODES: &str = include_str!("../../deploy/rbac-node-zones.yaml");
const WORKERS: &str = include_str!("../../deploy/workers.yaml");
const SEED: &str = include_str!("seed.yaml");

fn of_kind(objects: &[Json], kind: &str) -> Json {
    let found = objects.iter().find(|object| object["kind"] == kind);
    found.unwrap_or_else(|| panic!("no {kind}")).clone()
}

fn kind_of(object: &Json) -> Option<Kind> {
    Kind::ALL.into_iter().find(|kind| {
        let place = kind.place();
        object["kind"] == place.kind
            && object["apiVersion"] == format!("{}/{}", place.group, place.version)
    })
}

#[test]
fn every_object_is_whole_and_named_once() {
    let mut seen = BTreeSet::new();
    for file in [CRDS, POOL, GATEWAY, ROUTER, RBAC, NODES, WORKERS] {
        for object in documents(file) {
            let (kind, name) = (
                object["kind"].as_str().unwrap(),
                object["metadata"]["name"].as_str().unwrap(),
            );
            assert!(object["apiVersion"].is_string(), "{kind} {name}");
            assert!(seen.insert(format!("{kind} {name}")), "{kind} {name} twice");
        }
    }
}

#[test]
fn our_objects_and_the_guides_fit_the_definitions() {
    let definitions = documents(CRDS);
    for kind in Kind::ALL {
        let place = kind.place();
        let object =
            json!({"apiVersion": format!("{}/{}", place.group, place.version), "kind": place.kind});
        assert_eq!(
            schema_of(&definitions, &object).is_some(),
            !place.group.is_empty(),
            "{kind}"
        );
    }
    for definition in &definitions {
        let spec = &definition["spec"];
        let plural = spec["names"]["plural"].as_str().unwrap();
        let name = format!("{plural}.{}", spec["group"].as_str().unwrap());
        assert_eq!(definition["metadata"]["name"], name);
    }
    let mut checked = 0;
    for object in documents(POOL).iter().chain(&documents(SEED)) {
        if let Some(schema) = schema_of(&definitions, object) {
            assert_eq!(faults(schema, object, ""), Vec::<String>::new());
            checked += 1;
        }
    }
    assert_eq!(checked, 6);
    // The check can fail.
    let mut wrong = of_kind(&documents(POOL), "InferencePool");
    wrong["spec"]["targetPortNumber"] = 70000.into();
    wrong["spec"]["targetPort"] = 1.into();
    let schema = schema_of(&definitions, &wrong).unwrap();
    assert_eq!(faults(schema, &wrong, "").len(), 2);
}

#[test]
fn what_the_router_writes_fits_the_definitions() {
    let definitions = documents(CRDS);
    let condition = json!({"type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
        "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let parent = json!({"parentRef": {"group": "", "kind": "Service", "name": "kvrouter"}, "conditions": [condition]});
    for definition in &definitions {
        let schema =
            &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"];
        let properties = &schema["properties"];
        let status = if properties.get("parents").is_some() {
            let mut parent = parent.clone();
            parent["controllerName"] = "kvtransfer.io/kvrouter".into();
            json!({"parents": [parent]})
        } else if properties.get("parent").is_some() {
            json!({"parent": [parent]})
        } else {
            json!({"conditions": [condition]})
        };
        assert_eq!(faults(schema, &status, "status"), Vec::<String>::new());
    }
}

#[test]
fn the_router_takes_the_pool_and_the_workers_without_complaint() {
    let mut objects = Objects::default();
    for object in documents(POOL) {
        let kind = kind_of(&object).expect("a kind that the router reads");
        objects.put(kind, Object::read(kind, &object));
    }
    let group = of_kind(&documents(WORKERS), "RoleBasedGroup");
    let mut number = 0;
    for role in group["spec"]["roles"].as_array().unwrap() {
        for _ in 0..role["replicas"].as_u64().unwrap() {
            number += 1;
            let mut pod = json!({"metadata": role["template"]["metadata"].clone(),
                "status": {"podIP": format!("10.0.0.{number}"), "conditions": [{"type": "Ready", "status": "True"}]}});
            pod["metadata"]["name"] = format!("sglang-pd-{number}").into();
            pod["metadata"]["labels"]["rbg.workloads.x-k8s.io/role-name"] = role["name"].clone();
            objects.put(Kind::Pod, Object::read(Kind::Pod, &pod));
        }
    }
    let view = cluster::view(&Scope::new("default", "qwen-inference-pool"), &objects);
    assert_eq!(view.fleet.members.len(), 3);
    assert_eq!(
        (view.fleet.models.len(), view.fleet.objective("batch")),
        (1, Some(-10))
    );
    for report in &view.reports {
        for condition in &report.conditions {
            assert!(condition.holds, "{}: {condition:?}", report.name);
        }
    }
}

#[test]
fn ports_of_workers_pool_and_policy_agree() {
    let pool = of_kind(&documents(POOL), "InferencePool");
    let policy = of_kind(&documents(POOL), "InferenceTrafficPolicy");
    let port = pool["spec"]["targetPortNumber"].to_string();
    let bootstrap = policy["spec"]["profile"]["pd"]["kvTransfer"]["bootstrapPort"].to_string();
    let group = of_kind(&documents(WORKERS), "RoleBasedGroup");
    for role in group["spec"]["roles"].as_array().unwrap() {
        let container = &role["template"]["spec"]["containers"][0];
        let command = container["command"][2].as_str().unwrap();
        let name = role["name"].as_str().unwrap();
        assert!(
            command.contains(&format!("--port {port} --disaggregation-mode {name}")),
            "{command}"
        );
        let tells_bootstrap =
            command.contains(&format!("--disaggregation-bootstrap-port {bootstrap}"));
        assert_eq!(tells_bootstrap, name == "prefill", "{command}");
        let selector = pool["spec"]["selector"].as_object().unwrap();
        for (key, value) in selector {
            assert_eq!(role["template"]["metadata"]["labels"][key], *value);
        }
        let gpus = container["resources"]["limits"]["nvidia.com/gpu"]
            .as_str()
            .unwrap();
        assert!(command.contains(&format!("--tp-size {gpus}")), "{command}");
    }
}

#[test]
fn the_deployment_is_a_command_line_of_this_router() {
    let objects = documents(ROUTER);
    let deployment = of_kind(&objects, "Deployment");
    let pod = &deployment["spec"]["template"];
    let container = &pod["spec"]["containers"][0];
    let args = container["args"]
        .as_array()
        .unwrap()
        .iter()
        .map(|arg| arg.as_str().unwrap());
    let line = CommandLine::from_args(["kvrouter"].into_iter().chain(args)).unwrap();
    assert_eq!(line.config.port, 8080);
    let told = &line.config.gossip;
    assert_eq!(
        (told.port, container["ports"][1]["containerPort"].as_u64()),
        (Some(8081), Some(8081))
    );
    let grace = pod["spec"]["terminationGracePeriodSeconds"]
        .as_u64()
        .unwrap();
    let pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        .as_u64()
        .unwrap();
    assert!(grace > line.config.drain_timeout.as_secs() + pause);
    assert_eq!(container["ports"][0]["containerPort"], 8080);
    assert_eq!(
        pod["metadata"]["labels"],
        deployment["spec"]["selector"]["matchLabels"]
    );
    for service in objects.iter().filter(|object| object["kind"] == "Service") {
        assert_eq!(service["spec"]["selector"], pod["metadata"]["labels"]);
        assert_eq!(
            service["spec"]["ports"][0]["targetPort"],
            container["ports"][0]["name"]
        );
    }
    let monitor = of_kind(&objects, "PodMonitor");
    assert_eq!(
        monitor["spec"]["selector"]["matchLabels"],
        pod["metadata"]["labels"]
    );
    assert_eq!(
        monitor["spec"]["podMetricsEndpoints"][0]["port"],
        container["ports"][0]["name"]
    );
    let account = of_kind(&documents(RBAC), "ServiceAccount");
    assert_eq!(
        pod["spec"]["serviceAccountName"],
        account["metadata"]["name"]
    );
    let route = of_kind(&documents(GATEWAY), "HTTPRoute");
    let backend = &route["spec"]["rules"][0]["backendRefs"][0];
    let service = of_kind(&objects, "Service");
    assert_eq!(
        (&backend["name"], &backend["port"]),
        (
            &service["metadata"]["name"],
            &service["spec"]["ports"][0]["port"]
        )
    );
    // The gateway and its timeout are the guide's.
    for kind in ["Gateway", "BackendTrafficPolicy"] {
        assert_eq!(
            of_kind(&documents(GATEWAY), kind)["spec"],
            of_kind(&documents(SEED), kind)["spec"]
        );
    }
}

#[test]
fn the_role_allows_what_the_router_does_and_no_more() {
    let mut allowed = BTreeSet::new();
    for (file, kind) in [(RBAC, "Role"), (NODES, "ClusterRole")] {
        for rule in of_kind(&documents(file), kind)["rules"].as_array().unwrap() {
            let texts = |name: &str| -> Vec<String> {
                let all = rule[name].as_array().unwrap().iter();
                all.map(|text| text.as_str().unwrap().to_owned()).collect()
            };
            for group in texts("apiGroups") {
                for resource in texts("resources") {
                    allowed.extend(
                        texts("verbs")
                            .iter()
                            .map(|verb| format!("{verb} {resource} in {group}")),
                    );
                }
            }
        }
    }
    let mut needed = BTreeSet::new();
    for kind in Kind::ALL {
        let (group, plural) = (kind.place().group, kind.place().plural);
        needed.extend(["list", "watch"].map(|verb| format!("{verb} {plural} in {group}")));
        if !group.is_empty() {
            needed.insert(format!("patch {plural}/status in {group}"));
        }
    }
    needed.extend(["create", "patch"].map(|verb| format!("{verb} events in ")));
    assert_eq!(allowed, needed);
}
