//! The lists of a launch on their way to the device: a ring of pinned slots, each with its place in device memory.
//!
//! A slot is used again once the launch that reads it is done, which its event tells; so a thread waits only when it is
//! `SLOTS` launches ahead of the device, and the device is never synchronised.
#![expect(unsafe_code, reason = "enqueues copies to device memory")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::gpu::{
    GpuError,
    driver::Context,
    memory::DeviceBuffer,
    pinned::Pinned,
    stream::{Event, EventKind, Priority, Stream},
};

/// Bytes of a slot: 65,536 pairs. A GiB of 16 KiB pages then takes one launch, half a millisecond on the fastest devices.
pub(super) const SLOT_BYTES: usize = 1 << 20;

/// Slots: one is filled while another is uploaded and a third is read, by a few streams at once.
const SLOTS: usize = 8;

/// Lists up to this are read where they are, in pinned memory: a copy engine that is busy with pages would keep them waiting,
/// and each entry is read about once.
pub(super) const READ_IN_PLACE_MAX: usize = 16 << 10;

struct Slot {
    /// Behind the last launch that reads it.
    read: Event,
    /// Behind its upload.
    uploaded: Event,
}

struct Ring {
    slots: Vec<Slot>,
    next: usize,
}

/// The ring.
pub(super) struct Tables {
    pinned: Pinned,
    device: DeviceBuffer,
    uploads: Stream,
    ring: Mutex<Ring>,
}

impl Tables {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, GpuError> {
        let slot = || {
            Ok(Slot {
                read: Event::new(context, EventKind::Sleep)?,
                uploaded: Event::new(context, EventKind::Spin)?,
            })
        };
        let slots = (0..SLOTS)
            .map(|_| slot())
            .collect::<Result<_, GpuError>>()?;
        Ok(Self {
            pinned: Pinned::allocate(context, SLOTS * SLOT_BYTES)?,
            device: DeviceBuffer::new(context, SLOTS * SLOT_BYTES)?,
            uploads: Stream::new(context, Priority::High)?,
            ring: Mutex::new(Ring { slots, next: 0 }),
        })
    }

    /// Lays `parts` one behind the other where the device reads them, then calls `launch` with their address; what it enqueues
    /// on `stream` may read them. At most [`SLOT_BYTES`] together. Up to `in_place_max` they stay in pinned memory; longer
    /// ones are uploaded through a stream of their own, so that they travel while the previous launch copies.
    pub(super) fn with(
        &self,
        stream: &Stream,
        parts: &[&[u8]],
        in_place_max: usize,
        launch: impl FnOnce(u64) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if len > SLOT_BYTES {
            return Err(GpuError::Limit {
                what: "bytes of a launch's lists",
                asked: len as u64,
                limit: SLOT_BYTES as u64,
            });
        }
        let mut ring = self.lock();
        let place = ring.next;
        ring.next = (place + 1) % SLOTS;
        let slot = &ring.slots[place];
        slot.read.synchronize()?;
        let offset = (place * SLOT_BYTES) as u64;
        let mut at = offset;
        for part in parts {
            let written = self.pinned.region().write_at(at, part);
            written.map_err(|_| GpuError::Misuse("a slot holds what was measured"))?;
            at += part.len() as u64;
        }
        let pinned = self.pinned.device_address() + offset;
        let uploaded = self.device.address() + offset;
        let launched = if len <= in_place_max {
            launch(pinned)
        } else {
            // SAFETY: both ends are the ring's, and this slot is nobody else's until `read`.
            unsafe { self.uploads.copy(uploaded, pinned, len) }?;
            self.uploads.record(&slot.uploaded)?;
            stream.wait(&slot.uploaded)?;
            launch(uploaded)
        };
        // Also after a failed launch: the upload still reads the slot.
        stream.record(&slot.read)?;
        launched
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        // Launches may still read the tables; freeing pinned memory under an upload would be worse than a wait here.
        for slot in &self.lock().slots {
            if let Err(error) = slot.read.synchronize() {
                tracing::debug!(%error, "the last launch of a slot failed");
            }
        }
    }
}
