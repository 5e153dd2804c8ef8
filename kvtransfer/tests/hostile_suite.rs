//! Promise P3: whatever peers send, nothing panics, no thread dies, memory stays bounded, and good requests still work.

#[path = "hostile_suite/control.rs"]
mod control;
#[path = "hostile_suite/decoders.rs"]
mod decoders;
#[path = "hostile_suite/lanes.rs"]
mod lanes;
#[path = "hostile_suite/local.rs"]
mod local;
#[path = "hostile_suite/queue_pairs.rs"]
mod queue_pairs;
#[path = "hostile_suite/raw.rs"]
mod raw;
#[path = "promise_suite/rig.rs"]
mod rig;
#[path = "hostile_suite/services.rs"]
mod services;
#[path = "hostile_suite/watch.rs"]
mod watch;
