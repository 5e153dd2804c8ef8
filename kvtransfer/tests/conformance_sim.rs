//! The conformance suite over the simulated transport, in its three payload modes.

use kvtransfer::{
    conformance_cases,
    testing::conformance::{Inline, Pull, Ring, SimFabric},
};

conformance_cases!(inline, super::SimFabric<super::Inline>);
conformance_cases!(pull, super::SimFabric<super::Pull>);
conformance_cases!(ring, super::SimFabric<super::Ring>);
