//! Memory that goes away and comes back at the same addresses (SGLang frees the KV cache while it takes new weights).
//!
//! Released memory is in no use: transfers have ended, their gates are closed, and where network cards could reach it the
//! queue pairs are destroyed and the registrations undone. Meanwhile no transfer opens and no peer connects.

use std::{
    sync::{Arc, PoisonError, atomic::Ordering},
    thread,
    time::Duration,
};

use thiserror::Error;

use super::hub::Hub;
use crate::{clock, error::SubmitError, layout::RegionId, transport::rail::Rails};

/// How long the rails may take to destroy their queue pairs and undo their registrations: some drains of at most 200 ms.
const CLOSE_MAX: Duration = Duration::from_secs(5);
/// Between two looks at whether they have.
const LOOK: Duration = Duration::from_millis(1);

/// What peers are told whose connection ends because the memory goes away.
const REASON: &str = "its memory is released for now; connect again when it is restored";

/// Why memory was not released or restored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// There is no such region.
    #[error("region {} does not exist", region.0)]
    Unknown {
        /// Which.
        region: RegionId,
    },
    /// Transfers went on for longer than the caller would wait. Nothing was released.
    #[error(
        "{transfers} transfers still use the memory after {waited:?}; cancel them or wait longer, then release again"
    )]
    Busy {
        /// Live ones, and failed ones whose pages a network card may still touch.
        transfers: usize,
        /// How long was waited.
        waited: Duration,
    },
    /// The devices could not be closed or opened again. The memory stays released.
    #[error("RDMA: {0}")]
    Rdma(String),
    /// The engine has shut down.
    #[error("the engine has shut down")]
    Shutdown,
}

impl Hub {
    /// The RDMA devices that are open now.
    pub(crate) fn rails(&self) -> Arc<Rails> {
        Arc::clone(&self.rails.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts others in their place, which are returned.
    pub(super) fn set_rails(&self, rails: Rails) -> Arc<Rails> {
        let mut current = self.rails.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *current, Arc::new(rails))
    }

    /// Gates that were to be closed are closed.
    pub(super) fn gates_closed(&self) {
        self.closing_gates.fetch_sub(1, Ordering::SeqCst);
        if self.idle_waiters.load(Ordering::SeqCst) > 0 {
            // Whoever is about to wait holds the lock until it does.
            drop(self.lock_core());
            self.idle.notify_all();
        }
    }

    /// Releases regions: see [`Engine::release_memory`](super::Engine::release_memory).
    pub(super) fn release(
        &self,
        regions: &[RegionId],
        timeout: Duration,
    ) -> Result<(), MemoryError> {
        let mut old = self
            .old_rails
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.check_regions(regions)?;
        let mut core = self.lock_core();
        let added: Vec<RegionId> = regions
            .iter()
            .filter(|region| core.released.insert(**region))
            .copied()
            .collect();
        // From here on nothing opens, so what is live can only become less.
        self.idle_waiters.fetch_add(1, Ordering::SeqCst);
        let busy = |core: &mut super::hub::Core| {
            core.node.live_transfers() > 0 || self.closing_gates.load(Ordering::SeqCst) > 0
        };
        let waited = self.idle.wait_timeout_while(core, timeout, busy);
        let (mut core, slept) = waited.unwrap_or_else(PoisonError::into_inner);
        self.idle_waiters.fetch_sub(1, Ordering::SeqCst);
        if slept.timed_out() {
            for region in &added {
                core.released.remove(region);
            }
            return Err(MemoryError::Busy {
                transfers: core.node.live_transfers().max(1),
                waited: timeout,
            });
        }
        drop(core);
        if let Some(device) = self.devices.device() {
            device.unshare();
            // They hold our allocations in use.
            for info in self.peers() {
                self.drop_peer(info.peer, REASON);
            }
        }
        self.close_rails(&mut old)?;
        tracing::info!(?regions, "memory released");
        Ok(())
    }

    /// Takes regions back: see [`Engine::restore_memory`](super::Engine::restore_memory).
    pub(super) fn restore(&self, regions: &[RegionId]) -> Result<(), MemoryError> {
        let _one_at_a_time = self
            .old_rails
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.check_regions(regions)?;
        let left = {
            let core = self.lock_core();
            let left = core
                .released
                .iter()
                .filter(|region| !regions.contains(region));
            (left.count(), core.released.len())
        };
        let is_last = left.0 == 0 && left.1 > 0;
        if is_last {
            let rails = super::open_rails(&self.config.rdma, self.regions());
            let rails = rails.map_err(|error| MemoryError::Rdma(error.to_string()))?;
            let is_open = rails.is_open();
            self.set_rails(rails);
            self.devices.share_again(self.regions());
            // One that connected while the memory went away knows keys that are void.
            let stale = if is_open { self.peers() } else { Vec::new() };
            for info in stale {
                self.drop_peer(info.peer, REASON);
            }
        }
        let mut core = self.lock_core();
        core.released.retain(|region| !regions.contains(region));
        drop(core);
        tracing::info!(?regions, "memory restored");
        Ok(())
    }

    fn check_regions(&self, regions: &[RegionId]) -> Result<(), MemoryError> {
        if self.is_stopped() {
            return Err(MemoryError::Shutdown);
        }
        match regions
            .iter()
            .find(|region| self.region(**region).is_none())
        {
            Some(region) => Err(MemoryError::Unknown { region: *region }),
            None => Ok(()),
        }
    }

    /// Why nothing may use the memory now, if so.
    pub(super) fn released(&self) -> Option<SubmitError> {
        let core = self.lock_core();
        let region = core.released.first().map(|region| region.0);
        region.map(|region| SubmitError::Released { region })
    }

    /// Ends every queue pair and undoes every registration. Peers of an engine without RDMA notice nothing.
    fn close_rails(&self, old: &mut Option<Arc<Rails>>) -> Result<(), MemoryError> {
        if self.rails().is_open() {
            let closed = Rails::none("this engine's memory is released".into());
            *old = Some(self.set_rails(closed));
        }
        let Some(mut rails) = old.take() else {
            return Ok(());
        };
        for info in self.peers() {
            self.drop_peer(info.peer, REASON);
        }
        let deadline = clock::now() + CLOSE_MAX;
        let rails = loop {
            rails = match Arc::try_unwrap(rails) {
                Ok(rails) => break rails,
                Err(shared) if clock::now() < deadline => shared,
                Err(shared) => {
                    *old = Some(shared);
                    let reason = "a connection in the making holds the devices; release again";
                    return Err(MemoryError::Rdma(reason.into()));
                }
            };
            thread::sleep(LOOK);
        };
        rails.close(deadline).map_err(|(left, reason)| {
            *old = Some(Arc::new(left));
            MemoryError::Rdma(reason)
        })
    }
}
