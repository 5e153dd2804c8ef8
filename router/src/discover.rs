//! Where workers come from.
//!
//! Every source (flags, a watched file, RBG's configuration, Kubernetes) publishes one whole [`Fleet`] after the other into
//! a [`tokio::sync::watch`] channel; the pool makes what it has equal to the latest one. Sources never touch the pool.
#![forbid(unsafe_code)]

pub mod flags;

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
    /// What is done with the models that clients ask for.
    pub models: Vec<ModelRule>,
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
