//! Which workers Envoy lets the picker choose, and where Envoy reaches them.
#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::exchange::ClientRequest;
use super::message::endpoints;
use crate::config::epp::EppConfig;
use crate::pool::{Role, Worker, Workers};
use crate::proxy::Front;

/// By which conformance tests choose a worker.
const CONFORMANCE_CHOICE: &str = "test-epp-endpoint-selection";

/// Which endpoints may be chosen: all, or those that are listed.
#[derive(Debug, Default)]
pub struct Choice(Option<Vec<String>>);

impl Choice {
    /// Whether it is limited at all.
    pub fn is_limited(&self) -> bool {
        self.0.is_some()
    }

    /// What `request` may meet.
    pub fn of(config: &EppConfig, request: &ClientRequest) -> Self {
        let asked = request.head.headers.get(CONFORMANCE_CHOICE);
        let asked = asked
            .filter(|_| config.conformance)
            .and_then(|list| list.to_str().ok())
            .map(endpoints)
            .filter(|list| !list.is_empty());
        Self(asked.or_else(|| request.subset.clone()))
    }

    /// The workers of `role` that may be chosen, by their endpoints.
    pub async fn of_role(&self, now: &Workers, role: Role) -> Vec<(Arc<Worker>, String)> {
        let mut found = Vec::new();
        for worker in now.of_role(role) {
            // A name that cannot be resolved now is no endpoint now.
            if let Some(endpoint) = endpoint_of(worker).await
                && self.holds(worker, &endpoint)
            {
                found.push((Arc::clone(worker), endpoint));
            }
        }
        found
    }

    /// The decode workers that may be chosen, by `host:port` of their URLs; `None` if all may.
    pub async fn decodes(&self, now: &Workers) -> Option<Vec<String>> {
        self.0.as_ref()?;
        let found = self.of_role(now, Role::Decode).await;
        let authority = |(worker, _): (Arc<Worker>, String)| worker.url().authority().to_string();
        Some(found.into_iter().map(authority).collect())
    }

    /// Whether `worker`, reached at `endpoint`, may be chosen.
    pub fn holds(&self, worker: &Worker, endpoint: &str) -> bool {
        let Some(list) = &self.0 else {
            return true;
        };
        let ip = endpoint.rsplit_once(':').map_or(endpoint, |(ip, _)| ip);
        list.iter()
            .any(|one| one == endpoint || one == ip || one == worker.url().authority().as_str())
    }
}

/// The worker that Envoy names by `endpoint`.
pub async fn worker_at(front: &Front, endpoint: &str) -> Option<Arc<Worker>> {
    let now = front.pool.now();
    for worker in now.of_role(Role::Decode) {
        if endpoint_of(worker).await.as_deref() == Some(endpoint) {
            return Some(Arc::clone(worker));
        }
    }
    None
}

/// Where Envoy reaches a worker: it wants an address, so names are looked up.
pub async fn endpoint_of(worker: &Worker) -> Option<String> {
    let url = worker.url();
    let port = url
        .authority()
        .port_u16()
        .unwrap_or(if url.is_tls() { 443 } else { 80 });
    let host = url.host().trim_start_matches('[').trim_end_matches(']');
    let address = match host.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port),
        Err(_) => tokio::net::lookup_host((host, port)).await.ok()?.next()?,
    };
    Some(address.to_string())
}
