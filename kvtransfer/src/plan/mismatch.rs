//! Why two ranks cannot exchange KV memory, each reason one sentence that names both values (promise P7).
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;

use crate::layout::{ComponentKind, LayoutError, Shard};

/// One of the two ranks of a pairing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The rank whose memory is read (prefill).
    Source,
    /// The rank whose memory is written (decode).
    Target,
}

impl End {
    /// The other one.
    #[must_use]
    pub fn opposite(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// Why `pair` refused two layouts. The messages are meant for the person who started the two servers: they name what
/// differs, both values, and the option to change where there is one. Names that come from a peer are quoted and
/// escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutMismatch {
    /// A layout is not valid in itself.
    #[error("the {end} layout is not valid: {error}")]
    Invalid {
        /// Whose layout.
        end: End,
        /// What is wrong with it.
        error: LayoutError,
    },
    /// Tokens per page.
    #[error(
        "page size differs: source has {source_tokens} tokens per page, target has {target_tokens}; start both with the same --page-size"
    )]
    PageSize {
        /// Tokens per page at the source.
        source_tokens: u32,
        /// Tokens per page at the target.
        target_tokens: u32,
    },
    /// Element type.
    #[error(
        "KV dtype differs: source has {source_dtype:?}, target has {target_dtype:?}; start both with the same --kv-cache-dtype"
    )]
    KvDtype {
        /// The source's.
        source_dtype: String,
        /// The target's.
        target_dtype: String,
    },
    /// Page layout.
    #[error(
        "KV page layout differs: source has {source_layout:?}, target has {target_layout:?}; start both with the same attention backend"
    )]
    KvLayout {
        /// The source's.
        source_layout: String,
        /// The target's.
        target_layout: String,
    },
    /// One keeps heads, the other a latent vector.
    #[error(
        "attention differs: source keeps {source_attention}, target keeps {target_attention}; they do not serve the same model"
    )]
    Attention {
        /// The source's, in words.
        source_attention: &'static str,
        /// The target's, in words.
        target_attention: &'static str,
    },
    /// KV heads of the whole model.
    #[error(
        "KV heads differ: source's model has {source_heads} in total, target's has {target_heads}; they do not serve the same model"
    )]
    TotalHeads {
        /// The source's.
        source_heads: u32,
        /// The target's.
        target_heads: u32,
    },
    /// Neither tensor-parallel size divides the other.
    #[error(
        "tensor-parallel sizes do not divide: source has {source_tp}, target has {target_tp}; make one a multiple of the other"
    )]
    TpSizes {
        /// Ranks of the source's group.
        source_tp: u32,
        /// Ranks of the target's group.
        target_tp: u32,
    },
    /// The source rank is not among those that feed the target rank.
    #[error("tensor-parallel ranks do not meet: source is rank {} of {}, target is rank {} of {}", source_tp.rank, source_tp.size, target_tp.rank, target_tp.size)]
    TpRanks {
        /// The source's place.
        source_tp: Shard,
        /// The target's place.
        target_tp: Shard,
    },
    /// The layer ranges have nothing in common.
    #[error("layers do not meet: source holds {} to {}, target holds {} to {} (end excluded)", source_layers.start, source_layers.end, target_layers.start, target_layers.end)]
    LayersDisjoint {
        /// The source's layers.
        source_layers: Range<u32>,
        /// The target's layers.
        target_layers: Range<u32>,
    },
    /// Some layers would never arrive, or have nowhere to go.
    #[error("layers do not fit: source stage {} of {} holds {} to {}, target stage {} of {} holds {} to {} (end excluded)",
        source_pp.rank, source_pp.size, source_layers.start, source_layers.end,
        target_pp.rank, target_pp.size, target_layers.start, target_layers.end)]
    LayersUncovered {
        /// The source's pipeline place.
        source_pp: Shard,
        /// The source's layers.
        source_layers: Range<u32>,
        /// The target's pipeline place.
        target_pp: Shard,
        /// The target's layers.
        target_layers: Range<u32>,
    },
    /// The lists of components differ.
    #[error("component {place} differs: source has {}, target has {}", or_none(source_kind.as_ref()), or_none(target_kind.as_ref()))]
    Components {
        /// Place in the layouts' lists.
        place: usize,
        /// The source's, if it has that many.
        source_kind: Option<ComponentKind>,
        /// The target's, if it has that many.
        target_kind: Option<ComponentKind>,
    },
    /// Buffer counts differ.
    #[error(
        "{component} buffers differ in number: source has {source_entries}, target has {target_entries}"
    )]
    Entries {
        /// Which component.
        component: ComponentKind,
        /// The source's count, without draft entries.
        source_entries: usize,
        /// The target's count, without draft entries.
        target_entries: usize,
    },
    /// Both have a draft model, but not the same.
    #[error(
        "draft model buffers differ in number: source has {source_entries}, target has {target_entries}; start both with the same speculative draft model"
    )]
    DraftEntries {
        /// The source's count.
        source_entries: usize,
        /// The target's count.
        target_entries: usize,
    },
    /// Buffers cannot be told apart by position across pipeline stages.
    #[error("{component} has {entries} {end} buffers where {layers} layers are held; unlike layer ranges (source {} to {}, target {} to {}) need one buffer per layer, or layer ids",
        source_layers.start, source_layers.end, target_layers.start, target_layers.end)]
    EntriesPerLayer {
        /// Which component.
        component: ComponentKind,
        /// Whose.
        end: End,
        /// Buffers found, per half where there are K and V halves.
        entries: usize,
        /// Layers this end holds.
        layers: usize,
        /// The source's layers.
        source_layers: Range<u32>,
        /// The target's layers.
        target_layers: Range<u32>,
    },
    /// Only one end names its layers.
    #[error("{component} buffers have layer ids at the {named} but none at the {}", named.opposite())]
    LayerIdsOneSided {
        /// Which component.
        component: ComponentKind,
        /// The end that names them.
        named: End,
    },
    /// A layer has buffers at one end only.
    #[error(
        "{component} layer {layer} has {source_entries} buffers at the source and {target_entries} at the target"
    )]
    LayerId {
        /// Which component.
        component: ComponentKind,
        /// Global layer id.
        layer: u32,
        /// Buffers with that id at the source.
        source_entries: usize,
        /// Buffers with that id at the target.
        target_entries: usize,
    },
    /// Item lengths of paired buffers.
    #[error(
        "{component} item length differs: source buffer {source_entry} has {source_len} bytes per item, target buffer {target_entry} has {target_len}"
    )]
    ItemLen {
        /// Which component.
        component: ComponentKind,
        /// Place in the source's entries.
        source_entry: usize,
        /// Place in the target's entries.
        target_entry: usize,
        /// Bytes of one item at the source.
        source_len: u64,
        /// Bytes of one item at the target.
        target_len: u64,
    },
    /// Head slices of paired buffers would differ.
    #[error(
        "{component} bytes per token and head differ: source buffer {source_entry} has {source_len} bytes per page for {source_heads} heads, target buffer {target_entry} has {target_len} for {target_heads}, at {page_size} tokens per page"
    )]
    HeadBytes {
        /// Which component.
        component: ComponentKind,
        /// Place in the source's entries.
        source_entry: usize,
        /// Bytes of one page at the source.
        source_len: u64,
        /// Heads on the source rank.
        source_heads: u32,
        /// Place in the target's entries.
        target_entry: usize,
        /// Bytes of one page at the target.
        target_len: u64,
        /// Heads on the target rank.
        target_heads: u32,
        /// Tokens per page.
        page_size: u32,
    },
    /// Only "nhd" pages can be cut by heads.
    #[error(
        "unequal tensor-parallel sizes (source {source_tp}, target {target_tp}) need the \"nhd\" page layout, both have {kv_layout:?}"
    )]
    SliceLayout {
        /// The common page layout.
        kv_layout: String,
        /// Ranks of the source's group.
        source_tp: u32,
        /// Ranks of the target's group.
        target_tp: u32,
    },
    /// This state cannot be cut at all.
    #[error(
        "state {state} needs equal tensor-parallel sizes: source has {source_tp}, target has {target_tp}; start both with the same attention tensor parallelism (--tp-size / --dp-size)"
    )]
    StateTp {
        /// Which state component.
        state: ComponentKind,
        /// Ranks of the source's group.
        source_tp: u32,
        /// Ranks of the target's group.
        target_tp: u32,
    },
    /// This state could be cut, but nobody says how.
    #[error(
        "state {state} needs the sliced dimension of every tensor on both sides for unequal tensor-parallel sizes (source {source_tp}, target {target_tp}); start both with the same attention tensor parallelism, and without --enable-unified-memory"
    )]
    StateUnsliced {
        /// Which state component.
        state: ComponentKind,
        /// Ranks of the source's group.
        source_tp: u32,
        /// Ranks of the target's group.
        target_tp: u32,
    },
    /// Tensors of a state that cannot be cut from each other.
    #[error(
        "state {state} {what}: source tensor {source_entry} has slots of {source_len} bytes with {source_dim} channels on each of {source_tp} ranks, target tensor {target_entry} {target_len} bytes with {target_dim} on each of {target_tp}; start both with the same model and state dtype"
    )]
    StateSlices {
        /// Which state component.
        state: ComponentKind,
        /// What does not fit.
        what: &'static str,
        /// Place in the source's entries.
        source_entry: usize,
        /// Bytes of one slot at the source.
        source_len: u64,
        /// Channels on a source rank.
        source_dim: u32,
        /// Ranks of the source's group.
        source_tp: u32,
        /// Place in the target's entries.
        target_entry: usize,
        /// Bytes of one slot at the target.
        target_len: u64,
        /// Channels on a target rank.
        target_dim: u32,
        /// Ranks of the target's group.
        target_tp: u32,
    },
    /// This state has no layers to tell pipeline stages apart.
    #[error(
        "state {state} needs a pipeline of one stage on both sides: source has {source_pp}, target has {target_pp}; start both with --pp-size 1"
    )]
    StateStages {
        /// Which state component.
        state: ComponentKind,
        /// Stages of the source.
        source_pp: u32,
        /// Stages of the target.
        target_pp: u32,
    },
}

fn or_none(kind: Option<&ComponentKind>) -> String {
    kind.map_or_else(|| "none".to_owned(), ToString::to_string)
}
