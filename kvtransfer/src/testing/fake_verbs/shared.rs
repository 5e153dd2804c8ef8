//! What the C objects of a fabric point to, and how the two calls without an argument find their fabric.
#![expect(
    unsafe_code,
    reason = "C callers hold raw pointers to the fabric's objects"
)]

use std::{
    cell::Cell,
    ffi::{c_char, c_int},
    fmt,
    ops::{Deref, DerefMut},
    ptr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak, atomic::AtomicU32},
};

use super::{post, state::State, sysfs::Sysfs};
use crate::transport::verbs::sys;

/// Most fabrics alive in one process: `ibv_get_device_list` has no argument that could name one, so each fabric takes
/// one of so many compiled copies of that call.
pub(super) const FABRICS_MAX: usize = 16;

/// Completion vectors of a device.
pub(super) const COMPLETION_VECTORS: c_int = 4;

static FABRICS: Mutex<[Weak<Shared>; FABRICS_MAX]> =
    Mutex::new([const { Weak::new() }; FABRICS_MAX]);

thread_local! {
    /// Locks of fabrics that this thread holds or waits for.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
}

/// Whether this thread is inside a fabric: what it does then an adapter would do.
pub(super) fn is_inside() -> bool {
    INSIDE.with(Cell::get) > 0
}

/// A fabric's state, locked.
pub(super) struct Locked<'a>(MutexGuard<'a, State>);

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.0
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.0
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        INSIDE.with(|inside| inside.set(inside.get() - 1));
    }
}

/// An adapter as C sees it, and which one of which fabric it is.
#[repr(C)]
pub(super) struct FakeDevice {
    pub(super) c: sys::ibv_device,
    pub(super) shared: *const Shared,
    pub(super) index: usize,
}

/// An opened adapter.
#[repr(C)]
pub(super) struct FakeContext {
    pub(super) c: sys::ibv_context,
    pub(super) shared: *const Shared,
    pub(super) index: usize,
}

/// A completion queue.
#[repr(C)]
pub(super) struct FakeCompletions {
    pub(super) c: sys::ibv_cq,
    pub(super) pollers: Arc<AtomicU32>,
}

/// Memory of C objects. It is kept as long as the fabric, so that using a destroyed object is found, not undefined.
#[derive(Default)]
struct Arena {
    kept: Vec<Kept>,
}

/// An object of the arena and how it is freed.
struct Kept {
    object: *mut u8,
    free: unsafe fn(*mut u8),
}

/// A fabric: its state, and the memory of its C objects.
pub(super) struct Shared {
    state: Mutex<State>,
    arena: Mutex<Arena>,
    pub(super) slot: usize,
    pub(super) sysfs: Sysfs,
    devices: OnceLock<Vec<*mut FakeDevice>>,
    /// The contexts that the connection manager keeps open.
    managed: OnceLock<Vec<*mut FakeContext>>,
}

// SAFETY: the raw pointers name objects of the arena, which live as long as this value; what they point to is written
// once before it is shared, and afterwards only by the calls whose contracts say who may call them.
unsafe impl Send for Shared {}
// SAFETY: as above; everything mutable is behind the mutexes.
unsafe impl Sync for Shared {}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("slot", &self.slot).finish()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let arena = self.arena.get_mut().unwrap_or_else(PoisonError::into_inner);
        for Kept { object, free } in arena.kept.drain(..) {
            // SAFETY: `keep` made the pair, and each object is freed once, here.
            unsafe { free(object) };
        }
    }
}

/// # Safety
/// `object` must come from `Box::<T>::into_raw` and not be freed yet.
unsafe fn free<T>(object: *mut u8) {
    // SAFETY: by this function's contract.
    drop(unsafe { Box::from_raw(object.cast::<T>()) });
}

impl Shared {
    /// Takes a slot and builds the devices. `None` when every slot is taken by a living fabric.
    pub(super) fn new(state: State, names: &[String], sysfs: Sysfs) -> Option<Arc<Self>> {
        let mut fabrics = FABRICS.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = free_slot(&*fabrics)?;
        let looks_iwarp = state.behaviour.looks_iwarp;
        let shared = Arc::new(Self {
            state: Mutex::new(state),
            arena: Mutex::default(),
            slot,
            sysfs,
            devices: OnceLock::new(),
            managed: OnceLock::new(),
        });
        let device = |(index, name): (usize, &String)| {
            let class = shared.sysfs.root().join("class");
            shared.keep(FakeDevice {
                c: sys::ibv_device {
                    _ops: [None; 2],
                    node_type: if looks_iwarp {
                        sys::IBV_NODE_RNIC
                    } else {
                        sys::IBV_NODE_CA
                    },
                    transport_type: if looks_iwarp {
                        sys::IBV_TRANSPORT_IWARP
                    } else {
                        sys::IBV_TRANSPORT_IB
                    },
                    name: c_text(name),
                    dev_name: c_text(&format!("uverbs{index}")),
                    dev_path: c_text(
                        &class
                            .join("infiniband_verbs")
                            .join(format!("uverbs{index}"))
                            .to_string_lossy(),
                    ),
                    ibdev_path: c_text(&class.join("infiniband").join(name).to_string_lossy()),
                },
                shared: Arc::as_ptr(&shared),
                index,
            })
        };
        let devices = names.iter().enumerate().map(device).collect();
        shared.devices.get_or_init(|| devices);
        fabrics[slot] = Arc::downgrade(&shared);
        Some(shared)
    }

    /// The fabric in a slot.
    pub(super) fn in_slot(slot: usize) -> Option<Arc<Self>> {
        let fabrics = FABRICS.lock().unwrap_or_else(PoisonError::into_inner);
        fabrics.get(slot)?.upgrade()
    }

    pub(super) fn lock(&self) -> Locked<'_> {
        INSIDE.with(|inside| inside.set(inside.get() + 1));
        Locked(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn devices(&self) -> &[*mut FakeDevice] {
        self.devices.get().map_or(&[], Vec::as_slice)
    }

    /// Gives an object the life of the fabric.
    pub(super) fn keep<T>(&self, object: T) -> *mut T {
        let object = Box::into_raw(Box::new(object));
        let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        arena.kept.push(Kept {
            object: object.cast(),
            free: free::<T>,
        });
        object
    }

    /// Makes the fabric live at least until [`Shared::release`], because C got an object that needs it.
    pub(super) fn retain(&self) {
        // SAFETY: `self` lies in an `Arc` (there is no other constructor), which is alive because it is borrowed.
        unsafe { Arc::increment_strong_count(ptr::from_ref(self)) };
    }

    /// Undoes one [`Shared::retain`].
    ///
    /// # Safety
    /// There must be a `retain` that has not been undone, and no reference to the fabric may be used afterwards.
    pub(super) unsafe fn release(shared: *const Self) {
        // SAFETY: by this function's contract the count includes ours.
        unsafe { Arc::decrement_strong_count(shared) };
    }

    /// A new context of a device.
    pub(super) fn open(&self, index: usize) -> Option<*mut FakeContext> {
        let device = self.devices().get(index)?;
        let async_fd = self.lock().devices.get(index)?.events.raw_fd();
        // SAFETY: a mutex and condition variable of zeroes are initialised ones on Linux, and nobody uses them.
        let mutex = unsafe { std::mem::zeroed() };
        Some(self.keep(FakeContext {
            c: sys::ibv_context {
                device: device.cast(),
                ops: post::operations(),
                cmd_fd: -1,
                async_fd,
                num_comp_vectors: COMPLETION_VECTORS,
                mutex,
                abi_compat: ptr::null_mut(),
            },
            shared: ptr::from_ref(self),
            index,
        }))
    }

    /// The contexts of the connection manager, one per device, opened at first use.
    pub(super) fn managed(&self) -> &[*mut FakeContext] {
        self.managed.get_or_init(|| {
            let all = 0..self.devices().len();
            all.filter_map(|index| self.open(index)).collect()
        })
    }
}

/// The first slot whose fabric is gone.
pub(super) fn free_slot(fabrics: &[Weak<Shared>]) -> Option<usize> {
    fabrics.iter().position(|taken| taken.strong_count() == 0)
}

/// Text as a C array, cut to fit with its final zero.
fn c_text<const SIZE: usize>(text: &str) -> [c_char; SIZE] {
    let mut array = [0; SIZE];
    for (slot, byte) in array[..SIZE - 1].iter_mut().zip(text.bytes()) {
        *slot = c_char::from_ne_bytes([byte]);
    }
    array
}

/// The fabric and the device's index that a context belongs to.
///
/// # Safety
/// `context` must come from `ibv_open_device` or `rdma_get_devices` of a fake fabric that is alive for `'a`.
pub(super) unsafe fn fabric_of<'a>(context: *mut sys::ibv_context) -> (&'a Shared, usize) {
    // SAFETY: every context of a fabric is a `FakeContext`, which the arena keeps as long as the fabric.
    let context = unsafe { &*context.cast::<FakeContext>() };
    // SAFETY: the fabric is alive for `'a` by this function's contract.
    (unsafe { &*context.shared }, context.index)
}

/// Sets this thread's `errno`.
pub(super) fn set_errno(errno: c_int) {
    // SAFETY: the call has no preconditions.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the place is this thread's own.
    unsafe { *place = errno };
}
