//! Tools that try to break the engine, for tests of this crate and of its users (feature "testing").
//!
//! * [`sim`]: whole clusters of real [`Node`](crate::transfer::Node)s in one thread under virtual time, over a network
//!   that loses connections, delays, freezes and kills. A seed decides everything, so every failure can be replayed.
//! * [`conformance`]: named cases that every transport must pass, the simulated one and the real ones of the engine.
//! * [`fake_verbs`]: RDMA adapters in this process, with the manners and the faults of real ones.
//! * [`fake_device`]: a device of host memory with the manners of a GPU.
//! * [`model`]: layouts of small models, cut over ranks as serving engines cut them.

#[forbid(unsafe_code)]
pub mod conformance;
pub mod fake_device;
pub mod fake_verbs;
#[forbid(unsafe_code)]
pub mod model;
#[forbid(unsafe_code)]
pub mod sim;

pub use crate::transport::rail::posting::PostDriver;
