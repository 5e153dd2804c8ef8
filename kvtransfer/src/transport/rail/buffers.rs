//! The small registered memory of one queue pair: where frames arrive, frames that do not fit inline, and headers that come
//! with immediate data.
#![expect(unsafe_code, reason = "registers memory that the card writes")]

use std::sync::Arc;

use crate::{
    memory::{Region, RegionError},
    transport::verbs::{
        chain::Sge,
        error::VerbsError,
        mr::{Access, Mr},
        pd::Pd,
    },
    wire::{lane::BatchHeader, rdma::Frame},
};

/// Bytes of a frame's place: two cache lines, so that no two frames share one.
const PLACE: u64 = 128;

const _: () = assert!(Frame::LEN_MAX as u64 <= PLACE && BatchHeader::LEN as u64 <= PLACE);

/// Why the memory could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuffersError {
    /// The system has none.
    #[error("memory for frames: {0}")]
    Memory(#[from] RegionError),
    /// The device does not take it.
    #[error("memory for frames: {0}")]
    Device(#[from] VerbsError),
}

/// Frames of one queue pair.
pub(super) struct Buffers {
    // Deregistered before the memory goes.
    mr: Mr,
    memory: Region,
    receives: u16,
    sends: u16,
}

impl Buffers {
    /// Room for so many frames each way. The third part, as large as the first, is where the peer writes headers when
    /// notices travel as immediate data.
    pub(super) fn new(pd: &Arc<Pd>, receives: u16, sends: u16) -> Result<Self, BuffersError> {
        let places = 2 * u64::from(receives) + u64::from(sends);
        let len = usize::try_from(places * PLACE).expect("invariant: at most 3 * 65535 places");
        let memory = Region::mmap(len)?;
        let access = Access::WriteTarget;
        // SAFETY: the registration is a field of the same struct and dropped before the memory; nobody forms references
        // to bytes of a region.
        let mr = unsafe { Mr::register(pd, memory.base_address(), len as u64, access) }?;
        Ok(Self {
            mr,
            memory,
            receives,
            sends,
        })
    }

    /// Where receive number `index` puts its frame: address, bytes, key.
    pub(super) fn receive(&self, index: u16) -> (u64, u32, u32) {
        let at = u64::from(index % self.receives) * PLACE;
        let bytes = u32::try_from(PLACE).expect("invariant: a small constant");
        (self.memory.base_address() + at, bytes, self.mr.lkey())
    }

    /// Copies out a frame that arrived in receive `index`; how long it is.
    pub(super) fn take(&self, index: u16, len: u32, out: &mut [u8; Frame::LEN_MAX]) -> usize {
        let at = u64::from(index % self.receives) * PLACE;
        // A longer one than any frame is cut: what is left does not parse.
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(out.len());
        let read = self.memory.read_at(at, &mut out[..len]);
        debug_assert!(read.is_ok(), "places lie within the memory");
        if read.is_ok() { len } else { 0 }
    }

    /// Puts a frame where the card will read it. `number` counts frames; at most `sends` are outstanding.
    pub(super) fn stage(&self, number: u64, bytes: &[u8]) -> Sge {
        let place = u64::from(self.receives) + number % u64::from(self.sends.max(1));
        let at = place * PLACE;
        let written = self.memory.write_at(at, bytes);
        debug_assert!(written.is_ok(), "places lie within the memory");
        Sge {
            address: self.memory.base_address() + at,
            bytes: u32::try_from(bytes.len()).expect("invariant: frames are short"),
            lkey: self.mr.lkey(),
        }
    }

    /// Address and key of the places for headers.
    pub(super) fn slots(&self) -> (u64, u32) {
        let at = (u64::from(self.receives) + u64::from(self.sends)) * PLACE;
        (self.memory.base_address() + at, self.mr.rkey())
    }

    /// Copies out the header in slot `index`.
    pub(super) fn header(&self, index: u16, out: &mut [u8; BatchHeader::LEN]) -> bool {
        let place = u64::from(self.receives) + u64::from(self.sends) + u64::from(index);
        index < self.receives && self.memory.read_at(place * PLACE, out).is_ok()
    }
}

/// Where in the peer's slots header number `index` goes.
pub(super) fn slot_address(base: u64, index: u16) -> u64 {
    base + u64::from(index) * PLACE
}
