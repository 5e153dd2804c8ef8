//! What operators and routers ask: health, identity, load, aborts.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use kvtransfer::telemetry::prometheus;
use serde::Deserialize;
use serde_json::{Value, json};

use super::App;
use super::intake::parse;
use super::refusal::Refusal;
use crate::clock::{iso_time, unix_seconds};
use crate::scheduler::load::Load;
use crate::scheduler::mailbox::Target;

/// `/health`: whether requests are taken. Cheap on purpose: it says nothing of the queue's length.
pub(super) async fn health(State(app): State<Arc<App>>) -> StatusCode {
    if app.mailbox().is_open() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// `/ready`: as `/health`, and whether decodes can find this worker.
pub(super) async fn ready(State(app): State<Arc<App>>) -> (StatusCode, String) {
    let standing = app.watch.as_ref().map_or(Ok(()), |watch| watch.standing());
    match standing {
        Ok(()) => (health(State(app)).await, String::new()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason),
    }
}

/// `/metrics`: the engines' Prometheus page; 404 without engines.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    match &app.watch {
        Some(watch) => {
            ([(CONTENT_TYPE, prometheus::CONTENT_TYPE)], watch.metrics()).into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

#[derive(Deserialize)]
pub(super) struct TransfersQuery {
    #[serde(default)]
    after: u64,
}

/// `/debug/transfers?after=SERIAL`: the last ended rooms, oldest first.
pub(super) async fn transfers(
    State(app): State<Arc<App>>,
    Query(query): Query<TransfersQuery>,
) -> Json<Value> {
    let none = || json!({ "last_serial": 0, "transfers": [] });
    Json(
        app.watch
            .as_ref()
            .map_or_else(none, |watch| watch.transfers(query.after)),
    )
}

/// `/v1/models`.
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [{
        "id": app.facts.model, "object": "model", "created": app.started, "owned_by": "kvworker",
        "root": app.facts.model, "parent": null, "max_model_len": app.facts.sequence_max,
    }]}))
}

/// `/model_info`.
pub(super) async fn model_info(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({
        "model_path": app.facts.model,
        "tokenizer_path": app.facts.model,
        "is_generation": true,
        "disaggregation_mode": app.facts.mode.name(),
        "weight_version": format!("seed-{}", app.facts.seed),
    }))
}

/// `/server_info`: the resolved settings, by SGLang's names.
pub(super) async fn server_info(State(app): State<Arc<App>>) -> Json<Value> {
    let facts = &app.facts;
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model_path": facts.model,
        "served_model_name": facts.model,
        "disaggregation_mode": facts.mode.name(),
        "disaggregation_bootstrap_port": facts.bootstrap_port,
        "tp_size": facts.tp,
        "dp_size": 1,
        "pp_size": 1,
        "page_size": facts.page_size,
        "chunked_prefill_size": facts.chunk_tokens,
        "max_total_num_tokens": facts.cache_tokens,
        "max_running_requests": facts.running_max,
        "max_queued_requests": facts.live_max,
        "context_length": facts.sequence_max,
        "kv_cache_dtype": "float32",
        "load_balance_method": "follow_bootstrap_room",
        "random_seed": facts.seed,
        "kvtransfer": app.watch.as_ref().map(|watch| watch.server_info()),
        "status": if app.mailbox().is_open() { "ready" } else { "stopping" },
    }))
}

#[derive(Deserialize)]
pub(super) struct LoadsQuery {
    include: Option<String>,
    dp_rank: Option<u32>,
}

/// The sections that SGLang knows; those that this worker has nothing for stay absent.
const SECTIONS: [&str; 7] = ["core", "memory", "spec", "lora", "disagg", "queues", "all"];

/// `/v1/loads`, as SGLang 0.5.23 reports them (`srt/entrypoints/v1_loads.py`).
pub(super) async fn loads(
    State(app): State<Arc<App>>,
    Query(query): Query<LoadsQuery>,
) -> Result<Json<Value>, Refusal> {
    let include: BTreeSet<&str> = query
        .include
        .as_deref()
        .unwrap_or("all")
        .split(',')
        .map(str::trim)
        .collect();
    if let Some(unknown) = include.iter().find(|s| !SECTIONS.contains(s)) {
        let message = format!("Invalid include section {unknown:?}. Valid options: {SECTIONS:?}");
        return Err(Refusal::bad_request(message));
    }
    if query.dp_rank.is_some_and(|rank| rank != 0) {
        return Err(Refusal::bad_request(
            "dp_rank must be 0: this worker has one",
        ));
    }
    let wants = |section: &str| include.contains("all") || include.contains(section);
    let load = app.scheduler.load();
    let mut rank = core(&load);
    if wants("disagg") {
        rank["disaggregation"] = disaggregation(&load, app.facts.mode.name());
    }
    if wants("queues") {
        rank["queues"] =
            json!({ "waiting": load.queue_waiting, "grammar": 0, "paused": 0, "retracted": 0 });
    }
    Ok(Json(json!({
        "timestamp": iso_time(unix_seconds()),
        "version": env!("CARGO_PKG_VERSION"),
        "accelerator": "cpu",
        "num_accelerators": app.facts.tp,
        "loads": [rank],
    })))
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn core(load: &Load) -> Value {
    json!({
        "timestamp": unix_seconds(),
        "dp_rank": 0,
        "num_running_reqs": load.num_running_reqs,
        "num_waiting_reqs": load.num_waiting_reqs,
        "num_used_tokens": load.num_used_tokens,
        "num_total_tokens": load.num_total_tokens,
        "max_total_num_tokens": load.max_total_num_tokens,
        "max_running_requests": load.max_running_requests,
        "token_usage": load.num_used_tokens as f64 / load.max_total_num_tokens.max(1) as f64,
        "cache_hit_rate": load.cache_hit_rate,
    })
}

fn disaggregation(load: &Load, mode: &str) -> Value {
    json!({
        "mode": mode,
        "prefill_bootstrap_queue_reqs": load.prefill_bootstrap_queue_reqs,
        "prefill_inflight_queue_reqs": load.prefill_inflight_queue_reqs,
        "decode_prealloc_queue_reqs": load.decode_prealloc_queue_reqs,
        "decode_transfer_queue_reqs": load.decode_transfer_queue_reqs,
        "decode_retracted_queue_reqs": 0,
        "kv_transfer_speed_gb_s": load.kv_transfer_speed_gb_s,
        "kv_transfer_latency_ms": load.kv_transfer_latency_ms,
    })
}

#[derive(Deserialize)]
struct AbortBody {
    rid: Option<String>,
    #[serde(default)]
    abort_all: bool,
}

/// `/abort_request`: 200 whether or not the request exists, as in SGLang.
pub(super) async fn abort(State(app): State<Arc<App>>, body: Bytes) -> Result<StatusCode, Refusal> {
    let body: AbortBody = parse(&body)?;
    let target = match body {
        AbortBody {
            abort_all: true, ..
        } => Target::All,
        AbortBody { rid: Some(rid), .. } if !rid.is_empty() => Target::Request(rid),
        AbortBody { .. } => return Err(Refusal::bad_request("rid or abort_all is required")),
    };
    app.mailbox().abort(target);
    Ok(StatusCode::OK)
}
