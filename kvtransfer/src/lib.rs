//! kvtransfer moves paged KV caches between the prefill and decode workers of an LLM service.
//!
//! See `ARCHITECTURE.md` at the workspace root for the map.

pub mod bootstrap;
pub mod clock;
pub mod config;
pub mod doctor;
pub mod engine;
pub mod error;
pub mod gpu;
pub mod ids;
pub mod layout;
pub mod memory;
pub mod plan;
pub mod serve;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
pub mod time;
pub mod token;
pub mod transfer;
mod transport;
pub mod wire;
