//! Listeners that an engine opens when asked to, and only then (promise P9).

pub mod telemetry;
