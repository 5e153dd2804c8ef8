//! The router's own file format: a fleet, in YAML or TOML.
#![forbid(unsafe_code)]

use serde::Deserialize;

use super::file::{self, Mistake};
use super::role::{self, Named};
use super::{Fleet, Member, ModelRule, ModelTarget, Objective};
use crate::pool::Role;

/// A fleet as it stands in a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FleetFile {
    #[serde(default)]
    workers: Vec<WorkerEntry>,
    #[serde(default)]
    models: Vec<ModelEntry>,
    #[serde(default)]
    other_models: Vec<TargetEntry>,
    #[serde(default)]
    objectives: Vec<ObjectiveEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkerEntry {
    role: String,
    url: String,
    name: Option<String>,
    bootstrap_port: Option<u16>,
    #[serde(default)]
    probes_bootstrap: bool,
    telemetry_port: Option<u16>,
    zone: Option<String>,
    #[serde(default)]
    draining: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelEntry {
    name: String,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    targets: Vec<TargetEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetEntry {
    model: String,
    #[serde(default)]
    weight: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectiveEntry {
    name: String,
    priority: i32,
}

/// Reads a fleet from YAML, or from TOML if `is_toml`.
///
/// # Errors
/// [`Mistake`], with the line where the syntax is at fault.
pub fn read(text: &str, is_toml: bool) -> Result<Fleet, Mistake> {
    let file: FleetFile = if is_toml {
        file::from_toml(text)?
    } else {
        file::from_yaml(text)?
    };
    let members = file.workers.into_iter().map(member);
    let models = file.models.into_iter().map(|model| ModelRule {
        name: model.name,
        priority: model.priority,
        targets: targets(model.targets),
    });
    let objectives = file.objectives.into_iter().map(|objective| Objective {
        name: objective.name,
        priority: objective.priority,
    });
    Ok(Fleet {
        members: members.collect::<Result<_, _>>()?,
        models: models.collect(),
        other_models: targets(file.other_models),
        objectives: objectives.collect(),
    })
}

fn member(entry: WorkerEntry) -> Result<Member, Mistake> {
    let url: crate::config::WorkerUrl = entry
        .url
        .parse()
        .map_err(|error: crate::config::ConfigError| Mistake::new(error.to_string()))?;
    let Named::Worker(role) = role::named(&entry.role) else {
        let what = format!(
            "`{}` is no role: write prefill, decode or other",
            entry.role
        );
        return Err(Mistake::new(what));
    };
    if entry.bootstrap_port == Some(0) || entry.telemetry_port == Some(0) {
        return Err(Mistake::new(format!(
            "a port of {url} is 0; leave it out if it is not known"
        )));
    }
    Ok(Member {
        name: entry.name.unwrap_or_else(|| url.authority().to_string()),
        role,
        url,
        bootstrap_port: entry.bootstrap_port.filter(|_| role == Role::Prefill),
        bootstrap_port_assumed: None,
        probes_bootstrap: entry.probes_bootstrap,
        telemetry_port: entry.telemetry_port,
        zone: entry.zone,
        draining: entry.draining,
    })
}

fn targets(entries: Vec<TargetEntry>) -> Vec<ModelTarget> {
    let targets = entries.into_iter().map(|target| ModelTarget {
        model: target.model,
        weight: target.weight,
    });
    targets.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_and_toml_say_the_same() {
        let yaml = "
workers:
  - {role: prefill, url: 'http://10.0.0.1:8000', bootstrap_port: 34000, zone: a}
  - {role: d, url: 'http://10.0.0.2:8000', name: two, telemetry_port: 9000, draining: true}
models:
  - name: m
    priority: -1
    targets: [{model: m-1, weight: 9}, {model: m-2, weight: 1}]
objectives: [{name: urgent, priority: 10}]
";
        let toml = r#"
objectives = [{name = "urgent", priority = 10}]
[[workers]]
role = "prefill"
url = "http://10.0.0.1:8000"
bootstrap_port = 34000
zone = "a"
[[workers]]
role = "decode"
url = "http://10.0.0.2:8000"
name = "two"
telemetry_port = 9000
draining = true
[[models]]
name = "m"
priority = -1
targets = [{model = "m-1", weight = 9}, {model = "m-2", weight = 1}]
"#;
        let fleet = read(yaml, false).unwrap();
        assert_eq!(fleet, read(toml, true).unwrap());
        assert_eq!(fleet.members[0].name, "10.0.0.1:8000");
        assert_eq!(fleet.members[0].bootstrap_port, Some(34000));
        assert!(fleet.members[1].draining && fleet.members[1].role == Role::Decode);
        assert_eq!(fleet.models[0].targets[0].weight, 9);
    }

    #[test]
    fn mistakes_name_their_line_and_the_cure() {
        for (text, is_toml, line, part) in [
            (
                "workers:\n  - role: prefill\n    port: 3\n",
                false,
                Some(3),
                "port",
            ),
            ("workers:\n  - {role: prefill\n", false, None, ""),
            (
                "[[workers]]\nrole = \"prefill\"\nurl = 3\n",
                true,
                Some(3),
                "string",
            ),
            (
                "workers: [{role: boss, url: 'http://a:1'}]",
                false,
                None,
                "write prefill, decode",
            ),
            (
                "workers: [{role: d, url: 'a:1'}]",
                false,
                None,
                "http://10.0.0.1:30000",
            ),
            (
                "workers: [{role: p, url: 'http://a:1', bootstrap_port: 0}]",
                false,
                None,
                "leave it out",
            ),
        ] {
            let mistake = read(text, is_toml).unwrap_err();
            assert!(mistake.what.contains(part), "{text}: {mistake:?}");
            if line.is_some() {
                assert_eq!(mistake.line, line, "{text}: {mistake:?}");
            }
        }
    }
}
