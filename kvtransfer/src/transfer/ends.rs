//! The end of a room: once, with its timer, its queue and its peers cleared, and the other side told.

use crate::{
    error::TransferError,
    ids::TransferId,
    time::Time,
    transfer::{
        Summary,
        node::{ENDED_MAX, Node, Output},
        send::{Orphan, SendLeg},
        timers::Due,
    },
};

impl Node {
    /// Ends a sending room with success if every leg is done.
    pub(super) fn finish_send(&mut self, now: Time, id: TransferId) {
        let Some(room) = self.sends.get(&id) else {
            return;
        };
        if room.closed && room.legs.iter().all(|leg| leg.done) {
            let (waited, moving) = spans(now, room.opened, room.first_byte);
            let batches = room.legs.iter().map(SendLeg::batches).sum();
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
        if let Err(error) = &result {
            for leg in &room.legs {
                if let Some(peer) = self.peers.get_mut(&leg.peer) {
                    peer.purge(id);
                    *peer.failures.entry(error.name()).or_default() += 1;
                    self.refuse(leg.peer, number, leg.epoch, error.code(), error.to_string());
                }
            }
            *self.failures.entry(error.name()).or_default() += 1;
            let waits = !room.is_ready() && self.orphans.len() < self.config.orphans_max;
            if waits {
                // A receiver's grant may still be on its way: it is answered at once instead of left to its deadline.
                let timer = self
                    .timers
                    .set(now, self.config.orphan_ttl, Due::Orphan(number));
                let error = error.clone();
                self.orphans
                    .insert(number, Orphan::SenderEnded { error, timer });
            }
        }
        self.outputs.push_back(Output::Ended {
            transfer: id,
            result,
        });
    }

    pub(super) fn end_receive(
        &mut self,
        now: Time,
        id: TransferId,
        result: Result<Summary, TransferError>,
    ) {
        let Some(room) = self.receives.remove(&id) else {
            return;
        };
        let number = room.room.number();
        self.receive_rooms.remove(&number);
        self.timers.clear(room.deadline);
        self.remember_receive(now, &room, result.as_ref().err());
        match &result {
            Ok(_) => {
                if self.received.len() == ENDED_MAX {
                    self.received.pop_front();
                }
                self.received.push_back((number, room.epoch));
            }
            Err(error) => {
                for peer_id in &room.told {
                    if let Some(peer) = self.peers.get_mut(peer_id) {
                        *peer.failures.entry(error.name()).or_default() += 1;
                        self.refuse(
                            *peer_id,
                            number,
                            room.epoch,
                            error.code(),
                            error.to_string(),
                        );
                    }
                }
                *self.failures.entry(error.name()).or_default() += 1;
            }
        }
        self.outputs.push_back(Output::Ended {
            transfer: id,
            result,
        });
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
