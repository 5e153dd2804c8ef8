//! InferencePool, in the version of the Gateway API Inference Extension 1.0 and in the one before.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::{Fields, Flaw, FlawKind, Meta};

/// Most ports of a pool, as its API has it.
pub const PORTS_MAX: usize = 8;

/// Which API a pool was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PoolVersion {
    /// `inference.networking.k8s.io/v1`
    V1,
    /// `inference.networking.x-k8s.io/v1alpha2`
    V1Alpha2,
}

/// Which pods serve, and on which ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Name, labels and so on.
    pub meta: Meta,
    /// Its API.
    pub version: PoolVersion,
    /// Labels that its pods have.
    pub selector: BTreeMap<String, String>,
    /// Ports of every pod; each is a worker of its own.
    pub ports: Vec<u16>,
    /// Its pods speak HTTP/2 without TLS.
    pub is_h2c: bool,
    /// Its endpoint picker is of a kind that can be one. True without a reference.
    pub has_fair_picker: bool,
    /// What is wrong with it.
    pub flaws: Vec<Flaw>,
    /// Its status as it stands in the cluster.
    pub status: Json,
}

impl Pool {
    /// Reads a pool of `version`.
    pub fn read(object: &Json, version: PoolVersion) -> Self {
        let mut root = Fields::new("", object);
        let mut pool = Self {
            meta: Meta::read(object),
            version,
            selector: BTreeMap::new(),
            ports: Vec::new(),
            is_h2c: false,
            has_fair_picker: true,
            flaws: Vec::new(),
            status: object["status"].clone(),
        };
        if let Some(mut spec) = root.required_object("spec") {
            match version {
                PoolVersion::V1 => pool.read_v1(&mut spec),
                PoolVersion::V1Alpha2 => pool.read_v1alpha2(&mut spec),
            }
            root.close(spec);
        }
        pool.flaws = root.into_flaws();
        pool
    }

    fn read_v1(&mut self, spec: &mut Fields<'_>) {
        if let Some(mut selector) = spec.required_object("selector") {
            self.selector = selector.required_texts("matchLabels").unwrap_or_default();
            spec.close(selector);
        }
        let ports = spec.list("targetPorts");
        if ports.is_empty() {
            spec.flaw("targetPorts", FlawKind::Missing);
        }
        if ports.len() > PORTS_MAX {
            let (found, wanted) = (format!("{} ports", ports.len()), "at most 8 ports");
            spec.flaw("targetPorts", FlawKind::Invalid { found, wanted });
        }
        for (index, port) in ports.iter().take(PORTS_MAX).enumerate() {
            let mut port = Fields::new(format!("spec.targetPorts[{index}]"), port);
            let number = port.required_port("number");
            spec.close(port);
            self.ports
                .extend(number.filter(|number| !self.ports.contains(number)));
        }
        self.is_h2c = spec.text("appProtocol") == Some("kubernetes.io/h2c");
        self.read_picker(spec, "endpointPickerRef");
    }

    fn read_v1alpha2(&mut self, spec: &mut Fields<'_>) {
        self.selector = spec.required_texts("selector").unwrap_or_default();
        self.ports.extend(spec.required_port("targetPortNumber"));
        self.read_picker(spec, "extensionRef");
    }

    /// The picker may be missing, as in pools for which a gateway makes one itself.
    fn read_picker(&mut self, spec: &mut Fields<'_>, name: &'static str) {
        if let Some(mut picker) = spec.object(name) {
            let group = picker.value("group").and_then(Json::as_str);
            let kind = picker.text("kind").unwrap_or("Service");
            self.has_fair_picker = kind == "Service"
                && group.is_none_or(str::is_empty)
                && picker.text("name").is_some();
            spec.close(picker);
        }
    }

    /// Whether the labels of a pod are those of this pool. A pool without labels has no pods.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.selector.is_empty()
            && self
                .selector
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
    }

    /// The selector as the API takes it in a query.
    pub fn label_query(&self) -> String {
        let pairs = self.selector.iter();
        let pairs: Vec<String> = pairs.map(|(key, value)| format!("{key}={value}")).collect();
        pairs.join(",")
    }
}
