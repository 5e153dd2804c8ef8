//! Where workers come from.
//!
//! Every source (flags, a watched file, RBG's configuration, Kubernetes) publishes one whole [`Fleet`] after the other into
//! a [`tokio::sync::watch`] channel; the pool makes what it has equal to the latest one. Sources never touch the pool.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod file;
pub mod flags;
pub mod fleet_file;
pub mod kubernetes;
pub mod objects;
pub mod rbg;
pub mod role;
pub mod source;

use std::sync::Arc;

use crate::config::WorkerUrl;
use crate::pool::Role;

/// Most members of a fleet; more are left out, and the source says so.
pub const MEMBERS_MAX: usize = 4096;

/// The receiving end of a source.
pub type FleetWatch = tokio::sync::watch::Receiver<Arc<Fleet>>;

/// Everything a source knows now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fleet {
    /// The workers, in an order that is the same on every replica (by name).
    pub members: Vec<Member>,
    /// What is done with the models that clients ask for, each named once, in the order of their names.
    pub models: Vec<ModelRule>,
    /// What workers are asked for instead of any other model; empty: that model itself.
    pub other_models: Vec<ModelTarget>,
    /// Names that clients may give for a priority, each once, in their order.
    pub objectives: Vec<Objective>,
}

impl Fleet {
    /// The rule for a model, if it has one of its own.
    pub fn model(&self, name: &str) -> Option<&ModelRule> {
        let at = self
            .models
            .binary_search_by(|rule| rule.name.as_str().cmp(name));
        at.ok().map(|at| &self.models[at])
    }

    /// The priority that a name stands for.
    pub fn objective(&self, name: &str) -> Option<i32> {
        let objectives = &self.objectives;
        let at = objectives.binary_search_by(|objective| objective.name.as_str().cmp(name));
        at.ok().map(|at| objectives[at].priority)
    }
}

/// One worker, as its source describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Unique, and the same on every replica: the pod's name, else `host:port`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Where its HTTP server listens.
    pub url: WorkerUrl,
    /// The port of a prefill worker's bootstrap server, if the source knows it; else `/server_info` is asked.
    pub bootstrap_port: Option<u16>,
    /// The port that is assumed when `/server_info` does not tell either.
    pub bootstrap_port_assumed: Option<u16>,
    /// A prefill worker counts as ready only when its bootstrap server knows its ranks. Needs the port to be known, and open
    /// to the router.
    pub probes_bootstrap: bool,
    /// The port of its engines' telemetry stream on the same host (one listener per worker process).
    pub telemetry_port: Option<u16>,
    /// Rack or availability zone.
    pub zone: Option<String>,
    /// It is going away: what it holds may end, nothing new is sent.
    pub draining: bool,
}

/// What is done with requests for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelRule {
    /// The name that clients ask for.
    pub name: String,
    /// Requests of a lower one wait and are shed first; 0 is standard.
    pub priority: i32,
    /// What workers are asked for instead, chosen by weight; empty: the name itself.
    pub targets: Vec<ModelTarget>,
}

/// A model that workers serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelTarget {
    /// Its name on the workers.
    pub model: String,
    /// Its share among the targets of a rule; all zero means equal shares.
    pub weight: u32,
}

/// A name that clients may give instead of a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objective {
    /// The name.
    pub name: String,
    /// What it stands for; more is more important.
    pub priority: i32,
}
