//! Asks every worker again and again whether it is ready.
//!
//! `/ready` is preferred: SGLang's `/health` runs a token through the model, so a busy prefill worker fails it while it
//! is perfectly well. Servers without `/ready` (404) are asked for `/health`. A worker that has become ready is asked once
//! what it is (`/server_info`).
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::StatusCode;

use super::bootstrap_probe::BootstrapProbe;
use super::client::WorkerClient;
use super::{CacheFeed, Worker, WorkerInfo};
use crate::schedule::facts::RANKS_MAX;

/// A worker that does not answer a probe within this time has failed it.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// How many probes in a row must fail before a ready worker is left out: one slow answer is no outage.
pub const FAILURES_TO_UNREADY: u32 = 3;

/// Longest pause between probes of a worker that is not ready; a starting worker should be found soon.
const UNREADY_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// A probe's answer is a few bytes; more of it is not read.
const PROBE_BODY_BYTES_MAX: usize = 64 << 10;

/// Longest `/server_info` that is read: it lists every argument of the server, some tens of KiB.
const INFO_BYTES_MAX: usize = 1 << 20;

/// Blocks of more tokens are no statement about a real worker.
const BLOCK_TOKENS_MAX: u32 = 1 << 16;

/// The longest topic that fits a short frame of the subscription.
const TOPIC_BYTES_MAX: usize = 254;

/// Probes one worker until the task is dropped, and calls `on_news` when it is known for the first time, or has changed,
/// whether it is ready.
pub async fn watch(
    worker: Arc<Worker>,
    client: WorkerClient,
    interval: Duration,
    on_news: impl Fn(),
) {
    let mut failures = 0;
    let mut bootstrap = BootstrapProbe::default();
    loop {
        let probe = tokio::time::timeout(PROBE_TIMEOUT, is_ready(&worker, &client));
        failures = if probe.await.unwrap_or(false) {
            0
        } else {
            failures + 1
        };
        let ready = failures == 0 || (worker.is_ready() && failures < FAILURES_TO_UNREADY);
        // Asked before anybody else learns that the worker is ready, so that no request misses the answer.
        if ready && !worker.is_ready() {
            let _ = tokio::time::timeout(PROBE_TIMEOUT, describe(&worker, &client)).await;
        }
        let ready = ready && bootstrap.allows(&worker, &client).await;
        let was_known = worker.is_probed();
        let is_news = worker.mark_ready(ready);
        if is_news || !was_known {
            on_news();
        }
        if is_news {
            let (role, url) = (worker.role(), worker.url());
            if ready {
                tracing::info!(%role, %url, "worker is ready");
            } else {
                tracing::warn!(%role, %url, "worker failed {FAILURES_TO_UNREADY} probes, leaving it out");
            }
        }
        let pause = if ready {
            interval
        } else {
            interval.min(UNREADY_INTERVAL_MAX)
        };
        tokio::time::sleep(pause).await;
    }
}

async fn is_ready(worker: &Worker, client: &WorkerClient) -> bool {
    match status(worker, client, "/ready").await {
        Some(StatusCode::NOT_FOUND) => status(worker, client, "/health")
            .await
            .is_some_and(|status| status.is_success()),
        answer => answer.is_some_and(|status| status.is_success()),
    }
}

async fn status(worker: &Worker, client: &WorkerClient, path: &'static str) -> Option<StatusCode> {
    let response = client.get(worker, path).await.ok()?;
    let status = response.status();
    // Reading the answer to its end lets the connection serve again.
    let _ = Limited::new(response.into_body(), PROBE_BODY_BYTES_MAX)
        .collect()
        .await;
    Some(status)
}

/// Takes from `/server_info` what the configuration may have left open. Workers that do not tell keep the defaults.
async fn describe(worker: &Worker, client: &WorkerClient) -> Option<()> {
    let response = client.get(worker, "/server_info").await.ok()?;
    let body = Limited::new(response.into_body(), INFO_BYTES_MAX);
    let body = body.collect().await.ok()?.to_bytes();
    let info: serde_json::Value = serde_json::from_slice(&body).ok()?;
    let number = |name: &str| info.get(name)?.as_u64();
    worker.describe(&WorkerInfo {
        dp_size: number("dp_size"),
        bootstrap_port: number("disaggregation_bootstrap_port"),
        page_tokens: number("page_size"),
        kv_tokens: number("max_total_num_tokens"),
    });
    worker.publishes(info.get("kv_events").and_then(cache_feed));
    Some(())
}

/// Where the events of the prefix cache are published; none where it cannot be so.
fn cache_feed(told: &serde_json::Value) -> Option<CacheFeed> {
    let number = |name: &str| told.get(name)?.as_u64();
    let feed = CacheFeed {
        port: u16::try_from(number("endpoint_port_base")?).ok()?,
        ranks: u32::try_from(number("dp_size")?).ok()?,
        block_tokens: u32::try_from(number("block_size")?).ok()?,
        topic: told.get("topic")?.as_str()?.to_owned(),
    };
    let is_real = told.get("publisher")?.as_str()? == "zmq"
        && feed.port > 0
        && (1..=RANKS_MAX).contains(&feed.ranks)
        && (1..=BLOCK_TOKENS_MAX).contains(&feed.block_tokens)
        && feed.topic.len() <= TOPIC_BYTES_MAX;
    is_real.then_some(feed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn where_events_are_published_is_believed_within_bounds() {
        let told = json!({"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "kv",
                          "block_size": 64, "dp_size": 2, "replay_endpoint_port_base": 5570});
        let feed = CacheFeed {
            port: 5557,
            ranks: 2,
            block_tokens: 64,
            topic: "kv".to_owned(),
        };
        assert_eq!(cache_feed(&told), Some(feed));
        for (name, value) in [
            ("publisher", json!("null")),
            ("endpoint_port_base", json!(0)),
            ("endpoint_port_base", json!(70_000)),
            ("dp_size", json!(0)),
            ("dp_size", json!(65)),
            ("block_size", json!(0)),
            ("block_size", json!(1_u64 << 40)),
            ("topic", json!("x".repeat(300))),
            ("topic", json!(null)),
        ] {
            let mut other = told.clone();
            other[name] = value;
            assert_eq!(cache_feed(&other), None, "{other}");
        }
    }
}
