//! One `PUT /route` row: what a prefill rank says of itself and of the instance it belongs to.
//!
//! Follows `CommonKVBootstrapServer._handle_route_put` (SGLang 0.5.23, `common/conn.py`): the same keys are required,
//! the same are optional, with the same defaults. Where Python would only fail later (a size of zero, a rank outside its
//! group, a port that is none) the row is refused at once with a sentence.

use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::{Value, value::RawValue};

use super::python_text::{dump_raw, python_int};

/// Ranks one instance may have. SGLang's largest published deployments have a few hundred; a row costs about 200 bytes.
pub const RANKS_MAX: u64 = 16_384;
/// Bytes of any text in a row (addresses, dtype and layout names, policies). The longest legal host name has 253.
pub const TEXT_BYTES_MAX: usize = 255;
/// Bytes of the opaque `dsv41_spec_layout` object, which every generation keeps once.
pub const SPEC_LAYOUT_BYTES_MAX: usize = 16 * 1024;

/// Which rank a row describes; the order is that of SGLang's nested tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RankKey {
    /// Data-parallel group: `attn_dp_rank`, or `system_dp_rank` when `system_dp_size > 1`.
    pub dp: u32,
    /// Context-parallel rank.
    pub cp: u32,
    /// Attention tensor-parallel rank.
    pub tp: u32,
    /// Pipeline-parallel rank.
    pub pp: u32,
}

/// What all ranks of one instance must agree on. Two rows that disagree never belong to one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Attention tensor-parallel size.
    pub attn_tp_size: u32,
    /// Attention context-parallel size.
    pub attn_cp_size: u32,
    /// Data-parallel size: `attn_dp_size`, or `system_dp_size` when that is not 1.
    pub dp_size: u32,
    /// Pipeline-parallel size.
    pub pp_size: u32,
    /// Tokens per KV page.
    pub page_size: u64,
    /// Element type as SGLang spells it; `None` until a row names one.
    pub kv_cache_dtype: Option<String>,
    /// Page layout name; `None` until a row names one.
    pub kv_layout: Option<String>,
}

impl Topology {
    /// Ranks a complete instance has.
    #[must_use]
    pub fn rank_count(&self) -> u64 {
        [
            self.attn_tp_size,
            self.attn_cp_size,
            self.dp_size,
            self.pp_size,
        ]
        .into_iter()
        .fold(1, |product, size| product.saturating_mul(u64::from(size)))
    }

    /// Whether rows of both can live in one generation. An unnamed dtype or layout agrees with any.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        fn same(a: Option<&str>, b: Option<&str>) -> bool {
            a.is_none() || b.is_none() || a == b
        }
        self.attn_tp_size == other.attn_tp_size
            && self.attn_cp_size == other.attn_cp_size
            && self.dp_size == other.dp_size
            && self.pp_size == other.pp_size
            && self.page_size == other.page_size
            && same(
                self.kv_cache_dtype.as_deref(),
                other.kv_cache_dtype.as_deref(),
            )
            && same(self.kv_layout.as_deref(), other.kv_layout.as_deref())
    }
}

/// `dsv41_spec_layout`: compared as a JSON value, printed again in the order it came.
#[derive(Clone, Debug)]
pub struct SpecLayout {
    value: Value,
    text: String,
}

impl SpecLayout {
    /// The layout as `json.dumps` prints it.
    #[must_use]
    pub fn as_text(&self) -> &str {
        &self.text
    }
}

impl PartialEq for SpecLayout {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

/// One parsed and range-checked row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Which rank it is.
    pub key: RankKey,
    /// What it believes of its instance.
    pub topology: Topology,
    /// Address decode ranks connect to, as sent.
    pub rank_ip: String,
    /// Port of the rank's control socket.
    pub rank_port: u16,
    /// `load_balance_method == "follow_bootstrap_room"` (the default).
    pub follow_bootstrap_room: bool,
    /// `enable_dsa_cache_layer_split`, as Python's `bool()` sees it.
    pub enable_dsa_cache_layer_split: bool,
    /// `enable_kv_cache_sharding`, as Python's `bool()` sees it.
    pub enable_kv_cache_sharding: bool,
    /// Port of the prefill's HTTP API.
    pub prefill_http_port: Option<i64>,
    /// `decode_allocation_policy`, `"early"` when absent; `None` when sent as null.
    pub decode_allocation_policy: Option<String>,
    /// `dsv41_spec_layout`.
    pub spec_layout: Option<SpecLayout>,
    /// Which of the keys that not every release has were there.
    pub knows: KnownKeys,
}

/// Keys that SGLang's ranks learned release by release. A decode rank refuses a registry's answer with a key it does not
/// know (`PrefillServerInfo(**json)`, `common/conn.py`), so an instance is described in the keys its own ranks used.
#[expect(clippy::struct_excessive_bools, reason = "one per key")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownKeys {
    /// `enable_dsa_cache_layer_split`.
    pub enable_dsa_cache_layer_split: bool,
    /// `decode_allocation_policy`.
    pub decode_allocation_policy: bool,
    /// `enable_kv_cache_sharding`, since 0.5.23.
    pub enable_kv_cache_sharding: bool,
    /// `prefill_http_port`.
    pub prefill_http_port: bool,
}

impl KnownKeys {
    /// What either knows.
    pub(super) const fn or(self, other: Self) -> Self {
        Self {
            enable_dsa_cache_layer_split: self.enable_dsa_cache_layer_split
                || other.enable_dsa_cache_layer_split,
            decode_allocation_policy: self.decode_allocation_policy
                || other.decode_allocation_policy,
            enable_kv_cache_sharding: self.enable_kv_cache_sharding
                || other.enable_kv_cache_sharding,
            prefill_http_port: self.prefill_http_port || other.prefill_http_port,
        }
    }
}

/// Why a body is not a row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// Not JSON, a required key is missing, or a value has a type SGLang could not use. SGLang answers 500.
    #[error("the body is not a registration row")]
    Malformed,
    /// A parallel size is zero or beyond [`RANKS_MAX`].
    #[error("{axis}_size {size} is not in 1..={RANKS_MAX}")]
    Size {
        /// Which group.
        axis: &'static str,
        /// The size as sent.
        size: i64,
    },
    /// The sizes multiply to more than [`RANKS_MAX`].
    #[error("the instance would have {ranks} ranks, more than the {RANKS_MAX} this registry keeps")]
    TooManyRanks {
        /// Their product.
        ranks: u64,
    },
    /// A rank is outside its group.
    #[error("{axis}_rank {rank} is not in 0..{size}")]
    Rank {
        /// Which group.
        axis: &'static str,
        /// The rank as sent.
        rank: i64,
        /// Size of the group.
        size: u32,
    },
    /// A number is outside what its field can mean.
    #[error("{field} {value} is out of range")]
    Number {
        /// The key.
        field: &'static str,
        /// The value as sent.
        value: i64,
    },
    /// A text is longer than its bound, or empty where an address is needed.
    #[error("{field} has {bytes} bytes; 1 to {bytes_max} are accepted")]
    TextLength {
        /// The key.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// The bound.
        bytes_max: usize,
    },
}

impl Row {
    /// Reads a `PUT /route` body.
    ///
    /// # Errors
    /// [`RowError::Malformed`] where SGLang answers its 500 page, else a sentence about the first bad value.
    pub fn parse(body: &[u8]) -> Result<Self, RowError> {
        let wire: Wire<'_> = serde_json::from_slice(body).map_err(|_| RowError::Malformed)?;
        let (dp_size, dp_rank) = match wire.system_dp_size {
            1 => (wire.attn_dp_size, wire.attn_dp_rank),
            _ => (wire.system_dp_size, wire.system_dp_rank),
        };
        let topology = Topology {
            attn_tp_size: size("attn_tp", wire.attn_tp_size)?,
            attn_cp_size: size("attn_cp", wire.attn_cp_size)?,
            dp_size: size("dp", dp_size)?,
            pp_size: size("pp", wire.pp_size)?,
            page_size: u64::try_from(wire.page_size)
                .ok()
                .filter(|&tokens| tokens > 0)
                .ok_or(RowError::Number {
                    field: "page_size",
                    value: wire.page_size,
                })?,
            kv_cache_dtype: bounded("kv_cache_dtype", wire.kv_cache_dtype)?,
            kv_layout: bounded("kv_layout", wire.kv_layout)?,
        };
        let ranks = topology.rank_count();
        if ranks > RANKS_MAX {
            return Err(RowError::TooManyRanks { ranks });
        }
        let rank_ip = bounded("rank_ip", Some(wire.rank_ip))?.unwrap_or_default();
        Ok(Self {
            key: RankKey {
                dp: rank("dp", dp_rank.ok_or(RowError::Malformed)?, topology.dp_size)?,
                cp: rank("attn_cp", wire.attn_cp_rank, topology.attn_cp_size)?,
                tp: rank("attn_tp", wire.attn_tp_rank, topology.attn_tp_size)?,
                pp: rank("pp", wire.pp_rank, topology.pp_size)?,
            },
            rank_ip,
            rank_port: u16::try_from(wire.rank_port)
                .ok()
                .filter(|&port| port > 0)
                .ok_or(RowError::Number {
                    field: "rank_port",
                    value: wire.rank_port,
                })?,
            follow_bootstrap_room: wire
                .load_balance_method
                .is_none_or(|method| method == "follow_bootstrap_room"),
            knows: KnownKeys {
                enable_dsa_cache_layer_split: wire.enable_dsa_cache_layer_split.is_some(),
                decode_allocation_policy: wire.decode_allocation_policy.is_some(),
                enable_kv_cache_sharding: wire.enable_kv_cache_sharding.is_some(),
                prefill_http_port: wire.prefill_http_port.is_some(),
            },
            enable_dsa_cache_layer_split: truthy(wire.enable_dsa_cache_layer_split.as_ref()),
            enable_kv_cache_sharding: truthy(wire.enable_kv_cache_sharding.as_ref()),
            prefill_http_port: wire.prefill_http_port.flatten(),
            decode_allocation_policy: bounded(
                "decode_allocation_policy",
                wire.decode_allocation_policy
                    .unwrap_or_else(|| Some("early".to_owned())),
            )?,
            spec_layout: wire.dsv41_spec_layout.map(spec_layout).transpose()?,
            topology,
        })
    }
}

/// The JSON object, with Python's idea of which values count as which type.
#[derive(Deserialize)]
struct Wire<'a> {
    attn_tp_size: i64,
    attn_tp_rank: i64,
    attn_cp_size: i64,
    attn_cp_rank: i64,
    attn_dp_size: i64,
    #[serde(deserialize_with = "present")]
    attn_dp_rank: Option<i64>,
    pp_size: i64,
    pp_rank: i64,
    system_dp_size: i64,
    #[serde(deserialize_with = "present")]
    system_dp_rank: Option<i64>,
    rank_ip: String,
    #[serde(deserialize_with = "int_like")]
    rank_port: i64,
    #[serde(deserialize_with = "int_like")]
    page_size: i64,
    #[serde(deserialize_with = "present")]
    kv_cache_dtype: Option<String>,
    kv_layout: Option<String>,
    #[serde(borrow)]
    dsv41_spec_layout: Option<&'a RawValue>,
    // Kept as a value: null is not the default, it is a method that does not follow the room.
    #[serde(default, deserialize_with = "some_value")]
    load_balance_method: Option<Value>,
    #[serde(default, deserialize_with = "some_value")]
    enable_dsa_cache_layer_split: Option<Value>,
    #[serde(default, deserialize_with = "some_value")]
    enable_kv_cache_sharding: Option<Value>,
    // Null is not the same as absent: it says that the rank knows the key.
    #[serde(default, deserialize_with = "optional_int_like")]
    prefill_http_port: Option<Option<i64>>,
    #[serde(default, deserialize_with = "some_text")]
    decode_allocation_policy: Option<Option<String>>,
}

#[expect(clippy::option_option, reason = "absent and null differ")]
fn some_text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// A key that must be there but may be null.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(from)
}

fn some_value<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

fn int_like<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    let value = Value::deserialize(from)?;
    narrow_int_of(&value).ok_or_else(|| D::Error::custom("not an integer"))
}

#[expect(clippy::option_option, reason = "absent and null differ")]
fn optional_int_like<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<i64>>, D::Error> {
    let value = Value::deserialize(from)?;
    if value.is_null() {
        return Ok(Some(None));
    }
    narrow_int_of(&value)
        .map(|port| Some(Some(port)))
        .ok_or_else(|| D::Error::custom("not an integer"))
}

/// `int(value)` for a JSON value: integers, decimal text, floats cut towards zero, booleans.
pub(super) fn python_int_of(value: &Value) -> Option<i128> {
    match value {
        Value::Bool(flag) => Some(i128::from(*flag)),
        Value::Number(number) => number.as_i128().or_else(|| {
            // Beyond 2^53 a float names no room or port anybody meant.
            let float = number
                .as_f64()
                .filter(|float| float.abs() < 9_007_199_254_740_992.0)?;
            #[expect(clippy::cast_possible_truncation, reason = "checked: |float| < 2^53")]
            let whole = float.trunc() as i128;
            Some(whole)
        }),
        Value::String(text) => python_int(text),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn narrow_int_of(value: &Value) -> Option<i64> {
    i64::try_from(python_int_of(value)?).ok()
}

/// Python's `bool(value)`.
fn truthy(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Bool(flag)) => *flag,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(fields)) => !fields.is_empty(),
    }
}

fn spec_layout(raw: &RawValue) -> Result<SpecLayout, RowError> {
    let bytes = raw.get().len();
    if bytes > SPEC_LAYOUT_BYTES_MAX {
        return Err(RowError::TextLength {
            field: "dsv41_spec_layout",
            bytes,
            bytes_max: SPEC_LAYOUT_BYTES_MAX,
        });
    }
    // Parsing as a value also bounds the nesting, which a raw value does not.
    let value = serde_json::from_str(raw.get()).map_err(|_| RowError::Malformed)?;
    let text = dump_raw(raw.get()).ok_or(RowError::Malformed)?;
    Ok(SpecLayout { value, text })
}

fn size(axis: &'static str, size: i64) -> Result<u32, RowError> {
    u32::try_from(size)
        .ok()
        .filter(|&ranks| ranks > 0 && u64::from(ranks) <= RANKS_MAX)
        .ok_or(RowError::Size { axis, size })
}

fn rank(axis: &'static str, rank: i64, size: u32) -> Result<u32, RowError> {
    u32::try_from(rank)
        .ok()
        .filter(|&rank| rank < size)
        .ok_or(RowError::Rank { axis, rank, size })
}

fn bounded(field: &'static str, text: Option<String>) -> Result<Option<String>, RowError> {
    match text {
        Some(text) if text.is_empty() || text.len() > TEXT_BYTES_MAX => Err(RowError::TextLength {
            field,
            bytes: text.len(),
            bytes_max: TEXT_BYTES_MAX,
        }),
        text => Ok(text),
    }
}
