//! What becomes of a placed request, told to the board and to the workers' counters.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::hold::Hold;
use super::notes::Note;
use super::{Picked, Picker};
use crate::pool::{Blame, Role, Worker};
use crate::schedule::board::{Event, Key, Leg};

/// Tells the scheduler what becomes of a placed request. Cheap to clone; what is not told by the time the last clone is
/// dropped counts as over.
#[derive(Clone, Debug)]
pub struct Booking {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    picker: Arc<Picker>,
    hold: Arc<Hold>,
    key: Option<Key>,
    note: Arc<Note>,
    prefill: Arc<Worker>,
    decode: Arc<Worker>,
    bytes: usize,
    /// How long the transfer, and decode's first step after it, were predicted to take.
    transfer: Duration,
    admission: Duration,
    prefill_held: AtomicBool,
    decode_held: AtomicBool,
    ready_told: AtomicBool,
    over: AtomicBool,
}

impl Booking {
    /// The booking of what was just picked.
    pub fn new(picker: &Arc<Picker>, hold: &Arc<Hold>, picked: &Picked, bytes: usize) -> Self {
        let prediction = &picked.note.decision.prediction;
        let time = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        Self {
            inner: Arc::new(Inner {
                picker: Arc::clone(picker),
                hold: Arc::clone(hold),
                key: picked.key,
                note: Arc::clone(&picked.note),
                prefill: Arc::clone(&picked.prefill),
                decode: Arc::clone(&picked.decode),
                bytes,
                transfer: time(prediction.transfer_s),
                admission: time(prediction.admission_s),
                prefill_held: AtomicBool::new(true),
                decode_held: AtomicBool::new(true),
                ready_told: AtomicBool::new(false),
                over: AtomicBool::new(false),
            }),
        }
    }

    /// The request is on its way under these rooms.
    pub fn rooms(&self, rooms: &[u64]) {
        if let Some(key) = self.inner.key {
            self.inner.picker.enter_rooms(key, rooms, &self.inner.note);
        }
    }

    /// Why the request went where it went, and what came of it.
    pub fn note(&self) -> &Arc<Note> {
        &self.inner.note
    }

    /// The prefill leg is over, well: the prompt is computed and its KV cache sent.
    pub fn prefill_done(&self) {
        let inner = &self.inner;
        let at = inner.picker.now();
        inner.note.write(at, |actual| &mut actual.sent);
        inner.tell_ready(inner.transfer);
        inner.tell(Event::TransferDone { seconds: None });
        inner.leave(&inner.prefill, &inner.prefill_held);
    }

    /// Decode's first byte is here.
    pub fn first_byte(&self) {
        let inner = &self.inner;
        let at = inner.picker.now();
        inner.note.write(at, |actual| &mut actual.first_byte);
        inner.tell_ready(inner.transfer + inner.admission);
        inner.tell(Event::FirstToken);
    }

    /// The whole answer is out, or nobody wants it any more.
    pub fn ended(&self) {
        self.inner.end(Event::Finished);
    }

    /// A leg failed; the other one is being cancelled.
    pub fn leg_failed(&self, role: Role, blame: Blame) {
        self.inner.end(match (blame, role) {
            (Blame::Transfer, _) => Event::Failed(Leg::Transfer),
            // A client's mistake says nothing about workers.
            (Blame::ClientError, _) => Event::Cancelled,
            (_, Role::Prefill) => Event::Failed(Leg::Prefill),
            _ => Event::Failed(Leg::Decode),
        });
    }
}

impl Inner {
    fn tell(&self, event: Event) {
        if let Some(key) = self.key {
            self.picker.advance(key, event);
        }
    }

    /// Unless telemetry told when the KV cache was computed, it must have been the transfer's time ago: how long prompts take
    /// is learned from it.
    fn tell_ready(&self, ago: Duration) {
        if let Some(key) = self.key
            && !self.ready_told.swap(true, Ordering::Relaxed)
        {
            let picker = &self.picker;
            let at = picker.now().saturating_sub(ago);
            picker.lock().advance(key, Event::PrefillDone, at);
        }
    }

    fn end(&self, event: Event) {
        if !self.over.swap(true, Ordering::Relaxed) {
            self.note.end(self.picker.now(), outcome(event));
            self.tell(event);
        }
        self.leave(&self.prefill, &self.prefill_held);
        self.leave(&self.decode, &self.decode_held);
    }

    fn leave(&self, worker: &Worker, held: &AtomicBool) {
        if held.swap(false, Ordering::Relaxed) {
            worker.left(self.bytes);
            self.hold.ring();
        }
    }
}

const fn outcome(event: Event) -> &'static str {
    match event {
        Event::Finished => "finished",
        Event::Failed(Leg::Prefill) => "prefill failed",
        Event::Failed(Leg::Decode) => "decode failed",
        Event::Failed(Leg::Transfer) => "transfer failed",
        _ => "cancelled",
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end(Event::Cancelled);
    }
}
