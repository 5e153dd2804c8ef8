//! The bootstrap registry: serving one, and asking one.
#![expect(unsafe_code, reason = "exported functions take raw pointers")]

use std::{ffi::c_char, path::PathBuf, time::Duration};

use kvt::{
    bootstrap::RankKey,
    serve::{
        bootstrap::BootstrapServer,
        bootstrap_client::{
            Answered, BlockingBootstrapClient, BootstrapClient, BootstrapTarget, ClientError,
            RankAddress, RankRow, ServerInfo,
        },
        tls::client_config_from_pem,
    },
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    argument::{Place, Texts, text},
    guard::enter,
    handle::{Handle, Opaque, free, give},
    settings::{BootstrapSettings, parse},
    status::{Failure, KVT_BAD_CONFIG, kvt_status_t, sentence},
};

/// A running bootstrap registry that ranks of SGLang, ours and stock ones, register with. Made by `kvt_bootstrap_new`,
/// ended by `kvt_bootstrap_free`.
pub struct kvt_bootstrap_t(Handle<BootstrapServer>);

impl Opaque for kvt_bootstrap_t {
    type Value = BootstrapServer;
    const NAME: &'static str = "bootstrap";

    fn handle(&self) -> &Handle<BootstrapServer> {
        &self.0
    }

    fn around(handle: Handle<BootstrapServer>) -> Self {
        Self(handle)
    }
}

/// Starts a bootstrap registry on a thread of its own; it accepts connections when this returns.
///
/// `config` is a JSON object, or empty for the defaults (127.0.0.1:8998): section "Bootstrap" of ffi/README.md has its
/// fields. With port 0 the system picks one.
///
/// Ownership: `config` is read during the call only. `*out_bootstrap` is the caller's, to be given back with
/// `kvt_bootstrap_free`. `*out_port`, which may be NULL, is the port it listens on.
/// Threads: any. Errors: `KVT_BAD_CONFIG`, `KVT_LISTEN`, `KVT_SYSTEM`, `KVT_BAD_ARGUMENT`.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to; lengths are right.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_bootstrap_new(
    config: *const c_char,
    config_len: usize,
    out_bootstrap: *mut *mut kvt_bootstrap_t,
    out_port: *mut u16,
) -> kvt_status_t {
    enter(|| {
        // SAFETY: this function's own contract.
        let place = unsafe { Place::new(out_bootstrap, "out_bootstrap") }?;
        // SAFETY: this function's own contract.
        let port = unsafe { Place::optional(out_port, "out_port") }?;
        // SAFETY: this function's own contract.
        let config = unsafe { text(config, config_len, "config") }?;
        let config = parse::<BootstrapSettings>(config, "config")?.config()?;
        let server = BootstrapServer::start(config)?;
        if let Some(port) = port {
            port.put(server.local_addr().port());
        }
        place.put(give(server));
        Ok(())
    })
}

/// Stops a registry, drops its connections and joins its thread (1 s at most). NULL is nothing to do.
///
/// Ownership: the registry is gone. Threads: any, once. Errors: none.
///
/// # Safety
/// `bootstrap` is NULL or came from `kvt_bootstrap_new` and was not freed before.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_bootstrap_free(bootstrap: *mut kvt_bootstrap_t) {
    // SAFETY: this function's own contract.
    unsafe { free(bootstrap) };
}

/// Makes one request to a bootstrap registry, ours or stock SGLang's, and waits for the answer.
///
/// `request` is a JSON object: `address` ("host:port"), optionally `token`, `ca` (a PEM file: speak HTTPS) and
/// `timeout_ms` (5000), and the `call`:
/// - `"health"` → `{}`
/// - `"server_info"` → `{"value": {...}, "generation": 1, "instance": "..."}`, the fields of SGLang's server info
/// - `{"rank": {"dp": 0, "cp": 0, "tp": 0, "pp": 0}}` → `{"value": {"rank_ip": "...", "rank_port": 1}, ...}`
/// - `{"register": {"row": {...}, "lease_s": 60, "instance": "...", "deadline_ms": 30000}}` → `{}`; the row has SGLang's
///   field names; the last three may be left out
/// - `{"withdraw": {"row": {...}}}` → `{}`
/// - `{"register_dp_rank": {"room": 1, "dp_rank": 0}}` → `{}`
/// - `{"query_dp_ranks": {"rooms": [1, 2]}}` → `{"1": 0}`, unknown rooms left out
///
/// Ownership: `request` is read during the call only. `*out_text` is the caller's, to be given back with `kvt_text_free`.
/// `out_len` may be NULL. Threads: any; waits up to the time-out (`register`: up to its deadline, with several attempts).
/// Errors: `KVT_NOT_READY` (not all ranks have registered; ask again), `KVT_BOOTSTRAP`, `KVT_BAD_CONFIG` (the request),
/// `KVT_BAD_ARGUMENT`.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to; lengths are right.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_bootstrap_call(
    request: *const c_char,
    request_len: usize,
    out_text: *mut *mut c_char,
    out_len: *mut usize,
) -> kvt_status_t {
    enter(|| {
        // SAFETY: this function's own contract.
        let place = unsafe { Texts::new(out_text, out_len) }?;
        // SAFETY: this function's own contract.
        let request = unsafe { text(request, request_len, "request") }?;
        let request = parse::<Request>(request, "request")?;
        place.put(request.answer()?.to_string());
        Ok(())
    })
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    address: String,
    token: Option<String>,
    ca: Option<PathBuf>,
    timeout_ms: Option<u64>,
    call: Call,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Call {
    Health,
    ServerInfo,
    Rank {
        dp: u32,
        cp: u32,
        tp: u32,
        pp: u32,
    },
    Register {
        #[serde(with = "Row")]
        row: RankRow,
        lease_s: Option<u64>,
        instance: Option<String>,
        deadline_ms: Option<u64>,
    },
    Withdraw {
        #[serde(with = "Row")]
        row: RankRow,
    },
    RegisterDpRank {
        room: u64,
        dp_rank: u32,
    },
    QueryDpRanks {
        rooms: Vec<u64>,
    },
}

/// The client's row, which it only writes, as something that can be read. Sizes default to one and ranks to zero.
#[derive(Deserialize)]
#[serde(remote = "RankRow", deny_unknown_fields)]
struct Row {
    #[serde(default = "one")]
    attn_tp_size: u32,
    #[serde(default)]
    attn_tp_rank: u32,
    #[serde(default = "one")]
    attn_cp_size: u32,
    #[serde(default)]
    attn_cp_rank: u32,
    #[serde(default = "one")]
    attn_dp_size: u32,
    #[serde(default)]
    attn_dp_rank: u32,
    #[serde(default = "one")]
    pp_size: u32,
    #[serde(default)]
    pp_rank: u32,
    #[serde(default = "one")]
    system_dp_size: u32,
    #[serde(default)]
    system_dp_rank: u32,
    rank_ip: String,
    rank_port: u16,
    page_size: u32,
    #[serde(default)]
    kv_cache_dtype: Option<String>,
    #[serde(default)]
    kv_layout: Option<String>,
    #[serde(default)]
    dsv41_spec_layout: Option<Value>,
    #[serde(default = "follow")]
    load_balance_method: String,
    #[serde(default)]
    enable_dsa_cache_layer_split: bool,
    #[serde(default)]
    enable_kv_cache_sharding: bool,
    #[serde(default)]
    prefill_http_port: Option<u16>,
    #[serde(default = "early")]
    decode_allocation_policy: String,
}

fn one() -> u32 {
    1
}

fn follow() -> String {
    "follow_bootstrap_room".to_owned()
}

fn early() -> String {
    "early".to_owned()
}

impl Request {
    fn answer(self) -> Result<Value, Failure> {
        let mut target = BootstrapTarget::new(self.address);
        target.token = self.token;
        if let Some(timeout_ms) = self.timeout_ms {
            target.request_timeout = Duration::from_millis(timeout_ms);
        }
        if let Some(path) = self.ca {
            let bad = |error: &dyn std::error::Error| {
                Failure::new(
                    KVT_BAD_CONFIG,
                    format!("ca {}: {}", path.display(), sentence(error)),
                )
            };
            let pem = std::fs::read(&path).map_err(|error| bad(&error))?;
            let tls = client_config_from_pem(&pem, None).map_err(|error| bad(&error))?;
            target.tls = Some(tls);
        }
        let mut client = BlockingBootstrapClient::new(target)?;
        Ok(client.wait(async |client| self.call.make(client).await)?)
    }
}

impl Call {
    async fn make(self, client: &mut BootstrapClient) -> Result<Value, ClientError> {
        let done = Value::Object(Map::new());
        match self {
            Self::Health => client.health().await?,
            Self::ServerInfo => return Ok(answered(client.server_info().await?, server_info)),
            Self::Rank { dp, cp, tp, pp } => {
                let found = client.rank(RankKey { dp, cp, tp, pp }).await?;
                return Ok(answered(found, rank_address));
            }
            Self::Register {
                row,
                lease_s,
                instance,
                deadline_ms,
            } => {
                let lease = lease_s.map(Duration::from_secs);
                let deadline = deadline_ms.map_or(REGISTER_DEADLINE, Duration::from_millis);
                client
                    .register(&row, lease, instance.as_deref(), deadline)
                    .await?;
            }
            Self::Withdraw { row } => client.withdraw(&row).await?,
            Self::RegisterDpRank { room, dp_rank } => {
                client.register_dp_rank(room, dp_rank).await?
            }
            Self::QueryDpRanks { rooms } => {
                let ranks = client.query_dp_ranks(&rooms).await?;
                let named = ranks
                    .into_iter()
                    .map(|(room, rank)| (room.to_string(), json!(rank)));
                return Ok(Value::Object(named.collect()));
            }
        }
        Ok(done)
    }
}

fn answered<T>(answered: Answered<T>, value: impl FnOnce(T) -> Value) -> Value {
    json!({
        "value": value(answered.value),
        "generation": answered.generation,
        "instance": answered.instance,
    })
}

fn server_info(info: ServerInfo) -> Value {
    json!({
        "attn_tp_size": info.attn_tp_size,
        "attn_cp_size": info.attn_cp_size,
        "dp_size": info.dp_size,
        "pp_size": info.pp_size,
        "page_size": info.page_size,
        "kv_cache_dtype": info.kv_cache_dtype,
        "follow_bootstrap_room": info.follow_bootstrap_room,
        "enable_dsa_cache_layer_split": info.enable_dsa_cache_layer_split,
        "dsv41_spec_layout": info.dsv41_spec_layout,
        "kv_layout": info.kv_layout,
        "decode_allocation_policy": info.decode_allocation_policy,
        "enable_kv_cache_sharding": info.enable_kv_cache_sharding,
        "prefill_http_port": info.prefill_http_port,
    })
}

fn rank_address(address: RankAddress) -> Value {
    json!({ "rank_ip": address.rank_ip, "rank_port": address.rank_port })
}

/// How long a registration may be tried: five attempts with their pauses take 15 s at most.
const REGISTER_DEADLINE: Duration = Duration::from_secs(30);
