//! Workers named on the command line: a fleet that never changes.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Fleet, FleetWatch, Member};
use crate::config::{Config, WorkerUrl};
use crate::pool::Role;

/// The workers of a configuration.
pub fn fleet(config: &Config) -> Fleet {
    let member = |role, url: &WorkerUrl| Member {
        name: url.authority().to_string(),
        role,
        url: url.clone(),
        bootstrap_port: None,
        bootstrap_port_assumed: None,
        probes_bootstrap: false,
        telemetry_port: config.telemetry.port_of(url),
        zone: None,
        draining: false,
    };
    let prefills = config.prefills.iter().map(|target| Member {
        bootstrap_port: target.bootstrap_port,
        ..member(Role::Prefill, &target.url)
    });
    let decodes = config.decodes.iter().map(|url| member(Role::Decode, url));
    let others = config.others.iter().map(|url| member(Role::Other, url));
    Fleet {
        members: prefills.chain(decodes).chain(others).collect(),
        ..Fleet::default()
    }
}

/// Publishes them, once and for all.
pub fn watch(config: &Config) -> FleetWatch {
    // Whoever follows it sees the value that is there; that the sender is gone says that it is the last one.
    tokio::sync::watch::channel(Arc::new(fleet(config))).1
}
