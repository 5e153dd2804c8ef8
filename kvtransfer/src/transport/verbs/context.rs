//! An opened device: its limits, its ports and its asynchronous events.
//!
//! A process opens each device once, since a provider gives each context a page of doorbells and only the first few
//! have one of their own. A queue pair of an rdma_cm connection must be made on the context that librdmacm itself
//! keeps, so iWARP devices are opened through it.
#![expect(unsafe_code, reason = "calls into libibverbs")]

use std::{
    mem,
    os::fd::{BorrowedFd, RawFd},
    ptr::{self, NonNull},
    sync::Arc,
};

use super::{
    device::{self, DeviceInfo, GidEntry, Transport},
    error::{VerbsError, check, check_pointer},
    library::Library,
    sys::{self, ibv_async_event, ibv_context, ibv_device_attr, ibv_port_attr},
};

/// Who opened the device, and so who closes it.
enum Origin {
    /// `ibv_open_device`.
    Verbs,
    /// librdmacm's own; the list of its devices is held while we use one.
    Cm(*mut *mut ibv_context),
}

/// An opened device.
pub(crate) struct Context {
    library: Arc<Library>,
    raw: NonNull<ibv_context>,
    origin: Origin,
    info: DeviceInfo,
}

// SAFETY: libibverbs allows every call on a context from any thread at any time; the list is only freed, in drop.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// What a device says of its limits. Software must not believe `max_sge` (eRDMA says 1 and takes 6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceLimits {
    /// Firmware version.
    pub(crate) firmware: String,
    /// PCI vendor (0x1ded is Alibaba; 0x626d74 is siw's made-up one).
    pub(crate) vendor_id: u32,
    /// PCI part.
    pub(crate) part_id: u32,
    /// Queue pairs.
    pub(crate) max_qp: u32,
    /// Work requests of a queue.
    pub(crate) max_qp_wr: u32,
    /// The lesser of the send and receive elements of a request.
    pub(crate) max_sge: u32,
    /// Entries of a completion queue.
    pub(crate) max_cqe: u32,
    /// Regions.
    pub(crate) max_mr: u32,
    /// Bytes of a region.
    pub(crate) max_mr_bytes: u64,
    /// Ports.
    pub(crate) ports: u8,
}

/// What a port says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortFacts {
    /// `ibv_port_state`.
    pub(crate) state: u32,
    /// `ibv_mtu`, as queue pairs want it.
    pub(crate) active_mtu: u32,
    /// The longest message, in bytes.
    pub(crate) max_message_bytes: u32,
    /// InfiniBand's local address; zero on Ethernet.
    pub(crate) lid: u16,
    /// `IBV_LINK_LAYER_*`.
    pub(crate) link_layer: u8,
    /// Entries of the GID table.
    pub(crate) gid_count: u32,
}

impl PortFacts {
    /// Whether the port carries traffic.
    pub(crate) fn is_active(&self) -> bool {
        self.state == sys::IBV_PORT_ACTIVE
    }

    /// The path MTU in bytes.
    pub(crate) fn active_mtu_bytes(&self) -> Option<u32> {
        (sys::IBV_MTU_256..=sys::IBV_MTU_4096)
            .contains(&self.active_mtu)
            .then(|| 128 << self.active_mtu)
    }
}

/// What an asynchronous event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventTarget {
    /// A queue pair, by number.
    Qp(u32),
    /// A completion queue, by [`super::cq::Cq::key`].
    Cq(usize),
    /// A port.
    Port(i32),
    /// The device, or something that we do not use.
    Device,
}

/// An asynchronous event of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AsyncEvent {
    /// `IBV_EVENT_*`, or a number newer than this crate.
    pub(crate) kind: u32,
    /// What it is about.
    pub(crate) target: EventTarget,
}

impl Context {
    /// Opens `name` the way its transport needs it: iWARP devices through librdmacm, others directly.
    pub(crate) fn open(library: &Arc<Library>, name: &str) -> Result<Arc<Self>, VerbsError> {
        let info = find(library, name)?;
        match info.transport {
            Transport::Iwarp => Self::open_as(library, info, true),
            Transport::Ib | Transport::Other(_) => Self::open_as(library, info, false),
        }
    }

    /// Opens `name` for connections by rdma_cm, whatever its transport.
    pub(crate) fn open_for_cm(library: &Arc<Library>, name: &str) -> Result<Arc<Self>, VerbsError> {
        let info = find(library, name)?;
        Self::open_as(library, info, true)
    }

    fn open_as(
        library: &Arc<Library>,
        info: DeviceInfo,
        by_cm: bool,
    ) -> Result<Arc<Self>, VerbsError> {
        let mut open = library
            .contexts
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        open.retain(|context| context.strong_count() > 0);
        let found = open
            .iter()
            .filter_map(std::sync::Weak::upgrade)
            .find(|context| {
                context.info.name == info.name && matches!(context.origin, Origin::Cm(_)) == by_cm
            });
        if let Some(context) = found {
            return Ok(context);
        }
        let (raw, origin) = if by_cm {
            open_by_cm(library, &info.name)?
        } else {
            (open_by_verbs(library, &info.name)?, Origin::Verbs)
        };
        let context = Arc::new(Self {
            library: Arc::clone(library),
            raw,
            origin,
            info,
        });
        set_nonblocking(context.async_fd_raw())?;
        open.push(Arc::downgrade(&context));
        Ok(context)
    }

    /// The library that opened it.
    pub(crate) fn library(&self) -> &Arc<Library> {
        &self.library
    }

    /// What sysfs and the list of devices say of it.
    pub(crate) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    pub(super) fn raw(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }

    /// Interrupt vectors to which completion queues can be bound; at least one.
    pub(crate) fn completion_vectors(&self) -> u32 {
        // SAFETY: the context is open until drop, and the field never changes.
        let count = unsafe { (*self.raw()).num_comp_vectors };
        u32::try_from(count).unwrap_or(0).max(1)
    }

    /// The device's limits.
    pub(crate) fn limits(&self) -> Result<DeviceLimits, VerbsError> {
        // SAFETY: the struct is integers; zero is valid for each.
        let mut raw: ibv_device_attr = unsafe { mem::zeroed() };
        // SAFETY: the context is open; the struct is as the header declares it.
        let code = unsafe { (self.library.verbs.ibv_query_device)(self.raw(), &raw mut raw) };
        check("ibv_query_device", code)?;
        let count = |value: i32| u32::try_from(value).unwrap_or(0);
        Ok(DeviceLimits {
            firmware: device::text(&raw.fw_ver),
            vendor_id: raw.vendor_id,
            part_id: raw.vendor_part_id,
            max_qp: count(raw.max_qp),
            max_qp_wr: count(raw.max_qp_wr),
            max_sge: count(raw.max_sge),
            max_cqe: count(raw.max_cqe),
            max_mr: count(raw.max_mr),
            max_mr_bytes: raw.max_mr_size,
            ports: raw.phys_port_cnt,
        })
    }

    /// The facts of a port; ports count from 1.
    pub(crate) fn port(&self, port: u8) -> Result<PortFacts, VerbsError> {
        // SAFETY: the struct is integers; zero is valid for each.
        let mut raw: ibv_port_attr = unsafe { mem::zeroed() };
        // SAFETY: the context is open; the call writes at most the struct (its older, shorter form).
        let code = unsafe { (self.library.verbs.ibv_query_port)(self.raw(), port, &raw mut raw) };
        check("ibv_query_port", code)?;
        Ok(PortFacts {
            state: raw.state,
            active_mtu: raw.active_mtu,
            max_message_bytes: raw.max_msg_sz,
            lid: raw.lid,
            link_layer: raw.link_layer,
            gid_count: u32::try_from(raw.gid_tbl_len).unwrap_or(0),
        })
    }

    /// The filled entries of a port's GID table.
    pub(crate) fn gids(&self, port: u8) -> Vec<GidEntry> {
        device::gids(&self.library.sysfs, &self.info.name, port)
    }

    fn async_fd_raw(&self) -> RawFd {
        // SAFETY: the context is open until drop, and the field never changes.
        unsafe { (*self.raw()).async_fd }
    }

    /// Readable when [`Self::next_event`] has something.
    pub(crate) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the open context's, which the borrow keeps alive.
        unsafe { BorrowedFd::borrow_raw(self.async_fd_raw()) }
    }

    /// The next asynchronous event, if there is one; acknowledged when this returns.
    pub(crate) fn next_event(&self) -> Result<Option<AsyncEvent>, VerbsError> {
        let mut raw = ibv_async_event {
            element: sys::ibv_async_event_element {
                other: ptr::null_mut(),
            },
            event_type: u32::MAX,
        };
        // SAFETY: the context is open; its descriptor does not block.
        let code = unsafe { (self.library.verbs.ibv_get_async_event)(self.raw(), &raw mut raw) };
        if let Err(error) = check("ibv_get_async_event", code) {
            return match error.errno() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                _ => Err(error),
            };
        }
        let event = AsyncEvent {
            kind: raw.event_type,
            target: target(&raw),
        };
        // SAFETY: the event came from ibv_get_async_event and is acknowledged once.
        unsafe { (self.library.verbs.ibv_ack_async_event)(&raw mut raw) };
        Ok(Some(event))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        match self.origin {
            Origin::Verbs => {
                // SAFETY: every object of the context holds an Arc of it, so none is left.
                let code = unsafe { (self.library.verbs.ibv_close_device)(self.raw.as_ptr()) };
                if let Err(error) = check("ibv_close_device", code) {
                    tracing::warn!(device = %self.info.name, %error, "a device was not closed");
                }
            }
            Origin::Cm(list) => {
                if let Ok(cm) = &self.library.cm {
                    // SAFETY: the list came from rdma_get_devices and is given back once.
                    unsafe { (cm.rdma_free_devices)(list) };
                }
            }
        }
    }
}

fn find(library: &Library, name: &str) -> Result<DeviceInfo, VerbsError> {
    let mut devices = device::list(library)?;
    match devices.iter().position(|device| device.name == name) {
        Some(at) => Ok(devices.swap_remove(at)),
        None => Err(VerbsError::NoDevice {
            wanted: name.to_owned(),
            present: devices.into_iter().map(|device| device.name).collect(),
        }),
    }
}

fn gone(name: &str) -> VerbsError {
    VerbsError::NoDevice {
        wanted: name.to_owned(),
        present: Vec::new(),
    }
}

fn open_by_verbs(library: &Library, name: &str) -> Result<NonNull<ibv_context>, VerbsError> {
    device::with_list(library, |devices| {
        let device = devices.iter().copied().find(|&device| {
            // SAFETY: `with_list` keeps the device alive.
            let found = unsafe { device::name(device) };
            found == name
        });
        let device = device.ok_or_else(|| gone(name))?;
        // SAFETY: the device is in the list, which lives until this closure returns.
        let raw = unsafe { (library.verbs.ibv_open_device)(device) };
        check_pointer("ibv_open_device", raw)
    })?
}

fn open_by_cm(library: &Library, name: &str) -> Result<(NonNull<ibv_context>, Origin), VerbsError> {
    let cm = library.cm()?;
    let mut count = 0;
    // SAFETY: the count is ours; the call has no other condition.
    let list = unsafe { (cm.rdma_get_devices)(&raw mut count) };
    check_pointer("rdma_get_devices", list)?;
    let count = usize::try_from(count).unwrap_or(0).min(device::DEVICES_MAX);
    // SAFETY: the library returned an array of at least `count` pointers, ours until it is freed.
    let contexts = unsafe { std::slice::from_raw_parts(list, count) };
    let found = contexts.iter().copied().find_map(|raw| {
        let raw = NonNull::new(raw)?;
        // SAFETY: the context is open while the list is held.
        let device = unsafe { (*raw.as_ptr()).device };
        // SAFETY: an open context's device is alive.
        let found = unsafe { device::name(device) };
        (found == name).then_some(raw)
    });
    match found {
        Some(raw) => Ok((raw, Origin::Cm(list))),
        None => {
            // SAFETY: the list came from rdma_get_devices and nothing refers to it any more.
            unsafe { (cm.rdma_free_devices)(list) };
            Err(gone(name))
        }
    }
}

fn target(raw: &ibv_async_event) -> EventTarget {
    match raw.event_type {
        sys::IBV_EVENT_CQ_ERR => {
            // SAFETY: for this event the library filled the pointer; it is only compared.
            let cq = unsafe { raw.element.cq };
            EventTarget::Cq(cq.addr())
        }
        sys::IBV_EVENT_QP_FATAL..=sys::IBV_EVENT_PATH_MIG_ERR
        | sys::IBV_EVENT_QP_LAST_WQE_REACHED => {
            // SAFETY: for these events the library filled the pointer.
            let qp = unsafe { raw.element.qp };
            // SAFETY: destroying a queue pair waits for its events to be acknowledged, which comes after this.
            EventTarget::Qp(unsafe { (*qp).qp_num })
        }
        sys::IBV_EVENT_PORT_ACTIVE..=sys::IBV_EVENT_SM_CHANGE
        | sys::IBV_EVENT_CLIENT_REREGISTER
        | sys::IBV_EVENT_GID_CHANGE => {
            // SAFETY: for these events the library filled the number.
            EventTarget::Port(unsafe { raw.element.port_num })
        }
        _ => EventTarget::Device,
    }
}

/// Makes reads of a library's descriptor return at once.
pub(super) fn set_nonblocking(fd: RawFd) -> Result<(), VerbsError> {
    // SAFETY: the caller's object owns the descriptor and is alive.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let failed = |error: rustix::io::Errno| VerbsError::call("fcntl", error.raw_os_error());
    let flags = rustix::fs::fcntl_getfl(fd).map_err(failed)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_is_told_in_bytes_only_when_it_is_one() {
        let mut port = PortFacts {
            state: sys::IBV_PORT_ACTIVE,
            active_mtu: sys::IBV_MTU_1024,
            max_message_bytes: 1 << 23,
            lid: 0,
            link_layer: sys::IBV_LINK_LAYER_ETHERNET,
            gid_count: 16,
        };
        assert_eq!(port.active_mtu_bytes(), Some(1024));
        port.active_mtu = sys::IBV_MTU_4096;
        assert_eq!(port.active_mtu_bytes(), Some(4096));
        for odd in [0, 6, u32::MAX] {
            port.active_mtu = odd;
            assert_eq!(port.active_mtu_bytes(), None);
        }
    }

    #[test]
    fn event_numbers_find_their_target_and_unknown_ones_the_device() {
        let event = |kind| ibv_async_event {
            element: sys::ibv_async_event_element { port_num: 1 },
            event_type: kind,
        };
        assert_eq!(
            target(&event(sys::IBV_EVENT_PORT_ERR)),
            EventTarget::Port(1)
        );
        assert_eq!(
            target(&event(sys::IBV_EVENT_GID_CHANGE)),
            EventTarget::Port(1)
        );
        for kind in [sys::IBV_EVENT_DEVICE_FATAL, 20, u32::MAX] {
            assert_eq!(target(&event(kind)), EventTarget::Device, "{kind}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        let Ok(library) = Library::open() else {
            // Without the library there is nothing to open; library.rs tests that message.
            return;
        };
        assert!(Context::open(&library, "no_such_device").is_err());
    }
}
