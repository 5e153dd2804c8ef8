//! Ranks whose memory lies on devices, wholly or in part.

use super::engine_fabric::Path;
use crate::{config::SameHost, memory::Region, testing::fake_device::FakeDevice};

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
