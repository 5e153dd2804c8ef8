//! What a rail has asked of its device so far: what a WRITE costs in doorbells and completions.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// What one RDMA device was asked to do by an engine since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RailCounts {
    /// The device's name.
    pub device: String,
    /// Chains handed to the device: one `ibv_post_send` each, which is one doorbell.
    pub doorbells: u64,
    /// Work requests in them: WRITEs and the frames after them.
    pub work_requests: u64,
    /// Completions of them.
    pub completions: u64,
    /// Frames received: one completion and one posted receive each.
    pub frames_received: u64,
    /// Batches sent that were packed: each is two of the work requests, whatever its pieces.
    pub packed_batches: u64,
    /// Their bytes.
    pub packed_bytes: u64,
    /// Packed batches received.
    pub unpacked_batches: u64,
}

/// The same while it grows. Whoever holds the rail's core counts; anybody may look.
#[derive(Debug, Default)]
pub(super) struct Counters {
    doorbells: AtomicU64,
    work_requests: AtomicU64,
    completions: AtomicU64,
    frames_received: AtomicU64,
    packed_batches: AtomicU64,
    packed_bytes: AtomicU64,
    unpacked_batches: AtomicU64,
}

impl Counters {
    pub(super) fn posted(&self, work_requests: u32) {
        self.doorbells.fetch_add(1, Ordering::Relaxed);
        self.work_requests
            .fetch_add(work_requests.into(), Ordering::Relaxed);
    }

    /// A packed batch of so many bytes was posted.
    pub(super) fn packed(&self, bytes: u64) {
        self.packed_batches.fetch_add(1, Ordering::Relaxed);
        self.packed_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A packed batch came.
    pub(super) fn unpacked(&self) {
        self.unpacked_batches.fetch_add(1, Ordering::Relaxed);
    }

    /// `completed` sends and `received` frames were polled at once.
    pub(super) fn polled(&self, completed: u64, received: u64) {
        self.completions.fetch_add(completed, Ordering::Relaxed);
        self.frames_received.fetch_add(received, Ordering::Relaxed);
    }

    pub(super) fn counts(&self, device: &str) -> RailCounts {
        RailCounts {
            device: device.to_owned(),
            doorbells: self.doorbells.load(Ordering::Relaxed),
            work_requests: self.work_requests.load(Ordering::Relaxed),
            completions: self.completions.load(Ordering::Relaxed),
            frames_received: self.frames_received.load(Ordering::Relaxed),
            packed_batches: self.packed_batches.load(Ordering::Relaxed),
            packed_bytes: self.packed_bytes.load(Ordering::Relaxed),
            unpacked_batches: self.unpacked_batches.load(Ordering::Relaxed),
        }
    }
}
