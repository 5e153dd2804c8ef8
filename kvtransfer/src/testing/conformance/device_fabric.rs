//! Ranks whose memory lies on devices, wholly or in part.

use super::{
    engine_fabric::Path,
    verbs_fabric::{FakeNetwork, PACKED_STAGING_BYTES},
};
use crate::{
    config::{RdmaConfig, SameHost},
    memory::Region,
    testing::{
        fake_device::FakeDevice,
        fake_verbs::{Behaviour, DmaBuf},
    },
};

/// Most ranks of a fabric.
const RANKS_MAX: usize = 16;

/// A device for each rank.
pub struct Devices(Vec<FakeDevice>);

impl Devices {
    fn new() -> Self {
        Self((0..RANKS_MAX).map(|_| FakeDevice::new()).collect())
    }

    /// The device of a rank.
    pub fn of(&self, rank: usize) -> &FakeDevice {
        &self.0[rank]
    }
}

macro_rules! device_path {
    ($(#[$doc:meta])* $name:ident, $same_host:expr, $path:literal, $is_host:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl Path for $name {
            const SAME_HOST: SameHost = $same_host;
            const NAME: &'static str = $path;
            type Network = Devices;

            fn network() -> Devices {
                Devices::new()
            }

            fn region(devices: &Devices, rank: usize, index: usize, len: usize) -> Region {
                let is_host: fn(usize) -> bool = $is_host;
                if is_host(index) {
                    Region::heap(len).expect("this host has memory")
                } else {
                    devices.of(rank).region(len)
                }
            }
        }
    };
}

device_path!(
    /// Device memory staged over loopback TCP.
    DeviceTcpPath, SameHost::Off, "tcp", |_| false
);
device_path!(
    /// Device memory copied out of the peer's.
    DevicePullPath, SameHost::PullOnly, "device-pull", |_| false
);
device_path!(
    /// Device memory through a shared ring.
    DeviceRingPath, SameHost::RingOnly, "shm-ring", |_| false
);
device_path!(
    /// Every second region on the device, over loopback TCP.
    MixedTcpPath, SameHost::Off, "tcp", |index| index % 2 == 1
);
device_path!(
    /// Every second region on the device, the others pulled by the processor.
    MixedPullPath, SameHost::PullOnly, "device-pull", |index| index % 2 == 1
);

/// Most ranks over RDMA devices.
const RDMA_RANKS_MAX: usize = 3;

/// A device and an RDMA device for each rank.
pub struct DeviceRails {
    /// The RDMA devices.
    pub network: FakeNetwork,
    /// The devices with memory.
    pub devices: Devices,
}

impl DeviceRails {
    /// How RDMA devices reach the memory: not at all where both are false.
    #[must_use]
    pub fn new(by_dmabuf: bool, by_peer_memory: bool) -> Self {
        let mut behaviour = Behaviour::erdma_compat();
        behaviour.peer_memory = by_peer_memory;
        behaviour.dmabuf = if by_dmabuf {
            DmaBuf::Supported
        } else {
            DmaBuf::NotSupported
        };
        let devices = Devices::new();
        if by_dmabuf || by_peer_memory {
            devices.0.iter().for_each(FakeDevice::let_rdma_reach);
        }
        let mut network = FakeNetwork::new(&behaviour, RDMA_RANKS_MAX, 1);
        network.config.landing_bytes = 128 << 10;
        Self { network, devices }
    }
}

macro_rules! device_rails_path {
    ($(#[$doc:meta])* $name:ident, $by_dmabuf:expr, $by_peer_memory:expr, $is_host:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl Path for $name {
            const SAME_HOST: SameHost = SameHost::Off;
            const NAME: &'static str = "verbs";
            const STAGING_BYTES: u64 = PACKED_STAGING_BYTES;
            type Network = DeviceRails;

            fn network() -> DeviceRails {
                DeviceRails::new($by_dmabuf, $by_peer_memory)
            }

            fn rdma(rails: &DeviceRails, rank: usize) -> RdmaConfig {
                rails.network.rdma(rank)
            }

            fn region(rails: &DeviceRails, rank: usize, index: usize, len: usize) -> Region {
                let is_host: fn(usize, usize) -> bool = $is_host;
                if is_host(rank, index) {
                    Region::heap(len).expect("this host has memory")
                } else {
                    rails.devices.of(rank).region(len)
                }
            }
        }
    };
}

device_rails_path!(
    /// Device memory that RDMA devices reach by dma-bufs.
    DmaBufRails, true, false, |_, _| false
);
device_rails_path!(
    /// Device memory that RDMA devices reach by its addresses.
    PeerMemoryRails, false, true, |_, _| false
);
device_rails_path!(
    /// Device memory that RDMA devices do not reach: it is packed.
    StagedRails, false, false, |_, _| false
);
device_rails_path!(
    /// Every second region on a device that RDMA devices do not reach.
    MixedRails, false, false, |_, index| index % 2 == 1
);
device_rails_path!(
    /// The first rank's memory in the host, the others' out of reach.
    HalfRails, false, false, |rank, _| rank == 0
);
