//! Pods, as far as they are workers, and the nodes they run on.
#![forbid(unsafe_code)]

use std::net::IpAddr;

use serde_json::Value as Json;

use super::Meta;

/// Annotation with the port of a pod's HTTP server, for pods whose ports are allocated one by one.
pub const PORT_ANNOTATION: &str = "kvtransfer.io/port";

/// Annotation with the port of a prefill pod's bootstrap server.
pub const BOOTSTRAP_PORT_ANNOTATION: &str = "kvtransfer.io/bootstrap-port";

/// Annotation with the port of a pod's telemetry stream.
pub const TELEMETRY_PORT_ANNOTATION: &str = "kvtransfer.io/telemetry-port";

/// Index of a pod within a group of a LeaderWorkerSet; the leader has 0.
const LWS_INDEX_LABEL: &str = "leaderworkerset.sigs.k8s.io/worker-index";

/// `leader` or `worker` in a role that RoleBasedGroup spreads over several pods.
const RBG_COMPONENT_LABEL: &str = "rbg.workloads.x-k8s.io/component-name";

/// Index of a pod within an instance of such a role; the leader has 0.
const RBG_COMPONENT_INDEX_LABEL: &str = "rbg.workloads.x-k8s.io/component-index";

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Name, labels and so on.
    pub meta: Meta,
    /// Its address, once it has one.
    pub ip: Option<IpAddr>,
    /// Its condition Ready is true.
    pub is_ready: bool,
    /// All its containers have ended for good.
    pub is_over: bool,
    /// Where it runs.
    pub node: Option<String>,
}

impl Pod {
    /// Reads a pod. Nothing in it can be wrong in a way that its owner could mend.
    pub fn read(object: &Json) -> Self {
        let status = &object["status"];
        let conditions = status["conditions"].as_array().into_iter().flatten();
        let mut ready = conditions.filter(|condition| condition["type"] == "Ready");
        Self {
            meta: Meta::read(object),
            ip: status["podIP"].as_str().and_then(|ip| ip.parse().ok()),
            is_ready: ready.any(|condition| condition["status"] == "True"),
            is_over: matches!(status["phase"].as_str(), Some("Succeeded" | "Failed")),
            node: object["spec"]["nodeName"].as_str().map(str::to_owned),
        }
    }

    /// Whether it takes requests: of a worker that spans several pods only the leader has an HTTP server.
    pub fn is_leader(&self) -> bool {
        let label = |name: &str| self.meta.labels.get(name).map(String::as_str);
        if let Some(index) = label(LWS_INDEX_LABEL) {
            return index == "0";
        }
        match (label(RBG_COMPONENT_LABEL), label(RBG_COMPONENT_INDEX_LABEL)) {
            (Some("worker"), index) => index == Some("0"),
            _ => true,
        }
    }

    /// The port in an annotation.
    ///
    /// # Errors
    /// The text that is no port.
    pub fn port(&self, annotation: &str) -> Result<Option<u16>, &str> {
        match self.meta.annotations.get(annotation) {
            None => Ok(None),
            Some(text) => match text.trim().parse() {
                Ok(0) | Err(_) => Err(text),
                Ok(port) => Ok(Some(port)),
            },
        }
    }
}
