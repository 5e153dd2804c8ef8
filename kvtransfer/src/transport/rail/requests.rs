//! What other threads ask of a rail's thread. They never wait for it, and never touch a queue pair themselves.

use super::lane::LaneIo;

/// Names a queue pair of a rail: its place, and which of the queue pairs that had that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) place: u32,
    pub(super) life: u32,
}

/// One wish.
pub(super) enum Request {
    /// Take over a connected queue pair.
    Adopt(Box<LaneIo>),
    /// It has work.
    Kick(Key),
    /// Destroy this end, tell the peer, and wait for the peer's end to go too.
    Fence(Key, String),
    /// Destroy this end for good.
    Close(Key),
}
