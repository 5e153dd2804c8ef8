//! Plays a scenario: the applications on all ranks, the faults, the checks.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use super::{
    Report, Weather,
    draw::{self, RoomPlan},
};
use crate::{
    error::TransferError,
    layout::{Layout, RegionId},
    plan::pairing::Pairing,
    testing::{
        model::{item_ranges, pattern, route},
        sim::{Dice, Handle, LinkSpec, Notice, RankSpec, World, check::Checker},
    },
    time::Time,
    transfer::Summary,
    wire::{control::FailureCode, lane::PayloadMode},
};

/// How much later than its deadline a transfer may end: one turn of the event loop.
const SLACK: Duration = Duration::from_micros(100);
/// How much later a failed one ends whose queue pairs must be destroyed first, after its bound for that.
const DESTROY: Duration = Duration::from_micros(500);
/// When the last room begins.
const ROOMS_BEGIN: Duration = Duration::from_millis(20);
const ROOMS: u64 = 6;

#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Begin(usize),
    Send(usize, usize),
    Receive(usize, usize),
    Push(Handle, usize, usize),
    Cancel(Handle),
    ResetLane(usize),
    DropLink(usize),
    Freeze(usize),
    Kill(usize),
    Restart(usize),
    Reconnect(usize),
}

/// A transfer that has not ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Live {
    pub(super) room: usize,
    pub(super) is_sender: bool,
    pub(super) deadline: Time,
}

pub(super) struct Stage {
    pub(super) weather: Weather,
    pub(super) dice: Dice,
    pub(super) world: World,
    pub(super) checker: Checker,
    pub(super) layouts: Vec<Layout>,
    /// Prefill ranks come first.
    pub(super) sources: usize,
    pub(super) routes: HashMap<(usize, usize), (Arc<Pairing>, bool)>,
    /// (prefill, decode), and how they are connected.
    pub(super) links: Vec<(usize, usize, LinkSpec)>,
    pub(super) rooms: Vec<RoomPlan>,
    /// Free items per rank and component.
    pub(super) free: Vec<Vec<Vec<i32>>>,
    /// Released target items, still poisoned: (rank, component, item) → the rank's life.
    pub(super) poisoned: HashMap<(usize, usize, i32), u32>,
    pub(super) live: BTreeMap<Handle, Live>,
    pub(super) thawed: Vec<Time>,
    /// How much later than its deadline a transfer of a rank may end.
    slack: Vec<Duration>,
    pub(super) acts: BTreeMap<(Time, u64), Act>,
    pub(super) next_act: u64,
    pub(super) report: Report,
}

impl Stage {
    pub(super) fn new(weather: Weather, seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x005C_E4A1);
        let (model, cut) = draw::model(&mut dice);
        let mut world = World::new(seed);
        let prefill = model.group(cut.source_tp, cut.source_pp);
        let (sources, decode) = (prefill.len(), model.group(cut.target_tp, 1));
        let mut layouts = Vec::new();
        for (layout, regions) in prefill.into_iter().chain(decode) {
            let node = draw::node(&mut dice, weather);
            let spec = RankSpec {
                layout: layout.clone(),
                regions,
                node,
            };
            world.add_rank(spec).expect("the model makes valid layouts");
            layouts.push(layout);
        }
        let (mut routes, mut links) = (HashMap::new(), Vec::new());
        for from in 0..sources {
            for to in sources..layouts.len() {
                if let Some(found) = route(&layouts[from], &layouts[to]) {
                    routes.insert((from, to), found);
                    links.push((from, to, draw::link(&mut dice, weather)));
                }
            }
        }
        let slack = (0..layouts.len()).map(|rank| {
            let is_one_sided = links.iter().any(|(from, to, spec): &(_, _, LinkSpec)| {
                let is_ours = rank == *from || rank == *to;
                is_ours && spec.lanes[0].mode == PayloadMode::Write
            });
            let ebb = world.bounds(rank).ebb_max + DESTROY;
            if is_one_sided { SLACK + ebb } else { SLACK }
        });
        let slack = slack.collect();
        let count = usize::try_from(dice.within(1, ROOMS)).unwrap_or(1);
        let rooms = (0..count).map(|i| draw::room(&mut dice, weather, i, &model));
        let free = layouts.iter().map(|layout| {
            let components = layout.components.iter();
            let items = components.map(|c| i32::try_from(c.item_count()).unwrap_or(0));
            items.map(|count| (0..count).collect()).collect()
        });
        let mut stage = Self {
            weather,
            rooms: rooms.collect(),
            dice,
            world,
            checker: Checker::default(),
            free: free.collect(),
            slack,
            thawed: vec![Time::default(); layouts.len()],
            layouts,
            sources,
            routes,
            links,
            poisoned: HashMap::new(),
            live: BTreeMap::new(),
            acts: BTreeMap::new(),
            next_act: 0,
            report: Report::default(),
        };
        stage.schedule();
        stage
    }

    fn schedule(&mut self) {
        for link in 0..self.links.len() {
            self.act(Act::Reconnect(link));
        }
        for room in 0..self.rooms.len() {
            self.later(Act::Begin(room), ROOMS_BEGIN);
        }
        let ranks = self.layouts.len();
        let faults = match self.weather {
            Weather::Calm => 0,
            Weather::Lanes => self.dice.within(1, 6),
            Weather::Storm => self.dice.within(0, 6),
            Weather::Cards => self.dice.within(1, 10),
        };
        for _ in 0..faults {
            let link = self.dice.index(self.links.len());
            let rank = self.dice.index(ranks);
            let fault = match (self.weather, self.dice.within(0, 9)) {
                (Weather::Lanes, _) | (_, 0..=3) | (Weather::Cards, 4 | 8) => Act::ResetLane(link),
                (_, 4 | 5) => Act::DropLink(link),
                (_, 6..=8) => Act::Freeze(rank),
                _ => Act::Kill(rank),
            };
            self.later(fault, 2 * ROOMS_BEGIN);
        }
    }

    pub(super) fn at(&mut self, time: Time, act: Act) {
        self.acts.insert((time, self.next_act), act);
        self.next_act += 1;
    }

    /// Within `most` from now.
    pub(super) fn later(&mut self, act: Act, most: Duration) {
        let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        let delay = Duration::from_nanos(self.dice.within(0, most));
        self.at(self.world.now() + delay, act);
    }

    pub(super) fn play(mut self) -> Report {
        while let Some((&(time, number), _)) = self.acts.first_key_value() {
            while self.world.step(time) {
                self.observe();
            }
            if let Some(act) = self.acts.remove(&(time, number)) {
                self.act(act);
                self.observe();
            }
            self.run_out();
        }
        self.finish();
        self.report.steps = self.world.steps();
        self.report.fences = self.world.fences();
        self.report
    }

    /// With no act left, lets everything come to its end; what happens may bring new acts.
    fn run_out(&mut self) {
        let mut waits = 0;
        while self.acts.is_empty() && !self.live.is_empty() {
            let end = self.world.now() + Duration::from_millis(20);
            while self.acts.is_empty() && self.world.step(end) {
                self.observe();
            }
            waits += 1;
            assert!(waits < 10_000, "P2: {:?} never ended", self.live);
        }
        // Then the remembered orphans and the late acknowledgements.
        if self.acts.is_empty() {
            let rest = match self.weather {
                Weather::Storm | Weather::Cards => Duration::from_millis(500),
                _ => Duration::from_secs(6),
            };
            let end = self.world.now() + rest;
            while self.acts.is_empty() && self.world.step(end) {
                self.observe();
            }
        }
    }

    fn finish(&mut self) {
        assert_eq!(self.checker.live(), 0, "receivers are left");
        for rank in 0..self.layouts.len() {
            let audit = self.world.audit(rank);
            let held = [
                audit.transfers,
                audit.rooms,
                audit.orphans,
                audit.queued_windows,
                audit.in_flight,
            ];
            assert_eq!(held, [0; 5], "rank {rank} leaks: {audit:?}");
            assert_eq!(
                (audit.queued_bytes, audit.in_flight_bytes),
                (0, 0),
                "{audit:?}"
            );
            assert_eq!(
                audit.timers, audit.peers,
                "rank {rank} leaks timers: {audit:?}"
            );
            assert_eq!(self.world.gates(rank), 0, "rank {rank} leaks gates");
        }
        let left: Vec<_> = self.poisoned.drain().collect();
        for ((rank, component, item), life) in left {
            if self.world.life(rank) == life {
                self.check_poison(rank, component, item);
            }
        }
    }

    pub(super) fn check_poison(&self, rank: usize, component: usize, item: i32) {
        let component = &self.layouts[rank].components[component];
        let ranges: Vec<(RegionId, Range<u64>)> = item_ranges(component, item)
            .map(|(region, at, len)| (region, at..at + len))
            .collect();
        Checker::check_poison(&self.world, rank, &ranges);
    }

    /// After every event.
    fn observe(&mut self) {
        while let Some(notice) = self.world.notice() {
            match notice {
                Notice::Placed(placed) => self.checker.placed(&placed),
                Notice::Ready {
                    handle,
                    prefix_tokens,
                } => self.ready(handle, prefix_tokens),
                Notice::Ended { handle, result } => self.ended(handle, &result),
                Notice::Protocol { rank, reason } => panic!("rank {rank} was sent junk: {reason}"),
                Notice::PeerLost { rank, other } => self.peer_lost(rank, other),
            }
        }
        let now = self.world.now();
        for (handle, live) in &self.live {
            let due = live.deadline.max(self.thawed[handle.rank]) + self.slack[handle.rank];
            let is_late = now > due && self.world.is_running(handle.rank);
            assert!(
                !is_late,
                "P2: {handle:?} {live:?} did not end by its deadline"
            );
        }
        if self.world.steps().is_multiple_of(8) {
            (0..self.layouts.len()).for_each(|rank| self.check_bounds(rank));
        }
    }

    fn check_bounds(&self, rank: usize) {
        let (audit, bounds) = (self.world.audit(rank), self.world.bounds(rank));
        // Batches of a dead lane are queued again on top of the bound: at most three lanes of six batches.
        const AGAIN: usize = 18;
        assert!(
            audit.queued_windows_most <= bounds.queue_windows_max + AGAIN,
            "P4: {audit:?}"
        );
        assert!(audit.transfers <= bounds.transfers_max, "P4: {audit:?}");
        assert!(audit.orphans <= bounds.orphans_max, "P4: {audit:?}");
        assert_eq!(audit.queued_bytes, audit.queued_bytes_summed, "{audit:?}");
        assert_eq!(audit.transfers, audit.rooms + audit.ebbing, "{audit:?}");
    }

    fn ready(&mut self, handle: Handle, prefix_tokens: u32) {
        if let Some(live) = self.live.get(&handle).copied() {
            let expected = self.rooms[live.room].prefix_tokens;
            assert_eq!(prefix_tokens, expected, "the prefix arrives as it was sent");
            self.later(Act::Push(handle, live.room, 0), Duration::from_millis(2));
        }
    }

    fn ended(&mut self, handle: Handle, result: &Result<Summary, TransferError>) {
        let live = self.live.remove(&handle);
        let live = live.unwrap_or_else(|| panic!("{handle:?} ended twice"));
        match result {
            Ok(summary) => {
                self.report.successes += 1;
                self.report.bytes += if live.is_sender { 0 } else { summary.bytes };
            }
            Err(error) => {
                *self.report.failures.entry(error.name()).or_default() += 1;
                let is_storm = self.weather.is_rough();
                assert!(is_storm, "{handle:?} failed without cause: {error}");
                let blames = matches!(
                    error,
                    TransferError::PeerMisbehaved { .. }
                        | TransferError::PeerFailed {
                            code: FailureCode::Misbehaved | FailureCode::ItemMismatch,
                            ..
                        }
                );
                assert!(!blames, "{handle:?} blames an honest peer: {error}");
            }
        }
        if live.is_sender {
            if result.is_ok() {
                let receivers: Vec<Handle> =
                    self.rooms[live.room].receivers.values().copied().collect();
                for receiver in receivers {
                    self.checker
                        .sender_succeeded(&self.world, handle.rank, receiver);
                }
            }
            self.recycle(handle.rank, live.room);
        } else {
            self.checker.ended(&mut self.world, handle, result.is_ok());
        }
        self.release(handle.rank, live.room, !live.is_sender);
    }

    /// The sender's application writes other requests' data into its pages at once.
    fn recycle(&mut self, rank: usize, room: usize) {
        let salt = self.dice.within(0, u64::MAX);
        let lists = self.rooms[room].items[&rank].clone();
        self.fill(rank, salt, &lists, 0);
    }

    /// Writes the pattern of `salt` into items of the components from `first` on.
    pub(super) fn fill(&mut self, rank: usize, salt: u64, lists: &[Vec<i32>], first: usize) {
        let layout = &self.layouts[rank];
        for (component, list) in layout.components[first..].iter().zip(lists) {
            for item in list {
                for (region, at, len) in item_ranges(component, *item) {
                    let bytes: Vec<u8> =
                        (at..at + len).map(|at| pattern(salt, region, at)).collect();
                    self.world.write(rank, region, at, &bytes);
                }
            }
        }
    }

    pub(super) fn release(&mut self, rank: usize, room: usize, is_poisoned: bool) {
        let life = self.world.life(rank);
        let lists = self.rooms[room].items[&rank].clone();
        for (component, list) in lists.into_iter().enumerate() {
            for item in &list {
                if is_poisoned {
                    self.poisoned.insert((rank, component, *item), life);
                }
            }
            self.free[rank][component].extend(list);
        }
    }

    fn peer_lost(&mut self, rank: usize, other: usize) {
        let is_storm = self.weather.is_rough();
        assert!(is_storm, "rank {rank} lost rank {other} without cause");
        let between = |link: &(usize, usize, LinkSpec)| {
            [link.0, link.1] == [rank, other] || [link.1, link.0] == [rank, other]
        };
        if let Some(link) = self.links.iter().position(between) {
            self.later(Act::Reconnect(link), Duration::from_millis(30));
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Begin(room) => self.begin(room),
            Act::Send(room, rank) => self.open_send(room, rank),
            Act::Receive(room, rank) => self.open_receive(room, rank),
            Act::Push(handle, room, chunk) => self.push(handle, room, chunk),
            Act::Cancel(handle) if self.awake(handle.rank, act) => self.world.cancel(handle),
            Act::Cancel(_) => {}
            Act::ResetLane(link) => self.reset_lane(link),
            Act::DropLink(link) => {
                let (from, to, _) = self.links[link];
                let rank = self.dice.pick(&[from, to]);
                let other = from + to - rank;
                if let Some(conn) = self.world.connection(rank, other) {
                    self.world.disconnect(conn, rank);
                }
            }
            Act::Freeze(rank) => {
                let time = Duration::from_micros(self.dice.within(100, 150_000));
                if self.world.is_running(rank) {
                    self.report.freezes += 1;
                    self.world.freeze(rank, time);
                    self.thawed[rank] = self.world.now() + time;
                }
            }
            Act::Kill(rank) if !self.world.is_alive(rank) => {}
            Act::Kill(rank) => {
                self.checker.died(&mut self.world, rank);
                self.world.kill(rank, Duration::from_millis(20));
                self.later(Act::Restart(rank), Duration::from_millis(30));
            }
            Act::Restart(rank) => self.restart(rank),
            Act::Reconnect(link) => self.reconnect(link),
        }
    }

    /// Whether a rank's application can act; if it is frozen, it acts later.
    pub(super) fn awake(&mut self, rank: usize, act: Act) -> bool {
        let is_running = self.world.is_running(rank);
        if !is_running {
            let when = self.thawed[rank].max(self.world.now()) + Duration::from_millis(1);
            self.at(when, act);
        }
        is_running
    }

    fn reconnect(&mut self, link: usize) {
        let (from, to, spec) = self.links[link].clone();
        let is_up = self.world.peer(from, to).is_some() && self.world.peer(to, from).is_some();
        if is_up || !self.awake(from, Act::Reconnect(link)) || !self.awake(to, Act::Reconnect(link))
        {
            return;
        }
        let (dialler, other) = if self.dice.chance(50) {
            (from, to)
        } else {
            (to, from)
        };
        let connected = self.world.connect(dialler, other, &spec);
        connected.expect("the layouts fit");
    }

    fn restart(&mut self, rank: usize) {
        self.report.restarts += 1;
        let gone: Vec<(Handle, Live)> = self.live.iter().map(|(h, l)| (*h, *l)).collect();
        for (handle, live) in gone.into_iter().filter(|(handle, _)| handle.rank == rank) {
            self.live.remove(&handle);
            self.release(rank, live.room, false);
        }
        self.world.restart(rank);
        self.thawed[rank] = self.world.now();
        for link in 0..self.links.len() {
            if self.links[link].0 == rank || self.links[link].1 == rank {
                self.later(Act::Reconnect(link), Duration::from_millis(10));
            }
        }
    }

    fn reset_lane(&mut self, link: usize) {
        let (from, to, ref spec) = self.links[link];
        let lanes = spec.lanes.len();
        // In weather for lanes the first one stays, so that no connection is lost; a queue pair is made anew.
        let is_made_anew = spec.lanes[0].mode == PayloadMode::Write;
        let least = usize::from(self.weather == Weather::Lanes && !is_made_anew);
        let lane = least + self.dice.index(lanes - least);
        let rank = self.dice.pick(&[from, to]);
        if let Some(conn) = self.world.connection(rank, from + to - rank) {
            self.report.lanes_reset += 1;
            self.world.reset_lane(conn, rank, lane);
        }
    }
}
