//! Which pods are workers, and what they do.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use super::{NAMED_MAX, Objects, Scope};
use crate::discover::objects::pod::{
    BOOTSTRAP_PORT_ANNOTATION, PORT_ANNOTATION, Pod, TELEMETRY_PORT_ANNOTATION,
};
use crate::discover::objects::policy::TrafficPolicy;
use crate::discover::objects::pool::Pool;
use crate::discover::objects::{Condition, Kind, Meta, Object};
use crate::discover::role::{self, Named};
use crate::discover::{MEMBERS_MAX, Member};
use crate::pool::Role;

/// The pods of a pool.
pub(super) struct Found {
    /// Those that serve, by name.
    pub(super) members: Vec<Member>,
    /// What the pool's owner is told about them.
    pub(super) conditions: Vec<Condition>,
}

/// Texts for one message, of which some are named and all are counted.
#[derive(Default)]
struct Troubles {
    named: Vec<String>,
    count: usize,
}

impl Troubles {
    fn add(&mut self, text: String) {
        self.count += 1;
        if self.named.len() < NAMED_MAX {
            self.named.push(text);
        }
    }

    /// A condition that holds if there was no trouble.
    fn judge(self, kind: &'static str, reason: &'static str, advice: &str) -> Condition {
        if self.count == 0 {
            return Condition::new(kind, true, kind, "");
        }
        let more = match self.count - self.named.len() {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        let message = format!("{}{more}. {advice}", self.named.join("; "));
        Condition::new(kind, false, reason, message)
    }
}

/// The workers found so far, each address once.
#[derive(Default)]
struct Roster<'a> {
    members: Vec<(Member, &'a Meta)>,
    by_address: HashMap<(IpAddr, u16), usize>,
    unusable: Troubles,
}

impl<'a> Roster<'a> {
    fn add(&mut self, address: (IpAddr, u16), member: Member, meta: &'a Meta) {
        let name = &meta.name;
        match self.by_address.get(&address) {
            // An address is used again, or host ports collide: the pod that lives on and is younger has it now.
            Some(at) => {
                let (other, before) = &self.members[*at];
                if !member.draining && !other.draining {
                    let (ip, port) = address;
                    let text = format!("{name} and {} share {ip}:{port}", other.name);
                    self.unusable.add(text);
                }
                let rank = |member: &Member, meta: &Meta| {
                    (!member.draining, meta.created.clone(), meta.name.clone())
                };
                if rank(&member, meta) > rank(other, before) {
                    self.members[*at] = (member, meta);
                }
            }
            None if self.members.len() == MEMBERS_MAX => {
                let text = format!("{name} is one worker above the {MEMBERS_MAX} that are served");
                self.unusable.add(text);
            }
            None => {
                self.by_address.insert(address, self.members.len());
                self.members.push((member, meta));
            }
        }
    }
}

/// Looks at the pods of `pool`.
pub(super) fn find(
    scope: &Scope,
    objects: &Objects,
    pool: &Pool,
    policy: Option<&TrafficPolicy>,
) -> Found {
    let own = policy.and_then(|policy| policy.role_label.as_ref());
    let labels: Vec<&str> = own
        .into_iter()
        .chain(&scope.role_labels)
        .map(String::as_str)
        .collect();
    let (mut roleless, mut roster) = (Troubles::default(), Roster::default());
    for object in objects.of_kind(Kind::Pod) {
        let Object::Pod(pod) = object else {
            continue;
        };
        let name = &pod.meta.name;
        if !pool.selects(&pod.meta.labels) || pod.is_over || !pod.is_leader() {
            continue;
        }
        let role = match role_of(&pod.meta.labels, &labels) {
            Ok(Some(role)) => role,
            Ok(None) => continue,
            Err(found) => {
                roleless.add(format!("{name} has {found}"));
                continue;
            }
        };
        let Some(ip) = pod.ip.filter(|_| pod.is_ready || pod.meta.is_terminating) else {
            continue;
        };
        let all = match of_pod(scope, objects, pool, policy, pod, role, ip) {
            Ok(all) => all,
            Err((annotation, text)) => {
                roster.unusable.add(format!(
                    "{name} has `{text}` for a port in its annotation {annotation}"
                ));
                continue;
            }
        };
        for (port, member) in all {
            roster.add((ip, port), member, &pod.meta);
        }
    }
    let Roster {
        members, unusable, ..
    } = roster;
    let mut members: Vec<Member> = members.into_iter().map(|(member, _)| member).collect();
    members.sort_by(|a, b| a.name.cmp(&b.name));
    let advice = format!(
        "A pod needs one of the labels {} with the value prefill or decode",
        labels.join(", ")
    );
    let conditions = vec![
        roleless.judge("RolesRecognized", "RoleUnknown", &advice),
        unusable.judge("MembersUsable", "PodUnusable", "These pods get no requests"),
        judge_pairs(&members),
    ];
    Found {
        members,
        conditions,
    }
}

fn judge_pairs(members: &[Member]) -> Condition {
    let has = |role| {
        members
            .iter()
            .any(|member| member.role == role && !member.draining)
    };
    let (reason, message) = match (has(Role::Prefill), has(Role::Decode)) {
        (true, true) => return Condition::new("PairsAvailable", true, "PairsAvailable", ""),
        (false, true) => ("NoPrefill", "no prefill pod of the pool is Ready"),
        (true, false) => ("NoDecode", "no decode pod of the pool is Ready"),
        (false, false) => (
            "NoWorkers",
            "no prefill and no decode pod of the pool is Ready",
        ),
    };
    Condition::new("PairsAvailable", false, reason, message)
}

/// What the first of `keys` with a known value says; `None` for a pod that is no worker.
///
/// # Errors
/// What was found instead.
fn role_of(labels: &BTreeMap<String, String>, keys: &[&str]) -> Result<Option<Role>, String> {
    let mut unknown = None;
    for key in keys {
        let Some(value) = labels.get(*key) else {
            continue;
        };
        match role::named(value) {
            Named::Worker(role) => return Ok(Some(role)),
            Named::Bystander => return Ok(None),
            Named::Unknown => {
                unknown.get_or_insert_with(|| {
                    format!("the unknown role `{value}` in its label {key}")
                });
            }
        }
    }
    Err(unknown.unwrap_or_else(|| "no label that tells its role".to_owned()))
}

/// The workers of one pod, one for each port; or the annotation that is no port, and its text.
fn of_pod<'a>(
    scope: &Scope,
    objects: &Objects,
    pool: &Pool,
    policy: Option<&TrafficPolicy>,
    pod: &'a Pod,
    role: Role,
    ip: IpAddr,
) -> Result<Vec<(u16, Member)>, (&'static str, &'a str)> {
    let port_of = |name: &'static str| pod.port(name).map_err(|text| (name, text));
    let own_port = port_of(PORT_ANNOTATION)?;
    let bootstrap_port = port_of(BOOTSTRAP_PORT_ANNOTATION)?;
    let telemetry_port = port_of(TELEMETRY_PORT_ANNOTATION)?;
    let ports = own_port.map_or_else(|| pool.ports.clone(), |port| vec![port]);
    let is_prefill = role == Role::Prefill;
    let zone = zone_of(scope, objects, pod);
    let member = |port: u16| {
        let name = if ports.len() == 1 {
            pod.meta.name.clone()
        } else {
            format!("{}:{port}", pod.meta.name)
        };
        let url = format!("http://{}", std::net::SocketAddr::new(ip, port));
        let url = url
            .parse()
            .expect("invariant: a socket address is an authority");
        let member = Member {
            name,
            role,
            url,
            bootstrap_port: bootstrap_port.filter(|_| is_prefill),
            bootstrap_port_assumed: policy
                .and_then(|policy| policy.bootstrap_port)
                .filter(|_| is_prefill),
            probes_bootstrap: scope.probes_bootstrap && is_prefill,
            telemetry_port,
            zone: zone.clone(),
            draining: pod.meta.is_terminating,
        };
        (port, member)
    };
    Ok(ports.iter().copied().map(member).collect())
}

fn zone_of(scope: &Scope, objects: &Objects, pod: &Pod) -> Option<String> {
    let of = |meta: &Meta| {
        let mut found = scope
            .zone_labels
            .iter()
            .filter_map(|key| meta.labels.get(key));
        found.next().cloned()
    };
    of(&pod.meta).or_else(|| of(objects.find(Kind::Node, pod.node.as_ref()?)?.meta()))
}
