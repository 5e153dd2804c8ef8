//! The end of a room: once, with its timer, its queue and its peers cleared, and the other side told.

use crate::{
    error::TransferError,
    ids::{Epoch, PeerId, TransferId},
    time::Time,
    transfer::{
        Summary,
        ebb::{Role, Wait},
        node::{ENDED_MAX, Node, Output},
        peer::Peer,
        send::Orphan,
        timers::Due,
    },
    wire::control::Control,
};

impl Node {
    /// Ends a sending room with success if every leg is done.
    pub(super) fn finish_send(&mut self, now: Time, id: TransferId) {
        let Some(room) = self.sends.get(&id) else {
            return;
        };
        if room.closed && room.legs.iter().all(|leg| leg.done) {
            let (waited, moving) = spans(now, room.opened, room.first_byte);
            let batches = room.legs.iter().map(|leg| u64::from(leg.batches())).sum();
            let summary = Summary {
                bytes: room.bytes,
                batches,
                waited,
                moving,
            };
            self.end_send(now, id, Ok(summary));
        }
    }

    pub(super) fn end_send(
        &mut self,
        now: Time,
        id: TransferId,
        result: Result<Summary, TransferError>,
    ) {
        let Some(room) = self.sends.remove(&id) else {
            return;
        };
        let number = room.room.number();
        self.send_rooms.remove(&number);
        self.timers.clear(room.deadline);
        self.remember_send(now, &room, result.as_ref().err());
        let mut waits = Vec::new();
        if let Err(error) = &result {
            for leg in &room.legs {
                if let Some(peer) = self.peers.get_mut(&leg.peer) {
                    peer.purge(id);
                    *peer.failures.entry(error.name()).or_default() += 1;
                    waits.push(Wait {
                        peer: leg.peer,
                        lanes: peer.lanes_reading(id),
                        role: Role::Sends,
                    });
                    self.tell_failed(leg.peer, number, leg.epoch, error.code(), error.words());
                    self.tell_stopped(leg.peer, number, leg.epoch, leg.batches());
                }
            }
            *self.failures.entry(error.name()).or_default() += 1;
            let is_awaited = !room.is_ready() && self.orphans.len() < self.config.orphans_max;
            if is_awaited {
                // A receiver's grant may still be on its way: it is answered at once instead of left to its deadline.
                let timer = self
                    .timers
                    .set(now, self.config.orphan_ttl, Due::Orphan(number));
                let error = error.clone();
                self.orphans
                    .insert(number, Orphan::SenderEnded { error, timer });
            }
        }
        match result {
            Ok(summary) => self.outputs.push_back(Output::Ended {
                transfer: id,
                result: Ok(summary),
            }),
            Err(error) => self.ebb(now, id, error, waits),
        }
    }

    /// Tells a receiver whose pages are written by RDMA how many batches it must have heard of before they are its own
    /// again. Where the receiver places the bytes itself it need not know.
    pub(super) fn tell_stopped(&mut self, peer: PeerId, room: u64, epoch: Epoch, batches: u32) {
        if self.peers.get(&peer).is_some_and(Peer::is_one_sided) {
            let message = Control::RoomStopped {
                room,
                epoch,
                batches,
            };
            self.outputs.push_back(Output::Control(peer, message));
        }
    }

    pub(super) fn end_receive(
        &mut self,
        now: Time,
        id: TransferId,
        result: Result<Summary, TransferError>,
    ) {
        let Some(mut room) = self.receives.remove(&id) else {
            return;
        };
        let number = room.room.number();
        if room.explicit.is_some() {
            self.written.retain(|_, known| *known != id);
        } else {
            self.receive_rooms.remove(&number);
        }
        self.timers.clear(room.deadline);
        self.remember_receive(now, &room, result.as_ref().err());
        match result {
            Ok(_) => {
                if self.received.len() == ENDED_MAX {
                    self.received.pop_front();
                }
                self.received.push_back((number, room.epoch));
                self.outputs.push_back(Output::Ended {
                    transfer: id,
                    result,
                });
            }
            Err(error) => {
                for peer_id in &room.told {
                    if let Some(peer) = self.peers.get_mut(peer_id) {
                        *peer.failures.entry(error.name()).or_default() += 1;
                        self.tell_failed(*peer_id, number, room.epoch, error.code(), error.words());
                    }
                }
                *self.failures.entry(error.name()).or_default() += 1;
                // A sender that has concluded has nothing on its way any more.
                let legs = room.legs.drain(..).filter(|leg| !leg.done);
                let waits = legs.map(|leg| Wait {
                    peer: leg.peer,
                    lanes: self
                        .peers
                        .get(&leg.peer)
                        .map(Peer::lanes_writing)
                        .unwrap_or_default(),
                    role: Role::Receives {
                        room: number,
                        epoch: room.epoch,
                        seen: leg.seen,
                        batches: None,
                    },
                });
                let waits = waits.collect();
                self.ebb(now, id, error, waits);
            }
        }
    }
}

/// (opening to first byte, first byte to now); a transfer without bytes waited all the time.
pub(super) fn spans(
    now: Time,
    opened: Time,
    first_byte: Option<Time>,
) -> (std::time::Duration, std::time::Duration) {
    let first = first_byte.unwrap_or(now);
    (first.since(opened), now.since(first))
}
