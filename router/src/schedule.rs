//! Which workers serve a request, and under which room numbers.
//!
//! Everything but [`rooms`] is pure: no clock, no socket, no thread. Time comes in as a [`Duration`] since a
//! zero that the caller chooses once, chance comes in as a seed. The router, the Envoy picker and the simulator decide
//! with the same code.
//!
//! * [`board`]: what is known of the fleet, and the choice itself.
//! * [`policy`]: the kinds of choice and their settings.
//! * [`facts`], [`sample`]: what is told about a worker, once and again and again.
//! * [`request`], [`decision`]: what is asked, and the answer with its reasons.
//! * [`model`]: prefill times and bandwidths, learned from what was measured.
//! * [`prefix`]: which prefill worker has seen the beginning of a prompt before.
//! * [`recent`], [`map`], [`dice`]: a bounded memory, maps for short keys, and chance that can be repeated.
//!
//! [`Duration`]: std::time::Duration
pub mod board;
pub mod decision;
pub mod dice;
pub mod facts;
pub mod map;
pub mod model;
pub mod policy;
pub mod prefix;
pub mod recent;
pub mod request;
pub mod rooms;
pub mod sample;

pub use board::{Board, BoardError};
pub use decision::{Decision, NoPair, Prediction};
pub use facts::{Facts, WorkerId};
pub use policy::{Policy, Settings};
pub use request::Request;
pub use sample::Sample;
