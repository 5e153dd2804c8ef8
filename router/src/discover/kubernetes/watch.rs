//! One kind of objects: listed, watched, listed again after every failure.
#![forbid(unsafe_code)]

use std::pin::pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Timing;
use crate::discover::objects::{Kind, Object};

/// Most objects of a kind; above it the rest is not looked at.
pub(super) const OBJECTS_MAX: usize = 20_000;

/// Longest life of a watch that the client agrees to, in seconds.
const WATCH_SECONDS_MAX: u32 = 290;

/// A watch that lived this long has recovered: the next failure is a first one.
const RECOVERED: Duration = Duration::from_secs(10);

/// News of one kind.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) kind: Kind,
    pub(super) turn: u64,
    pub(super) news: News,
}

#[derive(Debug)]
pub(super) enum News {
    /// These are all.
    All(Vec<Object>),
    /// This one is new or changed.
    Put(Box<Object>),
    /// This one is gone.
    Gone(String),
    /// The cluster does not know the kind, or does not let it be read.
    Unavailable,
}

/// How a watch ended.
enum End {
    /// It is time to list anew.
    Resync,
    /// The cluster does not know the kind.
    Absent,
    /// We may not read it.
    Forbidden,
    /// Anything else.
    Failed(String),
    /// Nobody wants news any more.
    Unheard,
}

pub(super) struct Watch {
    pub(super) client: Client,
    pub(super) namespace: String,
    pub(super) kind: Kind,
    pub(super) labels: Option<String>,
    pub(super) turn: u64,
    pub(super) timing: Timing,
    pub(super) changes: mpsc::Sender<Change>,
}

impl Watch {
    pub(super) async fn run(self) {
        let resource = api_resource(self.kind);
        let api: Api<DynamicObject> = if self.kind == Kind::Node {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
        };
        let seconds = self.timing.watch_timeout.as_secs();
        let seconds = u32::try_from(seconds)
            .unwrap_or(u32::MAX)
            .clamp(1, WATCH_SECONDS_MAX);
        let config = watcher::Config {
            label_selector: self.labels.clone(),
            ..watcher::Config::default().timeout(seconds)
        };
        let (mut failures, mut is_known_absent) = (0, false);
        loop {
            let begun = Instant::now();
            let end = self.follow(watcher(api.clone(), config.clone())).await;
            if begun.elapsed() > RECOVERED {
                failures = 0;
            }
            let pause = match end {
                End::Unheard => return,
                End::Resync => {
                    is_known_absent = false;
                    Duration::ZERO
                }
                End::Absent | End::Forbidden => {
                    if !std::mem::replace(&mut is_known_absent, true) {
                        self.explain(&end);
                    }
                    if !self.tell(News::Unavailable).await {
                        return;
                    }
                    self.timing.absent_retry
                }
                End::Failed(error) => {
                    let pause = pause_after(&self.timing, failures);
                    failures = failures.saturating_add(1);
                    let kind = self.kind;
                    tracing::warn!(%kind, error, ?pause, "the Kubernetes API failed; the last known state stays");
                    pause
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn explain(&self, end: &End) {
        let (kind, namespace) = (self.kind, &self.namespace);
        match end {
            End::Absent => {
                tracing::info!(%kind, "the cluster does not have this kind; asking again from time to time")
            }
            _ => tracing::error!(
                %kind,
                namespace,
                "reading this kind is forbidden: give the router's service account get, list and watch on it (deploy/rbac.yaml)"
            ),
        }
    }

    /// Lists and watches until something goes wrong or it is time to list anew.
    async fn follow(
        &self,
        events: impl Stream<Item = Result<watcher::Event<DynamicObject>, watcher::Error>>,
    ) -> End {
        let mut events = pin!(events);
        // Replicas started together should not list together for ever.
        let spread = 0.8 + 0.4 * rand::random::<f64>();
        let resync_at = Instant::now() + self.timing.resync.mul_f64(spread);
        let mut listing: Option<Vec<Object>> = Some(Vec::new());
        loop {
            let patience = match listing {
                Some(_) => self.timing.list_timeout,
                None => resync_at.saturating_duration_since(Instant::now()),
            };
            let Ok(event) = tokio::time::timeout(patience, events.next()).await else {
                return match listing {
                    Some(_) => End::Failed(format!("no answer to a list within {patience:?}")),
                    None => End::Resync,
                };
            };
            let news = match event {
                None => return End::Failed("the watch ended".to_owned()),
                Some(Err(error)) => return judged(&error),
                Some(Ok(watcher::Event::Init)) => {
                    listing = Some(Vec::new());
                    continue;
                }
                Some(Ok(watcher::Event::InitApply(object))) => {
                    let list = listing.get_or_insert_default();
                    if list.len() < OBJECTS_MAX {
                        list.extend(self.read(object));
                    }
                    continue;
                }
                Some(Ok(watcher::Event::InitDone)) => News::All(listing.take().unwrap_or_default()),
                Some(Ok(watcher::Event::Apply(object))) => match self.read(object) {
                    Some(object) => News::Put(Box::new(object)),
                    None => continue,
                },
                Some(Ok(watcher::Event::Delete(object))) => {
                    News::Gone(object.metadata.name.unwrap_or_default())
                }
            };
            if !self.tell(news).await {
                return End::Unheard;
            }
        }
    }

    fn read(&self, object: DynamicObject) -> Option<Object> {
        match serde_json::to_value(object) {
            Ok(json) => Some(Object::read(self.kind, &json)),
            Err(error) => {
                tracing::warn!(kind = %self.kind, %error, "an object cannot be read, leaving it out");
                None
            }
        }
    }

    /// False when nobody listens any more.
    async fn tell(&self, news: News) -> bool {
        let change = Change {
            kind: self.kind,
            turn: self.turn,
            news,
        };
        self.changes.send(change).await.is_ok()
    }
}

/// kube's name for a kind.
pub(super) fn api_resource(kind: Kind) -> ApiResource {
    let place = kind.place();
    let api_version = match place.group {
        "" => place.version.to_owned(),
        group => format!("{group}/{}", place.version),
    };
    ApiResource {
        group: place.group.to_owned(),
        version: place.version.to_owned(),
        api_version,
        kind: place.kind.to_owned(),
        plural: place.plural.to_owned(),
    }
}

fn judged(error: &watcher::Error) -> End {
    let (watcher::Error::InitialListFailed(inner)
    | watcher::Error::WatchStartFailed(inner)
    | watcher::Error::WatchFailed(inner)) = error
    else {
        return End::Failed(error.to_string());
    };
    match inner {
        kube::Error::Api(status) if status.code == 404 => End::Absent,
        kube::Error::Api(status) if status.code == 403 => End::Forbidden,
        _ => End::Failed(error.to_string()),
    }
}

/// Doubles with every failure, and is never the same for two replicas.
fn pause_after(timing: &Timing, failures: u32) -> Duration {
    let doubled = timing.retry_min.saturating_mul(1 << failures.min(16));
    doubled
        .min(timing.retry_max)
        .mul_f64(0.5 + rand::random::<f64>() / 2.0)
}
