//! What is sent to and read from a bootstrap registry.

use serde::{Deserialize, Serialize};

use crate::bootstrap::ranks::PrefillShape;

/// The row a prefill rank registers; field names are SGLang's (`register_to_bootstrap`).
#[derive(Clone, Debug, Serialize)]
#[expect(
    missing_docs,
    reason = "the names are SGLang's, and `bootstrap::Row` explains them"
)]
pub struct RankRow {
    pub attn_tp_size: u32,
    pub attn_tp_rank: u32,
    pub attn_cp_size: u32,
    pub attn_cp_rank: u32,
    pub attn_dp_size: u32,
    pub attn_dp_rank: u32,
    pub pp_size: u32,
    pub pp_rank: u32,
    pub system_dp_size: u32,
    pub system_dp_rank: u32,
    pub rank_ip: String,
    pub rank_port: u16,
    pub page_size: u32,
    pub kv_cache_dtype: Option<String>,
    pub kv_layout: Option<String>,
    pub dsv41_spec_layout: Option<serde_json::Value>,
    pub load_balance_method: String,
    pub enable_dsa_cache_layer_split: bool,
    pub enable_kv_cache_sharding: bool,
    pub prefill_http_port: Option<u16>,
    pub decode_allocation_policy: String,
}

/// What the registry says of a prefill instance.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[expect(
    missing_docs,
    reason = "the names are SGLang's, and `bootstrap::Row` explains them"
)]
pub struct ServerInfo {
    pub attn_tp_size: u32,
    pub attn_cp_size: u32,
    pub dp_size: u32,
    pub pp_size: u32,
    pub page_size: Option<u64>,
    pub kv_cache_dtype: Option<String>,
    pub follow_bootstrap_room: bool,
    #[serde(default)]
    pub enable_dsa_cache_layer_split: bool,
    pub dsv41_spec_layout: Option<serde_json::Value>,
    pub kv_layout: Option<String>,
    pub decode_allocation_policy: Option<String>,
    #[serde(default)]
    pub enable_kv_cache_sharding: bool,
    pub prefill_http_port: Option<u16>,
}

impl ServerInfo {
    /// The part the rank mapping needs.
    #[must_use]
    pub fn shape(&self) -> PrefillShape {
        PrefillShape {
            attn_tp_size: self.attn_tp_size,
            attn_cp_size: self.attn_cp_size,
            dp_size: self.dp_size,
            pp_size: self.pp_size,
            follow_bootstrap_room: self.follow_bootstrap_room,
            enable_dsa_cache_layer_split: self.enable_dsa_cache_layer_split,
            enable_kv_cache_sharding: self.enable_kv_cache_sharding,
        }
    }
}

/// Where one prefill rank listens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RankAddress {
    /// Its address.
    pub rank_ip: String,
    /// Its port.
    pub rank_port: u16,
}

/// A value, and which instance said so (our registry only).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered<T> {
    /// The value.
    pub value: T,
    /// `X-KVTransfer-Generation`: a new number means that what was cached is void.
    pub generation: Option<u64>,
    /// `X-SGLang-Disaggregation-Instance-ID`.
    pub instance: Option<String>,
}
