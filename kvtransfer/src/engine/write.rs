//! Writes to addresses of a peer: rooms of explicit blocks, opened by the writing side.
//!
//! ```text
//! writer                                      written engine
//! blocks → regions, merged, cut into rooms
//! WriteOpen(room, blocks) ──────────────────► checks every block, opens a receiving room
//!                         ◄────────────────── Grant of item 0, or RoomFailed
//! push: batches over the lanes ─────────────► placed, acknowledged
//! all acknowledged: Ok
//! else: cancels, WriteClose ────────────────► ends the room
//!                         ◄────────────────── WriteClosed, when no byte of it can land any more
//! ```
//! The written engine's application knows nothing of the room, so the writer alone decides when its addresses are free
//! again. Hence the last two messages: without them a frozen engine could place, when it thaws, what its kernel had
//! received before (promise P1).

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use thiserror::Error;

use super::{
    handle::{Shared, Transfer},
    hub::{Hub, random},
    link::Link,
};
use crate::{
    clock,
    error::{SubmitError, TransferError},
    ids::{Epoch, PeerId, Room, TransferId},
    plan::{
        blocks::{self, BLOCKS_MAX, Block, Span},
        descriptor::Descriptor,
    },
    time::Time,
    transfer::{Chunk, Summary},
    wire::{
        blocks::{WRITE_MILLIS_MAX, WRITES_MAX, WriteOpen},
        control::{Control, FailureCode},
    },
};

/// Rooms of one call that are open at once: while one moves, the next is being granted.
const ROOMS_AHEAD: usize = 4;
/// How long a peer may take to confirm that a failed write is over. It needs microseconds, and with RDMA some tens of
/// milliseconds to destroy its queue pairs.
const SETTLE_MAX: Duration = Duration::from_secs(1);
/// Longest single wait for a room, which waits again: additions of longer times to a clock may overflow.
const WAIT: Duration = Duration::from_secs(3600);

/// Why a write failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Nothing was written.
    #[error(transparent)]
    Refused(SubmitError),
    /// Some of it may have been written; the peer has confirmed that nothing will be any more.
    #[error(transparent)]
    Failed(TransferError),
    /// Some of it may still be written: the peer does not answer. Its memory must not be used for anything else before it
    /// is known to be gone.
    #[error(
        "{error}; the peer has not confirmed that it stopped, so its memory may still be written"
    )]
    Unsettled {
        /// Why the write failed.
        error: TransferError,
    },
}

/// A room that a peer opened to write here.
pub(super) struct Written {
    id: TransferId,
    /// The peer waits to hear that it is over.
    is_close_wanted: bool,
}

/// Counts the rooms on their way to one peer.
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// The right to one room.
struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for a free place, at most until `deadline`.
    fn take(&self, deadline: Time) -> Option<Turn<'_>> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.since(clock::now());
        let waited = self
            .freed
            .wait_timeout_while(taken, left, |taken| *taken >= WRITES_MAX);
        let (mut taken, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *taken >= WRITES_MAX {
            return None;
        }
        *taken += 1;
        Some(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = taken.saturating_sub(1);
        self.0.freed.notify_one();
    }
}

/// A room on its way.
struct Part<'a> {
    transfer: Transfer,
    _turn: Turn<'a>,
}

pub(super) fn write(
    hub: &Arc<Hub>,
    peer: PeerId,
    blocks: &[Block],
    timeout: Duration,
) -> Result<Summary, WriteError> {
    let refused = |why: String| WriteError::Refused(SubmitError::Items(why));
    let Some(link) = hub.link(peer) else {
        return Err(WriteError::Refused(SubmitError::UnknownPeer));
    };
    if !link.agreement.by_address {
        let why = "the peer does not let its memory be written by address (writable_by_address)";
        return Err(refused(why.into()));
    }
    let span = |base, len| Span { base, len };
    let sources = hub.regions().iter();
    let sources: Vec<Span> = sources
        .map(|region| span(region.base_address(), region.len() as u64))
        .collect();
    let targets = link.agreement.regions.iter();
    let targets: Vec<Span> = targets
        .map(|region| span(region.base, region.len))
        .collect();
    let runs = blocks::resolve(blocks, &sources, &targets).map_err(|e| refused(e.to_string()))?;
    let deadline = clock::now() + timeout;
    let mut total = Summary::default();
    let mut live: VecDeque<Part<'_>> = VecDeque::new();
    let mut parts = runs.chunks(BLOCKS_MAX);
    loop {
        let next = if live.len() < ROOMS_AHEAD {
            parts.next()
        } else {
            None
        };
        let step = match next {
            Some(part) => start(hub, &link, part, (&sources, &targets), deadline)
                .map(|part| live.push_back(part)),
            None => match live.pop_front() {
                Some(part) => finish(part, &mut total),
                None => return Ok(total),
            },
        };
        if let Err(mut stop) = step {
            if total.batches > 0 || !live.is_empty() {
                stop.error = partly(stop.error);
            }
            return Err(give_up(hub, peer, live, stop));
        }
    }
}

/// What is refused in the middle of a call has failed.
fn partly(error: WriteError) -> WriteError {
    match error {
        WriteError::Refused(error) => WriteError::Failed(TransferError::CancelledBecause {
            reason: error.to_string(),
        }),
        other => other,
    }
}

/// Why a room of a call came to nothing, with the room if the peer may know of it.
struct Stop {
    room: Option<u64>,
    error: WriteError,
}

/// Opens a room, waits for its grant, and queues its bytes.
fn start<'a>(
    hub: &Arc<Hub>,
    link: &'a Link,
    runs: &[Descriptor],
    (sources, targets): (&[Span], &[Span]),
    deadline: Time,
) -> Result<Part<'a>, Stop> {
    let refused = |error| Stop {
        room: None,
        error: WriteError::Refused(error),
    };
    let turn = link.writes.take(deadline).ok_or_else(|| {
        refused(SubmitError::Full {
            what: "the rooms of explicit blocks to the peer",
            used: WRITES_MAX as u64,
            asked: 1,
            limit: WRITES_MAX as u64,
            setting: "the timeout",
        })
    })?;
    let lens = |spans: &[Span]| spans.iter().map(|span| span.len).collect::<Vec<_>>();
    let pairing = blocks::pairing(runs, &lens(sources), &lens(targets))
        .map_err(|error| refused(SubmitError::Items(error.to_string())))?;
    let room = new_room().map_err(|error| refused(SubmitError::Items(error)))?;
    // The peer's deadline is later, so that the caller's own decides.
    let left = deadline.since(clock::now());
    let peers = (left + SETTLE_MAX).as_millis();
    let open = WriteOpen {
        room: room.number(),
        timeout_ms: u32::try_from(peers)
            .unwrap_or(u32::MAX)
            .clamp(1, WRITE_MILLIS_MAX),
        blocks: runs.to_vec(),
    };
    let transfer = Transfer::open_write(hub, link.peer, open, left, pairing).map_err(refused)?;
    let part = Part {
        transfer,
        _turn: turn,
    };
    let granted = part.transfer.wait_ready(deadline.since(clock::now()));
    let pushed = granted.and_then(|_| {
        let all = Chunk {
            items: vec![Arc::from([0])],
            last: true,
        };
        part.transfer
            .push_unchecked(&all)
            .map_err(|error| match error {
                SubmitError::Ended(error) => error,
                other => TransferError::CancelledBecause {
                    reason: other.to_string(),
                },
            })
    });
    match pushed {
        Ok(()) => Ok(part),
        Err(error) => Err(stop(&part, error)),
    }
}

/// Ends a room that came to nothing.
fn stop(part: &Part<'_>, error: TransferError) -> Stop {
    part.transfer.cancel();
    // What the engine says of the end is better than how we noticed it.
    let ended = part.transfer.result().and_then(Result::err);
    let error = ended
        .filter(|ended| *ended != TransferError::Cancelled)
        .unwrap_or(error);
    Stop {
        room: Some(part.transfer.room().number()),
        error: WriteError::Failed(error),
    }
}

/// Waits for a room's end, which its own deadline bounds.
fn finish(part: Part<'_>, total: &mut Summary) -> Result<(), Stop> {
    let ended = loop {
        // Its own deadline ends it.
        if let Some(ended) = part.transfer.wait(WAIT) {
            break ended;
        }
    };
    let summary = ended.map_err(|error| stop(&part, error))?;
    total.bytes += summary.bytes;
    total.batches += summary.batches;
    total.waited += summary.waited;
    total.moving += summary.moving;
    Ok(())
}

/// Ends what is still on its way, and waits until the peer has confirmed that nothing of it can be written any more.
fn give_up(hub: &Arc<Hub>, peer: PeerId, live: VecDeque<Part<'_>>, first: Stop) -> WriteError {
    let mut rooms: Vec<u64> = first.room.into_iter().collect();
    for part in live {
        part.transfer.cancel();
        if !matches!(part.transfer.result(), Some(Ok(_))) {
            rooms.push(part.transfer.room().number());
        }
    }
    let deadline = clock::now() + SETTLE_MAX;
    let asked: Vec<_> = rooms
        .into_iter()
        .map(|room| ask_to_close(hub, peer, room))
        .collect();
    let is_settled = asked.into_iter().all(|answer| {
        let left = deadline.since(clock::now());
        answer.is_some_and(|answer| answer.recv_timeout(left).is_ok())
    });
    match first.error {
        error if is_settled => error,
        WriteError::Failed(error) => WriteError::Unsettled { error },
        WriteError::Refused(error) => WriteError::Unsettled {
            error: TransferError::CancelledBecause {
                reason: error.to_string(),
            },
        },
        unsettled @ WriteError::Unsettled { .. } => unsettled,
    }
}

/// Asks the peer to close a room. `None` if it is not connected any more; the answer never comes if it is lost later.
fn ask_to_close(hub: &Hub, peer: PeerId, room: u64) -> Option<crossbeam_channel::Receiver<()>> {
    let (confirmed, answer) = crossbeam_channel::bounded(1);
    let link = hub.with_core(|core, _| {
        let link = core.links.get(&peer).map(Arc::clone)?;
        core.closing.insert((peer, room), confirmed);
        Some(link)
    })?;
    tell(hub, &link, &Control::WriteClose { room });
    Some(answer)
}

fn tell(hub: &Hub, link: &Link, message: &Control) {
    if link.queue(message).is_err() || link.flush().is_err() {
        hub.drop_peer(link.peer, "it does not read its control stream");
    }
}

fn new_room() -> Result<Room, String> {
    let number = random().map_err(|error| error.to_string())?;
    // Zero is no room; the bit costs nothing.
    let room = Room::new(u64::from_le_bytes(number) | 1);
    room.ok_or_else(|| "no room number".to_owned())
}

/// A peer asks for a room of explicit blocks.
pub(super) fn accept(hub: &Arc<Hub>, peer: PeerId, open: &WriteOpen) {
    if let Err((code, reason)) = try_accept(hub, peer, open) {
        tracing::info!(%peer, reason, "a write by address was refused");
        let message = Control::RoomFailed {
            room: open.room,
            epoch: Epoch(0),
            code,
            reason,
        };
        if let Some(link) = hub.link(peer) {
            tell(hub, &link, &message);
        }
    }
}

fn try_accept(hub: &Arc<Hub>, peer: PeerId, open: &WriteOpen) -> Result<(), (FailureCode, String)> {
    if !hub.config.writable_by_address {
        let reason = "this engine's memory cannot be written by address (writable_by_address)";
        return Err((FailureCode::Misbehaved, reason.into()));
    }
    let link = hub.link(peer);
    let link = link.ok_or((FailureCode::Misbehaved, "not connected".to_owned()))?;
    let ours: Vec<u64> = hub
        .regions()
        .iter()
        .map(|region| region.len() as u64)
        .collect();
    let theirs: Vec<u64> = link
        .agreement
        .regions
        .iter()
        .map(|region| region.len)
        .collect();
    let pairing = blocks::pairing(&open.blocks, &theirs, &ours)
        .map_err(|error| (FailureCode::Misbehaved, error.to_string()))?;
    let shared = Arc::new(Shared::new(hub.new_token()));
    let key = (peer, open.room);
    let opened = hub.open_with(&shared, |core, now| {
        let id = core.node.accept_write(now, peer, open, Arc::new(pairing))?;
        let room = Written {
            id,
            is_close_wanted: false,
        };
        core.written.insert(key, room);
        Ok(id)
    });
    opened.map_err(|error| (FailureCode::Busy, error.to_string()))?;
    let weak = Arc::downgrade(hub);
    shared.when_over(move || {
        let Some(hub) = weak.upgrade() else {
            return;
        };
        let room = hub.with_core(|core, _| core.written.remove(&key));
        if room.is_some_and(|room| room.is_close_wanted) {
            confirm(&hub, peer, key.1);
        }
    });
    Ok(())
}

/// A peer has given up a room of explicit blocks, and waits to hear that it is over.
pub(super) fn close(hub: &Hub, peer: PeerId, room: u64) {
    let is_open = hub.with_core(|core, now| {
        let Some(written) = core.written.get_mut(&(peer, room)) else {
            return false;
        };
        // Whoever ends it finds the wish when its gate is closed and its pages have ebbed.
        written.is_close_wanted = true;
        let error = TransferError::PeerFailed {
            code: FailureCode::Cancelled,
            reason: "the writer gave up".into(),
        };
        core.node.cancel(now, written.id, error);
        true
    });
    if !is_open {
        confirm(hub, peer, room);
    }
}

fn confirm(hub: &Hub, peer: PeerId, room: u64) {
    if let Some(link) = hub.link(peer) {
        tell(hub, &link, &Control::WriteClosed { room });
    }
}

/// A peer confirms that a room of ours is over.
pub(super) fn closed(hub: &Hub, peer: PeerId, room: u64) {
    let waiting = hub.with_core(|core, _| core.closing.remove(&(peer, room)));
    if let Some(waiting) = waiting {
        // Whoever asked may have stopped waiting.
        let _ = waiting.try_send(());
    }
}
