//! What a fabric counted, and what it caught its users doing.
#![forbid(unsafe_code)]

use super::QueuePairId;

/// Most violations that are kept with their details; later ones are only counted.
pub(super) const VIOLATIONS_KEPT_MAX: usize = 256;

/// What one queue pair did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Calls of `post_send` that accepted at least one work request: each rings one doorbell.
    pub send_doorbells: u64,
    /// Send work requests accepted.
    pub send_requests: u64,
    /// Of these, the WRITEs (with or without immediate data).
    pub writes: u64,
    /// Receives accepted; on eRDMA each rings its own doorbell.
    pub recv_requests: u64,
    /// Completions of send work requests, flushed ones included.
    pub send_completions: u64,
    /// Completions of receives, flushed ones included.
    pub recv_completions: u64,
    /// Most send work requests whose space had not come back.
    pub outstanding_max: u64,
    /// Work requests posted while more than `max_send_wr` were outstanding, counted as a careful user counts.
    pub past_depth: u64,
    /// Work requests that overwrote a live one.
    pub overruns: u64,
    /// Posts refused because the send queue was full.
    pub full: u64,
}

/// How a device's living completion queues were looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WatchCounters {
    /// Calls of `ibv_poll_cq`.
    pub polls: u64,
    /// Calls of `ibv_req_notify_cq` for any completion.
    pub armed_for_any: u64,
    /// Calls of it for solicited completions (and failures) only.
    pub armed_for_marked: u64,
    /// Events that armed queues made.
    pub events: u64,
}

/// What a whole fabric did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// The sum over all queue pairs, dead ones included; `outstanding_max` is the largest of any.
    pub queues: QueueCounters,
    /// Bytes that WRITEs placed.
    pub bytes_written: u64,
    /// Bytes that SENDs placed.
    pub bytes_sent: u64,
    /// WRITEs refused because the key is unknown.
    pub refused_key: u64,
    /// WRITEs refused because the range leaves the region.
    pub refused_bounds: u64,
    /// WRITEs refused because the region belongs to another protection domain.
    pub refused_domain: u64,
    /// WRITEs refused because the region is not remotely writable.
    pub refused_access: u64,
    /// WRITEs that landed in a watched range: memory of a transfer that had ended (promise P1).
    pub late_writes: u64,
    /// WRITEs that landed after their queue pair was destroyed.
    pub zombies_landed: u64,
    /// WRITEs whose queue pair was destroyed and that the target then refused.
    pub zombies_refused: u64,
    /// Messages that found no posted receive.
    pub empty_receives: u64,
    /// Completions that were never seen, because their queue pair was destroyed or a test dropped them.
    pub completions_lost: u64,
    /// Violations, those no longer kept included.
    pub violations: u64,
}

impl Counters {
    /// Completions of send work requests per send work request.
    #[must_use]
    pub fn completions_per_request(&self) -> f64 {
        ratio(self.queues.send_completions, self.queues.send_requests)
    }

    /// Doorbells per send work request.
    #[must_use]
    pub fn doorbells_per_request(&self) -> f64 {
        ratio(self.queues.send_doorbells, self.queues.send_requests)
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "ratios of event counts, far below 2^52"
)]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

impl QueueCounters {
    /// Adds the counts of one queue pair to a sum.
    pub(super) fn add(&mut self, other: &Self) {
        self.send_doorbells += other.send_doorbells;
        self.send_requests += other.send_requests;
        self.writes += other.writes;
        self.recv_requests += other.recv_requests;
        self.send_completions += other.send_completions;
        self.recv_completions += other.recv_completions;
        self.outstanding_max = self.outstanding_max.max(other.outstanding_max);
        self.past_depth += other.past_depth;
        self.overruns += other.overruns;
        self.full += other.full;
    }
}

/// What a user of the library did that real hardware punishes with corruption, a hang or a crash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A work request overwrote one that was still in use.
    #[error(
        "{queue:?}: work request {wr_id:#x} overran the send queue ({outstanding} outstanding, {depth} allowed)"
    )]
    SendQueueOverrun {
        /// The queue pair.
        queue: QueuePairId,
        /// The work request that did it.
        wr_id: u64,
        /// Work requests outstanding, it included.
        outstanding: usize,
        /// `max_send_wr` as it was asked for.
        depth: u32,
    },
    /// A completion found its completion queue full and is lost.
    #[error("device {device}: a completion queue of {capacity} entries overran")]
    CompletionQueueOverrun {
        /// Index of the device.
        device: usize,
        /// Entries of the queue.
        capacity: u32,
    },
    /// An object was used after it was destroyed.
    #[error("{call} on a destroyed object")]
    UseAfterDestroy {
        /// The call.
        call: &'static str,
    },
    /// A queue pair was destroyed while another thread was inside `poll_cq` of its completion queue: eRDMA's provider
    /// frees a table that the poll reads without a lock.
    #[error("{queue:?} was destroyed while its completion queue was being polled")]
    DestroyedDuringPoll {
        /// The queue pair.
        queue: QueuePairId,
    },
    /// A READ without a scatter/gather entry: eRDMA's provider follows a null pointer.
    #[error("{queue:?}: a READ without an entry")]
    ReadWithoutEntry {
        /// The queue pair.
        queue: QueuePairId,
    },
    /// An object was destroyed while events of it were not acknowledged: the real library waits for ever.
    #[error("{call} with {count} events not acknowledged")]
    EventsNotAcknowledged {
        /// The call.
        call: &'static str,
        /// How many.
        count: u32,
    },
    /// A passive side sent before the active side had taken its ESTABLISHED event, which killed the connect.
    #[error("{queue:?}: the passive side sent first and killed the connect")]
    PassiveSentFirst {
        /// The queue pair that sent.
        queue: QueuePairId,
    },
    /// A device was closed while objects of it were alive.
    #[error("device {device} was closed with {objects} objects alive")]
    ClosedWithObjects {
        /// Index of the device.
        device: usize,
        /// How many.
        objects: usize,
    },
}
