//! Which prefill ranks one decode rank must talk to, and how many answers make a room complete.
//!
//! Follows `_resolve_rank_mapping` and `_setup_bootstrap_infos` of SGLang 0.5.23 (`common/conn.py:1432-1530`,
//! `:2614-2645`). Where Python would divide sizes that do not divide, and leave heads out without a word, this is an
//! error.

/// Largest parallel size accepted on any axis; with it no product below can overflow 64 bits.
pub const SIZE_MAX: u32 = 65_536;

/// The prefill side, from its server info.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillShape {
    /// `attn_tp_size`.
    pub attn_tp_size: u32,
    /// `attn_cp_size`.
    pub attn_cp_size: u32,
    /// `dp_size`.
    pub dp_size: u32,
    /// `pp_size`.
    pub pp_size: u32,
    /// `follow_bootstrap_room`.
    pub follow_bootstrap_room: bool,
    /// `enable_dsa_cache_layer_split`: every CP rank holds some layers.
    pub enable_dsa_cache_layer_split: bool,
    /// `enable_kv_cache_sharding`: every rank of the shard group holds some pages.
    pub enable_kv_cache_sharding: bool,
}

/// The decode rank that asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeRank {
    /// Its attention TP rank.
    pub attn_tp_rank: u32,
    /// Its attention TP size.
    pub attn_tp_size: u32,
    /// Its attention CP size; must be 1.
    pub attn_cp_size: u32,
    /// Its pipeline rank.
    pub pp_rank: u32,
    /// Its pipeline size.
    pub pp_size: u32,
    /// Whether the model's KV is pure MLA (latent, equal on every TP rank). Hybrid MLA counts as *not* MLA here.
    pub is_mla: bool,
    /// `SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER`: pull from every CP rank.
    pub all_cp_ranks: bool,
}

/// One prefill rank to connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Data-parallel group of the room.
    pub dp: u32,
    /// CP rank.
    pub cp: u32,
    /// TP rank.
    pub tp: u32,
    /// PP rank.
    pub pp: u32,
    /// Sends nothing (MLA: its latent cache is a copy), but must be told of the room so that it can finish its part.
    pub is_dummy: bool,
}

/// The outcome for one decode rank and one room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankMapping {
    /// Ranks to register with, in SGLang's order: CP, then TP ascending, then the highest PP stage first.
    pub targets: Vec<Target>,
    /// Metadata messages a prefill rank waits for before it starts the room.
    pub required_dst_info_num: u32,
    /// Prefill ranks that must report success before the room is complete here.
    pub required_prefill_response_num: u32,
}

/// Why no mapping exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// A size is 0 or beyond [`SIZE_MAX`].
    #[error("{axis} size {size} is not in 1..={SIZE_MAX}")]
    Size {
        /// Which one.
        axis: &'static str,
        /// Its value.
        size: u32,
    },
    /// A rank is not below its size.
    #[error("{axis} rank {rank} is not below its size {size}")]
    Rank {
        /// Which one.
        axis: &'static str,
        /// Its value.
        rank: u32,
        /// The size.
        size: u32,
    },
    /// Neither TP size divides the other, so heads cannot be cut evenly.
    #[error(
        "prefill attention TP {prefill} and decode attention TP {decode}: one must divide the other"
    )]
    TpDoesNotDivide {
        /// Prefill size.
        prefill: u32,
        /// Decode size.
        decode: u32,
    },
    /// Sharded MLA pages need equal TP sizes.
    #[error(
        "MLA KV cache sharding requires equal attention TP sizes, got prefill {prefill} and decode {decode}"
    )]
    ShardedTpDiffers {
        /// Prefill size.
        prefill: u32,
        /// Decode size.
        decode: u32,
    },
    /// Decode ranks never split the context.
    #[error("decode attention CP size must be 1, got {decode}")]
    DecodeCp {
        /// Decode size.
        decode: u32,
    },
    /// Pipelines can only be equal, or be gathered into one stage.
    #[error("decode pipeline size {decode} must be 1 or equal to the prefill's {prefill}")]
    Pp {
        /// Prefill size.
        prefill: u32,
        /// Decode size.
        decode: u32,
    },
}

/// Finds the prefill ranks that `decode` needs for a room of data-parallel group `dp_rank`.
///
/// # Errors
/// [`MappingError`], a sentence about the two shapes.
pub fn map_ranks(
    prefill: &PrefillShape,
    decode: &DecodeRank,
    dp_rank: u32,
) -> Result<RankMapping, MappingError> {
    check(prefill, decode, dp_rank)?;
    let tp = map_tp(prefill, decode)?;
    let (cp_ranks, cp_factor) = if prefill.attn_cp_size > 1
        && (decode.all_cp_ranks
            || prefill.enable_dsa_cache_layer_split
            || prefill.enable_kv_cache_sharding)
    {
        (0..prefill.attn_cp_size, prefill.attn_cp_size)
    } else {
        (0..1, 1)
    };
    let (pp_ranks, pp_factor) = if prefill.pp_size == decode.pp_size {
        (decode.pp_rank..decode.pp_rank + 1, 1)
    } else if decode.pp_size == 1 {
        (0..prefill.pp_size, prefill.pp_size)
    } else {
        return Err(MappingError::Pp {
            prefill: prefill.pp_size,
            decode: decode.pp_size,
        });
    };
    let mut targets = Vec::new();
    for cp in cp_ranks {
        for tp_rank in tp.ranks.clone() {
            for pp in pp_ranks.clone().rev() {
                let is_dummy = decode.is_mla && tp.only_real.is_some_and(|real| real != tp_rank);
                targets.push(Target {
                    dp: dp_rank,
                    cp,
                    tp: tp_rank,
                    pp,
                    is_dummy,
                });
            }
        }
    }
    Ok(RankMapping {
        targets,
        required_dst_info_num: tp.dst_infos,
        // At most one answer per target, and no more targets than SIZE_MAX ranks of a product checked below 2^32.
        required_prefill_response_num: tp
            .responses
            .saturating_mul(cp_factor)
            .saturating_mul(pp_factor),
    })
}

struct TpMapping {
    ranks: std::ops::Range<u32>,
    /// The one rank that sends, if the others' caches are copies of it.
    only_real: Option<u32>,
    dst_infos: u32,
    responses: u32,
}

fn map_tp(prefill: &PrefillShape, decode: &DecodeRank) -> Result<TpMapping, MappingError> {
    let (theirs, ours) = (prefill.attn_tp_size, decode.attn_tp_size);
    if decode.is_mla && prefill.enable_kv_cache_sharding && prefill.attn_cp_size == 1 {
        if theirs != ours {
            return Err(MappingError::ShardedTpDiffers {
                prefill: theirs,
                decode: ours,
            });
        }
        return Ok(TpMapping {
            ranks: 0..theirs,
            only_real: None,
            dst_infos: ours,
            responses: theirs,
        });
    }
    if ours >= theirs {
        if !ours.is_multiple_of(theirs) {
            return Err(MappingError::TpDoesNotDivide {
                prefill: theirs,
                decode: ours,
            });
        }
        let ratio = ours / theirs;
        let target = decode.attn_tp_rank / ratio;
        return Ok(TpMapping {
            ranks: target..target + 1,
            only_real: Some(target),
            dst_infos: ratio,
            responses: 1,
        });
    }
    if !theirs.is_multiple_of(ours) {
        return Err(MappingError::TpDoesNotDivide {
            prefill: theirs,
            decode: ours,
        });
    }
    let ratio = theirs / ours;
    let first = decode.attn_tp_rank * ratio;
    Ok(TpMapping {
        ranks: first..first + ratio,
        only_real: Some(first),
        dst_infos: 1,
        responses: if decode.is_mla { 1 } else { ratio },
    })
}

fn check(prefill: &PrefillShape, decode: &DecodeRank, dp_rank: u32) -> Result<(), MappingError> {
    for (axis, size) in [
        ("prefill attention TP", prefill.attn_tp_size),
        ("prefill attention CP", prefill.attn_cp_size),
        ("prefill DP", prefill.dp_size),
        ("prefill PP", prefill.pp_size),
        (
            "prefill world",
            prefill
                .attn_tp_size
                .saturating_mul(prefill.attn_cp_size)
                .saturating_mul(prefill.pp_size),
        ),
        ("decode attention TP", decode.attn_tp_size),
        ("decode PP", decode.pp_size),
    ] {
        if size == 0 || size > SIZE_MAX {
            return Err(MappingError::Size { axis, size });
        }
    }
    for (axis, rank, size) in [
        (
            "decode attention TP",
            decode.attn_tp_rank,
            decode.attn_tp_size,
        ),
        ("decode PP", decode.pp_rank, decode.pp_size),
        ("prefill DP", dp_rank, prefill.dp_size),
    ] {
        if rank >= size {
            return Err(MappingError::Rank { axis, rank, size });
        }
    }
    if decode.attn_cp_size != 1 {
        return Err(MappingError::DecodeCp {
            decode: decode.attn_cp_size,
        });
    }
    Ok(())
}

/// Where a room's data-parallel rank comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DpRank {
    /// It is known without asking.
    Known(u32),
    /// Only the registry knows: ask `POST /query_dp_ranks`.
    Query,
}

/// Resolves the data-parallel rank of a room, in SGLang's order (`decode.py`, `_resolve_prefill_dp_rank`): the rank the
/// request names, then the only one there is, then `room % dp_size` where the prefill follows rooms (unless
/// `SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK` is set), then the registry.
///
/// # Errors
/// [`MappingError`] if the named rank or the size is impossible.
pub fn resolve_dp_rank(
    explicit: Option<u32>,
    prefill: &PrefillShape,
    force_query: bool,
    room: u64,
) -> Result<DpRank, MappingError> {
    let size = prefill.dp_size;
    if size == 0 || size > SIZE_MAX {
        return Err(MappingError::Size {
            axis: "prefill DP",
            size,
        });
    }
    match explicit {
        Some(rank) if rank >= size => Err(MappingError::Rank {
            axis: "prefill DP",
            rank,
            size,
        }),
        Some(rank) => Ok(DpRank::Known(rank)),
        None if size == 1 => Ok(DpRank::Known(0)),
        None if prefill.follow_bootstrap_room && !force_query => {
            let rank =
                u32::try_from(room % u64::from(size)).expect("invariant: below a 32-bit size");
            Ok(DpRank::Known(rank))
        }
        None => Ok(DpRank::Query),
    }
}

#[cfg(test)]
mod tests;
