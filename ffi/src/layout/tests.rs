//! Buffers by address become regions and entries.

use std::ptr::{null, null_mut};

use super::*;

const NONE: kvt_text_t = kvt_text_t {
    data: null(),
    len: 0,
};

fn words(text: &'static str) -> kvt_text_t {
    kvt_text_t {
        data: text.as_ptr().cast(),
        len: text.len(),
    }
}

fn entry(address: u64, len: u64, item_len: u64) -> kvt_entry_t {
    kvt_entry_t {
        address,
        len,
        item_len,
        layer_id: -1,
        memory: KVT_HOST_MEMORY,
        device: 0,
    }
}

fn component(kind: i32, name: &'static str, entries: &[kvt_entry_t]) -> kvt_component_t {
    kvt_component_t {
        kind,
        draft_entries: 0,
        name: words(name),
        entries: entries.as_ptr(),
        entries_len: entries.len(),
        slices: null(),
        slices_len: 0,
        page_layout: NONE,
    }
}

fn layout(components: &[kvt_component_t]) -> kvt_layout_t {
    kvt_layout_t {
        abi_version: KVT_ABI_VERSION,
        page_size: 16,
        kv_dtype: words("bfloat16"),
        kv_layout: words("nhd"),
        attention: KVT_ATTENTION_LATENT,
        total_kv_heads: 0,
        rank_kv_heads: 0,
        tp_rank: 1,
        tp_size: 2,
        pp_rank: 0,
        pp_size: 1,
        first_layer: 3,
        end_layer: 5,
        reserved: 0,
        components: components.as_ptr(),
        components_len: components.len(),
        compression_ratios: null_mut(),
        compression_ratios_len: 0,
    }
}

#[test]
fn entries_find_their_regions_and_shared_memory_is_registered_once() {
    let memory = vec![0_u64; 4096];
    let base = memory.as_ptr().expose_provenance() as u64;
    // Two layers back to back in one pool that a third entry covers as a whole, and an elided one.
    let pages = [entry(base, 8192, 4096), entry(base + 8192, 8192, 4096)];
    let states = [entry(base, 16_384, 100), entry(0, 0, 64)];
    let slices = [
        kvt_slice_t {
            dim: 4,
            rows: 2,
            groups: [1_u32, 3].as_ptr(),
            groups_len: 2,
        },
        kvt_slice_t {
            dim: 0,
            rows: 1,
            groups: null(),
            groups_len: 0,
        },
    ];
    let mut mamba = component(KVT_COMPONENT_STATE, "mamba", &states);
    (mamba.slices, mamba.slices_len) = (slices.as_ptr(), slices.len());
    mamba.page_layout = words("hnd");
    let components = [component(KVT_COMPONENT_KV, "", &pages), mamba];
    let given = layout(&components);
    // SAFETY: everything the layout points to lives until the end of this test.
    let (regions, layout) = unsafe { described(&raw const given, 8) }.expect("a good layout");
    let region = regions.region(RegionId(0)).expect("there is one");
    assert_eq!((region.base_address(), region.len()), (base, 16_384));
    assert!(regions.region(RegionId(1)).is_none(), "joined into one");
    assert_eq!(layout.tp, Shard { rank: 1, size: 2 });
    assert_eq!(layout.layers, 3..5);
    let [kv, state] = layout.components.as_slice() else {
        panic!("two components: {:?}", layout.components);
    };
    let placed: Vec<_> = kv
        .entries
        .iter()
        .map(|e| (e.offset, e.item_len, e.item_count))
        .collect();
    assert_eq!(placed, [(0, 4096, 2), (8192, 4096, 2)]);
    assert_eq!(state.kind, ComponentKind::State("mamba".into()));
    assert_eq!(
        state.entries[0].item_count, 163,
        "what does not fill an item is left out"
    );
    assert_eq!(
        (state.entries[1].item_len, state.entries[1].item_count),
        (0, 0),
        "elided"
    );
    assert_eq!(state.state.slices[0].groups, [1, 3]);
    assert_eq!(state.state.slices[1].dim, 0);
    assert_eq!(state.state.page_layout.as_deref(), Some("hnd"));
}

#[test]
fn buffers_grouped_by_compression_ratio_are_named_by_layer() {
    let memory = vec![0_u64; 1024];
    let base = memory.as_ptr().expose_provenance() as u64;
    let pages = [entry(base, 64, 8), entry(base, 64, 8), entry(base, 64, 8)];
    let components = [component(KVT_COMPONENT_KV, "", &pages)];
    let ratios = [0_u32, 0, 0, 4, 128];
    let mut given = layout(&components);
    (given.compression_ratios, given.compression_ratios_len) = (ratios.as_ptr(), ratios.len());
    // SAFETY: everything the layout points to lives until the end of this test.
    let (_, layout) = unsafe { described(&raw const given, 8) }.expect("a good layout");
    let named: Vec<_> = layout.components[0]
        .entries
        .iter()
        .map(|e| e.layer_id)
        .collect();
    assert_eq!(named, [Some(3), Some(3), Some(4)]);
}
