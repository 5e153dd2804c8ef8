//! A device of host memory with the manners of a GPU: its addresses fault when the processor touches them, its copies know
//! no bytes outside of allocations, other processes take allocations into use by a description, and calls can be made to fail.
#![expect(unsafe_code, reason = "reserves addresses that nothing may touch")]

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::memory::{
    Region,
    device::{
        Attached, Awaited, Copier, Device, DeviceError, Exported, Flight, Grid, Move, Piece,
        Pinned, Share, Visibility,
    },
};

/// Addresses that fault.
#[derive(Debug)]
struct Reservation {
    base: NonNull<std::ffi::c_void>,
    len: usize,
}

// SAFETY: nothing is ever read or written through the address.
unsafe impl Send for Reservation {}
// SAFETY: as above.
unsafe impl Sync for Reservation {}

impl Reservation {
    fn new(len: usize) -> Result<Self, DeviceError> {
        // SAFETY: a mapping at an address of the kernel's choice touches no other.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let base = base.map_err(|error| refused("reserve", &error.to_string()))?;
        Ok(Self::at(base, len))
    }

    /// The memory behind a descriptor, at addresses that work: for RDMA devices that reach it, whose stand-ins copy by plain
    /// addresses. The engine's own accesses are still refused, by [`Region`].
    fn mapped(fd: &OwnedFd, len: usize) -> Result<Self, DeviceError> {
        // SAFETY: as above; the descriptor is sealed against shrinking.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        };
        let base = base.map_err(|error| refused("map", &error.to_string()))?;
        Ok(Self::at(base, len))
    }

    fn at(base: *mut std::ffi::c_void, len: usize) -> Self {
        let base = NonNull::new(base).expect("invariant: a mapping is never at null");
        let made = Self { base, len };
        addresses().insert(made.address(), len as u64);
        made
    }

    fn address(&self) -> u64 {
        self.base.addr().get() as u64
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        addresses().remove(&self.address());
        // SAFETY: the mapping is our own and is unmapped once, here.
        let unmapped = unsafe { munmap(self.base.as_ptr(), self.len) };
        debug_assert!(unmapped.is_ok(), "our own mapping");
    }
}

/// Every device's addresses in this process, with their lengths.
fn addresses() -> MutexGuard<'static, BTreeMap<u64, u64>> {
    static ADDRESSES: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());
    ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether an address is a device's, which RDMA devices without peer memory do not know.
pub(crate) fn is_device_address(address: u64) -> bool {
    let addresses = addresses();
    let below = addresses.range(..=address).next_back();
    below.is_some_and(|(base, len)| address - base < *len)
}

fn refused(call: &'static str, reason: &str) -> DeviceError {
    DeviceError {
        call,
        device: NAME.into(),
        reason: reason.into(),
    }
}

const NAME: &str = "fake:0";

impl Default for FakeDevice {
    fn default() -> Self {
        Self::named(NAME)
    }
}

/// Memory of an allocation, and where the device has it.
#[derive(Clone, Debug)]
struct Allocation {
    memory: Arc<Region>,
    _reservation: Arc<Reservation>,
    len: u64,
}

#[derive(Debug, Default)]
struct Inner {
    allocations: Mutex<BTreeMap<u64, Allocation>>,
    pulls: AtomicU64,
    grids: AtomicU64,
    gathered: AtomicU64,
    scattered: AtomicU64,
    attached: AtomicUsize,
    unshared: AtomicUsize,
    events: Mutex<BTreeMap<u64, Arc<AtomicBool>>>,
    shares_nothing: AtomicBool,
    attaches_nothing: AtomicBool,
    copies_nothing: AtomicBool,
    /// RDMA devices reach its memory, if they can.
    is_reachable: AtomicBool,
    must_flush: AtomicBool,
    flushes: AtomicUsize,
}

/// What the device was asked to do so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeCounts {
    /// Bytes copied to host memory.
    pub gathered: u64,
    /// Bytes copied from host memory.
    pub scattered: u64,
    /// Bytes copied from device to device memory.
    pub pulled: u64,
    /// Copies from device to device that were described and not listed.
    pub grids: u64,
    /// Allocations of other processes in use now.
    pub attached: usize,
    /// How often it was told that its memory goes away.
    pub unshared: usize,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct FakeDevice {
    name: &'static str,
    inner: Arc<Inner>,
}

impl FakeDevice {
    /// A device without allocations.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that is not the others' device.
    pub fn named(name: &'static str) -> Self {
        Self {
            name,
            inner: Arc::default(),
        }
    }

    /// A region of new memory, zeroed.
    ///
    /// # Panics
    /// If the host has none.
    pub fn region(&self, len: usize) -> Region {
        let memory = Region::memfd("fake-device", len).expect("this host has memory");
        let address = self.place(Arc::new(memory)).expect("addresses can be had");
        let device: Arc<dyn Device> = Arc::new(self.clone());
        // SAFETY: the allocation lives as long as the device, which the region keeps.
        unsafe { Region::device(device, address, len) }.expect("a length that was just allocated")
    }

    /// What it was asked to do.
    pub fn counts(&self) -> FakeCounts {
        let inner = &self.inner;
        FakeCounts {
            gathered: inner.gathered.load(Ordering::SeqCst),
            scattered: inner.scattered.load(Ordering::SeqCst),
            pulled: inner.pulls.load(Ordering::SeqCst),
            grids: inner.grids.load(Ordering::SeqCst),
            attached: inner.attached.load(Ordering::SeqCst),
            unshared: inner.unshared.load(Ordering::SeqCst),
        }
    }

    /// From now on allocations cannot be shared, as with memory of a CUDA pool.
    pub fn share_nothing(&self) {
        self.inner.shares_nothing.store(true, Ordering::SeqCst);
    }

    /// From now on allocations of others cannot be reached, as where peer access is refused.
    pub fn attach_nothing(&self) {
        self.inner.attaches_nothing.store(true, Ordering::SeqCst);
    }

    /// From now on copies fail, as after an illegal address on a GPU.
    pub fn break_copies(&self) {
        self.inner.copies_nothing.store(true, Ordering::SeqCst);
    }

    /// Records an application's event under a number: what it stood for before is no longer to be found by it.
    pub fn record_event(&self, event: u64) {
        self.events().insert(event, Arc::default());
    }

    /// What the event stands for has happened.
    pub fn complete_event(&self, event: u64) {
        if let Some(happened) = self.events().get(&event) {
            happened.store(true, Ordering::SeqCst);
        }
    }

    fn events(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<AtomicBool>>> {
        let events = self.inner.events.lock();
        events.unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on memory is made so that RDMA devices reach it: by dma-bufs, or by peer memory where they know that.
    pub fn let_rdma_reach(&self) {
        self.inner.is_reachable.store(true, Ordering::SeqCst);
    }

    /// From now on its kernels see writes of RDMA devices after a flush only.
    pub fn require_flushes(&self) {
        self.inner.must_flush.store(true, Ordering::SeqCst);
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> usize {
        self.inner.flushes.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Allocation>> {
        self.inner
            .allocations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, memory: Arc<Region>) -> Result<u64, DeviceError> {
        let is_reachable = self.inner.is_reachable.load(Ordering::SeqCst);
        let reservation = match memory.memfd_fd().filter(|_| is_reachable) {
            Some(fd) => Reservation::mapped(fd, memory.len())?,
            None => Reservation::new(memory.len())?,
        };
        let address = reservation.address();
        let allocation = Allocation {
            len: memory.len() as u64,
            memory,
            _reservation: Arc::new(reservation),
        };
        self.lock().insert(address, allocation);
        Ok(address)
    }

    /// The allocation that holds a range, and where in it.
    fn find(&self, address: u64, len: u64) -> Result<(Allocation, u64), DeviceError> {
        let allocations = self.lock();
        let below = allocations.range(..=address).next_back();
        let outside = || refused("copy", "an illegal address was encountered");
        let (base, allocation) = below.ok_or_else(outside)?;
        let offset = address - base;
        let end = offset.checked_add(len).ok_or_else(outside)?;
        if end > allocation.len {
            return Err(outside());
        }
        Ok((allocation.clone(), offset))
    }

    fn check_copies(&self) -> Result<(), DeviceError> {
        if self.inner.copies_nothing.load(Ordering::SeqCst) {
            return Err(refused("copy", "the device is broken (so said the test)"));
        }
        Ok(())
    }
}

/// Another process's allocation.
#[derive(Debug)]
struct FakeAttached {
    device: FakeDevice,
    address: u64,
    len: u64,
}

impl Attached for FakeAttached {
    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for FakeAttached {
    fn drop(&mut self) {
        self.device.lock().remove(&self.address);
        self.device.inner.attached.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct FakeAwaited {
    device: FakeDevice,
    happened: Arc<AtomicBool>,
}

impl Awaited for FakeAwaited {
    fn is_done(&self) -> Result<bool, DeviceError> {
        self.device.check_copies()?;
        Ok(self.happened.load(Ordering::SeqCst))
    }
}

#[derive(Debug)]
struct FakePinned;

impl Pinned for FakePinned {}

/// A lane's copies, and what it sent to the device's buffer.
#[derive(Debug)]
struct FakeCopier {
    device: FakeDevice,
    sent: Vec<Arc<Way>>,
}

/// Bytes between the host and a buffer, which move when somebody waits for them and not before: as late as can be.
#[derive(Debug)]
struct Way {
    host: Arc<Region>,
    offset: u64,
    state: Mutex<Moved>,
    is_to_host: bool,
}

#[derive(Debug)]
struct Moved {
    buffer: Vec<u8>,
    bytes: usize,
}

impl Way {
    fn new(host: &Arc<Region>, offset: u64, buffer: Vec<u8>, is_to_host: bool) -> Arc<Self> {
        let state = Mutex::new(Moved { buffer, bytes: 0 });
        Arc::new(Self {
            host: Arc::clone(host),
            offset,
            state,
            is_to_host,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Moved> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn go_on(&self, bytes: u64) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let wanted = usize::try_from(bytes).unwrap_or(usize::MAX);
        let (from, to) = (state.bytes, wanted.min(state.buffer.len()));
        if from >= to {
            return Ok(());
        }
        let at = self.offset + from as u64;
        let part = &mut state.buffer[from..to];
        let moved = if self.is_to_host {
            self.host.write_at(at, part)
        } else {
            self.host.read_at(at, part)
        };
        moved.map_err(|error| host_error(&error))?;
        state.bytes = to;
        Ok(())
    }
}

#[derive(Debug)]
struct FakeFlight(Arc<Way>);

impl Flight for FakeFlight {
    fn wait(&self, bytes: u64) -> Result<(), DeviceError> {
        self.0.go_on(bytes)
    }
}

fn host_error(error: &crate::memory::RegionError) -> DeviceError {
    refused("copy", &error.to_string())
}

impl Copier for FakeCopier {
    fn gather(
        &mut self,
        pieces: &[Piece],
        host: &Region,
        mut offset: u64,
    ) -> Result<(), DeviceError> {
        self.device.check_copies()?;
        for piece in pieces {
            let (allocation, at) = self.device.find(piece.address, piece.len)?;
            let len = usize::try_from(piece.len).expect("invariant: within an allocation");
            let copied = host.copy_from(offset, &allocation.memory, at, len);
            copied.map_err(|error| host_error(&error))?;
            offset += piece.len;
            self.device
                .inner
                .gathered
                .fetch_add(piece.len, Ordering::SeqCst);
        }
        Ok(())
    }

    fn scatter(
        &mut self,
        host: &Region,
        mut offset: u64,
        pieces: &[Piece],
    ) -> Result<(), DeviceError> {
        self.device.check_copies()?;
        for piece in pieces {
            let (allocation, at) = self.device.find(piece.address, piece.len)?;
            let len = usize::try_from(piece.len).expect("invariant: within an allocation");
            let copied = allocation.memory.copy_from(at, host, offset, len);
            copied.map_err(|error| host_error(&error))?;
            offset += piece.len;
            self.device
                .inner
                .scattered
                .fetch_add(piece.len, Ordering::SeqCst);
        }
        Ok(())
    }

    fn copy(&mut self, moves: &[Move]) -> Result<(), DeviceError> {
        self.device.check_copies()?;
        for each in moves {
            let (source, from) = self.device.find(each.source, each.len)?;
            let (target, to) = self.device.find(each.target, each.len)?;
            let len = usize::try_from(each.len).expect("invariant: within an allocation");
            let copied = target.memory.copy_from(to, &source.memory, from, len);
            copied.map_err(|error| host_error(&error))?;
            self.device
                .inner
                .pulls
                .fetch_add(each.len, Ordering::SeqCst);
        }
        Ok(())
    }

    fn copy_grid(&mut self, grid: &Grid<'_>) -> Result<(), DeviceError> {
        let item_bytes = u64::from(grid.rows) * u64::from(grid.row_len);
        let items = grid.source_items.len() as u64;
        let mut at = grid.range.start;
        while at < grid.range.end {
            let (number, within) = (at / item_bytes, at % item_bytes);
            let row = within / u64::from(grid.row_len);
            let byte = within % u64::from(grid.row_len);
            let index = |number: u64| usize::try_from(number).expect("invariant: few");
            let buffer = grid.buffers.get(index(number / items));
            let buffer = buffer.ok_or_else(|| refused("copy", "a range beyond its buffers"))?;
            let item = index(number % items);
            let place = |list: &[i32]| u64::from(list[item].cast_unsigned());
            let (from, to) = (place(grid.source_items), place(grid.target_items));
            let len = (u64::from(grid.row_len) - byte).min(grid.range.end - at);
            self.copy(&[Move {
                source: buffer.source + from * grid.source.item + row * grid.source.row + byte,
                target: buffer.target + to * grid.target.item + row * grid.target.row + byte,
                len,
            }])?;
            at += len;
        }
        self.device.inner.grids.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn fetch(
        &mut self,
        pieces: &[Piece],
        host: &Arc<Region>,
        offset: u64,
    ) -> Result<Box<dyn Flight>, DeviceError> {
        let len = pieces.iter().map(|piece| piece.len).sum::<u64>();
        let len = usize::try_from(len).expect("invariant: within allocations");
        let buffer = Region::heap(len).map_err(|error| host_error(&error))?;
        self.gather(pieces, &buffer, 0)?;
        let mut bytes = vec![0; len];
        let read = buffer.read_at(0, &mut bytes);
        read.map_err(|error| host_error(&error))?;
        Ok(Box::new(FakeFlight(Way::new(host, offset, bytes, true))))
    }

    fn send(
        &mut self,
        host: &Arc<Region>,
        range: Range<u64>,
    ) -> Result<Box<dyn Flight>, DeviceError> {
        self.device.check_copies()?;
        if range.start == 0 {
            self.sent.clear();
        }
        let len = usize::try_from(range.end - range.start).expect("invariant: within a chunk");
        let way = Way::new(host, range.start, vec![0; len], false);
        self.sent.push(Arc::clone(&way));
        Ok(Box::new(FakeFlight(way)))
    }

    fn deliver(&mut self, pieces: &[Piece]) -> Result<(), DeviceError> {
        let mut bytes = Vec::new();
        for way in self.sent.drain(..) {
            way.go_on(u64::MAX)?;
            bytes.extend_from_slice(&way.lock().buffer);
        }
        let buffer = Region::heap(bytes.len()).map_err(|error| host_error(&error))?;
        let written = buffer.write_at(0, &bytes);
        written.map_err(|error| host_error(&error))?;
        self.scatter(&buffer, 0, pieces)
    }
}

impl Device for FakeDevice {
    fn name(&self) -> String {
        self.name.into()
    }

    fn share(&self, address: u64, len: u64) -> Result<Share, DeviceError> {
        if self.inner.shares_nothing.load(Ordering::SeqCst) {
            return Err(refused("share", "memory of a pool has no handle"));
        }
        let (allocation, offset) = self.find(address, len)?;
        let fd = allocation.memory.memfd_fd().map(AsRawFd::as_raw_fd);
        let fd = fd.ok_or_else(|| refused("share", "the allocation is another process's"))?;
        let mut bytes = std::process::id().to_le_bytes().to_vec();
        bytes.extend_from_slice(&fd.to_le_bytes());
        bytes.extend_from_slice(&allocation.len.to_le_bytes());
        Ok(Share {
            allocation: bytes,
            offset,
        })
    }

    fn unshare(&self) {
        self.inner.unshared.fetch_add(1, Ordering::SeqCst);
    }

    fn attach(&self, allocation: &[u8]) -> Result<Arc<dyn Attached>, DeviceError> {
        if self.inner.attaches_nothing.load(Ordering::SeqCst) {
            return Err(refused("attach", "peer access is not supported"));
        }
        let bad = |reason: &str| refused("attach", reason);
        let bytes: &[u8; 16] = allocation
            .try_into()
            .map_err(|_| bad("it is not a description of ours"))?;
        let [pid, fd, len @ ..] = bytemuck::cast::<[u8; 16], [u32; 4]>(*bytes);
        let len = u64::from(len[0]) | u64::from(len[1]) << 32;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/fd/{fd}"))
            .map_err(|error| bad(&error.to_string()))?;
        let bytes = usize::try_from(len).map_err(|_| bad("too long"))?;
        let memory = Region::peer_memfd(OwnedFd::from(file), bytes);
        let memory = memory.map_err(|error| bad(&error.to_string()))?;
        let address = self.place(Arc::new(memory))?;
        self.inner.attached.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(FakeAttached {
            device: self.clone(),
            address,
            len,
        }))
    }

    fn copier(&self) -> Result<Box<dyn Copier>, DeviceError> {
        Ok(Box::new(FakeCopier {
            device: self.clone(),
            sent: Vec::new(),
        }))
    }

    fn await_event(&self, event: u64) -> Result<Box<dyn Awaited>, DeviceError> {
        let events = self.events();
        let happened = events.get(&event);
        let happened = happened.ok_or_else(|| refused("await", "no such event"))?;
        Ok(Box::new(FakeAwaited {
            device: self.clone(),
            happened: Arc::clone(happened),
        }))
    }

    fn pin(&self, _region: &Arc<Region>) -> Result<Box<dyn Pinned>, DeviceError> {
        Ok(Box::new(FakePinned))
    }

    fn pci_address(&self) -> String {
        "0000:fa:4e.0".into()
    }

    fn export(&self, address: u64, len: u64) -> Result<Exported, DeviceError> {
        if !self.inner.is_reachable.load(Ordering::SeqCst) {
            return Err(refused("export", "its driver exports none"));
        }
        let (allocation, offset) = self.find(address, len)?;
        let fd = allocation.memory.memfd_fd().map(OwnedFd::try_clone);
        let fd = fd.ok_or_else(|| refused("export", "the allocation is another process's"))?;
        let descriptor = fd.map_err(|error| refused("export", &error.to_string()))?;
        Ok(Exported { descriptor, offset })
    }

    fn visibility(&self) -> Visibility {
        if self.inner.must_flush.load(Ordering::SeqCst) {
            Visibility::AfterFlush
        } else {
            Visibility::AtOnce
        }
    }

    fn flush_writes(&self) -> Result<(), DeviceError> {
        self.check_copies()?;
        self.inner.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
