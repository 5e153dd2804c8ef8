//! The conformance suite over the simulated transport, in its four payload modes.

use kvtransfer::{
    conformance_cases,
    testing::conformance::{Inline, Pull, Ring, SimFabric, Write},
};

conformance_cases!(inline, super::SimFabric<super::Inline>);
conformance_cases!(pull, super::SimFabric<super::Pull>);
conformance_cases!(ring, super::SimFabric<super::Ring>);
conformance_cases!(write, super::SimFabric<super::Write>);
