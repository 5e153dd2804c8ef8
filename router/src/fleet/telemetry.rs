//! Listens to the live transfer telemetry of one worker and hands it to the scheduler.
//!
//! A prefill tells of the bytes before its wires and of its rooms. It names its peers by their engines' instance ids; which
//! worker these belong to is learned from the decodes' own streams, or else from the peer's host if only one decode is there.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kvtransfer::telemetry::snapshot::{RoomRole, RoomStat, Snapshot};
use kvtransfer::telemetry::watch::{Sighting, WatchConfig, WatchTls, Watcher};
use tokio::time::Instant;

use crate::pick::RoomNews;
use crate::pool::{Role, Worker};
use crate::proxy::Front;
use crate::schedule::sample::{LINKS_MAX, Link};
use crate::schedule::{Sample, WorkerId};

/// Shortest time between two samples of one worker: what changes faster decides nothing.
pub const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// How often it is looked whether a worker has a telemetry port, and still the same.
const PORT_INTERVAL: Duration = Duration::from_secs(1);

/// This stream's number among a worker's sources of samples.
const SOURCE: u32 = 0;

/// Which worker an engine belongs to.
#[derive(Debug, Default)]
pub struct Engines {
    known: RwLock<HashMap<String, Arc<Worker>>>,
}

impl Engines {
    fn enter(&self, picture: &Snapshot, worker: &Arc<Worker>) {
        let ids = || {
            let more = picture.engines.iter();
            std::iter::once(&picture.instance).chain(more)
        };
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            let is_known = |id: &String| known.get(id).is_some_and(|one| Arc::ptr_eq(one, worker));
            if ids().all(is_known) {
                return;
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // Engines of a former start of the worker.
        known.retain(|_, one| !Arc::ptr_eq(one, worker));
        known.extend(ids().map(|id| (id.clone(), Arc::clone(worker))));
    }

    fn leave(&self, worker: &Arc<Worker>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, one| !Arc::ptr_eq(one, worker));
    }
}

/// Takes a worker's engines out again.
struct Entered<'a> {
    engines: &'a Engines,
    worker: &'a Arc<Worker>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.engines.leave(self.worker);
    }
}

/// Listens for as long as the worker is there. Until it has a telemetry port, nothing is asked.
pub async fn watch(front: Arc<Front>, worker: Arc<Worker>) {
    let _entered = Entered {
        engines: &front.engines,
        worker: &worker,
    };
    loop {
        let Some(port) = port_of(&front, &worker) else {
            tokio::time::sleep(PORT_INTERVAL).await;
            continue;
        };
        match listen(&front, &worker, port) {
            Ok(watcher) => follow(&front, &worker, port, &watcher).await,
            Err(error) => {
                tracing::error!(name = worker.name(), %error, "its telemetry cannot be used");
                tokio::time::sleep(PORT_INTERVAL).await;
            }
        }
    }
}

fn port_of(front: &Front, worker: &Worker) -> Option<u16> {
    worker.telemetry_port().or(front.config.telemetry.port)
}

fn listen(front: &Front, worker: &Worker, port: u16) -> anyhow::Result<Watcher> {
    let settings = &front.config.telemetry;
    let host = worker.url().host();
    let scheme = if settings.authorities.is_some() {
        "https"
    } else {
        "http"
    };
    let mut config = WatchConfig::new(format!("{scheme}://{host}:{port}"));
    config.token.clone_from(&settings.token);
    if let Some(file) = &settings.authorities {
        let mut tls = WatchTls::new(std::fs::read(file)?);
        if let Some(files) = &settings.identity {
            let chain = std::fs::read(&files.certificates)?;
            tls.identity = Some((chain, std::fs::read(&files.key)?));
        }
        config.tls = Some(tls);
    }
    Ok(Watcher::spawn(config)?)
}

/// Hands pictures on until the worker's port is another one.
async fn follow(front: &Arc<Front>, worker: &Arc<Worker>, port: u16, watcher: &Watcher) {
    let mut view = watcher.view();
    let mut rooms = Rooms::default();
    let mut live = false;
    let mut looked = Instant::now();
    loop {
        let news = tokio::time::timeout(PORT_INTERVAL, view.changed()).await;
        if looked.elapsed() >= PORT_INTERVAL {
            looked = Instant::now();
            if port_of(front, worker) != Some(port) {
                return;
            }
        }
        match news {
            Err(_elapsed) => continue,
            Ok(Err(_closed)) => return,
            Ok(Ok(())) => {}
        }
        let sighting = view.borrow_and_update().clone();
        if live != sighting.live {
            live = sighting.live;
            report(worker, &sighting);
        }
        if !live {
            // What it told grows stale by itself.
            continue;
        }
        take_in(front, worker, &sighting, &mut rooms);
        tokio::time::sleep(SAMPLE_INTERVAL).await;
    }
}

fn report(worker: &Worker, sighting: &Sighting) {
    let (role, name) = (worker.role(), worker.name());
    match &sighting.lost {
        None => tracing::info!(%role, name, "worker tells of its transfers"),
        Some(_) if sighting.live => tracing::info!(%role, name, "worker tells again"),
        Some(error) => tracing::warn!(%role, name, %error, "worker tells no more, trying again"),
    }
}

fn take_in(front: &Front, worker: &Arc<Worker>, sighting: &Sighting, rooms: &mut Rooms) {
    let (Some(picture), Some(heard)) = (&sighting.picture, sighting.heard) else {
        return;
    };
    if worker.role() == Role::Decode {
        front.engines.enter(picture, worker);
        return;
    }
    let picker = &front.picker;
    let Some(id) = picker.id_of(worker) else {
        return;
    };
    let at = picker.time_of(heard);
    let news = rooms.news(picture, at);
    let links = links(front, picture);
    let sample = Sample {
        worker: id,
        source: SOURCE,
        epoch: picture.epoch,
        // Grows over reconnections too.
        sequence: u64::try_from(picker.now().as_nanos()).unwrap_or(u64::MAX),
        at,
        tells_rooms: rooms.are_told,
        links: Some(&links),
        queues: None,
        pool: None,
    };
    picker.tell_rooms(&news);
    if let Err(error) = picker.ingest(&sample) {
        tracing::debug!(name = worker.name(), %error, "a sample was not taken in");
    }
}

/// The bytes before a prefill's wires, by the decode at the other end. Peers that are no worker here are left out.
fn links(front: &Front, picture: &Snapshot) -> Vec<Link> {
    let mut ids: HashMap<&str, Option<WorkerId>> = HashMap::new();
    let known = front
        .engines
        .known
        .read()
        .unwrap_or_else(PoisonError::into_inner);
    let mut links = Vec::with_capacity(picture.rails.len());
    for rail in picture.rails.iter().take(LINKS_MAX) {
        let id = *ids.entry(&rail.peer).or_insert_with(|| {
            let worker = match known.get(&rail.peer) {
                Some(worker) => Some(Arc::clone(worker)),
                None => alone_at(front, &rail.peer_addr),
            };
            front.picker.id_of(&worker?)
        });
        links.extend(id.map(|peer| Link {
            peer,
            bytes_queued: rail.bytes_queued,
            bytes_in_flight: rail.bytes_in_flight,
            bytes_per_s: rail.rate_bytes_per_s,
        }));
    }
    links
}

/// The only decode on the host of `address`.
fn alone_at(front: &Front, address: &str) -> Option<Arc<Worker>> {
    let (host, _) = address.rsplit_once(':')?;
    let now = front.pool.now();
    let mut there = now
        .of_role(Role::Decode)
        .iter()
        .filter(|worker| worker.url().host() == host);
    let first = there.next()?;
    there.next().is_none().then(|| Arc::clone(first))
}

/// What was told of rooms already.
#[derive(Debug, Default)]
struct Rooms {
    told: HashMap<u64, Told>,
    /// Whether this engine says when a room's KV cache is computed.
    are_told: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Told {
    ready: bool,
    sent: bool,
    round: u64,
}

impl Rooms {
    /// What is new in `picture`, which was taken at `at` on the scheduler's clock.
    fn news(&mut self, picture: &Snapshot, at: Duration) -> Vec<RoomNews> {
        let time = |ns: u64| {
            let ago = Duration::from_nanos(picture.monotonic_ns.saturating_sub(ns));
            (ns != 0).then(|| at.saturating_sub(ago))
        };
        let round = self.told.values().map(|told| told.round).max().unwrap_or(0) + 1;
        let mut news = Vec::new();
        // An engine of an older version sends without ever saying that it was given all.
        self.are_told = !picture.rooms.iter().any(sent_untold);
        let sending = picture.rooms.iter().filter(|room| {
            let failed = !room.failure.is_empty();
            room.role == RoomRole::Sender && !failed
        });
        for room in sending {
            let told = self.told.entry(room.room).or_default();
            told.round = round;
            let ready = time(room.pushed_ns).filter(|_| !told.ready);
            let sent = time(room.done_ns).filter(|_| !told.sent);
            told.ready |= ready.is_some();
            told.sent |= sent.is_some();
            if ready.is_some() || sent.is_some() {
                news.push(RoomNews {
                    room: room.room,
                    ready,
                    sent,
                });
            }
        }
        self.told.retain(|_, told| told.round == round);
        news
    }
}

fn sent_untold(room: &RoomStat) -> bool {
    room.role == RoomRole::Sender
        && room.done_ns != 0
        && room.pushed_ns == 0
        && room.failure.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(number: u64, pushed_ns: u64, done_ns: u64) -> RoomStat {
        RoomStat {
            room: number,
            pushed_ns,
            done_ns,
            ..RoomStat::default()
        }
    }

    #[test]
    fn rooms_are_told_once_and_on_our_clock() {
        let picture = |rooms| Snapshot {
            monotonic_ns: 5_000_000_000,
            rooms,
            ..Snapshot::default()
        };
        let at = Duration::from_secs(100);
        let mut rooms = Rooms::default();
        let news = rooms.news(&picture(vec![room(1, 4_000_000_000, 0), room(2, 0, 0)]), at);
        assert_eq!(
            news,
            [RoomNews {
                room: 1,
                ready: Some(Duration::from_secs(99)),
                sent: None
            }]
        );
        assert!(rooms.are_told);
        let news = rooms.news(&picture(vec![room(1, 4_000_000_000, 4_500_000_000)]), at);
        assert_eq!(
            news,
            [RoomNews {
                room: 1,
                ready: None,
                sent: Some(Duration::from_millis(99_500))
            }]
        );
        assert_eq!(rooms.told.len(), 1, "rooms that are gone are forgotten");
        rooms.news(&picture(vec![room(3, 0, 1)]), at);
        assert!(!rooms.are_told);
    }
}
