//! How each of SGLang's state types moves between two ranks, or why it cannot.
//!
//! | type | equal TP | unequal TP |
//! |---|---|---|
//! | mamba | whole slots | channels, by their slices; replicated tensors from one rank |
//! | swa | whole pages | heads of every token, as KV |
//! | qsa_pending, qsa_compressed | whole | whole, from one rank: every rank holds the same |
//! | minimax_* | whole, one pipeline stage | refused |
//! | dsa, dsa_tail, swa_ring, c128_state, request_row, block_scale*, others | whole | latent models: whole, from one rank; else refused |
//!
//! From `maybe_send_extra` in SGLang 0.5.23's `disaggregation/mooncake/conn.py`, with three differences: what SGLang
//! raises in a worker thread is refused here when the ranks meet; of several ranks that hold the same bytes one moves them;
//! and lengths that do not divide are refused, not rounded down.
#![forbid(unsafe_code)]

use super::{
    heads::{self, Share},
    mismatch::LayoutMismatch,
    pairing::{Piece, Side},
};
use crate::layout::{Attention, ComponentKind, Entry, Layout, NHD, StateSlice};

const MAMBA: &str = "mamba";
const SWA: &str = "swa";
const DSA: &str = "dsa";

/// How a state component moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// As that share of every item.
    Share(Share),
    /// By the slices of its tensors.
    Sliced,
}

/// How the state component at `place` moves; `kv` is the share of the KV pages.
pub(super) fn way(
    source: &Layout,
    target: &Layout,
    place: usize,
    name: &str,
    kv: Share,
) -> Result<Way, LayoutMismatch> {
    let kind = &source.components[place].kind;
    if name.starts_with("minimax_") && source.pp.size.max(target.pp.size) > 1 {
        return Err(LayoutMismatch::StateStages {
            state: kind.clone(),
            source_pp: source.pp.size,
            target_pp: target.pp.size,
        });
    }
    if source.tp.size == target.tp.size {
        return Ok(Way::Share(Share::Whole));
    }
    let leads = heads::leads_block(source.tp, target.tp);
    let replicated = if leads { Share::Whole } else { Share::Nothing };
    let is_latent = source.attention == Attention::Latent;
    match name {
        MAMBA if has_slices(source, place) && has_slices(target, place) => Ok(Way::Sliced),
        MAMBA if is_latent && !has_slices(source, place) && !has_slices(target, place) => {
            Ok(Way::Share(kv))
        }
        MAMBA => Err(LayoutMismatch::StateUnsliced {
            state: kind.clone(),
            source_tp: source.tp.size,
            target_tp: target.tp.size,
        }),
        "qsa_pending" | "qsa_compressed" => Ok(Way::Share(replicated)),
        SWA => page_layout(source, target, place).map(|()| Way::Share(kv)),
        _ if is_latent && !name.starts_with("minimax_") => Ok(Way::Share(kv)),
        _ => Err(LayoutMismatch::StateTp {
            state: kind.clone(),
            source_tp: source.tp.size,
            target_tp: target.tp.size,
        }),
    }
}

/// Whether the buffers are one half for keys and one for values, of a layer each, where stages differ. Everything else
/// has a buffer per layer.
pub(super) fn has_halves(name: &str, attention: Attention) -> bool {
    let is_paged = matches!(name, SWA | "block_scale" | "block_scale_swa");
    // The tail's halves are its keys and their scores.
    name == "dsa_tail" || is_paged && matches!(attention, Attention::Heads { .. })
}

/// Whether a buffer that only the target has left out is skipped (a decode side that keeps no indexer of its own).
pub(super) fn may_target_elide(kind: &ComponentKind) -> bool {
    matches!(kind, ComponentKind::State(name) if name == DSA)
}

fn has_slices(layout: &Layout, place: usize) -> bool {
    !layout.components[place].state.slices.is_empty()
}

/// Heads can be cut out of "nhd" pages only.
fn page_layout(source: &Layout, target: &Layout, place: usize) -> Result<(), LayoutMismatch> {
    for layout in [source, target] {
        let own = layout.components[place].state.page_layout.as_ref();
        let of_state = own.unwrap_or(&layout.kv_layout);
        if of_state != NHD && layout.attention != Attention::Latent {
            return Err(LayoutMismatch::SliceLayout {
                kv_layout: of_state.clone(),
                source_tp: source.tp.size,
                target_tp: target.tp.size,
            });
        }
    }
    Ok(())
}

/// The pieces of one tensor of a sliced state: one per run of channels, a row per row of the tensor.
pub(super) fn slice_pieces(
    source: &Layout,
    target: &Layout,
    place: usize,
    (from, to): (usize, usize),
) -> Result<Vec<Piece>, LayoutMismatch> {
    let (source_part, target_part) = (&source.components[place], &target.components[place]);
    let (source_entry, target_entry) = (&source_part.entries[from], &target_part.entries[to]);
    let (source_slice, target_slice) = (
        &source_part.state.slices[from],
        &target_part.state.slices[to],
    );
    let lengths = (source_entry.item_len, target_entry.item_len);
    let unlike = |what| LayoutMismatch::StateSlices {
        state: source_part.kind.clone(),
        what,
        source_entry: from,
        source_len: lengths.0,
        source_dim: source_slice.dim,
        source_tp: source.tp.size,
        target_entry: to,
        target_len: lengths.1,
        target_dim: target_slice.dim,
        target_tp: target.tp.size,
    };
    match lengths {
        (0, 0) => return Ok(Vec::new()),
        (0, _) | (_, 0) => return Err(unlike("is empty on one side")),
        _ => {}
    }
    if source_slice.rows != target_slice.rows {
        return Err(unlike("has unlike numbers of rows"));
    }
    if (source_slice.dim == 0) != (target_slice.dim == 0) {
        return Err(unlike("is replicated on one side only"));
    }
    if source_slice.dim == 0 {
        if lengths.0 != lengths.1 {
            return Err(unlike("is replicated, but of unlike length"));
        }
        let leads = heads::leads_block(source.tp, target.tp);
        let whole = leads.then(|| whole_slot(source_entry, target_entry));
        return Ok(whole.into_iter().collect());
    }
    let (channel_len, other_len) = (
        source_slice.channel_len(lengths.0),
        target_slice.channel_len(lengths.1),
    );
    let total = u64::from(source_slice.dim) * u64::from(source.tp.size);
    if channel_len != other_len || total != u64::from(target_slice.dim) * u64::from(target.tp.size)
    {
        return Err(unlike("is not cut of the same tensor"));
    }
    let groups = groups(source_slice, total);
    let runs = runs(&groups, source, target)
        .ok_or_else(|| unlike("has sub-blocks that the ranks cannot share evenly"))?;
    let side = |entry: &Entry, channel: u64, channel_len: u64, dim: u32| Side {
        region: entry.region,
        base: entry.offset + channel * channel_len,
        item_stride: entry.item_len,
        row_stride: u64::from(dim) * channel_len,
        item_count: entry.item_count,
    };
    let piece = |(first, other, count): (u64, u64, u64)| Piece {
        source: side(source_entry, first, channel_len, source_slice.dim),
        target: side(target_entry, other, channel_len, target_slice.dim),
        rows: source_slice.rows,
        row_len: count * channel_len,
    };
    Ok(runs.into_iter().map(piece).collect())
}

/// A slot that every rank holds in full.
fn whole_slot(source: &Entry, target: &Entry) -> Piece {
    let side = |entry: &Entry| Side {
        region: entry.region,
        base: entry.offset,
        item_stride: entry.item_len,
        row_stride: entry.item_len,
        item_count: entry.item_count,
    };
    Piece {
        source: side(source),
        target: side(target),
        rows: 1,
        row_len: source.item_len,
    }
}

/// The sub-blocks that are sharded one by one: those of the slice if they make up the whole, else all in one.
fn groups(slice: &StateSlice, total: u64) -> Vec<u64> {
    let groups: Vec<u64> = slice.groups.iter().map(|group| u64::from(*group)).collect();
    if groups.iter().sum::<u64>() == total && total > 0 && !groups.is_empty() {
        groups
    } else {
        vec![total]
    }
}

/// For each sub-block that has any: first channel at the source, first at the target, channels. Both sides hold their
/// shares of the sub-blocks one after the other. `None` if a sub-block cannot be shared evenly.
fn runs(groups: &[u64], source: &Layout, target: &Layout) -> Option<Vec<(u64, u64, u64)>> {
    let (source_tp, target_tp) = (source.tp, target.tp);
    let (mut from, mut to) = (0, 0);
    let mut runs = Vec::with_capacity(groups.len());
    for group in groups {
        let shares = [source_tp, target_tp].map(|tp| {
            let is_even = group.is_multiple_of(tp.size.into());
            is_even.then(|| (group / u64::from(tp.size), u64::from(tp.rank)))
        });
        let [Some((held, rank)), Some((wanted, other))] = shares else {
            return None;
        };
        // In channels of the whole sub-block; ranks that meet have a share in common.
        let first = (rank * held).max(other * wanted);
        let end = ((rank + 1) * held).min((other + 1) * wanted);
        if first < end {
            runs.push((
                from + first - rank * held,
                to + first - other * wanted,
                end - first,
            ));
        }
        from += held;
        to += wanted;
    }
    Some(runs)
}

impl StateSlice {
    /// Bytes of one channel of one row. Validation has seen to it that they divide.
    fn channel_len(&self, item_len: u64) -> u64 {
        let channels = u64::from(self.dim) * u64::from(self.rows);
        item_len.checked_div(channels).unwrap_or(0)
    }
}
