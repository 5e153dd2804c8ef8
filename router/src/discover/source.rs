//! Which source of workers a router has.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinSet;

use super::file::{self, FileError};
use super::kubernetes::{self, ConnectError, Settings, Timing};
use super::{FleetWatch, cluster, flags, fleet_file, rbg};
use crate::config::Config;

/// Where workers come from.
#[derive(Clone, Debug, Default)]
pub enum Source {
    /// From the settings themselves.
    #[default]
    Flags,
    /// From a file in the router's own format.
    FleetFile {
        /// The file; TOML if its name ends in `.toml`, else YAML.
        path: PathBuf,
    },
    /// From the file that RoleBasedGroup mounts.
    RoleBasedGroup {
        /// The file.
        path: PathBuf,
        /// Ports that it does not name.
        ports: rbg::Ports,
    },
    /// From a cluster.
    Kubernetes(Box<KubernetesSource>),
}

/// A cluster and a pool in it.
#[derive(Clone, Debug)]
pub struct KubernetesSource {
    /// How to reach it; `None`: the service account of the pod, or the user's own kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of everything; `None`: the one of the pod or the kubeconfig.
    pub namespace: Option<String>,
    /// What to look for there. Its namespace is filled in.
    pub scope: cluster::Scope,
    /// Read the labels of nodes too.
    pub reads_nodes: bool,
    /// Write status conditions and Events.
    pub writes: bool,
    /// The router's own Service.
    pub service: String,
    /// Everything is listed anew after this time.
    pub resync: Duration,
}

/// Why a source cannot be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Its file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The cluster cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Follows `source` until `tasks` are dropped.
///
/// # Errors
/// [`SourceError`]
pub async fn follow(
    source: Source,
    config: &Config,
    tasks: &mut JoinSet<()>,
) -> Result<FleetWatch, SourceError> {
    match source {
        Source::Flags => Ok(flags::watch(config)),
        Source::FleetFile { path } => {
            let is_toml = path.extension().is_some_and(|end| end == "toml");
            let reader = Box::new(move |text: &str| fleet_file::read(text, is_toml));
            Ok(file::start(path, file::INTERVAL, reader, tasks)?)
        }
        Source::RoleBasedGroup { path, ports } => {
            let reader = Box::new(move |text: &str| rbg::read(text, ports));
            Ok(file::start(path, file::INTERVAL, reader, tasks)?)
        }
        Source::Kubernetes(source) => {
            let (client, here) = kubernetes::connect(source.kubeconfig.as_deref()).await?;
            let mut scope = source.scope;
            scope.namespace = source.namespace.unwrap_or(here);
            let settings = Settings {
                scope,
                reads_nodes: source.reads_nodes,
                writes: source.writes,
                service: source.service,
                timing: Timing {
                    resync: source.resync,
                    ..Timing::default()
                },
            };
            Ok(kubernetes::start(client, settings, tasks))
        }
    }
}
