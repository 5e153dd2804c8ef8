//! The live picture of a [`Node`] for telemetry.

use crate::{
    error::TransferError,
    ids::{InstanceId, PeerId},
    telemetry::snapshot::{RailStat, RoomRole, RoomStat, Snapshot},
    time::Time,
    transfer::{
        node::{ENDED_MAX, Node},
        peer::Peer,
        receive::ReceiveRoom,
        send::SendRoom,
    },
};

impl Node {
    /// Everything that telemetry shows of the data plane at `now`. Costs O(lanes + live rooms).
    pub fn picture(&mut self, now: Time, snapshot: &mut Snapshot) {
        snapshot.monotonic_ns = now.nanos();
        for peer in self.peers.values_mut() {
            peer.rails(now, &mut snapshot.rails);
        }
        snapshot
            .rails
            .sort_by(|a, b| (&a.peer, &a.rail).cmp(&(&b.peer, &b.rail)));
        snapshot
            .rooms
            .extend(self.ended.iter().map(EndedRoom::stat));
        snapshot
            .rooms
            .extend(self.sends.values().map(|room| self.send_stat(room)));
        snapshot
            .rooms
            .extend(self.receives.values().map(|room| self.receive_stat(room)));
        // A room used again replaces its earlier life.
        snapshot
            .rooms
            .sort_by_key(|room| (room.room, room.role, std::cmp::Reverse(room.enqueued_ns)));
        snapshot.rooms.dedup_by_key(|room| (room.room, room.role));
        let named = self
            .failures
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count));
        snapshot.failures = named.collect();
    }

    fn peer_name(&self, id: PeerId) -> String {
        self.peers
            .get(&id)
            .map_or_else(String::new, |peer| peer.instance.to_string())
    }

    fn send_stat(&self, room: &SendRoom) -> RoomStat {
        RoomStat {
            room: room.room.number(),
            role: RoomRole::Sender,
            state: room.state().to_owned(),
            peer: room
                .legs
                .first()
                .map_or_else(String::new, |leg| self.peer_name(leg.peer)),
            enqueued_ns: room.opened.nanos(),
            first_byte_ns: room.first_byte.map_or(0, Time::nanos),
            pushed_ns: room.closed_at.map_or(0, Time::nanos),
            done_ns: 0,
            bytes: room.bytes,
            failure: String::new(),
        }
    }

    fn receive_stat(&self, room: &ReceiveRoom) -> RoomStat {
        RoomStat {
            room: room.room.number(),
            role: RoomRole::Receiver,
            state: room.state().to_owned(),
            peer: room
                .legs
                .first()
                .map_or_else(String::new, |leg| self.peer_name(leg.peer)),
            enqueued_ns: room.opened.nanos(),
            first_byte_ns: room.first_byte.map_or(0, Time::nanos),
            pushed_ns: 0,
            done_ns: 0,
            bytes: room.bytes,
            failure: String::new(),
        }
    }

    pub(super) fn remember_send(
        &mut self,
        now: Time,
        room: &SendRoom,
        error: Option<&TransferError>,
    ) {
        let peer = room.legs.first().map(|leg| leg.peer);
        self.remember(EndedRoom {
            room: room.room.number(),
            role: RoomRole::Sender,
            peer: peer.and_then(|id| self.instance_of(id)),
            opened: room.opened,
            first_byte: room.first_byte,
            pushed: room.closed_at,
            ended: now,
            bytes: room.bytes,
            failure: error.map(TransferError::name),
        });
    }

    pub(super) fn remember_receive(
        &mut self,
        now: Time,
        room: &ReceiveRoom,
        error: Option<&TransferError>,
    ) {
        let peer = room.legs.first().map(|leg| leg.peer);
        self.remember(EndedRoom {
            room: room.room.number(),
            role: RoomRole::Receiver,
            peer: peer.and_then(|id| self.instance_of(id)),
            opened: room.opened,
            first_byte: room.first_byte,
            pushed: None,
            ended: now,
            bytes: room.bytes,
            failure: error.map(TransferError::name),
        });
    }

    fn remember(&mut self, room: EndedRoom) {
        if self.ended.len() == ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(room);
    }

    fn instance_of(&self, id: PeerId) -> Option<InstanceId> {
        self.peers.get(&id).map(|peer| peer.instance)
    }
}

/// A room that ended, as it is kept for telemetry: words are made of it when somebody asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndedRoom {
    room: u64,
    role: RoomRole,
    peer: Option<InstanceId>,
    opened: Time,
    first_byte: Option<Time>,
    pushed: Option<Time>,
    ended: Time,
    bytes: u64,
    /// The name of the error; none for a success.
    failure: Option<&'static str>,
}

impl EndedRoom {
    fn stat(&self) -> RoomStat {
        let is_failed = self.failure.is_some();
        RoomStat {
            room: self.room,
            role: self.role,
            state: if is_failed { "failed" } else { "success" }.to_owned(),
            peer: self.peer.map_or_else(String::new, |peer| peer.to_string()),
            enqueued_ns: self.opened.nanos(),
            first_byte_ns: self.first_byte.map_or(0, Time::nanos),
            pushed_ns: self.pushed.map_or(0, Time::nanos),
            done_ns: self.ended.nanos(),
            bytes: self.bytes,
            failure: self.failure.unwrap_or_default().to_owned(),
        }
    }
}

impl Peer {
    fn rails(&mut self, now: Time, out: &mut Vec<RailStat>) {
        let failures: Vec<(String, u64)> = self
            .failures
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect();
        let lanes = self.lanes.iter().flatten().count().max(1) as u64;
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let Some(lane) = lane else {
                continue;
            };
            let quantiles = lane.latency.quantiles(now.nanos());
            out.push(RailStat {
                peer: self.instance.to_string(),
                peer_addr: self.address.clone(),
                rail: format!("{}/{index}", lane.setup.path),
                path: lane.setup.path.to_owned(),
                path_reason: lane.setup.path_reason.clone(),
                // The queue belongs to the peer: whichever lane is free takes from it, so each shows its share.
                bytes_queued: self.queued_bytes / lanes,
                bytes_in_flight: lane.in_flight_bytes,
                transfers_queued: self.queue.len() as u64,
                oldest_enqueued_ns: self.queue.front().map_or(0, |w| w.queued_at.nanos()),
                rate_bytes_per_s: lane.rate.bytes_per_s(),
                p50_ns: quantiles.p50_ns,
                p99_ns: quantiles.p99_ns,
                bytes_total: lane.bytes_total,
                batches_total: lane.batches_total,
                // The engine knows these, for lanes that are queue pairs.
                wire_operations_total: 0,
                packed_batches_total: 0,
                failures: failures.clone(),
            });
        }
    }
}
