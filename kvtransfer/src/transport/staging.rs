//! Between a device and a wire that only host memory can reach: chunks of pinned memory, and the copies in and out.
//!
//! A sending lane gathers the next bytes of its batch, which then come to a chunk while the first of them are
//! sent; a receiving lane fills a chunk from the socket, lets its parts start for the device, and scatters them there when the
//! chunk is full or the batch is complete. Pages are touched by the gather and the scatter alone, under the room's gate; the
//! way between goes through a buffer of the device's. Chunks are the engine's, in two halves, so that lanes
//! which send cannot keep those from receiving on which their own peers wait. A sending lane without a chunk begins no batch and
//! is woken when one is free; a receiving lane waits, which holds its peer up through the socket.

use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::Thread,
    time::Duration,
};

use super::LaneError;
use crate::{
    engine::hub::Hub,
    memory::{
        Region,
        device::{Copier, Device, DeviceError, Flight, Piece, Pinned},
    },
    plan::cursor::Segment,
};

/// Sending lanes that wait for a chunk; each waits once, and lanes are bounded by peers.
const WAITING_MAX: usize = 1 << 16;

/// How long a receiving lane waits for a chunk before it looks whether it is still wanted.
pub(super) const WAIT: Duration = Duration::from_millis(10);

/// The memory of a chunk.
struct Memory {
    region: Arc<Region>,
    /// Held, not read; without it copies are slower.
    _pinned: Option<Box<dyn Pinned>>,
}

impl Memory {
    fn new(device: &dyn Device, bytes: usize) -> Result<Self, LaneError> {
        let region = Region::mmap(bytes).map_err(refused)?;
        let region = Arc::new(region);
        let pinned = device.pin(&region);
        if let Err(error) = &pinned {
            tracing::warn!(%error, "staging memory is not pinned; copies through it are slow");
        }
        Ok(Self {
            region,
            _pinned: pinned.ok(),
        })
    }
}

/// The chunks of one direction.
struct Half {
    device: Arc<dyn Device>,
    chunk_bytes: usize,
    chunks_max: usize,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Default)]
struct State {
    free: Vec<Memory>,
    /// Chunks handed out, and those in `free`.
    made: usize,
    taken: usize,
    waiting: Vec<Thread>,
}

impl Half {
    fn new(device: &Arc<dyn Device>, chunk_bytes: usize, chunks_max: usize) -> Self {
        Self {
            device: Arc::clone(device),
            chunk_bytes,
            chunks_max: chunks_max.max(1),
            state: Mutex::default(),
            freed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's pinned memory.
pub(crate) struct Staging {
    out: Arc<Half>,
    inbound: Arc<Half>,
}

impl Staging {
    /// At most `total` bytes in chunks of `chunk` bytes; none is pinned before it is needed.
    pub(crate) fn new(device: &Arc<dyn Device>, total: usize, chunk: usize) -> Self {
        let each = total / 2 / chunk;
        Self {
            out: Arc::new(Half::new(device, chunk, each)),
            inbound: Arc::new(Half::new(device, chunk, each)),
        }
    }

    /// A chunk to send from. `None`: all are in use, and `lane` is unparked when one is free.
    pub(super) fn to_send(&self, lane: &Thread) -> Result<Option<Chunk>, LaneError> {
        let mut state = self.out.lock();
        if state.taken == self.out.chunks_max {
            let is_known = state.waiting.iter().any(|known| known.id() == lane.id());
            if !is_known && state.waiting.len() < WAITING_MAX {
                state.waiting.push(lane.clone());
            }
            return Ok(None);
        }
        Chunk::take(&self.out, state).map(Some)
    }

    /// A chunk to receive into. `None`: none was free for [`WAIT`].
    pub(super) fn to_receive(&self) -> Result<Option<Chunk>, LaneError> {
        let half = &self.inbound;
        let full = |state: &mut State| state.taken == half.chunks_max;
        let waited = half.freed.wait_timeout_while(half.lock(), WAIT, full);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if full(&mut state) {
            return Ok(None);
        }
        Chunk::take(half, state).map(Some)
    }
}

/// Pinned memory for one batch, or a part of one; it goes back when dropped.
pub(super) struct Chunk {
    half: Arc<Half>,
    memory: Option<Memory>,
    /// What is on its way to or from it.
    flights: Vec<Box<dyn Flight>>,
}

impl Chunk {
    fn take(half: &Arc<Half>, mut state: MutexGuard<'_, State>) -> Result<Self, LaneError> {
        state.taken += 1;
        let memory = state.free.pop();
        if memory.is_none() {
            state.made += 1;
        }
        drop(state);
        let mut chunk = Self {
            half: Arc::clone(half),
            memory,
            flights: Vec::new(),
        };
        if chunk.memory.is_none() {
            match Memory::new(&*half.device, half.chunk_bytes) {
                Ok(memory) => chunk.memory = Some(memory),
                Err(error) => {
                    half.lock().made -= 1;
                    return Err(error);
                }
            }
        }
        Ok(chunk)
    }

    /// Waits until its first `bytes` bytes have come from the device.
    pub(super) fn wait(&self, bytes: usize) -> Result<(), DeviceError> {
        let mut flights = self.flights.iter();
        flights.try_for_each(|flight| flight.wait(bytes as u64))
    }

    pub(super) fn region(&self) -> &Arc<Region> {
        let memory = self.memory.as_ref();
        let memory = memory.expect("invariant: a chunk has memory until it is dropped");
        &memory.region
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // Whoever gets it next must not meet the last one's bytes.
        if let Err(error) = self.wait(usize::MAX) {
            tracing::debug!(%error, "a chunk's last copy failed");
        }
        self.flights.clear();
        let mut state = self.half.lock();
        state.taken -= 1;
        state.free.extend(self.memory.take());
        let waiting = state.waiting.pop();
        drop(state);
        self.half.freed.notify_one();
        if let Some(lane) = waiting {
            lane.unpark();
        }
    }
}

/// A lane's copies between a device and host memory.
#[derive(Default)]
pub(super) struct Stager {
    copier: Option<Box<dyn Copier>>,
    pieces: Vec<Piece>,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Out of the regions, into host memory.
    Gather,
    /// Out of host memory, into the regions.
    Scatter,
}

impl Stager {
    /// Something that copies on `device`; made at the first call.
    pub(super) fn copier(&mut self, device: &dyn Device) -> Result<&mut dyn Copier, DeviceError> {
        if self.copier.is_none() {
            self.copier = Some(device.copier()?);
        }
        Ok(self
            .copier
            .as_deref_mut()
            .expect("invariant: made just now"))
    }

    /// The bytes of `segments`, one behind the other, into `host` from `offset` on.
    pub(super) fn gather(
        &mut self,
        hub: &Hub,
        segments: &[Segment],
        host: &Region,
        offset: u64,
    ) -> Result<(), LaneError> {
        self.move_all(hub, segments, host, offset, Way::Gather)
    }

    /// The bytes of `host` from `offset` on into `segments`.
    pub(super) fn scatter(
        &mut self,
        hub: &Hub,
        segments: &[Segment],
        host: &Region,
        offset: u64,
    ) -> Result<(), LaneError> {
        self.move_all(hub, segments, host, offset, Way::Scatter)
    }

    /// As [`Self::gather`] into a chunk, from its first byte on. The bytes may come later: see [`Chunk::wait`].
    pub(super) fn fetch(
        &mut self,
        hub: &Hub,
        segments: &[Segment],
        chunk: &mut Chunk,
    ) -> Result<(), LaneError> {
        chunk.flights.clear();
        let Some(device) = self.list(hub, segments)? else {
            return self.gather(hub, segments, chunk.region(), 0);
        };
        let pieces = std::mem::take(&mut self.pieces);
        let host = Arc::clone(chunk.region());
        let fetched = self.copier(&*device)?.fetch(&pieces, &host, 0);
        self.pieces = pieces;
        chunk.flights.push(fetched?);
        Ok(())
    }

    /// Lets bytes of a chunk start for the device.
    pub(super) fn send(
        &mut self,
        device: &dyn Device,
        chunk: &mut Chunk,
        range: Range<usize>,
    ) -> Result<(), LaneError> {
        let host = Arc::clone(chunk.region());
        let range = range.start as u64..range.end as u64;
        let flight = self.copier(device)?.send(&host, range)?;
        chunk.flights.push(flight);
        Ok(())
    }

    /// Writes what was sent into the segments, which all lie on the device.
    pub(super) fn deliver(&mut self, hub: &Hub, segments: &[Segment]) -> Result<(), LaneError> {
        let mixed = "bytes for host memory were sent to the device";
        let device = self.list(hub, segments)?;
        let device = device.ok_or_else(|| LaneError::Protocol(mixed.into()))?;
        let pieces = std::mem::take(&mut self.pieces);
        let delivered = self.copier(&*device)?.deliver(&pieces);
        self.pieces = pieces;
        Ok(delivered?)
    }

    /// Lists the pieces of segments. `None`: not all of them are on the device.
    fn list(
        &mut self,
        hub: &Hub,
        segments: &[Segment],
    ) -> Result<Option<Arc<dyn Device>>, LaneError> {
        let mut device = None;
        self.pieces.clear();
        for segment in segments {
            let region = hub
                .region(segment.region)
                .ok_or_else(|| no_region(segment))?;
            let Some(found) = region.on_device() else {
                return Ok(None);
            };
            device = Some(found);
            let piece = region.piece(segment.offset, segment.len);
            self.pieces.push(piece.map_err(refused)?);
        }
        Ok(device.cloned())
    }

    /// Device segments in one call as far as they follow each other, host segments by themselves.
    fn move_all(
        &mut self,
        hub: &Hub,
        segments: &[Segment],
        host: &Region,
        offset: u64,
        way: Way,
    ) -> Result<(), LaneError> {
        let mut at = offset;
        let mut first = at;
        let mut device = None;
        self.pieces.clear();
        for segment in segments {
            let region = hub
                .region(segment.region)
                .ok_or_else(|| no_region(segment))?;
            if let Some(found) = region.on_device() {
                if self.pieces.is_empty() {
                    first = at;
                }
                device = Some(found);
                let piece = region.piece(segment.offset, segment.len);
                self.pieces.push(piece.map_err(refused)?);
            } else {
                self.flush(device, host, first, way)?;
                let len = super::outbound::len_of(segment);
                match way {
                    Way::Gather => host.copy_from(at, region, segment.offset, len),
                    Way::Scatter => region.copy_from(segment.offset, host, at, len),
                }
                .map_err(refused)?;
            }
            at += segment.len;
        }
        self.flush(device, host, first, way)
    }

    fn flush(
        &mut self,
        device: Option<&Arc<dyn Device>>,
        host: &Region,
        offset: u64,
        way: Way,
    ) -> Result<(), LaneError> {
        let Some(device) = device.filter(|_| !self.pieces.is_empty()) else {
            return Ok(());
        };
        let pieces = std::mem::take(&mut self.pieces);
        let copier = self.copier(&**device)?;
        let moved = match way {
            Way::Gather => copier.gather(&pieces, host, offset),
            Way::Scatter => copier.scatter(host, offset, &pieces),
        };
        self.pieces = pieces;
        self.pieces.clear();
        Ok(moved?)
    }
}

fn no_region(segment: &Segment) -> LaneError {
    LaneError::Protocol(format!("region {} does not exist", segment.region.0))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "given to map_err by its name"
)]
fn refused(error: crate::memory::RegionError) -> LaneError {
    LaneError::Protocol(error.to_string())
}
