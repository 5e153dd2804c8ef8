//! What must hold after every event, whatever the seed.

use std::{collections::HashMap, ops::Range, sync::Arc};

use super::{
    rank::Handle,
    world::{PlacedBytes, World},
};
use crate::{
    layout::{ComponentKind, Layout, RegionId},
    plan::{descriptor::Descriptor, pairing::Pairing},
    testing::model::{each_run, item_ranges, pattern},
};

/// What the application fills released and unreleased target pages with.
const POISON: u64 = 0x5EED;

/// What one sender owes one receiver: which bytes come from where.
#[derive(Clone, Debug)]
pub(super) struct Owed {
    /// The sending rank.
    pub(super) sender: usize,
    pairing: Arc<Pairing>,
    /// Source and target items per component.
    items: Vec<(Vec<i32>, Vec<i32>)>,
    salt: u64,
    /// KV and state bytes that have not arrived.
    missing: u64,
    /// All bytes were right when the receiver's side ended.
    pub(super) is_complete: bool,
}

impl Owed {
    pub(super) fn new(
        sender: usize,
        salt: u64,
        pairing: Arc<Pairing>,
        items: Vec<(Vec<i32>, Vec<i32>)>,
    ) -> Self {
        Self {
            sender,
            pairing,
            items,
            salt,
            missing: 0,
            is_complete: false,
        }
    }

    fn each(&self, f: impl FnMut(usize, &Descriptor)) {
        each_run(&self.pairing, &self.items, f);
    }

    /// Whether every owed byte is in the receiver's memory.
    fn is_in(&self, world: &World, receiver: usize) -> bool {
        let mut is_right = true;
        self.each(|_, run| {
            let got = world.read(receiver, run.target.region, run.target.offset, run.len);
            let wanted =
                (0..).map(|i| pattern(self.salt, run.source.region, run.source.offset + i));
            is_right &= got
                .iter()
                .copied()
                .zip(wanted)
                .all(|(got, wanted)| got == wanted);
        });
        is_right
    }
}

/// A live receiving transfer.
struct Receiving {
    owed: Vec<Owed>,
    granted: Vec<(RegionId, Range<u64>)>,
    /// Per region and byte: 1 + index of the sender that owes it, for KV and states not yet arrived.
    awaited: Vec<Vec<u8>>,
    /// Bytes of the aux row's last entry, and the index of their sender.
    number: Vec<(RegionId, Range<u64>, usize)>,
}

/// Watches the memory of every receiver.
#[derive(Default)]
pub(super) struct Checker {
    live: HashMap<Handle, Receiving>,
    /// What ended: (sender, whether all its bytes were in).
    over: HashMap<Handle, Vec<(usize, bool)>>,
}

impl Checker {
    /// A receiver granted pages; they are poisoned first.
    pub(super) fn opened(
        &mut self,
        world: &mut World,
        handle: Handle,
        layout: &Layout,
        items: &[Vec<i32>],
        mut owed: Vec<Owed>,
    ) {
        let granted: Vec<(RegionId, Range<u64>)> = layout
            .components
            .iter()
            .zip(items)
            .flat_map(|(component, items)| {
                let ranges = items.iter().flat_map(|item| item_ranges(component, *item));
                ranges.map(|(region, at, len)| (region, at..at + len))
            })
            .collect();
        poison(world, handle.rank, &granted);
        let mut awaited: Vec<Vec<u8>> = world.region_lens(handle.rank);
        let mut number = Vec::new();
        let aux = layout.components.len() - 1;
        let is_aux = layout.components[aux].kind == ComponentKind::Aux;
        let last_entry = layout.components[aux].entries.last().map(|entry| {
            let end = entry.offset + entry.item_len * entry.item_count;
            (entry.region, entry.offset..end)
        });
        for (index, owed) in owed.iter_mut().enumerate() {
            let mark = u8::try_from(index + 1).expect("invariant: few senders");
            let mut missing = 0;
            owed.each(|component, run| {
                let (region, at) = (run.target.region, run.target.offset);
                if component == aux && is_aux {
                    let range = last_entry.clone().filter(|(known, range)| {
                        *known == region && at < range.end && at + run.len > range.start
                    });
                    if let Some((_, range)) = range {
                        let range = at.max(range.start)..(at + run.len).min(range.end);
                        number.push((region, range, index));
                    }
                    return;
                }
                missing += run.len;
                slice(&mut awaited, region, at, run.len).fill(mark);
            });
            owed.missing = missing;
        }
        let receiving = Receiving {
            owed,
            granted,
            awaited,
            number,
        };
        let earlier = self.live.insert(handle, receiving);
        assert!(earlier.is_none(), "{handle:?} was opened twice");
    }

    /// Bytes were written by a transport: P1 (only into a live transfer's own pages) and P6 (the room number last).
    pub(super) fn placed(&mut self, placed: &PlacedBytes) {
        let PlacedBytes {
            handle,
            region,
            offset,
            len,
        } = *placed;
        let Some(receiving) = self.live.get_mut(&handle) else {
            panic!("P1: {len} bytes at {offset} of {region:?} for {handle:?}, which has ended");
        };
        let end = offset + len;
        let is_granted = receiving
            .granted
            .iter()
            .any(|(known, range)| *known == region && range.start <= offset && end <= range.end);
        // Adjacent pages may be written at once; then every byte must be granted.
        let is_granted = is_granted
            || (offset..end).all(|at| {
                let mut ranges = receiving.granted.iter();
                ranges.any(|(known, range)| *known == region && range.contains(&at))
            });
        assert!(
            is_granted,
            "{handle:?}: {offset}..{end} of {region:?} was never granted"
        );
        for mark in slice(&mut receiving.awaited, region, offset, len) {
            if *mark > 0 {
                receiving.owed[usize::from(*mark) - 1].missing -= 1;
                *mark = 0;
            }
        }
        for (known, range, sender) in &receiving.number {
            if *known == region && offset < range.end && end > range.start {
                let missing = receiving.owed[*sender].missing;
                assert!(
                    missing == 0,
                    "P6: {handle:?} got its room number before {missing} bytes of KV and state"
                );
            }
        }
    }

    /// A receiver's application learned of the end: on success every byte must be right. Its pages are poisoned and
    /// belong to it no more.
    pub(super) fn ended(&mut self, world: &mut World, handle: Handle, is_success: bool) {
        let Some(mut receiving) = self.live.remove(&handle) else {
            panic!("{handle:?} ended twice, or was never opened");
        };
        for owed in &mut receiving.owed {
            owed.is_complete = owed.is_in(world, handle.rank);
            assert!(
                owed.is_complete || !is_success,
                "{handle:?} succeeded, but bytes of rank {} are wrong",
                owed.sender
            );
        }
        poison(world, handle.rank, &receiving.granted);
        let done = receiving.owed.iter().map(|o| (o.sender, o.is_complete));
        self.over.insert(handle, done.collect());
    }

    /// Checks that nobody has touched pages since their application poisoned them.
    pub(super) fn check_poison(world: &World, rank: usize, ranges: &[(RegionId, Range<u64>)]) {
        for (region, range) in ranges {
            let bytes = world.read(rank, *region, range.start, range.end - range.start);
            let wanted = range.clone().map(|at| pattern(POISON, *region, at));
            let is_right = bytes
                .iter()
                .copied()
                .zip(wanted)
                .all(|(got, want)| got == want);
            assert!(
                is_right,
                "P1: rank {rank}: {range:?} of {region:?} changed after its end"
            );
        }
    }

    /// A sender learned of its success: the receiver must have all its bytes (promise P8).
    pub(super) fn sender_succeeded(&self, world: &World, sender: usize, receiver: Handle) {
        let is_complete = if let Some(receiving) = self.live.get(&receiver) {
            let owed = receiving.owed.iter().find(|owed| owed.sender == sender);
            owed.is_none_or(|owed| owed.is_in(world, receiver.rank))
        } else {
            let over = self.over.get(&receiver);
            let done = over.and_then(|over| over.iter().find(|done| done.0 == sender));
            done.is_none_or(|done| done.1)
        };
        assert!(
            is_complete,
            "P8: rank {sender} succeeded, but {receiver:?} lacks some of its bytes"
        );
    }

    /// A rank's process is about to die: what it had is noted.
    pub(super) fn died(&mut self, world: &mut World, rank: usize) {
        let dying: Vec<Handle> = self
            .live
            .keys()
            .copied()
            .filter(|h| h.rank == rank)
            .collect();
        for handle in dying {
            self.ended(world, handle, false);
        }
    }

    pub(super) fn live(&self) -> usize {
        self.live.len()
    }
}

fn poison(world: &mut World, rank: usize, ranges: &[(RegionId, Range<u64>)]) {
    for (region, range) in ranges {
        let bytes: Vec<u8> = range
            .clone()
            .map(|at| pattern(POISON, *region, at))
            .collect();
        world.write(rank, *region, range.start, &bytes);
    }
}

fn slice(map: &mut [Vec<u8>], region: RegionId, offset: u64, len: u64) -> &mut [u8] {
    let start = usize::try_from(offset).expect("invariant: simulated regions are small");
    let len = usize::try_from(len).expect("invariant: simulated regions are small");
    &mut map[region.0 as usize][start..start + len]
}
