//! The promises of an engine, kept between real processes and real sockets of one host.

#[path = "promise_suite/child.rs"]
mod child;
#[path = "promise_suite/freeze.rs"]
mod freeze;
#[path = "promise_suite/rig.rs"]
mod rig;
