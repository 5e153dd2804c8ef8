//! One suite for every transport: a case is a function over a [`Fabric`], and says which promise it defends.
//!
//! A new transport implements [`Fabric`] and calls [`conformance_cases!`](crate::conformance_cases) in a test file; each
//! case becomes a test of its own, named after it.
//!
//! ```text
//! kvtransfer::conformance_cases!(tcp, EngineFabric<Tcp>);
//! ```

pub mod bytes;
mod device_fabric;
mod engine_fabric;
pub mod peers;
pub mod rooms;
mod sim_fabric;
mod verbs_fabric;

pub use device_fabric::{
    DevicePullPath, DeviceRails, DeviceRingPath, DeviceTcpPath, DmaBufRails, HalfRails,
    MixedPullPath, MixedRails, MixedTcpPath, PeerMemoryRails, StagedRails,
};
pub use engine_fabric::{EngineFabric, Path, PullPath, RingPath, TcpPath};
pub use sim_fabric::{Inline, Mode, Pull, Ring, SimFabric, Write};
pub use verbs_fabric::{FakeNetwork, PACKED_STAGING_BYTES, wait_for};

use std::{sync::Arc, time::Duration};

use super::{
    model::{Model, each_run, pattern, route},
    sim::RankSpec,
};
use crate::{
    error::{SubmitError, TransferError},
    ids::Room,
    layout::{Layout, RegionId},
    transfer::{Chunk, NodeConfig, SendRequest, Summary},
};

/// How long anything that must happen may take: far above what it takes, and below a test's patience.
pub const SOON: Duration = Duration::from_secs(10);

/// The receiving side of a room, with ranks for peers.
#[derive(Clone, Debug)]
pub struct Receive {
    /// The room.
    pub room: u64,
    /// Who sends, and whether as a dummy.
    pub sources: Vec<(usize, bool)>,
    /// How many receivers each sender waits for.
    pub receivers_expected: u16,
    /// Target items per component.
    pub items: Vec<Vec<i32>>,
    /// Its deadline.
    pub timeout: Duration,
}

/// Some ranks, each with memory and an engine, that a transport connects. Ranks are named by their index.
pub trait Fabric: Sized {
    /// One side of a room. It stays valid after its end.
    type Transfer;

    /// Starts the ranks, unconnected, two lanes per connection to come.
    fn start(ranks: Vec<RankSpec>) -> Self;
    /// The name of the path that bytes between two connected ranks take, and the one that is expected.
    fn path(&mut self, from: usize, to: usize) -> (String, &'static str);
    /// Connects two ranks; `from` dials.
    ///
    /// # Errors
    /// The sentence that says why not.
    fn connect(&mut self, from: usize, to: usize) -> Result<(), String>;
    /// Whether `rank` has a connection to `other`.
    fn is_connected(&mut self, rank: usize, other: usize) -> bool;
    /// Writes a rank's memory as its application.
    fn write(&mut self, rank: usize, region: RegionId, offset: u64, bytes: &[u8]);
    /// Reads a rank's memory as its application.
    fn read(&mut self, rank: usize, region: RegionId, offset: u64, len: u64) -> Vec<u8>;
    /// Opens a sending side.
    ///
    /// # Errors
    /// As the engine's.
    fn send(&mut self, rank: usize, request: &SendRequest) -> Result<Self::Transfer, SubmitError>;
    /// Opens a receiving side.
    ///
    /// # Errors
    /// As the engine's.
    fn receive(&mut self, rank: usize, request: &Receive) -> Result<Self::Transfer, SubmitError>;
    /// Queues pages.
    ///
    /// # Errors
    /// As the engine's.
    fn push(&mut self, transfer: &Self::Transfer, chunk: &Chunk) -> Result<(), SubmitError>;
    /// Waits for every grant.
    ///
    /// # Errors
    /// As the engine's.
    fn wait_ready(&mut self, transfer: &Self::Transfer) -> Result<u32, TransferError>;
    /// Waits for the end, for at most `timeout`.
    fn wait(&mut self, transfer: &Self::Transfer, timeout: Duration) -> Option<Outcome>;
    /// Ends it now, and returns when it has ended.
    fn cancel(&mut self, transfer: &Self::Transfer);
    /// Lets time pass.
    fn pass(&mut self, time: Duration);
    /// Resets one lane between two ranks, noticed by `rank` first.
    fn reset_lane(&mut self, rank: usize, other: usize, lane: u8);
    /// Ends a rank's engine in good order.
    fn shut_down(&mut self, rank: usize);
    /// Ends a rank's engine and starts a new one at the same address.
    fn restart(&mut self, rank: usize);
    /// Messages about rooms that are over, as counted by a rank.
    fn late_messages(&mut self, rank: usize) -> u64;
}

/// How a transfer ended.
pub type Outcome = Result<Summary, TransferError>;

/// A model on a fabric.
pub struct Bench<F> {
    /// The ranks.
    pub fabric: F,
    /// Their layouts; the sources come first.
    pub layouts: Vec<Layout>,
    /// How many sources.
    pub sources: usize,
}

/// One room of a bench: every source sends, every target receives.
pub struct Deal {
    /// The room.
    pub room: u64,
    /// KV pages per chunk; the last chunk also carries states and aux.
    pub chunks: Vec<usize>,
    /// Source items per component, the same on every rank.
    pub from: Vec<Vec<i32>>,
    /// Target items per component, the same on every rank.
    pub to: Vec<Vec<i32>>,
}

impl Deal {
    /// A room that moves `pages` pages, a state item if the model has states, and an aux row.
    pub fn new(model: &Model, room: u64, chunks: &[usize]) -> Self {
        let pages: usize = chunks.iter().sum();
        let count = i32::try_from(model.pages).expect("invariant: models are small");
        let list = |factor: i32, len: usize| (1..).map(|i| i * factor % count).take(len).collect();
        let lists = |factor: i32, slot: i32| {
            let mut lists: Vec<Vec<i32>> = vec![list(factor, pages)];
            if model.has_state {
                lists.push(vec![slot + 1]);
            }
            lists.push(vec![slot]);
            lists
        };
        Self {
            room,
            chunks: chunks.to_vec(),
            from: lists(5, 1),
            to: lists(11, 3),
        }
    }

    /// The chunks to push.
    pub fn pushes(&self) -> Vec<Chunk> {
        let mut start = 0;
        let chunks = self.chunks.iter().enumerate().map(|(index, len)| {
            let last = index + 1 == self.chunks.len();
            let mut items = vec![Arc::from(&self.from[0][start..start + len])];
            start += len;
            if last {
                let rest = self.from[1..].iter();
                items.extend(rest.map(|list| Arc::from(list.as_slice())));
            }
            Chunk { items, last }
        });
        chunks.collect()
    }
}

/// The number of a room.
///
/// # Panics
/// For 0.
pub fn room(number: u64) -> Room {
    Room::new(number).expect("invariant: tests use rooms from 1 on")
}

/// A request to send.
pub fn to_send(number: u64, timeout: Duration) -> SendRequest {
    SendRequest {
        room: room(number),
        timeout,
    }
}

impl<F: Fabric> Bench<F> {
    /// A model, cut over groups of TP and PP sizes, everybody connected whom the layouts connect; targets dial.
    pub fn new(model: &Model, (tp, pp): (u32, u32), target_tp: u32, node: &NodeConfig) -> Self {
        let (mut specs, mut layouts) = (Vec::new(), Vec::new());
        let groups = model.group(tp, pp).into_iter();
        let sources = groups.len();
        for (layout, regions) in groups.chain(model.group(target_tp, 1)) {
            layouts.push(layout.clone());
            let node = node.clone();
            specs.push(RankSpec {
                layout,
                regions,
                node,
            });
        }
        let mut bench = Self {
            fabric: F::start(specs),
            layouts,
            sources,
        };
        for target in sources..bench.layouts.len() {
            for source in bench.sources_of(target) {
                let connected = bench.fabric.connect(target, source.0);
                connected.expect("the layouts fit");
            }
        }
        bench
    }

    /// One source, one target, defaults all over.
    pub fn duo(model: &Model) -> Self {
        Self::new(model, (1, 1), 1, &NodeConfig::default())
    }

    /// Who feeds a target, and whether as a dummy.
    pub fn sources_of(&self, target: usize) -> Vec<(usize, bool)> {
        let found = (0..self.sources).filter_map(|source| {
            route(&self.layouts[source], &self.layouts[target]).map(|found| (source, found.1))
        });
        found.collect()
    }

    /// A target's side of a deal.
    pub fn receive_of(&self, target: usize, deal: &Deal) -> Receive {
        let sources = self.sources_of(target);
        let first = sources[0].0;
        let targets = (self.sources..self.layouts.len())
            .filter(|to| route(&self.layouts[first], &self.layouts[*to]).is_some());
        Receive {
            room: deal.room,
            sources,
            receivers_expected: u16::try_from(targets.count()).unwrap_or(u16::MAX),
            items: deal.to.clone(),
            timeout: SOON,
        }
    }

    /// Opens the receiving side of a deal at the first target.
    ///
    /// # Panics
    /// If it is refused.
    pub fn receive(&mut self, deal: &Deal) -> F::Transfer {
        let request = self.receive_of(self.sources, deal);
        self.fabric
            .receive(self.sources, &request)
            .expect("the receiver opens")
    }

    /// Opens the sending side of a room at the first source.
    ///
    /// # Panics
    /// If it is refused.
    pub fn send(&mut self, number: u64) -> F::Transfer {
        let request = to_send(number, SOON);
        self.fabric.send(0, &request).expect("the sender opens")
    }

    /// Fills every source's memory with its own pattern.
    pub fn fill(&mut self, salt: u64) {
        for source in 0..self.sources {
            self.fill_rank(source, salt + source as u64);
        }
    }

    /// Fills the buffers of a rank with a pattern.
    pub fn fill_rank(&mut self, rank: usize, salt: u64) {
        let components = self.layouts[rank].components.clone();
        for entry in components.iter().flat_map(|component| &component.entries) {
            let end = entry.offset + entry.item_len * entry.item_count;
            let bytes: Vec<u8> = (entry.offset..end)
                .map(|at| pattern(salt, entry.region, at))
                .collect();
            self.fabric.write(rank, entry.region, entry.offset, &bytes);
        }
    }

    /// All memory of a rank that its layout names.
    pub fn image(&mut self, rank: usize) -> Vec<u8> {
        let components = self.layouts[rank].components.clone();
        let mut image = Vec::new();
        for entry in components.iter().flat_map(|component| &component.entries) {
            let len = entry.item_len * entry.item_count;
            image.extend(self.fabric.read(rank, entry.region, entry.offset, len));
        }
        image
    }

    /// Whether every byte of a deal is at a target, and no other byte of it changed from `fill_rank`'s `blank`.
    ///
    /// # Panics
    /// If not.
    pub fn check(&mut self, target: usize, deal: &Deal, salt: u64, blank: u64) {
        let got = self.image(target);
        self.fill_rank(target, blank);
        for (source, _) in self.sources_of(target) {
            let Some((pairing, _)) = route(&self.layouts[source], &self.layouts[target]) else {
                continue;
            };
            let items: Vec<_> = deal.from.iter().cloned().zip(deal.to.clone()).collect();
            let salt = salt + source as u64;
            let mut writes = Vec::new();
            each_run(&pairing, &items, |_, run| {
                let bytes: Vec<u8> = (run.source.offset..run.source.offset + run.len)
                    .map(|at| pattern(salt, run.source.region, at))
                    .collect();
                writes.push((run.target, bytes));
            });
            for (place, bytes) in writes {
                self.fabric
                    .write(target, place.region, place.offset, &bytes);
            }
        }
        let wanted = self.image(target);
        let wrong = got.iter().zip(&wanted).filter(|(got, want)| got != want);
        assert_eq!(wrong.count(), 0, "wrong bytes at rank {target}");
    }

    /// Moves a whole room over all ranks and compares every byte.
    ///
    /// # Panics
    /// If anything fails.
    pub fn run(&mut self, deal: &Deal) {
        const BLANK: u64 = 0xB1A2;
        let salt = deal.room << 20;
        self.fill(salt);
        let targets = self.sources..self.layouts.len();
        let mut sides = Vec::new();
        for target in targets.clone() {
            self.fill_rank(target, BLANK);
            let request = self.receive_of(target, deal);
            let opened = self.fabric.receive(target, &request);
            sides.push(opened.expect("the receiver opens"));
        }
        for source in 0..self.sources {
            let request = to_send(deal.room, SOON);
            let send = self
                .fabric
                .send(source, &request)
                .expect("the sender opens");
            let ready = self.fabric.wait_ready(&send).expect("all receivers grant");
            assert_eq!(ready, PREFIX);
            for chunk in deal.pushes() {
                self.fabric.push(&send, &chunk).expect("the chunk is taken");
            }
            sides.push(send);
        }
        for side in &sides {
            let end = self.fabric.wait(side, SOON).expect("it ends in time");
            end.expect("it succeeds");
        }
        for target in targets {
            self.check(target, deal, salt, BLANK);
        }
    }
}

/// The prefix that every receiver of the suite holds.
pub const PREFIX: u32 = 5;

/// Makes a module of tests: every case of the suite over one fabric. Attributes in front of the name go to every test.
#[macro_export]
macro_rules! conformance_cases {
    ($(#[$attribute:meta])* $name:ident, $fabric:ty) => {
        $crate::conformance_cases!(@list [$(#[$attribute])*] $name, $fabric,
            bytes: contiguous, scattered, page_sizes, many_chunks, zero_page_last_chunk, states_and_aux_in_order,
                latent, heads_two_to_one, heads_one_to_two, stages_two_to_one, replicas_with_dummies, larger_than_a_batch;
            rooms: cancelled_by_the_sender, cancelled_by_the_receiver, deadline_without_sender, deadline_without_pages,
                duplicate_rooms, room_reuse, grant_before_sender, grant_without_sender, cancelled_before_the_sender_opens,
                late_messages_are_ignored, more_pages_than_granted, fewer_pages_than_granted, full_queue, full_table;
            peers: path_is_named, wrong_layouts, reconnect, restart, shutdown, rooms_after_a_lost_lane, lost_lane, lost_lane_of_the_receiver;
        );
    };
    (@list $attributes:tt $name:ident, $fabric:ty, $($group:ident: $($case:ident),* ;)*) => {
        mod $name {
            $($(
                $crate::conformance_cases!(@case $attributes $group $case $fabric);
            )*)*
        }
    };
    (@case [$($attributes:tt)*] $group:ident $case:ident $fabric:ty) => {
        #[test]
        $($attributes)*
        fn $case() {
            $crate::testing::conformance::$group::$case::<$fabric>();
        }
    };
}
