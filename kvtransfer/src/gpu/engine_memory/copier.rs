//! One lane's copies on a GPU: gathers and scatters through pinned memory, and copies from a peer's memory.
#![expect(
    unsafe_code,
    reason = "starts copies between addresses that the engine vouches for"
)]

use std::{fmt, ops::Range, sync::Arc};

use super::{
    Opened,
    flight::{CudaFlight, Mark, is_done_soon},
};
use crate::{
    gpu::{
        Event, EventKind, GpuError, Pair, Piece as CopyPiece, Priority, Rows, Side, Stream, Window,
        memory::DeviceBuffer,
    },
    memory::{
        Region,
        device::{Copier, DeviceError, Flight, Grid, Move, PART_BYTES, Piece},
    },
};

/// Least bytes of device memory between pieces and a contiguous copy to or from the host, per copier: a chunk of staging memory.
const BOUNCE_BYTES: u64 = 4 << 20;

/// Pieces up to which each is copied by itself: starting a copy costs about as much as a kernel for all of them.
const PIECES_ALONE_MAX: usize = 4;

/// Bytes from which a move is as fast by the driver's own copy, which takes some 6 µs to start, as by a kernel on a few
/// multiprocessors. A matrix product beside such copies takes no longer than alone, beside the kernel up to 1.18 times as long.
const MOVE_ALONE_BYTES: u64 = 4 << 20;

/// One lane's stream, and device memory between pieces and host memory.
pub(super) struct CudaCopier {
    shared: Arc<Opened>,
    stream: Arc<Stream>,
    /// Where copies from device to device go.
    pulls: Arc<Stream>,
    done: Event,
    sleepy: Event,
    bounce: Option<DeviceBuffer>,
    /// Behind copies of a flight; `used` of them are this batch's.
    marks: Vec<Arc<Event>>,
    used: usize,
    pairs: Vec<Pair>,
    pieces: Vec<CopyPiece>,
}

/// Which way bytes go between a device and the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToHost,
    ToDevice,
}

impl CudaCopier {
    pub(super) fn new(shared: &Arc<Opened>) -> Result<Self, GpuError> {
        let context = &shared.context;
        let stream = Arc::new(Stream::new(context, Priority::Low)?);
        Ok(Self {
            shared: Arc::clone(shared),
            pulls: Arc::clone(shared.pulls.as_ref().unwrap_or(&stream)),
            stream,
            done: Event::new(context, EventKind::Spin)?,
            sleepy: Event::new(context, EventKind::Sleep)?,
            bounce: None,
            marks: Vec::new(),
            used: 0,
            pairs: Vec::new(),
            pieces: Vec::new(),
        })
    }

    /// Waits for what was started on `stream`, looking first and sleeping then.
    fn finish(&self, stream: &Stream) -> Result<(), GpuError> {
        stream.record(&self.done)?;
        stream.record(&self.sleepy)?;
        if is_done_soon(&self.done)? {
            return Ok(());
        }
        self.sleepy.synchronize()
    }

    /// As [`Self::finish`], also after a failure: what was started must not outlive the gate that the caller holds.
    fn settle(&self, stream: &Stream, started: Result<(), GpuError>) -> Result<(), GpuError> {
        let finished = self.finish(stream);
        started.and(finished)
    }

    /// Device memory of at least `len` bytes. What the last one held is lost if it was shorter.
    fn bounce(&mut self, len: u64) -> Result<u64, GpuError> {
        if let Some(bounce) = &self.bounce
            && bounce.len() as u64 >= len
        {
            return Ok(bounce.address());
        }
        self.stream.synchronize()?;
        self.bounce = None;
        let len = usize::try_from(len.max(BOUNCE_BYTES)).unwrap_or(usize::MAX);
        let bounce = DeviceBuffer::new(&self.shared.context, len)?;
        Ok(self.bounce.insert(bounce).address())
    }

    /// Marks the place in the lane's stream that was reached.
    fn mark(&mut self) -> Result<Arc<Event>, GpuError> {
        if self.used == self.marks.len() {
            let event = Event::new(&self.shared.context, EventKind::Sleep)?;
            self.marks.push(Arc::new(event));
        }
        let event = Arc::clone(&self.marks[self.used]);
        self.used += 1;
        self.stream.record(&event)?;
        Ok(event)
    }

    /// Lists copies between pieces and the bytes at `buffer`, one behind the other.
    fn lay_out(&mut self, pieces: &[Piece], buffer: u64, way: Way) {
        let mut at = buffer;
        self.pieces.clear();
        for piece in pieces {
            let (source, target) = match way {
                Way::ToHost => (piece.address, at),
                Way::ToDevice => (at, piece.address),
            };
            let len = piece.len;
            self.pieces.push(CopyPiece {
                source,
                target,
                len,
            });
            at += len;
        }
    }

    /// Starts a gather into the device's buffer, and the way on from there, with marks.
    ///
    /// # Safety
    /// As for [`Self::between`].
    unsafe fn start_fetch(
        &mut self,
        pieces: &[Piece],
        host: u64,
        len: u64,
    ) -> Result<Vec<Mark>, GpuError> {
        let bounce = self.bounce(len)?;
        self.used = 0;
        self.lay_out(pieces, bounce, Way::ToHost);
        // SAFETY: the caller's contract; the buffer is ours.
        unsafe { self.list() }?;
        // The pages are not needed behind this.
        self.stream.record(&self.done)?;
        self.stream.record(&self.sleepy)?;
        let mut marks = Vec::new();
        let mut at = 0;
        // The rest is one copy: each costs some microseconds beside its bytes.
        for end in [len.min(PART_BYTES as u64), len] {
            if at == end {
                break;
            }
            // SAFETY: as above; the stream keeps the order.
            unsafe { self.whole(bounce + at, host + at, end - at, Way::ToHost) }?;
            let event = self.mark()?;
            marks.push(Mark { bytes: end, event });
            at = end;
        }
        if !is_done_soon(&self.done)? {
            self.sleepy.synchronize()?;
        }
        Ok(marks)
    }

    /// Starts copies between pieces and host memory at `host`, in parts that fit the bounce buffer.
    ///
    /// # Safety
    /// Pieces and host memory must stay valid until the stream has passed this.
    unsafe fn between(&mut self, pieces: &[Piece], host: u64, way: Way) -> Result<(), GpuError> {
        if pieces.len() <= PIECES_ALONE_MAX {
            let mut at = host;
            for piece in pieces {
                // SAFETY: the caller's contract.
                unsafe { self.whole(piece.address, at, piece.len, way) }?;
                at += piece.len;
            }
            return Ok(());
        }
        let bounce = self.bounce(BOUNCE_BYTES)?;
        let mut host = host;
        let mut rest = pieces;
        let mut skipped = 0;
        while let Some(first) = rest.first() {
            self.pieces.clear();
            let mut filled = 0;
            let mut next = 0;
            while let Some(piece) = rest.get(next).filter(|_| filled < BOUNCE_BYTES) {
                let begin = if next == 0 { skipped } else { 0 };
                let len = (piece.len - begin).min(BOUNCE_BYTES - filled);
                let (device, buffer) = (piece.address + begin, bounce + filled);
                let (source, target) = match way {
                    Way::ToHost => (device, buffer),
                    Way::ToDevice => (buffer, device),
                };
                self.pieces.push(CopyPiece {
                    source,
                    target,
                    len,
                });
                filled += len;
                if begin + len < piece.len {
                    skipped = begin + len;
                    break;
                }
                skipped = 0;
                next += 1;
            }
            debug_assert!(first.len > 0, "a piece has bytes");
            match way {
                Way::ToHost => {
                    // SAFETY: the caller's contract; the bounce buffer is ours.
                    unsafe { self.list() }?;
                    // SAFETY: as above; the stream keeps the order.
                    unsafe { self.whole(bounce, host, filled, way) }?;
                }
                Way::ToDevice => {
                    // SAFETY: as above.
                    unsafe { self.whole(bounce, host, filled, way) }?;
                    // SAFETY: as above.
                    unsafe { self.list() }?;
                }
            }
            host += filled;
            rest = &rest[next..];
        }
        Ok(())
    }

    /// Starts the driver's own copy of bytes that lie together on both sides.
    ///
    /// # Safety
    /// As for [`Self::between`].
    unsafe fn whole(&self, device: u64, host: u64, len: u64, way: Way) -> Result<(), GpuError> {
        let len = usize::try_from(len).map_err(|_| GpuError::Misuse("a copy of this length"))?;
        let (target, source) = match way {
            Way::ToHost => (host, device),
            Way::ToDevice => (device, host),
        };
        // SAFETY: the caller's contract.
        unsafe { self.stream.copy(target, source, len) }
    }

    /// Starts the kernel that copies `self.pieces`: as pages where all have one length.
    ///
    /// # Safety
    /// As for [`Self::between`].
    unsafe fn list(&mut self) -> Result<(), GpuError> {
        // SAFETY: the caller's contract.
        unsafe { self.list_on(None) }
    }

    /// The same on another stream than the lane's.
    ///
    /// # Safety
    /// As for [`Self::between`].
    unsafe fn list_on(&mut self, stream: Option<&Stream>) -> Result<(), GpuError> {
        let stream = stream.unwrap_or(&self.stream);
        let Some(first) = self.pieces.first() else {
            return Ok(());
        };
        let len = first.len;
        let launch = self.shared.launch;
        let page = u32::try_from(len).ok();
        let page = page.filter(|_| self.pieces.iter().all(|piece| piece.len == len));
        let Some(page) = page else {
            // SAFETY: the caller's contract.
            return unsafe {
                let kernels = &self.shared.kernels;
                kernels.copy_pieces(stream, &self.pieces, launch)
            };
        };
        self.pairs.clear();
        self.pairs.extend(self.pieces.iter().map(|piece| Pair {
            source: piece.source,
            target: piece.target,
        }));
        // SAFETY: the caller's contract.
        unsafe {
            let kernels = &self.shared.kernels;
            kernels.copy_pages(stream, &self.pairs, Rows::page(page), launch)
        }
    }

    /// Host bytes as an address for the driver.
    fn host_address(host: &Region, offset: u64, pieces: &[Piece]) -> Result<u64, GpuError> {
        let len = pieces.iter().map(|piece| piece.len).sum::<u64>();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let base = host.at(offset, len);
        let base =
            base.map_err(|_| GpuError::Misuse("host memory that is shorter than the pieces"))?;
        Ok(base.addr().get() as u64)
    }
}

impl Copier for CudaCopier {
    fn gather(&mut self, pieces: &[Piece], host: &Region, offset: u64) -> Result<(), DeviceError> {
        let shared = Arc::clone(&self.shared);
        let failed = |error| shared.refused("copying to the host", &error);
        let host = Self::host_address(host, offset, pieces).map_err(failed)?;
        // SAFETY: the engine's regions are alive, and nothing returns before the stream has passed the copies.
        let started = unsafe { self.between(pieces, host, Way::ToHost) };
        self.settle(&self.stream, started).map_err(failed)
    }

    fn scatter(&mut self, host: &Region, offset: u64, pieces: &[Piece]) -> Result<(), DeviceError> {
        let shared = Arc::clone(&self.shared);
        let failed = |error| shared.refused("copying from the host", &error);
        let host = Self::host_address(host, offset, pieces).map_err(failed)?;
        // SAFETY: as above.
        let started = unsafe { self.between(pieces, host, Way::ToDevice) };
        self.settle(&self.stream, started).map_err(failed)
    }

    fn copy(&mut self, moves: &[Move]) -> Result<(), DeviceError> {
        let (shared, pulls) = (Arc::clone(&self.shared), Arc::clone(&self.pulls));
        self.pieces.clear();
        let mut started = Ok(());
        for each in moves {
            if each.len >= MOVE_ALONE_BYTES {
                let len = usize::try_from(each.len).unwrap_or(usize::MAX);
                // SAFETY: the engine keeps both sides mapped, and nothing returns before the stream has passed the copies.
                started = started.and(unsafe { pulls.copy(each.target, each.source, len) });
            } else {
                self.pieces.push(CopyPiece {
                    source: each.source,
                    target: each.target,
                    len: each.len,
                });
            }
        }
        // SAFETY: as above.
        started = started.and(unsafe { self.list_on(Some(&pulls)) });
        self.settle(&pulls, started)
            .map_err(|error| shared.refused("copying on the device", &error))
    }

    fn copy_grid(&mut self, grid: &Grid<'_>) -> Result<(), DeviceError> {
        let shared = Arc::clone(&self.shared);
        self.pairs.clear();
        self.pairs.extend(grid.buffers.iter().map(|ends| Pair {
            source: ends.source,
            target: ends.target,
        }));
        let side = |items, stride| Side {
            items: Some(items),
            stride,
        };
        let window = Window {
            buffers: &self.pairs,
            items: u32::try_from(grid.source_items.len()).unwrap_or(u32::MAX),
            source: side(grid.source_items, grid.source.item),
            target: side(grid.target_items, grid.target.item),
            rows: Rows {
                count: grid.rows,
                bytes: grid.row_len,
                source_stride: grid.source.row,
                target_stride: grid.target.row,
            },
            range: grid.range.clone(),
        };
        let kernels = &shared.kernels;
        // SAFETY: as for `copy`.
        let started = unsafe { kernels.copy_window(&self.pulls, &window, shared.launch) };
        self.settle(&self.pulls, started)
            .map_err(|error| shared.refused("copying on the device", &error))
    }

    fn fetch(
        &mut self,
        pieces: &[Piece],
        host: &Arc<Region>,
        offset: u64,
    ) -> Result<Box<dyn Flight>, DeviceError> {
        let shared = Arc::clone(&self.shared);
        let failed = |error| shared.refused("copying to the host", &error);
        let address = Self::host_address(host, offset, pieces).map_err(failed)?;
        let len = pieces.iter().map(|piece| piece.len).sum();
        // SAFETY: the engine's regions are alive until the gather is done, which this waits for, and the flight keeps the
        // host's memory.
        let started = unsafe { self.start_fetch(pieces, address, len) };
        match started {
            Ok(marks) => Ok(self.flight(marks, host)),
            Err(error) => {
                // What was started must not outlive the gate that the caller holds.
                let finished = self.stream.synchronize();
                Err(failed(finished.err().unwrap_or(error)))
            }
        }
    }

    fn send(
        &mut self,
        host: &Arc<Region>,
        range: Range<u64>,
    ) -> Result<Box<dyn Flight>, DeviceError> {
        let shared = Arc::clone(&self.shared);
        let failed = |error| shared.refused("copying from the host", &error);
        let len = range.end.saturating_sub(range.start);
        let piece = Piece { address: 0, len };
        let address = Self::host_address(host, range.start, &[piece]).map_err(failed)?;
        if range.start == 0 {
            self.used = 0;
        }
        let bounce = self.bounce(host.len() as u64).map_err(failed)?;
        // SAFETY: the flight keeps the host's memory, and the buffer is ours.
        let started = unsafe { self.whole(bounce + range.start, address, len, Way::ToDevice) };
        match started.and_then(|()| self.mark()) {
            Ok(event) => Ok(self.flight(vec![Mark { bytes: len, event }], host)),
            Err(error) => {
                let finished = self.stream.synchronize();
                Err(failed(finished.err().unwrap_or(error)))
            }
        }
    }

    fn deliver(&mut self, pieces: &[Piece]) -> Result<(), DeviceError> {
        let shared = Arc::clone(&self.shared);
        let failed = |error| shared.refused("copying from the host", &error);
        let len = pieces.iter().map(|piece| piece.len).sum();
        let bounce = self.bounce(len).map_err(failed)?;
        self.lay_out(pieces, bounce, Way::ToDevice);
        // SAFETY: the engine's regions are alive, and nothing returns before the stream has passed the kernel.
        let started = unsafe { self.list() };
        self.settle(&self.stream, started).map_err(failed)
    }
}

impl CudaCopier {
    fn flight(&self, marks: Vec<Mark>, host: &Arc<Region>) -> Box<dyn Flight> {
        Box::new(CudaFlight::new(&self.shared, marks, host))
    }
}

impl Drop for CudaCopier {
    fn drop(&mut self) {
        // Flights use the buffer that is freed next.
        if let Err(error) = self.stream.synchronize() {
            tracing::debug!(%error, "the last copies of a lane failed");
        }
    }
}

impl fmt::Debug for CudaCopier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaCopier")
            .field("device", &self.shared.name)
            .finish_non_exhaustive()
    }
}
