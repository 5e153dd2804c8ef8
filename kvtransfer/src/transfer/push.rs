//! Queueing pages: checked as a whole first, so that a refused chunk leaves nothing behind.

use std::sync::Arc;

use super::{
    Chunk,
    lane::Window,
    node::{Node, NodeConfig, Output},
    peer::Peer,
    send::{SendLeg, SendRoom},
};
use crate::{
    error::{SubmitError, TransferError},
    ids::{CountedMap, PeerId, TransferId},
    plan::pairing::Pairing,
    time::Time,
};

type Peers = CountedMap<PeerId, Peer>;

impl Node {
    /// Queues pages to every receiver of a room.
    ///
    /// The caller has checked every item against the local layout (`plan` does not do it again per batch). Of states whose
    /// lists are cut to the shorter one ([`IndexRule::Shorter`](crate::layout::IndexRule::Shorter)), what goes beyond the
    /// grant is left out.
    ///
    /// # Errors
    /// The transfer is over or not ready, a list is longer than what was granted, or (with the last chunk) a state's
    /// list is not as long as its [`IndexRule`](crate::layout::IndexRule) wants it, or a peer's queue is full. Nothing is
    /// queued then.
    pub fn push(
        &mut self,
        now: Time,
        transfer: TransferId,
        chunk: &Chunk,
    ) -> Result<(), SubmitError> {
        let room =
            self.sends
                .get_mut(&transfer)
                .ok_or(SubmitError::Ended(TransferError::PeerLost {
                    reason: "the transfer is over".into(),
                }))?;
        if !room.is_ready() {
            return Err(SubmitError::NotReady);
        }
        if let Some(doom) = &room.doom {
            return Err(SubmitError::Ended(doom.clone()));
        }
        if room.closed {
            return Err(SubmitError::Items(
                "the last chunk has already been pushed".into(),
            ));
        }
        let first = room.legs.iter().find(|leg| !leg.dummy);
        let pairing = first.map(|leg| pairing_to(room, &self.peers, leg));
        let pairing = pairing.transpose()?;
        let fitted = pairing.and_then(|pairing| room.fitted(chunk, pairing));
        let chunk = fitted.as_ref().unwrap_or(chunk);
        // Used again for every chunk; an error below only loses what they have allocated.
        let (mut counts, mut starts) = std::mem::take(&mut self.spare_counts);
        counts.clear();
        counts.extend(chunk.items.iter().map(|items| items.len()));
        room.check_granted(&counts).map_err(SubmitError::Items)?;
        if let Some(pairing) = pairing {
            room.check_rules(&counts, chunk.last, pairing)
                .map_err(SubmitError::Items)?;
        }
        check_queues(room, &self.peers, &self.config, &counts)?;
        room.pushed.resize(room.pushed.len().max(counts.len()), 0);
        starts.clone_from(&room.pushed);
        for (pushed, count) in room.pushed.iter_mut().zip(&counts) {
            *pushed += count;
        }
        room.closed = chunk.last;
        room.closed_at = chunk.last.then_some(now);
        let number = room.room.number();
        for leg in room.legs.iter().filter(|leg| !leg.dummy) {
            let pairing = Arc::clone(pairing_to(room, &self.peers, leg)?);
            let proto = Window::new(transfer, (number, leg.epoch), pairing, chunk, now);
            let peer = self
                .peers
                .get_mut(&leg.peer)
                .expect("invariant: looked up one line above");
            peer.enqueue_chunk(&proto, chunk, &starts);
            self.outputs.push_back(Output::Work(leg.peer));
        }
        let dummies = room.legs.iter_mut().filter(|leg| leg.dummy);
        if chunk.last && dummies.map(|leg| leg.done = true).count() > 0 {
            self.finish_send(now, transfer);
        }
        self.spare_counts = (counts, starts);
        Ok(())
    }
}

/// Which bytes go where on a leg of a room.
fn pairing_to<'a>(
    room: &'a SendRoom,
    peers: &'a Peers,
    leg: &SendLeg,
) -> Result<&'a Arc<Pairing>, SubmitError> {
    if let Some((_, pairing)) = &room.explicit {
        return Ok(pairing);
    }
    let peer = peers.get(&leg.peer).ok_or(SubmitError::UnknownPeer)?;
    let outgoing = peer.outgoing.as_ref();
    outgoing.map_err(|why| SubmitError::Items(why.clone()))
}

/// Checks that every receiver's queue takes so much more.
fn check_queues(
    room: &SendRoom,
    peers: &Peers,
    config: &NodeConfig,
    counts: &[usize],
) -> Result<(), SubmitError> {
    let windows: usize = counts.iter().map(|n| Peer::windows_of(*n)).sum();
    for leg in room.legs.iter().filter(|leg| !leg.dummy) {
        let peer = peers.get(&leg.peer).ok_or(SubmitError::UnknownPeer)?;
        let pairing = pairing_to(room, peers, leg)?;
        peer.check_room(config, pairing, windows.max(1), counts)?;
        if !leg.has_seqs(peer.batches_of(pairing, counts)) {
            return Err(SubmitError::Items("the room has too many batches".into()));
        }
    }
    Ok(())
}
