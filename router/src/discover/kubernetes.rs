//! Workers of a Kubernetes cluster: watches the objects, publishes what [`super::cluster`] makes of them, and writes their
//! status.
//!
//! When the API server is gone, the last fleet stays. Every list comes back whole from time to time, because a watch can
//! lose a deletion; so a pod that is gone cannot stay in the fleet for ever.
#![forbid(unsafe_code)]

mod status;
mod watch;
mod write;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::sync::{mpsc, watch as published};
use tokio::task::{AbortHandle, JoinSet};

use super::cluster::{self, Objects, Scope, View};
use super::objects::Kind;
use super::{Fleet, FleetWatch};
use watch::{Change, News};
use write::Writer;

/// Changes that wait to be looked at; a watch that runs ahead waits.
const CHANGES_MAX: usize = 1024;

/// How long things may take. The defaults suit a cluster; tests are in a hurry.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Every object is listed anew after this time, default 5 min.
    pub resync: Duration,
    /// A page of a list that takes longer has failed, default 30 s.
    pub list_timeout: Duration,
    /// The API server is asked to end a watch after this time, default 2 min, at most 290 s: a dead connection is noticed soon after it.
    pub watch_timeout: Duration,
    /// First pause after a failure, default 200 ms; it doubles.
    pub retry_min: Duration,
    /// Longest pause after failures, default 30 s.
    pub retry_max: Duration,
    /// Pause before asking again for a kind that the cluster does not know, default 1 min.
    pub absent_retry: Duration,
    /// Changes that come within this time are looked at together, default 20 ms.
    pub settle: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            resync: Duration::from_secs(300),
            list_timeout: Duration::from_secs(30),
            watch_timeout: Duration::from_secs(120),
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(30),
            absent_retry: Duration::from_secs(60),
            settle: Duration::from_millis(20),
        }
    }
}

/// What to watch, and whether to write.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What to look for.
    pub scope: Scope,
    /// Read the labels of nodes too. Needs a ClusterRole.
    pub reads_nodes: bool,
    /// Write status conditions and Events.
    pub writes: bool,
    /// The router's own Service: under this parent its judgements stand in the pool's status.
    pub service: String,
    /// How long things may take.
    pub timing: Timing,
}

/// Why a cluster cannot be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Neither a service account nor a kubeconfig is there.
    #[error(
        "no way to the Kubernetes API: run inside the cluster with a service account, or give --kubeconfig"
    )]
    Nowhere(#[source] kube::config::InferConfigError),
    /// The kubeconfig is unusable.
    #[error("the kubeconfig {path} is unusable")]
    Kubeconfig {
        /// Which file.
        path: String,
        /// What is wrong with it.
        source: kube::config::KubeconfigError,
    },
    /// The client cannot be made.
    #[error("cannot prepare connections to the Kubernetes API")]
    Client(#[source] kube::Error),
}

/// A client of the cluster that this process runs in, or that a kubeconfig names, and its default namespace.
///
/// # Errors
/// [`ConnectError`]. Whether the API server answers is not tried.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<(Client, String), ConnectError> {
    let mut config = match kubeconfig {
        None => kube::Config::infer().await.map_err(ConnectError::Nowhere)?,
        Some(path) => {
            let failed = |source| ConnectError::Kubeconfig {
                path: path.display().to_string(),
                source,
            };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            let options = KubeConfigOptions::default();
            kube::Config::from_custom_kubeconfig(file, &options)
                .await
                .map_err(failed)?
        }
    };
    // Each watch has its own pauses after failures.
    config.default_retry = false;
    let namespace = config.default_namespace.clone();
    let client = Client::try_from(config).map_err(ConnectError::Client)?;
    Ok((client, namespace))
}

/// Watches until the returned tasks are dropped.
pub fn start(client: Client, settings: Settings, tasks: &mut JoinSet<()>) -> FleetWatch {
    let (publish, fleet) = published::channel(Arc::new(Fleet::default()));
    let writer = Writer::new(client.clone(), &settings, tasks);
    tasks.spawn(async move {
        let (changes, inbox) = mpsc::channel(CHANGES_MAX);
        let mut source = Source {
            writer,
            client,
            settings,
            objects: Objects::default(),
            unlisted: BTreeSet::new(),
            pods: None,
            pods_turn: 0,
            has_pool: true,
            watches: JoinSet::new(),
            changes,
            publish,
        };
        source.run(inbox).await;
    });
    fleet
}

struct Source {
    client: Client,
    settings: Settings,
    writer: Writer,
    objects: Objects,
    /// Kinds of which nothing is known yet.
    unlisted: BTreeSet<Kind>,
    /// The watch for pods, and the labels it asks for.
    pods: Option<(String, AbortHandle)>,
    /// Tells its news from those of a watch for other labels.
    pods_turn: u64,
    has_pool: bool,
    watches: JoinSet<()>,
    changes: mpsc::Sender<Change>,
    publish: published::Sender<Arc<Fleet>>,
}

impl Source {
    async fn run(&mut self, mut inbox: mpsc::Receiver<Change>) {
        for kind in Kind::ALL {
            if kind != Kind::Pod && (kind != Kind::Node || self.settings.reads_nodes) {
                self.unlisted.insert(kind);
                self.begin(kind, None);
            }
        }
        // `changes` is ours, so the channel never closes.
        while let Some(change) = inbox.recv().await {
            self.take(change);
            let settled = tokio::time::sleep(self.settings.timing.settle);
            tokio::pin!(settled);
            loop {
                tokio::select! {
                    biased;
                    () = &mut settled => break,
                    Some(change) = inbox.recv() => self.take(change),
                }
            }
            self.look();
        }
    }

    fn begin(&mut self, kind: Kind, labels: Option<&str>) -> AbortHandle {
        let turn = if kind == Kind::Pod { self.pods_turn } else { 0 };
        let watch = watch::Watch {
            client: self.client.clone(),
            namespace: self.settings.scope.namespace.clone(),
            kind,
            labels: labels.map(str::to_owned),
            turn,
            timing: self.settings.timing,
            changes: self.changes.clone(),
        };
        self.watches.spawn(watch.run())
    }

    fn take(&mut self, change: Change) {
        let Change { kind, turn, news } = change;
        if kind == Kind::Pod && turn != self.pods_turn {
            return;
        }
        match news {
            News::All(objects) => {
                self.objects.replace(kind, objects);
                self.unlisted.remove(&kind);
            }
            News::Put(object) => self.objects.put(kind, *object),
            News::Gone(name) => self.objects.remove(kind, &name),
            // What was known of it stays.
            News::Unavailable => {
                self.unlisted.remove(&kind);
            }
        }
    }

    /// Publishes and writes what the objects mean now.
    fn look(&mut self) {
        while self.watches.try_join_next().is_some() {}
        let listed = |kind| !self.unlisted.contains(&kind);
        if !listed(Kind::PoolV1) || !listed(Kind::PoolV1Alpha2) {
            return;
        }
        let view = cluster::view(&self.settings.scope, &self.objects);
        self.follow_pods(&view);
        if !self.unlisted.is_empty() {
            return;
        }
        let before = Arc::clone(&self.publish.borrow());
        if *before != view.fleet {
            let (members, models) = (view.fleet.members.len(), view.fleet.models.len());
            tracing::info!(members, models, "the cluster's fleet changed");
            // Nobody listening is no mistake: the router may be about to end.
            self.publish.send_replace(Arc::new(view.fleet));
        }
        self.writer.write(&self.objects, view.reports);
    }

    /// Watches the pods of the pool there is.
    fn follow_pods(&mut self, view: &View) {
        let scope = &self.settings.scope;
        if self.has_pool != view.pod_labels.is_some() {
            self.has_pool = view.pod_labels.is_some();
            if !self.has_pool {
                let (namespace, pool) = (&scope.namespace, &scope.pool);
                tracing::warn!(
                    "there is no InferencePool {namespace}/{pool} with a selector: no workers; apply one, or mend --pool"
                );
            }
        }
        let labels = self.pods.as_ref().map(|(labels, _)| labels);
        if labels == view.pod_labels.as_ref() {
            return;
        }
        if let Some((_, watch)) = self.pods.take() {
            watch.abort();
        }
        self.pods_turn += 1;
        match &view.pod_labels {
            Some(labels) => {
                self.unlisted.insert(Kind::Pod);
                let watch = self.begin(Kind::Pod, Some(labels));
                self.pods = Some((labels.clone(), watch));
            }
            None => {
                self.unlisted.remove(&Kind::Pod);
                self.objects.replace(Kind::Pod, Vec::new());
            }
        }
    }
}
