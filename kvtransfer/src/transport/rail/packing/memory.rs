//! Memory that a card reads packed batches from, or writes them to.
#![expect(
    unsafe_code,
    reason = "registers memory that the card reads and writes"
)]

use std::sync::Arc;

use crate::{
    memory::{
        Region,
        device::{Device, Pinned},
    },
    transport::{
        rail::budget::{Budget, Share},
        verbs::{
            chain::Sge,
            mr::{Access, Mr},
            pd::Pd,
        },
    },
    wire::rdma::Landing,
};

/// Registered memory for the packed batches of one queue pair and direction.
pub(in super::super) struct PackMemory {
    // Deregistered before the memory goes.
    mr: Mr,
    /// Held, not read; without it a device's copies are slower.
    _pinned: Option<Box<dyn Pinned>>,
    pub(super) region: Arc<Region>,
    /// The engine's budget has it again when all of that is gone.
    _share: Share,
}

impl PackMemory {
    /// Takes it from a budget and registers it.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub(super) fn new(
        pd: &Arc<Pd>,
        budget: &Budget,
        bytes: u64,
        access: Access,
        device: Option<&Arc<dyn Device>>,
    ) -> Result<Self, String> {
        let share = budget.take(bytes).ok_or_else(|| {
            format!("no {bytes} bytes are left for packed batches (staging_bytes)")
        })?;
        let len = usize::try_from(bytes).map_err(|error| error.to_string())?;
        let region = Arc::new(Region::mmap(len).map_err(|error| error.to_string())?);
        let pinned = device.and_then(|device| {
            let pinned = device.pin(&region);
            // Slower copies are copies all the same.
            pinned
                .inspect_err(
                    |error| tracing::warn!(%error, "memory for packed batches is not pinned"),
                )
                .ok()
        });
        // SAFETY: the registration is a field of the same struct and dropped before the memory; nobody forms references to
        // bytes of a region.
        let mr = unsafe { Mr::register(pd, region.base_address(), bytes, access) };
        Ok(Self {
            mr: mr.map_err(|error| format!("memory for packed batches: {error}"))?,
            _pinned: pinned,
            region,
            _share: share,
        })
    }

    /// As the peer must know it.
    pub(in super::super) fn landing(&self) -> Landing {
        Landing {
            address: self.region.base_address(),
            rkey: self.mr.rkey(),
            bytes: u32::try_from(self.region.len()).unwrap_or(0),
        }
    }

    /// So many bytes of it.
    pub(super) fn sge(&self, at: u64, bytes: u64) -> Result<Sge, String> {
        Ok(Sge {
            address: self.region.base_address() + at,
            bytes: u32::try_from(bytes).map_err(|error| error.to_string())?,
            lkey: self.mr.lkey(),
        })
    }
}
