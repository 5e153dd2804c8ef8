//! From the objects of a cluster to a fleet, and to what their owners should be told.
//!
//! A pure function of the objects: every replica that sees the same objects publishes the same fleet and writes the same
//! status, so that nobody needs to lead.
#![forbid(unsafe_code)]

mod members;
mod models;

use std::collections::BTreeMap;

use super::Fleet;
use super::objects::policy::TrafficPolicy;
use super::objects::pool::{Pool, PoolVersion};
use super::objects::{Condition, Flaw, FlawKind, Kind, Meta, Object};

/// Labels that tell a pod's role, unless a policy names another: RoleBasedGroup's of today, and of its first version.
pub const ROLE_LABELS: [&str; 2] = [
    "rbg.workloads.x-k8s.io/role-name",
    "rolebasedgroup.workloads.x-k8s.io/role",
];

/// Labels that tell where a pod or its node is, the first one found counts.
pub const ZONE_LABELS: [&str; 1] = ["topology.kubernetes.io/zone"];

/// Most flaws, or pods, that one message names.
const NAMED_MAX: usize = 5;

/// Longest message of a condition in bytes; the API takes 32 768.
const MESSAGE_BYTES_MAX: usize = 2048;

/// What to look for in a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Where all of it is.
    pub namespace: String,
    /// The pool's name.
    pub pool: String,
    /// The policy's name; without one, the oldest that refers to the pool.
    pub policy: Option<String>,
    /// Labels that tell a pod's role, looked at after the policy's.
    pub role_labels: Vec<String>,
    /// Labels that tell where a pod or its node is.
    pub zone_labels: Vec<String>,
    /// Prefill pods are ready only when their bootstrap servers know their ranks.
    pub probes_bootstrap: bool,
}

impl Scope {
    /// The usual labels.
    pub fn new(namespace: impl Into<String>, pool: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            pool: pool.into(),
            policy: None,
            role_labels: ROLE_LABELS.map(str::to_owned).to_vec(),
            zone_labels: ZONE_LABELS.map(str::to_owned).to_vec(),
            probes_bootstrap: true,
        }
    }
}

/// The objects that are known, by kind and name.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    by_kind: BTreeMap<Kind, BTreeMap<String, Object>>,
}

impl Objects {
    /// Adds or replaces an object.
    pub fn put(&mut self, kind: Kind, object: Object) {
        let name = object.meta().name.clone();
        self.by_kind.entry(kind).or_default().insert(name, object);
    }

    /// Forgets an object.
    pub fn remove(&mut self, kind: Kind, name: &str) {
        if let Some(all) = self.by_kind.get_mut(&kind) {
            all.remove(name);
        }
    }

    /// Makes `objects` all there are of their kind.
    pub fn replace(&mut self, kind: Kind, objects: Vec<Object>) {
        let named = objects.into_iter();
        let named = named.map(|object| (object.meta().name.clone(), object));
        self.by_kind.insert(kind, named.collect());
    }

    /// One object.
    pub fn find(&self, kind: Kind, name: &str) -> Option<&Object> {
        self.by_kind.get(&kind)?.get(name)
    }

    /// All objects of one kind, by name.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Object> {
        self.by_kind
            .get(&kind)
            .into_iter()
            .flat_map(BTreeMap::values)
    }

    fn pool(&self, kind: Kind, name: &str) -> Option<&Pool> {
        match self.find(kind, name)? {
            Object::Pool(pool) => Some(pool),
            _ => None,
        }
    }
}

/// What the owner of an object is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Its kind.
    pub kind: Kind,
    /// Which one.
    pub name: String,
    /// The generation that was judged.
    pub generation: i64,
    /// The judgements.
    pub conditions: Vec<Condition>,
}

impl Report {
    fn new(kind: Kind, meta: &Meta, conditions: Vec<Condition>) -> Self {
        Self {
            kind,
            name: meta.name.clone(),
            generation: meta.generation,
            conditions,
        }
    }
}

/// What objects mean.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// The workers and models.
    pub fleet: Fleet,
    /// The pool's selector, for the question which pods there are; `None` without a pool.
    pub pod_labels: Option<String>,
    /// What owners are told.
    pub reports: Vec<Report>,
}

/// Looks at `objects`.
pub fn view(scope: &Scope, objects: &Objects) -> View {
    let mut view = View::default();
    let newer = objects.pool(Kind::PoolV1, &scope.pool);
    let older = objects.pool(Kind::PoolV1Alpha2, &scope.pool);
    let pool = newer.or(older);
    let policy = choose_policy(scope, objects, pool, &mut view.reports);
    if let Some(pool) = pool {
        view.pod_labels = Some(pool.label_query()).filter(|labels| !labels.is_empty());
        let found = members::find(scope, objects, pool, policy);
        view.fleet.members = found.members;
        let mut conditions = judge_pool(pool);
        conditions.extend(found.conditions);
        let kind = match pool.version {
            PoolVersion::V1 => Kind::PoolV1,
            PoolVersion::V1Alpha2 => Kind::PoolV1Alpha2,
        };
        view.reports.push(Report::new(kind, &pool.meta, conditions));
    }
    if let (Some(_), Some(unused)) = (newer, older) {
        let message = "a pool of this name in inference.networking.k8s.io/v1 is used instead";
        let condition = Condition::new("Accepted", false, "NotSupportedByParent", message);
        let report = Report::new(Kind::PoolV1Alpha2, &unused.meta, vec![condition]);
        view.reports.push(report);
    }
    models::read(scope, objects, pool.is_some(), &mut view);
    view
}

/// The judgements on a pool's own fields, in the words of the Gateway API Inference Extension.
fn judge_pool(pool: &Pool) -> Vec<Condition> {
    let accepted = if !pool.flaws.is_empty() {
        Condition::new("Accepted", false, "Invalid", flaws_text(&pool.flaws))
    } else if pool.is_h2c {
        let message = "spec.appProtocol is kubernetes.io/h2c; the pods are asked over HTTP/1.1, which must work too";
        Condition::new("Accepted", false, "UnsupportedProtocol", message)
    } else {
        Condition::new("Accepted", true, "Accepted", "the pool is served")
    };
    let resolved = if pool.has_fair_picker {
        Condition::new("ResolvedRefs", true, "ResolvedRefs", "")
    } else {
        let message =
            "the endpoint picker must be a Service with a name; the pool is served without it";
        Condition::new("ResolvedRefs", false, "InvalidExtensionRef", message)
    };
    vec![accepted, resolved]
}

/// The policy in force, and reports on all that could be.
fn choose_policy<'a>(
    scope: &Scope,
    objects: &'a Objects,
    pool: Option<&Pool>,
    reports: &mut Vec<Report>,
) -> Option<&'a TrafficPolicy> {
    let all = objects.of_kind(Kind::TrafficPolicy);
    let mut about: Vec<&TrafficPolicy> = all
        .filter_map(|object| match object {
            Object::Policy(policy) => Some(policy),
            _ => None,
        })
        .filter(|policy| {
            policy.pool.as_ref() == Some(&scope.pool)
                || policy.pool.is_none()
                || scope.policy.as_ref() == Some(&policy.meta.name)
        })
        .collect();
    about.sort_by_key(|policy| policy.meta.age());
    let fits = |policy: &&TrafficPolicy| {
        policy.pool.as_ref() == Some(&scope.pool)
            && scope
                .policy
                .as_ref()
                .is_none_or(|name| *name == policy.meta.name)
    };
    let chosen = about.iter().copied().find(fits);
    for policy in about {
        let is_chosen = chosen.is_some_and(|chosen| std::ptr::eq(chosen, policy));
        let conditions = judge_policy(scope, policy, pool, is_chosen);
        reports.push(Report::new(Kind::TrafficPolicy, &policy.meta, conditions));
    }
    chosen
}

fn judge_policy(
    scope: &Scope,
    policy: &TrafficPolicy,
    pool: Option<&Pool>,
    is_chosen: bool,
) -> Vec<Condition> {
    let refs_another = policy.pool.as_ref() != Some(&scope.pool);
    let accepted = if !policy.flaws.is_empty() {
        let has =
            |wanted: fn(&FlawKind) -> bool| policy.flaws.iter().any(|flaw| wanted(&flaw.kind));
        let reason = if has(|kind| matches!(kind, FlawKind::Unknown { .. })) {
            "UnknownField"
        } else if has(|kind| matches!(kind, FlawKind::Unsupported { .. })) {
            "Unsupported"
        } else {
            "Invalid"
        };
        let rest = if is_chosen {
            ". The other fields are in force"
        } else {
            ""
        };
        let message = format!("{}{rest}", flaws_text(&policy.flaws));
        Condition::new("Accepted", false, reason, message)
    } else if is_chosen {
        Condition::new("Accepted", true, "Accepted", "the policy is in force")
    } else if refs_another {
        let message = format!("it is about another pool than `{}`", scope.pool);
        Condition::new("Accepted", false, "TargetNotFound", message)
    } else {
        let message = "another policy for the same pool is in force: the older one, or the one the router was told";
        Condition::new("Accepted", false, "Conflicted", message)
    };
    let resolved = match (&policy.pool, pool) {
        (Some(name), None) if *name == scope.pool => {
            let message = format!("there is no InferencePool `{name}` in this namespace");
            Condition::new("ResolvedRefs", false, "PoolNotFound", message)
        }
        (None, _) => Condition::new(
            "ResolvedRefs",
            false,
            "PoolNotFound",
            "spec.poolRef.name is missing",
        ),
        _ => Condition::new("ResolvedRefs", true, "ResolvedRefs", ""),
    };
    vec![accepted, resolved]
}

/// Flaws as one message.
fn flaws_text(flaws: &[Flaw]) -> String {
    let named = flaws.iter().take(NAMED_MAX);
    let named: Vec<String> = named.map(Flaw::to_string).collect();
    let more = match flaws.len().saturating_sub(NAMED_MAX) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let mut text = format!("{}{more}", named.join("; "));
    if text.len() > MESSAGE_BYTES_MAX {
        let end = (0..=MESSAGE_BYTES_MAX).rev();
        let end = end.into_iter().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
    }
    text
}

#[cfg(test)]
mod tests;
