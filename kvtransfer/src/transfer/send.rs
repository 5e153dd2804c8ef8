//! The sending side of a room: grants in, chunks out, acknowledgements counted.

use std::sync::Arc;

use crate::{
    error::TransferError,
    ids::{Epoch, LaneId, PeerId, Room, TransferId},
    layout::IndexRule,
    plan::pairing::{ComponentPairing, Pairing},
    time::Time,
    transfer::{Chunk, timers::TimerKey},
    wire::{hello::LANES_MAX, lane::BATCHES_MAX},
};

/// The part of a sending room that goes to one receiver.
#[derive(Debug)]
pub(super) struct SendLeg {
    pub(super) peer: PeerId,
    pub(super) epoch: Epoch,
    pub(super) dummy: bool,
    /// Granted items per component, checked against the receiver's layout: where its pages are written by RDMA, this side
    /// names the addresses.
    pub(super) granted: Vec<Arc<[i32]>>,
    next_seq: u32,
    unacked: u32,
    unacked_on: [u32; LANES_MAX as usize],
    pub(super) done: bool,
}

impl SendLeg {
    pub(super) fn new(peer: PeerId, epoch: Epoch, dummy: bool, granted: Vec<Arc<[i32]>>) -> Self {
        let unacked_on = [0; LANES_MAX as usize];
        Self {
            peer,
            epoch,
            dummy,
            granted,
            next_seq: 0,
            unacked: 0,
            unacked_on,
            done: false,
        }
    }

    /// Whether every unacknowledged batch is on that lane, so that its order is enough.
    pub(super) fn is_only_on(&self, lane: LaneId) -> bool {
        self.unacked == self.unacked_on[usize::from(lane.0)]
    }

    pub(super) fn take_seq(&mut self) -> u32 {
        let seq = self.next_seq;
        self.next_seq += 1;
        seq
    }

    /// Whether the receiver's record of batches has room for `more`.
    pub(super) fn has_seqs(&self, more: u64) -> bool {
        u64::from(self.next_seq) + more < u64::from(BATCHES_MAX)
    }

    pub(super) fn sent_on(&mut self, lane: LaneId) {
        self.unacked += 1;
        self.unacked_on[usize::from(lane.0)] += 1;
    }

    pub(super) fn lost_on(&mut self, lane: LaneId) {
        let on = &mut self.unacked_on[usize::from(lane.0)];
        debug_assert!(*on > 0 && self.unacked > 0, "every loss was a send");
        *on = on.saturating_sub(1);
        self.unacked = self.unacked.saturating_sub(1);
    }

    /// Batches handed to lanes so far.
    pub(super) fn batches(&self) -> u32 {
        self.next_seq
    }
}

/// One sending room.
#[derive(Debug)]
pub(super) struct SendRoom {
    pub(super) id: TransferId,
    pub(super) room: Room,
    pub(super) opened: Time,
    pub(super) first_byte: Option<Time>,
    pub(super) deadline: TimerKey,
    /// The receiver threw a batch away; its reason is on the way, or else this is the error.
    pub(super) doom: Option<TransferError>,
    /// From the first grant; every grant must say the same.
    pub(super) expected: Option<u16>,
    pub(super) legs: Vec<SendLeg>,
    /// Items pushed so far, per component.
    pub(super) pushed: Vec<usize>,
    /// The last chunk has been pushed.
    pub(super) closed: bool,
    /// When that was.
    pub(super) closed_at: Option<Time>,
    pub(super) bytes: u64,
    /// For a room of explicit blocks: who receives them, and which they are.
    pub(super) explicit: Option<(PeerId, Arc<Pairing>)>,
}

impl SendRoom {
    pub(super) fn is_ready(&self) -> bool {
        self.expected
            .is_some_and(|expected| self.legs.len() == usize::from(expected))
    }

    /// What it is waiting for, in words.
    pub(super) fn stage(&self) -> &'static str {
        match (self.is_ready(), self.closed) {
            (false, _) => "waiting for the receiver's grant",
            (true, false) => "waiting for the application's next pages",
            (true, true) => "waiting for the receiver to acknowledge pages",
        }
    }

    /// SGLang's poll state name.
    pub(super) fn state(&self) -> &'static str {
        match (self.is_ready(), self.first_byte) {
            (false, _) => "bootstrapping",
            (true, None) => "waiting_for_input",
            (true, Some(_)) => "transferring",
        }
    }

    /// Checks that the receiver granted at least what has been and is being pushed.
    ///
    /// # Errors
    /// A sentence with both numbers.
    pub(super) fn check_granted(&self, more: &[usize]) -> Result<(), String> {
        for leg in self.legs.iter().filter(|leg| !leg.dummy) {
            for (component, more) in more.iter().enumerate() {
                let pushed = self.pushed.get(component).copied().unwrap_or(0) + more;
                let granted = leg.granted.get(component).map_or(0, |items| items.len());
                if pushed > granted {
                    return Err(format!(
                        "component {component}: the sender pushes {pushed} items, the receiver granted {granted}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The chunk without what goes beyond the shortest grant, where a state's lists are cut to the shorter one. `None` if
    /// nothing does.
    pub(super) fn fitted(&self, chunk: &Chunk, pairing: &Pairing) -> Option<Chunk> {
        let mut fitted = None;
        for (component, items) in chunk.items.iter().enumerate() {
            let paired = pairing.components.get(component)?;
            if paired.index_rule() != IndexRule::Shorter {
                continue;
            }
            let pushed = self.pushed.get(component).copied().unwrap_or(0);
            let left = self.granted(component).saturating_sub(pushed);
            if items.len() > left {
                let cut: &mut Chunk = fitted.get_or_insert_with(|| chunk.clone());
                cut.items[component] = Arc::from(&items[..left]);
            }
        }
        fitted
    }

    /// Items of a component that every real receiver has granted.
    fn granted(&self, component: usize) -> usize {
        let legs = self.legs.iter().filter(|leg| !leg.dummy);
        let granted = legs.map(|leg| leg.granted.get(component).map_or(0, |items| items.len()));
        granted.min().unwrap_or(0)
    }

    /// Checks what will have been pushed of states whose lists must be as long on both sides.
    ///
    /// # Errors
    /// A sentence with both numbers.
    pub(super) fn check_rules(
        &self,
        more: &[usize],
        is_last: bool,
        pairing: &Pairing,
    ) -> Result<(), String> {
        for (component, paired) in pairing.components.iter().enumerate() {
            let before = self.pushed.get(component).copied().unwrap_or(0);
            let pushed = before + more.get(component).copied().unwrap_or(0);
            check_slots(paired, pushed)?;
            let is_equal = matches!(paired.index_rule(), IndexRule::Equal | IndexRule::OneSlot);
            let granted = self.granted(component);
            if is_last && is_equal && pushed > 0 && pushed != granted {
                let kind = paired.kind();
                return Err(format!(
                    "state {kind}: the sender has {pushed} indices, the receiver granted {granted}; both must have as many, or the sender none"
                ));
            }
        }
        Ok(())
    }

    pub(super) fn leg_mut(&mut self, peer: PeerId) -> Option<&mut SendLeg> {
        self.legs.iter_mut().find(|leg| leg.peer == peer)
    }
}

/// Checks that a state of one slot per request names at most one.
///
/// # Errors
/// A sentence with the number.
pub(super) fn check_slots(paired: &ComponentPairing, count: usize) -> Result<(), String> {
    if paired.index_rule() == IndexRule::OneSlot && count > 1 {
        let kind = paired.kind();
        return Err(format!(
            "state {kind} has one slot per request, {count} were named"
        ));
    }
    Ok(())
}

/// A grant or a cancellation for a room that nobody has opened for sending yet.
#[derive(Debug)]
pub(super) enum Orphan {
    /// Grants that wait for the sender.
    Granted {
        legs: Vec<(SendLeg, u16, u32)>,
        timer: TimerKey,
    },
    /// The receiver gave up first: a later sender fails at once (SGLang semantic worth keeping).
    Cancelled {
        error: TransferError,
        timer: TimerKey,
    },
    /// The sender ended before a grant came: the grant is answered at once instead of waiting for a deadline.
    SenderEnded {
        error: TransferError,
        timer: TimerKey,
    },
}

impl Orphan {
    pub(super) fn timer(&self) -> TimerKey {
        match self {
            Self::Granted { timer, .. }
            | Self::Cancelled { timer, .. }
            | Self::SenderEnded { timer, .. } => *timer,
        }
    }
}
