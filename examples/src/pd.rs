//! The seam between the scheduler and whatever moves the KV cache.
//!
//! The scheduler knows rooms, pages and aux slots. It never learns of ranks, addresses, lanes or registries: a
//! [`PrefillLink`] or a [`DecodeLink`] stands for *all* ranks of this worker, and combines them (a room has succeeded
//! when every rank has, and has failed as soon as one has). Page and slot numbers mean the same on every rank.
//!
//! # One request, both sides
//! ```text
//! prefill                                     decode
//! open(room)             -> Bootstrapping     receive(grant)  -> Bootstrapping   registry, handshake
//!                           Granted{prefix} <---------------------- Transferring  pages are lent to the peer
//! push(chunk) ... push(last chunk, aux slot)
//!                           Transferring ---- KV, then aux, the room last ---->
//!                           Sent                                 Received
//! close(room)                                 close(room)
//! ```
//! # What an implementation must keep
//! * **No call blocks.** Everything slow happens elsewhere; when a state changes, ring the [`Doorbell`].
//! * **Terminal means quiet.** `Sent`, `Received` and `Failed` are reported only when no byte of the room can move any
//!   more: the scheduler reuses pages right after. A cancelled room stays non-terminal until it is fenced.
//! * **Terminal stays.** After a terminal state `poll` repeats it until `close`, after which the room is unknown.
//! * **The timeout is the whole room's.** It starts with `open`/`receive`; when it has passed the room fails.
//! * **Pages are read late.** A pushed page is read any time until the terminal state; the scheduler never writes to
//!   it in between.
//!
//! The implementation for one process is [`loopback`]; the one over the transfer engine, [`crate::plane`], resolves the
//! prefill's ranks through the bootstrap registry on a runtime of its own and maps each rank to one engine.
#![forbid(unsafe_code)]

pub mod loopback;

use std::sync::Arc;
use std::time::Duration;

use crate::cache::aux::AuxSlot;
use crate::cache::{PageIndex, RankMemory};
use crate::plane::Watch;

/// The rendezvous number of one request, drawn by the router: `1..2^63`. Zero is reserved, because an aux row that
/// nobody wrote reads as zero (SGLang's metadata gate, `srt/disaggregation/utils.py:245-260`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Room(u64);

impl Room {
    /// Accepts `1..2^63`.
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        if number == 0 || number > i64::MAX.unsigned_abs() {
            None
        } else {
            Some(Self(number))
        }
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl std::fmt::Display for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The fields a router adds to a request: where the prefill's registry is, and the room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrap {
    /// Host name or address of the prefill worker.
    pub host: String,
    /// Port of the prefill worker's bootstrap registry.
    pub port: u16,
    /// The room.
    pub room: Room,
}

/// Why a room failed. The text reaches the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The room's deadline passed.
    #[error("the KV transfer did not finish within {after:?} (stage: {stage})")]
    Timeout {
        /// What was being waited for.
        stage: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// This side cancelled it.
    #[error("the KV transfer was cancelled")]
    Cancelled,
    /// The other side gave up, or cannot be reached, or does not fit; in its own words or the engine's.
    #[error("the KV transfer failed: {reason}")]
    Peer {
        /// A sentence for the client.
        reason: String,
    },
    /// The link has as many rooms as it can hold.
    #[error("the KV transfer was refused: {rooms_max} rooms are already open")]
    Full {
        /// The bound.
        rooms_max: usize,
    },
}

/// How far a room is on the prefill side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendState {
    /// Not every decode rank that wants the room has lent its pages yet.
    Bootstrapping,
    /// Pages are lent: compute and push. The decode keeps this many tokens of the prompt from its own cache, a whole
    /// number of pages; only what follows is pushed.
    Granted {
        /// Tokens that must not be pushed.
        decode_prefix_tokens: usize,
    },
    /// The last chunk was pushed, bytes are moving.
    Transferring,
    /// Every decode rank has confirmed every byte.
    Sent,
    /// It ended otherwise.
    Failed(TransferError),
}

/// How far a room is on the decode side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiveState {
    /// The prefill is being looked up and shaken hands with.
    Bootstrapping,
    /// The prefill may write into the pages.
    Transferring,
    /// Every byte of KV and aux is in place on every rank.
    Received,
    /// It ended otherwise.
    Failed(TransferError),
}

/// A piece of a prompt's KV that is ready to leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Place of the first page in the room's stream: 0 is the first page after the decode's prefix.
    pub first_page: usize,
    /// Pages of this worker, in order. May be empty in the last chunk, when decode had everything cached.
    pub pages: Vec<PageIndex>,
    /// Set in the last chunk: the aux row to send after the last page.
    pub last: Option<AuxSlot>,
}

/// What a decode lends to a room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Where the prefill is.
    pub bootstrap: Bootstrap,
    /// Pages for the prompt's tokens after the prefix, in order.
    pub pages: Vec<PageIndex>,
    /// The aux row; its room was zeroed by the scheduler.
    pub aux: AuxSlot,
    /// Tokens already cached here, a whole number of pages.
    pub prefix_tokens: usize,
}

/// The sending end, for all ranks of this worker.
pub trait PrefillLink: Send {
    /// Announces a room, to be filled by [`PrefillLink::push`] once it is granted.
    ///
    /// # Errors
    /// [`TransferError::Full`], or a reason why no room can be opened at all. The room is unknown then.
    fn open(&mut self, room: Room, timeout: Duration) -> Result<(), TransferError>;

    /// The room's state now. An unknown room has failed.
    fn poll(&mut self, room: Room) -> SendState;

    /// Queues a chunk of a granted room. Chunks come in order and without gaps.
    ///
    /// # Errors
    /// Why the room has failed; `poll` says the same from now on.
    fn push(&mut self, room: Room, chunk: Chunk) -> Result<(), TransferError>;

    /// Starts to end the room; `poll` turns terminal when it is fenced, and the peer is told.
    fn cancel(&mut self, room: Room);

    /// Forgets a room in a terminal state.
    fn close(&mut self, room: Room);
}

/// The receiving end, for all ranks of this worker.
pub trait DecodeLink: Send {
    /// Looks up the prefill and lends it pages.
    ///
    /// # Errors
    /// [`TransferError::Full`], or a reason why nothing can be received. The room is unknown then.
    fn receive(&mut self, grant: Grant, timeout: Duration) -> Result<(), TransferError>;

    /// The room's state now. An unknown room has failed.
    fn poll(&mut self, room: Room) -> ReceiveState;

    /// Starts to end the room; `poll` turns terminal when no peer can write any more, and the peer is told.
    fn cancel(&mut self, room: Room);

    /// Forgets a room in a terminal state.
    fn close(&mut self, room: Room);
}

/// What this worker does.
pub enum Role {
    /// Serves requests alone.
    Null,
    /// Computes prompts and sends their KV.
    Prefill(Box<dyn PrefillLink>),
    /// Receives KV and generates.
    Decode(Box<dyn DecodeLink>),
}

impl std::fmt::Debug for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Null => "Null",
            Self::Prefill(_) => "Prefill",
            Self::Decode(_) => "Decode",
        })
    }
}

/// The KV memory of all ranks and the link over it: what the scheduler is started with.
#[derive(Debug)]
pub struct Plane {
    /// One per rank, in order.
    pub ranks: Vec<RankMemory>,
    /// The link that moves bytes in and out of them.
    pub role: Role,
    /// What can be seen of the link from outside, if it has engines.
    pub watch: Option<Arc<Watch>>,
}

/// Wakes the scheduler. Cheap, never blocks, may be rung from any thread, as often as wanted.
#[derive(Clone)]
pub struct Doorbell(Arc<dyn Fn() + Send + Sync>);

impl Doorbell {
    /// A bell that calls `ring`.
    pub fn new(ring: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(ring))
    }

    /// Asks the scheduler to look at its rooms again.
    pub fn ring(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Doorbell")
    }
}
