//! The receiving end over the engines of a decode worker.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvtransfer::engine::{Engine, Transfer};
use kvtransfer::error::SubmitError;
use kvtransfer::serve::telemetry::TelemetryServer;
use kvtransfer::transfer::ReceiveRequest;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use super::directory::{Directory, Route};
use super::outcome::{aux_items, failure, page_items, settle};
use super::prefill::{engine_room, refused};
use super::watch::{Record, Watch};
use super::{Background, serve_telemetry, start_ranks};
use crate::pd::{DecodeLink, Doorbell, Grant, Plane, ReceiveState, Role, Room, TransferError};
use crate::settings::Settings;

/// Rooms open at once; a worker's queue is shorter.
const ROOMS_MAX: usize = 1024;

/// How often a room that found its prefill gone at the last moment looks it up again.
const ATTEMPTS_MAX: usize = 3;

/// Starts the engines. They only dial: nothing listens here.
pub(super) fn plane(settings: &Settings, bell: Doorbell) -> anyhow::Result<Plane> {
    let (ranks, engines) = start_ranks(settings, None)?;
    let watch = Arc::new(Watch::new(engines.clone(), None));
    let background = Background::start()?;
    let telemetry = serve_telemetry(settings, &watch)?;
    let shared = Arc::new(Shared {
        directory: Directory::new(engines.clone()),
        engines,
        rooms: Mutex::default(),
        bell,
        watch: watch.clone(),
    });
    let link = EngineDecode {
        shared,
        background,
        serial: 0,
        _telemetry: telemetry,
    };
    Ok(Plane {
        ranks,
        role: Role::Decode(Box::new(link)),
        watch: Some(watch),
    })
}

/// The link. Dropping it ends every transfer.
struct EngineDecode {
    shared: Arc<Shared>,
    background: Background,
    /// Tells one use of a room number from the next, for look-ups that finish late.
    serial: u64,
    _telemetry: Option<TelemetryServer>,
}

/// What the scheduler's thread and the look-ups share. The lock is held for calls into the engines that only queue
/// work; their callbacks never take it.
struct Shared {
    directory: Directory,
    engines: Arc<[Engine]>,
    rooms: Mutex<BTreeMap<Room, ReceiveRoom>>,
    bell: Doorbell,
    watch: Arc<Watch>,
}

struct ReceiveRoom {
    serial: u64,
    timeout: Duration,
    stage: Stage,
}

enum Stage {
    /// The prefill is being looked up; no page is lent.
    Resolving(Option<AbortHandle>),
    /// Pages are lent, one transfer per rank.
    Moving(Vec<Transfer>, Arc<Route>),
    Over(Result<(), TransferError>),
}

impl ReceiveRoom {
    /// Notes a combined end.
    fn follow(&mut self, room: Room, watch: &Watch) {
        let Stage::Moving(transfers, route) = &self.stage else {
            return;
        };
        if let Some(end) = settle(transfers) {
            let end = end.map_err(|error| failure(error, self.timeout));
            watch.record(Record::received(room, &end, route));
            self.stage = Stage::Over(end.map(drop));
        }
    }
}

impl DecodeLink for EngineDecode {
    fn receive(&mut self, grant: Grant, timeout: Duration) -> Result<(), TransferError> {
        let room = grant.bootstrap.room;
        let mut rooms = self.shared.rooms();
        if rooms.len() >= ROOMS_MAX {
            return Err(TransferError::Full {
                rooms_max: ROOMS_MAX,
            });
        }
        self.serial += 1;
        let serial = self.serial;
        rooms.insert(
            room,
            ReceiveRoom {
                serial,
                timeout,
                stage: Stage::Resolving(None),
            },
        );
        let deadline = Instant::now() + timeout;
        let looking = self.shared.clone().look_up(grant, serial, deadline);
        let task = self.background.runtime().spawn(looking);
        // Still under the lock, so the look-up cannot have ended the stage yet.
        if let Some(state) = rooms.get_mut(&room) {
            state.stage = Stage::Resolving(Some(task.abort_handle()));
        }
        Ok(())
    }

    fn poll(&mut self, room: Room) -> ReceiveState {
        let mut rooms = self.shared.rooms();
        let Some(state) = rooms.get_mut(&room) else {
            return ReceiveState::Failed(TransferError::Cancelled);
        };
        state.follow(room, &self.shared.watch);
        match &state.stage {
            Stage::Resolving(_) => ReceiveState::Bootstrapping,
            Stage::Moving(..) => ReceiveState::Transferring,
            Stage::Over(Ok(())) => ReceiveState::Received,
            Stage::Over(Err(error)) => ReceiveState::Failed(error.clone()),
        }
    }

    fn cancel(&mut self, room: Room) {
        let mut rooms = self.shared.rooms();
        let Some(state) = rooms.get_mut(&room) else {
            return;
        };
        match &state.stage {
            Stage::Resolving(task) => {
                if let Some(task) = task {
                    task.abort();
                }
                state.stage = Stage::Over(Err(TransferError::Cancelled));
            }
            // The engine fences before this returns, which takes as long as one system call at most.
            Stage::Moving(transfers, _) => transfers.iter().for_each(Transfer::cancel),
            Stage::Over(_) => return,
        }
        state.follow(room, &self.shared.watch);
        self.shared.bell.ring();
    }

    fn close(&mut self, room: Room) {
        let closed = self.shared.rooms().remove(&room);
        drop(closed);
    }
}

impl Drop for EngineDecode {
    fn drop(&mut self) {
        self.shared.rooms().clear();
        self.shared.engines.iter().for_each(Engine::shut_down);
    }
}

/// Why a grant could not be made.
enum Ungranted {
    /// The connection broke since it was looked up; nothing was lent.
    Gone,
    /// The room is over.
    Failed(TransferError),
}

impl Shared {
    fn rooms(&self) -> MutexGuard<'_, BTreeMap<Room, ReceiveRoom>> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the prefill and lends it the pages, or ends the room with the reason.
    async fn look_up(self: Arc<Self>, grant: Grant, serial: u64, deadline: Instant) {
        let room = grant.bootstrap.room;
        for attempt in 1..=ATTEMPTS_MAX {
            let (host, port) = (grant.bootstrap.host.as_str(), grant.bootstrap.port);
            let found = timeout_at(deadline, self.directory.find(host, port)).await;
            let outcome = match found {
                Err(_) => Err(Ungranted::Failed(TransferError::Timeout {
                    stage: "looking up the prefill",
                    after: self.timeout_of(room),
                })),
                Ok(Err(error)) => Err(Ungranted::Failed(TransferError::Peer {
                    reason: error.to_string(),
                })),
                Ok(Ok(route)) => self.lend(&grant, serial, deadline, &route),
            };
            let error = match outcome {
                Ok(()) => break,
                Err(Ungranted::Gone) if attempt < ATTEMPTS_MAX => continue,
                Err(Ungranted::Gone) => TransferError::Peer {
                    reason: "the prefill's connections break as soon as they are made".to_owned(),
                },
                Err(Ungranted::Failed(error)) => error,
            };
            self.fail(room, serial, error);
            break;
        }
        self.bell.ring();
    }

    fn timeout_of(&self, room: Room) -> Duration {
        self.rooms()
            .get(&room)
            .map_or(Duration::ZERO, |state| state.timeout)
    }

    fn fail(&self, room: Room, serial: u64, error: TransferError) {
        let mut rooms = self.rooms();
        let state = rooms.get_mut(&room).filter(|s| s.serial == serial);
        if let Some(state) = state.filter(|s| matches!(s.stage, Stage::Resolving(_))) {
            self.watch.record(Record::unresolved(room, &error));
            state.stage = Stage::Over(Err(error));
        }
    }

    /// Opens the room on every rank, unless it was cancelled meanwhile.
    fn lend(
        &self,
        grant: &Grant,
        serial: u64,
        deadline: Instant,
        route: &Arc<Route>,
    ) -> Result<(), Ungranted> {
        let room = grant.bootstrap.room;
        let mut rooms = self.rooms();
        let state = rooms.get_mut(&room).filter(|s| s.serial == serial);
        let Some(state) = state.filter(|s| matches!(s.stage, Stage::Resolving(_))) else {
            return Ok(());
        };
        // Lending to some ranks only would fail the room on the others, where the prefill waits.
        if !self.directory.is_alive(route) {
            return Err(Ungranted::Gone);
        }
        let mut transfers = Vec::with_capacity(self.engines.len());
        for (engine, rank) in self.engines.iter().zip(&route.ranks) {
            let request = ReceiveRequest {
                room: engine_room(room),
                sources: rank.sources.clone(),
                receivers_expected: rank.receivers_expected,
                prefix_tokens: u32::try_from(grant.prefix_tokens)
                    .expect("invariant: prompts are shorter than a 32-bit context"),
                items: vec![page_items(&grant.pages), aux_items(Some(grant.aux))],
                timeout: deadline.saturating_duration_since(Instant::now()),
            };
            match engine.receive(&request) {
                Ok(transfer) => {
                    let bell = self.bell.clone();
                    transfer.on_end(move |_| bell.ring());
                    transfers.push(transfer);
                }
                Err(SubmitError::UnknownPeer) if transfers.is_empty() => {
                    return Err(Ungranted::Gone);
                }
                // What was lent on earlier ranks is taken back by dropping it.
                Err(error) => return Err(Ungranted::Failed(refused(error))),
            }
        }
        state.stage = Stage::Moving(transfers, route.clone());
        Ok(())
    }
}
