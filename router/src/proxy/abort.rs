//! Tells workers to give up requests, off the request's own path.
//!
//! Closing a leg's connection is not enough: SGLang looks for a lost client only every few seconds, and a decode worker
//! whose prefill failed would wait for its KV cache until a timeout of minutes. So each cancelled leg also gets
//! `POST /abort_request {"rid": …}`, one per id because SGLang looks up a single one
//! (`TokenizerManager.abort_request`). A worker that does not know the id ignores the call.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::metrics::{Metrics, bump};
use crate::pool::Worker;
use crate::pool::client::WorkerClient;

/// Orders waiting to be carried out. Above it an order is dropped and counted: the closed connection still tells the
/// worker, only later.
pub const QUEUE_MAX: usize = 4096;

/// Orders carried out at one time, so that a dying worker full of requests cannot take all our sockets.
pub const CONCURRENT_MAX: usize = 64;

/// An abort that takes longer than this is given up.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// At shutdown, the time the remaining orders get.
pub const CLOSING_TIME: Duration = Duration::from_secs(2);

/// The answer to an abort is empty; more of it is not read.
const ANSWER_BYTES_MAX: usize = 16 << 10;

#[derive(Debug)]
struct Order {
    worker: Arc<Worker>,
    rids: Arc<[String]>,
}

/// Where orders go in.
#[derive(Clone, Debug)]
pub struct Aborts {
    orders: mpsc::Sender<Order>,
    metrics: Arc<Metrics>,
}

/// Where orders come out; run it on a task.
#[derive(Debug)]
pub struct AbortRunner {
    orders: mpsc::Receiver<Order>,
    client: WorkerClient,
}

impl Aborts {
    /// A queue and its runner.
    pub fn new(client: WorkerClient, metrics: Arc<Metrics>) -> (Self, AbortRunner) {
        let (sender, orders) = mpsc::channel(QUEUE_MAX);
        (
            Self {
                orders: sender,
                metrics,
            },
            AbortRunner { orders, client },
        )
    }

    /// Asks `worker` to give up the requests with these ids (raw JSON values). Never waits.
    pub fn submit(&self, worker: &Arc<Worker>, rids: &Arc<[String]>) {
        let order = Order {
            worker: Arc::clone(worker),
            rids: Arc::clone(rids),
        };
        if self.orders.try_send(order).is_err() {
            bump(&self.metrics.aborts_dropped);
        }
    }
}

impl AbortRunner {
    /// Carries out orders until `closing` resolves, then those that are left, for at most [`CLOSING_TIME`].
    pub async fn run(mut self, closing: impl Future<Output = ()>) {
        let mut calls = JoinSet::new();
        tokio::pin!(closing);
        loop {
            tokio::select! {
                () = &mut closing => break,
                order = self.orders.recv(), if calls.len() < CONCURRENT_MAX => match order {
                    Some(order) => { calls.spawn(carry_out(self.client.clone(), order)); }
                    None => break,
                },
                Some(_) = calls.join_next() => {}
            }
        }
        self.orders.close();
        let rest = async {
            while let Some(order) = self.orders.recv().await {
                if calls.len() >= CONCURRENT_MAX {
                    calls.join_next().await;
                }
                calls.spawn(carry_out(self.client.clone(), order));
            }
            while calls.join_next().await.is_some() {}
        };
        if tokio::time::timeout(CLOSING_TIME, rest).await.is_err() {
            tracing::warn!("some workers were not told to abort: they did not answer in time");
        }
    }
}

async fn carry_out(client: WorkerClient, order: Order) {
    for rid in order.rids.iter() {
        let call = async {
            let body = format!("{{\"rid\":{rid}}}");
            let response = client
                .post_json(&order.worker, "/abort_request", body)
                .await
                .ok()?;
            Limited::new(response.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await
                .ok()
        };
        if !matches!(tokio::time::timeout(CALL_TIMEOUT, call).await, Ok(Some(_))) {
            let url = order.worker.url();
            tracing::debug!(%url, rid, "the worker did not take the abort");
            // The others would only wait as long.
            return;
        }
    }
}
