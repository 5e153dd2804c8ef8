//! What the names of roles mean, in labels of pods, in RoleBasedGroups and in files.
#![forbid(unsafe_code)]

use crate::pool::Role;

/// What a name says about what something does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// It is a worker.
    Worker(Role),
    /// It belongs to the service, and serves no requests.
    Bystander,
    /// Nothing.
    Unknown,
}

/// What `name` says.
pub fn named(name: &str) -> Named {
    match name.to_ascii_lowercase().as_str() {
        "prefill" | "prefiller" | "p" => Named::Worker(Role::Prefill),
        "decode" | "decoder" | "d" => Named::Worker(Role::Decode),
        "worker" | "other" | "embedding" | "encoder" => Named::Worker(Role::Other),
        "router" | "gateway" | "scheduler" | "proxy" => Named::Bystander,
        _ => Named::Unknown,
    }
}
