//! The conformance suite over the same-host pull.

use kvtransfer::{
    conformance_cases,
    testing::conformance::{EngineFabric, PullPath},
};

conformance_cases!(pull, super::EngineFabric<super::PullPath>);
