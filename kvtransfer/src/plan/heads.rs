//! Which KV heads a source rank moves to a target rank when their tensor-parallel sizes differ.
//!
//! With as many heads as ranks or more, rank `r` of `n` holds the `total/n` heads from `r*total/n`; with fewer, each
//! head is held by `n/total` consecutive ranks. This is what SGLang computes from the total head count in
//! `compute_head_slice_params` (`srt/disaggregation/common/staging_buffer.py:773-806`), with two differences. Where
//! several source ranks hold a copy of one head, SGLang lets all of them write it; here the first one does, so
//! that every byte is written once. And a replicated target head is found by dividing its rank, not by a modulus
//! (which picked the wrong head in older releases).
#![forbid(unsafe_code)]

use super::mismatch::LayoutMismatch;
use crate::layout::{Attention, Layout, NHD, Shard};

/// What of each item this source rank moves to this target rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// All of it.
    Whole,
    /// Some heads of every token.
    Cut(Cut),
    /// Nothing: another source rank moves the same bytes.
    Nothing,
}

/// A run of heads, by place within either rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Heads moved, at least 1.
    pub(super) heads: u32,
    /// The first moved head within the source rank's.
    pub(super) source_first: u32,
    /// Heads on the source rank.
    pub(super) source_heads: u32,
    /// The first moved head within the target rank's.
    pub(super) target_first: u32,
    /// Heads on the target rank.
    pub(super) target_heads: u32,
}

/// Checks that the source rank feeds the target rank: the smaller group's rank covers a block of consecutive ranks
/// of the larger group, as decode ranks choose their sources (`common/conn.py:1432-1530`).
pub(super) fn ranks_meet(source: Shard, target: Shard) -> Result<(), LayoutMismatch> {
    let (large, small) = if source.size >= target.size {
        (source, target)
    } else {
        (target, source)
    };
    if large.size % small.size != 0 {
        let (source_tp, target_tp) = (source.size, target.size);
        return Err(LayoutMismatch::TpSizes {
            source_tp,
            target_tp,
        });
    }
    if large.rank / (large.size / small.size) != small.rank {
        return Err(LayoutMismatch::TpRanks {
            source_tp: source,
            target_tp: target,
        });
    }
    Ok(())
}

/// Whether the source is the first of the source ranks that feed the target. It alone moves what all of them hold.
pub(super) fn leads_block(source: Shard, target: Shard) -> bool {
    source.size <= target.size || source.rank.is_multiple_of(source.size / target.size)
}

/// The share of the KV pages, of layouts that are valid, of the same attention, and whose ranks meet.
pub(super) fn kv_share(source: &Layout, target: &Layout) -> Result<Share, LayoutMismatch> {
    let Attention::Heads {
        total_kv_heads: total,
        rank_kv_heads: source_heads,
    } = source.attention
    else {
        let leads = leads_block(source.tp, target.tp);
        return Ok(if leads { Share::Whole } else { Share::Nothing });
    };
    let target_heads = target.attention.rank_heads();
    if source.tp.size == target.tp.size {
        return Ok(Share::Whole);
    }
    if !leads_copies(source.tp, target.tp, total) {
        return Ok(Share::Nothing);
    }
    let (source_head, target_head) = (first_head(source.tp, total), first_head(target.tp, total));
    let first = source_head.max(target_head);
    let end = (source_head + source_heads).min(target_head + target_heads);
    debug_assert!(first < end, "ranks that meet share a head");
    let heads = end - first;
    if heads == source_heads && heads == target_heads {
        return Ok(Share::Whole);
    }
    if source.kv_layout != NHD {
        return Err(LayoutMismatch::SliceLayout {
            kv_layout: source.kv_layout.clone(),
            source_tp: source.tp.size,
            target_tp: target.tp.size,
        });
    }
    let (source_first, target_first) = (first - source_head, first - target_head);
    Ok(Share::Cut(Cut {
        heads,
        source_first,
        source_heads,
        target_first,
        target_heads,
    }))
}

/// The first head that a rank holds. Sizes are bounded by validation, but the product still needs 64 bits.
fn first_head(tp: Shard, total: u32) -> u32 {
    let first = u64::from(tp.rank) * u64::from(total) / u64::from(tp.size);
    u32::try_from(first).expect("invariant: rank < size, so the head is below the total")
}

/// Whether the source is the first rank of the target's block that holds its heads.
fn leads_copies(source: Shard, target: Shard, total: u32) -> bool {
    if source.size <= target.size || source.size <= total {
        return true;
    }
    let block = source.size / target.size;
    let copies = source.size / total;
    let first_holder = source.rank / copies * copies;
    let block_start = source.rank / block * block;
    source.rank == first_holder.max(block_start)
}
