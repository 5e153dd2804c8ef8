//! What operators, routers and the demo see of the plane: paths, handshakes, rates, the last transfers.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvtransfer::engine::{Engine, PeerInfo};
use kvtransfer::telemetry::prometheus;
use kvtransfer::telemetry::snapshot::{RailStat, RoomRole, RoomStat, Snapshot};
use serde_json::{Value, json};

use super::directory::Route;
use super::outcome::Moved;
use crate::pd::{Room, TransferError};

/// Ended rooms that are remembered.
const RECORDS_MAX: usize = 256;

/// The view from outside. Reading it never blocks a transfer.
pub struct Watch {
    engines: Arc<[Engine]>,
    /// The registry of this worker, if it runs one.
    bootstrap: Option<SocketAddr>,
    state: Mutex<State>,
}

struct State {
    standing: Result<(), String>,
    telemetry: Option<SocketAddr>,
    records: VecDeque<Record>,
    next_serial: u64,
}

/// One ended room.
#[derive(Clone, Debug)]
pub(super) struct Record {
    room: Room,
    moved: Moved,
    error: Option<String>,
    /// Registry that named the prefill; empty where this worker is the prefill.
    registry: String,
    peers: Vec<PeerInfo>,
}

impl Record {
    /// As the prefill saw it.
    pub(super) fn sent(room: Room, end: &Result<Moved, TransferError>) -> Self {
        Self {
            room,
            moved: end.clone().unwrap_or_default(),
            error: end.as_ref().err().map(ToString::to_string),
            registry: String::new(),
            peers: Vec::new(),
        }
    }

    /// As the decode saw it.
    pub(super) fn received(room: Room, end: &Result<Moved, TransferError>, route: &Route) -> Self {
        Self {
            registry: route.registry.clone(),
            peers: route.ranks.iter().flat_map(|r| r.peers.clone()).collect(),
            ..Self::sent(room, end)
        }
    }

    /// A room whose prefill was not found.
    pub(super) fn unresolved(room: Room, error: &TransferError) -> Self {
        Self::sent(room, &Err(error.clone()))
    }

    fn json(&self, serial: u64) -> Value {
        let seconds = self.moved.moving.as_secs_f64();
        json!({
            "serial": serial,
            "room": self.room.number(),
            "ok": self.error.is_none(),
            "error": self.error,
            "bytes": self.moved.bytes,
            "waited_ms": milliseconds(self.moved.waited),
            "moving_ms": milliseconds(self.moved.moving),
            "gb_s": if seconds > 0.0 { lossy(self.moved.bytes) / seconds / 1e9 } else { 0.0 },
            "bootstrap": self.registry,
            "peers": self.peers.iter().map(peer_json).collect::<Vec<_>>(),
        })
    }
}

impl Watch {
    /// Watches `engines`. A worker with a registry is ready once it has registered there.
    pub(super) fn new(engines: Arc<[Engine]>, bootstrap: Option<SocketAddr>) -> Self {
        let standing = match bootstrap {
            Some(_) => Err("the ranks are being registered".to_owned()),
            None => Ok(()),
        };
        Self {
            engines,
            bootstrap,
            state: Mutex::new(State {
                standing,
                telemetry: None,
                records: VecDeque::new(),
                next_serial: 1,
            }),
        }
    }

    /// Where this worker's registry listens.
    #[must_use]
    pub const fn bootstrap(&self) -> Option<SocketAddr> {
        self.bootstrap
    }

    /// Whether peers can find this worker.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn standing(&self) -> Result<(), String> {
        self.state().standing.clone()
    }

    pub(super) fn set_standing(&self, standing: Result<(), String>) {
        self.state().standing = standing;
    }

    pub(super) fn set_telemetry(&self, address: SocketAddr) {
        self.state().telemetry = Some(address);
    }

    pub(super) fn record(&self, record: Record) {
        if let Some(error) = &record.error {
            tracing::info!(room = %record.room, error, "room failed");
        }
        let mut state = self.state();
        if state.records.len() == RECORDS_MAX {
            state.records.pop_front();
        }
        state.records.push_back(record);
        state.next_serial += 1;
    }

    /// The ended rooms with a serial number above `after`, oldest first, at most the last 256. `gb_s` is bytes by the
    /// time from the first byte to the end, a chunked prompt's computing included; the rails' rates leave that out.
    #[must_use]
    pub fn transfers(&self, after: u64) -> Value {
        let state = self.state();
        let first = state.next_serial - state.records.len() as u64;
        let listed: Vec<Value> = (first..)
            .zip(&state.records)
            .filter(|(serial, _)| *serial > after)
            .map(|(serial, record)| record.json(serial))
            .collect();
        json!({ "last_serial": state.next_serial - 1, "transfers": listed })
    }

    /// The plane's part of `/server_info`.
    #[must_use]
    pub fn server_info(&self) -> Value {
        let ranks: Vec<Value> = self.engines.iter().enumerate().map(rank_json).collect();
        json!({
            "bootstrap": self.bootstrap.map(|address| address.to_string()),
            "telemetry": self.state().telemetry.map(|address| address.to_string()),
            "registered": self.bootstrap.map(|_| self.standing().is_ok()),
            "ranks": ranks,
        })
    }

    /// All ranks in one picture: rails are named `tp<rank>/<rail>`, a room is the sum of its ranks.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        merge(self.engines.iter().map(Engine::snapshot).collect())
    }

    /// The picture as a Prometheus page.
    #[must_use]
    pub fn metrics(&self) -> String {
        prometheus::render(&self.snapshot())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("bootstrap", &self.bootstrap)
            .finish_non_exhaustive()
    }
}

fn rank_json((rank, engine): (usize, &Engine)) -> Value {
    let rails = engine.snapshot().rails;
    let rail = |rail: &RailStat| {
        json!({
            "peer": rail.peer,
            "rail": rail.rail,
            "bytes_total": rail.bytes_total,
            "batches_total": rail.batches_total,
            "rate_gb_s": rail.rate_bytes_per_s / 1e9,
        })
    };
    json!({
        "rank": rank,
        "instance": engine.instance().to_string(),
        "address": engine.local_addr().map(|address| address.to_string()),
        "peers": engine.peers().iter().map(peer_json).collect::<Vec<_>>(),
        "rails": rails.iter().map(rail).collect::<Vec<_>>(),
        "malformed": engine.malformed(),
    })
}

fn peer_json(info: &PeerInfo) -> Value {
    json!({
        "instance": info.instance.to_string(),
        "address": info.address,
        "path": info.path,
        "path_reason": info.path_reason,
        "handshake_ms": milliseconds(info.handshake),
    })
}

/// One picture of several ranks; the first rank's identity stands for all.
fn merge(pictures: Vec<Snapshot>) -> Snapshot {
    let mut merged = Snapshot::default();
    let mut rooms = BTreeMap::<(u64, RoomRole), RoomStat>::new();
    for (rank, picture) in pictures.into_iter().enumerate() {
        merged.engines.push(picture.instance.clone());
        if rank == 0 {
            merged.instance = picture.instance;
            merged.epoch = picture.epoch;
        }
        merged.monotonic_ns = merged.monotonic_ns.max(picture.monotonic_ns);
        merged.wall_ns = merged.wall_ns.max(picture.wall_ns);
        merged.rails.extend(picture.rails.into_iter().map(|rail| {
            let rail_name = format!("tp{rank}/{}", rail.rail);
            RailStat {
                rail: rail_name,
                ..rail
            }
        }));
        for room in picture.rooms {
            match rooms.entry((room.room, room.role)) {
                std::collections::btree_map::Entry::Vacant(free) => {
                    free.insert(room);
                }
                std::collections::btree_map::Entry::Occupied(mut known) => {
                    join(known.get_mut(), &room);
                }
            }
        }
        // Normalising adds up what has one name.
        merged.failures.extend(picture.failures);
    }
    merged.rooms = rooms.into_values().collect();
    merged.normalise();
    merged
}

/// Adds another rank's part of a room. The room's state is that of the rank that is furthest behind.
fn join(room: &mut RoomStat, other: &RoomStat) {
    let earliest = |a: u64, b: u64| match (a, b) {
        (0, b) => b,
        (a, 0) => a,
        (a, b) => a.min(b),
    };
    if progress(&other.state) < progress(&room.state) {
        room.state.clone_from(&other.state);
        room.failure.clone_from(&other.failure);
    }
    room.enqueued_ns = earliest(room.enqueued_ns, other.enqueued_ns);
    room.first_byte_ns = earliest(room.first_byte_ns, other.first_byte_ns);
    // What is not true of every rank is not true of the room.
    let latest = |a: u64, b: u64| if a == 0 || b == 0 { 0 } else { a.max(b) };
    room.pushed_ns = latest(room.pushed_ns, other.pushed_ns);
    room.done_ns = latest(room.done_ns, other.done_ns);
    room.bytes += other.bytes;
}

/// SGLang's order of poll states; a failed rank fails the room.
fn progress(state: &str) -> usize {
    const ORDER: [&str; 5] = [
        "failed",
        "bootstrapping",
        "waiting_for_input",
        "transferring",
        "success",
    ];
    ORDER
        .iter()
        .position(|known| *known == state)
        .unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a number for people")]
const fn lossy(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_merged_into_one_picture() {
        let rail = |bytes_total| RailStat {
            peer: "p".into(),
            rail: "tcp/0".into(),
            bytes_total,
            ..RailStat::default()
        };
        let room = |state: &str, bytes, first_byte_ns, done_ns| RoomStat {
            room: 7,
            state: state.into(),
            enqueued_ns: 10,
            first_byte_ns,
            done_ns,
            bytes,
            ..RoomStat::default()
        };
        let picture = |instance: &str, rail: RailStat, room: RoomStat| Snapshot {
            instance: instance.into(),
            epoch: 3,
            rails: vec![rail],
            rooms: vec![room],
            failures: vec![("timeout".into(), 1)],
            ..Snapshot::default()
        };
        let merged = merge(vec![
            picture("a", rail(1), room("success", 100, 40, 90)),
            picture("b", rail(2), room("transferring", 50, 30, 0)),
        ]);
        assert_eq!((merged.instance.as_str(), merged.epoch), ("a", 3));
        assert_eq!(merged.engines, ["a", "b"]);
        let names: Vec<_> = merged
            .rails
            .iter()
            .map(|r| (r.rail.as_str(), r.bytes_total))
            .collect();
        assert_eq!(names, [("tp0/tcp/0", 1), ("tp1/tcp/0", 2)]);
        assert_eq!(merged.failures, [("timeout".to_owned(), 2)]);
        let [room] = &merged.rooms[..] else {
            panic!("one room: {:?}", merged.rooms)
        };
        assert_eq!((room.state.as_str(), room.bytes), ("transferring", 150));
        assert_eq!((room.first_byte_ns, room.done_ns), (30, 0));
    }

    #[test]
    fn only_the_last_records_are_kept_and_numbered_on() {
        let watch = Watch::new(Vec::new().into(), None);
        let room = Room::new(1).expect("valid");
        let moved = Moved {
            bytes: 2_000_000,
            waited: Duration::ZERO,
            moving: Duration::from_millis(1),
        };
        for _ in 0..RECORDS_MAX + 3 {
            watch.record(Record::sent(room, &Ok(moved)));
        }
        let all = watch.transfers(0);
        let listed = all["transfers"].as_array().expect("a list");
        assert_eq!(listed.len(), RECORDS_MAX);
        assert_eq!(
            (&listed[0]["serial"], &all["last_serial"]),
            (&json!(4), &json!(RECORDS_MAX + 3))
        );
        assert_eq!(listed[0]["gb_s"], 2.0);
        let none = watch.transfers(RECORDS_MAX as u64 + 3);
        assert_eq!(none["transfers"], json!([]));
    }
}
