//! State components: each of SGLang's types moves as SGLang moves it, or is refused with a sentence when the ranks meet.
//! Sliced mamba states are compared byte by byte with plain loops over the channels of the whole model.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kvtransfer::{
    layout::{
        Attention, Component, ComponentKind, Entry, IndexRule, Layout, LayoutError, RegionId,
        SLICE_DIM_MAX, SLICE_GROUPS_MAX, SLICE_ROWS_MAX, Shard, StateShape, StateSlice,
    },
    plan::{
        descriptor::{Descriptor, Limits, PairCursor},
        mismatch::LayoutMismatch,
        pairing::pair,
    },
};
use proptest::prelude::*;

/// One tensor of the whole model.
#[derive(Clone, Debug)]
enum Tensor {
    /// Rows of channels, cut over the ranks: all in one, or sub-block by sub-block.
    Cut {
        rows: u32,
        groups: Vec<u32>,
        is_grouped: bool,
        channel_len: u64,
    },
    /// The same on every rank.
    Replicated { len: u64 },
}

#[derive(Clone, Debug)]
struct Spec {
    tensors: Vec<Tensor>,
    source_tp: u32,
    target_tp: u32,
    latent: bool,
    source_slot: i32,
    target_slot: i32,
}

fn tensors() -> impl Strategy<Value = Tensor> {
    // In units of 8, so that up to 8 ranks share each sub-block.
    let groups = prop::collection::vec((1u32..4).prop_map(|share| share * 8), 1..4);
    prop_oneof![
        4 => (1u32..5, groups, any::<bool>(), 1u64..5).prop_map(
            |(rows, groups, is_grouped, channel_len)| Tensor::Cut { rows, groups, is_grouped, channel_len }
        ),
        1 => (1u64..40).prop_map(|len| Tensor::Replicated { len }),
    ]
}

fn specs() -> impl Strategy<Value = Spec> {
    let size = || prop::sample::select(vec![1u32, 2, 4, 8]);
    let slot = || 0..4i32;
    (
        prop::collection::vec(tensors(), 1..4),
        size(),
        size(),
        any::<bool>(),
        slot(),
        slot(),
    )
        .prop_map(
            |(tensors, source_tp, target_tp, latent, source_slot, target_slot)| Spec {
                tensors,
                source_tp,
                target_tp,
                latent,
                source_slot,
                target_slot,
            },
        )
}

/// The byte that belongs to a channel of the whole model, whoever holds it.
fn truth(tensor: usize, row: u32, channel: u32, byte: u64) -> u8 {
    let mixed = (tensor as u64) << 48 ^ u64::from(row) << 32 ^ u64::from(channel) << 8 ^ byte;
    mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes()[0]
}

impl Tensor {
    /// The channels of the model that a rank holds, in its order.
    fn channels(&self, rank: u32, size: u32) -> Vec<u32> {
        let Self::Cut {
            groups, is_grouped, ..
        } = self
        else {
            return Vec::new();
        };
        let whole: u32 = groups.iter().sum();
        let blocks = if *is_grouped {
            groups.clone()
        } else {
            vec![whole]
        };
        let mut start = 0;
        let mut held = Vec::new();
        for block in blocks {
            let share = block / size;
            held.extend(start + rank * share..start + (rank + 1) * share);
            start += block;
        }
        held
    }

    /// What a slot of a rank holds.
    fn slot(&self, place: usize, rank: u32, size: u32) -> Vec<u8> {
        match self {
            Self::Replicated { len } => (0..*len).map(|byte| truth(place, 0, 0, byte)).collect(),
            Self::Cut {
                rows, channel_len, ..
            } => {
                let mut bytes = Vec::new();
                for row in 0..*rows {
                    for channel in self.channels(rank, size) {
                        bytes.extend((0..*channel_len).map(|b| truth(place, row, channel, b)));
                    }
                }
                bytes
            }
        }
    }

    fn slice(&self, size: u32) -> StateSlice {
        match self {
            Self::Replicated { .. } => StateSlice {
                dim: 0,
                rows: 1,
                groups: Vec::new(),
            },
            Self::Cut {
                rows,
                groups,
                is_grouped,
                ..
            } => StateSlice {
                dim: groups.iter().sum::<u32>() / size,
                rows: *rows,
                groups: if *is_grouped {
                    groups.clone()
                } else {
                    Vec::new()
                },
            },
        }
    }
}

const SLOTS: u64 = 4;

fn shell(tp: Shard, latent: bool, states: Vec<Component>) -> Layout {
    let kv = Component {
        kind: ComponentKind::Kv,
        entries: Vec::new(),
        draft_entries: 0,
        state: StateShape::default(),
    };
    let mut components = vec![kv];
    components.extend(states);
    Layout {
        page_size: 4,
        kv_dtype: "bfloat16".into(),
        kv_layout: "nhd".into(),
        attention: if latent {
            Attention::Latent
        } else {
            Attention::Heads {
                total_kv_heads: 8,
                rank_kv_heads: 8 / tp.size,
            }
        },
        tp,
        pp: Shard::ONE,
        layers: 0..2,
        components,
    }
}

fn mamba(spec: &Spec, rank: u32, size: u32) -> (Layout, usize) {
    let mut end = 0;
    let entries = spec.tensors.iter().enumerate().map(|(place, tensor)| {
        let item_len = tensor.slot(place, rank, size).len() as u64;
        let offset = end;
        end += item_len * SLOTS;
        Entry {
            region: RegionId(0),
            offset,
            item_len,
            item_count: SLOTS,
            layer_id: Some(u32::try_from(place).unwrap()),
        }
    });
    let entries = entries.collect();
    let state = StateShape {
        slices: spec
            .tensors
            .iter()
            .map(|tensor| tensor.slice(size))
            .collect(),
        page_layout: None,
    };
    let component = Component {
        kind: ComponentKind::State("mamba".into()),
        entries,
        draft_entries: 0,
        state,
    };
    let layout = shell(Shard { rank, size }, spec.latent, vec![component]);
    (layout, usize::try_from(end).unwrap())
}

/// A rank's memory with the truth in one slot.
fn image(spec: &Spec, layout: &Layout, len: usize, slot: i32) -> Vec<u8> {
    let mut memory = vec![0; len];
    for (place, entry) in layout.components[1].entries.iter().enumerate() {
        let bytes = spec.tensors[place].slot(place, layout.tp.rank, layout.tp.size);
        let at = usize::try_from(entry.offset + u64::try_from(slot).unwrap() * entry.item_len);
        let at = at.unwrap();
        memory[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    memory
}

fn check(spec: &Spec) {
    for rank in 0..spec.target_tp {
        let (target, len) = mamba(spec, rank, spec.target_tp);
        let mut memory = vec![0; len];
        let mut writes = vec![0_u32; len];
        for other in 0..spec.source_tp {
            let (source, source_len) = mamba(spec, other, spec.source_tp);
            let pairing = match pair(&source, &target) {
                Ok(pairing) => Arc::new(pairing),
                Err(LayoutMismatch::TpRanks { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            let from = image(spec, &source, source_len, spec.source_slot);
            let bytes = pairing.components[1].item_bytes();
            let mut cursor = PairCursor::new(pairing, 1, 1, 0..bytes, &Limits::default()).unwrap();
            let mut runs = [Descriptor::EMPTY; 3];
            while cursor.remaining() > 0 {
                let filled = cursor.fill(&[spec.source_slot], &[spec.target_slot], &mut runs);
                for run in &runs[..filled] {
                    let [from_at, to_at, len] = [run.source.offset, run.target.offset, run.len]
                        .map(|number| usize::try_from(number).unwrap());
                    memory[to_at..to_at + len].copy_from_slice(&from[from_at..from_at + len]);
                    writes[to_at..to_at + len]
                        .iter_mut()
                        .for_each(|count| *count += 1);
                }
            }
        }
        assert_eq!(memory, image(spec, &target, len, spec.target_slot));
        let mut slot = vec![0_u32; len];
        for entry in &target.components[1].entries {
            let start = entry.offset + u64::try_from(spec.target_slot).unwrap() * entry.item_len;
            let start = usize::try_from(start).unwrap();
            let len = usize::try_from(entry.item_len).unwrap();
            slot[start..start + len].fill(1);
        }
        assert_eq!(writes, slot, "every byte of the slot once, and no other");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn sliced_states_fill_every_byte_of_the_slot_once(spec in specs()) {
        check(&spec);
    }

    /// A peer may claim any slices: an answer or an error, never a panic, and never a byte outside the slot.
    #[test]
    fn hostile_slices_stay_inside_the_slot(
        numbers in prop::collection::vec(prop_oneof![8 => 0u32..9, 1 => any::<u32>()], 12),
        lens in (0u64..80, 0u64..80),
    ) {
        let slice = |at: usize| StateSlice {
            dim: numbers[at],
            rows: numbers[at + 1],
            groups: numbers[at + 2..at + 4].to_vec(),
        };
        let side = |tp: Shard, item_len: u64, at: usize| {
            let entry = Entry { region: RegionId(0), offset: 0, item_len, item_count: 1, layer_id: None };
            let state = StateShape { slices: vec![slice(at)], page_layout: None };
            let kind = ComponentKind::State("mamba".into());
            shell(tp, true, vec![Component { kind, entries: vec![entry], draft_entries: 0, state }])
        };
        let (a, b) = (Shard { rank: 1, size: 2 }, Shard::ONE);
        for (from, to) in [(a, b), (b, a)] {
            if let Ok(pairing) = pair(&side(from, lens.0, 0), &side(to, lens.1, 4)) {
                let pairing = Arc::new(pairing);
                let bytes = pairing.components[1].item_bytes();
                let mut cursor = PairCursor::new(pairing, 1, 1, 0..bytes, &Limits::default()).unwrap();
                let mut runs = [Descriptor::EMPTY; 8];
                while cursor.remaining() > 0 {
                    let filled = cursor.fill(&[0], &[0], &mut runs);
                    for run in &runs[..filled] {
                        prop_assert!(run.source.offset + run.len <= lens.0);
                        prop_assert!(run.target.offset + run.len <= lens.1);
                    }
                }
            }
        }
    }
}

fn paged(name: &str, count: usize, item_len: u64) -> Component {
    let entry = Entry {
        region: RegionId(0),
        offset: 0,
        item_len,
        item_count: 8,
        layer_id: None,
    };
    Component {
        kind: ComponentKind::State(name.into()),
        entries: vec![entry; count],
        draft_entries: 0,
        state: StateShape::default(),
    }
}

const GENERIC: [&str; 7] = [
    "dsa",
    "dsa_tail",
    "swa_ring",
    "c128_state",
    "request_row",
    "block_scale",
    "block_scale_swa",
];

/// Bytes of the state that each of two source ranks moves to one target rank, or the sentence.
fn two_to_one(name: &str, latent: bool) -> Result<[u64; 2], String> {
    let pages = [(4 * 4 * 16), 4 * 8 * 16];
    let lens = if name == "swa" && !latent {
        pages
    } else {
        [64, 64]
    };
    let target = shell(Shard::ONE, latent, vec![paged(name, 2, lens[1])]);
    let moved = [0, 1].map(|rank| {
        let tp = Shard { rank, size: 2 };
        let source = shell(tp, latent, vec![paged(name, 2, lens[0])]);
        pair(&source, &target).map(|pairing| pairing.components[1].item_bytes())
    });
    let [first, second] = moved;
    match (first, second) {
        (Ok(first), Ok(second)) => Ok([first, second]),
        (first, second) => Err(first.and(second).unwrap_err().to_string()),
    }
}

#[test]
fn with_unequal_tensor_parallelism_each_type_moves_as_in_sglang_or_names_the_remedy() {
    for name in GENERIC {
        assert_eq!(two_to_one(name, true), Ok([128, 0]), "{name}");
        let sentence = two_to_one(name, false).unwrap_err();
        let wanted = format!(
            "state {name} needs equal tensor-parallel sizes: source has 2, target has 1; start both with"
        );
        assert!(sentence.starts_with(&wanted), "{sentence}");
    }
    for name in ["qsa_pending", "qsa_compressed"] {
        assert_eq!(
            two_to_one(name, false),
            Ok([128, 0]),
            "{name} is replicated"
        );
        assert_eq!(two_to_one(name, true), Ok([128, 0]), "{name}");
    }
    assert_eq!(
        two_to_one("swa", false),
        Ok([512, 512]),
        "half the heads each"
    );
    assert_eq!(two_to_one("swa", true), Ok([128, 0]));
    for (name, latent) in [("minimax_index_k", true), ("minimax_dense_kv", false)] {
        let sentence = two_to_one(name, latent).unwrap_err();
        assert!(
            sentence.contains("needs equal tensor-parallel sizes"),
            "{sentence}"
        );
    }
    let sentence = two_to_one("mamba", false).unwrap_err();
    assert!(
        sentence.contains("sliced dimension of every tensor"),
        "{sentence}"
    );
}

#[test]
fn with_equal_tensor_parallelism_every_type_moves_whole() {
    let all = GENERIC.iter().chain(&[
        "mamba",
        "swa",
        "qsa_pending",
        "qsa_compressed",
        "minimax_index_k",
        "minimax_dense_kv",
        "a_type_of_tomorrow",
    ]);
    for name in all {
        let tp = Shard { rank: 1, size: 2 };
        let layout = shell(tp, false, vec![paged(name, 2, 64)]);
        let pairing = pair(&layout, &layout).unwrap();
        assert_eq!(pairing.components[1].item_bytes(), 128, "{name}");
        let longer = shell(tp, false, vec![paged(name, 2, 65)]);
        let sentence = pair(&layout, &longer).unwrap_err().to_string();
        assert!(
            sentence.starts_with(&format!("{name} item length differs")),
            "{sentence}"
        );
    }
}

#[test]
fn an_swa_page_layout_of_its_own_decides_whether_heads_can_be_cut() {
    let with = |tp: Shard, len: u64, page_layout: &str| {
        let mut swa = paged("swa", 2, len);
        swa.state.page_layout = Some(page_layout.into());
        shell(tp, false, vec![swa])
    };
    let (two, one) = (Shard { rank: 0, size: 2 }, Shard::ONE);
    assert!(pair(&with(two, 256, "nhd"), &with(one, 512, "nhd")).is_ok());
    let sentence = pair(&with(two, 256, "vectorized_5d"), &with(one, 512, "nhd"))
        .unwrap_err()
        .to_string();
    assert!(sentence.contains("vectorized_5d"), "{sentence}");
}

/// A state over two stages, to a pipeline of one.
fn stages(name: &str, per_stage: usize) -> Result<Vec<u64>, String> {
    let kv = |layers| Component {
        kind: ComponentKind::Kv,
        ..paged("", layers, 8)
    };
    let mut whole = shell(Shard::ONE, true, vec![paged(name, 2 * per_stage, 64)]);
    whole.components[0] = kv(2);
    let moved = (0..2).map(|rank| {
        let mut stage = shell(Shard::ONE, true, vec![paged(name, per_stage, 64)]);
        stage.pp = Shard { rank, size: 2 };
        stage.layers = rank..rank + 1;
        stage.components[0] = kv(1);
        pair(&stage, &whole).map(|pairing| {
            let piece = pairing.components[1].pieces();
            piece.len() as u64
        })
    });
    moved
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())
}

#[test]
fn over_pipeline_stages_states_are_paired_by_layer_or_refused() {
    assert_eq!(stages("dsa", 1), Ok(vec![1, 1]));
    assert_eq!(stages("dsa_tail", 2), Ok(vec![2, 2]), "keys and scores");
    let sentence = stages("minimax_index_k", 1).unwrap_err();
    assert_eq!(
        sentence,
        "state minimax_index_k needs a pipeline of one stage on both sides: source has 2, target has 1; start both with --pp-size 1"
    );
}

#[test]
fn tensors_that_cannot_be_cut_from_each_other_are_named() {
    let side = |tp: Shard, slice: StateSlice, item_len: u64| {
        let mut mamba = paged("mamba", 1, item_len);
        mamba.state.slices = vec![slice];
        shell(tp, false, vec![mamba])
    };
    let slice = |dim, rows, groups: &[u32]| StateSlice {
        dim,
        rows,
        groups: groups.to_vec(),
    };
    let two = Shard { rank: 0, size: 2 };
    let refused = |a: Layout, b: Layout| pair(&a, &b).unwrap_err().to_string();
    let sentence = refused(
        side(two, slice(4, 1, &[]), 16),
        side(Shard::ONE, slice(8, 1, &[]), 16),
    );
    assert_eq!(
        sentence,
        "state mamba is not cut of the same tensor: source tensor 0 has slots of 16 bytes with 4 channels on each of 2 ranks, target tensor 0 16 bytes with 8 on each of 1; start both with the same model and state dtype"
    );
    for (source, target, words) in [
        (
            (slice(4, 1, &[]), 16),
            (slice(9, 1, &[]), 36),
            "not cut of the same tensor",
        ),
        (
            (slice(4, 2, &[]), 16),
            (slice(8, 1, &[]), 32),
            "unlike numbers of rows",
        ),
        (
            (slice(0, 1, &[]), 16),
            (slice(8, 1, &[]), 16),
            "replicated on one side only",
        ),
        (
            (slice(0, 1, &[]), 16),
            (slice(0, 1, &[]), 17),
            "of unlike length",
        ),
        (
            (slice(0, 1, &[]), 0),
            (slice(0, 1, &[]), 17),
            "empty on one side",
        ),
        (
            (slice(4, 1, &[3, 5]), 16),
            (slice(8, 1, &[3, 5]), 32),
            "cannot share evenly",
        ),
    ] {
        let sentence = refused(
            side(two, source.0, source.1),
            side(Shard::ONE, target.0, target.1),
        );
        assert!(sentence.contains(words), "{sentence}");
    }
    // Sub-blocks that do not make up the dimension are not its sub-blocks.
    let odd = side(two, slice(4, 1, &[3, 6]), 16);
    pair(&odd, &side(Shard::ONE, slice(8, 1, &[3, 6]), 32)).unwrap();
}

#[test]
fn slices_are_bounded() {
    let with = |kind: ComponentKind, slices: Vec<StateSlice>| {
        let mut component = paged("mamba", 1, 64);
        component.kind = kind;
        component.state.slices = slices;
        shell(Shard::ONE, true, vec![component]).validate()
    };
    let mamba = || ComponentKind::State("mamba".into());
    let slice = |dim, rows, groups| StateSlice { dim, rows, groups };
    with(mamba(), vec![slice(16, 4, vec![1; SLICE_GROUPS_MAX])]).unwrap();
    with(mamba(), vec![slice(0, SLICE_ROWS_MAX, vec![])]).unwrap();
    for wrong in [
        slice(16, 0, vec![]),
        slice(0, SLICE_ROWS_MAX + 1, vec![]),
        slice(SLICE_DIM_MAX + 1, 1, vec![]),
        slice(3, 1, vec![]),
        slice(16, 4, vec![1; SLICE_GROUPS_MAX + 1]),
        slice(16, 4, vec![0]),
    ] {
        let error = with(mamba(), vec![wrong]).unwrap_err();
        assert!(matches!(error, LayoutError::Slice { .. }), "{error}");
    }
    let error = with(mamba(), vec![slice(1, 1, vec![]); 2]).unwrap_err();
    assert!(
        matches!(
            error,
            LayoutError::SliceCount {
                slices: 2,
                count: 1,
                ..
            }
        ),
        "{error}"
    );
    let error = with(ComponentKind::Aux, vec![slice(1, 1, vec![])]).unwrap_err();
    assert!(
        matches!(error, LayoutError::SliceCount { count: 0, .. }),
        "{error}"
    );
}

#[test]
fn the_rule_for_index_lists_follows_the_type() {
    let rule = |name: &str| ComponentKind::State(name.into()).index_rule();
    for name in [
        "swa",
        "dsa",
        "block_scale",
        "block_scale_swa",
        "minimax_index_k",
    ] {
        assert_eq!(rule(name), IndexRule::Shorter, "{name}");
    }
    for name in [
        "qsa_pending",
        "qsa_compressed",
        "swa_ring",
        "c128_state",
        "request_row",
        "minimax_dense_kv",
        "dsa_tail",
        "a_type_of_tomorrow",
    ] {
        assert_eq!(rule(name), IndexRule::Equal, "{name}");
    }
    assert_eq!(rule("mamba"), IndexRule::OneSlot);
    assert_eq!(ComponentKind::Kv.index_rule(), IndexRule::Whole);
}
