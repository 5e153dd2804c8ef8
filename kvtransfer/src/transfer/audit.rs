//! Sizes of a node's tables, for tests that look for leaks.

use super::{node::Node, send::Orphan};

/// How much a [`Node`] holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeAudit {
    /// Connected peers.
    pub peers: usize,
    /// Live transfers of both roles.
    pub transfers: usize,
    /// Of these, failed ones whose pages may still be in use.
    pub ebbing: usize,
    /// Rooms in the two tables by number.
    pub rooms: usize,
    /// Rooms remembered for a sender that is not open.
    pub orphans: usize,
    /// Grants in them.
    pub orphan_grants: usize,
    /// Armed timers.
    pub timers: usize,
    /// Windows queued, all peers.
    pub queued_windows: usize,
    /// Windows in the fullest queue.
    pub queued_windows_most: usize,
    /// Payload bytes queued, all peers, as the node counts them.
    pub queued_bytes: u64,
    /// Payload bytes queued, added up over the windows.
    pub queued_bytes_summed: u64,
    /// Bytes of the fullest queue.
    pub queued_bytes_most: u64,
    /// Batches without an acknowledgement, all lanes.
    pub in_flight: usize,
    /// Their bytes, as the node counts them.
    pub in_flight_bytes: u64,
}

impl Node {
    /// How much it holds now.
    pub fn audit(&self) -> NodeAudit {
        let grants = self.orphans.values().map(|orphan| match orphan {
            Orphan::Granted { legs, .. } => legs.len(),
            Orphan::Cancelled { .. } | Orphan::SenderEnded { .. } => 0,
        });
        let mut audit = NodeAudit {
            peers: self.peers.len(),
            transfers: self.live_transfers(),
            ebbing: self.ebbs.len(),
            rooms: self.send_rooms.len() + self.receive_rooms.len() + self.written.len(),
            orphans: self.orphans.len(),
            orphan_grants: grants.sum(),
            timers: self.timers.len(),
            ..NodeAudit::default()
        };
        for peer in self.peers.values() {
            audit.queued_windows += peer.queue.len();
            audit.queued_windows_most = audit.queued_windows_most.max(peer.queue.len());
            audit.queued_bytes += peer.queued_bytes;
            audit.queued_bytes_most = audit.queued_bytes_most.max(peer.queued_bytes);
            let windows = peer.queue.iter();
            audit.queued_bytes_summed += windows.map(|w| w.end - w.offset).sum::<u64>();
            for lane in peer.lanes.iter().flatten() {
                audit.in_flight += lane.in_flight_count();
                audit.in_flight_bytes += lane.in_flight_bytes;
            }
        }
        audit
    }
}
