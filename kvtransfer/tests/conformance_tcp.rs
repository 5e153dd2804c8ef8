//! The conformance suite over loopback TCP.

use kvtransfer::{
    conformance_cases,
    testing::conformance::{EngineFabric, TcpPath},
};

conformance_cases!(tcp, super::EngineFabric<super::TcpPath>);
