//! The "sim" transport: nodes, memories and a network in one thread, under virtual time.
//!
//! A [`World`] holds ranks (a node, a layout, plain byte vectors as memory) and connections between them. Control
//! messages and lane frames are really encoded and decoded. What the engine's threads do between two system calls is
//! one event here, so a cancellation can fall between any two of them: a batch is written in pieces, arrives in other
//! pieces, and each piece is placed through the transfer's gate. [`scenario`] draws a whole run from a seed, and
//! checks the promises after every event.
//!
//! A lane of mode `Write` is a queue pair: the cards write and read memory by themselves, also those of frozen processes,
//! and either end can be lost and made anew.
//!
//! What is *not* simulated: the handshake (layouts are paired as the engine does it, connections stand at once), and a
//! stream that reorders, repeats or damages its own bytes (TCP does none of these).

mod card;
mod check;
mod connect;
mod dice;
mod lane;
mod network;
mod outbound;
mod qp;
mod rank;
pub mod scenario;
mod world;

pub use dice::Dice;
pub use network::{LaneSpec, LinkSpec, NetSpec};
pub use rank::{Handle, RankSpec};
pub use world::{Notice, PlacedBytes, World};
