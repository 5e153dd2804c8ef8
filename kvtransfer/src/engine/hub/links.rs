//! The links to peers: made known, found, shown, dropped.
#![forbid(unsafe_code)]

use std::sync::{Arc, PoisonError};

use super::{Core, Hub, Link, PeerInfo};
use crate::{
    ids::{InstanceId, PeerId},
    telemetry::snapshot::Snapshot,
    transfer::PeerSetup,
    transport::DataLane,
};

impl Hub {
    /// Makes a link known. An older link of the same instance is dropped: it reconnected.
    pub(in crate::engine) fn add_link(&self, link: &Arc<Link>) {
        let agreement = &link.agreement;
        let setup = PeerSetup {
            instance: agreement.instance,
            address: agreement.address.clone(),
            outgoing: agreement.outgoing.clone(),
            incoming: agreement.incoming.clone(),
        };
        self.with_core(|core, now| {
            core.links.insert(link.peer, Arc::clone(link));
            core.node.peer_up(now, link.peer, setup);
        });
    }

    /// The link that an incoming lane belongs to.
    pub(in crate::engine) fn find_link(
        &self,
        instance: InstanceId,
        link: u64,
    ) -> Option<Arc<Link>> {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let mut links = core.links.values();
        let same = |known: &&Arc<Link>| {
            known.agreement.instance == instance && known.agreement.link == link
        };
        links.find(same).cloned()
    }

    /// Links of an instance, newest last.
    pub(in crate::engine) fn links_of(&self, instance: InstanceId) -> Vec<Arc<Link>> {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let known = core
            .links
            .values()
            .filter(|link| link.agreement.instance == instance);
        let mut links: Vec<_> = known.cloned().collect();
        links.sort_by_key(|link| link.peer);
        links
    }

    pub(in crate::engine) fn link(&self, peer: PeerId) -> Option<Arc<Link>> {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        core.links.get(&peer).cloned()
    }

    pub(in crate::engine) fn link_count(&self) -> usize {
        self.core
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .links
            .len()
    }

    pub(in crate::engine) fn peers(&self) -> Vec<PeerInfo> {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        let mut peers: Vec<PeerInfo> = core.links.values().map(|link| peer_info(link)).collect();
        peers.sort_by_key(|info| info.peer);
        peers
    }

    /// Ends a peer: its transfers fail, its connections close.
    pub(crate) fn drop_peer(&self, peer: PeerId, reason: &str) {
        let link = self.with_core(|core, now| {
            core.node.peer_down(now, peer, reason);
            // Nobody will confirm anything any more.
            core.closing.retain(|(of, _), _| *of != peer);
            core.links.remove(&peer)
        });
        self.probes.forget(peer);
        if let Some(link) = link {
            tracing::info!(%peer, instance = %link.agreement.instance, reason, "peer dropped");
            link.shut_down();
        }
    }
}

/// Adds what each queue pair has asked of its device.
pub(super) fn count_operations(core: &Core, snapshot: &mut Snapshot) {
    for link in core.links.values() {
        let peer = link.agreement.instance.to_string();
        for lane in link.lanes.all() {
            let DataLane::QueuePair(lane) = lane else {
                continue;
            };
            let name = format!("verbs/{}", lane.id.0);
            let mut rails = snapshot.rails.iter_mut();
            let rail = rails.find(|rail| rail.peer == peer && rail.rail == name);
            if let Some(rail) = rail {
                (rail.wire_operations_total, rail.packed_batches_total) = lane.operations();
            }
        }
    }
}

pub(in crate::engine) fn peer_info(link: &Link) -> PeerInfo {
    let (path, path_reason) = link
        .path
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    PeerInfo {
        peer: link.peer,
        instance: link.agreement.instance,
        address: link.agreement.address.clone(),
        path,
        path_reason,
        handshake: link.handshake,
    }
}
