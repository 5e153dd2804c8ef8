//! The state machine of an engine: rooms, peers, lanes, deadlines.
//!
//! [`Node`] is one value that takes inputs (an application call, a message, an acknowledgement, the time) and leaves
//! outputs in a queue. It owns no socket, thread, clock or byte of KV: lanes ask it for the next batch to send and for
//! the places of a batch that arrived, and do the copying themselves. The same node runs under the engine's threads and
//! under the simulator's virtual time.
//!
//! ```text
//!  receiver                                   sender
//!  open_receive ──── Grant(room, epoch) ────► (kept up to 30 s if the sender is not open yet)
//!                                             open_send → all grants in → Ready
//!  admit ◄───────── batches over lanes ────── push (chunk …, last chunk)   KV → states → aux
//!  placed ───────── Ack per batch ──────────► all acknowledged → Ended(Ok)
//!  last batch in, none missing → Ended(Ok)
//!  either side: cancel / deadline / lost peer → RoomFailed to the other side, Ended(Err) once no byte can move any more
//! ```
//! Invariants: a room ends exactly once; after `Ended` no batch of it is handed out or admitted; every queue, map and
//! wait has a bound in [`NodeConfig`]; what a peer sends can fail its own rooms only.
#![forbid(unsafe_code)]

#[cfg(feature = "testing")]
mod audit;
mod ebb;
mod ends;
mod explicit;
mod grants;
mod inputs;
mod lane;
mod node;
mod peer;
mod picture;
mod push;
mod receive;
mod send;
#[cfg(all(test, feature = "testing"))]
mod tests;
mod timers;

#[cfg(feature = "testing")]
pub use audit::NodeAudit;
pub use lane::{BatchOut, LaneSetup};
pub use node::{Node, NodeConfig, Output, PeerSetup};
pub use receive::{Admission, BatchIn, Placement};

use std::{sync::Arc, time::Duration};

use crate::ids::{PeerId, Room};

/// Opens the sending side of a room.
#[derive(Clone, Debug)]
pub struct SendRequest {
    /// The rendezvous number.
    pub room: Room,
    /// How long the whole transfer may take, waiting for the grant included.
    pub timeout: Duration,
}

/// Pages to send: item indices per component of the local layout.
#[derive(Clone, Debug, Default)]
pub struct Chunk {
    /// One list per component, shorter or empty lists allowed; the lists of successive chunks follow each other.
    pub items: Vec<Arc<[i32]>>,
    /// Whether this is the room's last chunk. It may be empty (everything was cached at the receiver).
    pub last: bool,
}

/// One sender that the receiver expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// A connected peer.
    pub peer: PeerId,
    /// True where the peer only has to conclude, not to send (SGLang's dummy ranks: MLA with more prefill ranks).
    pub dummy: bool,
}

/// Opens the receiving side of a room: grants pages to its senders.
#[derive(Clone, Debug)]
pub struct ReceiveRequest {
    /// The rendezvous number.
    pub room: Room,
    /// Who sends.
    pub sources: Vec<Source>,
    /// How many receivers each sender must wait for (SGLang's `required_dst_info_num`), this one included.
    pub receivers_expected: u16,
    /// Tokens already held, which the sender need not send (SGLang's `decode_prefix_len`).
    pub prefix_tokens: u32,
    /// Target items per component of the local layout.
    pub items: Vec<Arc<[i32]>>,
    /// How long the whole transfer may take.
    pub timeout: Duration,
}

/// What a finished transfer did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Payload bytes placed or acknowledged.
    pub bytes: u64,
    /// Batches they came in.
    pub batches: u64,
    /// From opening to the first batch.
    pub waited: Duration,
    /// From the first batch to the end.
    pub moving: Duration,
}
