//! What reaches a [`Node`] from its peers, its lanes and the clock.

use std::time::Duration;

use super::ends::spans;
use crate::{
    error::TransferError,
    ids::{LaneId, PeerId, TransferId},
    time::Time,
    transfer::{
        Summary,
        lane::{BatchOut, LaneSetup},
        node::{Node, Output, PeerSetup},
        peer::Peer,
        receive::{Admission, BatchIn, Placement},
        send::Orphan,
        timers::Due,
    },
    wire::{
        control::{Control, FailureCode},
        lane::{Ack, AckStatus, BatchHeader},
    },
};

/// How long a sender whose batch was thrown away waits for the receiver's reason, and a receiver for that of a sender who
/// withdrew one.
const REASON_GRACE: Duration = Duration::from_millis(20);

impl Node {
    /// A peer has said hello and its layout was agreed on.
    pub fn peer_up(&mut self, now: Time, id: PeerId, setup: PeerSetup) {
        let heartbeat = self
            .timers
            .set(now, self.config.heartbeat, Due::Heartbeat(id));
        let peer = Peer::new(now, id, setup, heartbeat);
        let earlier = self.peers.insert(id, peer);
        debug_assert!(earlier.is_none(), "peer numbers are never reused");
    }

    /// The connection to a peer ended: everything that needs it fails now.
    pub fn peer_down(&mut self, now: Time, id: PeerId, reason: &str) {
        // It stays known until its rooms have ended: its lanes say what may still touch their pages.
        let Some(peer) = self.peers.get(&id) else {
            return;
        };
        self.timers.clear(peer.heartbeat);
        let lost = || TransferError::PeerLost {
            reason: reason.to_owned(),
        };
        let mut sends: Vec<TransferId> = self
            .sends
            .values()
            .filter(|room| room.legs.iter().any(|leg| leg.peer == id && !leg.done))
            .map(|room| room.id)
            .collect();
        // The order of a hash map differs from run to run, and a failing run must be repeatable.
        sends.sort_unstable();
        for transfer in sends {
            self.end_send(now, transfer, Err(lost()));
        }
        let mut receives: Vec<TransferId> = self
            .receives
            .values()
            .filter(|room| room.legs.iter().any(|leg| leg.peer == id && !leg.done))
            .map(|room| room.id)
            .collect();
        receives.sort_unstable();
        for transfer in receives {
            self.end_receive(now, transfer, Err(lost()));
        }
        self.peers.remove(&id);
        self.orphans.retain(|_, orphan| {
            let Orphan::Granted { legs, timer } = orphan else {
                return true;
            };
            legs.retain(|(leg, ..)| leg.peer != id);
            if legs.is_empty() {
                self.timers.clear(*timer);
            }
            !legs.is_empty()
        });
    }

    /// A data connection of a peer is ready.
    ///
    /// `failures_told`: how many rooms the peer had declared failed when it agreed to this connection. Batches are given to
    /// it only when all of them have been heard of, lest a room go on over a new queue pair that ended with the old one.
    pub fn lane_up(&mut self, peer: PeerId, lane: LaneId, setup: LaneSetup, failures_told: u64) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.lane_up(lane, setup, failures_told);
        }
        self.open_waiting_lanes(peer);
    }

    pub(super) fn open_waiting_lanes(&mut self, peer: PeerId) {
        if let Some(peer) = self.peers.get_mut(&peer)
            && peer.open_waiting_lanes()
            && !peer.queue.is_empty()
        {
            self.outputs.push_back(Output::Work(peer.id));
        }
    }

    /// Our end of a queue pair is there, and what is returned is about to be told to the peer in
    /// [`QpTerms`](crate::wire::rdma::QpTerms): how many rooms this side has declared failed to it.
    ///
    /// The peer may write through it before we learn that it is up, and does not wait for failures that are declared from
    /// now on. So those rooms wait for this lane as if it were up, until [`Node::lane_fenced`].
    pub fn lane_offered(&mut self, id: PeerId, lane: LaneId) -> u64 {
        let Some(peer) = self.peers.get_mut(&id) else {
            return 0;
        };
        peer.lane_offered(lane);
        peer.failures_told
    }

    /// How many rooms this side has declared failed to a peer. For [`QpTerms`](crate::wire::rdma::QpTerms) ask
    /// [`Node::lane_offered`], or rooms that fail before the lane is up are forgotten.
    pub fn failures_told(&self, peer: PeerId) -> u64 {
        self.peers.get(&peer).map_or(0, |peer| peer.failures_told)
    }

    /// Our end of a queue pair is destroyed: nothing moves through it any more, in either direction. The batches that it
    /// had are lost or not, which only the peer can know; they wait for [`Node::lane_down`].
    pub fn lane_fenced(&mut self, id: PeerId, lane: LaneId, reason: &str) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.lane_fenced(lane);
            if !peer.has_lane_up() {
                peer.trouble = Some(reason.to_owned());
            }
        }
        self.ebb_lane_over(id, lane);
    }

    /// A lane's card is done with the first `count` batches that the lane was given.
    pub fn reaped(&mut self, id: PeerId, lane: LaneId, count: u64) {
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.reaped(lane, count);
        }
        self.ebb_progress(id, lane);
    }

    /// A data connection ended. Its unacknowledged batches go to the peer's other lanes; without any, the peer is lost.
    pub fn lane_down(&mut self, id: PeerId, lane: LaneId, reason: &str) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        *peer.failures.entry("lane_down").or_default() += 1;
        if peer.lane_down(lane, &mut self.sends) {
            self.outputs.push_back(Output::Work(id));
        } else {
            let reason = format!("its last data connection ended: {reason}");
            self.outputs
                .push_back(Output::Disconnect { peer: id, reason });
        }
    }

    /// Something arrived from a peer.
    pub fn heard(&mut self, now: Time, peer: PeerId) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.last_heard = now;
        }
    }

    /// The next batch that a lane should send, if any.
    pub fn next_batch(&mut self, now: Time, peer: PeerId, lane: LaneId) -> Option<BatchOut> {
        self.peers
            .get_mut(&peer)?
            .next_batch(now, lane, &mut self.sends)
    }

    /// How many lanes the queued work of a peer keeps busy.
    pub fn lanes_wanted(&self, peer: PeerId) -> usize {
        self.peers.get(&peer).map_or(0, |peer| {
            let batch = peer
                .lanes
                .iter()
                .flatten()
                .map(|lane| lane.setup.batch_bytes)
                .min();
            let batches = peer.queued_bytes.div_ceil(batch.unwrap_or(1));
            usize::try_from(batches).unwrap_or(usize::MAX)
        })
    }

    /// Whether a peer has windows that were not given to a lane yet.
    pub fn has_queued(&self, peer: PeerId) -> bool {
        self.peers
            .get(&peer)
            .is_some_and(|peer| !peer.queue.is_empty())
    }

    /// Payload bytes queued to a peer.
    pub fn queued_bytes(&self, peer: PeerId) -> u64 {
        self.peers.get(&peer).map_or(0, |peer| peer.queued_bytes)
    }

    /// Whether bytes of a transfer have moved. None once it has ended, also while nobody was told of the end yet.
    pub fn has_started(&self, transfer: TransferId) -> Option<bool> {
        let sending = self.sends.get(&transfer).map(|room| room.first_byte);
        let receiving = self.receives.get(&transfer).map(|room| room.first_byte);
        sending.or(receiving).map(|first_byte| first_byte.is_some())
    }

    /// An acknowledgement arrived.
    ///
    /// # Errors
    /// The peer broke the protocol; the lane must be closed.
    pub fn on_ack(
        &mut self,
        now: Time,
        peer_id: PeerId,
        lane: LaneId,
        ack: &Ack,
    ) -> Result<(), String> {
        let peer = self
            .peers
            .get_mut(&peer_id)
            .ok_or("an acknowledgement from a lost peer")?;
        peer.last_heard = now;
        let settled = peer.acknowledge(now, lane, ack.room, ack.epoch(), ack.seq)?;
        self.ebb_progress(peer_id, lane);
        let peer = self
            .peers
            .get_mut(&peer_id)
            .ok_or("an acknowledgement from a lost peer")?;
        let has_more = !peer.queue.is_empty();
        let Some(room) = self.sends.get_mut(&settled.transfer) else {
            return Ok(());
        };
        let bytes = settled.bytes;
        let leg = room.legs.iter_mut().find(|leg| leg.peer == peer_id);
        let Some(leg) = leg.filter(|leg| leg.epoch == settled.epoch) else {
            return Ok(());
        };
        leg.lost_on(lane);
        if ack.status() == AckStatus::Discarded {
            let reason = "the receiver no longer knows the room".to_owned();
            let error = TransferError::PeerFailed {
                code: FailureCode::Cancelled,
                reason,
            };
            if room.doom.is_none() {
                // The receiver's own reason comes on the control stream, which this answer may have overtaken.
                peer.purge(settled.transfer);
                let left = room.deadline.due().since(now).min(REASON_GRACE);
                self.timers.clear(room.deadline);
                room.deadline = self.timers.set(now, left, Due::Transfer(settled.transfer));
                room.doom = Some(error);
            }
            return Ok(());
        }
        leg.done |= settled.last;
        room.bytes += bytes;
        if settled.last {
            self.finish_send(now, settled.transfer);
        } else if has_more {
            // A window may have waited for this acknowledgement on another lane.
            self.outputs.push_back(Output::Work(peer_id));
        }
        Ok(())
    }

    /// A batch header arrived: may its bytes be placed, and where?
    pub fn admit(&mut self, now: Time, peer_id: PeerId, header: &BatchHeader) -> Admission {
        let Some(peer) = self.peers.get_mut(&peer_id) else {
            return Admission::Discard;
        };
        peer.last_heard = now;
        let pairing = peer.incoming.clone();
        let room = self.receiving(peer_id, header.room, header.epoch());
        let room = room.and_then(|id| self.receives.get_mut(&id));
        let Some(room) = room else {
            self.late_messages += 1;
            self.ebb_notice(peer_id, header.room, header.epoch(), header.seq);
            return Admission::Discard;
        };
        let id = room.id;
        let pairing = room.explicit.clone().map_or(pairing, Ok);
        let located = match (pairing, room.leg_mut(peer_id).is_some()) {
            (Ok(pairing), true) => room.locate(&pairing, header),
            (Ok(_), false) => {
                // A stranger to the room cannot fail it.
                self.late_messages += 1;
                return Admission::Discard;
            }
            (Err(why), _) => Err(why),
        };
        match located {
            Ok(batch) => {
                room.first_byte.get_or_insert(now);
                Admission::Place(batch)
            }
            Err(reason) => {
                self.end_receive(now, id, Err(TransferError::PeerMisbehaved { reason }));
                Admission::Discard
            }
        }
    }

    /// A lane has thrown a batch away, because it was not admitted or its room ended: what shall it answer?
    ///
    /// A batch that is sent again after its lane was lost may have arrived before, even as the room's last one. Where
    /// the room was received to the end, every batch of it was placed, and that is the answer.
    pub fn discarded(&self, header: &BatchHeader) -> AckStatus {
        if self.received.contains(&(header.room, header.epoch())) {
            AckStatus::Placed
        } else {
            AckStatus::Discarded
        }
    }

    /// A lane has dealt with a batch: what shall it answer?
    pub fn placed(
        &mut self,
        now: Time,
        peer: PeerId,
        header: &BatchHeader,
        batch: &BatchIn,
        placement: Placement,
    ) -> AckStatus {
        let (number, epoch, seq) = (header.room, header.epoch(), header.seq);
        let Some(room) = self.receives.get_mut(&batch.transfer) else {
            // It ended while the batch was being moved: nothing of it moves any more.
            self.ebb_notice(peer, number, epoch, seq);
            return self.discarded(header);
        };
        let counted = match placement {
            Placement::Placed => room.count(peer, header),
            Placement::GateClosed => return AckStatus::Discarded,
            Placement::Void => {
                let reason = "it withdrew pages while they were on the wire".to_owned();
                let error = TransferError::PeerFailed {
                    code: FailureCode::Cancelled,
                    reason,
                };
                if let Some(leg) = room.leg_mut(peer) {
                    leg.seen.insert(seq);
                }
                if room.doom.is_none() {
                    // The sender's own reason comes on the control stream, which this batch may have overtaken.
                    let left = room.deadline.due().since(now).min(REASON_GRACE);
                    self.timers.clear(room.deadline);
                    room.deadline = self.timers.set(now, left, Due::Transfer(batch.transfer));
                    room.doom = Some(error);
                }
                return AckStatus::Discarded;
            }
            Placement::Failed(error) => {
                self.end_receive(now, batch.transfer, Err(error));
                self.ebb_notice(peer, number, epoch, seq);
                return AckStatus::Discarded;
            }
        };
        match counted {
            Ok(false) => AckStatus::Placed,
            Ok(true) => {
                let (waited, moving) = spans(now, room.opened, room.first_byte);
                let summary = Summary {
                    bytes: room.bytes,
                    batches: room.batches,
                    waited,
                    moving,
                };
                self.end_receive(now, batch.transfer, Ok(summary));
                AckStatus::Placed
            }
            Err(reason) => {
                let error = TransferError::PeerMisbehaved { reason };
                self.end_receive(now, batch.transfer, Err(error));
                AckStatus::Discarded
            }
        }
    }

    /// A message arrived on a peer's control stream.
    pub fn on_control(&mut self, now: Time, peer: PeerId, message: Control) {
        self.heard(now, peer);
        match message {
            Control::Grant(grant) => self.on_grant(now, peer, &grant),
            Control::RoomFailed {
                room,
                epoch,
                code,
                reason,
            } => {
                self.on_room_failed(now, peer, room, epoch, code, reason);
            }
            Control::Ping { nonce } => {
                self.outputs
                    .push_back(Output::Control(peer, Control::Pong { nonce }));
            }
            Control::RoomStopped {
                room,
                epoch,
                batches,
            } => self.ebb_stopped(peer, room, epoch, batches),
            Control::Pong { .. } => {}
            Control::Hello(_)
            | Control::Welcome(_)
            | Control::Reject { .. }
            | Control::LaneOpen { .. }
            | Control::LaneReady { .. }
            | Control::Look(_)
            | Control::Seen(_)
            | Control::QpOpen(_)
            | Control::QpReady(_)
            | Control::QpUp
            | Control::QpDown { .. }
            | Control::WriteOpen(_)
            | Control::WriteClose { .. }
            | Control::WriteClosed { .. } => {
                let reason = "it said what has no place on a control stream".to_owned();
                self.outputs.push_back(Output::Disconnect { peer, reason });
            }
        }
    }

    /// The time set by [`Node::next_timeout`] has come.
    pub fn on_timeout(&mut self, now: Time) {
        while let Some(due) = self.timers.pop(now) {
            match due {
                Due::Transfer(id) => self.expire(now, id),
                Due::Orphan(room) => self.expire_orphan(room),
                Due::Ebb(id) => self.expire_ebb(id),
                Due::Heartbeat(id) => self.heartbeat(now, id),
            }
        }
    }

    fn expire(&mut self, now: Time, id: TransferId) {
        if let Some(room) = self.sends.get_mut(&id) {
            let (doom, stage, elapsed) = (room.doom.take(), room.stage(), now.since(room.opened));
            let peers: Vec<PeerId> = room.legs.iter().map(|leg| leg.peer).collect();
            let error = doom.unwrap_or_else(|| self.timeout(&peers, stage, elapsed));
            self.end_send(now, id, Err(error));
        } else if let Some(room) = self.receives.get_mut(&id) {
            let (doom, stage, elapsed) = (room.doom.take(), room.stage(), now.since(room.opened));
            let peers: Vec<PeerId> = room.legs.iter().map(|leg| leg.peer).collect();
            let error = doom.unwrap_or_else(|| self.timeout(&peers, stage, elapsed));
            self.end_receive(now, id, Err(error));
        }
    }

    /// A deadline that passed, with the reason if it is known that nothing could move.
    fn timeout(&self, peers: &[PeerId], stage: &'static str, elapsed: Duration) -> TransferError {
        let mut peers = peers.iter().filter_map(|id| self.peers.get(id));
        match peers.find_map(|peer| peer.trouble.clone()) {
            Some(reason) => TransferError::NoPath { elapsed, reason },
            None => TransferError::Timeout { stage, elapsed },
        }
    }

    fn expire_orphan(&mut self, room: u64) {
        let Some(Orphan::Granted { legs, .. }) = self.orphans.remove(&room) else {
            return;
        };
        let waited = self.config.orphan_ttl;
        for (leg, ..) in legs {
            let reason = format!("no sender opened room {room} within {waited:?}");
            self.refuse(leg.peer, room, leg.epoch, FailureCode::NoSender, reason);
        }
    }

    fn heartbeat(&mut self, now: Time, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let silence = now.since(peer.last_heard);
        if silence > self.config.peer_silence_max {
            let reason = format!("it has been silent for {silence:?}");
            self.outputs
                .push_back(Output::Disconnect { peer: id, reason });
            // Asked again until the connections are closed, in case the shell is slow.
        }
        peer.heartbeat = self
            .timers
            .set(now, self.config.heartbeat, Due::Heartbeat(id));
        let nonce = now.nanos();
        self.outputs
            .push_back(Output::Control(id, Control::Ping { nonce }));
    }
}
