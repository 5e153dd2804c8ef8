//! What the applications do with their rooms: begin, open, push.

use std::{sync::Arc, time::Duration};

use super::stage::{Act, Live, Stage};
use crate::{
    error::{SubmitError, TransferError},
    ids::Room,
    testing::sim::{Handle, check::Owed},
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

/// Between the sides of a room being opened.
const APART: Duration = Duration::from_millis(4);

impl Stage {
    /// Finds pages for a room on every rank, then opens its sides in any order.
    pub(super) fn begin(&mut self, room: usize) {
        let plan = &self.rooms[room];
        let wanted = [plan.pages(), plan.states, usize::from(plan.has_aux)];
        let is_bare = wanted == [0; 3];
        let ranks = self.layouts.len();
        // Components: KV, maybe a state, aux.
        let wanted_of = |components: usize| match (components, is_bare) {
            (_, true) => Vec::new(),
            (2, _) => vec![wanted[0], wanted[2]],
            _ => wanted.to_vec(),
        };
        let fits = (0..ranks).all(|rank| {
            let wanted = wanted_of(self.layouts[rank].components.len());
            let mut free = wanted.iter().zip(&self.free[rank]);
            free.all(|(wanted, free)| free.len() >= *wanted)
        });
        if !fits {
            // Others hold the pages; they end by their deadlines.
            return self.later(Act::Begin(room), Duration::from_millis(20));
        }
        for rank in 0..ranks {
            let mut lists = Vec::new();
            for (component, wanted) in wanted_of(self.layouts[rank].components.len())
                .into_iter()
                .enumerate()
            {
                let free = &mut self.free[rank][component];
                self.dice.shuffle(free);
                let items = free.split_off(free.len() - wanted);
                for item in &items {
                    self.check_before_use(rank, component, *item);
                }
                lists.push(items);
            }
            self.rooms[room].items.insert(rank, lists);
        }
        self.report.rooms += 1;
        for rank in 0..ranks {
            let act = if rank < self.sources {
                Act::Send(room, rank)
            } else {
                Act::Receive(room, rank)
            };
            // A rank may die before its part: then its items are not used again.
            self.later(act, APART);
        }
    }

    fn check_before_use(&mut self, rank: usize, component: usize, item: i32) {
        if let Some(life) = self.poisoned.remove(&(rank, component, item))
            && life == self.world.life(rank)
        {
            self.check_poison(rank, component, item);
        }
    }

    fn opened(&mut self, handle: Handle, room: usize, is_sender: bool, timeout: Duration) {
        let deadline = self.world.now() + timeout;
        let live = Live {
            room,
            is_sender,
            deadline,
        };
        self.live.insert(handle, live);
        if self.weather.is_rough() && self.dice.chance(20) {
            self.later(Act::Cancel(handle), Duration::from_millis(12));
        }
    }

    pub(super) fn open_send(&mut self, room: usize, rank: usize) {
        if !self.awake(rank, Act::Send(room, rank)) {
            return;
        }
        let plan = &self.rooms[room];
        let timeout = plan.send_timeout;
        let number = Room::new(plan.number).expect("room numbers are not zero");
        let request = SendRequest {
            room: number,
            timeout,
        };
        match self.world.send(rank, &request) {
            Ok(handle) => {
                self.opened(handle, room, true, timeout);
                self.rooms[room].senders.insert(rank, handle);
                let twice = self.world.send(rank, &request);
                // The first may have ended at once, because its receiver had given up before.
                let has_ended = self.world.gates(rank) == 0 || twice.is_ok();
                match twice {
                    Err(SubmitError::DuplicateRoom(_)) => {}
                    Ok(again) => {
                        assert!(self.weather.is_rough(), "one room was opened twice");
                        // Two handles of one rank cannot both hold the room's items.
                        self.opened_in_vain(again);
                    }
                    Err(error) => assert!(has_ended || self.is_full(&error), "{error}"),
                }
            }
            Err(error) => self.refused(rank, room, &error),
        }
    }

    /// A second transfer after the first ended within its opening: it is cancelled and must end like any other.
    fn opened_in_vain(&mut self, handle: Handle) {
        let room = self.rooms.len();
        self.rooms.push(super::draw::RoomPlan::default());
        self.rooms[room].items.insert(handle.rank, Vec::new());
        let live = Live {
            room,
            is_sender: true,
            deadline: self.world.now() + Duration::from_secs(1),
        };
        self.live.insert(handle, live);
        self.world.cancel(handle);
    }

    fn is_full(&self, error: &SubmitError) -> bool {
        self.weather.is_rough() && matches!(error, SubmitError::Full { .. })
    }

    /// An opening was refused, so nobody will touch the room's items here.
    fn refused(&mut self, rank: usize, room: usize, error: &SubmitError) {
        let is_expected =
            self.is_full(error) || (self.weather.is_rough() && *error == SubmitError::UnknownPeer);
        assert!(is_expected, "opening failed without cause: {error}");
        self.release(rank, room, false);
    }

    pub(super) fn open_receive(&mut self, room: usize, rank: usize) {
        if !self.awake(rank, Act::Receive(room, rank)) {
            return;
        }
        let mut sources = Vec::new();
        let mut owed = Vec::new();
        let plan = &self.rooms[room];
        let mut receivers_expected = 0;
        for sender in 0..self.sources {
            let Some((pairing, dummy)) = self.routes.get(&(sender, rank)) else {
                continue;
            };
            let Some(peer) = self.world.peer(rank, sender) else {
                return self.refused(rank, room, &SubmitError::UnknownPeer);
            };
            let dummy = *dummy;
            sources.push(Source { peer, dummy });
            let routes = self.routes.keys().filter(|route| route.0 == sender);
            receivers_expected = u16::try_from(routes.count()).unwrap_or(u16::MAX);
            if !dummy {
                let (from, to) = (plan.items[&sender].clone(), plan.items[&rank].clone());
                let items = from.into_iter().zip(to).collect();
                owed.push(Owed::new(
                    sender,
                    salt(plan.number, sender),
                    Arc::clone(pairing),
                    items,
                ));
            }
        }
        let lists = plan.items[&rank].clone();
        let timeout = plan.receive_timeout;
        let request = ReceiveRequest {
            room: Room::new(plan.number).expect("room numbers are not zero"),
            sources,
            receivers_expected,
            prefix_tokens: plan.prefix_tokens,
            items: lists
                .iter()
                .map(|list| Arc::from(list.as_slice()))
                .collect(),
            timeout,
        };
        match self.world.receive(rank, &request) {
            Ok(handle) => {
                let layout = self.layouts[rank].clone();
                self.checker
                    .opened(&mut self.world, handle, &layout, &lists, owed);
                self.opened(handle, room, false, timeout);
                self.rooms[room].receivers.insert(rank, handle);
                let twice = self.world.receive(rank, &request);
                let is_refused = twice.as_ref().is_err_and(|error| {
                    matches!(error, SubmitError::DuplicateRoom(_)) || self.is_full(error)
                });
                assert!(is_refused, "one room was opened twice: {twice:?}");
            }
            Err(error) => self.refused(rank, room, &error),
        }
    }

    pub(super) fn push(&mut self, handle: Handle, room: usize, index: usize) {
        if handle.life != self.world.life(handle.rank)
            || !self.awake(handle.rank, Act::Push(handle, room, index))
            || !self.live.contains_key(&handle)
        {
            return;
        }
        let (lists, last) = self.rooms[room].chunk(handle.rank, index);
        let salt = salt(self.rooms[room].number, handle.rank);
        self.fill(handle.rank, salt, &lists, 0);
        let chunk = Chunk {
            items: lists
                .iter()
                .map(|list| Arc::from(list.as_slice()))
                .collect(),
            last,
        };
        match self.world.push(handle, &chunk) {
            Ok(()) if !last => {
                let next = Act::Push(handle, room, index + 1);
                self.later(next, Duration::from_millis(1));
            }
            Ok(()) => {}
            Err(SubmitError::Full { .. }) => {
                self.report.full += 1;
                let again = Act::Push(handle, room, index);
                self.later(again, Duration::from_micros(400));
            }
            // The receiver threw a batch away, and the sender waits a moment for its reason.
            Err(SubmitError::Ended(TransferError::PeerFailed { .. })) => {}
            // It has failed, and ends when no card can touch its pages any more.
            Err(SubmitError::Ended(_)) if self.world.is_ebbing(handle) => {}
            Err(error) => panic!("{handle:?}: pushing a live transfer failed: {error}"),
        }
    }
}

/// Tells one sender's bytes of one room from all others.
fn salt(number: u64, rank: usize) -> u64 {
    number.rotate_left(17) ^ (rank as u64 + 1) << 7
}
