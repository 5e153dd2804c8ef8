//! RDMA adapters that exist only in this process, behind the table of libibverbs' and librdmacm's calls.
//!
//! [`FakeVerbs`] makes a few devices on one network and a [`Library`] whose calls reach them. Whoever uses the library
//! (the verbs layer, the rail engine, a test that posts by hand) cannot tell: completion channels, asynchronous events
//! and connection events have real file descriptors, WRITEs really copy bytes into registered memory of the process.
//!
//! The devices have the manners of real ones, also the bad ones: a [`Behaviour`] is a list of them, with presets for
//! eRDMA's two modes, siw and RoCE. What software emulation forgives (siw and rxe take 200 unsignalled work requests on
//! a queue of 64) is punished here as the hardware would, and told: [`Fabric::violations`].
//!
//! Nothing happens by time or chance. Work requests are executed when they are posted ([`Mode::Auto`]) or when the test
//! says so ([`Mode::Manual`]); faults come from the [`Fabric`] handle. All devices share one lock, so what the fabric
//! measures is counts (doorbells, completions, outstanding requests), never speed; for the cost of posting on our side
//! there is [`Behaviour::null`].
//!
//! What it does not do: READ beyond what a probe needs, atomics, shared receive queues, memory windows, `poll_cq` races
//! other than [`Violation::DestroyedDuringPoll`]. Contexts of one device share their asynchronous events.

mod behaviour;
mod calls;
mod cm_calls;
mod cm_events;
mod connect;
mod counters;
mod disconnect;
mod events;
mod fabric;
mod lifecycle;
mod memory;
mod nic;
mod poll;
mod post;
mod queue;
mod queues;
mod regions;
mod shared;
mod state;
mod sysfs;
#[cfg(test)]
mod tests;
mod zombies;

use std::{io, net::Ipv4Addr, path::Path, sync::Arc};

pub use self::{
    behaviour::{Behaviour, CmRules, DmaBuf, EmptyReceive, OutOfBand, RefusedWrite, SendQueueRule},
    counters::{Counters, QueueCounters, Violation, WatchCounters},
    fabric::{Fabric, WatchId},
    queue::{Forgery, QueuePairId},
    state::Mode,
};
use self::{shared::Shared, state::State, sysfs::Sysfs};
use crate::transport::verbs::library::Library;

/// Devices of a fabric unless a test wants more: two hosts with one each, or one with two.
const DEVICES: usize = 2;
/// Most devices of a fabric: their addresses differ in one byte.
const DEVICES_MAX: usize = 250;

/// Fake adapters on a fake network.
///
/// Dropping it does not break who still uses the library: objects made through it keep the fabric alive.
#[derive(Clone, Debug)]
pub struct FakeVerbs {
    fabric: Fabric,
}

impl FakeVerbs {
    /// Two devices of this behaviour on one network.
    ///
    /// # Panics
    /// See [`FakeVerbs::with_devices`].
    #[must_use]
    pub fn new(behaviour: Behaviour) -> Self {
        Self::with_devices(behaviour, DEVICES).expect("a fabric of two devices can be made")
    }

    /// So many devices of this behaviour on one network.
    ///
    /// # Errors
    /// When file descriptors or the folder for sysfs facts cannot be made, or when too many fabrics are alive in this
    /// process (`ENOMEM`), or too many devices are asked for (`EINVAL`).
    pub fn with_devices(behaviour: Behaviour, devices: usize) -> io::Result<Self> {
        if devices == 0 || devices > DEVICES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let names: Vec<String> = (0..devices)
            .map(|index| format!("{}_{index}", behaviour.name_stem))
            .collect();
        let state = State::new(behaviour, devices)?;
        let sysfs = Sysfs::new()?;
        sysfs.fill(&state, &names)?;
        let shared = Shared::new(state, &names, sysfs)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let names = names.into();
        Ok(Self {
            fabric: Fabric { shared, names },
        })
    }

    /// A library whose calls reach these devices.
    #[must_use]
    pub(crate) fn library(&self) -> Arc<Library> {
        let slot = self.fabric.shared.slot;
        let has_cm = self.fabric.shared.lock().behaviour.cm.is_some();
        let cm = has_cm.then(|| cm_calls::table(slot));
        let devices = 0..self.fabric.names.len();
        let interfaces = devices.map(|device| (sysfs::netdev(device), self.address(device)));
        let interfaces = interfaces.collect();
        Library::from_table(calls::table(slot), cm, self.sysfs().to_owned(), interfaces)
    }

    /// The handle that drives the devices.
    #[must_use]
    pub fn fabric(&self) -> Fabric {
        self.fabric.clone()
    }

    /// Names of the devices, by index.
    #[must_use]
    pub fn device_names(&self) -> &[String] {
        &self.fabric.names
    }

    /// IPv4 address of a device, which its GID maps where it is RoCE's, and `rdma_cm` binds to.
    ///
    /// # Panics
    /// When there is no such device.
    #[must_use]
    pub fn address(&self, device: usize) -> Ipv4Addr {
        self.fabric.shared.lock().devices[device].address.into()
    }

    /// Whether the calling thread is doing an adapter's work just now, so that a test that counts what ours costs can
    /// leave it out. Allocates nothing, and may be asked from within an allocator.
    #[must_use]
    pub fn is_inside() -> bool {
        shared::is_inside()
    }

    /// A folder that stands for `/sys`.
    #[must_use]
    pub fn sysfs(&self) -> &Path {
        self.fabric.shared.sysfs.root()
    }

    /// What the table of slots holds for this fabric.
    #[cfg(test)]
    fn slot_entry(&self) -> std::sync::Weak<Shared> {
        Arc::downgrade(&self.fabric.shared)
    }
}
