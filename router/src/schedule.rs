//! Which workers serve a request, and under which room numbers.
pub mod pair;
pub mod rooms;
