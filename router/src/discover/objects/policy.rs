//! Alibaba Cloud's InferenceTrafficPolicy, with the fields that its documentation shows and no others.
#![forbid(unsafe_code)]

use serde_json::Value as Json;

use super::{Fields, Flaw, FlawKind, Meta};

/// How the pods of a pool work together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficPolicy {
    /// Name, labels and so on.
    pub meta: Meta,
    /// The pool it is about.
    pub pool: Option<String>,
    /// Label of pods whose value says what they do.
    pub role_label: Option<String>,
    /// The `--disaggregation-bootstrap-port` of prefill pods that do not tell theirs.
    pub bootstrap_port: Option<u16>,
    /// What is wrong with it, unknown fields included.
    pub flaws: Vec<Flaw>,
    /// Its status as it stands in the cluster.
    pub status: Json,
}

impl TrafficPolicy {
    /// Reads a policy. A field that is wrong is reported and left out; the others count.
    pub fn read(object: &Json) -> Self {
        let mut root = Fields::new("", object);
        let mut policy = Self {
            meta: Meta::read(object),
            pool: None,
            role_label: None,
            bootstrap_port: None,
            flaws: Vec::new(),
            status: object["status"].clone(),
        };
        for name in ["apiVersion", "kind", "metadata", "status"] {
            let _known = root.value(name);
        }
        if let Some(mut spec) = root.required_object("spec") {
            policy.read_spec(&mut spec);
            root.close_strictly(spec);
        }
        root.refuse_unknown();
        policy.flaws = root.into_flaws();
        policy
    }

    fn read_spec(&mut self, spec: &mut Fields<'_>) {
        if let Some(mut pool) = spec.required_object("poolRef") {
            self.pool = pool.required_text("name").map(str::to_owned);
            spec.close_strictly(pool);
        }
        if spec
            .text("modelServerRuntime")
            .is_some_and(|runtime| runtime != "sglang")
        {
            let why = "this router serves `sglang`";
            spec.flaw("modelServerRuntime", FlawKind::Unsupported { why });
        }
        let Some(mut profile) = spec.required_object("profile") else {
            return;
        };
        if profile.value("single").is_some() {
            let why =
                "this router serves prefill/decode pairs; describe them under spec.profile.pd";
            profile.flaw("single", FlawKind::Unsupported { why });
        } else if profile.value("pd").is_none() {
            profile.flaw("pd", FlawKind::Missing);
        }
        if let Some(mut pd) = profile.object("pd") {
            self.role_label = pd.required_text("pdRoleLabelName").map(str::to_owned);
            if let Some(mut transfer) = pd.object("kvTransfer") {
                self.bootstrap_port = transfer.port("bootstrapPort");
                pd.close_strictly(transfer);
            }
            profile.close_strictly(pd);
        }
        spec.close_strictly(profile);
    }
}
