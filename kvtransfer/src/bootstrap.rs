//! Bootstrap without sockets: the rank registry that decode workers ask, and which prefill ranks each of them needs.
//!
//! Everything here is a function of its input and of `now`, a [`Duration`](std::time::Duration) since any fixed origin.
//! [`answer()`] maps one HTTP request to one reply, byte for byte as SGLang 0.5.23's `CommonKVBootstrapServer` does
//! (`common/conn.py:3015-3342` under aiohttp), with the improvements listed in [`registry`]: readiness counts distinct
//! ranks, and a restarted instance starts a new generation. `serve::bootstrap` puts it on a socket.
#![forbid(unsafe_code)]

mod answer;
mod generation;
mod python_text;
pub mod ranks;
pub mod registry;
mod rooms;
mod row;

pub use answer::{ContentType, Method, Reply, Request, answer};
pub use generation::{Entry, Generation};
pub use rooms::{Rooms, RoomsFull};
pub use row::{
    KnownKeys, RANKS_MAX, RankKey, Row, RowError, SPEC_LAYOUT_BYTES_MAX, SpecLayout,
    TEXT_BYTES_MAX, Topology,
};
