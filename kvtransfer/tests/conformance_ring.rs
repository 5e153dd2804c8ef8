//! The conformance suite over the same-host ring.

use kvtransfer::{
    conformance_cases,
    testing::conformance::{EngineFabric, RingPath},
};

conformance_cases!(ring, super::EngineFabric<super::RingPath>);
