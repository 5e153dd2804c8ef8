//! The cases: how many blocks of which size, where they lie, and the layout that tells an engine so.
#![forbid(unsafe_code)]

use std::sync::Arc;

use clap::ValueEnum;
use kvtransfer::layout::{
    Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape,
};
use serde::{Deserialize, Serialize};

use crate::data::Random;

/// What is transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CaseName {
    /// One contiguous block of 1 GiB
    #[value(name = "one-1gib")]
    #[serde(rename = "one-1gib")]
    One1Gib,
    /// 64 layers of 512 scattered pages of 16 KiB: 512 MiB
    #[value(name = "pages-16k")]
    #[serde(rename = "pages-16k")]
    Pages16k,
    /// 64 layers of 1024 scattered pages of 4 KiB: 256 MiB
    #[value(name = "pages-4k")]
    #[serde(rename = "pages-4k")]
    Pages4k,
    /// 64 layers of 8 scattered pages of 1 MiB: 512 MiB, for GPUs
    #[value(name = "pages-1m", hide = true)]
    #[serde(rename = "pages-1m")]
    Pages1m,
    /// 64 layers of 128 scattered pages of 16 KiB: 128 MiB, for `--faults` and `--restarts`
    #[value(name = "short-16k", hide = true)]
    #[serde(rename = "short-16k")]
    Short16k,
    /// One 16 KiB page per transfer, from push to acknowledged
    #[value(name = "latency-16k")]
    #[serde(rename = "latency-16k")]
    Latency16k,
    /// Scattered blocks of 64 KiB, `--mib` in all (verbs)
    #[value(name = "write-64k")]
    #[serde(rename = "write-64k")]
    Write64k,
    /// Pages of 4 KiB, scattered on both sides, `--mib` in all (verbs)
    #[value(name = "write-4k")]
    #[serde(rename = "write-4k")]
    Write4k,
    /// Slices of 512 bytes, scattered on both sides, as between ranks of unequal size, `--mib` in all (verbs)
    #[value(name = "write-512")]
    #[serde(rename = "write-512")]
    Write512,
    /// Scattered pages of 4 KiB into fresh pages that lie in order, `--mib` in all (verbs)
    #[value(name = "gather-4k")]
    #[serde(rename = "gather-4k")]
    Gather4k,
    /// 64 bytes per transfer, from push to acknowledged (verbs)
    #[value(name = "latency-64")]
    #[serde(rename = "latency-64")]
    Latency64,
    /// One 4 KiB page per transfer, from push to acknowledged (verbs)
    #[value(name = "latency-4k")]
    #[serde(rename = "latency-4k")]
    Latency4k,
}

impl CaseName {
    /// The cases of the paths between processes of one host.
    pub(crate) const SAME_HOST: [Self; 4] = [
        Self::One1Gib,
        Self::Pages16k,
        Self::Pages4k,
        Self::Latency16k,
    ];
    /// The cases of the verbs path.
    pub(crate) const VERBS: [Self; 7] = [
        Self::Write64k,
        Self::Write4k,
        Self::Write512,
        Self::Gather4k,
        Self::Latency64,
        Self::Latency4k,
        Self::Latency16k,
    ];

    /// Whether single transfers are timed, one after the other.
    pub(crate) fn is_latency(self) -> bool {
        matches!(self, Self::Latency64 | Self::Latency4k | Self::Latency16k)
    }
}

/// How much of a case is measured, the same in both processes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Extent {
    pub(crate) rounds: usize,
    pub(crate) seed: u64,
    pub(crate) tiny: bool,
    /// Size of the verbs path's throughput cases.
    pub(crate) mib: usize,
    /// Transfers of a latency case in one round.
    pub(crate) samples: usize,
}

/// Fewest samples of the latency case over all rounds.
const LATENCY_SAMPLES: usize = 2000;
/// Fewest samples of it in one round.
const LATENCY_SAMPLES_PER_ROUND: usize = 100;
/// By how much `--tiny` divides a case's blocks, or the bytes of its only block.
const TINY: usize = 64;

/// Sizes and page lists of a case, the same in both processes because both compute it from the seed.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: CaseName,
    /// Buffers, as the layers of a model.
    pub(crate) entries: usize,
    /// Bytes of a block: one page of one buffer.
    pub(crate) block_bytes: usize,
    /// Pages that a buffer has room for: twice as many as move, so that no two of them are neighbours.
    pool: usize,
    /// Pages that move in one transfer.
    pages_per_transfer: usize,
    source: Vec<i32>,
    target: Vec<i32>,
}

/// One contiguous piece of a transfer: where it lies in either region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) source: u64,
    pub(crate) target: u64,
}

impl Extent {
    /// Transfers of a latency case in each of so many rounds, if nobody says otherwise.
    pub(crate) fn samples(rounds: usize) -> usize {
        let samples = LATENCY_SAMPLES.div_ceil(rounds);
        samples.max(LATENCY_SAMPLES_PER_ROUND)
    }
}

impl Case {
    pub(crate) fn new(name: CaseName, extent: Extent) -> Self {
        let Extent {
            seed,
            tiny,
            mib,
            samples,
            ..
        } = extent;
        let divisor = if tiny { TINY } else { 1 };
        let (entries, block_bytes, pages, transfers) = match name {
            CaseName::One1Gib => (1, (1 << 30) / divisor, 1, 1),
            CaseName::Pages16k => (64, 16 << 10, 512 / divisor, 1),
            CaseName::Short16k => (64, 16 << 10, 128 / divisor, 1),
            CaseName::Pages4k => (64, 4 << 10, 1024 / divisor, 1),
            CaseName::Pages1m => (64, 1 << 20, 8 / divisor, 1),
            CaseName::Latency16k => (1, 16 << 10, samples / divisor, samples / divisor),
            CaseName::Latency64 => (1, 64, samples / divisor, samples / divisor),
            CaseName::Latency4k => (1, 4 << 10, samples / divisor, samples / divisor),
            CaseName::Write64k => (1, 64 << 10, (mib << 4) / divisor, 1),
            CaseName::Write4k | CaseName::Gather4k => (1, 4 << 10, (mib << 8) / divisor, 1),
            CaseName::Write512 => (1, 512, (mib << 11) / divisor, 1),
        };
        let pages = pages.max(1);
        let mut random = Random::new(seed);
        let source = scattered(pages, &mut random);
        let target = if name == CaseName::Gather4k {
            (0..).take(pages).collect()
        } else {
            scattered(pages, &mut random)
        };
        let pool = if pages == 1 { 1 } else { 2 * pages };
        Self {
            name,
            entries,
            block_bytes,
            pool,
            pages_per_transfer: pages / transfers.max(1),
            source,
            target,
        }
    }

    /// Bytes of either side's region.
    pub(crate) fn region_bytes(&self) -> usize {
        self.entries * self.pool * self.block_bytes
    }

    /// Rooms that one side of a round consists of.
    pub(crate) fn transfers(&self) -> usize {
        self.source.len() / self.pages_per_transfer
    }

    /// Blocks of one transfer.
    pub(crate) fn blocks_per_transfer(&self) -> usize {
        self.entries * self.pages_per_transfer
    }

    /// Bytes of one transfer.
    pub(crate) fn transfer_bytes(&self) -> usize {
        self.blocks_per_transfer() * self.block_bytes
    }

    /// Bytes that one side of a round moves.
    pub(crate) fn bytes(&self) -> usize {
        self.transfers() * self.transfer_bytes()
    }

    /// Source pages of one transfer.
    pub(crate) fn source_items(&self, transfer: usize) -> Arc<[i32]> {
        Arc::from(&self.source[self.window(transfer)])
    }

    /// Target pages of one transfer.
    pub(crate) fn target_items(&self, transfer: usize) -> Arc<[i32]> {
        Arc::from(&self.target[self.window(transfer)])
    }

    fn window(&self, transfer: usize) -> std::ops::Range<usize> {
        let start = transfer * self.pages_per_transfer;
        start..start + self.pages_per_transfer
    }

    /// The blocks of one transfer, worked out without the engine's planner: the reference and the checks must not
    /// share its mistakes.
    pub(crate) fn blocks(&self, transfer: usize) -> impl Iterator<Item = Block> + '_ {
        let window = self.window(transfer);
        let pages = self.source[window.clone()].iter().zip(&self.target[window]);
        (0..self.entries).flat_map(move |entry| {
            pages.clone().map(move |(source, target)| Block {
                source: self.place(entry, *source),
                target: self.place(entry, *target),
            })
        })
    }

    /// Every block of a round.
    pub(crate) fn all_blocks(&self) -> impl Iterator<Item = Block> + '_ {
        (0..self.transfers()).flat_map(|transfer| self.blocks(transfer))
    }

    fn place(&self, entry: usize, page: i32) -> u64 {
        let page = usize::try_from(page).expect("invariant: pages are not negative");
        ((entry * self.pool + page) * self.block_bytes) as u64
    }

    /// The same the other way round, in the pages beside: what one direction reads and writes is not the other's.
    pub(crate) fn reversed(&self) -> Self {
        let beside = |items: &[i32]| items.iter().map(|item| item - 1).collect();
        Self {
            source: beside(&self.target),
            target: beside(&self.source),
            ..self.clone()
        }
    }

    /// The layout that both engines present: one buffer per layer, back to back in region 0.
    pub(crate) fn layout(&self) -> Layout {
        let entry = |index: usize| Entry {
            region: RegionId(0),
            offset: (index * self.pool * self.block_bytes) as u64,
            item_len: self.block_bytes as u64,
            item_count: self.pool as u64,
            layer_id: None,
        };
        let layers = u32::try_from(self.entries).expect("invariant: at most 64 entries");
        Layout {
            page_size: 16,
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention: Attention::Latent,
            tp: Shard::ONE,
            pp: Shard::ONE,
            layers: 0..layers,
            components: vec![Component {
                kind: ComponentKind::Kv,
                entries: (0..self.entries).map(entry).collect(),
                draft_entries: 0,
                state: StateShape::default(),
            }],
        }
    }
}

/// `pages` odd page numbers in random order: no two of them touch, as a worn radix cache leaves them. A lone page is 0.
fn scattered(pages: usize, random: &mut Random) -> Vec<i32> {
    if pages == 1 {
        return vec![0];
    }
    let count = i32::try_from(pages).expect("invariant: cases have at most thousands of pages");
    let mut list: Vec<i32> = (0..count).map(|at| 2 * at + 1).collect();
    for at in (1..list.len()).rev() {
        list.swap(at, random.below(at + 1));
    }
    list
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{Block, Case, CaseName, Extent};

    fn extent(rounds: usize) -> Extent {
        Extent {
            rounds,
            seed: 7,
            tiny: false,
            mib: 16,
            samples: Extent::samples(rounds),
        }
    }

    #[test]
    fn a_case_has_the_size_it_is_named_after_and_touches_no_block_twice() {
        let sizes = [
            (CaseName::One1Gib, 1 << 30, 1),
            (CaseName::Pages16k, 512 << 20, 64 * 512),
            (CaseName::Pages4k, 256 << 20, 65_536),
            (CaseName::Pages1m, 512 << 20, 512),
            (CaseName::Write64k, 16 << 20, 256),
            (CaseName::Write4k, 16 << 20, 4096),
            (CaseName::Write512, 16 << 20, 32_768),
        ];
        for (name, bytes, blocks) in sizes {
            let case = Case::new(name, extent(5));
            assert_eq!(case.bytes(), bytes, "{name:?}");
            let places: Vec<_> = case.all_blocks().collect();
            assert_eq!(places.len(), blocks, "{name:?}");
            let end = (case.region_bytes() - case.block_bytes) as u64;
            for is_source in [true, false] {
                let place = |block: &Block| {
                    if is_source {
                        block.source
                    } else {
                        block.target
                    }
                };
                let distinct: HashSet<u64> = places.iter().map(place).collect();
                assert_eq!(distinct.len(), blocks);
                assert!(distinct.iter().all(|place| *place <= end));
                let step = case.block_bytes as u64;
                assert!(distinct.iter().all(|p| !distinct.contains(&(p + step))));
            }
        }
    }

    #[test]
    fn the_latency_case_takes_its_samples_however_many_rounds_there_are() {
        for rounds in [1, 3, 7, 1000] {
            let case = Case::new(CaseName::Latency16k, extent(rounds));
            assert!(case.transfers() * rounds >= 2000);
            assert_eq!(case.blocks_per_transfer(), 1);
        }
    }
}
