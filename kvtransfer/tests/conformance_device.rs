//! The conformance suite over memory of a device: staged over TCP, through a ring, copied from device to device; and with every
//! second region in host memory.

use kvtransfer::{
    conformance_cases,
    testing::conformance::{
        DevicePullPath, DeviceRingPath, DeviceTcpPath, EngineFabric, MixedPullPath, MixedTcpPath,
    },
};

conformance_cases!(tcp, super::EngineFabric<super::DeviceTcpPath>);
conformance_cases!(ring, super::EngineFabric<super::DeviceRingPath>);
conformance_cases!(pull, super::EngineFabric<super::DevicePullPath>);
conformance_cases!(mixed_tcp, super::EngineFabric<super::MixedTcpPath>);
conformance_cases!(mixed_pull, super::EngineFabric<super::MixedPullPath>);
