//! Chunks that must not be read before something else has happened on the device: the application's kernels still write them.
//!
//! Whoever pushes them does not wait. A thread that lives while there are such chunks looks at their events and hands each
//! chunk to the node when its own have happened; chunks of one transfer keep their order.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use super::{handle::Shared, hub::Hub};
use crate::{
    error::{SubmitError, TransferError},
    ids::TransferId,
    memory::device::{Awaited, DeviceError},
    transfer::Chunk,
};

/// Chunks that wait, of all transfers: an application that is so far ahead of its device has another problem.
const CHUNKS_MAX: usize = 1 << 16;

/// Most events of a chunk.
pub const EVENTS_MAX: usize = 64;

/// Between two looks at the events: short beside a transfer, long beside a look. It doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_micros(10);

/// Longest pause: a chunk that has waited for long may wait a little longer.
const PAUSE_MAX: Duration = Duration::from_micros(200);

/// A chunk, and what it waits for.
pub(super) struct Pending {
    transfer: TransferId,
    shared: Arc<Shared>,
    chunk: Chunk,
    events: Vec<Box<dyn Awaited>>,
}

/// Chunks that wait, oldest first.
#[derive(Default)]
pub(crate) struct Waiting(Mutex<State>);

#[derive(Default)]
struct State {
    chunks: Vec<Pending>,
    is_running: bool,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a chunk of that transfer waits: the next one must wait behind it.
    pub(super) fn has(&self, transfer: TransferId) -> bool {
        let state = self.lock();
        state.chunks.iter().any(|known| known.transfer == transfer)
    }
}

/// Queues a chunk for the time when the events, integers of the device's driver, have happened.
pub(super) fn push_after(
    hub: &Arc<Hub>,
    transfer: TransferId,
    shared: &Arc<Shared>,
    chunk: &Chunk,
    events: &[u64],
) -> Result<(), SubmitError> {
    if events.len() > EVENTS_MAX {
        let count = events.len();
        let reason = format!("{count} events for one chunk, at most {EVENTS_MAX}");
        return Err(SubmitError::Items(reason));
    }
    let refused = |error: DeviceError| SubmitError::Items(error.to_string());
    let events = match hub.devices.device() {
        _ if events.is_empty() => Vec::new(),
        None => {
            let reason = "events of a device, but this engine's memory is the host's";
            return Err(SubmitError::Items(reason.into()));
        }
        Some(device) => {
            let events = events.iter().map(|event| device.await_event(*event));
            events.collect::<Result<_, _>>().map_err(refused)?
        }
    };
    let mut state = hub.waiting.lock();
    if state.chunks.len() >= CHUNKS_MAX {
        return Err(SubmitError::Full {
            what: "the queue of chunks that wait for events",
            used: state.chunks.len() as u64,
            asked: 1,
            limit: CHUNKS_MAX as u64,
            setting: "none",
        });
    }
    if !state.is_running {
        let hub = Arc::clone(hub);
        let spawned = thread::Builder::new()
            .name("kvt-events".into())
            .spawn(move || run(&hub));
        if let Err(error) = spawned {
            let reason = format!("no thread to wait for events: {error}");
            return Err(SubmitError::Items(reason));
        }
        state.is_running = true;
    }
    state.chunks.push(Pending {
        transfer,
        shared: Arc::clone(shared),
        chunk: chunk.clone(),
        events,
    });
    Ok(())
}

/// The thread: until nothing waits.
fn run(hub: &Arc<Hub>) {
    let _alive = hub.lane_alive();
    let mut pause = PAUSE_FIRST;
    loop {
        let Some(ready) = next(hub) else {
            return;
        };
        if ready.is_empty() {
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
            continue;
        }
        pause = PAUSE_FIRST;
        for (transfer, outcome) in ready {
            if let Err(error) = outcome {
                hub.with(|node, now| node.cancel(now, transfer, error));
            }
        }
    }
}

type Outcome = (TransferId, Result<(), TransferError>);

/// Hands over every chunk whose time has come. `None`, and the thread's end: none is left, or the engine stops.
fn next(hub: &Arc<Hub>) -> Option<Vec<Outcome>> {
    let mut state = hub.waiting.lock();
    if state.chunks.is_empty() || hub.is_stopped() {
        // Dropped without the lock: their transfers may end with them.
        let left = std::mem::take(&mut state.chunks);
        state.is_running = false;
        drop(state);
        drop(left);
        return None;
    }
    let mut outcomes = Vec::new();
    let mut held: Vec<TransferId> = Vec::new();
    let mut at = 0;
    while at < state.chunks.len() {
        let pending = &state.chunks[at];
        let transfer = pending.transfer;
        if held.contains(&transfer) {
            at += 1;
            continue;
        }
        let outcome = match pending.poll() {
            Ok(false) => {
                held.push(transfer);
                at += 1;
                continue;
            }
            Ok(true) => pending.hand_over(hub),
            Err(error) => Err(error),
        };
        // In order: a chunk that comes while this is being handed over still finds it here.
        state.chunks.remove(at);
        outcomes.push((transfer, outcome));
    }
    Some(outcomes)
}

impl Pending {
    /// Whether everything that it waits for has happened, or its transfer is over.
    fn poll(&self) -> Result<bool, TransferError> {
        if self.shared.is_over() {
            return Ok(true);
        }
        for event in &self.events {
            let is_done = event.is_done();
            let is_done = is_done.map_err(|error| TransferError::Device {
                reason: error.to_string(),
            })?;
            if !is_done {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn hand_over(&self, hub: &Hub) -> Result<(), TransferError> {
        if self.shared.is_over() {
            return Ok(());
        }
        match hub.push(self.transfer, &self.chunk) {
            Ok(_) | Err(SubmitError::Ended(_) | SubmitError::Shutdown) => Ok(()),
            Err(error) => Err(TransferError::CancelledBecause {
                reason: format!("a chunk that had waited for its events was refused: {error}"),
            }),
        }
    }
}
