//! An engine to look at.

use kvtransfer::{
    config::EngineConfig,
    engine::{Engine, Memory},
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
};

const PAGE: u64 = 4096;
const PAGES: u64 = 4;

/// Starts one with a little memory.
pub(crate) fn engine(config: EngineConfig) -> Engine {
    let entry = Entry {
        region: RegionId(0),
        offset: 0,
        item_len: PAGE,
        item_count: PAGES,
        layer_id: None,
    };
    let layout = Layout {
        page_size: 1,
        kv_dtype: "uint8".into(),
        kv_layout: "nhd".into(),
        attention: Attention::Latent,
        tp: Shard::ONE,
        pp: Shard::ONE,
        layers: 0..1,
        components: vec![Component {
            kind: ComponentKind::Kv,
            entries: vec![entry],
            draft_entries: 0,
            state: StateShape::default(),
        }],
    };
    let mut memory = Memory::new();
    let bytes = usize::try_from(PAGE * PAGES).expect("a small region");
    memory.add(Region::heap(bytes).expect("memory"));
    Engine::start(config, memory, layout).expect("an engine starts")
}
