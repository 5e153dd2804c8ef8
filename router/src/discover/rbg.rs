//! The `config.yaml` that RoleBasedGroup mounts into its pods: workers without access to the Kubernetes API.
//!
//! It lists what shall be there (`roles.<role>.instances[].address` with named ports), not what is ready: the probes of the
//! pool tell that.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Deserialize;

use super::file::{self, Mistake};
use super::role::{self, Named};
use super::{Fleet, Member};
use crate::pool::Role;

/// Ports that are assumed where the file names none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Of a worker's HTTP server.
    pub http: u16,
    /// Of a prefill worker's bootstrap server.
    pub bootstrap: Option<u16>,
    /// Whether bootstrap servers are asked if they know their ranks.
    pub probes_bootstrap: bool,
}

/// Names of the port of the HTTP server. RoleBasedGroup writes `-` as `_`.
const HTTP_NAMES: [&str; 4] = ["http", "api", "serving", "server"];

/// Names of the port of the bootstrap server.
const BOOTSTRAP_NAMES: [&str; 2] = ["bootstrap", "disaggregation_bootstrap"];

/// Names of the port of the telemetry stream.
const TELEMETRY_NAMES: [&str; 1] = ["telemetry"];

/// What RoleBasedGroup writes; what else it may write one day is of no interest.
#[derive(Debug, Deserialize)]
struct GroupFile {
    roles: BTreeMap<String, RoleEntry>,
}

#[derive(Debug, Deserialize)]
struct RoleEntry {
    #[serde(default)]
    instances: Vec<InstanceEntry>,
}

#[derive(Debug, Deserialize)]
struct InstanceEntry {
    address: String,
    #[serde(default)]
    ports: BTreeMap<String, u16>,
}

/// Reads the workers of a group.
///
/// # Errors
/// [`Mistake`] when it is no such file, or none of its roles is known.
pub fn read(text: &str, ports: Ports) -> Result<Fleet, Mistake> {
    let group: GroupFile = file::from_yaml(text)?;
    let mut members = Vec::new();
    let mut unknown = Vec::new();
    for (name, entry) in &group.roles {
        match role::named(name) {
            Named::Worker(role) => {
                for instance in &entry.instances {
                    members.push(member(role, instance, ports)?);
                }
            }
            Named::Bystander => {}
            Named::Unknown => unknown.push(name.as_str()),
        }
    }
    if members.is_empty() && !unknown.is_empty() {
        let what = format!(
            "none of the roles ({}) is known: name them prefill and decode",
            unknown.join(", ")
        );
        return Err(Mistake::new(what));
    }
    Ok(Fleet {
        members,
        ..Fleet::default()
    })
}

fn member(role: Role, instance: &InstanceEntry, ports: Ports) -> Result<Member, Mistake> {
    let port = |names: &[&str]| {
        let mut found = names.iter().filter_map(|name| instance.ports.get(*name));
        found.next().copied().filter(|port| *port != 0)
    };
    let (bootstrap, telemetry) = (port(&BOOTSTRAP_NAMES), port(&TELEMETRY_NAMES));
    let http = port(&HTTP_NAMES).or_else(|| {
        // A single port that is nothing else must be it.
        let mut rest = instance.ports.values().copied();
        let only = rest.next().filter(|_| rest.next().is_none());
        only.filter(|port| *port != 0 && Some(*port) != bootstrap && Some(*port) != telemetry)
    });
    let address = &instance.address;
    let url = format!("http://{address}:{}", http.unwrap_or(ports.http));
    let url: crate::config::WorkerUrl = url
        .parse()
        .map_err(|_| Mistake::new(format!("`{address}` is no host name")))?;
    let is_prefill = role == Role::Prefill;
    Ok(Member {
        name: url.authority().to_string(),
        role,
        url,
        bootstrap_port: bootstrap.filter(|_| is_prefill),
        bootstrap_port_assumed: ports.bootstrap.filter(|_| is_prefill),
        probes_bootstrap: ports.probes_bootstrap && is_prefill,
        telemetry_port: telemetry,
        zone: None,
        draining: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: Ports = Ports {
        http: 8000,
        bootstrap: Some(34000),
        probes_bootstrap: true,
    };

    #[test]
    fn the_file_of_a_group_becomes_a_fleet() {
        let text = "
group:
  name: sglang-pd
  roles: [decode, prefill, router]
  size: 3
roles:
  decode:
    instances:
    - address: sglang-pd-decode-0.s-sglang-pd-decode
      ports: {port9000: 9000}
    size: 1
  prefill:
    instances:
    - address: sglang-pd-prefill-0.s-sglang-pd-prefill
      ports: {http: 8100, bootstrap: 34001}
    - address: sglang-pd-prefill-1.s-sglang-pd-prefill
    size: 2
  router:
    instances:
    - address: sglang-pd-router-0.s-sglang-pd-router
    size: 1
";
        let fleet = read(text, PORTS).unwrap();
        let told: Vec<_> = fleet
            .members
            .iter()
            .map(|member| {
                (
                    member.url.to_string(),
                    member.bootstrap_port,
                    member.bootstrap_port_assumed,
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                (
                    "http://sglang-pd-decode-0.s-sglang-pd-decode:9000".to_owned(),
                    None,
                    None
                ),
                (
                    "http://sglang-pd-prefill-0.s-sglang-pd-prefill:8100".to_owned(),
                    Some(34001),
                    Some(34000)
                ),
                (
                    "http://sglang-pd-prefill-1.s-sglang-pd-prefill:8000".to_owned(),
                    None,
                    Some(34000)
                ),
            ]
        );
    }

    #[test]
    fn a_file_of_something_else_is_refused() {
        for (text, part) in [
            (
                "roles: {leader: {instances: [{address: a}]}}",
                "name them prefill",
            ),
            ("workers: []", "roles"),
            (
                "roles: {prefill: {instances: [{address: 'a b'}]}}",
                "no host name",
            ),
            (
                "roles: {prefill: {instances: [{address: a, ports: {http: 70000}}]}}",
                "",
            ),
        ] {
            let mistake = read(text, PORTS).unwrap_err();
            assert!(mistake.what.contains(part), "{mistake:?}");
        }
    }
}
