//! How connections end: asked for, by death, by a passive side that spoke too early, with their device.
#![forbid(unsafe_code)]

use super::{
    QueuePairId,
    connect::{Errno, Identifier, Phase},
    state::State,
};
use crate::transport::verbs::sys;

impl State {
    /// `rdma_disconnect`, or the death of a connection: both queue pairs fail, both sides are told once.
    pub(super) fn cm_disconnect(&mut self, number: u64) -> Result<(), Errno> {
        let id = self.id_mut(number)?;
        if !matches!(
            id.phase,
            Phase::Connected | Phase::Replied | Phase::Accepted
        ) {
            return Err(libc::EINVAL);
        }
        let peer = id.peer;
        for end in [Some(number), peer].into_iter().flatten() {
            let Some(id) = self.connections.ids.get_mut(&end) else {
                continue;
            };
            if id.phase == Phase::Over {
                continue;
            }
            id.phase = Phase::Over;
            if let Some(queue) = id.queue {
                self.fail_queue(queue);
            }
            let kind = sys::RDMA_CM_EVENT_DISCONNECTED;
            self.connections.notify(end, kind, 0);
        }
        Ok(())
    }

    /// A queue pair died or was destroyed: on iWARP that closes its connection; on InfiniBand nobody is told.
    pub(super) fn disconnect_queue(&mut self, id: QueuePairId) {
        if !self.behaviour.looks_iwarp {
            return;
        }
        if let Some(number) = self.queue(id).and_then(|queue| queue.cm) {
            // Not connected (any more): then there is nobody to tell.
            let _told = self.cm_disconnect(number);
        }
    }

    /// Whether this queue pair is about to send before the active side has processed the reply.
    pub(super) fn passive_sends_too_early(&self, id: QueuePairId) -> bool {
        if !self
            .behaviour
            .cm
            .is_some_and(|rules| rules.passive_first_kills)
        {
            return false;
        }
        let ids = &self.connections.ids;
        let mine = self.queue(id).and_then(|queue| queue.cm);
        let mine = mine.and_then(|number| ids.get(&number));
        let peer = mine.and_then(|mine| mine.peer);
        let peer = peer.and_then(|number| ids.get(&number));
        peer.is_some_and(|peer| peer.is_active && peer.phase == Phase::Replied)
    }

    /// The bytes of a too early passive side landed on the active side's kernel socket.
    pub(super) fn kill_connect(&mut self, passive: QueuePairId) {
        let Some(number) = self.queue(passive).and_then(|queue| queue.cm) else {
            return;
        };
        let Some(peer) = self.connections.ids.get(&number).and_then(|id| id.peer) else {
            return;
        };
        if let Some(active) = self.connections.ids.get_mut(&peer) {
            active.phase = Phase::Over;
            let (channel, queue) = (active.channel, active.queue);
            if let Some(channel) = self.connections.channels.get_mut(&channel) {
                channel.remove_if(|event| event.id == peer);
            }
            if let Some(queue) = queue {
                self.fail_queue(queue);
            }
            let kind = sys::RDMA_CM_EVENT_CONNECT_ERROR;
            self.connections.notify(peer, kind, -libc::EPROTO);
        }
        // The passive side had been told that it was connected, so now it is told the contrary.
        let _told = self.cm_disconnect(number);
    }

    /// `rdma_destroy_id`: pending requests of a listener are refused, a connection is ended.
    pub(super) fn cm_destroy(&mut self, number: u64) -> Result<(), Errno> {
        let id = self.id_mut(number)?;
        let (phase, channel) = (id.phase, id.channel);
        match phase {
            Phase::Listening { .. } => {
                let of_it = |id: &Identifier| {
                    id.listener == Some(number) && id.phase == Phase::Requested && id.handle == 0
                };
                let ids = self.connections.ids.iter();
                let orphans: Vec<u64> = ids.filter(|(_, id)| of_it(id)).map(|(&n, _)| n).collect();
                for orphan in orphans {
                    self.cm_reject(orphan, &[])?;
                    self.connections.ids.remove(&orphan);
                }
            }
            Phase::Requested => self.cm_reject(number, &[])?,
            Phase::Connected | Phase::Replied | Phase::Accepted => self.cm_disconnect(number)?,
            Phase::Connecting => {
                if let Some(request) = self.id_mut(number)?.peer
                    && let Ok(request) = self.id_mut(request)
                {
                    request.peer = None;
                }
            }
            Phase::New | Phase::Resolved | Phase::Routed | Phase::Over => {}
        }
        if let Some(channel) = self.connections.channels.get_mut(&channel) {
            channel.remove_if(|event| event.id == number || event.listener == Some(number));
        }
        self.connections.ids.remove(&number);
        Ok(())
    }

    /// Tells every identifier of a device that it is gone.
    pub(super) fn cm_device_removed(&mut self, device: usize) {
        let here = |id: &Identifier| id.device == Some(device) && id.handle != 0;
        let ids = self.connections.ids.iter();
        let told: Vec<u64> = ids.filter(|(_, id)| here(id)).map(|(&n, _)| n).collect();
        for number in told {
            let kind = sys::RDMA_CM_EVENT_DEVICE_REMOVAL;
            self.connections.notify(number, kind, 0);
        }
    }
}
