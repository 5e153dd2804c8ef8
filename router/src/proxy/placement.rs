//! The seam between the front and the scheduler.
//!
//! The front asks [`place`] for a pair, telling what it knows of the request, and gets a [`Booking`] with it. It tells the
//! booking what becomes of the request; nothing else of the front talks to the scheduler.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Front;
use crate::pool::{Blame, Role, Worker};

/// What is known of a request when it needs a pair.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Bytes of its body: the best measure of the prompt that needs no tokenizer.
    pub prompt_bytes: usize,
    /// Prompts in it.
    pub items: usize,
    /// The model asked for.
    pub model: Option<&'a str>,
    /// More is more important.
    pub priority: i64,
    /// Requests with the same key prefer the same workers.
    pub sticky: Option<&'a str>,
    /// The prefill rank that a trusted client chose.
    pub rank: Option<u32>,
    /// Workers that have failed this request already.
    pub excluded: &'a [Arc<Worker>],
    /// The worker that did not fail it, to be kept: only the other half is chosen anew.
    pub kept: Option<&'a Arc<Worker>>,
}

/// Where a request goes.
#[derive(Debug)]
pub struct Placement {
    /// Computes the prompt.
    pub prefill: Arc<Worker>,
    /// Generates.
    pub decode: Arc<Worker>,
    /// Data-parallel rank on the prefill worker.
    pub rank: u32,
    /// Data-parallel ranks the prefill worker has.
    pub dp_size: u32,
    /// Has to be told what becomes of the request.
    pub booking: Booking,
}

/// Why a request got no pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// Chooses a pair.
///
/// # Errors
/// [`NoRoom`] when every worker of a role holds as much as it may: ask again when [`Front::room`] rings.
pub fn place(front: &Front, wish: &Wish<'_>) -> Result<Placement, NoRoom> {
    let now = front.pool.now();
    let of_role = |role| -> Result<Vec<&Arc<Worker>>, NoRoom> {
        if let Some(kept) = wish.kept
            && kept.role() == role
            && !kept.is_draining()
        {
            return Ok(vec![kept]);
        }
        let mut found = now.candidates(role, wish.excluded);
        found.retain(|worker| worker.has_room(wish.prompt_bytes));
        if found.is_empty() {
            Err(NoRoom)
        } else {
            Ok(found)
        }
    };
    let (prefills, decodes) = (of_role(Role::Prefill)?, of_role(Role::Decode)?);
    let (prefill, decode) = front.scheduler.choose(prefills.len(), decodes.len());
    let (prefill, decode) = (Arc::clone(prefills[prefill]), Arc::clone(decodes[decode]));
    let dp_size = prefill.dp_size();
    let rank = match wish.rank {
        Some(rank) if rank < dp_size => rank,
        // The worker will say that there is no such rank.
        Some(_) => 0,
        None => prefill.next_rank(),
    };
    let booking = Booking::new(front, &prefill, &decode, wish.prompt_bytes);
    Ok(Placement {
        prefill,
        decode,
        rank,
        dp_size,
        booking,
    })
}

/// Tells the scheduler what becomes of a placed request. Cheap to clone; what is not told by the time the last clone is
/// dropped counts as over.
#[derive(Clone, Debug)]
pub struct Booking {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    prefill: Arc<Worker>,
    decode: Arc<Worker>,
    bytes: usize,
    room: Arc<tokio::sync::Notify>,
    prefill_held: AtomicBool,
    decode_held: AtomicBool,
}

impl Booking {
    fn new(front: &Front, prefill: &Arc<Worker>, decode: &Arc<Worker>, bytes: usize) -> Self {
        prefill.sent(bytes);
        decode.sent(bytes);
        Self {
            inner: Arc::new(Inner {
                prefill: Arc::clone(prefill),
                decode: Arc::clone(decode),
                bytes,
                room: Arc::clone(&front.room),
                prefill_held: AtomicBool::new(true),
                decode_held: AtomicBool::new(true),
            }),
        }
    }

    /// The prefill leg is over: the prompt is computed and its KV cache sent, or will not be.
    pub fn prefill_done(&self) {
        self.inner
            .leave(&self.inner.prefill, &self.inner.prefill_held);
    }

    /// Decode's first byte is here.
    pub fn first_byte(&self) {
        tracing::trace!(prefill = %self.inner.prefill.url(), decode = %self.inner.decode.url(), "first byte");
    }

    /// The whole answer is out, or nobody wants it any more.
    pub fn ended(&self) {
        self.prefill_done();
        self.inner
            .leave(&self.inner.decode, &self.inner.decode_held);
    }

    /// A leg failed; the other one is being cancelled.
    pub fn leg_failed(&self, role: Role, blame: Blame) {
        tracing::trace!(%role, ?blame, "a leg failed");
        self.ended();
    }
}

impl Inner {
    fn leave(&self, worker: &Worker, held: &AtomicBool) {
        if held.swap(false, Ordering::Relaxed) {
            worker.left(self.bytes);
            // One place is free, but the first of those who wait may need a worker of the other role.
            self.room.notify_waiters();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.leave(&self.prefill, &self.prefill_held);
        self.leave(&self.decode, &self.decode_held);
    }
}
