//! One flat space of status codes, sorted by whose fault it is, and the calling thread's last failure in words.
#![expect(
    unsafe_code,
    reason = "exporting a symbol under its C name needs an unsafe attribute"
)]

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char},
};

use kvt::{
    engine::{BuildError, ConnectError},
    error::{SubmitError, TransferError},
    serve::{ServeError, bootstrap_client::ClientError},
};

/// What a function returns: `KVT_OK`, or why it did nothing. 1xx: the call is wrong; 2xx: this host refuses; 3xx: the
/// peer; 4xx: the transfer; 9xx: the library itself. Codes are never renumbered.
pub type kvt_status_t = i32;

/// It worked.
pub const KVT_OK: kvt_status_t = 0;

/// A pointer that must not be NULL is NULL.
pub const KVT_NULL_ARGUMENT: kvt_status_t = 100;
/// An argument is outside of its range, is no UTF-8 text, or is misaligned.
pub const KVT_BAD_ARGUMENT: kvt_status_t = 101;
/// The configuration's JSON is malformed, names an unknown field, or has a value outside of its range.
pub const KVT_BAD_CONFIG: kvt_status_t = 102;
/// The layout contradicts itself.
pub const KVT_BAD_LAYOUT: kvt_status_t = 103;
/// The room has a live transfer of the same role on this engine.
pub const KVT_DUPLICATE_ROOM: kvt_status_t = 104;
/// A bounded queue or table is full. Try again when transfers have ended.
pub const KVT_QUEUE_FULL: kvt_status_t = 105;
/// No such peer is connected (any more).
pub const KVT_UNKNOWN_PEER: kvt_status_t = 106;
/// The transfer has ended.
pub const KVT_ENDED: kvt_status_t = 107;
/// Not yet: receivers have not granted their pages, or ranks have not registered. Ask again.
pub const KVT_NOT_READY: kvt_status_t = 108;
/// The page lists do not fit the layout.
pub const KVT_BAD_ITEMS: kvt_status_t = 109;
/// The caller was compiled against another version of this header.
pub const KVT_WRONG_ABI: kvt_status_t = 111;
/// The engine's memory is released; restore it first.
pub const KVT_RELEASED: kvt_status_t = 112;

/// An address cannot be listened on.
pub const KVT_LISTEN: kvt_status_t = 200;
/// Memory cannot be used or registered.
pub const KVT_REGION: kvt_status_t = 201;
/// RDMA is required and cannot be used here.
pub const KVT_RDMA: kvt_status_t = 202;
/// The system has no thread, descriptor or random number left.
pub const KVT_SYSTEM: kvt_status_t = 203;
/// A bootstrap registry did not start, or a request to one failed.
pub const KVT_BOOTSTRAP: kvt_status_t = 204;
/// The telemetry server did not start.
pub const KVT_TELEMETRY: kvt_status_t = 205;

/// Nobody answers at the address.
pub const KVT_UNREACHABLE: kvt_status_t = 300;
/// The peer refused, or its layout does not fit.
pub const KVT_REFUSED: kvt_status_t = 301;
/// The peer does not speak this protocol, or did not finish its greeting in time.
pub const KVT_INCOMPATIBLE: kvt_status_t = 302;
/// The other side ended the transfer and said why.
pub const KVT_PEER_FAILED: kvt_status_t = 303;
/// The connection to the peer ended, or the peer stopped answering.
pub const KVT_PEER_LOST: kvt_status_t = 304;
/// The peer broke the protocol.
pub const KVT_PEER_MISBEHAVED: kvt_status_t = 305;
/// The deadline passed without any data connection to the peer.
pub const KVT_NO_PATH: kvt_status_t = 306;

/// Cancelled by this side.
pub const KVT_CANCELLED: kvt_status_t = 400;
/// This side's deadline passed.
pub const KVT_TIMEOUT: kvt_status_t = 401;
/// Memory of either side could not be accessed.
pub const KVT_MEMORY: kvt_status_t = 402;
/// The time given to wait passed; what was waited for goes on.
pub const KVT_WOULD_WAIT: kvt_status_t = 403;
/// A write by address failed, and the peer has not confirmed that it stopped: its memory may still be written.
pub const KVT_UNSETTLED: kvt_status_t = 404;

/// The engine has shut down.
pub const KVT_SHUTDOWN: kvt_status_t = 900;
/// The library panicked in this or an earlier call on the same handle, which can only be freed now. Please report it.
pub const KVT_PANIC: kvt_status_t = 901;
/// A failure that this version has no code for; `kvt_last_error()` says what it was.
pub const KVT_OTHER: kvt_status_t = 902;

/// Code, and "NAME: sentence".
const TEXTS: &[(kvt_status_t, &CStr)] = &[
    (KVT_OK, c"KVT_OK: it worked"),
    (
        KVT_NULL_ARGUMENT,
        c"KVT_NULL_ARGUMENT: a pointer that must not be NULL is NULL",
    ),
    (
        KVT_BAD_ARGUMENT,
        c"KVT_BAD_ARGUMENT: an argument is outside of its range",
    ),
    (
        KVT_BAD_CONFIG,
        c"KVT_BAD_CONFIG: the configuration cannot be used",
    ),
    (
        KVT_BAD_LAYOUT,
        c"KVT_BAD_LAYOUT: the layout contradicts itself",
    ),
    (
        KVT_DUPLICATE_ROOM,
        c"KVT_DUPLICATE_ROOM: the room is already in use on this engine",
    ),
    (KVT_QUEUE_FULL, c"KVT_QUEUE_FULL: a bounded queue is full"),
    (
        KVT_UNKNOWN_PEER,
        c"KVT_UNKNOWN_PEER: the peer is not connected",
    ),
    (KVT_ENDED, c"KVT_ENDED: the transfer has ended"),
    (KVT_NOT_READY, c"KVT_NOT_READY: not yet, ask again"),
    (
        KVT_BAD_ITEMS,
        c"KVT_BAD_ITEMS: the page lists do not fit the layout",
    ),
    (
        KVT_WRONG_ABI,
        c"KVT_WRONG_ABI: the caller was compiled against another version of kvtransfer.h",
    ),
    (
        KVT_RELEASED,
        c"KVT_RELEASED: the engine's memory is released",
    ),
    (KVT_LISTEN, c"KVT_LISTEN: an address cannot be listened on"),
    (
        KVT_REGION,
        c"KVT_REGION: memory cannot be used or registered",
    ),
    (
        KVT_RDMA,
        c"KVT_RDMA: RDMA is required and cannot be used here",
    ),
    (
        KVT_SYSTEM,
        c"KVT_SYSTEM: the system has no thread, descriptor or random number left",
    ),
    (
        KVT_BOOTSTRAP,
        c"KVT_BOOTSTRAP: a bootstrap registry did not start or did not answer",
    ),
    (
        KVT_TELEMETRY,
        c"KVT_TELEMETRY: the telemetry server did not start",
    ),
    (
        KVT_UNREACHABLE,
        c"KVT_UNREACHABLE: nobody answers at the address",
    ),
    (KVT_REFUSED, c"KVT_REFUSED: the peer refused"),
    (
        KVT_INCOMPATIBLE,
        c"KVT_INCOMPATIBLE: the peer did not complete the greeting of this protocol",
    ),
    (
        KVT_PEER_FAILED,
        c"KVT_PEER_FAILED: the other side ended the transfer",
    ),
    (
        KVT_PEER_LOST,
        c"KVT_PEER_LOST: the connection to the peer ended, or it stopped answering",
    ),
    (
        KVT_PEER_MISBEHAVED,
        c"KVT_PEER_MISBEHAVED: the peer broke the protocol",
    ),
    (
        KVT_NO_PATH,
        c"KVT_NO_PATH: the deadline passed without a data connection to the peer",
    ),
    (KVT_CANCELLED, c"KVT_CANCELLED: cancelled by this side"),
    (KVT_TIMEOUT, c"KVT_TIMEOUT: this side's deadline passed"),
    (
        KVT_MEMORY,
        c"KVT_MEMORY: memory of either side could not be accessed",
    ),
    (
        KVT_WOULD_WAIT,
        c"KVT_WOULD_WAIT: the time given to wait passed",
    ),
    (
        KVT_UNSETTLED,
        c"KVT_UNSETTLED: the peer has not confirmed that a failed write stopped",
    ),
    (KVT_SHUTDOWN, c"KVT_SHUTDOWN: the engine has shut down"),
    (
        KVT_PANIC,
        c"KVT_PANIC: the library panicked; please report it",
    ),
    (
        KVT_OTHER,
        c"KVT_OTHER: a failure that has no code of its own",
    ),
];

/// Name and meaning of a status, such as "KVT_TIMEOUT: this side's deadline passed". The part before the colon is stable.
/// An unknown code gives "unknown status".
///
/// Ownership: the text is the library's and lives as long as it is loaded. Threads: any, at any time. Errors: none.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub extern "C" fn kvt_status_text(status: kvt_status_t) -> *const c_char {
    let known = TEXTS.iter().find(|(code, _)| *code == status);
    known.map_or(c"unknown status", |(_, text)| text).as_ptr()
}

/// The calling thread's last failure as one sentence, with the values that were wrong and what to do; "" before the
/// first. A call that succeeds leaves it as it was.
///
/// Ownership: the text is the library's and lives until the next failure on this thread, or the thread's end.
/// Threads: any; each thread sees its own. Errors: none.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub extern "C" fn kvt_last_error() -> *const c_char {
    let kept = LAST.try_with(|last| last.borrow().as_ref().map(|text| text.as_ptr()));
    // While a thread ends there is no text any more.
    kept.ok().flatten().unwrap_or(c"".as_ptr())
}

thread_local! {
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// What [`kvt_last_error`] would say.
#[cfg(test)]
pub(crate) fn last_words() -> String {
    let words = LAST.with(|last| {
        last.borrow()
            .as_ref()
            .map(|text| text.to_string_lossy().into_owned())
    });
    words.unwrap_or_default()
}

/// Why a call did nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: kvt_status_t,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(status: kvt_status_t, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { status, text }
    }

    pub(crate) fn null(what: &str) -> Self {
        Self::new(KVT_NULL_ARGUMENT, format!("`{what}` is NULL"))
    }

    pub(crate) fn argument(text: impl Into<String>) -> Self {
        Self::new(KVT_BAD_ARGUMENT, text)
    }

    /// Keeps the text for [`kvt_last_error`] and gives the code.
    pub(crate) fn record(self) -> kvt_status_t {
        let text = self.text.replace('\0', " ");
        let text = CString::new(text).unwrap_or_default();
        // A thread that is ending keeps nothing.
        let _ = LAST.try_with(|last| last.replace(Some(text)));
        self.status
    }
}

impl From<SubmitError> for Failure {
    fn from(error: SubmitError) -> Self {
        let status = match &error {
            SubmitError::DuplicateRoom(_) => KVT_DUPLICATE_ROOM,
            SubmitError::Full { .. } => KVT_QUEUE_FULL,
            SubmitError::UnknownPeer => KVT_UNKNOWN_PEER,
            SubmitError::Ended(TransferError::Shutdown) | SubmitError::Shutdown => KVT_SHUTDOWN,
            SubmitError::Ended(_) => KVT_ENDED,
            SubmitError::NotReady => KVT_NOT_READY,
            SubmitError::Items(_) => KVT_BAD_ITEMS,
            SubmitError::Released { .. } => KVT_RELEASED,
            _ => KVT_OTHER,
        };
        Self::new(status, error.to_string())
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        let status = match &error {
            TransferError::Cancelled | TransferError::CancelledBecause { .. } => KVT_CANCELLED,
            TransferError::Timeout { .. } => KVT_TIMEOUT,
            TransferError::NoPath { .. } => KVT_NO_PATH,
            TransferError::PeerFailed { .. } => KVT_PEER_FAILED,
            TransferError::PeerLost { .. } => KVT_PEER_LOST,
            TransferError::PeerMisbehaved { .. } => KVT_PEER_MISBEHAVED,
            TransferError::Memory { .. } | TransferError::Device { .. } => KVT_MEMORY,
            TransferError::Shutdown => KVT_SHUTDOWN,
            _ => KVT_OTHER,
        };
        Self::new(status, error.to_string())
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        let status = match &error {
            BuildError::Config(_) => KVT_BAD_CONFIG,
            BuildError::Layout(_) => KVT_BAD_LAYOUT,
            BuildError::Rdma(_) => KVT_RDMA,
            BuildError::Listen { .. } => KVT_LISTEN,
            BuildError::Bootstrap(_) => KVT_BOOTSTRAP,
            BuildError::Telemetry(_) => KVT_TELEMETRY,
            BuildError::System(_) => KVT_SYSTEM,
            _ => KVT_OTHER,
        };
        Self::new(status, sentence(&error))
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let status = match &error {
            ConnectError::Unreachable { .. } => KVT_UNREACHABLE,
            ConnectError::Refused { .. } => KVT_REFUSED,
            ConnectError::Handshake { .. } => KVT_INCOMPATIBLE,
            ConnectError::Local(_) => KVT_QUEUE_FULL,
            _ => KVT_OTHER,
        };
        Self::new(status, error.to_string())
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let status = match &error {
            ServeError::AddressInUse { .. } | ServeError::Bind { .. } => KVT_LISTEN,
            ServeError::Thread { .. } => KVT_SYSTEM,
            _ => KVT_BOOTSTRAP,
        };
        Self::new(status, error.to_string())
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let status = match &error {
            ClientError::NotReady { .. } => KVT_NOT_READY,
            ClientError::Unusable { .. } => KVT_BAD_CONFIG,
            ClientError::Runtime(_) => KVT_SYSTEM,
            _ => KVT_BOOTSTRAP,
        };
        Self::new(status, sentence(&error))
    }
}

/// The error and the causes that its own text leaves out.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
