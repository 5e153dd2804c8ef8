//! Completion queues: where the adapter says what it has done.
//!
//! The eRDMA provider looks queue pairs up without a lock while it polls, so a queue pair must not be destroyed while
//! a queue of its is polled: both take the queue's gate.
#![expect(unsafe_code, reason = "calls into libibverbs")]

use std::{
    ffi::c_int,
    mem::MaybeUninit,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use super::{
    context::{Context, set_nonblocking},
    error::{CompletionStatus, VerbsError, check, check_pointer},
    sys::{self, ibv_comp_channel, ibv_cq, ibv_wc},
};

/// Completions taken in one poll (erdma.md §3: batches of 16 to 32).
pub(crate) const POLL_MAX: usize = 32;

#[expect(clippy::cast_possible_truncation, reason = "it is 32")]
const POLL_ENTRIES: c_int = POLL_MAX as c_int;

/// Entries beyond those of the queue pairs, for completions of queue pairs that are gone.
const SLACK_ENTRIES: u32 = 64;

/// Events drained in one call; more stay in the channel for the next.
const EVENTS_MAX: u32 = 1024;

/// Calls of [`Cq::take_event`] of which one looks whether there are more: an armed queue makes one event, so there hardly
/// ever are, and to ask costs a system call.
const TAKES_PER_DRAIN: u32 = 32;

/// A completion, copied out of the adapter's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Completion {
    /// What the request was posted with.
    pub(crate) wr_id: u64,
    /// `IBV_WC_*`; see [`CompletionStatus`].
    pub(crate) status: u32,
    /// What was completed; only meaningful on success.
    pub(crate) opcode: u32,
    /// Bytes received; only meaningful for receives.
    pub(crate) byte_len: u32,
    /// The peer's immediate value, in host order.
    pub(crate) imm: Option<u32>,
    /// The queue pair.
    pub(crate) qp_num: u32,
    /// The vendor's own code of an error.
    pub(crate) vendor_err: u32,
}

impl Completion {
    /// The status with its words.
    pub(crate) fn status(&self) -> CompletionStatus {
        CompletionStatus(self.status)
    }

    /// Whether a receive was completed; only meaningful on success.
    pub(crate) fn is_receive(&self) -> bool {
        self.opcode & sys::IBV_WC_RECV != 0
    }

    fn from_raw(raw: &ibv_wc) -> Self {
        let success = raw.status == sys::IBV_WC_SUCCESS;
        let with_imm = success && raw.wc_flags & sys::IBV_WC_WITH_IMM != 0;
        Self {
            wr_id: raw.wr_id,
            status: raw.status,
            opcode: raw.opcode,
            byte_len: raw.byte_len,
            imm: with_imm.then(|| u32::from_be(raw.imm_data)),
            qp_num: raw.qp_num,
            vendor_err: raw.vendor_err,
        }
    }
}

/// Completions as the adapter wrote them.
pub(crate) struct Completions {
    raw: [MaybeUninit<ibv_wc>; POLL_MAX],
    /// How many of them were written.
    found: usize,
}

impl Completions {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self {
            raw: [const { MaybeUninit::uninit() }; POLL_MAX],
            found: 0,
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.found
    }

    /// The completions, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Completion> + '_ {
        self.raw[..self.found].iter().map(|raw| {
            // SAFETY: the provider wrote the first `found` completions.
            Completion::from_raw(unsafe { raw.assume_init_ref() })
        })
    }
}

/// A completion queue, with its own completion channel if it was asked for.
pub(crate) struct Cq {
    context: Arc<Context>,
    raw: NonNull<ibv_cq>,
    channel: Option<NonNull<ibv_comp_channel>>,
    capacity: u32,
    reserved: AtomicU32,
    takes: AtomicU32,
    gate: Mutex<()>,
}

// SAFETY: the calls that must not overlap (poll, and destroying a queue pair) take the gate; the others are allowed
// from any thread by libibverbs.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    /// Makes a queue for queue pairs that have `entries` requests together, on interrupt vector `vector` (taken modulo
    /// the device's).
    pub(crate) fn create(
        context: &Arc<Context>,
        entries: u32,
        with_channel: bool,
        vector: u32,
    ) -> Result<Arc<Self>, VerbsError> {
        let asked = entries.saturating_add(SLACK_ENTRIES);
        let count = c_int::try_from(asked).map_err(|_| VerbsError::Limit {
            what: "entries of a completion queue",
            asked: u64::from(asked),
            limit: c_int::MAX.unsigned_abs().into(),
        })?;
        let vector = (vector % context.completion_vectors()).cast_signed();
        let verbs = &context.library().verbs;
        let channel = if with_channel {
            Some(create_channel(context)?)
        } else {
            None
        };
        let channel_raw = channel.map_or(ptr::null_mut(), NonNull::as_ptr);
        // SAFETY: the context is open; the channel, if any, is its own and outlives the queue.
        let raw = unsafe {
            (verbs.ibv_create_cq)(context.raw(), count, ptr::null_mut(), channel_raw, vector)
        };
        match check_pointer("ibv_create_cq", raw) {
            Ok(raw) => Ok(Arc::new(Self {
                context: Arc::clone(context),
                raw,
                channel,
                capacity: entries,
                reserved: AtomicU32::new(0),
                takes: AtomicU32::new(0),
                gate: Mutex::new(()),
            })),
            Err(error) => {
                destroy_channel(context, channel);
                Err(error)
            }
        }
    }

    /// The device.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> *mut ibv_cq {
        self.raw.as_ptr()
    }

    /// Names the queue in asynchronous events.
    pub(crate) fn key(&self) -> usize {
        self.raw.as_ptr().addr()
    }

    /// Held while the queue is polled and while one of its queue pairs is destroyed.
    pub(super) fn gate(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets entries aside for a queue pair: adapters do not notice an overrun until completions are lost.
    pub(super) fn reserve(&self, entries: u32) -> Result<(), VerbsError> {
        let result = self
            .reserved
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                used.checked_add(entries)
                    .filter(|&sum| sum <= self.capacity)
            });
        result.map(|_| ()).map_err(|used| VerbsError::Limit {
            what: "requests on a completion queue",
            asked: u64::from(used) + u64::from(entries),
            limit: u64::from(self.capacity),
        })
    }

    /// Gives a queue pair's entries back.
    pub(super) fn release(&self, entries: u32) {
        let before = self.reserved.fetch_sub(entries, Ordering::AcqRel);
        debug_assert!(before >= entries, "released more than was reserved");
    }

    /// Takes completions; how many there were. An error means the queue is broken, with all its queue pairs.
    pub(crate) fn poll(&self, into: &mut [Completion; POLL_MAX]) -> Result<usize, VerbsError> {
        let mut taken = Completions::new();
        self.take(&mut taken)?;
        for (to, from) in into.iter_mut().zip(taken.iter()) {
            *to = from;
        }
        Ok(taken.len())
    }

    /// As [`Cq::poll`], into a place that costs nothing to make: mostly there are none.
    pub(crate) fn take(&self, into: &mut Completions) -> Result<(), VerbsError> {
        into.found = 0;
        let raw = &mut into.raw;
        let gate = self.gate();
        // SAFETY: the queue is alive, the array has room for as many as are asked, and the gate keeps every queue pair.
        let found = unsafe { sys::ibv_poll_cq(self.raw(), POLL_ENTRIES, raw.as_mut_ptr().cast()) };
        drop(gate);
        let Ok(found) = usize::try_from(found) else {
            return Err(VerbsError::call("ibv_poll_cq", found));
        };
        into.found = found.min(POLL_MAX);
        Ok(())
    }

    /// Asks for one event at the next completion (at the next solicited one). Poll once more after this, before
    /// waiting: what completed before it makes no event.
    pub(crate) fn arm(&self, solicited_only: bool) -> Result<(), VerbsError> {
        // SAFETY: the queue is alive.
        let code = unsafe { sys::ibv_req_notify_cq(self.raw(), c_int::from(solicited_only)) };
        check("ibv_req_notify_cq", code)
    }

    /// Readable when an armed queue has completions; `None` without a channel.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        let channel = self.channel?;
        // SAFETY: the channel is alive until drop, and its descriptor never changes.
        let fd = unsafe { (*channel.as_ptr()).fd };
        // SAFETY: the descriptor is the channel's, which the borrow keeps alive.
        Some(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Takes the event that made the channel readable and acknowledges it; how many there were.
    ///
    /// Now and then it takes whatever else is there: a queue that is armed again before its event was taken makes another.
    pub(crate) fn take_event(&self) -> Result<u32, VerbsError> {
        let takes = self.takes.fetch_add(1, Ordering::Relaxed);
        self.take_events(if takes.is_multiple_of(TAKES_PER_DRAIN) {
            EVENTS_MAX
        } else {
            1
        })
    }

    /// Takes the events of the channel and acknowledges them; how many there were.
    #[cfg(test)]
    pub(crate) fn drain_events(&self) -> Result<u32, VerbsError> {
        self.take_events(EVENTS_MAX)
    }

    fn take_events(&self, most: u32) -> Result<u32, VerbsError> {
        let Some(channel) = self.channel else {
            return Ok(0);
        };
        let verbs = &self.context.library().verbs;
        let mut count = 0;
        let mut result = Ok(());
        while count < most {
            let mut cq = ptr::null_mut();
            let mut user = ptr::null_mut();
            // SAFETY: the channel is alive and does not block; both results are ours.
            let code =
                unsafe { (verbs.ibv_get_cq_event)(channel.as_ptr(), &raw mut cq, &raw mut user) };
            if let Err(error) = check("ibv_get_cq_event", code) {
                if !matches!(error.errno(), Some(libc::EAGAIN | libc::EINTR)) {
                    result = Err(error);
                }
                break;
            }
            count += 1;
        }
        if count > 0 {
            // SAFETY: the channel serves this queue alone, so all `count` events were its own.
            unsafe { (verbs.ibv_ack_cq_events)(self.raw(), count) };
        }
        result.map(|()| count)
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        let verbs = &self.context.library().verbs;
        // SAFETY: every queue pair holds an Arc of its queues, so none is left, and every event was acknowledged.
        let code = unsafe { (verbs.ibv_destroy_cq)(self.raw()) };
        if let Err(error) = check("ibv_destroy_cq", code) {
            tracing::warn!(%error, "a completion queue was not destroyed");
            return;
        }
        destroy_channel(&self.context, self.channel);
    }
}

fn create_channel(context: &Context) -> Result<NonNull<ibv_comp_channel>, VerbsError> {
    let verbs = &context.library().verbs;
    // SAFETY: the context is open.
    let raw = unsafe { (verbs.ibv_create_comp_channel)(context.raw()) };
    let channel = check_pointer("ibv_create_comp_channel", raw)?;
    // SAFETY: the channel was just made.
    let fd = unsafe { (*channel.as_ptr()).fd };
    if let Err(error) = set_nonblocking(fd) {
        destroy_channel(context, Some(channel));
        return Err(error);
    }
    Ok(channel)
}

fn destroy_channel(context: &Context, channel: Option<NonNull<ibv_comp_channel>>) {
    let Some(channel) = channel else {
        return;
    };
    // SAFETY: the channel is ours and no queue uses it.
    let code = unsafe { (context.library().verbs.ibv_destroy_comp_channel)(channel.as_ptr()) };
    if let Err(error) = check("ibv_destroy_comp_channel", code) {
        tracing::warn!(%error, "a completion channel was not destroyed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(status: u32, flags: u32) -> ibv_wc {
        ibv_wc {
            wr_id: 7,
            status,
            opcode: sys::IBV_WC_RECV_RDMA_WITH_IMM,
            vendor_err: 3,
            byte_len: 64,
            imm_data: 0x0102_0304_u32.to_be(),
            qp_num: 17,
            src_qp: 0,
            wc_flags: flags,
            pkey_index: 0,
            slid: 0,
            sl: 0,
            dlid_path_bits: 0,
        }
    }

    #[test]
    fn an_immediate_is_told_only_when_it_is_valid_and_in_host_order() {
        let completion = Completion::from_raw(&raw(0, sys::IBV_WC_WITH_IMM));
        assert_eq!(completion.imm, Some(0x0102_0304));
        assert!(completion.is_receive());
        assert_eq!(Completion::from_raw(&raw(0, 0)).imm, None);
        let failed = Completion::from_raw(&raw(5, sys::IBV_WC_WITH_IMM));
        assert_eq!(failed.imm, None, "a failed completion has no valid flags");
        assert!(failed.status().is_flush());
    }
}
