//! Ranks of a model with engines over their memory: what `heads`, `event` and `staging` move.
#![expect(unsafe_code, reason = "gives engines device memory that outlives them")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Result;
use clap::ValueEnum;
use kvtransfer::{
    config::{EngineConfig, SameHost},
    engine::{Engine, Memory},
    gpu::{self, CudaDevice, PERCENT_DEFAULT, memory::DeviceBuffer},
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
};

use crate::data::{POISON, Random};

/// What a room, or a connection, is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Of the model: K and V of so many layers, pages of so many tokens, so many heads of so many bytes.
const LAYERS: usize = 32;
const TOKENS: usize = 16;
pub(crate) const HEADS: usize = 8;
pub(crate) const HEAD_BYTES: usize = 128;

/// The way that bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Path {
    Pull,
    Tcp,
    Ring,
}

impl Path {
    pub(crate) fn same_host(self) -> SameHost {
        match self {
            Self::Pull => SameHost::PullOnly,
            Self::Tcp => SameHost::Off,
            Self::Ring => SameHost::RingOnly,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Tcp => "tcp",
            Self::Ring => "ring",
        }
    }
}

/// One rank of some.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
    pub(crate) pages: usize,
}

impl Shape {
    pub(crate) fn heads(self) -> usize {
        HEADS / self.ranks
    }

    pub(crate) fn item_len(self) -> usize {
        TOKENS * self.heads() * HEAD_BYTES
    }

    /// Twice as many pages as move, so that no two of them are neighbours.
    pub(crate) fn pool(self) -> usize {
        2 * self.pages
    }

    pub(crate) fn bytes(self) -> usize {
        2 * LAYERS * self.pool() * self.item_len()
    }

    pub(crate) fn layout(self) -> Layout {
        let entry = |index: usize| Entry {
            region: RegionId(0),
            offset: (index * self.pool() * self.item_len()) as u64,
            item_len: self.item_len() as u64,
            item_count: self.pool() as u64,
            layer_id: None,
        };
        let narrow = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let size = narrow(self.ranks);
        Layout {
            page_size: narrow(TOKENS),
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention: Attention::Heads {
                total_kv_heads: narrow(HEADS),
                rank_kv_heads: narrow(self.heads()),
            },
            tp: Shard {
                rank: narrow(self.rank),
                size,
            },
            pp: Shard::ONE,
            layers: 0..narrow(LAYERS),
            components: vec![Component {
                kind: ComponentKind::Kv,
                entries: (0..2 * LAYERS).map(entry).collect(),
                draft_entries: 0,
                state: StateShape::default(),
            }],
        }
    }

    /// The bytes of a rank whose page number `n` in the room is item `items[n]`: every head of every token is different, and
    /// the same on whatever rank it lies.
    pub(crate) fn image(self, items: &[i32], seed: u64) -> Vec<u8> {
        let mut bytes = vec![POISON; self.bytes()];
        let first = self.rank * self.heads();
        for entry in 0..2 * LAYERS {
            for (page, item) in items.iter().enumerate() {
                let item = usize::try_from(*item).unwrap_or(0);
                let at = (entry * self.pool() + item) * self.item_len();
                let heads = bytes[at..at + self.item_len()].chunks_exact_mut(HEAD_BYTES);
                for (place, head) in heads.enumerate() {
                    let (token, head_number) = (place / self.heads(), first + place % self.heads());
                    let number = ((entry * self.pages + page) * TOKENS + token) * HEADS;
                    let stamp = (number + head_number) as u64;
                    for (word, out) in head.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                        let value = (stamp << 8 | word as u64).wrapping_mul(seed | 1);
                        *out = (value ^ value >> 29).to_le_bytes();
                    }
                }
            }
        }
        bytes
    }
}

/// Odd pages in random order, the same in both processes for each side.
pub(crate) fn items(pages: usize, seed: u64) -> Arc<[i32]> {
    let order = Random::seeded(seed).order(pages);
    let odd = |place: &usize| i32::try_from(2 * place + 1).unwrap_or(i32::MAX);
    order.iter().map(odd).collect()
}

pub(crate) const SENDERS_SEED: u64 = 11;
pub(crate) const RECEIVERS_SEED: u64 = 12;

/// An engine with its memory.
pub(crate) struct Rank {
    pub(crate) shape: Shape,
    pub(crate) engine: Engine,
    pub(crate) region: Arc<Region>,
    /// Dropped after the engine, which uses it.
    _buffer: Option<DeviceBuffer>,
}

impl Rank {
    /// `gpu`: where its memory is, the host's otherwise.
    pub(crate) fn start(
        shape: Shape,
        gpu: Option<u32>,
        path: Path,
        lanes: u8,
        listens: bool,
    ) -> Result<Self> {
        let len = shape.bytes();
        let (region, buffer) = match gpu {
            None => (Region::mmap(len)?, None),
            Some(gpu) => {
                let context = gpu::Context::primary(gpu)?;
                let buffer = DeviceBuffer::new(&context, len)?;
                let device = Arc::new(CudaDevice::open(gpu, PERCENT_DEFAULT)?);
                // SAFETY: the buffer is kept beside the region, and dropped after the engine.
                let region = unsafe { Region::device(device, buffer.address(), len) }?;
                (region, Some(buffer))
            }
        };
        let region = Arc::new(region);
        let mut memory = Memory::new();
        memory.add_shared(Arc::clone(&region));
        let mut config = EngineConfig::default();
        config.same_host = path.same_host();
        config.listen = listens.then(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        config.lanes = lanes;
        Ok(Self {
            shape,
            engine: Engine::start(config, memory, shape.layout())?,
            region,
            _buffer: buffer,
        })
    }
}
