//! The engine over fake RDMA devices that fail in every way that real ones do, with every batch packed; what packing saves; and
//! notices of packed batches that lie.

#[path = "verbs_faults/cards.rs"]
mod cards;
#[path = "verbs_faults/packing.rs"]
mod packing;
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

/// See `verbs_faults.rs`.
const IS_PACKED: bool = true;
