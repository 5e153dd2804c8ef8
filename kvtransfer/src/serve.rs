//! Listeners: the bootstrap registry over HTTP and what every listener shares (TLS, bearer tokens, paced connections).
//!
//! Nothing here listens unless it is started (promise P9). A listener has its own named thread and a tokio runtime of
//! its own, so that no caller needs one and no transfer waits for it.
#![forbid(unsafe_code)]
use std::io;
use std::net::SocketAddr;
pub mod access;
pub mod bootstrap;
pub mod bootstrap_client;
mod paced;
mod probe;
pub mod telemetry;
pub mod tls;
/// Why a listener could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Another process listens there already.
    #[error(
        "{addr} is in use: stop the process that listens there, or choose another port (0 picks a free one)"
    )]
    AddressInUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// The address asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or its runtime could not be made.
    #[error("cannot start the {thread} thread: {source}")]
    Thread {
        /// The thread's name.
        thread: &'static str,
        /// What the system said.
        source: io::Error,
    },
}
