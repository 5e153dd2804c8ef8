//! The plan core against an oracle: whole deployments of random ranks are filled byte by byte in plain loops, moved
//! with the cursors, and compared byte by byte. A failing case prints its spec, whose seed makes everything else.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use kvtransfer::layout::{
    Attention, BUFFER_END_MAX, Component, ComponentKind, ENTRIES_MAX, Entry, ITEM_LEN_MAX, Layout,
    RegionId, Shard, StateShape,
};
use kvtransfer::plan::cursor::{Segment, SideCursor};
use kvtransfer::plan::descriptor::{Descriptor, Limits, PairCursor};
use kvtransfer::plan::mismatch::{End, LayoutMismatch};
use kvtransfer::plan::pairing::{Pairing, pair};
use kvtransfer::plan::ranges::{batches, stripe};
use kvtransfer::plan::stream::{ITEMS_MAX, Stream, check_items};
use proptest::prelude::*;

/// What a deployment looks like. Small numbers, so that a failing case is readable.
#[derive(Clone, Debug)]
struct Spec {
    latent: bool,
    heads: u32,
    source_tp: u32,
    target_tp: u32,
    source_pp: u32,
    target_pp: u32,
    layers: u32,
    page_size: u32,
    head_len: u64,
    drafts: u32,
    ids: bool,
    swa: bool,
    mamba: bool,
    pages: usize,
    seed: u64,
}

fn specs() -> impl Strategy<Value = Spec> {
    let two = || prop::sample::select(vec![1u32, 2, 4, 8]);
    let three = || prop::sample::select(vec![1u32, 3, 6]);
    let shards = prop_oneof![(two(), two(), two()), (three(), three(), three())];
    let pipelines = prop::sample::select(vec![(1u32, 1u32), (2, 2), (2, 1), (3, 1), (1, 2)]);
    let shape = (
        3u32..6,
        prop::sample::select(vec![1u32, 2, 4, 16]),
        1u64..5,
        0u32..3,
    );
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (shards, pipelines, shape, flags, 0usize..7, any::<u64>()).prop_map(
        |(shards, (source_pp, target_pp), shape, (latent, ids, swa, mamba), pages, seed)| {
            let (heads, source_tp, target_tp) = shards;
            let (layers, page_size, head_len, drafts) = shape;
            Spec {
                latent,
                heads: if latent { 1 } else { heads },
                source_tp,
                target_tp,
                source_pp,
                target_pp,
                layers,
                page_size,
                head_len,
                drafts,
                ids,
                swa,
                mamba: mamba && (latent || source_tp == target_tp),
                pages,
                seed,
            }
        },
    )
}

/// A small generator (splitmix64): the seed of the spec decides everything that is not in the spec.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn place(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).unwrap()
    }
}

/// What the bytes of one entry mean: which tensor, and which heads a token of it has on this rank.
#[derive(Clone)]
struct Meaning {
    tensor: u64,
    tokens: u64,
    heads: Vec<u64>,
    head_len: u64,
    layer_id: Option<u32>,
}

/// One rank: its layout, what its entries mean, its memory, how often each byte was written, its item lists.
struct Rank {
    layout: Layout,
    meanings: Vec<Vec<Meaning>>,
    memory: Vec<Vec<u8>>,
    written: Vec<Vec<u32>>,
    items: Vec<Vec<i32>>,
}

const REGIONS: usize = 3;

/// The byte that belongs at a place, whoever holds it.
fn truth(tensor: u64, token: u64, head: u64, byte: u64) -> u8 {
    let mut random = Random(tensor << 40 ^ token << 20 ^ head << 8 ^ byte);
    u8::try_from(random.below(256)).unwrap()
}

/// The heads of a rank, written out: each head of the model belongs to the ranks that share it.
fn heads_of(rank: u64, tp: u64, heads: u64) -> Vec<u64> {
    let holds = |head: &u64| {
        if heads >= tp {
            *head / (heads / tp) == rank
        } else {
            rank / (tp / heads) == *head
        }
    };
    (0..heads).filter(holds).collect()
}

impl Rank {
    fn new(spec: &Spec, end: End, tp_rank: u32, pp_rank: u32, random: &mut Random) -> Self {
        let (tp_size, pp_size) = match end {
            End::Source => (spec.source_tp, spec.source_pp),
            End::Target => (spec.target_tp, spec.target_pp),
        };
        let layers = pp_rank * spec.layers / pp_size..(pp_rank + 1) * spec.layers / pp_size;
        let held = if spec.latent {
            vec![0]
        } else {
            heads_of(tp_rank.into(), tp_size.into(), spec.heads.into())
        };
        let rank_kv_heads = u32::try_from(held.len()).unwrap();
        let attention = match spec.latent {
            true => Attention::Latent,
            false => Attention::Heads {
                total_kv_heads: spec.heads,
                rank_kv_heads,
            },
        };
        let layout = Layout {
            page_size: spec.page_size,
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention,
            tp: Shard {
                rank: tp_rank,
                size: tp_size,
            },
            pp: Shard {
                rank: pp_rank,
                size: pp_size,
            },
            layers: layers.clone(),
            components: Vec::new(),
        };
        let memory = vec![Vec::new(); REGIONS];
        let (meanings, written, items) = (Vec::new(), Vec::new(), Vec::new());
        let mut rank = Self {
            layout,
            meanings,
            memory,
            written,
            items,
        };
        // With ids the target may list its layers in another order.
        let mut order: Vec<u32> = layers.collect();
        if spec.ids && end == End::Target {
            order.reverse();
        }
        rank.add_paged(spec, ComponentKind::Kv, &order, &held, random);
        if spec.swa {
            rank.add_paged(
                spec,
                ComponentKind::State("swa".into()),
                &order,
                &held,
                random,
            );
        }
        if spec.mamba {
            rank.add_mamba(spec, &order, random);
        }
        rank.add_aux(random);
        rank.written = rank
            .memory
            .iter()
            .map(|region| vec![0; region.len()])
            .collect();
        rank
    }

    fn add_paged(
        &mut self,
        spec: &Spec,
        kind: ComponentKind,
        order: &[u32],
        held: &[u64],
        random: &mut Random,
    ) {
        let is_kv = kind == ComponentKind::Kv;
        let page = |tensor: u64, head_len: u64, layer_id: Option<u32>| Meaning {
            tensor: if is_kv { tensor } else { tensor | 1 << 16 },
            tokens: spec.page_size.into(),
            heads: held.to_vec(),
            head_len,
            layer_id,
        };
        let mut meanings = Vec::new();
        for half in 0..if spec.latent { 1 } else { 2 } {
            for layer in order {
                // V is wider than K, as in models with unlike head dimensions.
                let tensor = u64::from(*layer) << 2 | half;
                meanings.push(page(
                    tensor,
                    spec.head_len + half,
                    spec.ids.then_some(*layer),
                ));
            }
        }
        let drafts = if is_kv { spec.drafts } else { 0 };
        for draft in 0..drafts {
            meanings.push(page(1 << 20 | u64::from(draft), spec.head_len, None));
        }
        self.add(kind, meanings, drafts, spec.pages, random);
    }

    /// Two tensors per layer, of whole slots; each rank of a head-sharded model has its own.
    fn add_mamba(&mut self, spec: &Spec, order: &[u32], random: &mut Random) {
        let own = if spec.latent {
            0
        } else {
            u64::from(self.layout.tp.rank)
        };
        let mut meanings = Vec::new();
        for layer in order {
            for (part, head_len) in [(0, 3), (1, 17)] {
                let tensor = 1 << 22 | own << 12 | u64::from(*layer) << 1 | part;
                let layer_id = Some(*layer);
                meanings.push(Meaning {
                    tensor,
                    tokens: 1,
                    heads: vec![0],
                    head_len,
                    layer_id,
                });
            }
        }
        self.add(ComponentKind::State("mamba".into()), meanings, 0, 1, random);
    }

    fn add_aux(&mut self, random: &mut Random) {
        let row = |(place, head_len): (usize, u64)| Meaning {
            tensor: 1 << 21 | place as u64,
            tokens: 1,
            heads: vec![0],
            head_len,
            layer_id: None,
        };
        let meanings = [8, 1, 24, 8].into_iter().enumerate().map(row).collect();
        self.add(ComponentKind::Aux, meanings, 0, 1, random);
    }

    fn add(
        &mut self,
        kind: ComponentKind,
        meanings: Vec<Meaning>,
        draft_entries: u32,
        wanted: usize,
        random: &mut Random,
    ) {
        let item_count = wanted as u64 + random.below(4) + 1;
        let mut entries = Vec::new();
        for meaning in &meanings {
            let region = random.place(REGIONS);
            let memory = &mut self.memory[region];
            // Sometimes buffers touch, sometimes not.
            let offset = memory.len() as u64 + random.below(2) * random.below(9);
            let item_len = meaning.tokens * meaning.heads.len() as u64 * meaning.head_len;
            memory.resize(usize::try_from(offset + item_len * item_count).unwrap(), 0);
            let (region, layer_id) = (RegionId(u32::try_from(region).unwrap()), meaning.layer_id);
            entries.push(Entry {
                region,
                offset,
                item_len,
                item_count,
                layer_id,
            });
        }
        self.layout.components.push(Component {
            kind,
            entries,
            draft_entries,
            state: StateShape::default(),
        });
        self.meanings.push(meanings);
        // Runs with some swaps, as an allocator hands them out.
        let mut items: Vec<i32> = (0..i32::try_from(item_count).unwrap()).collect();
        for _ in 0..random.below(4) {
            let (a, b) = (random.place(items.len()), random.place(items.len()));
            items.swap(a, b);
        }
        items.truncate(wanted);
        check_items(&items, item_count).unwrap();
        self.items.push(items);
    }

    /// Calls `visit(region, offset, truth)` for every byte of the chosen items.
    fn for_each_byte(&self, mut visit: impl FnMut(usize, usize, u8)) {
        for (place, component) in self.layout.components.iter().enumerate() {
            for (entry, meaning) in component.entries.iter().zip(&self.meanings[place]) {
                for (position, item) in self.items[place].iter().enumerate() {
                    let start = entry.offset + u64::try_from(*item).unwrap() * entry.item_len;
                    let mut at = usize::try_from(start).unwrap();
                    for token in 0..meaning.tokens {
                        let token = position as u64 * meaning.tokens + token;
                        for head in &meaning.heads {
                            for byte in 0..meaning.head_len {
                                let value = truth(meaning.tensor, token, *head, byte);
                                visit(entry.region.0 as usize, at, value);
                                at += 1;
                            }
                        }
                    }
                }
            }
        }
    }

    fn fill(&mut self) {
        let mut memory = std::mem::take(&mut self.memory);
        self.for_each_byte(|region, at, value| memory[region][at] = value);
        self.memory = memory;
    }

    fn write(&mut self, region: RegionId, offset: u64, bytes: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        self.memory[region.0 as usize][at..at + bytes.len()].copy_from_slice(bytes);
        for count in &mut self.written[region.0 as usize][at..at + bytes.len()] {
            *count += 1;
        }
    }

    fn read(&self, region: RegionId, offset: u64, len: u64) -> &[u8] {
        let at = usize::try_from(offset).unwrap();
        &self.memory[region.0 as usize][at..at + usize::try_from(len).unwrap()]
    }
}

fn ranks(spec: &Spec, end: End, random: &mut Random) -> Vec<Rank> {
    let (tp, pp) = match end {
        End::Source => (spec.source_tp, spec.source_pp),
        End::Target => (spec.target_tp, spec.target_pp),
    };
    let places = (0..pp).flat_map(|pp_rank| (0..tp).map(move |tp_rank| (tp_rank, pp_rank)));
    places
        .map(|(tp_rank, pp_rank)| Rank::new(spec, end, tp_rank, pp_rank, random))
        .collect()
}

/// A component on its way from one rank to another.
struct Move<'a> {
    pairing: &'a Arc<Pairing>,
    place: usize,
    source: &'a Rank,
    target: &'a mut Rank,
}

impl Move<'_> {
    fn stream(&self) -> Stream<'_> {
        let items = self.source.items[self.place].len();
        Stream::new(&self.pairing.components[self.place], items).unwrap()
    }

    /// In one go, both sides at once, with random limits.
    fn paired(&mut self, random: &mut Random) {
        let place = self.place;
        let (from, to) = (
            self.source.items[place].clone(),
            self.target.items[place].clone(),
        );
        let len = self.stream().len_bytes();
        let mut limit = || NonZeroU64::new(random.below(3) * (random.below(40) + 1));
        let (len_max, source_chunk, target_chunk) = (limit(), limit(), limit());
        let limits = Limits {
            len_max,
            source_chunk,
            target_chunk,
        };
        let mut cursor =
            PairCursor::new(self.pairing.clone(), place, from.len(), 0..len, &limits).unwrap();
        let mut moved = 0;
        loop {
            let mut out = vec![Descriptor::EMPTY; random.place(5) + 1];
            let filled = cursor.fill(&from, &to, &mut out);
            for Descriptor {
                source,
                target,
                len,
            } in out[..filled].iter().copied()
            {
                assert!(len > 0 && len_max.is_none_or(|max| len <= max.get()));
                for (chunk, at) in [(source_chunk, source.offset), (target_chunk, target.offset)] {
                    let chunk = chunk.unwrap_or(NonZeroU64::MAX);
                    assert_eq!(at / chunk, (at + len - 1) / chunk, "crosses a chunk");
                }
                let bytes = self.source.read(source.region, source.offset, len);
                self.target.write(target.region, target.offset, bytes);
                moved += len;
            }
            assert_eq!(cursor.remaining(), len - moved);
            if filled < out.len() {
                break;
            }
        }
        assert_eq!(moved, len);
    }

    /// As a socket would: in random stripes and batches, each side knowing only its own items.
    fn streamed(&mut self, random: &mut Random) {
        let stream = self.stream();
        let weights = [0, 0, 1].map(|least| least + u32::try_from(random.below(9)).unwrap());
        let bytes_max = NonZeroU64::new(random.below(200) + 1).unwrap();
        let rails = stripe(&stream, 0..stream.len_bytes(), &weights).unwrap();
        let rails = rails
            .into_iter()
            .flat_map(|rail| batches(&stream, rail, bytes_max));
        let all: Vec<Range<u64>> = rails.collect();
        let mut expected = 0;
        for batch in &all {
            assert_eq!(batch.start, expected, "batches follow each other");
            assert!(batch.start < batch.end && batch.end - batch.start <= bytes_max.get());
            expected = batch.end;
        }
        assert_eq!(expected, stream.len_bytes(), "batches cover the stream");
        for batch in all {
            let step = random.place(4) + 1;
            let mut wire = Vec::new();
            for Segment {
                region,
                offset,
                len,
            } in self.segments(End::Source, &batch, step)
            {
                wire.extend_from_slice(self.source.read(region, offset, len));
            }
            let mut taken = 0;
            for Segment {
                region,
                offset,
                len,
            } in self.segments(End::Target, &batch, step)
            {
                let len = usize::try_from(len).unwrap();
                self.target.write(region, offset, &wire[taken..taken + len]);
                taken += len;
            }
            assert_eq!(taken, wire.len(), "both sides agree on the length");
        }
    }

    /// One side's segments, the same however they are asked for, none touching its follower.
    fn segments(&self, end: End, batch: &Range<u64>, step: usize) -> Vec<Segment> {
        let rank = if end == End::Source {
            self.source
        } else {
            &*self.target
        };
        let items = &rank.items[self.place];
        let walk = |step: usize| {
            let pairing = self.pairing.clone();
            let range = batch.clone();
            let mut cursor = SideCursor::new(pairing, self.place, end, items.len(), range).unwrap();
            let mut out = vec![Segment::EMPTY; step];
            let mut all = Vec::new();
            loop {
                let filled = cursor.fill(items, &mut out);
                all.extend_from_slice(&out[..filled]);
                if filled < step {
                    assert_eq!(cursor.remaining(), 0);
                    return all;
                }
            }
        };
        let whole = walk(10_000);
        assert_eq!(whole, walk(step), "the buffer's size does not matter");
        let len: u64 = whole.iter().map(|segment| segment.len).sum();
        assert_eq!(len, batch.end - batch.start);
        for two in whole.windows(2) {
            let touch =
                two[0].region == two[1].region && two[0].offset + two[0].len == two[1].offset;
            assert!(!touch, "touching segments are merged: {two:?}");
        }
        whole
    }
}

fn check_deployment(spec: &Spec, mut carry: impl FnMut(Move<'_>, &mut Random)) {
    let mut random = Random(spec.seed);
    let mut sources = ranks(spec, End::Source, &mut random);
    sources.iter_mut().for_each(Rank::fill);
    for mut target in ranks(spec, End::Target, &mut random) {
        let mut feeders = 0;
        for source in &sources {
            let pairing = match pair(&source.layout, &target.layout) {
                Ok(pairing) => Arc::new(pairing),
                Err(LayoutMismatch::TpRanks { .. } | LayoutMismatch::LayersDisjoint { .. }) => {
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            feeders += 1;
            for place in 0..pairing.components.len() {
                let target = &mut target;
                carry(
                    Move {
                        pairing: &pairing,
                        place,
                        source,
                        target,
                    },
                    &mut random,
                );
            }
        }
        let tp_feeders = (spec.source_tp / spec.target_tp).max(1);
        assert_eq!(
            feeders,
            tp_feeders * (spec.source_pp / spec.target_pp).max(1)
        );
        check_target(&target);
    }
}

/// Every byte of the granted items holds the truth and was written once; no other byte was touched.
fn check_target(target: &Rank) {
    let mut granted: Vec<Vec<u32>> = target
        .memory
        .iter()
        .map(|region| vec![0; region.len()])
        .collect();
    target.for_each_byte(|region, at, value| {
        granted[region][at] = 1;
        assert_eq!(
            target.memory[region][at], value,
            "region {region} byte {at}"
        );
    });
    for (region, (granted, written)) in granted.iter().zip(&target.written).enumerate() {
        for (at, (granted, written)) in granted.iter().zip(written).enumerate() {
            assert_eq!(granted, written, "writes to region {region} byte {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn paired_moves_fill_every_granted_byte_once(spec in specs()) {
        check_deployment(&spec, |mut chunk, random| chunk.paired(random));
    }

    #[test]
    fn streamed_moves_fill_every_granted_byte_once(spec in specs()) {
        check_deployment(&spec, |mut chunk, random| chunk.streamed(random));
    }

    /// A peer may send any numbers: an answer or an error, never a panic.
    #[test]
    fn hostile_numbers_do_not_panic(
        numbers in prop::collection::vec(
            prop_oneof![40 => 1u64..3, 2 => 0u64..20, 1 => any::<u64>(), 1 => Just(1 << 31), 1 => Just(1 << 62)],
            16,
        ),
        range in (any::<u64>(), any::<u64>()),
        items in prop::collection::vec(any::<i32>(), 0..4),
        latent in any::<bool>(),
    ) {
        let small = |at: usize| u32::try_from(numbers[at] % (1 << 32)).unwrap();
        let entry = |at: usize| Entry {
            region: RegionId(small(at)),
            offset: numbers[at + 1],
            item_len: numbers[at + 2],
            item_count: numbers[at + 3],
            layer_id: None,
        };
        let kv = Component {
            kind: ComponentKind::Kv,
            entries: vec![entry(0), entry(4)],
            draft_entries: small(8) % 3,
            state: StateShape::default(),
        };
        let heads = Attention::Heads { total_kv_heads: small(10), rank_kv_heads: small(11) };
        let layout = |tp: Shard| Layout {
            page_size: small(9),
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention: if latent { Attention::Latent } else { heads },
            tp,
            pp: Shard::ONE,
            layers: small(12)..small(13),
            components: vec![kv.clone()],
        };
        let odd = Shard { rank: small(14), size: small(15) };
        for (source, target) in [(odd, Shard::ONE), (Shard::ONE, Shard::ONE), (odd, odd)] {
            if let Ok(pairing) = pair(&layout(source), &layout(target)) {
                drive_hostile(Arc::new(pairing), range.0..range.1, &items);
            }
        }
    }
}

/// The biggest stream the limits allow, and items that nobody checked.
fn drive_hostile(pairing: Arc<Pairing>, range: Range<u64>, items: &[i32]) {
    let len = Stream::new(&pairing.components[0], items.len())
        .unwrap()
        .len_bytes();
    let refused = SideCursor::new(pairing.clone(), 0, End::Target, items.len(), range.clone());
    assert_eq!(
        refused.is_ok(),
        range.start <= range.end && range.end <= len
    );
    assert!(SideCursor::new(pairing.clone(), 1, End::Target, 0, 0..0).is_err());
    let part = len / 3..len;
    let mut cursor =
        SideCursor::new(pairing.clone(), 0, End::Source, items.len(), part.clone()).unwrap();
    cursor.fill(items, &mut [Segment::EMPTY; 8]);
    let mut cursor = PairCursor::new(pairing, 0, items.len(), part, &Limits::default()).unwrap();
    cursor.fill(items, items, &mut [Descriptor::EMPTY; 8]);
}

/// The last bytes of the longest stream that validation lets through, with the worst index nobody checked: overflow
/// checks are on in this profile, so this fails if a limit is too generous.
#[test]
fn the_longest_stream_does_not_overflow() {
    let item_count = 1 << 20;
    let entry = Entry {
        region: RegionId(0),
        offset: BUFFER_END_MAX - ITEM_LEN_MAX * item_count,
        item_len: ITEM_LEN_MAX,
        item_count,
        layer_id: None,
    };
    let kv = |len: u64| Component {
        kind: ComponentKind::Kv,
        entries: [
            Entry {
                item_len: len,
                ..entry
            },
            entry,
        ]
        .repeat(ENTRIES_MAX / 2),
        draft_entries: 0,
        state: StateShape::default(),
    };
    for (first_len, wanted_len) in [
        (ITEM_LEN_MAX, 1 << 63),
        (ITEM_LEN_MAX - 1, (1 << 63) - (1 << 31)),
    ] {
        let layout = Layout {
            page_size: 1,
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention: Attention::Latent,
            tp: Shard::ONE,
            pp: Shard::ONE,
            layers: 0..1,
            components: vec![kv(first_len)],
        };
        let pairing = Arc::new(pair(&layout, &layout).unwrap());
        let items = vec![-1; ITEMS_MAX];
        let stream = Stream::new(&pairing.components[0], items.len()).unwrap();
        assert_eq!(stream.len_bytes(), wanted_len);
        let tail = wanted_len - 3 * ITEM_LEN_MAX - 5..wanted_len;
        let mut cursor =
            SideCursor::new(pairing.clone(), 0, End::Source, items.len(), tail.clone()).unwrap();
        let mut segments = [Segment::EMPTY; 8];
        assert_eq!(cursor.fill(&items, &mut segments), 4);
        assert_eq!(segments[0].len, 5);
        assert!(
            segments[0].offset > BUFFER_END_MAX,
            "beyond any region, so the owner refuses it"
        );
        let limits = Limits {
            len_max: NonZeroU64::new(ITEM_LEN_MAX),
            ..Limits::default()
        };
        let mut cursor = PairCursor::new(pairing.clone(), 0, items.len(), tail, &limits).unwrap();
        assert_eq!(cursor.fill(&items, &items, &mut [Descriptor::EMPTY; 8]), 4);
        assert_eq!(cursor.remaining(), 0);
        let rails = stripe(&stream, 0..u64::MAX, &[u32::MAX, 0, u32::MAX]).unwrap();
        assert_eq!(rails[2].end, wanted_len);
        assert_eq!(rails[1], rails[0].end..rails[0].end);
    }
}

#[test]
fn batches_and_stripes_cut_between_items_where_they_can() {
    let spec = Spec {
        latent: true,
        heads: 1,
        source_tp: 1,
        target_tp: 1,
        source_pp: 1,
        target_pp: 1,
        layers: 3,
        page_size: 4,
        head_len: 5,
        drafts: 0,
        ids: false,
        swa: false,
        mamba: false,
        pages: 6,
        seed: 1,
    };
    let rank = Rank::new(&spec, End::Source, 0, 0, &mut Random(1));
    let pairing = pair(&rank.layout, &rank.layout).unwrap();
    // 3 layers of 6 pages of 20 bytes.
    let stream = Stream::new(&pairing.components[0], 6).unwrap();
    let cut = |bytes_max: u64| -> Vec<Range<u64>> {
        batches(&stream, 0..u64::MAX, NonZeroU64::new(bytes_max).unwrap()).collect()
    };
    assert_eq!(cut(100), [0..100, 100..200, 200..300, 300..360]);
    assert_eq!(cut(59)[..2], [0..40, 40..80], "an item is not torn");
    assert_eq!(
        cut(7)[..4],
        [0..7, 7..14, 14..20, 20..27],
        "unless it does not fit"
    );
    assert_eq!(cut(u64::MAX), [0..360; 1]);
    let thirds = stripe(&stream, 0..360, &[1, 0, 1, 1]).unwrap();
    assert_eq!(thirds, [0..120, 120..120, 120..240, 240..360]);
    assert_eq!(stripe(&stream, 0..100, &[1, 2]).unwrap(), [0..20, 20..100]);
    assert_eq!(stripe(&stream, 0..360, &[0, 0]), None);
    assert_eq!(stripe(&stream, 0..360, &[]), None);
}
