//! Asks a worker for `/v1/loads`: SGLang's queues and KV pool, by data-parallel rank.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::StatusCode;
use serde::Deserialize;
use tokio::time::Instant;

use crate::pool::{Role, Worker};
use crate::proxy::Front;
use crate::schedule::Sample;
use crate::schedule::sample::{KvPool, RankQueue};

/// This answer's number among a worker's sources of samples.
const SOURCE: u32 = 1;

const PATH: &str = "/v1/loads?include=core,disagg";

/// A worker that does not answer in this time is too busy to be asked.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Some hundred bytes per rank.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Servers that do not know the endpoint are asked again after this time: they may be updated in place.
const UNKNOWN_PAUSE: Duration = Duration::from_secs(60);

/// The fields of SGLang 0.5.23 (`srt/managers/load_snapshot.py`) that say something about waiting. Others are ignored, missing
/// ones unknown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RankLoad {
    dp_rank: u32,
    num_running_reqs: u64,
    num_waiting_reqs: u64,
    num_waiting_uncached_tokens: u64,
    num_used_tokens: u64,
    num_total_tokens: u64,
    max_total_num_tokens: u64,
    cache_hit_rate: f64,
    disaggregation: Disaggregation,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Disaggregation {
    decode_transfer_queue_reqs: u64,
    decode_prealloc_queue_reqs: u64,
}

#[derive(Debug, Deserialize)]
struct Loads {
    loads: Vec<RankLoad>,
}

/// Asks for as long as the worker is there and ready.
pub async fn poll(front: Arc<Front>, worker: Arc<Worker>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        if !worker.is_ready() {
            continue;
        }
        // What was dispatched after the question is not in the answer.
        let asked = Instant::now();
        match tokio::time::timeout(ANSWER_TIMEOUT, ask(&front, &worker)).await {
            Ok(Answer::Loads(loads)) => take_in(&front, &worker, asked, &loads),
            Ok(Answer::Unknown) => tokio::time::sleep(UNKNOWN_PAUSE).await,
            Ok(Answer::Nothing) | Err(_) => {
                tracing::debug!(name = worker.name(), "no answer to {PATH}");
            }
        }
    }
}

enum Answer {
    Loads(Vec<RankLoad>),
    /// The server has no such endpoint.
    Unknown,
    Nothing,
}

async fn ask(front: &Front, worker: &Worker) -> Answer {
    let Ok(response) = front.client.get(worker, PATH).await else {
        return Answer::Nothing;
    };
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    let Ok(body) = body.collect().await else {
        return Answer::Nothing;
    };
    if status == StatusCode::NOT_FOUND {
        return Answer::Unknown;
    }
    match serde_json::from_slice::<Loads>(&body.to_bytes()) {
        Ok(loads) if status.is_success() => Answer::Loads(loads.loads),
        _ => Answer::Nothing,
    }
}

fn take_in(front: &Front, worker: &Arc<Worker>, asked: Instant, loads: &[RankLoad]) {
    let picker = &front.picker;
    let Some(id) = picker.id_of(worker) else {
        return;
    };
    let page = worker
        .page_tokens()
        .unwrap_or(front.config.scheduling.nominal.page_tokens);
    let queues = queues(loads);
    let sample = Sample {
        worker: id,
        source: SOURCE,
        epoch: 0,
        sequence: u64::try_from(picker.now().as_nanos()).unwrap_or(u64::MAX),
        at: picker.time_of(asked),
        tells_rooms: false,
        links: None,
        queues: (worker.role() == Role::Prefill).then_some(&queues),
        pool: pool(loads, page).filter(|_| worker.role() == Role::Decode),
    };
    if let Err(error) = picker.ingest(&sample) {
        tracing::debug!(name = worker.name(), %error, "an answer to {PATH} was not taken in");
    }
}

/// What waits before each rank. A rank of which only the number of requests is known is left out: its bookings know more.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of a count is not negative and not more than the count"
)]
fn queues(loads: &[RankLoad]) -> Vec<RankQueue> {
    let of_rank = |load: &RankLoad| {
        // The first number leaves out what still waits for its decode, the second one counts what is cached too.
        let pending = load.num_total_tokens.saturating_sub(load.num_used_tokens);
        let missed = 1.0 - load.cache_hit_rate.clamp(0.0, 1.0);
        let tokens = ((pending as f64 * missed) as u64).max(load.num_waiting_uncached_tokens);
        let requests = load.num_waiting_reqs;
        (tokens > 0 || requests == 0).then_some(RankQueue {
            rank: load.dp_rank,
            tokens: if requests == 0 { 0 } else { tokens },
            requests,
        })
    };
    loads.iter().filter_map(of_rank).collect()
}

/// The KV pool over all ranks.
fn pool(loads: &[RankLoad], page_tokens: u64) -> Option<KvPool> {
    let sum = |of: fn(&RankLoad) -> u64| loads.iter().map(of).fold(0, u64::saturating_add);
    let tokens = sum(|load| load.max_total_num_tokens);
    let used = sum(|load| load.num_used_tokens);
    let page = page_tokens.max(1);
    (tokens > 0).then(|| KvPool {
        free_pages: tokens.saturating_sub(used) / page,
        pages: tokens / page,
        requests: sum(|load| {
            let moving = &load.disaggregation;
            load.num_running_reqs
                .saturating_add(moving.decode_transfer_queue_reqs)
                .saturating_add(moving.decode_prealloc_queue_reqs)
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sglangs_numbers_become_queues_and_pools() {
        let text = r#"{"timestamp":"x","loads":[
            {"dp_rank":0,"num_running_reqs":3,"num_waiting_reqs":2,"num_waiting_uncached_tokens":700,"num_used_tokens":1000,
             "num_total_tokens":2000,"max_total_num_tokens":4000,"cache_hit_rate":0.5,
             "disaggregation":{"mode":"decode","decode_transfer_queue_reqs":1}},
            {"dp_rank":1,"num_waiting_reqs":4,"max_total_num_tokens":4000},
            {"dp_rank":2,"max_total_num_tokens":4000,"novelty":[1]}]}"#;
        let loads = serde_json::from_str::<Loads>(text).unwrap().loads;
        let queue = |rank, tokens, requests| RankQueue {
            rank,
            tokens,
            requests,
        };
        assert_eq!(queues(&loads), [queue(0, 700, 2), queue(2, 0, 0)]);
        let whole = KvPool {
            free_pages: 687,
            pages: 750,
            requests: 4,
        };
        assert_eq!(pool(&loads, 16), Some(whole));
        assert_eq!(pool(&[RankLoad::default()], 16), None);
    }
}
