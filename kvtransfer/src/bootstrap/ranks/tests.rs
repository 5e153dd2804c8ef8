//! The mapping against the property it exists for: every decode rank sees every head and layer it needs, once.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const SIZES: [u32; 5] = [1, 2, 4, 8, 16];

fn prefill(attn_tp_size: u32, attn_cp_size: u32, pp_size: u32) -> PrefillShape {
    PrefillShape {
        attn_tp_size,
        attn_cp_size,
        dp_size: 4,
        pp_size,
        follow_bootstrap_room: true,
        enable_dsa_cache_layer_split: false,
        enable_kv_cache_sharding: false,
    }
}

fn decode(attn_tp_rank: u32, attn_tp_size: u32, is_mla: bool) -> DecodeRank {
    DecodeRank {
        attn_tp_rank,
        attn_tp_size,
        attn_cp_size: 1,
        pp_rank: 0,
        pp_size: 1,
        is_mla,
        all_cp_ranks: false,
    }
}

fn target(cp: u32, tp: u32, pp: u32, is_dummy: bool) -> Target {
    Target {
        dp: 3,
        cp,
        tp,
        pp,
        is_dummy,
    }
}

#[test]
fn tp_sizes_map_as_in_sglang() {
    let same = map_ranks(&prefill(4, 1, 1), &decode(2, 4, false), 3).unwrap();
    assert_eq!(same.targets, [target(0, 2, 0, false)]);
    assert_eq!(
        (
            same.required_dst_info_num,
            same.required_prefill_response_num
        ),
        (1, 1)
    );

    let wider = map_ranks(&prefill(2, 1, 1), &decode(5, 8, false), 3).unwrap();
    assert_eq!(wider.targets, [target(0, 1, 0, false)]);
    assert_eq!(
        (
            wider.required_dst_info_num,
            wider.required_prefill_response_num
        ),
        (4, 1)
    );

    let narrower = map_ranks(&prefill(4, 1, 1), &decode(1, 2, false), 3).unwrap();
    assert_eq!(
        narrower.targets,
        [target(0, 2, 0, false), target(0, 3, 0, false)]
    );
    assert_eq!(
        (
            narrower.required_dst_info_num,
            narrower.required_prefill_response_num
        ),
        (1, 2)
    );

    let latent = map_ranks(&prefill(4, 1, 1), &decode(1, 2, true), 3).unwrap();
    assert_eq!(
        latent.targets,
        [target(0, 2, 0, false), target(0, 3, 0, true)]
    );
    assert_eq!(
        (
            latent.required_dst_info_num,
            latent.required_prefill_response_num
        ),
        (1, 1)
    );
}

#[test]
fn stages_and_cp_ranks_multiply_the_answers() {
    let stages = map_ranks(&prefill(1, 1, 3), &decode(0, 1, false), 3).unwrap();
    assert_eq!(
        stages.targets,
        [
            target(0, 0, 2, false),
            target(0, 0, 1, false),
            target(0, 0, 0, false)
        ]
    );
    assert_eq!(stages.required_prefill_response_num, 3);

    let one_cp = map_ranks(&prefill(1, 4, 1), &decode(0, 1, true), 3).unwrap();
    assert_eq!(
        (one_cp.targets.len(), one_cp.required_prefill_response_num),
        (1, 1)
    );
    let mut all_cp = decode(0, 1, true);
    all_cp.all_cp_ranks = true;
    let all_cp = map_ranks(&prefill(1, 4, 1), &all_cp, 3).unwrap();
    assert_eq!(
        (all_cp.targets.len(), all_cp.required_prefill_response_num),
        (4, 4)
    );
}

#[test]
fn sharded_latent_pages_come_from_every_rank() {
    let mut sharded = prefill(4, 1, 1);
    sharded.enable_kv_cache_sharding = true;
    let pages = map_ranks(&sharded, &decode(1, 4, true), 3).unwrap();
    assert!(pages.targets.len() == 4 && pages.targets.iter().all(|target| !target.is_dummy));
    assert_eq!(
        (
            pages.required_dst_info_num,
            pages.required_prefill_response_num
        ),
        (4, 4)
    );
    assert_eq!(
        map_ranks(&sharded, &decode(1, 2, true), 3),
        Err(MappingError::ShardedTpDiffers {
            prefill: 4,
            decode: 2
        })
    );
}

#[test]
fn impossible_shapes_are_sentences() {
    let fails = |prefill: &PrefillShape, decode: &DecodeRank| {
        map_ranks(prefill, decode, 3).unwrap_err().to_string()
    };
    assert_eq!(
        fails(&prefill(4, 1, 1), &decode(0, 6, false)),
        "prefill attention TP 4 and decode attention TP 6: one must divide the other"
    );
    assert_eq!(
        fails(&prefill(6, 1, 1), &decode(0, 4, true)),
        "prefill attention TP 6 and decode attention TP 4: one must divide the other"
    );
    let mut staged = decode(0, 1, false);
    staged.pp_size = 2;
    assert_eq!(
        fails(&prefill(1, 1, 4), &staged),
        "decode pipeline size 2 must be 1 or equal to the prefill's 4"
    );
    let mut split = decode(0, 1, false);
    split.attn_cp_size = 2;
    assert_eq!(
        fails(&prefill(1, 2, 1), &split),
        "decode attention CP size must be 1, got 2"
    );
    assert_eq!(
        fails(&prefill(0, 1, 1), &decode(0, 1, false)),
        "prefill attention TP size 0 is not in 1..=65536"
    );
    assert_eq!(
        fails(&prefill(1, 1, 1), &decode(2, 2, false)),
        "decode attention TP rank 2 is not below its size 2"
    );
    assert_eq!(
        map_ranks(&prefill(1, 1, 1), &decode(0, 1, false), 4),
        Err(MappingError::Rank {
            axis: "prefill DP",
            rank: 4,
            size: 4
        })
    );
    assert!(
        map_ranks(
            &prefill(u32::MAX, u32::MAX, u32::MAX),
            &decode(0, 1, false),
            3
        )
        .is_err()
    );
}

#[test]
fn dp_rank_sources_are_tried_in_order() {
    let mut shape = prefill(1, 1, 1);
    let resolve =
        |shape: &PrefillShape, explicit, force| resolve_dp_rank(explicit, shape, force, u64::MAX);
    assert_eq!(resolve(&shape, Some(2), true), Ok(DpRank::Known(2)));
    assert!(resolve(&shape, Some(4), false).is_err());
    assert_eq!(
        resolve(&shape, None, false),
        Ok(DpRank::Known(3)),
        "room % dp"
    );
    assert_eq!(resolve(&shape, None, true), Ok(DpRank::Query));
    shape.follow_bootstrap_room = false;
    assert_eq!(resolve(&shape, None, false), Ok(DpRank::Query));
    shape.dp_size = 1;
    assert_eq!(
        resolve(&shape, None, true),
        Ok(DpRank::Known(0)),
        "the only rank needs no query"
    );
    shape.dp_size = 0;
    assert!(resolve(&shape, None, false).is_err());
}

proptest! {
    /// Heads are numbered 0..16; TP rank r of n holds heads r*16/n .. (r+1)*16/n.
    #[test]
    fn every_head_and_layer_arrives_exactly_once(
        theirs in prop::sample::select(&SIZES[..]),
        ours in prop::sample::select(&SIZES[..]),
        stages in 1_u32..5,
        keeps_stages in any::<bool>(),
        is_mla in any::<bool>(),
    ) {
        let shape = prefill(theirs, 1, stages);
        let our_stages = if keeps_stages { stages } else { 1 };
        let mut asked: HashMap<(u32, u32), u32> = HashMap::new();
        for tp_rank in 0..ours {
            for pp_rank in 0..our_stages {
                let rank = DecodeRank { pp_rank, pp_size: our_stages, ..decode(tp_rank, ours, is_mla) };
                let mapping = map_ranks(&shape, &rank, 0).unwrap();
                let mut heads: HashMap<(u32, u32), u32> = HashMap::new();
                for target in &mapping.targets {
                    *asked.entry((target.tp, target.pp)).or_default() += 1;
                    prop_assert!(target.tp < theirs && target.pp < stages && target.cp == 0);
                    if target.is_dummy {
                        prop_assert!(is_mla);
                        continue;
                    }
                    let width = 16 / theirs;
                    let (from, to) = if is_mla { (0, 16) } else { (target.tp * width, (target.tp + 1) * width) };
                    for head in from..to {
                        *heads.entry((head, target.pp)).or_default() += 1;
                    }
                }
                let width = 16 / ours;
                let wanted_stages = if keeps_stages { pp_rank..pp_rank + 1 } else { 0..stages };
                for stage in wanted_stages {
                    for head in tp_rank * width..(tp_rank + 1) * width {
                        prop_assert_eq!(heads.get(&(head, stage)), Some(&1));
                    }
                }
                let real = mapping.targets.iter().filter(|target| !target.is_dummy).count();
                prop_assert_eq!(u32::try_from(real), Ok(mapping.required_prefill_response_num));
                let dst_infos = if ours > theirs { ours / theirs } else { 1 };
                prop_assert_eq!(mapping.required_dst_info_num, dst_infos);
            }
        }
        // Each prefill rank hears from exactly as many decode ranks as it waits for, dummies included.
        for tp in 0..theirs {
            for pp in 0..stages {
                let waits_for = if ours > theirs { ours / theirs } else { 1 };
                prop_assert_eq!(asked.get(&(tp, pp)), Some(&waits_for));
            }
        }
    }

    #[test]
    fn any_numbers_give_a_mapping_or_a_sentence(
        sizes in prop::array::uniform8(prop_oneof![0_u32..20, any::<u32>()]),
        flags in prop::array::uniform5(any::<bool>()),
        dp_rank in any::<u32>(),
    ) {
        let [tp, cp, pp, dp, our_tp, our_rank, our_pp, our_pp_rank] = sizes;
        let shape = PrefillShape {
            attn_tp_size: tp, attn_cp_size: cp, dp_size: dp, pp_size: pp,
            follow_bootstrap_room: flags[0],
            enable_dsa_cache_layer_split: flags[1],
            enable_kv_cache_sharding: flags[2],
        };
        let rank = DecodeRank {
            attn_tp_rank: our_rank, attn_tp_size: our_tp, attn_cp_size: 1,
            pp_rank: our_pp_rank, pp_size: our_pp, is_mla: flags[3], all_cp_ranks: flags[4],
        };
        if let Ok(mapping) = map_ranks(&shape, &rank, dp_rank) {
            prop_assert!(mapping.targets.len() <= SIZE_MAX as usize);
            prop_assert!(mapping.required_prefill_response_num >= 1);
        }
    }
}
