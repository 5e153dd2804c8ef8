//! The promises of an engine, kept between real processes and real sockets of one host.
#![expect(
    clippy::print_stdout,
    reason = "the child answers on its standard output, and measured figures are for the reader"
)]

#[path = "promise_suite/agree.rs"]
mod agree;
#[path = "promise_suite/bounds.rs"]
mod bounds;
#[path = "promise_suite/child.rs"]
mod child;
#[path = "promise_suite/freeze.rs"]
mod freeze;
#[path = "promise_suite/frozen.rs"]
mod frozen;
#[path = "promise_suite/neighbours.rs"]
mod neighbours;
#[path = "promise_suite/order.rs"]
mod order;
#[path = "hostile_suite/raw.rs"]
mod raw;
#[path = "promise_suite/rig.rs"]
mod rig;
#[path = "promise_suite/rooms.rs"]
mod rooms;
