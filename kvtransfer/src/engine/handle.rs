//! What an application holds of a transfer, and the ways to learn of its end: wait, callback, future, descriptor.

use std::{
    collections::VecDeque,
    future::Future,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll as TaskPoll, Waker},
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};

use super::hub::Hub;
use crate::{
    clock,
    error::{SubmitError, TransferError, plain_text},
    ids::{PeerId, Room, TransferId},
    layout::Layout,
    memory::Gate,
    plan::{pairing::Pairing, stream::check_items},
    transfer::{Chunk, ReceiveRequest, SendRequest, Summary},
    transport::DataLane,
    wire::blocks::WriteOpen,
};

/// SGLang's `KVPoll` (`srt/disaggregation/base/conn.py:123-128`), with its numbers: several ranks' states are combined by
/// minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Poll {
    /// Ended with an error.
    Failed = 0,
    /// The sender waits for grants.
    Bootstrapping = 1,
    /// Granted; no page has moved yet.
    WaitingForInput = 2,
    /// Pages are moving.
    Transferring = 3,
    /// Every page has arrived.
    Success = 4,
}

type EndCallback = Box<dyn FnOnce(&Result<Summary, TransferError>) + Send>;
type ReadyCallback = Box<dyn FnOnce(u32) + Send>;

#[derive(Default)]
struct State {
    ready: Option<u32>,
    result: Option<Result<Summary, TransferError>>,
    callback: Option<EndCallback>,
    ready_callback: Option<ReadyCallback>,
    waker: Option<Waker>,
    /// The lane that took the last small push.
    lane: Option<DataLane>,
    /// Threads asleep on `changed`: waking nobody would cost a system call.
    sleepers: u32,
}

/// The part of a transfer that the engine's threads see.
pub(super) struct Shared {
    id: OnceLock<TransferId>,
    pub(super) gate: Arc<Gate>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(token: u64) -> Self {
        let gate = Arc::new(Gate::new(token));
        Self {
            id: OnceLock::new(),
            gate,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn set_id(&self, id: TransferId) {
        self.id
            .set(id)
            .expect("invariant: a transfer is opened once");
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps while `waiting` holds, at most until `timeout`.
    fn sleep<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        timeout: Duration,
        waiting: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        state.sleepers += 1;
        let slept = self
            .changed
            .wait_timeout_while(state, timeout, |state| waiting(state));
        let (mut state, _) = slept.unwrap_or_else(PoisonError::into_inner);
        state.sleepers -= 1;
        state
    }

    /// Publishes the grant. The callback, if any, is the caller's to call, without locks.
    pub(super) fn set_ready(&self, prefix_tokens: u32) -> Option<impl FnOnce() + use<>> {
        let mut state = self.lock();
        state.ready = Some(prefix_tokens);
        if state.sleepers > 0 {
            self.changed.notify_all();
        }
        let callback = state.ready_callback.take();
        callback.map(|callback| move || callback(prefix_tokens))
    }

    /// Calls `callback` when the end is published, at once if it has been.
    pub(super) fn when_over(&self, callback: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.result.is_some() {
            drop(state);
            callback();
        } else {
            state.callback = Some(Box::new(move |_| callback()));
        }
    }

    /// Publishes the end. The gate is closed already. Returns the callback, to be called when every end of the same
    /// moment is published: it may drop or wait for another transfer that ended with this one.
    pub(super) fn finish(
        &self,
        result: Result<Summary, TransferError>,
        completions: Option<&CompletionQueue>,
    ) -> Option<impl FnOnce() + use<>> {
        let mut state = self.lock();
        state.result = Some(result.clone());
        let (callback, waker) = (state.callback.take(), state.waker.take());
        let never_called = state.ready_callback.take();
        if state.sleepers > 0 {
            self.changed.notify_all();
        }
        drop(state);
        // What it holds may call back into the engine when it is dropped.
        drop(never_called);
        if let Some(waker) = waker {
            waker.wake();
        }
        if let (Some(completions), Some(id)) = (completions, self.id.get()) {
            completions.push(*id);
        }
        callback.map(|callback| move || callback(&result))
    }
}

/// One side's part in one room. Dropping it before the end cancels it.
pub struct Transfer {
    hub: Arc<Hub>,
    shared: Arc<Shared>,
    room: Room,
    id: TransferId,
    is_sender: bool,
}

impl Transfer {
    pub(super) fn open_send(hub: &Arc<Hub>, request: &SendRequest) -> Result<Self, SubmitError> {
        if hub.is_stopped() {
            return Err(SubmitError::Shutdown);
        }
        let shared = Arc::new(Shared::new(hub.new_token()));
        let id = hub.open(&shared, |node, now| node.open_send(now, request))?;
        Ok(Self {
            hub: Arc::clone(hub),
            shared,
            room: request.room,
            id,
            is_sender: true,
        })
    }

    pub(super) fn open_receive(
        hub: &Arc<Hub>,
        request: &ReceiveRequest,
    ) -> Result<Self, SubmitError> {
        if hub.is_stopped() {
            return Err(SubmitError::Shutdown);
        }
        check_lists(&hub.layout, &request.items)?;
        let shared = Arc::new(Shared::new(hub.new_token()));
        let id = hub.open(&shared, |node, now| node.open_receive(now, request))?;
        Ok(Self {
            hub: Arc::clone(hub),
            shared,
            room: request.room,
            id,
            is_sender: false,
        })
    }

    /// Opens a room that writes blocks to a peer.
    pub(super) fn open_write(
        hub: &Arc<Hub>,
        peer: PeerId,
        open: WriteOpen,
        timeout: Duration,
        pairing: Pairing,
    ) -> Result<Self, SubmitError> {
        if hub.is_stopped() {
            return Err(SubmitError::Shutdown);
        }
        let room = Room::new(open.room).ok_or_else(|| SubmitError::Items("room 0".into()))?;
        let shared = Arc::new(Shared::new(hub.new_token()));
        let pairing = Arc::new(pairing);
        let id = hub.open(&shared, |node, now| {
            node.open_write(now, peer, open, timeout, pairing)
        })?;
        Ok(Self {
            hub: Arc::clone(hub),
            shared,
            room,
            id,
            is_sender: true,
        })
    }

    /// Queues items that need no check against the layout.
    pub(super) fn push_unchecked(&self, chunk: &Chunk) -> Result<(), SubmitError> {
        let lane = self.hub.push(self.id, chunk)?;
        self.shared.lock().lane = lane;
        Ok(())
    }

    /// The room.
    pub fn room(&self) -> Room {
        self.room
    }

    /// This engine's number for the transfer, as in the completion queue.
    pub fn id(&self) -> TransferId {
        self.id
    }

    /// Queues pages to every receiver. Small chunks are written by the calling thread if the connection is free.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing is queued then.
    pub fn push(&self, chunk: &Chunk) -> Result<(), SubmitError> {
        if let Some(Err(error)) = &self.shared.lock().result {
            return Err(SubmitError::Ended(error.clone()));
        }
        check_lists(&self.hub.layout, &chunk.items)?;
        let lane = self.hub.push(self.id, chunk)?;
        if lane.is_some() {
            self.shared.lock().lane = lane;
        }
        Ok(())
    }

    /// Where it stands.
    pub fn poll(&self) -> Poll {
        let state = self.shared.lock();
        match (&state.result, state.ready) {
            (Some(Ok(_)), _) => return Poll::Success,
            (Some(Err(_)), _) => return Poll::Failed,
            (None, None) if self.is_sender => return Poll::Bootstrapping,
            (None, _) => {}
        }
        drop(state);
        match self.hub.with(|node, _| node.has_started(self.id)) {
            Some(false) => Poll::WaitingForInput,
            // One that has ended says so in a moment. Until then it must not look as if it had gone back.
            Some(true) | None => Poll::Transferring,
        }
    }

    /// The end, if it has come.
    pub fn result(&self) -> Option<Result<Summary, TransferError>> {
        self.shared.lock().result.clone()
    }

    /// Waits until every receiver has granted its pages; the tokens they already hold (SGLang's `decode_prefix_len`).
    ///
    /// # Errors
    /// The transfer ended, or `timeout` passed (the transfer goes on then).
    pub fn wait_ready(&self, timeout: Duration) -> Result<u32, TransferError> {
        let waiting = |state: &State| state.ready.is_none() && state.result.is_none();
        let state = self.shared.sleep(self.shared.lock(), timeout, waiting);
        match (&state.result, state.ready) {
            (Some(Err(error)), _) => Err(error.clone()),
            (_, Some(prefix_tokens)) => Ok(prefix_tokens),
            _ => Err(TransferError::Timeout {
                stage: "waiting for the receiver's grant",
                elapsed: timeout,
            }),
        }
    }

    /// Tokens the receivers hold, if they have all granted their pages.
    pub fn ready(&self) -> Option<u32> {
        self.shared.lock().ready
    }

    /// Waits for the end; `None` if `timeout` passed before it.
    pub fn wait(&self, timeout: Duration) -> Option<Result<Summary, TransferError>> {
        let mut now = clock::now();
        let deadline = now + timeout;
        loop {
            let state = self.shared.lock();
            if let Some(result) = &state.result {
                return Some(result.clone());
            }
            let left = deadline.since(now);
            if left.is_zero() {
                return None;
            }
            let lane = state.lane.clone().filter(|lane| !lane.is_over());
            drop(state);
            if !lane.is_some_and(|lane| lane.drive()) {
                let state = self.shared.lock();
                drop(
                    self.shared
                        .sleep(state, left, |state| state.result.is_none()),
                );
            }
            now = clock::now();
        }
    }

    /// Calls `callback` at the end, at once if it has come. It runs on an engine thread and must not block.
    pub fn on_end(&self, callback: impl FnOnce(&Result<Summary, TransferError>) + Send + 'static) {
        let mut state = self.shared.lock();
        match state.result.clone() {
            Some(result) => {
                drop(state);
                callback(&result);
            }
            None => state.callback = Some(Box::new(callback)),
        }
    }

    /// Calls `callback` with the tokens the receivers hold once they have all granted their pages, at once if they have;
    /// never if the transfer ends before. It runs on an engine thread and must not block.
    pub fn on_ready(&self, callback: impl FnOnce(u32) + Send + 'static) {
        let mut state = self.shared.lock();
        match state.ready {
            Some(prefix_tokens) => {
                drop(state);
                callback(prefix_tokens);
            }
            None => state.ready_callback = Some(Box::new(callback)),
        }
    }

    /// A future of the end.
    pub fn ended(&self) -> Ended<'_> {
        Ended(self)
    }

    /// Ends it now. When this returns, no byte of it moves any more.
    pub fn cancel(&self) {
        self.cancel_with("");
    }

    /// Ends it now, and tells the other side why at once: `reason` is the text of its
    /// [`PeerFailed`](TransferError::PeerFailed), with control characters replaced by spaces and at most
    /// [`REASON_BYTES_MAX`](crate::wire::control::REASON_BYTES_MAX) bytes long. A side that is not there yet (a sender whose
    /// receiver has not granted, a receiver whose sender has not opened) hears it when it comes, if that is within
    /// [`orphan_ttl`](crate::transfer::NodeConfig::orphan_ttl). When this returns, no byte of the transfer moves any more.
    /// Does nothing if it has ended; an empty reason is none.
    pub fn cancel_with(&self, reason: &str) {
        self.start_cancel(reason);
        self.until_ended();
    }

    /// As [`cancel_with`](Self::cancel_with), but does not wait for a network card: pages may be touched until the end is
    /// seen, by [`wait`](Self::wait) or any other way.
    pub fn start_cancel(&self, reason: &str) {
        let reason = plain_text(reason);
        let error = if reason.is_empty() {
            TransferError::Cancelled
        } else {
            TransferError::CancelledBecause { reason }
        };
        self.hub.with(|node, now| node.cancel(now, self.id, error));
    }

    /// Another thread may be ending it at this moment, or a network card be stopped: waits until its end is published.
    fn until_ended(&self) {
        let state = self.shared.lock();
        drop(
            self.shared
                .sleep(state, Duration::MAX, |state| state.result.is_none()),
        );
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if self.shared.lock().result.is_none() {
            self.cancel();
        }
    }
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let role = if self.is_sender { "sender" } else { "receiver" };
        f.debug_struct("Transfer")
            .field("role", &role)
            .field("room", &self.room)
            .finish()
    }
}

/// Completes at the end of a transfer.
pub struct Ended<'a>(&'a Transfer);

impl Future for Ended<'_> {
    type Output = Result<Summary, TransferError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> TaskPoll<Self::Output> {
        let mut state = self.0.shared.lock();
        match state.result.clone() {
            Some(result) => TaskPoll::Ready(result),
            None => {
                state.waker = Some(context.waker().clone());
                TaskPoll::Pending
            }
        }
    }
}

/// Ended transfers, with a descriptor that is readable while the queue is not empty.
pub struct CompletionQueue {
    ended: Mutex<VecDeque<TransferId>>,
    event: Option<OwnedFd>,
    bound: usize,
    lost: AtomicU64,
}

impl CompletionQueue {
    pub(super) fn new(bound: usize) -> Self {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok();
        Self {
            ended: Mutex::default(),
            event,
            bound,
            lost: AtomicU64::new(0),
        }
    }

    /// Poll this for readability. `None` if the system has no descriptor left.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(AsFd::as_fd)
    }

    /// Takes everything that ended, oldest first, and clears the descriptor.
    pub fn drain(&self) -> Vec<TransferId> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = &self.event {
            let mut count = [0; 8];
            let _ = rustix::io::read(event, &mut count[..]);
        }
        ended.drain(..).collect()
    }

    /// Entries that were dropped, oldest first, because nobody drained the queue.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn push(&self, id: TransferId) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.len() == self.bound {
            ended.pop_front();
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        ended.push_back(id);
        if let Some(event) = &self.event {
            let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
        }
    }
}

/// Checks item lists against the local layout: after this, plans made from them stay inside the regions.
fn check_lists(layout: &Layout, lists: &[Arc<[i32]>]) -> Result<(), SubmitError> {
    if lists.len() > layout.components.len() {
        let (got, known) = (lists.len(), layout.components.len());
        return Err(SubmitError::Items(format!(
            "{got} item lists for {known} components"
        )));
    }
    for (component, list) in layout.components.iter().zip(lists) {
        check_items(list, component.item_count())
            .map_err(|error| SubmitError::Items(format!("{:?}: {error}", component.kind)))?;
    }
    Ok(())
}
