//! Where workers come from, if not from `--prefill` and `--decode`.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::ConfigError;
use super::command_line::parse_time;
use crate::discover::cluster::Scope;
use crate::discover::rbg;
use crate::discover::source::{KubernetesSource, Source};

/// Options that name a source of workers. With one of them, `--prefill`, `--decode` and `--worker` are not given.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sources of workers")]
pub struct SourceArguments {
    /// Find workers in the Kubernetes cluster that this runs in, or that the kubeconfig names.
    #[arg(long, requires = "pool", conflicts_with_all = ["fleet_file", "rbg_config", "prefill", "decode", "worker"])]
    pub kubernetes: bool,
    /// The InferencePool: NAME in the own namespace, or NAMESPACE/NAME.
    #[arg(long, value_name = "NAMESPACE/NAME", requires = "kubernetes")]
    pub pool: Option<String>,
    /// The InferenceTrafficPolicy [default: the oldest one that refers to the pool].
    #[arg(long, value_name = "NAME", requires = "kubernetes")]
    pub policy_name: Option<String>,
    /// How to reach the cluster [default: the pod's service account, then $KUBECONFIG or ~/.kube/config].
    #[arg(long, value_name = "FILE", requires = "kubernetes")]
    pub kubeconfig: Option<PathBuf>,
    /// A label whose value is a pod's role, besides the policy's and RoleBasedGroup's; repeat for more.
    #[arg(long, value_name = "LABEL", requires = "kubernetes")]
    pub role_label: Vec<String>,
    /// A label that tells where a pod is, instead of topology.kubernetes.io/zone; repeat for more, the first found counts.
    #[arg(long, value_name = "LABEL", requires = "kubernetes")]
    pub zone_label: Vec<String>,
    /// Read the zones of nodes too, for pods that do not carry theirs. Needs a ClusterRole.
    #[arg(long, requires = "kubernetes")]
    pub node_zones: bool,
    /// Write no status conditions and no Events.
    #[arg(long, requires = "kubernetes")]
    pub kubernetes_read_only: bool,
    /// The router's own Service, as which it appears in the status of the pool.
    #[arg(long, value_name = "NAME", default_value = "kvrouter")]
    pub service_name: String,
    /// List all objects anew after this time: what a broken watch lost is found then at the latest.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_time)]
    pub kubernetes_resync: Duration,
    /// Find workers in this file (YAML, or TOML if its name ends in .toml); changes are noticed within seconds.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rbg_config", "prefill", "decode", "worker"])]
    pub fleet_file: Option<PathBuf>,
    /// Find workers in the config.yaml that RoleBasedGroup mounts into its pods.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prefill", "decode", "worker"])]
    pub rbg_config: Option<PathBuf>,
    /// HTTP port of workers for which --rbg-config names none.
    #[arg(long, value_name = "PORT", default_value_t = 8000, value_parser = clap::value_parser!(u16).range(1..))]
    pub worker_port: u16,
    /// Bootstrap port of prefill workers for which neither --rbg-config nor their /server_info tells one.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub worker_bootstrap_port: Option<u16>,
    /// Do not ask the bootstrap servers of prefill workers whether they know their ranks (--kubernetes, --rbg-config): for
    /// networks in which only workers reach them.
    #[arg(long)]
    pub skip_bootstrap_probe: bool,
}

impl SourceArguments {
    /// The source that the options name.
    ///
    /// # Errors
    /// [`ConfigError`] when a name cannot be one.
    pub fn source(self) -> Result<Source, ConfigError> {
        if let Some(path) = self.fleet_file {
            return Ok(Source::FleetFile { path });
        }
        if let Some(path) = self.rbg_config {
            let ports = rbg::Ports {
                http: self.worker_port,
                bootstrap: self.worker_bootstrap_port,
                probes_bootstrap: !self.skip_bootstrap_probe,
            };
            return Ok(Source::RoleBasedGroup { path, ports });
        }
        let Some(pool) = self.pool.filter(|_| self.kubernetes) else {
            return Ok(Source::Flags);
        };
        let (namespace, name) = match pool.split_once('/') {
            Some((namespace, name)) => (Some(namespace.to_owned()), name),
            None => (None, pool.as_str()),
        };
        let is_name = |text: &str| {
            let fits = |byte: u8| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte)
            };
            !text.is_empty() && text.len() <= 253 && text.bytes().all(fits)
        };
        if !is_name(name) || !namespace.as_deref().is_none_or(is_name) {
            return Err(ConfigError::PoolName { text: pool });
        }
        let mut scope = Scope::new(String::new(), name);
        scope.policy = self.policy_name;
        scope.probes_bootstrap = !self.skip_bootstrap_probe;
        scope.role_labels.splice(0..0, self.role_label);
        if !self.zone_label.is_empty() {
            scope.zone_labels = self.zone_label;
        }
        Ok(Source::Kubernetes(Box::new(KubernetesSource {
            kubeconfig: self.kubeconfig,
            namespace,
            scope,
            reads_nodes: self.node_zones,
            writes: !self.kubernetes_read_only,
            service: self.service_name,
            resync: self.kubernetes_resync,
        })))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::CommandLine;
    use crate::discover::source::Source;

    fn parse(line: &str) -> Result<Source, String> {
        CommandLine::from_args(line.split_whitespace())
            .map(|line| line.source)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn each_source_has_its_options() {
        let line = "kvrouter --kubernetes --pool prod/qwen --policy-name p --role-label my/role --zone-label rack --node-zones \
                    --kubernetes-resync 90s --kubernetes-read-only --skip-bootstrap-probe";
        let Ok(Source::Kubernetes(source)) = parse(line) else {
            panic!("{line}");
        };
        let scope = &source.scope;
        assert_eq!(
            (source.namespace.as_deref(), scope.pool.as_str()),
            (Some("prod"), "qwen")
        );
        assert_eq!(
            (scope.role_labels.len(), scope.role_labels[0].as_str()),
            (3, "my/role")
        );
        assert_eq!(scope.zone_labels, ["rack"]);
        assert!(source.reads_nodes && !source.writes && !scope.probes_bootstrap);
        assert_eq!(source.resync.as_secs(), 90);
        let file = parse("kvrouter --fleet-file a.yaml");
        assert!(matches!(file, Ok(Source::FleetFile { .. })));
        let group = parse("kvrouter --rbg-config c.yaml --worker-port 8100");
        assert!(matches!(group, Ok(Source::RoleBasedGroup { ports, .. }) if ports.http == 8100));
        let flags = parse("kvrouter --prefill http://a:1 --decode http://b:1");
        assert!(matches!(flags, Ok(Source::Flags)));
    }

    #[test]
    fn sources_do_not_mix() {
        for (line, part) in [
            ("kvrouter --kubernetes", "--pool"),
            (
                "kvrouter --pool a --prefill http://a:1 --decode http://b:1",
                "--kubernetes",
            ),
            (
                "kvrouter --kubernetes --pool a --decode http://b:1",
                "cannot be used with",
            ),
            (
                "kvrouter --fleet-file a --rbg-config b",
                "cannot be used with",
            ),
            ("kvrouter --kubernetes --pool a/b/c", "NAMESPACE/NAME"),
            ("kvrouter --kubernetes --pool /b", "NAMESPACE/NAME"),
            ("kvrouter --rbg-config a --worker-port 0", "0"),
            ("kvrouter", "--prefill"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
