//! libibverbs and librdmacm, opened at run time: tables of their calls.
//!
//! Nothing is linked, so one binary runs on hosts with and without RDMA, and uses the host's own rdma-core, whose
//! providers match its kernel drivers. The tables are plain function pointers, so that tests put a provider of their
//! own behind them.
#![expect(unsafe_code, reason = "symbols are looked up by name and given a type")]

use std::{
    ffi::{c_int, c_uint, c_void},
    mem::ManuallyDrop,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, Weak},
};

use libc::sockaddr;
use libloading::os::unix::{Library as SharedObject, RTLD_LOCAL, RTLD_NOW};

use super::{
    context::Context,
    error::VerbsError,
    probe::Probed,
    sys::{
        ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr,
        ibv_gid, ibv_mr, ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
        rdma_cm_event, rdma_cm_id, rdma_conn_param, rdma_event_channel,
    },
};

const LIBIBVERBS: &str = "libibverbs.so.1";
const LIBRDMACM: &str = "librdmacm.so.1";

/// Declares a table of calls and how it is filled from a shared object.
macro_rules! call_table {
    (
        $(#[$attribute:meta])*
        $name:ident from $library:ident {
            $($(#[$doc:meta])* $symbol:ident: fn($($argument:ty),*) $(-> $result:ty)?;)*
        }
        optional {
            $($(#[$optional_doc:meta])* $optional:ident: fn($($optional_argument:ty),*) $(-> $optional_result:ty)?;)*
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name {
            $($(#[$doc])* pub(crate) $symbol: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            $($(#[$optional_doc])*
                pub(crate) $optional: Option<unsafe extern "C" fn($($optional_argument),*) $(-> $optional_result)?>,)*
        }

        impl $name {
            fn load(object: &SharedObject) -> Result<Self, VerbsError> {
                Ok(Self {
                    $($symbol: {
                        // SAFETY: the header declares the symbol with this type.
                        let found = unsafe { symbol(object, concat!(stringify!($symbol), "\0")) };
                        found.ok_or(VerbsError::MissingSymbol {
                            library: $library,
                            symbol: stringify!($symbol),
                        })?
                    },)*
                    $($optional: {
                        // SAFETY: the header declares the symbol with this type.
                        unsafe { symbol(object, concat!(stringify!($optional), "\0")) }
                    },)*
                })
            }
        }
    };
}

call_table! {
    /// The calls of libibverbs. The contracts are those of `infiniband/verbs.h`.
    VerbsCalls from LIBIBVERBS {
        /// A null-terminated array; null with `ENOSYS` when the kernel has no uverbs.
        ibv_get_device_list: fn(*mut c_int) -> *mut *mut ibv_device;
        /// Frees the array and the devices that were not opened.
        ibv_free_device_list: fn(*mut *mut ibv_device);
        /// Big-endian.
        ibv_get_device_guid: fn(*mut ibv_device) -> u64;
        /// Null on failure.
        ibv_open_device: fn(*mut ibv_device) -> *mut ibv_context;
        /// Closes the device.
        ibv_close_device: fn(*mut ibv_context) -> c_int;
        /// Blocks unless the context's `async_fd` is non-blocking.
        ibv_get_async_event: fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
        /// Must follow each event before its object is destroyed.
        ibv_ack_async_event: fn(*mut ibv_async_event);
        /// Fills the whole struct.
        ibv_query_device: fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
        /// Fills the struct up to `flags`; see [`ibv_port_attr`].
        ibv_query_port: fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
        /// Reads one entry of a port's GID table.
        ibv_query_gid: fn(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
        /// Null on failure.
        ibv_alloc_pd: fn(*mut ibv_context) -> *mut ibv_pd;
        /// Fails while regions or queue pairs live in it.
        ibv_dealloc_pd: fn(*mut ibv_pd) -> c_int;
        /// Pins and maps; null on failure.
        ibv_reg_mr: fn(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
        /// Unmaps and unpins.
        ibv_dereg_mr: fn(*mut ibv_mr) -> c_int;
        /// Null on failure.
        ibv_create_comp_channel: fn(*mut ibv_context) -> *mut ibv_comp_channel;
        /// Fails while completion queues use it.
        ibv_destroy_comp_channel: fn(*mut ibv_comp_channel) -> c_int;
        /// Context, entries, user context, channel or null, completion vector.
        ibv_create_cq: fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
        /// Waits for every event of the queue to be acknowledged.
        ibv_destroy_cq: fn(*mut ibv_cq) -> c_int;
        /// Blocks unless the channel's `fd` is non-blocking.
        ibv_get_cq_event: fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
        /// Acknowledges so many events.
        ibv_ack_cq_events: fn(*mut ibv_cq, c_uint);
        /// Null on failure; writes the capabilities it gave into the attributes.
        ibv_create_qp: fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
        /// Changes what the mask names.
        ibv_modify_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
        /// Waits for every event of the queue pair to be acknowledged.
        ibv_destroy_qp: fn(*mut ibv_qp) -> c_int;
    }
    optional {
        /// Takes access bits of the optional range (since rdma-core 28).
        ibv_reg_mr_iova2: fn(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
        /// Offset, length, address, descriptor, access (since rdma-core 34).
        ibv_reg_dmabuf_mr: fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
    }
}

call_table! {
    /// The calls of librdmacm. The contracts are those of `rdma/rdma_cma.h`.
    CmCalls from LIBRDMACM {
        /// The contexts that the library itself keeps open, null-terminated; a queue pair of a connection must be made
        /// on one of these.
        rdma_get_devices: fn(*mut c_int) -> *mut *mut ibv_context;
        /// Gives the array back.
        rdma_free_devices: fn(*mut *mut ibv_context);
        /// Null on failure.
        rdma_create_event_channel: fn() -> *mut rdma_event_channel;
        /// After every id of the channel.
        rdma_destroy_event_channel: fn(*mut rdma_event_channel);
        /// Channel, result, user context, port space.
        rdma_create_id: fn(*mut rdma_event_channel, *mut *mut rdma_cm_id, *mut c_void, c_uint) -> c_int;
        /// Waits for every event of the id to be acknowledged.
        rdma_destroy_id: fn(*mut rdma_cm_id) -> c_int;
        /// Binds to a local address, and so to a device.
        rdma_bind_addr: fn(*mut rdma_cm_id, *mut sockaddr) -> c_int;
        /// Source or null, destination, milliseconds.
        rdma_resolve_addr: fn(*mut rdma_cm_id, *mut sockaddr, *mut sockaddr, c_int) -> c_int;
        /// Milliseconds.
        rdma_resolve_route: fn(*mut rdma_cm_id, c_int) -> c_int;
        /// Makes a queue pair whose states the library drives.
        rdma_create_qp: fn(*mut rdma_cm_id, *mut ibv_pd, *mut ibv_qp_init_attr) -> c_int;
        /// Destroys the id's queue pair.
        rdma_destroy_qp: fn(*mut rdma_cm_id);
        /// Asks the listener for a connection.
        rdma_connect: fn(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        /// Backlog.
        rdma_listen: fn(*mut rdma_cm_id, c_int) -> c_int;
        /// Says yes to a request.
        rdma_accept: fn(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        /// Says no to a request.
        rdma_reject: fn(*mut rdma_cm_id, *const c_void, u8) -> c_int;
        /// Ends a connection; its queue pair goes to the error state.
        rdma_disconnect: fn(*mut rdma_cm_id) -> c_int;
        /// Blocks unless the channel's `fd` is non-blocking.
        rdma_get_cm_event: fn(*mut rdma_event_channel, *mut *mut rdma_cm_event) -> c_int;
        /// Frees the event.
        rdma_ack_cm_event: fn(*mut rdma_cm_event) -> c_int;
        /// The bound port, big-endian.
        rdma_get_src_port: fn(*mut rdma_cm_id) -> u16;
    }
    optional {}
}

/// Looks a symbol up and gives it the type `T`.
///
/// # Safety
/// `T` must be the function-pointer type that the library declares for `name`, which ends with a zero byte.
unsafe fn symbol<T: Copy>(object: &SharedObject, name: &'static str) -> Option<T> {
    // SAFETY: the caller vouches for the type.
    let found = unsafe { object.get::<T>(name.as_bytes()) };
    found.ok().map(|symbol| *symbol)
}

/// The calls of the host's RDMA libraries.
pub(crate) struct Library {
    /// libibverbs.
    pub(crate) verbs: VerbsCalls,
    /// librdmacm, or why it is absent. Without it only devices that connect out of band work.
    pub(crate) cm: Result<CmCalls, VerbsError>,
    /// Where the kernel describes its devices; `/sys`, but for tests.
    pub(crate) sysfs: PathBuf,
    /// IPv4 addresses of network interfaces that exist only in a test; `None`: the host's are asked for.
    pub(crate) interfaces: Option<Vec<(String, Ipv4Addr)>>,
    /// The devices that are open, so that each is opened once; at most two entries a device.
    pub(super) contexts: Mutex<Vec<Weak<Context>>>,
    /// What devices have shown to be capable of; one entry a device and firmware.
    pub(super) probed: Mutex<Vec<Probed>>,
}

impl Library {
    /// Opens the libraries, once per process. A failure is not kept: the next call tries again.
    ///
    /// They are never closed, since providers register handlers that outlive every object made with them.
    pub(crate) fn open() -> Result<Arc<Self>, VerbsError> {
        static OPENED: OnceLock<Arc<Library>> = OnceLock::new();
        if let Some(library) = OPENED.get() {
            return Ok(Arc::clone(library));
        }
        let verbs = load(
            LIBIBVERBS,
            "libibverbs1 and the adapter's provider (ibverbs-providers; for eRDMA the cloud's own packages)",
            VerbsCalls::load,
        )?;
        let cm = load(LIBRDMACM, "librdmacm1", CmCalls::load);
        let opened = Arc::new(Self::new(verbs, cm, PathBuf::from("/sys")));
        Ok(Arc::clone(OPENED.get_or_init(|| opened)))
    }

    fn new(verbs: VerbsCalls, cm: Result<CmCalls, VerbsError>, sysfs: PathBuf) -> Self {
        Self {
            verbs,
            cm,
            sysfs,
            interfaces: None,
            contexts: Mutex::new(Vec::new()),
            probed: Mutex::new(Vec::new()),
        }
    }

    /// A library made of the given calls, with a folder in the shape of `/sys` and the addresses of its network
    /// interfaces: a provider written for tests.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn from_table(
        verbs: VerbsCalls,
        cm: Option<CmCalls>,
        sysfs: PathBuf,
        interfaces: Vec<(String, Ipv4Addr)>,
    ) -> Arc<Self> {
        let cm = cm.ok_or(VerbsError::NoLibrary {
            library: LIBRDMACM,
            package: "librdmacm1",
            reason: "the test gave none".to_owned(),
        });
        let mut library = Self::new(verbs, cm, sysfs);
        library.interfaces = Some(interfaces);
        Arc::new(library)
    }

    /// librdmacm's calls, or the reason why there are none.
    pub(crate) fn cm(&self) -> Result<&CmCalls, VerbsError> {
        self.cm.as_ref().map_err(Clone::clone)
    }
}

fn load<T>(
    library: &'static str,
    package: &'static str,
    fill: impl FnOnce(&SharedObject) -> Result<T, VerbsError>,
) -> Result<T, VerbsError> {
    // SAFETY: rdma-core's constructors only register providers; they may run on any thread.
    let opened = unsafe { SharedObject::open(Some(library), RTLD_NOW | RTLD_LOCAL) };
    let object = opened.map_err(|error| VerbsError::NoLibrary {
        library,
        package,
        reason: error.to_string(),
    })?;
    // Never closed: the pointers in the table must stay valid for the life of the process.
    fill(&ManuallyDrop::new(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_its_fix() {
        let missing = load("libibverbs-absent.so.1", "libibverbs1", VerbsCalls::load);
        let error = missing.err().expect("no such library").to_string();
        assert!(
            error.starts_with("no RDMA: libibverbs-absent.so.1 not found ("),
            "{error}"
        );
        assert!(
            error.ends_with("install rdma-core's libibverbs1"),
            "{error}"
        );
    }

    #[test]
    fn a_library_without_the_calls_is_refused_by_symbol() {
        let wrong = load("libc.so.6", "libc6", VerbsCalls::load);
        assert_eq!(
            wrong.err(),
            Some(VerbsError::MissingSymbol {
                library: LIBIBVERBS,
                symbol: "ibv_get_device_list",
            })
        );
    }

    #[test]
    fn opening_twice_gives_the_same_table_or_the_same_reason() {
        match (Library::open(), Library::open()) {
            (Ok(first), Ok(second)) => assert!(Arc::ptr_eq(&first, &second)),
            (Err(first), Err(second)) => {
                assert_eq!(first, second);
                assert!(first.to_string().starts_with("no RDMA: "), "{first}");
            }
            _ => panic!("the host's libraries came or went between two calls"),
        }
    }
}
