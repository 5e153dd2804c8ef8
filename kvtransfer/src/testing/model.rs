//! Small models, cut over ranks: layouts for tests, with honest proportions and few bytes.

use std::sync::Arc;

use crate::{
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    plan::{
        descriptor::{Descriptor, Limits, PairCursor},
        pairing::{Pairing, pair},
    },
};

/// A model's cache, before it is cut over ranks.
#[derive(Clone, Debug)]
pub struct Model {
    /// MLA: one latent buffer per layer, the same on every TP rank.
    pub is_latent: bool,
    /// KV heads (ignored if latent).
    pub heads: u32,
    /// Layers, a multiple of every PP size used.
    pub layers: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// Bytes of one head of one token.
    pub head_bytes: u64,
    /// Pages per rank.
    pub pages: u64,
    /// Whether there is a sliding-window state, with as many items as pages.
    pub has_state: bool,
    /// Bytes of an aux row; each row has a second entry of 8 bytes, the room number.
    pub aux_bytes: u64,
    /// Aux rows per rank.
    pub slots: u64,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            is_latent: false,
            heads: 4,
            layers: 2,
            page_size: 4,
            head_bytes: 16,
            pages: 64,
            has_state: true,
            aux_bytes: 24,
            slots: 8,
        }
    }
}

/// The region of the KV pages.
pub const KV_REGION: RegionId = RegionId(0);
/// The region of states and aux rows.
pub const META_REGION: RegionId = RegionId(1);

impl Model {
    /// The layout of one rank, and the bytes of its two regions.
    ///
    /// # Panics
    /// If the heads or layers cannot be cut so.
    pub fn rank(&self, tp: Shard, pp: Shard) -> (Layout, Vec<usize>) {
        let held = if self.is_latent {
            1
        } else {
            (self.heads / tp.size).max(1)
        };
        let attention = if self.is_latent {
            Attention::Latent
        } else {
            Attention::Heads {
                total_kv_heads: self.heads,
                rank_kv_heads: held,
            }
        };
        let layers = pp.rank * self.layers / pp.size..(pp.rank + 1) * self.layers / pp.size;
        let halves = if self.is_latent { 1 } else { 2 };
        let buffers = layers.len() as u64 * halves;
        let page = u64::from(self.page_size) * u64::from(held) * self.head_bytes;
        let mut ends = [0_u64, 0];
        let mut add = |region: RegionId, count: u64, item_len: u64, items: u64| {
            let end = &mut ends[region.0 as usize];
            let entries = (0..count).map(|_| {
                let offset = *end;
                *end += item_len * items;
                Entry {
                    region,
                    offset,
                    item_len,
                    item_count: items,
                    layer_id: None,
                }
            });
            entries.collect::<Vec<_>>()
        };
        let component = |kind, entries| Component {
            kind,
            entries,
            draft_entries: 0,
            state: StateShape::default(),
        };
        let kv = add(KV_REGION, buffers, page, self.pages);
        let mut components = vec![component(ComponentKind::Kv, kv)];
        if self.has_state {
            let swa = add(META_REGION, buffers, page, self.pages);
            components.push(component(ComponentKind::State("swa".into()), swa));
        }
        let mut aux = add(META_REGION, 1, self.aux_bytes, self.slots);
        aux.extend(add(META_REGION, 1, 8, self.slots));
        components.push(component(ComponentKind::Aux, aux));
        let layout = Layout {
            page_size: self.page_size,
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention,
            tp,
            pp,
            layers,
            components,
        };
        let regions = ends.map(|end| usize::try_from(end).expect("invariant: models are small"));
        (layout, regions.to_vec())
    }

    /// The layouts of a whole group, PP stage by PP stage.
    pub fn group(&self, tp_size: u32, pp_size: u32) -> Vec<(Layout, Vec<usize>)> {
        let places = (0..pp_size).flat_map(|pp| (0..tp_size).map(move |tp| (pp, tp)));
        places
            .map(|(pp, tp)| {
                let shard = |rank, size| Shard { rank, size };
                self.rank(shard(tp, tp_size), shard(pp, pp_size))
            })
            .collect()
    }
}

/// How a source rank feeds a target rank: `None` if it does not, else the pairing, and whether it is a dummy (has
/// nothing to move, but must conclude).
pub fn route(source: &Layout, target: &Layout) -> Option<(Arc<Pairing>, bool)> {
    let pairing = pair(source, target).ok()?;
    let is_dummy = pairing.components.iter().all(|c| c.item_bytes() == 0);
    Some((Arc::new(pairing), is_dummy))
}

/// The byte that a test writes at a place of a rank's memory, different for every `salt` (room and rank).
pub fn pattern(salt: u64, region: RegionId, offset: u64) -> u8 {
    let mixed = (salt ^ (u64::from(region.0) << 48) ^ offset).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    // The high bytes depend on all bits below them.
    (mixed >> 56).to_le_bytes()[0] ^ (mixed >> 40).to_le_bytes()[0]
}

/// Calls `f` for every run of bytes that a sender moves: component, and where from and to. `items` holds the source and
/// target lists per component; a target list may be longer than the sender needs.
///
/// # Panics
/// If the lists do not fit the pairing.
pub fn each_run(
    pairing: &Arc<Pairing>,
    items: &[(Vec<i32>, Vec<i32>)],
    mut f: impl FnMut(usize, &Descriptor),
) {
    for (component, (sources, targets)) in items.iter().enumerate() {
        let len = pairing.components[component].item_bytes() * sources.len() as u64;
        let cursor = PairCursor::new(
            Arc::clone(pairing),
            component,
            sources.len(),
            0..len,
            &Limits::default(),
        );
        let mut cursor = cursor.expect("invariant: the test's items fit the pairing");
        let mut runs = [Descriptor::EMPTY; 32];
        while cursor.remaining() > 0 {
            let filled = cursor.fill(sources, &targets[..sources.len()], &mut runs);
            runs[..filled].iter().for_each(|run| f(component, run));
        }
    }
}

/// Every byte range that an item of a component occupies in a rank's memory.
pub fn item_ranges(component: &Component, item: i32) -> impl Iterator<Item = (RegionId, u64, u64)> {
    let real = component.entries.iter().filter(|entry| entry.item_len > 0);
    real.map(move |entry| {
        let at = entry.offset + u64::from(item.cast_unsigned()) * entry.item_len;
        (entry.region, at, entry.item_len)
    })
}
