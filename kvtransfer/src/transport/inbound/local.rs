//! Payload that does not come over the socket: pulled out of the sender's process, or copied out of the shared ring.
#![expect(unsafe_code, reason = "hands raw region memory to process_vm_readv")]

use std::{io, num::NonZeroU64, sync::Arc};

use super::{Inbound, target_cursor};
use crate::{
    error::TransferError,
    memory::Gate,
    plan::{
        cursor::Segment,
        descriptor::{Descriptor, Limits, PairCursor},
        mismatch::End,
        pairing::Pairing,
        stream::check_items,
    },
    transfer::{BatchIn, Placement},
    transport::{
        LaneError,
        lane::LaneContext,
        outbound::range_of,
        sys::{self, IOV_MAX, IoRange},
    },
    wire::lane::{BatchHeader, VOID_PLACE},
};

/// Most bytes of one pull: bounds how long closing the gate can take.
const PULL_BYTES_MAX: u64 = 8 << 20;

/// What follows a pull's header.
pub(super) struct PullSource {
    /// What the sender's validity cell must hold after the pull.
    token: [u8; 8],
    items: Vec<i32>,
}

impl PullSource {
    pub(super) fn parse(list: &[u8]) -> Self {
        let (token, items) = list.split_first_chunk().unwrap_or((&[0; 8], &[]));
        let item = |b: &[u8]| i32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Self {
            token: *token,
            items: items.chunks_exact(4).map(item).collect(),
        }
    }
}

impl Inbound {
    /// Reads a batch out of the sender's process.
    pub(super) fn pull(
        &mut self,
        context: &LaneContext,
        header: &BatchHeader,
        batch: &BatchIn,
        gate: &Gate,
        source: &PullSource,
    ) -> Placement {
        let Some(pid) = context.peer_pid else {
            let reason = "it asks for a pull on a path that has none".to_owned();
            return Placement::Failed(TransferError::PeerMisbehaved { reason });
        };
        let items = &source.items;
        let misbehaved =
            |reason: String| Placement::Failed(TransferError::PeerMisbehaved { reason });
        if let Err(error) = check_source_items(&batch.pairing, batch.component, items) {
            return misbehaved(error);
        }
        let cursor = PairCursor::new(
            Arc::clone(&batch.pairing),
            batch.component,
            items.len(),
            batch.range.clone(),
            &Limits {
                len_max: NonZeroU64::new(PULL_BYTES_MAX),
                ..Limits::default()
            },
        );
        let mut cursor = match cursor {
            Ok(cursor) => cursor,
            Err(error) => return misbehaved(error.to_string()),
        };
        let hub = &context.hub;
        if hub.is_on_device(&batch.pairing, batch.component, End::Target) {
            let pulled = self.pull_on_device(context, cursor, gate, items, batch);
            return pulled.map_or_else(|placement| placement, |()| look_back(pid, header, source));
        }
        if self.copies.descriptors.is_empty() {
            self.copies.descriptors = vec![Descriptor::EMPTY; IOV_MAX].into_boxed_slice();
        }
        let target_items = &batch.items[batch.part.clone()];
        while cursor.remaining() > 0 {
            let filled = cursor.fill(items, target_items, &mut self.copies.descriptors);
            if let Err(placement) = self.pull_some(context, pid, gate, filled) {
                return placement;
            }
        }
        look_back(pid, header, source)
    }

    /// Pulls the first `filled` descriptors, a bounded number of bytes per call.
    fn pull_some(
        &mut self,
        context: &LaneContext,
        pid: i32,
        gate: &Gate,
        filled: usize,
    ) -> Result<(), Placement> {
        let mut at = 0;
        while at < filled {
            self.ranges.clear();
            self.remote.clear();
            let mut bytes = 0_u64;
            while at < filled
                && (bytes == 0 || bytes + self.copies.descriptors[at].len <= PULL_BYTES_MAX)
            {
                let descriptor = &self.copies.descriptors[at];
                let source = descriptor.source;
                let base = context.peer_regions.get(source.region.0 as usize);
                let len = usize::try_from(descriptor.len).unwrap_or(usize::MAX);
                let local = Segment {
                    region: descriptor.target.region,
                    offset: descriptor.target.offset,
                    len: descriptor.len,
                };
                let Ok(range) = range_of(context, &local) else {
                    return Err(memory_error(&io::ErrorKind::InvalidInput.into()));
                };
                let base = base.map_or(0, |region| region.base);
                let address = base.wrapping_add(source.offset);
                self.remote.push(IoRange::remote(address, len));
                self.ranges.push(range);
                bytes += descriptor.len;
                at += 1;
            }
            let Some(_pass) = gate.pass() else {
                return Err(Placement::GateClosed);
            };
            // SAFETY: local ranges are region memory that the hub keeps alive; the gate is held, so the pages still
            // belong to the transfer. Remote ranges are the kernel's to check.
            let pulled = unsafe { sys::pull(pid, &self.ranges, &self.remote) };
            match pulled {
                Ok(done) if done as u64 == bytes => {}
                Ok(_) => return Err(memory_error(&io::Error::from_raw_os_error(libc::EFAULT))),
                Err(error) => return Err(memory_error(&error)),
            }
        }
        Ok(())
    }

    /// Copies a batch out of the shared ring.
    pub(super) fn copy_from_ring(
        &mut self,
        context: &LaneContext,
        header: &BatchHeader,
        batch: &BatchIn,
        gate: &Gate,
    ) -> Result<Placement, LaneError> {
        let ring = context.ring_in.as_ref();
        let ring = ring.ok_or_else(|| LaneError::Protocol("a ring batch without a ring".into()))?;
        if header.place == VOID_PLACE {
            return Ok(Placement::Void);
        }
        let mut place = header.place;
        let mut cursor = target_cursor(batch)?;
        let items = &batch.items[batch.part.clone()];
        while cursor.remaining() > 0 {
            let filled = cursor.fill(items, &mut self.segments);
            let Some(_pass) = gate.pass() else {
                return Ok(Placement::GateClosed);
            };
            let segments = &self.segments[..filled];
            let hub = &context.hub;
            match self.stager.scatter(hub, segments, ring.region(), place) {
                Err(LaneError::Device(error)) => return Ok(super::staged::failed(&error)),
                scattered => scattered?,
            }
            place += segments.iter().map(|segment| segment.len).sum::<u64>();
        }
        Ok(Placement::Placed)
    }
}

/// Whether the pages were still the room's when they had been read.
fn look_back(pid: i32, header: &BatchHeader, source: &PullSource) -> Placement {
    match sys::peek::<8>(pid, header.place) {
        Ok(cell) if cell == source.token => Placement::Placed,
        Ok(_) => Placement::Void,
        Err(error) => memory_error(&error),
    }
}

fn check_source_items(pairing: &Pairing, component: usize, items: &[i32]) -> Result<(), String> {
    let paired = pairing
        .components
        .get(component)
        .ok_or("an unknown component")?;
    check_items(items, paired.item_count(End::Source)).map_err(|error| error.to_string())
}

fn memory_error(error: &io::Error) -> Placement {
    let errno = error.raw_os_error().unwrap_or(0);
    if errno == libc::ESRCH {
        // A killed peer is often noticed here before its sockets close; it is not our memory that is at fault.
        let reason = "its process is gone".to_owned();
        return Placement::Failed(TransferError::PeerLost { reason });
    }
    Placement::Failed(TransferError::Memory {
        op: "process_vm_readv",
        errno,
    })
}
