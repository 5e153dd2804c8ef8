//! The conformance suite over memory of a device: staged over TCP, through a ring, copied from device to device, by RDMA devices that
//! reach it and that do not; and with every second region in host memory.

use kvtransfer::{
    conformance_cases,
    testing::conformance::{
        DevicePullPath, DeviceRingPath, DeviceTcpPath, DmaBufRails, EngineFabric, HalfRails,
        MixedPullPath, MixedRails, MixedTcpPath, PeerMemoryRails, StagedRails,
    },
};

conformance_cases!(tcp, super::EngineFabric<super::DeviceTcpPath>);
conformance_cases!(ring, super::EngineFabric<super::DeviceRingPath>);
conformance_cases!(pull, super::EngineFabric<super::DevicePullPath>);
conformance_cases!(mixed_tcp, super::EngineFabric<super::MixedTcpPath>);
conformance_cases!(mixed_pull, super::EngineFabric<super::MixedPullPath>);
conformance_cases!(rdma_dmabuf, super::EngineFabric<super::DmaBufRails>);
conformance_cases!(
    rdma_peer_memory,
    super::EngineFabric<super::PeerMemoryRails>
);
conformance_cases!(rdma_staged, super::EngineFabric<super::StagedRails>);
conformance_cases!(rdma_mixed, super::EngineFabric<super::MixedRails>);
conformance_cases!(rdma_half, super::EngineFabric<super::HalfRails>);
