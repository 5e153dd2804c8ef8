//! The engine's ranks over fake RDMA devices, each rank with devices of its own on one network.

use std::time::Duration;

use super::SOON;
use crate::{
    clock,
    config::{RdmaConfig, RdmaUse},
    testing::fake_verbs::{Behaviour, Fabric, FakeVerbs},
};

/// Between two looks at what has to come.
const LOOK: Duration = Duration::from_micros(200);

/// Bytes of a queue pair's landing memory where every batch is packed: two batches.
const LANDING_BYTES: u64 = 128 << 10;

/// Enough for the landing memory of every queue pair of a fabric.
pub const PACKED_STAGING_BYTES: u64 = 8 << 20;

/// Fake devices for some ranks, and how the ranks use them. When it is dropped, every object of every device must go soon,
/// and the fabric must have caught nobody.
pub struct FakeNetwork {
    /// The devices.
    pub fake: FakeVerbs,
    /// How every rank uses its devices.
    pub config: RdmaConfig,
    rails: usize,
}

impl FakeNetwork {
    /// So many ranks with so many devices each. Two queue pairs a rail, and batches of 64 KiB, as the suite expects. Pieces of
    /// every size are written to their pages, see [`FakeNetwork::packed`].
    ///
    /// # Panics
    /// If the devices cannot be made.
    pub fn new(behaviour: &Behaviour, ranks: usize, rails: usize) -> Self {
        let made = wait_for("a free place for a fabric", || {
            match FakeVerbs::with_devices(behaviour.clone(), ranks * rails) {
                // Other tests of this process have them all.
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => None,
                made => Some(made),
            }
        });
        let fake = made.expect("the host has files and descriptors");
        let config = RdmaConfig {
            usage: RdmaUse::Required,
            queue_pairs: 2,
            batch_bytes: 64 << 10,
            pack_below: 0,
            fake: Some(fake.clone()),
            ..RdmaConfig::default()
        };
        Self {
            fake,
            config,
            rails,
        }
    }

    /// The same, with every batch packed. The engines' [`staging_bytes`](crate::config::EngineConfig::staging_bytes) must be
    /// [`PACKED_STAGING_BYTES`].
    #[must_use]
    pub fn packed(mut self) -> Self {
        self.config.pack_below = u64::MAX;
        self.config.landing_bytes = LANDING_BYTES;
        self
    }

    /// How a rank uses RDMA.
    ///
    /// # Panics
    /// For a rank without devices.
    pub fn rdma(&self, rank: usize) -> RdmaConfig {
        let names = self.fake.device_names();
        RdmaConfig {
            devices: names[self.device(rank, 0)..][..self.rails].join(","),
            ..self.config.clone()
        }
    }

    /// The fabric's number of a rank's device.
    pub fn device(&self, rank: usize, rail: usize) -> usize {
        rank * self.rails + rail
    }

    /// The handle that drives the devices.
    pub fn fabric(&self) -> Fabric {
        self.fake.fabric()
    }
}

impl Drop for FakeNetwork {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let fabric = self.fake.fabric();
        let devices = 0..self.fake.device_names().len();
        wait_for("the last object of the devices to go", || {
            let left = devices.clone().map(|device| fabric.objects(device));
            (left.sum::<usize>() == 0).then_some(())
        });
        fabric.assert_clean();
        let queues = fabric.counters().queues;
        assert_eq!(queues.past_depth, 0, "more was posted than a queue holds");
    }
}

/// Looks again and again, for at most [`SOON`].
///
/// # Panics
/// If it does not come.
#[track_caller]
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = clock::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(clock::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(LOOK);
    }
}
