//! Engines without a wire: rooms go through every step, every write is worked out and counted, and no byte moves.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kvtransfer::{
    config::{EngineConfig, RdmaUse, SameHost},
    engine::{Engine, Memory, NullCounts},
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
    testing::conformance::{SOON, room, to_send},
    transfer::{Chunk, ReceiveRequest, Source},
};

/// Some buffers of pages, each token of which has `rows` heads of one byte.
struct Shape {
    buffers: u32,
    page_size: u32,
    pages: i32,
    heads: u32,
    target_tp: u32,
    latent: bool,
}

impl Shape {
    fn layout(&self, tp: u32) -> Layout {
        let heads = self.heads / tp;
        let item_len = u64::from(self.page_size) * u64::from(heads);
        let item_count = 2 * u64::from(self.pages.unsigned_abs()) + 1;
        let entry = |place: u32| Entry {
            region: RegionId(0),
            offset: u64::from(place) * item_len * item_count,
            item_len,
            item_count,
            layer_id: None,
        };
        let attention = if self.latent {
            Attention::Latent
        } else {
            Attention::Heads {
                total_kv_heads: self.heads,
                rank_kv_heads: heads,
            }
        };
        Layout {
            page_size: self.page_size,
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention,
            tp: Shard { rank: 0, size: tp },
            pp: Shard::ONE,
            layers: 0..if self.latent {
                self.buffers
            } else {
                self.buffers / 2
            },
            components: vec![Component {
                kind: ComponentKind::Kv,
                entries: (0..self.buffers).map(entry).collect(),
                draft_entries: 0,
                state: StateShape::default(),
            }],
        }
    }

    fn start(&self, tp: u32, null_wire: bool) -> Engine {
        let layout = self.layout(tp);
        let last = layout.components[0].entries.last().unwrap();
        let len = last.offset + last.item_len * last.item_count;
        let mut memory = Memory::new();
        memory.add(Region::mmap(usize::try_from(len).unwrap()).unwrap());
        let mut config = EngineConfig::default();
        config.listen = Some(([127, 0, 0, 1], 0).into());
        config.same_host = SameHost::Off;
        config.null_wire = null_wire;
        Engine::start(config, memory, layout).unwrap()
    }
}

/// Sends all pages, no two of which touch at the target; what was counted, and nanoseconds from push to success.
fn push_all(shape: &Shape) -> (NullCounts, u128) {
    let (source, target) = (shape.start(1, true), shape.start(shape.target_tp, true));
    let info = target.connect(source.local_addr().unwrap(), SOON).unwrap();
    assert_eq!(info.path, "null");
    target.region(RegionId(0)).unwrap().fill(0, 100, 7).unwrap();
    let mut best = u128::MAX;
    for number in 1..=3 {
        let to: Arc<[i32]> = (0..shape.pages)
            .map(|at| 2 * (shape.pages - 1 - at) + 1)
            .collect();
        let receive = target.receive(&ReceiveRequest {
            room: room(number),
            sources: vec![Source {
                peer: info.peer,
                dummy: false,
            }],
            receivers_expected: 1,
            prefix_tokens: 0,
            items: vec![to],
            timeout: SOON,
        });
        let receive = receive.unwrap();
        let send = source.send(&to_send(number, SOON)).unwrap();
        send.wait_ready(SOON).unwrap();
        let chunk = Chunk {
            items: vec![(0..shape.pages).collect()],
            last: true,
        };
        let start = Engine::now();
        send.push(&chunk).unwrap();
        let summary = send.wait(SOON).unwrap().unwrap();
        best = best.min(Engine::now().since(start).as_nanos());
        assert_eq!(receive.wait(SOON).unwrap().unwrap().bytes, summary.bytes);
    }
    let mut bytes = [0; 100];
    target
        .region(RegionId(0))
        .unwrap()
        .read_at(0, &mut bytes)
        .unwrap();
    assert_eq!(bytes, [7; 100], "no byte moved");
    assert_eq!(
        target.null_counts(),
        NullCounts::default(),
        "the sender plans"
    );
    let counts = source.null_counts();
    let once = NullCounts {
        batches: counts.batches / 3,
        bytes: counts.bytes / 3,
        blocks: counts.blocks / 3,
        wire_operations: counts.wire_operations / 3,
    };
    (once, best)
}

#[test]
fn rooms_succeed_and_every_write_is_counted() {
    let whole = Shape {
        buffers: 6,
        page_size: 4,
        pages: 50,
        heads: 8,
        target_tp: 1,
        latent: false,
    };
    let (counts, _) = push_all(&whole);
    assert_eq!(
        (counts.blocks, counts.bytes, counts.batches),
        (300, 300 * 32, 1)
    );
    assert_eq!(counts.wire_operations, 301, "and the notice");
    let cut = Shape {
        target_tp: 2,
        ..whole
    };
    let (counts, _) = push_all(&cut);
    assert_eq!((counts.blocks, counts.bytes), (300 * 4, 300 * 16));
    // A page's tokens lie apart at the source and together at the target: four share a WRITE.
    assert_eq!(counts.wire_operations, 301);
}

#[test]
fn an_engine_without_a_wire_meets_only_its_like() {
    let shape = Shape {
        buffers: 2,
        page_size: 1,
        pages: 2,
        heads: 1,
        target_tp: 1,
        latent: false,
    };
    let (null, real) = (shape.start(1, true), shape.start(1, false));
    for (from, to) in [(&null, &real), (&real, &null)] {
        let refused = from.connect(to.local_addr().unwrap(), SOON).unwrap_err();
        assert!(refused.to_string().contains("null_wire"), "{refused}");
    }
}

#[test]
fn a_wire_of_rdma_is_one() {
    let mut config = EngineConfig::default();
    config.null_wire = true;
    config.rdma.usage = RdmaUse::Auto;
    let refused = Engine::start(config, Memory::new(), Layout::raw()).err();
    let sentence = refused.expect("it must be refused").to_string();
    assert!(sentence.contains("rdma.usage"), "{sentence}");
}

/// Prints what planning and handing over costs for the prompts of SGLang's own measurement. Run it built for speed.
#[test]
#[ignore = "a measurement"]
fn cost_of_the_plan() {
    let latent = |pages| (61, 64, pages, 1, 1, true);
    let heads = |page_size, pages, target_tp| (160, page_size, pages, 8, target_tp, false);
    for (name, (buffers, page_size, pages, heads, target_tp, latent)) in [
        ("MLA 61 layers, page 64, 128K tokens", latent(2048)),
        (
            "MHA 80 layers K+V, page 64, 128K tokens",
            heads(64, 2048, 1),
        ),
        ("MHA 80 layers K+V, page 1, 8K tokens", heads(1, 8192, 1)),
        (
            "MHA 80 layers K+V, page 64, TP 1 to 2, 8K tokens",
            heads(64, 128, 2),
        ),
    ] {
        let shape = Shape {
            buffers,
            page_size,
            pages,
            heads,
            target_tp,
            latent,
        };
        let (counts, ns) = push_all(&shape);
        println!(
            "{name}: {ns} ns, {} blocks, {} wire operations",
            counts.blocks, counts.wire_operations
        );
    }
}
