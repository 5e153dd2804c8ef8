//! The engine over fake RDMA devices that fail in every way that real ones do. At the end of each test every object of every
//! device must be gone, and the fabric must have caught nobody (`FakeNetwork`).

#[path = "verbs_faults/cards.rs"]
mod cards;
#[path = "verbs_faults/pages.rs"]
mod pages;
#[path = "verbs_faults/queues.rs"]
mod queues;
#[path = "verbs_faults/relay.rs"]
mod relay;
#[path = "verbs_faults/rig.rs"]
mod rig;
#[path = "verbs_faults/standard.rs"]
mod standard;
#[path = "verbs_faults/storm.rs"]
mod storm;
#[path = "verbs_faults/traffic.rs"]
mod traffic;
#[path = "verbs_faults/wakes.rs"]
mod wakes;

/// Batches are written straight to their pages; `verbs_faults_packed.rs` has the same tests with packed ones.
const IS_PACKED: bool = false;
