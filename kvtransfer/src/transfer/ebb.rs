//! Rooms that have failed here, but whose pages a network card may still touch.
//!
//! Where the receiver places the bytes itself (tcp, same host) a closed gate is the end of it. An RDMA write is placed by
//! the network card, whatever the processes do, so a failed room *ebbs* first: nobody is told that it ended until nothing
//! of it can move any more (promise P1). For a receiver that is the case when the sender has said how many batches it ever
//! handed out ([`Control::RoomStopped`](crate::wire::control::Control::RoomStopped)) and the notices of all of them have
//! come; for a sender, when its card is done with every batch it was given. If that takes longer than
//! [`NodeConfig::ebb_max`](super::NodeConfig::ebb_max), because the other process is frozen or dead, the queue pairs to
//! that peer are destroyed, which ends it for certain ([`Output::Fence`]).

use std::collections::BTreeMap;

use crate::{
    error::TransferError,
    ids::{Epoch, LaneId, PeerId, TransferId},
    time::Time,
    transfer::{
        node::{Node, Output},
        receive::SeqSet,
        timers::{Due, TimerKey},
    },
    wire::hello::LANES_MAX,
};

/// A set of lanes of one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LaneSet(u16);

const _: () = assert!(LANES_MAX as u32 <= u16::BITS, "a bit for every lane");

impl LaneSet {
    pub(super) fn insert(&mut self, lane: LaneId) {
        self.0 |= 1 << lane.0;
    }

    pub(super) fn remove(&mut self, lane: LaneId) {
        self.0 &= !(1 << lane.0);
    }

    pub(super) fn contains(self, lane: LaneId) -> bool {
        self.0 & 1 << lane.0 != 0
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn iter(self) -> impl Iterator<Item = LaneId> {
        (0..LANES_MAX)
            .map(LaneId)
            .filter(move |lane| self.contains(*lane))
    }
}

/// What one peer may still do to the pages of a failed room.
#[derive(Debug)]
pub(super) struct Wait {
    pub(super) peer: PeerId,
    /// Lanes through which it may happen.
    pub(super) lanes: LaneSet,
    pub(super) role: Role,
}

#[derive(Debug)]
pub(super) enum Role {
    /// Our card may still read the pages.
    Sends,
    /// The peer's card may still write them.
    Receives {
        room: u64,
        epoch: Epoch,
        seen: SeqSet,
        /// How many batches it handed out, once it has said so.
        batches: Option<u32>,
    },
}

impl Wait {
    fn is_over(&self) -> bool {
        let all_seen = match &self.role {
            Role::Sends => false,
            Role::Receives { seen, batches, .. } => {
                batches.is_some_and(|batches| seen.count() >= batches)
            }
        };
        all_seen || self.lanes.is_empty()
    }
}

/// A failed room.
#[derive(Debug)]
pub(super) struct Ebb {
    error: TransferError,
    waits: Vec<Wait>,
    limit: TimerKey,
}

/// The failed rooms of an engine, in the order of their numbers, so that a run can be repeated.
pub(super) type Ebbs = BTreeMap<TransferId, Ebb>;

impl Node {
    /// Ends a failed transfer as soon as nothing of it can move any more.
    pub(super) fn ebb(
        &mut self,
        now: Time,
        transfer: TransferId,
        error: TransferError,
        mut waits: Vec<Wait>,
    ) {
        waits.retain(|wait| !wait.is_over());
        if waits.is_empty() {
            let result = Err(error);
            self.outputs.push_back(Output::Ended { transfer, result });
            return;
        }
        let limit = self
            .timers
            .set(now, self.config.ebb_max, Due::Ebb(transfer));
        // No further page may be handed to a card, even of a batch that a lane has begun.
        self.outputs.push_back(Output::Stopping { transfer });
        // A lane reports how far its card has come when it is given work.
        for wait in &waits {
            self.outputs.push_back(Output::Work(wait.peer));
        }
        let ebb = Ebb {
            error,
            waits,
            limit,
        };
        self.ebbs.insert(transfer, ebb);
    }

    /// It has taken too long: the queue pairs are destroyed.
    pub(super) fn expire_ebb(&mut self, transfer: TransferId) {
        let Some(ebb) = self.ebbs.get(&transfer) else {
            return;
        };
        for wait in &ebb.waits {
            for lane in wait.lanes.iter() {
                let reason = format!(
                    "its pages were still in use {:?} after their room had failed",
                    self.config.ebb_max
                );
                self.outputs.push_back(Output::Fence {
                    peer: wait.peer,
                    lane,
                    reason,
                });
            }
        }
    }

    /// Nothing can move through that lane any more.
    pub(super) fn ebb_lane_over(&mut self, peer: PeerId, lane: LaneId) {
        self.ebb_each(|wait| {
            if wait.peer == peer {
                wait.lanes.remove(lane);
            }
        });
    }

    /// The sender of a failed room says how many batches it ever handed out.
    pub(super) fn ebb_stopped(&mut self, from: PeerId, number: u64, of: Epoch, count: u32) {
        self.ebb_each(|wait| {
            if let Role::Receives {
                room,
                epoch,
                batches,
                ..
            } = &mut wait.role
                && (wait.peer, *room, *epoch) == (from, number, of)
            {
                *batches = Some(batches.map_or(count, |earlier| earlier.max(count)));
            }
        });
    }

    /// The notice of a batch of a failed room came.
    pub(super) fn ebb_notice(&mut self, from: PeerId, number: u64, of: Epoch, seq: u32) {
        self.ebb_each(|wait| {
            if let Role::Receives {
                room, epoch, seen, ..
            } = &mut wait.role
                && (wait.peer, *room, *epoch) == (from, number, of)
            {
                seen.insert(seq);
            }
        });
    }

    /// Our card has come further on a lane, or the receiver has.
    pub(super) fn ebb_progress(&mut self, peer: PeerId, lane: LaneId) {
        if self.ebbs.is_empty() {
            return;
        }
        let busy = self.peers.get(&peer).map(|known| known.busy_on(lane));
        let Some(busy) = busy else {
            return;
        };
        for (transfer, ebb) in &mut self.ebbs {
            for wait in &mut ebb.waits {
                let is_ours = wait.peer == peer && matches!(wait.role, Role::Sends);
                if is_ours && !busy.contains(transfer) {
                    wait.lanes.remove(lane);
                }
            }
        }
        self.ebb_each(|_| {});
    }

    /// Changes what is waited for, then ends what waits for nothing any more.
    fn ebb_each(&mut self, mut change: impl FnMut(&mut Wait)) {
        for ebb in self.ebbs.values_mut() {
            ebb.waits.iter_mut().for_each(&mut change);
            ebb.waits.retain(|wait| !wait.is_over());
        }
        let over = self.ebbs.iter().filter(|(_, ebb)| ebb.waits.is_empty());
        let over: Vec<TransferId> = over.map(|(transfer, _)| *transfer).collect();
        for transfer in over {
            if let Some(ebb) = self.ebbs.remove(&transfer) {
                self.timers.clear(ebb.limit);
                let result = Err(ebb.error);
                self.outputs.push_back(Output::Ended { transfer, result });
            }
        }
    }
}
