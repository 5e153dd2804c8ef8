//! Every reason to refuse a layout or a pairing, with the sentence the operator reads, and the rules of pairing that are
//! easier to read as examples than as properties.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kvtransfer::layout::{
    Attention, Component, ComponentKind, ENTRIES_MAX, Entry, ITEM_LEN_MAX, Layout, LayoutError,
    RegionId, Shard, StateShape,
};
use kvtransfer::plan::mismatch::LayoutMismatch;
use kvtransfer::plan::pairing::{Pairing, Piece, pair};
use kvtransfer::plan::stream::{ITEMS_MAX, ItemError, Stream, check_items};

const HEAD_LEN: u64 = 32;

fn entry(item_len: u64) -> Entry {
    Entry {
        region: RegionId(0),
        offset: 0,
        item_len,
        item_count: 10,
        layer_id: None,
    }
}

fn component(kind: ComponentKind, count: usize, item_len: u64) -> Component {
    Component {
        kind,
        entries: vec![entry(item_len); count],
        draft_entries: 0,
        state: StateShape::default(),
    }
}

fn state(name: &str, count: usize, item_len: u64) -> Component {
    component(ComponentKind::State(name.into()), count, item_len)
}

/// 4 layers of 8 heads, pages of 16 tokens, on rank `rank` of `tp`; KV and three aux rows.
fn gqa(rank: u32, tp: u32) -> Layout {
    let held = (8 / tp).max(1);
    let page = 16 * u64::from(held) * HEAD_LEN;
    let mut kv = component(ComponentKind::Kv, 8, page);
    for (at, entry) in kv.entries.iter_mut().enumerate() {
        entry.offset = at as u64 * 10 * page;
    }
    Layout {
        page_size: 16,
        kv_dtype: "bfloat16".into(),
        kv_layout: "nhd".into(),
        attention: Attention::Heads {
            total_kv_heads: 8,
            rank_kv_heads: held,
        },
        tp: Shard { rank, size: tp },
        pp: Shard::ONE,
        layers: 0..4,
        components: vec![kv, component(ComponentKind::Aux, 3, 64)],
    }
}

fn mla(rank: u32, tp: u32) -> Layout {
    let mut layout = gqa(rank, tp);
    layout.attention = Attention::Latent;
    layout.components[0] = component(ComponentKind::Kv, 4, 576);
    layout
}

fn refusal(source: &Layout, target: &Layout) -> String {
    pair(source, target)
        .expect_err("must be refused")
        .to_string()
}

fn pieces(pairing: &Pairing, place: usize) -> &[Piece] {
    pairing.components[place].pieces()
}

/// Changes the second of two equal layouts and returns the sentence.
fn changed(change: impl FnOnce(&mut Layout)) -> String {
    let mut target = gqa(0, 1);
    change(&mut target);
    refusal(&gqa(0, 1), &target)
}

#[test]
fn model_and_server_differences_are_sentences_with_both_values() {
    assert_eq!(
        changed(|target| {
            target.page_size = 64;
            target.components[0] = component(ComponentKind::Kv, 8, 64 * 8 * HEAD_LEN);
        }),
        "page size differs: source has 16 tokens per page, target has 64; start both with the same --page-size"
    );
    assert_eq!(
        changed(|target| target.kv_dtype = "fp8\n".into()),
        "KV dtype differs: source has \"bfloat16\", target has \"fp8\\n\"; start both with the same --kv-cache-dtype"
    );
    assert_eq!(
        changed(|target| target.kv_layout = "hnd".into()),
        "KV page layout differs: source has \"nhd\", target has \"hnd\"; start both with the same attention backend"
    );
    assert_eq!(
        refusal(&gqa(0, 1), &mla(0, 1)),
        "attention differs: source keeps heads (MHA or GQA), target keeps a latent vector (MLA); they do not serve the same model"
    );
    assert_eq!(
        changed(|target| target.attention = Attention::Heads {
            total_kv_heads: 16,
            rank_kv_heads: 16
        }),
        "KV heads differ: source's model has 8 in total, target's has 16; they do not serve the same model"
    );
    assert_eq!(
        changed(|target| target.attention = Attention::Heads {
            total_kv_heads: 8,
            rank_kv_heads: 4
        }),
        "the target layout is not valid: the rank holds 4 KV heads, but 8 heads over 1 ranks make 8"
    );
}

#[test]
fn places_that_do_not_meet_are_sentences_with_both_values() {
    let mut three = mla(0, 3);
    assert_eq!(
        refusal(&three, &mla(0, 2)),
        "tensor-parallel sizes do not divide: source has 3, target has 2; make one a multiple of the other"
    );
    three.tp = Shard { rank: 3, size: 4 };
    assert_eq!(
        refusal(&three, &mla(0, 2)),
        "tensor-parallel ranks do not meet: source is rank 3 of 4, target is rank 0 of 2"
    );
    assert_eq!(
        changed(|target| {
            target.layers = 4..8;
            target.pp = Shard { rank: 1, size: 2 };
        }),
        "layers do not meet: source holds 0 to 4, target holds 4 to 8 (end excluded)"
    );
    assert_eq!(
        changed(|target| target.layers = 0..3),
        "layers do not fit: source stage 0 of 1 holds 0 to 4, target stage 0 of 1 holds 0 to 3 (end excluded)"
    );
    assert_eq!(
        changed(|target| {
            target.layers = 2..4;
            target.pp = Shard { rank: 1, size: 2 };
        }),
        "kv has 4 target buffers where 2 layers are held; unlike layer ranges (source 0 to 4, target 2 to 4) need one buffer per layer, or layer ids"
    );
}

#[test]
fn buffer_differences_are_sentences_with_both_values() {
    assert_eq!(
        changed(|target| target.components.insert(1, state("mamba", 4, 100))),
        "component 1 differs: source has aux, target has mamba"
    );
    assert_eq!(
        changed(|target| target.components.truncate(1)),
        "component 1 differs: source has aux, target has none"
    );
    assert_eq!(
        changed(|target| target.components[0].entries.truncate(6)),
        "kv buffers differ in number: source has 8, target has 6"
    );
    assert_eq!(
        changed(|target| target.components[0].entries[5].item_len = 8192),
        "kv item length differs: source buffer 5 has 4096 bytes per item, target buffer 5 has 8192"
    );
    assert_eq!(
        changed(|target| target.components[1].entries[2].item_len = 32),
        "aux item length differs: source buffer 2 has 64 bytes per item, target buffer 2 has 32"
    );
    let drafted = |count: u32| {
        let mut layout = gqa(0, 1);
        let extra = (0..count).map(|_| entry(4096));
        layout.components[0].entries.extend(extra);
        layout.components[0].draft_entries = count;
        layout
    };
    assert_eq!(
        refusal(&drafted(2), &drafted(4)),
        "draft model buffers differ in number: source has 2, target has 4; start both with the same speculative draft model"
    );
    let none = pair(&drafted(0), &drafted(2)).unwrap();
    assert_eq!(
        pieces(&none, 0).len(),
        8,
        "a prefill without speculation moves the main model"
    );
}

fn with_ids(ids: [u32; 8]) -> Layout {
    let mut layout = gqa(0, 1);
    for (entry, id) in layout.components[0].entries.iter_mut().zip(ids) {
        entry.layer_id = Some(id);
    }
    layout
}

#[test]
fn layer_ids_pair_in_order_or_are_missed_at_either_end() {
    let plain = with_ids([0, 1, 2, 3, 0, 1, 2, 3]);
    assert_eq!(
        refusal(&plain, &gqa(0, 1)),
        "kv buffers have layer ids at the source but none at the target"
    );
    assert_eq!(
        refusal(&gqa(0, 1), &plain),
        "kv buffers have layer ids at the target but none at the source"
    );
    let other = with_ids([0, 1, 2, 9, 0, 1, 2, 9]);
    let missing = "kv layer 3 has 2 buffers at the source and 0 at the target";
    assert_eq!(refusal(&plain, &other), missing);
    let mut longer = plain.clone();
    longer.components[0].entries.push(Entry {
        layer_id: Some(7),
        ..entry(4096)
    });
    longer.components[0].entries.push(Entry {
        layer_id: Some(7),
        ..entry(4096)
    });
    let extra = "kv layer 7 has 0 buffers at the source and 2 at the target";
    assert_eq!(refusal(&plain, &longer), extra);
    let turned = with_ids([3, 2, 1, 0, 3, 2, 1, 0]);
    let pairing = pair(&plain, &turned).unwrap();
    let offset = |place: usize| plain.components[0].entries[place].offset;
    for (at, partner) in [(0, 3), (3, 0), (4, 7), (7, 4)] {
        let piece = pieces(&pairing, 0)[at];
        assert_eq!(
            (piece.source.base, piece.target.base),
            (offset(at), offset(partner))
        );
    }
}

#[test]
fn unequal_tensor_parallelism_cuts_only_what_can_be_cut() {
    let with = |rank, tp, extra: Component, kv_layout: &str| {
        let mut layout = gqa(rank, tp);
        layout.kv_layout = kv_layout.into();
        layout.components.insert(1, extra);
        layout
    };
    let swa = |heads: u64| state("swa", 2, 16 * heads * HEAD_LEN);
    assert_eq!(
        refusal(&with(0, 2, swa(4), "hnd"), &with(0, 1, swa(8), "hnd")),
        "unequal tensor-parallel sizes (source 2, target 1) need the \"nhd\" page layout, both have \"hnd\""
    );
    let mamba = || state("mamba", 2, 100);
    assert_eq!(
        refusal(&with(0, 2, mamba(), "nhd"), &with(0, 1, mamba(), "nhd")),
        "state mamba needs the sliced dimension of every tensor on both sides for unequal tensor-parallel sizes (source 2, target 1); start both with the same attention tensor parallelism, and without --enable-unified-memory"
    );
    assert_eq!(
        refusal(&with(0, 2, swa(4), "nhd"), &with(0, 1, swa(4), "nhd")),
        "swa bytes per token and head differ: source buffer 0 has 2048 bytes per page for 4 heads, target buffer 0 has 2048 for 8, at 16 tokens per page"
    );
    let pairing = pair(&with(1, 2, swa(4), "nhd"), &with(0, 1, swa(8), "nhd")).unwrap();
    for place in [0, 1] {
        let piece = pieces(&pairing, place)[0];
        assert_eq!((piece.rows, piece.row_len), (16, 4 * HEAD_LEN));
        assert_eq!(piece.source.base, 0);
        assert_eq!(
            piece.target.base,
            4 * HEAD_LEN,
            "the second rank's heads are the upper half"
        );
        assert_eq!(
            (piece.source.row_stride, piece.target.row_stride),
            (128, 256)
        );
    }
    assert!(
        pieces(&pairing, 2).is_empty(),
        "aux comes from the first rank of the block"
    );
    // Every page layout will do where nothing is cut.
    pair(&with(1, 2, swa(4), "hnd"), &with(1, 2, swa(4), "hnd")).unwrap();
}

#[test]
fn a_buffer_that_only_the_target_left_out_is_a_mismatch_except_dsa() {
    let with = |name: &str, len: u64| {
        let mut layout = gqa(0, 1);
        layout.components.insert(1, state(name, 4, 10));
        layout.components[1].entries[2].item_len = len;
        layout
    };
    let pairing = pair(&with("dsa", 10), &with("dsa", 0)).unwrap();
    assert_eq!(pieces(&pairing, 1).len(), 3);
    assert_eq!(
        refusal(&with("swa_ring", 10), &with("swa_ring", 0)),
        "swa_ring item length differs: source buffer 2 has 10 bytes per item, target buffer 2 has 0"
    );
}

#[test]
fn of_several_copies_the_first_source_moves_it() {
    let moved = |source: &Layout, target: &Layout| {
        let pairing = pair(source, target).unwrap();
        [0, 1].map(|place| pairing.components[place].item_bytes())
    };
    // 16 ranks hold 8 heads twice; ranks 4 to 7 feed rank 1 of 4 with its heads 2 and 3.
    let page = 8 * 16 * HEAD_LEN;
    let by_rank = [4, 5, 6, 7].map(|rank| moved(&gqa(rank, 16), &gqa(1, 4)));
    assert_eq!(by_rank, [[page, 192], [0, 0], [page, 0], [0, 0]]);
    let latent = [2, 3].map(|rank| moved(&mla(rank, 4), &mla(1, 2)));
    assert_eq!(latent, [[4 * 576, 192], [0, 0]]);
    let shared = [0, 1].map(|rank| moved(&mla(0, 1), &mla(rank, 2)));
    assert_eq!(
        shared,
        [[4 * 576, 192]; 2],
        "one source feeds many targets in full"
    );
}

#[test]
fn elided_and_surplus_buffers_are_skipped() {
    let mut target = gqa(0, 1);
    target.components[1].entries.push(entry(8));
    target.components.insert(1, state("dsa", 3, 10));
    let mut source = target.clone();
    source.components[1].entries[1].item_len = 0;
    source.components[2].entries.truncate(2);
    let pairing = pair(&source, &target).unwrap();
    assert_eq!(
        [0, 1, 2].map(|place| pieces(&pairing, place).len()),
        [8, 2, 2]
    );
}

/// Changes a good layout and returns why it is not valid any more.
fn invalid(change: impl FnOnce(&mut Layout)) -> LayoutError {
    let mut layout = gqa(0, 2);
    layout.validate().unwrap();
    change(&mut layout);
    let error = layout.validate().unwrap_err();
    let refused = pair(&gqa(0, 2), &layout).unwrap_err();
    assert!(
        matches!(refused, LayoutMismatch::Invalid { .. }),
        "{refused}"
    );
    error
}

/// Changes the KV component of a good layout.
fn invalid_kv(change: fn(&mut Component)) -> LayoutError {
    invalid(|layout| change(&mut layout.components[0]))
}

#[test]
fn lists_and_names_are_bounded() {
    use LayoutError as E;
    assert!(matches!(invalid(|l| l.components.clear()), E::NoKv));
    let many = |l: &mut Layout| l.components = vec![component(ComponentKind::Aux, 1, 1); 65];
    assert!(matches!(invalid(many), E::TooManyComponents { count: 65 }));
    let full = |c: &mut Component| c.entries = vec![entry(4096); ENTRIES_MAX + 1];
    assert!(matches!(
        invalid_kv(full),
        E::TooManyEntries {
            component: 0,
            count: 4097
        }
    ));
    assert!(matches!(
        invalid(|l| l.kv_dtype.clear()),
        E::NameLength { len: 0, .. }
    ));
    let long = |l: &mut Layout| l.components.insert(1, state(&"x".repeat(65), 1, 1));
    assert!(matches!(invalid(long), E::NameLength { len: 65, .. }));
}

#[test]
fn numbers_and_shards_are_bounded() {
    use LayoutError as E;
    assert!(matches!(
        invalid(|l| l.page_size = 0),
        E::OutOfRange { value: 0, .. }
    ));
    assert!(matches!(
        invalid(|l| l.pp.size = 0),
        E::OutOfRange { value: 0, .. }
    ));
    assert!(matches!(
        invalid(|l| l.tp.size = 1 << 13),
        E::OutOfRange { value: 8192, .. }
    ));
    assert!(matches!(
        invalid(|l| l.tp.rank = 2),
        E::Rank {
            group: "tp",
            rank: 2,
            size: 2
        }
    ));
    let reversed = std::ops::Range { start: 5, end: 4 };
    assert!(matches!(
        invalid(|l| l.layers = reversed),
        E::LayersReversed { start: 5, end: 4 }
    ));
    assert!(matches!(
        invalid(|l| l.layers = 0..1 << 20),
        E::OutOfRange { .. }
    ));
    let uneven = |l: &mut Layout| l.tp.size = 3;
    assert!(matches!(
        invalid(uneven),
        E::HeadsUneven {
            total: 8,
            tp_size: 3
        }
    ));
    assert!(matches!(
        invalid(|l| l.tp.size = 4),
        E::HeadsPerRank {
            held: 4,
            expected: 2,
            ..
        }
    ));
}

#[test]
fn components_and_entries_are_bounded() {
    use LayoutError as E;
    let swapped = |l: &mut Layout| l.components.swap(0, 1);
    assert!(matches!(
        invalid(swapped),
        E::ComponentOrder { component: 0, .. }
    ));
    let twice = |l: &mut Layout| l.components[1].kind = ComponentKind::Kv;
    assert!(matches!(
        invalid(twice),
        E::ComponentOrder { component: 1, .. }
    ));
    let early = |l: &mut Layout| l.components.push(state("swa", 1, 1));
    assert!(matches!(
        invalid(early),
        E::ComponentOrder { component: 1, .. }
    ));
    assert!(matches!(
        invalid_kv(|c| c.draft_entries = 9),
        E::DraftEntries { .. }
    ));
    let stray = |l: &mut Layout| l.components[1].draft_entries = 1;
    assert!(matches!(
        invalid(stray),
        E::DraftEntries {
            component: 1,
            draft: 1,
            count: 0
        }
    ));
    assert!(matches!(
        invalid_kv(|c| c.draft_entries = 1),
        E::OddHalves { count: 7, .. }
    ));
    let partial = |c: &mut Component| c.entries[3].layer_id = Some(3);
    assert!(matches!(
        invalid_kv(partial),
        E::LayerIdsPartial { named: 1, .. }
    ));
    let wide = |c: &mut Component| c.entries[2].item_len = ITEM_LEN_MAX + 1;
    assert!(matches!(invalid_kv(wide), E::ItemLen { entry: 2, .. }));
    let odd = |c: &mut Component| c.entries[2].item_len -= 1;
    assert!(matches!(
        invalid_kv(odd),
        E::ItemUneven {
            entry: 2,
            heads: 4,
            ..
        }
    ));
    let far = |c: &mut Component| c.entries[7].offset = u64::MAX;
    assert!(matches!(invalid_kv(far), E::BufferEnd { entry: 7, .. }));
    let deep = |c: &mut Component| c.entries[7].item_count = u64::MAX;
    assert!(matches!(invalid_kv(deep), E::BufferEnd { entry: 7, .. }));
}

#[test]
fn item_lists_are_checked_once_and_bounded() {
    assert_eq!(check_items(&[0, 9, 3], 10), Ok(()));
    let error = check_items(&[0, 3, 10], 10).unwrap_err();
    assert_eq!(
        error,
        ItemError::OutOfRange {
            index: 10,
            position: 2,
            item_count: 10
        }
    );
    assert_eq!(
        check_items(&[0, -3], 10).unwrap_err().to_string(),
        "item index -3 at position 1 is outside the buffer's 10 items"
    );
    let many = vec![0; ITEMS_MAX + 1];
    assert_eq!(check_items(&many[1..], 10), Ok(()));
    assert_eq!(
        check_items(&many, 10),
        Err(ItemError::TooMany {
            count: ITEMS_MAX + 1
        })
    );
    let pairing = Arc::new(pair(&gqa(0, 1), &gqa(0, 1)).unwrap());
    assert!(Stream::new(&pairing.components[0], ITEMS_MAX + 1).is_err());
}
