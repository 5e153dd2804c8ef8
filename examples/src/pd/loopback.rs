//! Both ends of the seam in one process: the reference for what a transfer means, and the tests' instrument.
//!
//! Bytes move by plain copies, rank by rank and head by head, at the moment the chunk is pushed, or later if a test
//! has asked the hub to [`Hub::hold`] them in flight.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::{
    Chunk, DecodeLink, Doorbell, Grant, PrefillLink, ReceiveState, Room, SendState, TransferError,
};
use crate::cache::aux::{AUX_ENTRIES, AuxSlot, ROW_BYTES};
use crate::cache::{PageIndex, RankMemory};

/// Rooms that one hub holds; far more than the queues of two workers.
pub const ROOMS_MAX: usize = 1024;

/// Joins one prefill worker and one decode worker.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    rooms: BTreeMap<Room, RoomState>,
    prefill: Option<(Vec<RankMemory>, Doorbell)>,
    decode: Option<(Vec<RankMemory>, Doorbell)>,
    held: bool,
    /// Pages copied so far, for tests that check what was *not* sent.
    pages_moved: usize,
    flip_byte: bool,
}

#[derive(Debug, Default)]
struct RoomState {
    sender: Option<End>,
    receiver: Option<End>,
    grant: Option<Grant>,
    /// Chunks pushed but not copied yet.
    queue: VecDeque<Chunk>,
    last_pushed: bool,
    outcome: Option<Result<(), TransferError>>,
    /// A cancel or timeout that arrived while bytes were in flight; becomes the outcome once they have landed.
    ending: Option<TransferError>,
}

#[derive(Clone, Copy, Debug)]
struct End {
    deadline: Instant,
    timeout: Duration,
}

impl End {
    fn after(timeout: Duration) -> Self {
        Self {
            deadline: Instant::now() + timeout,
            timeout,
        }
    }
}

impl Hub {
    /// The sending end over the prefill worker's memory.
    #[must_use]
    pub fn prefill(&self, ranks: Vec<RankMemory>, doorbell: Doorbell) -> LoopbackPrefill {
        self.state().prefill = Some((ranks, doorbell));
        LoopbackPrefill(self.clone())
    }

    /// The receiving end over the decode worker's memory.
    #[must_use]
    pub fn decode(&self, ranks: Vec<RankMemory>, doorbell: Doorbell) -> LoopbackDecode {
        self.state().decode = Some((ranks, doorbell));
        LoopbackDecode(self.clone())
    }

    /// Keeps pushed chunks in flight until [`Hub::resume`].
    pub fn hold(&self) {
        self.state().held = true;
    }

    /// Lets held chunks land.
    pub fn resume(&self) {
        let mut state = self.state();
        state.held = false;
        for room in state.rooms.keys().copied().collect::<Vec<_>>() {
            state.deliver(room);
        }
        state.ring();
    }

    /// Damages one byte of the next KV page that is copied.
    pub fn flip_next_page(&self) {
        self.state().flip_byte = true;
    }

    /// Ends a room as if the network had failed.
    pub fn sever(&self, room: Room, reason: &str) {
        self.end(
            room,
            TransferError::Peer {
                reason: reason.to_owned(),
            },
        );
    }

    /// KV pages copied so far (one page of all layers and ranks counts once).
    #[must_use]
    pub fn pages_moved(&self) -> usize {
        self.state().pages_moved
    }

    /// Rooms that at least one side has not closed.
    #[must_use]
    pub fn open_rooms(&self) -> usize {
        self.state().rooms.len()
    }

    /// Chunks that a hold keeps in flight.
    #[must_use]
    pub fn held_chunks(&self) -> usize {
        self.state().rooms.values().map(|r| r.queue.len()).sum()
    }

    fn end(&self, room: Room, error: TransferError) {
        let mut state = self.state();
        state.end(room, error);
        state.ring();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn ring(&self) {
        for (_, bell) in self.prefill.iter().chain(&self.decode) {
            bell.ring();
        }
    }

    fn entry(&mut self, room: Room) -> Result<&mut RoomState, TransferError> {
        if self.rooms.len() >= ROOMS_MAX && !self.rooms.contains_key(&room) {
            return Err(TransferError::Full {
                rooms_max: ROOMS_MAX,
            });
        }
        Ok(self.rooms.entry(room).or_default())
    }

    fn end(&mut self, room: Room, error: TransferError) {
        let Some(state) = self.rooms.get_mut(&room) else {
            return;
        };
        if state.outcome.is_none() {
            state.ending.get_or_insert(error);
            self.deliver(room);
        }
    }

    /// Lands what is in flight, unless held, and settles the outcome.
    fn deliver(&mut self, room: Room) {
        if self.held && self.rooms.get(&room).is_some_and(|r| !r.queue.is_empty()) {
            return;
        }
        let Some(state) = self.rooms.get_mut(&room) else {
            return;
        };
        let (queue, grant) = (std::mem::take(&mut state.queue), state.grant.clone());
        let ending = state.ending.clone();
        let mut finished = false;
        if let Some(grant) = grant.filter(|_| ending.is_none()) {
            for chunk in queue {
                finished |= chunk.last.is_some();
                self.copy(&grant, &chunk);
            }
        }
        let state = self
            .rooms
            .get_mut(&room)
            .expect("invariant: looked up above");
        if let Some(error) = ending {
            state.outcome = Some(Err(error));
        } else if finished {
            state.outcome = Some(Ok(()));
        }
    }

    fn copy(&mut self, grant: &Grant, chunk: &Chunk) {
        let (Some((sources, _)), Some((targets, _))) = (&self.prefill, &self.decode) else {
            return;
        };
        let target_pages = grant.pages.iter().skip(chunk.first_page);
        for (source, target) in chunk.pages.iter().zip(target_pages) {
            copy_page(sources, targets, *source, *target);
            self.pages_moved += 1;
            if std::mem::take(&mut self.flip_byte) {
                flip_byte(&targets[0], *target);
            }
        }
        if let Some(slot) = chunk.last {
            copy_aux(&sources[0], targets, slot, grant.aux);
        }
    }

    fn expire(&mut self, room: Room, now: Instant) {
        let Some(state) = self.rooms.get(&room) else {
            return;
        };
        let stage = if state.grant.is_none() {
            "waiting for decode"
        } else {
            "moving pages"
        };
        let expired = [state.sender, state.receiver]
            .into_iter()
            .flatten()
            .find(|e| e.deadline <= now);
        if let Some(end) = expired {
            self.end(
                room,
                TransferError::Timeout {
                    stage,
                    after: end.timeout,
                },
            );
            self.ring();
        }
    }

    /// A side leaves; the room goes with the last one, or with the first if the other never came.
    fn close(&mut self, room: Room, side: impl FnOnce(&mut RoomState)) {
        let Some(state) = self.rooms.get_mut(&room) else {
            return;
        };
        side(state);
        if state.sender.is_none() && state.receiver.is_none() {
            self.rooms.remove(&room);
        }
    }
}

/// Copies a page of every layer between groups of ranks that may share the heads differently.
fn copy_page(sources: &[RankMemory], targets: &[RankMemory], from: PageIndex, to: PageIndex) {
    let mut source_head = 0;
    for source in sources {
        let mut target_head = 0;
        for target in targets {
            let first = source_head.max(target_head);
            let end =
                (source_head + source.shape.kv_heads).min(target_head + target.shape.kv_heads);
            if first < end {
                let part = HeadPart {
                    source_skip: first - source_head,
                    target_skip: first - target_head,
                    heads: end - first,
                };
                part.copy(source, target, from, to);
            }
            target_head += target.shape.kv_heads;
        }
        source_head += source.shape.kv_heads;
    }
}

/// Consecutive heads that one source rank and one target rank both hold.
struct HeadPart {
    source_skip: usize,
    target_skip: usize,
    heads: usize,
}

impl HeadPart {
    fn copy(&self, source: &RankMemory, target: &RankMemory, from: PageIndex, to: PageIndex) {
        let head_bytes = source.shape.row_bytes() / source.shape.kv_heads;
        let mut bytes = vec![0; self.heads * head_bytes];
        for entry in 0..source.shape.first_aux_entry() {
            for row in 0..source.shape.page_size {
                let at = |rank: &RankMemory, page: PageIndex, skip: usize| {
                    let row_start = row * rank.shape.row_bytes() + skip * head_bytes;
                    page.0 as u64 * rank.shape.page_bytes() as u64 + row_start as u64
                };
                source
                    .store
                    .read(entry, at(source, from, self.source_skip), &mut bytes);
                target
                    .store
                    .write(entry, at(target, to, self.target_skip), &bytes);
            }
        }
    }
}

/// Copies an aux row to every target rank; entries in order, so the room comes last.
fn copy_aux(source: &RankMemory, targets: &[RankMemory], from: AuxSlot, to: AuxSlot) {
    let mut row = [0; ROW_BYTES];
    for target in targets {
        for entry in 0..AUX_ENTRIES {
            let (source_entry, target_entry) = (
                source.shape.first_aux_entry() + entry,
                target.shape.first_aux_entry() + entry,
            );
            source
                .store
                .read(source_entry, u64::from(from.0) * ROW_BYTES as u64, &mut row);
            target
                .store
                .write(target_entry, u64::from(to.0) * ROW_BYTES as u64, &row);
        }
    }
}

/// Turns the sign of the first element of a page's first value row.
fn flip_byte(rank: &RankMemory, page: PageIndex) {
    let (entry, offset) = (
        rank.shape.value_entry(0),
        u64::from(page.0) * rank.shape.page_bytes() as u64,
    );
    let mut row = vec![0; rank.shape.row_bytes()];
    rank.store.read(entry, offset, &mut row);
    for element in row.chunks_exact_mut(4) {
        element[3] ^= 0x80;
    }
    rank.store.write(entry, offset, &row);
}

/// The sending end of a [`Hub`].
#[derive(Debug)]
pub struct LoopbackPrefill(Hub);

impl PrefillLink for LoopbackPrefill {
    fn open(&mut self, room: Room, timeout: Duration) -> Result<(), TransferError> {
        let mut state = self.0.state();
        state.entry(room)?.sender = Some(End::after(timeout));
        state.ring();
        Ok(())
    }

    fn poll(&mut self, room: Room) -> SendState {
        let mut state = self.0.state();
        state.expire(room, Instant::now());
        let Some(room) = state.rooms.get(&room) else {
            return SendState::Failed(TransferError::Cancelled);
        };
        match (&room.outcome, &room.grant) {
            (Some(Ok(())), _) => SendState::Sent,
            (Some(Err(error)), _) => SendState::Failed(error.clone()),
            (None, Some(_)) if room.last_pushed => SendState::Transferring,
            (None, Some(grant)) => SendState::Granted {
                decode_prefix_tokens: grant.prefix_tokens,
            },
            (None, None) => SendState::Bootstrapping,
        }
    }

    fn push(&mut self, room: Room, chunk: Chunk) -> Result<(), TransferError> {
        let mut state = self.0.state();
        let Some(target) = state.rooms.get_mut(&room) else {
            return Err(TransferError::Cancelled);
        };
        if let Some(Err(error)) = &target.outcome {
            return Err(error.clone());
        }
        target.last_pushed |= chunk.last.is_some();
        target.queue.push_back(chunk);
        state.deliver(room);
        state.ring();
        Ok(())
    }

    fn cancel(&mut self, room: Room) {
        self.0.end(room, TransferError::Cancelled);
    }

    fn close(&mut self, room: Room) {
        self.0.state().close(room, |r| r.sender = None);
    }
}

/// The receiving end of a [`Hub`].
#[derive(Debug)]
pub struct LoopbackDecode(Hub);

impl DecodeLink for LoopbackDecode {
    fn receive(&mut self, grant: Grant, timeout: Duration) -> Result<(), TransferError> {
        let mut state = self.0.state();
        let room = state.entry(grant.bootstrap.room)?;
        room.receiver = Some(End::after(timeout));
        room.grant = Some(grant);
        state.ring();
        Ok(())
    }

    fn poll(&mut self, room: Room) -> ReceiveState {
        let mut state = self.0.state();
        state.expire(room, Instant::now());
        let Some(room) = state.rooms.get(&room) else {
            return ReceiveState::Failed(TransferError::Cancelled);
        };
        match &room.outcome {
            Some(Ok(())) => ReceiveState::Received,
            Some(Err(error)) => ReceiveState::Failed(error.clone()),
            None if room.sender.is_some() => ReceiveState::Transferring,
            None => ReceiveState::Bootstrapping,
        }
    }

    fn cancel(&mut self, room: Room) {
        self.0.end(room, TransferError::Cancelled);
    }

    fn close(&mut self, room: Room) {
        self.0.state().close(room, |r| r.receiver = None);
    }
}
