//! The Kubernetes objects that the router reads, as small types of its own.
//!
//! Each is read from JSON by hand, because what matters is *where* something is wrong: a mistake is reported on the object
//! itself, with the path of the field. Unknown fields are reported for [`policy`] only; the others grow new ones.
#![forbid(unsafe_code)]

mod fields;
pub mod model;
pub mod pod;
pub mod policy;
pub mod pool;

use std::collections::BTreeMap;

use serde_json::Value as Json;

pub use fields::{Fields, Flaw, FlawKind};

/// What the router reads from a cluster, in the order in which sources are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// InferencePool v1.
    PoolV1,
    /// InferencePool v1alpha2.
    PoolV1Alpha2,
    /// Alibaba Cloud's InferenceTrafficPolicy.
    TrafficPolicy,
    /// Pods.
    Pod,
    /// InferenceModel.
    Model,
    /// InferenceObjective.
    Objective,
    /// InferenceObjective, under the group it moved to.
    LlmdObjective,
    /// InferenceModelRewrite.
    Rewrite,
    /// InferenceModelRewrite, under the group it moved to.
    LlmdRewrite,
    /// Nodes, for the zones of pods that do not carry theirs.
    Node,
}

/// Where the API server has the objects of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// API group; empty for Kubernetes' own first ones.
    pub group: &'static str,
    /// Version in the group.
    pub version: &'static str,
    /// Name of the kind.
    pub kind: &'static str,
    /// Its plural in paths.
    pub plural: &'static str,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 10] = [
        Self::PoolV1,
        Self::PoolV1Alpha2,
        Self::TrafficPolicy,
        Self::Pod,
        Self::Model,
        Self::Objective,
        Self::LlmdObjective,
        Self::Rewrite,
        Self::LlmdRewrite,
        Self::Node,
    ];

    /// Where the API server has them.
    pub const fn place(self) -> Place {
        const GIE: &str = "inference.networking.x-k8s.io";
        let (group, version, kind, plural) = match self {
            Self::PoolV1 => (
                "inference.networking.k8s.io",
                "v1",
                "InferencePool",
                "inferencepools",
            ),
            Self::PoolV1Alpha2 => (GIE, "v1alpha2", "InferencePool", "inferencepools"),
            Self::TrafficPolicy => (
                "inferenceextension.alibabacloud.com",
                "v1alpha1",
                "InferenceTrafficPolicy",
                "inferencetrafficpolicies",
            ),
            Self::Pod => ("", "v1", "Pod", "pods"),
            Self::Model => (GIE, "v1alpha2", "InferenceModel", "inferencemodels"),
            Self::Objective => (GIE, "v1alpha2", "InferenceObjective", "inferenceobjectives"),
            Self::LlmdObjective => (
                "llm-d.ai",
                "v1alpha2",
                "InferenceObjective",
                "inferenceobjectives",
            ),
            Self::Rewrite => (
                GIE,
                "v1alpha2",
                "InferenceModelRewrite",
                "inferencemodelrewrites",
            ),
            Self::LlmdRewrite => (
                "llm-d.ai",
                "v1alpha2",
                "InferenceModelRewrite",
                "inferencemodelrewrites",
            ),
            Self::Node => ("", "v1", "Node", "nodes"),
        };
        Place {
            group,
            version,
            kind,
            plural,
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = self.place();
        match place.group {
            "" => f.write_str(place.plural),
            group => write!(f, "{}.{group}", place.plural),
        }
    }
}

/// An object of a cluster, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// Which pods serve.
    Pool(pool::Pool),
    /// How they work together.
    Policy(policy::TrafficPolicy),
    /// One of them.
    Pod(pod::Pod),
    /// A model name.
    Model(model::Model),
    /// A name for a priority.
    Objective(model::Objective),
    /// What model names stand for.
    Rewrite(model::Rewrite),
    /// A machine, of which only the labels count.
    Node(Meta),
}

impl Object {
    /// Reads an object of `kind`.
    pub fn read(kind: Kind, json: &Json) -> Self {
        match kind {
            Kind::PoolV1 => Self::Pool(pool::Pool::read(json, pool::PoolVersion::V1)),
            Kind::PoolV1Alpha2 => Self::Pool(pool::Pool::read(json, pool::PoolVersion::V1Alpha2)),
            Kind::TrafficPolicy => Self::Policy(policy::TrafficPolicy::read(json)),
            Kind::Pod => Self::Pod(pod::Pod::read(json)),
            Kind::Model => Self::Model(model::Model::read(json)),
            Kind::Objective | Kind::LlmdObjective => Self::Objective(model::Objective::read(json)),
            Kind::Rewrite | Kind::LlmdRewrite => Self::Rewrite(model::Rewrite::read(json)),
            Kind::Node => Self::Node(Meta::read(json)),
        }
    }

    /// Its name and labels.
    pub const fn meta(&self) -> &Meta {
        match self {
            Self::Pool(pool) => &pool.meta,
            Self::Policy(policy) => &policy.meta,
            Self::Pod(pod) => &pod.meta,
            Self::Model(model) => &model.meta,
            Self::Objective(objective) => &objective.meta,
            Self::Rewrite(rewrite) => &rewrite.meta,
            Self::Node(meta) => meta,
        }
    }

    /// Its status, for those kinds that the router reports on.
    pub const fn status(&self) -> Option<&Json> {
        match self {
            Self::Pool(pool) => Some(&pool.status),
            Self::Policy(policy) => Some(&policy.status),
            Self::Model(model) => Some(&model.status),
            Self::Objective(objective) => Some(&objective.status),
            Self::Rewrite(rewrite) => Some(&rewrite.status),
            Self::Pod(_) | Self::Node(_) => None,
        }
    }
}

/// Longest text of a field that is repeated in a message.
const SHOWN_MAX: usize = 80;

/// What every object has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Its name.
    pub name: String,
    /// Its namespace; empty for a node.
    pub namespace: String,
    /// Never used twice.
    pub uid: String,
    /// Counts the changes of its spec.
    pub generation: i64,
    /// When it was made, as RFC 3339, which sorts as time.
    pub created: String,
    /// Changes with every write, and is to be sent back with one.
    pub resource_version: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// It is being deleted.
    pub is_terminating: bool,
}

impl Meta {
    /// Reads `metadata`. What is missing stays empty: the API server fills it in.
    pub fn read(object: &Json) -> Self {
        let meta = &object["metadata"];
        let text = |name: &str| meta[name].as_str().unwrap_or_default().to_owned();
        Self {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            generation: meta["generation"].as_i64().unwrap_or(0),
            created: text("creationTimestamp"),
            resource_version: text("resourceVersion"),
            labels: text_map(&meta["labels"]),
            annotations: text_map(&meta["annotations"]),
            is_terminating: meta["deletionTimestamp"].is_string(),
        }
    }

    /// Older objects first; of the same age, by name. So every replica sees the same order.
    pub fn age(&self) -> (&str, &str) {
        (&self.created, &self.name)
    }
}

/// A condition in an object's status, without its times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// What is judged.
    pub kind: &'static str,
    /// The judgement.
    pub holds: bool,
    /// One word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

impl Condition {
    /// A judgement with its reason.
    pub fn new(
        kind: &'static str,
        holds: bool,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            holds,
            reason,
            message: message.into(),
        }
    }
}

/// The string values of an object.
fn text_map(json: &Json) -> BTreeMap<String, String> {
    let members = json.as_object().into_iter().flatten();
    members
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

/// A value as a message shows it: JSON, cut if it is long.
fn shown(value: &Json) -> String {
    let mut text = value.to_string();
    if text.len() > SHOWN_MAX {
        let end = (0..=SHOWN_MAX).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}
