//! Writes status conditions and Events. Every replica writes the same, and only what is not there yet.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value as Json, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::status::{self, FIELD_MANAGER, Turn};
use super::{Settings, watch};
use crate::discover::cluster::{Objects, Report};
use crate::discover::objects::{Kind, Meta};

/// Statuses that wait to be written; more are dropped, and come again with the next change or list.
const ORDERS_MAX: usize = 256;

/// A write that takes longer has failed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the same report on an object is written within [`TRIES_WINDOW`]: enough for the races of replicas.
const TRIES_MAX: u32 = 8;

/// After this time the same report may be written again.
const TRIES_WINDOW: Duration = Duration::from_secs(600);

/// Longest message of an Event in bytes, as its API has it.
const EVENT_BYTES_MAX: usize = 1024;

/// Decides what to write, and hands it to the task that does.
#[derive(Debug)]
pub(super) struct Writer {
    orders: Option<mpsc::Sender<Order>>,
    service: String,
    /// What was ordered last for each object.
    ordered: BTreeMap<(Kind, String), Ordered>,
}

/// How often a report was ordered.
#[derive(Debug)]
struct Ordered {
    report: Report,
    since: Instant,
    tries: u32,
}

impl Ordered {
    /// Whether `report` may be ordered: a new one at once, the same one a few times. Otherwise two controllers that
    /// disagree about a condition would write for ever.
    fn allows(&mut self, report: &Report) -> bool {
        if self.report != *report || self.since.elapsed() > TRIES_WINDOW {
            *self = Self::new(report.clone());
        }
        self.tries += 1;
        self.tries <= TRIES_MAX
    }

    fn new(report: Report) -> Self {
        Self {
            report,
            since: Instant::now(),
            tries: 0,
        }
    }
}

/// One status to be written.
#[derive(Debug)]
struct Order {
    kind: Kind,
    meta: Meta,
    /// The merge patch of a pool's status, or the fields to apply.
    body: Json,
    is_apply: bool,
    turns: Vec<Turn>,
}

impl Writer {
    /// A writer whose orders one of `tasks` carries out.
    pub(super) fn new(client: Client, settings: &Settings, tasks: &mut JoinSet<()>) -> Self {
        let orders = settings.writes.then(|| {
            let (orders, inbox) = mpsc::channel(ORDERS_MAX);
            let scribe = Scribe {
                client,
                namespace: settings.scope.namespace.clone(),
                refused: BTreeSet::new(),
            };
            tasks.spawn(scribe.run(inbox));
            orders
        });
        Self {
            orders,
            service: settings.service.clone(),
            ordered: BTreeMap::new(),
        }
    }

    /// Orders what `reports` say and the objects do not.
    pub(super) fn write(&mut self, objects: &Objects, reports: Vec<Report>) {
        let Some(orders) = &self.orders else {
            return;
        };
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let mut reported = BTreeSet::new();
        for report in reports {
            let key = (report.kind, report.name.clone());
            reported.insert(key.clone());
            let Some(object) = objects.find(report.kind, &report.name) else {
                continue;
            };
            let Some(status) = object.status() else {
                continue;
            };
            let order = match report.kind {
                Kind::PoolV1 | Kind::PoolV1Alpha2 => {
                    let found = status::pool_parents(&report, status, &self.service, &now);
                    found.map(|(rewritten, parents)| (rewritten, parents, false))
                }
                _ => status::own_conditions(&report, status, &now).map(|rewritten| {
                    let conditions = json!({"conditions": rewritten.conditions});
                    (rewritten, conditions, true)
                }),
            };
            let Some((rewritten, status, is_apply)) = order else {
                continue;
            };
            let ordered = self.ordered.entry(key);
            let ordered = ordered.or_insert_with(|| Ordered::new(report.clone()));
            if !ordered.allows(&report) {
                continue;
            }
            let order = Order {
                kind: report.kind,
                meta: object.meta().clone(),
                body: status,
                is_apply,
                turns: rewritten.turns,
            };
            if orders.try_send(order).is_err() {
                tracing::debug!("too many statuses wait to be written, leaving one for later");
            }
        }
        self.ordered.retain(|key, _| reported.contains(key));
    }
}

struct Scribe {
    client: Client,
    namespace: String,
    /// Kinds whose status cannot be written, and were complained about.
    refused: BTreeSet<Kind>,
}

impl Scribe {
    async fn run(mut self, mut inbox: mpsc::Receiver<Order>) {
        while let Some(order) = inbox.recv().await {
            let written = tokio::time::timeout(WRITE_TIMEOUT, self.write_status(&order)).await;
            match written {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.complain(&order, &error),
                Err(_) => {
                    tracing::warn!(kind = %order.kind, name = order.meta.name, "writing a status took too long");
                }
            }
            for turn in &order.turns {
                // What holds from the start is no event.
                if turn.condition.holds && turn.held != Some(false) {
                    continue;
                }
                let told =
                    tokio::time::timeout(WRITE_TIMEOUT, self.write_event(&order, turn)).await;
                if let Ok(Err(error)) = told {
                    tracing::debug!(%error, "an Event could not be written");
                }
            }
        }
    }

    async fn write_status(&self, order: &Order) -> Result<(), kube::Error> {
        let resource = watch::api_resource(order.kind);
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
        let name = &order.meta.name;
        if order.is_apply {
            let body = json!({
                "apiVersion": resource.api_version,
                "kind": resource.kind,
                "metadata": {"name": name},
                "status": order.body,
            });
            let parameters = PatchParams::apply(FIELD_MANAGER).force();
            api.patch_status(name, &parameters, &Patch::Apply(body))
                .await?;
        } else {
            // With the version that was read: if anybody else wrote meanwhile, that news comes by the watch, and with it
            // the next try.
            let body = json!({
                "metadata": {"resourceVersion": order.meta.resource_version},
                "status": order.body,
            });
            let parameters = PatchParams {
                field_manager: Some(FIELD_MANAGER.to_owned()),
                ..PatchParams::default()
            };
            api.patch_status(name, &parameters, &Patch::Merge(body))
                .await?;
        }
        Ok(())
    }

    fn complain(&mut self, order: &Order, error: &kube::Error) {
        let (kind, name) = (order.kind, &order.meta.name);
        match error {
            kube::Error::Api(status) if status.code == 409 => {
                tracing::debug!(%kind, name, "somebody else wrote this status first");
            }
            kube::Error::Api(status) if matches!(status.code, 403..=405) => {
                if self.refused.insert(kind) {
                    tracing::warn!(
                        %kind,
                        name,
                        reason = status.message,
                        "its status cannot be written: allow `patch` on its status (deploy/rbac.yaml), or start with --kubernetes-read-only"
                    );
                }
            }
            error => tracing::warn!(%kind, name, %error, "a status could not be written"),
        }
    }

    /// The name of an Event follows from what it says, so that all replicas write one; a second time renews it.
    async fn write_event(&self, order: &Order, turn: &Turn) -> Result<(), kube::Error> {
        let resource = ApiResource {
            group: String::new(),
            version: "v1".to_owned(),
            api_version: "v1".to_owned(),
            kind: "Event".to_owned(),
            plural: "events".to_owned(),
        };
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
        let condition = &turn.condition;
        let mut hasher = DefaultHasher::new();
        (
            &order.meta.uid,
            condition.kind,
            condition.reason,
            &condition.message,
        )
            .hash(&mut hasher);
        let name = format!("{}.{:016x}", order.meta.name, hasher.finish());
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let about = watch::api_resource(order.kind);
        let mut message = format!("{}: {}", condition.kind, condition.message);
        if let Some(end) = (0..=EVENT_BYTES_MAX.min(message.len()))
            .rev()
            .find(|at| message.is_char_boundary(*at))
        {
            message.truncate(end);
        }
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": self.namespace},
            "involvedObject": {
                "apiVersion": about.api_version,
                "kind": about.kind,
                "namespace": self.namespace,
                "name": order.meta.name,
                "uid": order.meta.uid,
            },
            "type": if condition.holds { "Normal" } else { "Warning" },
            "reason": condition.reason,
            "message": message,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": status::CONTROLLER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        let event: DynamicObject =
            serde_json::from_value(event).expect("invariant: an Event is an object with metadata");
        match api.create(&PostParams::default(), &event).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let again = Patch::Merge(json!({"lastTimestamp": now}));
                api.patch(&name, &PatchParams::default(), &again).await?;
            }
            other => {
                other?;
            }
        }
        Ok(())
    }
}
