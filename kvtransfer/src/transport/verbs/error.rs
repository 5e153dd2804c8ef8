//! What a verbs call can fail with, in words, with the fix where there is a usual one.
//!
//! Return codes come in four forms: a null pointer or -1 with `errno`, a positive error number, and a negative one
//! (the eRDMA and siw providers). [`check`] and [`check_pointer`] are the only places that know.
#![forbid(unsafe_code)]

use std::{ffi::c_int, fmt, io, ptr::NonNull};

use super::sys;

/// Why a verbs object could not be made or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum VerbsError {
    /// A library is not on this host, or cannot be loaded.
    #[error("no RDMA: {library} not found ({reason}); install rdma-core's {package}")]
    NoLibrary {
        /// The file asked for.
        library: &'static str,
        /// Debian's packages that bring it.
        package: &'static str,
        /// The loader's words.
        reason: String,
    },
    /// A library lacks a call that we need.
    #[error(
        "no RDMA: {library} has no {symbol}, so it is not a usable rdma-core; upgrade rdma-core"
    )]
    MissingSymbol {
        /// The library.
        library: &'static str,
        /// The call.
        symbol: &'static str,
    },
    /// A call failed.
    #[error("{op}: {} (errno {errno}){}", errno_words(*.errno), fix_line(.fix.as_deref()))]
    Call {
        /// The call, as the header names it.
        op: &'static str,
        /// The error number, positive.
        errno: i32,
        /// What usually cures it.
        fix: Option<String>,
    },
    /// No device of that name.
    #[error("no RDMA device {wanted}; this host has: {}", list(.present))]
    NoDevice {
        /// The name asked for.
        wanted: String,
        /// The names there are.
        present: Vec<String>,
    },
    /// Something asked for is over a bound of the device or of this crate.
    #[error("{what}: {asked} asked, the limit is {limit}")]
    Limit {
        /// What is bounded.
        what: &'static str,
        /// Asked for.
        asked: u64,
        /// The bound.
        limit: u64,
    },
    /// The caller's arguments make no sense.
    #[error("{0}")]
    Misuse(&'static str),
}

impl VerbsError {
    /// A call that failed with `errno` (either sign).
    pub(crate) fn call(op: &'static str, errno: i32) -> Self {
        let errno = errno.saturating_abs();
        Self::Call {
            op,
            errno,
            fix: fix_for(op, errno),
        }
    }

    /// A call that failed and left its reason in `errno`.
    pub(crate) fn last(op: &'static str) -> Self {
        Self::call(op, last_errno())
    }

    /// The error number, where a call gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

fn last_errno() -> i32 {
    match io::Error::last_os_error().raw_os_error() {
        Some(errno) if errno != 0 => errno,
        _ => libc::EIO,
    }
}

/// Turns a return code into a result: zero is success, -1 means `errno`, all else is an error number of either sign.
pub(crate) fn check(op: &'static str, code: c_int) -> Result<(), VerbsError> {
    match code {
        0 => Ok(()),
        -1 => Err(VerbsError::last(op)),
        errno => Err(VerbsError::call(op, errno)),
    }
}

/// Turns a pointer into a result: null means `errno`.
pub(crate) fn check_pointer<T>(
    op: &'static str,
    pointer: *mut T,
) -> Result<NonNull<T>, VerbsError> {
    NonNull::new(pointer).ok_or_else(|| VerbsError::last(op))
}

fn errno_words(errno: i32) -> String {
    let words = io::Error::from_raw_os_error(errno).to_string();
    match words.find(" (os error") {
        Some(end) => words[..end].to_owned(),
        None => words,
    }
}

fn fix_line(fix: Option<&str>) -> String {
    fix.map(|fix| format!("; {fix}")).unwrap_or_default()
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// The usual cure of `errno` in `op`.
fn fix_for(op: &str, errno: i32) -> Option<String> {
    let fix = match errno {
        libc::ENOMEM => memlock_fix(memlock_limit()),
        libc::ENOSYS => {
            "the kernel has no RDMA devices: load ib_uverbs and the adapter's module (modprobe erdma), \
             and give the container /dev/infiniband"
                .to_owned()
        }
        libc::EACCES | libc::EPERM => {
            "give the process read and write access to /dev/infiniband/uverbs* (and rdma_cm) and \
             CAP_IPC_LOCK"
                .to_owned()
        }
        libc::ENODEV | libc::ENXIO if op.starts_with("rdma_") => {
            "no RDMA device serves this address: check the device's port and its network interface"
                .to_owned()
        }
        libc::ENODEV | libc::ENXIO => {
            "the device is gone or not usable in this network namespace: check `rdma link`".to_owned()
        }
        libc::ENOENT if op.starts_with("ibv_open") || op.starts_with("rdma_create_event") => {
            "give the container the device nodes of /dev/infiniband".to_owned()
        }
        libc::EOPNOTSUPP => "the device or its provider does not support this call".to_owned(),
        _ => return None,
    };
    Some(fix)
}

/// `CAP_IPC_LOCK` among the effective capabilities (linux/capability.h).
const CAP_IPC_LOCK_BIT: u32 = 14;

/// The process's limit on locked memory in bytes; `None` when there is none, or `CAP_IPC_LOCK` lifts it.
pub(crate) fn memlock_limit() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if may_lock_at_will(&status) {
        return None;
    }
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

/// Whether a process of such `/proc/PID/status` has `CAP_IPC_LOCK`.
fn may_lock_at_will(status: &str) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .is_some_and(|bits| bits >> CAP_IPC_LOCK_BIT & 1 == 1)
}

/// What to say when memory could not be pinned under `limit`.
pub(crate) fn memlock_fix(limit: Option<u64>) -> String {
    match limit {
        Some(bytes) => format!(
            "the locked-memory limit is {} KiB: raise it (ulimit -l unlimited; LimitMEMLOCK=infinity for \
             containerd or the service; CAP_IPC_LOCK in the pod)",
            bytes / 1024
        ),
        None => "the locked-memory limit is unlimited or lifted by CAP_IPC_LOCK, so the device's own memory or page tables ran out: \
                 use huge pages, or register less"
            .to_owned(),
    }
}

/// How a work request ended (`ibv_wc_status`), kept as the number the device gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CompletionStatus(pub(crate) u32);

impl CompletionStatus {
    /// Whether the request was carried out.
    ///
    /// For a WRITE that means only that its source may be reused: on iWARP a WRITE with a bad key succeeds.
    pub(crate) const fn is_success(self) -> bool {
        self.0 == sys::IBV_WC_SUCCESS
    }

    /// Whether the request was thrown away because the queue pair had failed before it.
    pub(crate) const fn is_flush(self) -> bool {
        self.0 == sys::IBV_WC_WR_FLUSH_ERR
    }

    /// The status in words, and its name in the header.
    pub(crate) const fn words(self) -> (&'static str, &'static str) {
        match self.0 {
            sys::IBV_WC_SUCCESS => ("success", "SUCCESS"),
            sys::IBV_WC_LOC_LEN_ERR => ("local length error", "LOC_LEN_ERR"),
            sys::IBV_WC_LOC_QP_OP_ERR => ("local queue pair operation error", "LOC_QP_OP_ERR"),
            sys::IBV_WC_LOC_EEC_OP_ERR => {
                ("local end-to-end context operation error", "LOC_EEC_OP_ERR")
            }
            sys::IBV_WC_LOC_PROT_ERR => ("local protection error", "LOC_PROT_ERR"),
            sys::IBV_WC_WR_FLUSH_ERR => ("work request flushed", "WR_FLUSH_ERR"),
            sys::IBV_WC_MW_BIND_ERR => ("memory window bind error", "MW_BIND_ERR"),
            sys::IBV_WC_BAD_RESP_ERR => ("bad response", "BAD_RESP_ERR"),
            sys::IBV_WC_LOC_ACCESS_ERR => ("local access error", "LOC_ACCESS_ERR"),
            sys::IBV_WC_REM_INV_REQ_ERR => ("remote invalid request", "REM_INV_REQ_ERR"),
            sys::IBV_WC_REM_ACCESS_ERR => ("remote access error", "REM_ACCESS_ERR"),
            sys::IBV_WC_REM_OP_ERR => ("remote operation error", "REM_OP_ERR"),
            sys::IBV_WC_RETRY_EXC_ERR => ("transport retry counter exceeded", "RETRY_EXC_ERR"),
            sys::IBV_WC_RNR_RETRY_EXC_ERR => ("RNR retry counter exceeded", "RNR_RETRY_EXC_ERR"),
            sys::IBV_WC_LOC_RDD_VIOL_ERR => ("local RDD violation", "LOC_RDD_VIOL_ERR"),
            sys::IBV_WC_REM_INV_RD_REQ_ERR => ("remote invalid RD request", "REM_INV_RD_REQ_ERR"),
            sys::IBV_WC_REM_ABORT_ERR => ("remote aborted", "REM_ABORT_ERR"),
            sys::IBV_WC_INV_EECN_ERR => ("invalid end-to-end context number", "INV_EECN_ERR"),
            sys::IBV_WC_INV_EEC_STATE_ERR => {
                ("invalid end-to-end context state", "INV_EEC_STATE_ERR")
            }
            sys::IBV_WC_FATAL_ERR => ("fatal error of the device", "FATAL_ERR"),
            sys::IBV_WC_RESP_TIMEOUT_ERR => ("response timed out", "RESP_TIMEOUT_ERR"),
            sys::IBV_WC_GENERAL_ERR => ("general error", "GENERAL_ERR"),
            _ => ("unknown status", "unknown"),
        }
    }
}

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.words() {
            (words, "unknown") => write!(f, "{words} {}", self.0),
            (words, name) => write!(f, "{words} ({name})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_return_code_gives_the_same_error() {
        assert_eq!(check("op", 0), Ok(()));
        assert_eq!(check("op", libc::EINVAL), check("op", -libc::EINVAL));
        assert_eq!(
            check("op", -libc::EINVAL).expect_err("it failed").errno(),
            Some(libc::EINVAL)
        );
        assert!(std::fs::File::open("/nonexistent").is_err());
        assert_eq!(
            check("op", -1).expect_err("it failed").errno(),
            Some(libc::ENOENT),
            "-1 means errno"
        );
    }

    #[test]
    fn the_message_names_the_call_the_number_and_the_fix() {
        let error = VerbsError::call("ibv_get_device_list", libc::ENOSYS).to_string();
        assert_eq!(
            error,
            "ibv_get_device_list: Function not implemented (errno 38); the kernel has no RDMA devices: load \
             ib_uverbs and the adapter's module (modprobe erdma), and give the container /dev/infiniband"
        );
        let error = VerbsError::call("ibv_reg_mr", -libc::ENOMEM).to_string();
        assert!(error.contains("locked-memory limit"), "{error}");
        assert!(memlock_fix(Some(65536)).contains("64 KiB: raise it (ulimit -l unlimited"));
        assert!(memlock_fix(None).contains("unlimited"));
        let error = VerbsError::call("ibv_modify_qp", libc::EINVAL).to_string();
        assert_eq!(error, "ibv_modify_qp: Invalid argument (errno 22)");
    }

    #[test]
    fn the_capability_to_lock_memory_lifts_the_limit() {
        let status = |bits: &str| format!("Name:\tengine\nCapEff:\t{bits}\nCapBnd:\tffffffff\n");
        assert!(may_lock_at_will(&status("000001ffffffffff")));
        assert!(may_lock_at_will(&status("0000000000004000")));
        assert!(
            !may_lock_at_will(&status("00000000a80425fb")),
            "docker's default"
        );
        assert!(!may_lock_at_will(&status("x")));
        assert!(!may_lock_at_will(""));
    }

    #[test]
    fn statuses_read_as_words_and_unknown_ones_as_numbers() {
        assert_eq!(
            CompletionStatus(12).to_string(),
            "transport retry counter exceeded (RETRY_EXC_ERR)"
        );
        assert_eq!(CompletionStatus(77).to_string(), "unknown status 77");
        assert!(CompletionStatus(5).is_flush());
        for number in 0..=21 {
            assert_ne!(CompletionStatus(number).words().1, "unknown", "{number}");
        }
    }
}
