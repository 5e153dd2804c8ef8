//! The sending end over the engines of a prefill worker.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtransfer::engine::{Engine, Transfer};
use kvtransfer::error::SubmitError;
use kvtransfer::ids;
use kvtransfer::serve::telemetry::TelemetryServer;
use kvtransfer::transfer::{Chunk as EngineChunk, SendRequest};

use super::outcome::{aux_items, failure, page_items, settle};
use super::registry::OwnRegistry;
use super::watch::{Record, Watch};
use super::{Background, advertised, resolve, serve_telemetry, start_ranks};
use crate::pd::{Chunk, Doorbell, Plane, PrefillLink, Role, Room, SendState, TransferError};
use crate::settings::Settings;

/// Rooms open at once; a worker's queue is shorter.
const ROOMS_MAX: usize = 1024;

/// Starts the engines, the registry and the registration.
pub(super) fn plane(settings: &Settings, bell: Doorbell) -> anyhow::Result<Plane> {
    let ip = resolve(&settings.host)?;
    // Before any memory is taken: a busy port is the most likely mistake.
    let registry = OwnRegistry::start(ip, settings.disaggregation_bootstrap_port)?;
    let (ranks, engines) = start_ranks(settings, Some(ip))?;
    let watch = Arc::new(Watch::new(engines.clone(), Some(registry.address())));
    let background = Background::start()?;
    let rows = registry.rows(settings, advertised(settings, ip), &engines);
    let instance = engines[0].instance().to_string();
    let keeping = registry.keep_registered(rows, instance, watch.clone());
    background.runtime().spawn(keeping);
    let telemetry = serve_telemetry(settings, &watch)?;
    let link = EnginePrefill {
        rooms: BTreeMap::new(),
        engines,
        bell,
        watch: watch.clone(),
        _background: background,
        _registry: registry,
        _telemetry: telemetry,
    };
    Ok(Plane {
        ranks,
        role: Role::Prefill(Box::new(link)),
        watch: Some(watch),
    })
}

/// The link. Dropping it ends the registry, then every transfer.
struct EnginePrefill {
    rooms: BTreeMap<Room, SendRoom>,
    engines: Arc<[Engine]>,
    bell: Doorbell,
    watch: Arc<Watch>,
    _background: Background,
    _registry: OwnRegistry,
    _telemetry: Option<TelemetryServer>,
}

struct SendRoom {
    timeout: Duration,
    /// One per rank; empty once the room is over.
    transfers: Vec<Transfer>,
    last_pushed: bool,
    outcome: Option<Result<(), TransferError>>,
}

impl SendRoom {
    /// Notes a combined end.
    fn follow(&mut self, room: Room, watch: &Watch) {
        if self.outcome.is_some() {
            return;
        }
        if let Some(end) = settle(&self.transfers) {
            let end = end.map_err(|error| failure(error, self.timeout));
            watch.record(Record::sent(room, &end));
            self.outcome = Some(end.map(drop));
            self.transfers.clear();
        }
    }

    fn fail(&mut self, room: Room, watch: &Watch, error: TransferError) {
        self.transfers.iter().for_each(Transfer::cancel);
        self.transfers.clear();
        watch.record(Record::sent(room, &Err(error.clone())));
        self.outcome = Some(Err(error));
    }
}

impl PrefillLink for EnginePrefill {
    fn open(&mut self, room: Room, timeout: Duration) -> Result<(), TransferError> {
        if self.rooms.len() >= ROOMS_MAX {
            return Err(TransferError::Full {
                rooms_max: ROOMS_MAX,
            });
        }
        let request = SendRequest {
            room: engine_room(room),
            timeout,
        };
        let mut transfers = Vec::with_capacity(self.engines.len());
        for engine in &*self.engines {
            // Ranks opened before a failing one are cancelled by being dropped.
            let transfer = engine.send(&request).map_err(refused)?;
            let (ready, ended) = (self.bell.clone(), self.bell.clone());
            transfer.on_ready(move |_| ready.ring());
            transfer.on_end(move |_| ended.ring());
            transfers.push(transfer);
        }
        self.rooms.insert(
            room,
            SendRoom {
                timeout,
                transfers,
                last_pushed: false,
                outcome: None,
            },
        );
        Ok(())
    }

    fn poll(&mut self, room: Room) -> SendState {
        let Some(state) = self.rooms.get_mut(&room) else {
            return SendState::Failed(TransferError::Cancelled);
        };
        state.follow(room, &self.watch);
        match &state.outcome {
            Some(Ok(())) => return SendState::Sent,
            Some(Err(error)) => return SendState::Failed(error.clone()),
            None if state.last_pushed => return SendState::Transferring,
            None => {}
        }
        let ready: Option<Vec<u32>> = state.transfers.iter().map(Transfer::ready).collect();
        match ready.as_deref() {
            None | Some([]) => SendState::Bootstrapping,
            Some([first, rest @ ..]) if rest.iter().all(|other| other == first) => {
                SendState::Granted {
                    decode_prefix_tokens: *first as usize,
                }
            }
            Some(claims) => {
                let reason = format!("the decode's ranks claim different prefixes: {claims:?}");
                let error = TransferError::Peer { reason };
                state.fail(room, &self.watch, error.clone());
                SendState::Failed(error)
            }
        }
    }

    fn push(&mut self, room: Room, chunk: Chunk) -> Result<(), TransferError> {
        let Some(state) = self.rooms.get_mut(&room) else {
            return Err(TransferError::Cancelled);
        };
        state.follow(room, &self.watch);
        if let Some(outcome) = &state.outcome {
            return outcome.clone().and(Err(TransferError::Cancelled));
        }
        // The same lists on every rank. Aux rows travel from the first rank of a block only: the layouts' pairing gives
        // the others nothing to move there, and they still conclude.
        let pushed = EngineChunk {
            items: vec![page_items(&chunk.pages), aux_items(chunk.last)],
            last: chunk.last.is_some(),
        };
        state.last_pushed |= pushed.last;
        for transfer in &state.transfers {
            if let Err(error) = transfer.push(&pushed) {
                let error = match error {
                    SubmitError::Ended(error) => failure(error, state.timeout),
                    other => refused(other),
                };
                state.fail(room, &self.watch, error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    fn cancel(&mut self, room: Room) {
        if let Some(state) = self.rooms.get_mut(&room) {
            // The engine fences before this returns, which takes as long as one system call at most.
            state.transfers.iter().for_each(Transfer::cancel);
            state.follow(room, &self.watch);
            self.bell.ring();
        }
    }

    fn close(&mut self, room: Room) {
        self.rooms.remove(&room);
    }
}

impl Drop for EnginePrefill {
    fn drop(&mut self) {
        self.rooms.clear();
        self.engines.iter().for_each(Engine::shut_down);
    }
}

/// A room by the engine's type.
pub(super) fn engine_room(room: Room) -> ids::Room {
    ids::Room::new(room.number()).expect("invariant: rooms are not zero")
}

/// Why an engine did not take a call.
pub(super) fn refused(error: SubmitError) -> TransferError {
    TransferError::Peer {
        reason: error.to_string(),
    }
}
