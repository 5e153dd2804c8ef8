//! kvtransfer moves paged KV caches between the prefill and decode workers of an LLM service.
//!
//! See `ARCHITECTURE.md` at the workspace root for the map.

pub mod bootstrap;
pub mod layout;
pub mod plan;
pub mod serve;
