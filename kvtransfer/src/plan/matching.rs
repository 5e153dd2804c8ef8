//! Which buffer of the source goes to which buffer of the target.
//!
//! By position within the common layers, or by layer id where the pool names its layers. The rules are SGLang's
//! (`common/conn.py:1718-1749, 1853-1896` for positions, `build_transfer_entry_pairs` in `disaggregation/utils.py:1067`
//! for ids), except that a buffer which finds no partner is refused at both ends, not only at the source.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::mismatch::{End, LayoutMismatch};
use crate::layout::{Component, ComponentKind, Entry, Layout};

/// Two indices into the source's and the target's entries.
pub(super) type EntryPair = (usize, usize);

/// Checks that no layer is lost between two pipeline stages. Equal pipelines pair stage with stage, so their ranges
/// must agree; a pipeline of one must hold all that the other's stage holds (`common/conn.py:1500-1530`).
pub(super) fn layers_meet(source: &Layout, target: &Layout) -> Result<(), LayoutMismatch> {
    let (from, to) = (&source.layers, &target.layers);
    if from == to {
        return Ok(());
    }
    if common_layers(from, to).is_empty() {
        let (source_layers, target_layers) = (from.clone(), to.clone());
        return Err(LayoutMismatch::LayersDisjoint {
            source_layers,
            target_layers,
        });
    }
    let source_lacks = source.pp.size == 1 && !covers(from, to);
    let target_lacks = target.pp.size == 1 && !covers(to, from);
    if source.pp.size == target.pp.size || source_lacks || target_lacks {
        return Err(LayoutMismatch::LayersUncovered {
            source_pp: source.pp,
            source_layers: from.clone(),
            target_pp: target.pp,
            target_layers: to.clone(),
        });
    }
    Ok(())
}

/// Whether the source stage holds the target's last layer. Of several stages it alone moves what is not sliced by
/// layers: the draft model's buffers and the aux rows, whose values (the sampled token) exist on the last stage.
pub(super) fn leads_stages(source: &Layout, target: &Layout) -> bool {
    source.layers.end >= target.layers.end
}

/// Pairs the entries of a KV or state component that do not belong to a draft model. `halves` says that the entries
/// are all K layers, then all V layers.
pub(super) fn main_pairs(
    source: &Layout,
    target: &Layout,
    place: usize,
    halves: bool,
) -> Result<Vec<EntryPair>, LayoutMismatch> {
    let (from, to) = (&source.components[place], &target.components[place]);
    let (from_main, to_main) = (from.main_entries(), to.main_entries());
    match (named(from_main), named(to_main)) {
        (Some(true), Some(true)) => by_layer_id(source, target, place),
        (Some(true), Some(false)) => one_sided(&from.kind, End::Source),
        (Some(false), Some(true)) => one_sided(&from.kind, End::Target),
        _ if source.layers == target.layers => {
            let (source_entries, target_entries) = (from_main.len(), to_main.len());
            if source_entries != target_entries {
                let component = from.kind.clone();
                return Err(LayoutMismatch::Entries {
                    component,
                    source_entries,
                    target_entries,
                });
            }
            Ok((0..source_entries).map(|at| (at, at)).collect())
        }
        _ => by_layer_position(source, target, place, if halves { 2 } else { 1 }),
    }
}

/// Pairs the trailing draft entries by position. A side without a draft model takes or gives none: SGLang lets a
/// prefill run without speculation feed a decode run with it (`common/conn.py:1730-1742`).
pub(super) fn draft_pairs(
    from: &Component,
    to: &Component,
) -> Result<Vec<EntryPair>, LayoutMismatch> {
    let (source_entries, target_entries) = (from.draft_entries().len(), to.draft_entries().len());
    if source_entries == 0 || target_entries == 0 {
        return Ok(Vec::new());
    }
    if source_entries != target_entries {
        return Err(LayoutMismatch::DraftEntries {
            source_entries,
            target_entries,
        });
    }
    let (first, other) = (from.main_entries().len(), to.main_entries().len());
    Ok((0..source_entries)
        .map(|at| (first + at, other + at))
        .collect())
}

/// Pairs aux rows by position up to the shorter list, which is SGLang's rule: a side may keep rows at the end that the
/// other does not know (`mooncake/conn.py:1780-1803`). The room number closes the rows both know only if the lists
/// are equally long; with unlike lists the row that becomes visible last is the last *common* one.
pub(super) fn aux_pairs(from: &Component, to: &Component) -> Vec<EntryPair> {
    let common = from.entries.len().min(to.entries.len());
    (0..common).map(|at| (at, at)).collect()
}

fn one_sided(kind: &ComponentKind, named: End) -> Result<Vec<EntryPair>, LayoutMismatch> {
    Err(LayoutMismatch::LayerIdsOneSided {
        component: kind.clone(),
        named,
    })
}

/// Whether the entries have layer ids; `None` where there are no entries to ask.
fn named(entries: &[Entry]) -> Option<bool> {
    entries.first().map(|entry| entry.layer_id.is_some())
}

/// Ids may repeat (K and V of one layer, several tensors of one state) and are then paired in order. An id that one
/// side lacks is fine only where that side does not hold the layer.
fn by_layer_id(
    source: &Layout,
    target: &Layout,
    place: usize,
) -> Result<Vec<EntryPair>, LayoutMismatch> {
    let (from, to) = (&source.components[place], &target.components[place]);
    let mut layers: BTreeMap<u32, Partners> = BTreeMap::new();
    for (at, entry) in to.main_entries().iter().enumerate() {
        layers
            .entry(entry.layer_id.unwrap_or_default())
            .or_default()
            .unpaired
            .push_back(at);
    }
    let same_range = source.layers == target.layers;
    let mut pairs = Vec::with_capacity(from.main_entries().len());
    for (at, entry) in from.main_entries().iter().enumerate() {
        let layer = entry.layer_id.unwrap_or_default();
        let partners = layers.get_mut(&layer);
        let is_known = partners.is_some();
        if let Some(partner) = partners.and_then(Partners::pair) {
            pairs.push((at, partner));
        } else if is_known || same_range || target.layers.contains(&layer) {
            return Err(layer_mismatch(from, to, layer));
        }
    }
    for (layer, partners) in layers {
        let wanted = same_range || partners.paired || source.layers.contains(&layer);
        if wanted && !partners.unpaired.is_empty() {
            return Err(layer_mismatch(from, to, layer));
        }
    }
    Ok(pairs)
}

/// The target's entries of one layer.
#[derive(Default)]
struct Partners {
    unpaired: VecDeque<usize>,
    /// Whether the source has at least one entry of this layer.
    paired: bool,
}

impl Partners {
    fn pair(&mut self) -> Option<usize> {
        self.paired = true;
        self.unpaired.pop_front()
    }
}

fn layer_mismatch(from: &Component, to: &Component, layer: u32) -> LayoutMismatch {
    let count = |component: &Component| {
        let main = component.main_entries().iter();
        main.filter(|entry| entry.layer_id == Some(layer)).count()
    };
    LayoutMismatch::LayerId {
        component: from.kind.clone(),
        layer,
        source_entries: count(from),
        target_entries: count(to),
    }
}

/// Unlike layer ranges: within each of `groups` equal parts there must be one entry per layer, and the layers in
/// common are paired.
fn by_layer_position(
    source: &Layout,
    target: &Layout,
    place: usize,
    groups: usize,
) -> Result<Vec<EntryPair>, LayoutMismatch> {
    let from_group = per_layer(source, target, End::Source, place, groups)?;
    let to_group = per_layer(source, target, End::Target, place, groups)?;
    let common = common_layers(&source.layers, &target.layers);
    let mut pairs = Vec::with_capacity(groups * common.len());
    for group in 0..groups {
        for layer in common.clone() {
            let from = (layer - source.layers.start) as usize;
            let to = (layer - target.layers.start) as usize;
            pairs.push((group * from_group + from, group * to_group + to));
        }
    }
    Ok(pairs)
}

/// Entries per group, which must be the layers held.
fn per_layer(
    source: &Layout,
    target: &Layout,
    end: End,
    place: usize,
    groups: usize,
) -> Result<usize, LayoutMismatch> {
    let layout = if end == End::Source { source } else { target };
    let component = &layout.components[place];
    let (count, layers) = (component.main_entries().len(), layout.layers.len());
    if count != groups * layers {
        return Err(LayoutMismatch::EntriesPerLayer {
            component: component.kind.clone(),
            end,
            entries: count / groups,
            layers,
            source_layers: source.layers.clone(),
            target_layers: target.layers.clone(),
        });
    }
    Ok(layers)
}

fn common_layers(a: &Range<u32>, b: &Range<u32>) -> Range<u32> {
    a.start.max(b.start)..a.end.min(b.end)
}

fn covers(outer: &Range<u32>, inner: &Range<u32>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}
