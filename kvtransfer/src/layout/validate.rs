//! The bounds of a layout: what a peer may claim before anyone computes with it.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::{
    Attention, Component, ComponentKind, Entry, Layout, NHD, SLICE_DIM_MAX, SLICE_GROUPS_MAX,
    SLICE_ROWS_MAX, Shard, StateShape,
};

/// Components of one layout: KV, aux, and one per state type; SGLang knows 13 state types.
pub const COMPONENTS_MAX: usize = 64;
/// Entries of one component: K and V of the deepest models have some 250, state pools a few per layer.
pub const ENTRIES_MAX: usize = 4096;
/// Bytes of one item. A page of one layer is kilobytes to a few megabytes; the bound keeps
/// `ENTRIES_MAX * ITEM_LEN_MAX * ITEMS_MAX` within 2^63, so that stream offsets never overflow a `u64`.
pub const ITEM_LEN_MAX: u64 = 1 << 31;
/// One past the last byte of a buffer within its region. Leaves room for any 32-bit item index times
/// [`ITEM_LEN_MAX`] to be added without overflow, even for an index that was never checked.
pub const BUFFER_END_MAX: u64 = 1 << 62;
/// Bytes of a dtype, page layout or state type name; SGLang's longest has 16.
pub const NAME_LEN_MAX: usize = 64;
/// Ranks of one TP or PP group.
pub const SHARDS_MAX: u32 = 4096;
/// Tokens per page.
pub const PAGE_SIZE_MAX: u32 = 1 << 16;
/// KV heads of a model.
pub const HEADS_MAX: u32 = 1 << 16;
/// One past the last layer number.
pub const LAYERS_MAX: u32 = 1 << 16;

/// Why a layout cannot be used, whoever sent it. Each message is one sentence that names the offending value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// More than [`COMPONENTS_MAX`] components.
    #[error("the layout has {count} components, the limit is {COMPONENTS_MAX}")]
    TooManyComponents {
        /// Components found.
        count: usize,
    },
    /// More than [`ENTRIES_MAX`] entries in a component.
    #[error("component {component} has {count} entries, the limit is {ENTRIES_MAX}")]
    TooManyEntries {
        /// Place in [`Layout::components`].
        component: usize,
        /// Entries found.
        count: usize,
    },
    /// A name is empty or longer than [`NAME_LEN_MAX`].
    #[error("the {what} name has {len} bytes, it must have 1 to {NAME_LEN_MAX}")]
    NameLength {
        /// Which name.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// A plain number is out of its range.
    #[error("{what} is {value}, it must be {min} to {max}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
        /// Smallest accepted value.
        min: u64,
        /// Largest accepted value.
        max: u64,
    },
    /// A rank is not below its group's size.
    #[error("{group} rank {rank} is outside its group of {size}")]
    Rank {
        /// `"tp"` or `"pp"`.
        group: &'static str,
        /// The rank given.
        rank: u32,
        /// The group's size.
        size: u32,
    },
    /// The layer range ends before it starts.
    #[error("the layer range {start}..{end} is reversed")]
    LayersReversed {
        /// First layer.
        start: u32,
        /// One past the last layer.
        end: u32,
    },
    /// Heads can neither be split evenly over the ranks nor replicated evenly.
    #[error("{total} KV heads cannot be shared evenly by {tp_size} tensor-parallel ranks")]
    HeadsUneven {
        /// KV heads of the model.
        total: u32,
        /// TP ranks.
        tp_size: u32,
    },
    /// A rank claims another number of heads than its place gives it.
    #[error(
        "the rank holds {held} KV heads, but {total} heads over {tp_size} ranks make {expected}"
    )]
    HeadsPerRank {
        /// Heads claimed.
        held: u32,
        /// KV heads of the model.
        total: u32,
        /// TP ranks.
        tp_size: u32,
        /// Heads this place holds.
        expected: u32,
    },
    /// KV is missing, not first or repeated, or aux is not last or repeated.
    #[error(
        "component {component} is {kind}, but KV must come first, aux last, and each only once"
    )]
    ComponentOrder {
        /// Place in [`Layout::components`].
        component: usize,
        /// What stands there.
        kind: ComponentKind,
    },
    /// There is no component at all.
    #[error("the layout has no KV component")]
    NoKv,
    /// More draft entries than entries, or draft entries outside KV.
    #[error("component {component} claims {draft} draft entries among {count}")]
    DraftEntries {
        /// Place in [`Layout::components`].
        component: usize,
        /// Draft entries claimed.
        draft: u32,
        /// Entries it may have of them (0 outside KV).
        count: usize,
    },
    /// The K and V halves cannot be equal.
    #[error(
        "component {component} has {count} entries before the draft model's, which is no equal number of K and V"
    )]
    OddHalves {
        /// Place in [`Layout::components`].
        component: usize,
        /// Entries that are not draft entries.
        count: usize,
    },
    /// Some entries name their layer and others do not.
    #[error(
        "component {component} names layers for {named} of {count} entries, it must be all or none"
    )]
    LayerIdsPartial {
        /// Place in [`Layout::components`].
        component: usize,
        /// Entries with a layer id.
        named: usize,
        /// Entries, without draft entries.
        count: usize,
    },
    /// An item is larger than [`ITEM_LEN_MAX`].
    #[error(
        "entry {entry} of component {component} has items of {len} bytes, the limit is {ITEM_LEN_MAX}"
    )]
    ItemLen {
        /// Place in [`Layout::components`].
        component: usize,
        /// Place in [`Component::entries`].
        entry: usize,
        /// Bytes of one item.
        len: u64,
    },
    /// An "nhd" page does not divide into its tokens and heads.
    #[error(
        "entry {entry} of component {component} has pages of {len} bytes, no multiple of {page_size} tokens times {heads} heads"
    )]
    ItemUneven {
        /// Place in [`Layout::components`].
        component: usize,
        /// Place in [`Component::entries`].
        entry: usize,
        /// Bytes of one page.
        len: u64,
        /// Tokens per page.
        page_size: u32,
        /// Heads on this rank.
        heads: u32,
    },
    /// Slices where there can be none, or not one per entry.
    #[error(
        "component {component} has {slices} state slices for {count} entries that may have them"
    )]
    SliceCount {
        /// Place in [`Layout::components`].
        component: usize,
        /// Slices found.
        slices: usize,
        /// Entries of a state, 0 for KV and aux.
        count: usize,
    },
    /// A slice's numbers are out of range, or do not divide the item.
    #[error(
        "entry {entry} of component {component} has slots of {len} bytes, which are not {rows} rows of {dim} channels, at most {SLICE_ROWS_MAX} rows, {SLICE_DIM_MAX} channels and {SLICE_GROUPS_MAX} sub-blocks"
    )]
    Slice {
        /// Place in [`Layout::components`].
        component: usize,
        /// Place in [`Component::entries`].
        entry: usize,
        /// Bytes of one slot.
        len: u64,
        /// Rows claimed.
        rows: u32,
        /// Channels claimed.
        dim: u32,
    },
    /// The buffer ends beyond [`BUFFER_END_MAX`].
    #[error(
        "entry {entry} of component {component} ends beyond {BUFFER_END_MAX} bytes: {count} items of {len} bytes from {offset}"
    )]
    BufferEnd {
        /// Place in [`Layout::components`].
        component: usize,
        /// Place in [`Component::entries`].
        entry: usize,
        /// Where the buffer starts in its region.
        offset: u64,
        /// Bytes of one item.
        len: u64,
        /// Items.
        count: u64,
    },
}

impl Layout {
    /// Checks everything that pairing and the cursors rely on, so that a hostile layout can neither overflow an
    /// offset nor cost unbounded memory. Whether the buffers lie inside their regions is the owner's to check: only
    /// the owner knows the regions.
    ///
    /// # Errors
    /// The first [`LayoutError`] found.
    pub fn validate(&self) -> Result<(), LayoutError> {
        name("KV dtype", &self.kv_dtype)?;
        name("KV layout", &self.kv_layout)?;
        within("page size", self.page_size, 1, PAGE_SIZE_MAX)?;
        shard("tp", self.tp)?;
        shard("pp", self.pp)?;
        within("last layer", self.layers.end, 0, LAYERS_MAX)?;
        if self.layers.start > self.layers.end {
            let Range { start, end } = self.layers;
            return Err(LayoutError::LayersReversed { start, end });
        }
        self.validate_heads()?;
        let count = self.components.len();
        if count > COMPONENTS_MAX {
            return Err(LayoutError::TooManyComponents { count });
        }
        if count == 0 && !self.is_raw() {
            return Err(LayoutError::NoKv);
        }
        for (at, component) in self.components.iter().enumerate() {
            let in_order = match &component.kind {
                ComponentKind::Kv => at == 0,
                ComponentKind::State(_) => at > 0,
                ComponentKind::Aux => at > 0 && at + 1 == count,
            };
            if !in_order {
                let kind = component.kind.clone();
                return Err(LayoutError::ComponentOrder {
                    component: at,
                    kind,
                });
            }
            self.validate_component(at, component)?;
        }
        Ok(())
    }

    fn validate_heads(&self) -> Result<(), LayoutError> {
        let Attention::Heads {
            total_kv_heads: total,
            rank_kv_heads: held,
        } = self.attention
        else {
            return Ok(());
        };
        within("total KV heads", total, 1, HEADS_MAX)?;
        let tp_size = self.tp.size;
        if total.max(tp_size) % total.min(tp_size) != 0 {
            return Err(LayoutError::HeadsUneven { total, tp_size });
        }
        let expected = (total / tp_size).max(1);
        if held != expected {
            return Err(LayoutError::HeadsPerRank {
                held,
                total,
                tp_size,
                expected,
            });
        }
        Ok(())
    }

    fn validate_component(&self, at: usize, component: &Component) -> Result<(), LayoutError> {
        if let ComponentKind::State(state) = &component.kind {
            name("state type", state)?;
        }
        let count = component.entries.len();
        if count > ENTRIES_MAX {
            return Err(LayoutError::TooManyEntries {
                component: at,
                count,
            });
        }
        Self::validate_state(at, component)?;
        let is_kv = component.kind == ComponentKind::Kv;
        let draft_max = if is_kv { count } else { 0 };
        if component.draft_entries as usize > draft_max {
            let draft = component.draft_entries;
            return Err(LayoutError::DraftEntries {
                component: at,
                draft,
                count: draft_max,
            });
        }
        let main = component.main_entries();
        if is_kv
            && matches!(self.attention, Attention::Heads { .. })
            && !main.len().is_multiple_of(2)
        {
            return Err(LayoutError::OddHalves {
                component: at,
                count: main.len(),
            });
        }
        let named = main.iter().filter(|entry| entry.layer_id.is_some()).count();
        if named != 0 && named != main.len() {
            return Err(LayoutError::LayerIdsPartial {
                component: at,
                named,
                count: main.len(),
            });
        }
        for (place, entry) in component.entries.iter().enumerate() {
            entry.validate(at, place)?;
            if is_kv && place < main.len() {
                self.validate_page(at, place, entry.item_len)?;
            }
        }
        Ok(())
    }

    fn validate_state(at: usize, component: &Component) -> Result<(), LayoutError> {
        let StateShape {
            slices,
            page_layout,
        } = &component.state;
        if let Some(page_layout) = page_layout {
            name("state page layout", page_layout)?;
        }
        let count = match component.kind {
            ComponentKind::State(_) => component.entries.len(),
            ComponentKind::Kv | ComponentKind::Aux => 0,
        };
        if !slices.is_empty() && slices.len() != count {
            return Err(LayoutError::SliceCount {
                component: at,
                slices: slices.len(),
                count,
            });
        }
        for (place, (slice, entry)) in slices.iter().zip(&component.entries).enumerate() {
            let channels = u64::from(slice.dim) * u64::from(slice.rows);
            let is_bounded = (1..=SLICE_ROWS_MAX).contains(&slice.rows)
                && slice.dim <= SLICE_DIM_MAX
                && slice.groups.len() <= SLICE_GROUPS_MAX
                && slice.groups.iter().all(|group| *group > 0);
            let is_even = slice.dim == 0 || entry.item_len.is_multiple_of(channels);
            if !is_bounded || !is_even {
                return Err(LayoutError::Slice {
                    component: at,
                    entry: place,
                    len: entry.item_len,
                    rows: slice.rows,
                    dim: slice.dim,
                });
            }
        }
        Ok(())
    }

    /// Draft entries are left out: a draft model may have other heads, and is only checked when it must be cut.
    fn validate_page(&self, component: usize, entry: usize, len: u64) -> Result<(), LayoutError> {
        let Attention::Heads {
            rank_kv_heads: heads,
            ..
        } = self.attention
        else {
            return Ok(());
        };
        let page_size = self.page_size;
        if self.kv_layout == NHD && !len.is_multiple_of(u64::from(page_size) * u64::from(heads)) {
            return Err(LayoutError::ItemUneven {
                component,
                entry,
                len,
                page_size,
                heads,
            });
        }
        Ok(())
    }
}

impl Entry {
    fn validate(&self, component: usize, entry: usize) -> Result<(), LayoutError> {
        let Self {
            offset,
            item_len: len,
            item_count: count,
            ..
        } = *self;
        if len > ITEM_LEN_MAX {
            return Err(LayoutError::ItemLen {
                component,
                entry,
                len,
            });
        }
        let end = len
            .checked_mul(count)
            .and_then(|bytes| bytes.checked_add(offset));
        if end.is_none_or(|end| end > BUFFER_END_MAX) {
            return Err(LayoutError::BufferEnd {
                component,
                entry,
                offset,
                len,
                count,
            });
        }
        Ok(())
    }
}

fn name(what: &'static str, name: &str) -> Result<(), LayoutError> {
    let len = name.len();
    if len == 0 || len > NAME_LEN_MAX {
        return Err(LayoutError::NameLength { what, len });
    }
    Ok(())
}

fn within(what: &'static str, value: u32, min: u32, max: u32) -> Result<(), LayoutError> {
    if value < min || value > max {
        let (value, min, max) = (value.into(), min.into(), max.into());
        return Err(LayoutError::OutOfRange {
            what,
            value,
            min,
            max,
        });
    }
    Ok(())
}

fn shard(group: &'static str, shard: Shard) -> Result<(), LayoutError> {
    let what = if group == "tp" {
        "tensor-parallel size"
    } else {
        "pipeline-parallel size"
    };
    within(what, shard.size, 1, SHARDS_MAX)?;
    if shard.rank >= shard.size {
        return Err(LayoutError::Rank {
            group,
            rank: shard.rank,
            size: shard.size,
        });
    }
    Ok(())
}
