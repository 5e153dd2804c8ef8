//! Grants and refusals: how a receiver's pages and a sender's room find each other, in whichever order they come.

use std::sync::Arc;

use crate::{
    error::{TransferError, plain_text},
    ids::{Epoch, PeerId, TransferId},
    plan::{mismatch::End, stream::check_items},
    time::Time,
    transfer::{
        node::{Node, Output},
        send::{Orphan, SendLeg},
        timers::Due,
    },
    wire::control::{Control, FailureCode, Grant},
};

impl Node {
    pub(super) fn on_grant(&mut self, now: Time, peer_id: PeerId, grant: &Grant) {
        let Some(peer) = self.peers.get_mut(&peer_id) else {
            return;
        };
        let (room, epoch) = (grant.room, grant.epoch);
        let live = self.send_rooms.get(&room).and_then(|id| self.sends.get(id));
        let pairing = match live.and_then(|live| live.explicit.as_ref()) {
            Some((to, pairing)) if *to == peer_id => Ok(Arc::clone(pairing)),
            Some(_) => Err("the room is another peer's".to_owned()),
            None => peer.outgoing.clone(),
        };
        let pairing = match pairing {
            Ok(pairing) => pairing,
            Err(reason) => {
                return self.refuse(peer_id, room, epoch, FailureCode::ItemMismatch, reason);
            }
        };
        let components = pairing.components.len();
        // Also where the receiver places by its own list: a list that it could not use itself is no list.
        let lists = pairing.components.iter().zip(&grant.items);
        let mut outside = lists
            .filter_map(|(paired, items)| check_items(items, paired.item_count(End::Target)).err());
        let fault = if room == 0 {
            Some("room 0 is reserved: it means \"not arrived\" in the aux row".to_owned())
        } else if grant.receivers_expected == 0 {
            Some("a grant must expect at least one receiver".to_owned())
        } else if grant.items.len() > components {
            Some(format!(
                "{} item lists for {components} components",
                grant.items.len()
            ))
        } else {
            outside
                .next()
                .map(|error| format!("a grant of pages that do not exist: {error}"))
        };
        if let Some(reason) = fault {
            *peer.failures.entry("bad_grant").or_default() += 1;
            return self.refuse(peer_id, room, epoch, FailureCode::Misbehaved, reason);
        }
        let granted = grant.items.iter().map(|items| Arc::from(items.as_slice()));
        let granted = granted.collect();
        let leg = SendLeg::new(peer_id, epoch, grant.dummy, granted);
        match self.send_rooms.get(&room) {
            Some(id) => {
                self.add_leg(now, *id, leg, grant.receivers_expected, grant.prefix_tokens);
            }
            None => self.keep_grant(
                now,
                room,
                leg,
                grant.receivers_expected,
                grant.prefix_tokens,
            ),
        }
    }

    fn keep_grant(&mut self, now: Time, room: u64, leg: SendLeg, expected: u16, prefix: u32) {
        let (peer, epoch) = (leg.peer, leg.epoch);
        let kept = self.orphans.len();
        match self.orphans.get_mut(&room) {
            Some(Orphan::Granted { legs, .. }) => {
                if legs
                    .iter()
                    .any(|(kept, ..)| kept.peer == peer && kept.epoch == epoch)
                {
                    self.late_messages += 1;
                } else if legs.iter().any(|(kept, ..)| kept.peer == peer) {
                    let reason = format!("room {room} already has a grant of this receiver");
                    self.refuse(peer, room, epoch, FailureCode::DuplicateRoom, reason);
                } else if legs.len() >= usize::from(expected) {
                    let reason = format!("room {room} has all its {expected} receivers");
                    self.refuse(peer, room, epoch, FailureCode::DuplicateRoom, reason);
                } else {
                    legs.push((leg, expected, prefix));
                }
            }
            Some(Orphan::Cancelled { error, .. } | Orphan::SenderEnded { error, .. }) => {
                let (code, reason) = (error.code(), error.words());
                self.refuse(peer, room, epoch, code, reason);
            }
            None if kept >= self.config.orphans_max => {
                let limit = self.config.orphans_max;
                let reason = format!("already {limit} rooms wait for their senders here");
                self.refuse(peer, room, epoch, FailureCode::Busy, reason);
            }
            None => {
                let timer = self
                    .timers
                    .set(now, self.config.orphan_ttl, Due::Orphan(room));
                let legs = vec![(leg, expected, prefix)];
                self.orphans.insert(room, Orphan::Granted { legs, timer });
            }
        }
    }

    /// Adds a receiver to a sending room; when it is the last one, the room is ready.
    pub(super) fn add_leg(
        &mut self,
        now: Time,
        id: TransferId,
        leg: SendLeg,
        expected: u16,
        prefix_tokens: u32,
    ) {
        let Some(room) = self.sends.get_mut(&id) else {
            return;
        };
        let (peer, epoch, number) = (leg.peer, leg.epoch, room.room.number());
        if let Some(known) = room.leg_mut(peer) {
            if known.epoch == epoch {
                self.late_messages += 1;
            } else {
                let reason =
                    format!("room {number} is live with an earlier grant of this receiver");
                self.refuse(peer, number, epoch, FailureCode::DuplicateRoom, reason);
            }
            return;
        }
        if *room.expected.get_or_insert(expected) != expected {
            let first = room.expected.unwrap_or(0);
            let reason = format!("one receiver expects {first} receivers, another {expected}");
            self.refuse(peer, number, epoch, FailureCode::Misbehaved, reason.clone());
            self.end_send(now, id, Err(TransferError::PeerMisbehaved { reason }));
            return;
        }
        if room.is_ready() {
            let reason = format!("room {number} has all its {expected} receivers");
            self.refuse(peer, number, epoch, FailureCode::DuplicateRoom, reason);
            return;
        }
        room.legs.push(leg);
        if room.is_ready() {
            self.outputs.push_back(Output::Ready {
                transfer: id,
                prefix_tokens,
            });
        }
    }

    pub(super) fn on_room_failed(
        &mut self,
        now: Time,
        peer: PeerId,
        number: u64,
        epoch: Epoch,
        code: FailureCode,
        reason: String,
    ) {
        let reason = plain_text(&reason);
        let error = TransferError::PeerFailed { code, reason };
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.failures_heard += 1;
        }
        self.open_waiting_lanes(peer);
        let receiving = self.receiving(peer, number, epoch);
        if let Some(room) = receiving.and_then(|id| self.receives.get(&id))
            && room.told.contains(&peer)
        {
            let id = room.id;
            return self.end_receive(now, id, Err(error));
        }
        if let Some(room) = self
            .send_rooms
            .get(&number)
            .and_then(|id| self.sends.get(id))
        {
            let id = room.id;
            let leg = room
                .legs
                .iter()
                .find(|leg| leg.peer == peer && leg.epoch == epoch);
            let refuses_blocks =
                room.legs.is_empty() && room.explicit.as_ref().is_some_and(|(to, _)| *to == peer);
            if leg.is_some() || refuses_blocks {
                self.end_send(now, id, Err(error));
            } else {
                // Of this use of the room nothing was ever sent, or its end has been told before.
                self.tell_stopped(peer, number, epoch, 0);
                self.late_messages += 1;
            }
            return;
        }
        match self.orphans.get(&number) {
            Some(Orphan::Granted { legs, timer })
                if legs
                    .iter()
                    .any(|(leg, ..)| leg.peer == peer && leg.epoch == epoch) =>
            {
                let timer = *timer;
                let others: Vec<(PeerId, Epoch)> = legs
                    .iter()
                    .map(|(leg, ..)| (leg.peer, leg.epoch))
                    .filter(|leg| *leg != (peer, epoch))
                    .collect();
                // The room cannot start without this receiver, so the others need not wait for their deadlines.
                for (other, epoch) in others {
                    self.refuse(other, number, epoch, error.code(), error.words());
                }
                self.orphans
                    .insert(number, Orphan::Cancelled { error, timer });
            }
            _ => self.late_messages += 1,
        }
        self.tell_stopped(peer, number, epoch, 0);
    }

    /// Answers a grant that this side will not fill.
    pub(super) fn refuse(
        &mut self,
        peer: PeerId,
        room: u64,
        epoch: Epoch,
        code: FailureCode,
        reason: String,
    ) {
        self.tell_failed(peer, room, epoch, code, reason);
        self.tell_stopped(peer, room, epoch, 0);
    }

    /// Tells the other side that a room failed.
    pub(super) fn tell_failed(
        &mut self,
        peer: PeerId,
        room: u64,
        epoch: Epoch,
        code: FailureCode,
        reason: String,
    ) {
        let message = Control::RoomFailed {
            room,
            epoch,
            code,
            reason,
        };
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.failures_told += 1;
        }
        self.outputs.push_back(Output::Control(peer, message));
    }
}
