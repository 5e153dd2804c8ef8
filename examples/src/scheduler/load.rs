//! The numbers that `/v1/loads` reports, refreshed once per scheduler step.

use serde::Serialize;

/// Queue lengths and memory use at one moment. Names are those of SGLang 0.5.23 (`srt/managers/load_snapshot.py`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Load {
    /// Requests being computed.
    pub num_running_reqs: usize,
    /// Requests that wait, those in PD queues included except the prefill's inflight ones, as in SGLang.
    pub num_waiting_reqs: usize,
    /// Tokens whose pages are held by live requests.
    pub num_used_tokens: usize,
    /// Tokens of all live requests, prompts and outputs.
    pub num_total_tokens: usize,
    /// Tokens that the cache can hold.
    pub max_total_num_tokens: usize,
    /// Requests that may run at once.
    pub max_running_requests: usize,
    /// Waiting requests that need nothing but memory or a turn.
    pub queue_waiting: usize,
    /// Prefill: waiting for the decode to lend pages.
    pub prefill_bootstrap_queue_reqs: usize,
    /// Prefill: computed, bytes still moving.
    pub prefill_inflight_queue_reqs: usize,
    /// Decode: waiting for memory or the handshake.
    pub decode_prealloc_queue_reqs: usize,
    /// Decode: pages lent, bytes moving.
    pub decode_transfer_queue_reqs: usize,
    /// Prefill: speed of the last finished transfer.
    pub kv_transfer_speed_gb_s: f64,
    /// Prefill: first push to confirmation of the last finished transfer.
    pub kv_transfer_latency_ms: f64,
    /// Cached tokens among all prompt tokens so far.
    pub cache_hit_rate: f64,
    /// Tokens generated so far.
    pub generated_tokens: u64,
}
