//! What a worker tells again and again: its queues and the rates of its links.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::facts::WorkerId;

/// Most streams of samples per worker: one per tensor- and data-parallel rank, and one for the engine's own numbers.
pub const SOURCES_MAX: usize = 130;

/// Most links in one sample: every decode over four rails.
pub const LINKS_MAX: usize = 4 * super::facts::WORKERS_MAX;

/// One picture of a worker, or of one rank of it. It is whole, not a difference: whoever reads the telemetry stream keeps
/// the picture and hands it in after each message.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Whose picture it is.
    pub worker: WorkerId,
    /// Which of the worker's streams it came from; streams are added up.
    pub source: u32,
    /// Which start of the engine the numbers belong to.
    pub epoch: u64,
    /// Grows within an epoch; older pictures and repeated ones are ignored.
    pub sequence: u64,
    /// When the picture was taken, on the router's clock.
    pub at: Duration,
    /// Whether the stream also tells when each room became ready to send. Then a booking without such news is still
    /// being computed, however long that takes.
    pub tells_rooms: bool,
    /// Its sending links, if this stream knows them. A peer may stand here once per rail.
    pub links: Option<&'a [Link]>,
    /// Its engine's queues, if this stream knows them.
    pub queues: Option<&'a [RankQueue]>,
    /// Its KV pool, if this stream knows it.
    pub pool: Option<KvPool>,
}

/// What waits and moves between two workers on one rail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// The receiving decode worker.
    pub peer: WorkerId,
    /// Bytes that wait.
    pub bytes_queued: u64,
    /// Bytes that were handed to the wire and are not acknowledged.
    pub bytes_in_flight: u64,
    /// Measured bytes per second while the rail was busy; 0: not measured.
    pub bytes_per_s: f64,
}

/// What waits before one data-parallel rank of a prefill engine, with what it computes now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankQueue {
    /// The rank.
    pub rank: u32,
    /// Tokens not yet computed.
    pub tokens: u64,
    /// Requests these belong to.
    pub requests: u64,
}

/// The KV pool of a decode worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPool {
    /// Pages that nobody holds.
    pub free_pages: u64,
    /// All pages.
    pub pages: u64,
    /// Requests that hold some.
    pub requests: u64,
}

/// News of a worker's prefix cache, as SGLang publishes them (`--kv-events-config`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Blocks were stored, each the child of the one before it.
    Stored {
        /// The engine's hash of the block before the first one; none: the prompt starts here.
        parent: Option<u64>,
        /// The engine's hash and the [`chunks_of_tokens`](super::prefix::chunks_of_tokens) chunk of each block.
        blocks: Vec<(u64, u64)>,
    },
    /// Blocks were evicted.
    Removed {
        /// The engine's hashes.
        hashes: Vec<u64>,
    },
    /// The whole cache was emptied.
    Cleared,
    /// What was told before is void; from here on everything is told.
    Begins {
        /// Whether the cache was empty then: what was not told is not there.
        whole: bool,
    },
    /// What was told before is void, and nothing is told for now.
    Lost,
}
