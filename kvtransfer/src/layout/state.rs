//! What SGLang's state types mean for a transfer: how their index lists must agree, and how a layer or a slot is named.
//!
//! The rules are those of SGLang 0.5.23 (`maybe_send_extra` in `disaggregation/mooncake/conn.py`), written from its
//! behaviour. Whether two ranks can exchange a type at all is `plan::states`' to say.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::{Component, ComponentKind, LAYERS_MAX};

/// Rows in front of the sliced dimension of a state tensor.
pub const SLICE_ROWS_MAX: u32 = 1 << 16;
/// Channels of a sliced dimension.
pub const SLICE_DIM_MAX: u32 = 1 << 24;
/// Sub-blocks of a sliced dimension; query, key and value are three.
pub const SLICE_GROUPS_MAX: usize = 16;

/// How one tensor of a `"mamba"` state is spread over tensor-parallel ranks. A slot is `[rows][dim]` channels of equal
/// size on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSlice {
    /// Channels on this rank (SGLang's `state_dim_per_tensor`). 0: every rank holds the whole tensor.
    pub dim: u32,
    /// Rows in front of the channels (SGLang's `state_slice_outer_counts`), at least 1.
    pub rows: u32,
    /// Channels of the whole model's sub-blocks where each is sharded by itself (SGLang's `state_conv_shard_groups`, e.g.
    /// query, key, value); empty where the dimension is one block. Ignored unless they add up to the whole dimension,
    /// as in SGLang.
    pub groups: Vec<u32>,
}

/// What a state component says beyond its buffers. The default says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateShape {
    /// One per entry, or none at all: without them a state cannot be re-cut for another tensor-parallel size.
    pub slices: Vec<StateSlice>,
    /// The page layout where it is not the layout's own (SGLang's `swa_kv_cache_layout`).
    pub page_layout: Option<String>,
}

/// How the index lists of the two sides of a component must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexRule {
    /// The sender pushes what was granted; a room with less fails at the receiver.
    Whole,
    /// As many on both sides, or none at the sender (SGLang's "index `None`": skip).
    Equal,
    /// The shorter list counts: what the sender has beyond the grant is left out.
    Shorter,
    /// One slot on each side, or none at the sender.
    OneSlot,
}

impl ComponentKind {
    /// How its index lists must agree. A state type that this version does not know is positional.
    pub fn index_rule(&self) -> IndexRule {
        let Self::State(name) = self else {
            return IndexRule::Whole;
        };
        match name.as_str() {
            "mamba" => IndexRule::OneSlot,
            "swa" | "dsa" | "block_scale" | "block_scale_swa" | "minimax_index_k" => {
                IndexRule::Shorter
            }
            _ => IndexRule::Equal,
        }
    }
}

/// Why a list of indices does not fit a component, or a component the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Not SGLang's six numbers, or numbers that contradict each other.
    #[error("dsa_tail indices {indices:?} {problem}")]
    Tail {
        /// The indices.
        indices: Vec<i32>,
        /// What is wrong with them.
        problem: &'static str,
    },
    /// The number of buffers is not what the compression ratios make.
    #[error(
        "{kind} has {entries} buffers; layers {start} to {end} of these compression ratios have {expected}{fix}"
    )]
    Ratios {
        /// Which component.
        kind: ComponentKind,
        /// Its buffers.
        entries: usize,
        /// First layer held.
        start: u32,
        /// One past the last layer held.
        end: u32,
        /// The numbers of buffers that would do, in words.
        expected: String,
        /// What to change.
        fix: &'static str,
    },
}

/// Most slots of a DSA tail that one list can name: a ring holds one open compression group and some draft tokens.
const TAIL_SLOTS_MAX: i32 = 1 << 16;

/// The ring slots that SGLang's six `"dsa_tail"` indices (row, first offset and count, second offset and count, ring
/// size) name, oldest first, as item indices of a component whose items are *slots*: `row * ring + slot`, with
/// `item_len` = bytes of a row / ring. So two sides whose rings differ in size (unlike numbers of speculative tokens)
/// agree on the bytes of an item. No indices name no slots.
///
/// # Errors
/// [`StateError::Tail`].
pub fn dsa_tail_slots(indices: &[i32]) -> Result<Vec<i32>, StateError> {
    let wrong = |problem| StateError::Tail {
        indices: indices.iter().copied().take(8).collect(),
        problem,
    };
    if indices.is_empty() {
        return Ok(Vec::new());
    }
    let &[row, first, first_count, second, second_count, ring] = indices else {
        return Err(wrong("must be six numbers"));
    };
    if row < 0 || !(1..=TAIL_SLOTS_MAX).contains(&ring) {
        return Err(wrong(
            "name a row below 0 or a ring without a sensible size",
        ));
    }
    let mut slots = Vec::new();
    for (start, count) in [(first, first_count), (second, second_count)] {
        let end = start.checked_add(count).filter(|end| *end <= ring);
        let (true, Some(end)) = (start >= 0 && count >= 0, end) else {
            return Err(wrong("leave the ring"));
        };
        for slot in start..end {
            let item = row.checked_mul(ring).and_then(|at| at.checked_add(slot));
            slots.push(item.ok_or_else(|| wrong("name a slot beyond 2^31"))?);
        }
    }
    Ok(slots)
}

/// Names the layers of a DeepSeek-V4 component, whose buffers are grouped by compression ratio instead of by layer, so
/// that stages of unlike pipelines pair them by layer. `ratios` has one entry per layer of the whole model.
///
/// KV: ratio-4 KV, ratio-4 indexer, ratio-128 KV (and each KV group twice with the two-pool fp8 cache). `"swa"`:
/// the window of every layer, ratio-4 compressor state, ratio-4 indexer state. `"c128_state"`: ratio-128 layers.
/// `"swa_ring"`: every layer. Other kinds are left alone.
///
/// # Errors
/// [`StateError::Ratios`] if the buffers are not so many.
pub fn name_ratio_layers(
    component: &mut Component,
    ratios: &[u32],
    layers: Range<u32>,
) -> Result<(), StateError> {
    let held = |ratio: Option<u32>| -> Vec<u32> {
        let all = (0..LAYERS_MAX).zip(ratios);
        let wanted = all.filter(|(layer, is)| {
            layers.contains(layer) && ratio.is_none_or(|ratio| **is == ratio)
        });
        wanted.map(|(layer, _)| layer).collect()
    };
    let (all, four, wide) = (held(None), held(Some(4)), held(Some(128)));
    let entries = component.main_entries().len();
    let two_pools = "; SGLANG_DSV4_UNIFIED_KV_FP8 must be set the same on both sides";
    let (choices, fix): (Vec<Vec<&[u32]>>, _) = match &component.kind {
        ComponentKind::Kv => (
            vec![
                vec![&four, &four, &wide],
                vec![&four, &four, &four, &wide, &wide],
            ],
            two_pools,
        ),
        ComponentKind::State(name) => match name.as_str() {
            "c128_state" => (vec![vec![&wide]], ""),
            "swa_ring" => (vec![vec![&all], vec![&all, &all]], two_pools),
            "swa" => {
                // The window may lack the layers of a trailing draft model.
                let window = entries.saturating_sub(2 * four.len()).min(all.len());
                (vec![vec![&all[..window], &four, &four]], "")
            }
            _ => return Ok(()),
        },
        ComponentKind::Aux => return Ok(()),
    };
    let count = |groups: &Vec<&[u32]>| groups.iter().map(|group| group.len()).sum::<usize>();
    let Some(groups) = choices.iter().find(|groups| count(groups) == entries) else {
        let expected: Vec<String> = choices.iter().map(|c| count(c).to_string()).collect();
        return Err(StateError::Ratios {
            kind: component.kind.clone(),
            entries,
            start: layers.start,
            end: layers.end,
            expected: expected.join(" or "),
            fix,
        });
    };
    let names = groups.iter().flat_map(|group| group.iter());
    for (entry, layer) in component.entries.iter_mut().zip(names) {
        entry.layer_id = Some(*layer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{StateError, dsa_tail_slots, name_ratio_layers};
    use crate::layout::{Component, ComponentKind, Entry, RegionId, StateShape};

    #[test]
    fn a_tail_that_wraps_is_named_oldest_first() {
        assert_eq!(dsa_tail_slots(&[3, 5, 2, 0, 1, 7]), Ok(vec![26, 27, 21]));
        assert_eq!(dsa_tail_slots(&[0, 0, 0, 0, 0, 4]), Ok(vec![]));
        assert_eq!(dsa_tail_slots(&[]), Ok(vec![]));
    }

    #[test]
    fn a_tail_that_makes_no_sense_is_refused_with_its_numbers() {
        for (indices, words) in [
            (&[1, 2][..], "six numbers"),
            (&[-1, 0, 1, 0, 0, 4], "row below 0"),
            (&[0, 0, 1, 0, 0, 0], "sensible size"),
            (&[0, 3, 2, 0, 0, 4], "leave the ring"),
            (&[0, -1, 1, 0, 0, 4], "leave the ring"),
            (&[0, i32::MAX, 1, 0, 0, 4], "leave the ring"),
            (&[i32::MAX, 0, 1, 0, 0, 4], "beyond 2^31"),
        ] {
            let error = dsa_tail_slots(indices).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    fn buffers(kind: ComponentKind, count: usize) -> Component {
        let entry = Entry {
            region: RegionId(0),
            offset: 0,
            item_len: 8,
            item_count: 1,
            layer_id: None,
        };
        Component {
            kind,
            entries: vec![entry; count],
            draft_entries: 0,
            state: StateShape::default(),
        }
    }

    fn names(kind: ComponentKind, count: usize, layers: std::ops::Range<u32>) -> Vec<u32> {
        let mut component = buffers(kind, count);
        name_ratio_layers(&mut component, &[0, 4, 128, 4, 4, 128], layers).expect("it fits");
        let ids = component.entries.iter().map(|entry| entry.layer_id);
        ids.map(|id| id.expect("named")).collect()
    }

    #[test]
    fn buffers_by_compression_ratio_get_their_layers() {
        let state = |name: &str| ComponentKind::State(name.into());
        assert_eq!(names(ComponentKind::Kv, 5, 0..4), [1, 3, 1, 3, 2]);
        assert_eq!(
            names(ComponentKind::Kv, 13, 0..6),
            [1, 3, 4, 1, 3, 4, 1, 3, 4, 2, 5, 2, 5]
        );
        assert_eq!(names(state("swa"), 4, 4..6), [4, 5, 4, 4]);
        assert_eq!(names(state("swa"), 3, 4..6), [4, 4, 4], "without the draft");
        assert_eq!(names(state("c128_state"), 2, 0..6), [2, 5]);
        assert_eq!(names(state("swa_ring"), 4, 1..3), [1, 2, 1, 2]);
        let mut other = buffers(state("dsa"), 3);
        name_ratio_layers(&mut other, &[4; 3], 0..3).expect("left alone");
        assert_eq!(other, buffers(state("dsa"), 3));
        let mut wrong = buffers(ComponentKind::Kv, 6);
        let error = name_ratio_layers(&mut wrong, &[4, 128], 0..2).expect_err("too many");
        assert!(matches!(error, StateError::Ratios { entries: 6, .. }));
        assert_eq!(
            error.to_string(),
            "kv has 6 buffers; layers 0 to 2 of these compression ratios have 3 or 5; SGLANG_DSV4_UNIFIED_KV_FP8 must be set the same on both sides"
        );
    }
}
