//! What goes wrong on real kernel verbs, and what the engine makes of it. It needs the devices of the RDMA lab:
//! `cargo rdma-test --only rdma_faults`.
#![expect(
    clippy::print_stdout,
    reason = "the child answers on its standard output, and measured figures are for the reader"
)]

#[allow(dead_code, reason = "the promise suite uses more of it")]
#[path = "promise_suite/child.rs"]
mod child;
#[path = "rdma_faults/churn.rs"]
mod churn;
#[path = "promise_suite/freeze.rs"]
mod freeze;
#[path = "rdma_faults/frozen.rs"]
mod frozen;
#[path = "rdma_faults/pair.rs"]
mod pair;
#[path = "rdma_faults/rails.rs"]
mod rails;
#[path = "rdma_faults/rebuild.rs"]
mod rebuild;
#[path = "rdma_faults/refusals.rs"]
mod refusals;
#[allow(dead_code, reason = "the promise suite uses more of it")]
#[path = "promise_suite/rig.rs"]
mod rig;
#[path = "rdma_faults/shapes.rs"]
mod shapes;
