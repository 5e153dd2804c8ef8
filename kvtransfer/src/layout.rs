//! What a rank's KV memory looks like: regions, buffers per layer, page size, head shard.
//!
//! Two ranks exchange their [`Layout`]s once, before any byte moves (promise P7); `plan::pairing` then decides which
//! bytes of which buffer go where, or says in a sentence why they cannot. The vocabulary is SGLang's `KVArgs`
//! (`srt/disaggregation/base/conn.py:57-120`): one *entry* per KV buffer, one *item* per page of that buffer.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;

mod state;
mod validate;

pub use state::{
    IndexRule, SLICE_DIM_MAX, SLICE_GROUPS_MAX, SLICE_ROWS_MAX, StateError, StateShape, StateSlice,
    dsa_tail_slots, name_ratio_layers,
};
pub use validate::{
    BUFFER_END_MAX, COMPONENTS_MAX, ENTRIES_MAX, HEADS_MAX, ITEM_LEN_MAX, LAYERS_MAX, LayoutError,
    NAME_LEN_MAX, PAGE_SIZE_MAX, SHARDS_MAX,
};

/// Names a registered memory region of one engine. Numbers are handed out by the engine in order of registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u32);

/// One rank of a group, e.g. tensor-parallel rank 1 of 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This rank, `0..size`.
    pub rank: u32,
    /// Ranks in the group, at least 1.
    pub size: u32,
}

impl Shard {
    /// The group of one.
    pub const ONE: Self = Self { rank: 0, size: 1 };
}

/// How the attention of the model keeps its keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Multi-head or grouped-query attention: entries are all K layers, then all V layers, then (if any) the draft
    /// model's entries; a page is `[page_size, heads, head_dim]` ("nhd").
    Heads {
        /// KV heads of the whole model, before sharding.
        total_kv_heads: u32,
        /// KV heads held by this rank (at least 1: heads are replicated when `tp.size > total_kv_heads`).
        rank_kv_heads: u32,
    },
    /// Multi-head latent attention: one entry per layer, identical on every TP rank.
    Latent,
}

/// What a component of the layout is for. Components are sent in this order: KV, states, aux (promise P6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ComponentKind {
    /// The paged KV cache; its items are pages.
    Kv,
    /// A state component, by SGLang's `StateType` name (`"mamba"`, `"swa"`, `"dsa"`, …); items are slots or pages. Of
    /// `"dsa_tail"` they are the slots of its rings, see [`dsa_tail_slots`].
    State(String),
    /// The metadata ("aux") rows; items are slots. The last entry is the one that becomes visible last: the room number.
    Aux,
}

impl fmt::Display for ComponentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kv => f.write_str("kv"),
            // A name may come from a peer and land in a log line, so control characters are escaped.
            Self::State(name) => write!(f, "{}", name.escape_debug()),
            Self::Aux => f.write_str("aux"),
        }
    }
}

/// One buffer of a component: `item_count` items of `item_len` bytes each, back to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The region that holds the buffer.
    pub region: RegionId,
    /// Where the buffer starts in the region, in bytes.
    pub offset: u64,
    /// Bytes of one item (for KV: one page of this layer's buffer on this rank). 0 marks an *elided* entry: it keeps
    /// its place in the order but has no bytes, and pairing skips it where the source has none, or for `"dsa"` the
    /// target (SGLang's DSA pools do this).
    pub item_len: u64,
    /// Items in the buffer.
    pub item_count: u64,
    /// Global layer id where the pool names its layers (hybrid models); `None` pairs by position.
    pub layer_id: Option<u32>,
}

/// A group of buffers that share one list of item indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// What it is for.
    pub kind: ComponentKind,
    /// Its buffers, in the order both sides agree on.
    pub entries: Vec<Entry>,
    /// How many trailing entries belong to a speculative draft model (KV only, else 0).
    pub draft_entries: u32,
    /// What a state says beyond its buffers (states only, else the default).
    pub state: StateShape,
}

/// Everything a peer must know of this rank's KV memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Tokens per page.
    pub page_size: u32,
    /// Element type as SGLang spells it, e.g. `"bfloat16"`.
    pub kv_dtype: String,
    /// Page layout name, e.g. `"nhd"`. Only `"nhd"` can be cut by heads.
    pub kv_layout: String,
    /// How keys and values are kept.
    pub attention: Attention,
    /// Tensor-parallel place (attention TP).
    pub tp: Shard,
    /// Pipeline-parallel place.
    pub pp: Shard,
    /// First and one-past-last global layer held by this rank, draft layers not counted.
    pub layers: Range<u32>,
    /// KV first, then states, then aux last.
    pub components: Vec<Component>,
}

impl Layout {
    /// The layout of a rank that has none: nothing is sent or received by items, only written by address
    /// ([`EngineConfig::writable_by_address`](crate::config::EngineConfig::writable_by_address)).
    #[must_use]
    pub fn raw() -> Self {
        Self {
            page_size: 1,
            kv_dtype: RAW.into(),
            kv_layout: RAW.into(),
            attention: Attention::Latent,
            tp: Shard::ONE,
            pp: Shard::ONE,
            layers: 0..0,
            components: Vec::new(),
        }
    }

    /// Whether it is that of a rank that has none.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.components.is_empty() && self.kv_dtype == RAW
    }
}

impl Attention {
    /// KV heads on this rank; a latent cache counts as one.
    #[must_use]
    pub fn rank_heads(&self) -> u32 {
        match *self {
            Self::Heads { rank_kv_heads, .. } => rank_kv_heads,
            Self::Latent => 1,
        }
    }
}

impl Component {
    /// The entries that do not belong to a draft model. A draft count above the entry count (which
    /// [`Layout::validate`] refuses) leaves none.
    pub fn main_entries(&self) -> &[Entry] {
        let main = self
            .entries
            .len()
            .saturating_sub(self.draft_entries as usize);
        &self.entries[..main]
    }

    /// The trailing entries that belong to a draft model.
    pub fn draft_entries(&self) -> &[Entry] {
        &self.entries[self.main_entries().len()..]
    }

    /// Item indices that every buffer of the component can take, `0..item_count`. Elided entries have no say; a
    /// component without buffers takes any index.
    pub fn item_count(&self) -> u64 {
        let real = self.entries.iter().filter(|entry| entry.item_len > 0);
        real.map(|entry| entry.item_count).min().unwrap_or(u64::MAX)
    }
}

/// Stands for names that a raw layout does not have.
const RAW: &str = "raw";

/// The page layout `[page_size, heads, head_dim]`, the only one whose heads can be cut apart.
pub(crate) const NHD: &str = "nhd";
