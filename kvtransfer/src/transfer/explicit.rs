//! Rooms of explicit blocks: opened by the side that writes, granted by the other if the blocks are good.

use std::{sync::Arc, time::Duration};

use super::{
    node::{Node, Output},
    receive::{Owed, ReceiveLeg, ReceiveRoom, SeqSet},
    send::SendRoom,
    timers::Due,
};
use crate::{
    error::SubmitError,
    ids::{Epoch, PeerId, Room, TransferId},
    layout::ComponentKind,
    plan::pairing::Pairing,
    time::Time,
    wire::{
        blocks::{WRITES_MAX, WriteOpen},
        control::{Control, Grant},
    },
};

impl Node {
    /// Opens a room that writes blocks to a peer, and asks the peer for it. Item 0 of component 0 is all of it. It ends here
    /// by `timeout`; the request bears the peer's own, which should be later, so that this side is the one that decides.
    ///
    /// # Errors
    /// The number is in use for sending, the peer is not connected, or the table of transfers is full.
    pub fn open_write(
        &mut self,
        now: Time,
        peer: PeerId,
        open: WriteOpen,
        timeout: Duration,
        pairing: Arc<Pairing>,
    ) -> Result<TransferId, SubmitError> {
        let room = Room::new(open.room).ok_or_else(|| SubmitError::Items("room 0".into()))?;
        if self.send_rooms.contains_key(&open.room) || self.orphans.contains_key(&open.room) {
            return Err(SubmitError::DuplicateRoom(room));
        }
        if !self.peers.contains_key(&peer) {
            return Err(SubmitError::UnknownPeer);
        }
        let id = self.new_transfer()?;
        let deadline = self.timers.set(now, timeout, Due::Transfer(id));
        self.send_rooms.insert(open.room, id);
        self.sends.insert(
            id,
            SendRoom {
                id,
                room,
                opened: now,
                first_byte: None,
                deadline,
                doom: None,
                expected: None,
                legs: Vec::new(),
                pushed: Vec::new(),
                closed: false,
                closed_at: None,
                bytes: 0,
                explicit: Some((peer, pairing)),
            },
        );
        let message = Control::WriteOpen(Box::new(open));
        self.outputs.push_back(Output::Control(peer, message));
        Ok(id)
    }

    /// Grants a room that a peer opened to write blocks here. The caller has checked them against the local regions.
    ///
    /// # Errors
    /// The peer has [`WRITES_MAX`] of them already, or one of that number, or is not connected; or the table of transfers
    /// is full.
    pub fn accept_write(
        &mut self,
        now: Time,
        peer: PeerId,
        open: &WriteOpen,
        pairing: Arc<Pairing>,
    ) -> Result<TransferId, SubmitError> {
        let number = open.room;
        let room = Room::new(number).ok_or_else(|| SubmitError::Items("room 0".into()))?;
        if !self.peers.contains_key(&peer) {
            return Err(SubmitError::UnknownPeer);
        }
        if self.written.contains_key(&(peer, number)) {
            return Err(SubmitError::DuplicateRoom(room));
        }
        let used = self.written.keys().filter(|(of, _)| *of == peer).count();
        if used >= WRITES_MAX {
            return Err(SubmitError::Full {
                what: "the peer's rooms of explicit blocks",
                used: used as u64,
                asked: 1,
                limit: WRITES_MAX as u64,
                setting: "nothing; it is fixed",
            });
        }
        let id = self.new_transfer()?;
        let epoch = Epoch(self.next_epoch);
        self.next_epoch = self.next_epoch.wrapping_add(1);
        let grant = Grant {
            room: number,
            epoch,
            receivers_expected: 1,
            dummy: false,
            prefix_tokens: 0,
            items: vec![vec![0]],
        };
        self.outputs
            .push_back(Output::Control(peer, Control::Grant(grant)));
        let timeout = Duration::from_millis(open.timeout_ms.into());
        let deadline = self.timers.set(now, timeout, Due::Transfer(id));
        let legs = vec![leg(peer, &pairing)];
        self.written.insert((peer, number), id);
        self.receives.insert(
            id,
            ReceiveRoom {
                id,
                room,
                epoch,
                opened: now,
                first_byte: None,
                deadline,
                items: vec![Arc::from([0])],
                legs,
                told: vec![peer],
                bytes: 0,
                batches: 0,
                explicit: Some(pairing),
            },
        );
        Ok(id)
    }

    /// The live receiving room that a peer means.
    pub(super) fn receiving(&self, peer: PeerId, number: u64, epoch: Epoch) -> Option<TransferId> {
        let of_epoch = |id: &&TransferId| {
            let room = self.receives.get(id);
            room.is_some_and(|room| room.epoch == epoch)
        };
        let own = self.receive_rooms.get(&number).filter(of_epoch);
        let written = || self.written.get(&(peer, number)).filter(of_epoch);
        own.or_else(written).copied()
    }
}

/// All of it is owed by the one who writes.
fn leg(peer: PeerId, pairing: &Pairing) -> ReceiveLeg {
    let bytes = pairing.components.iter().map(|only| only.item_bytes());
    let owed = Owed {
        component: 0,
        kind: ComponentKind::Kv,
        may_skip: false,
        got: 0,
        expected: bytes.sum(),
    };
    ReceiveLeg {
        peer,
        seen: SeqSet::default(),
        owed: vec![owed],
        done: false,
    }
}
