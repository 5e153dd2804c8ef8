//! Why a request to the registry failed.

use std::io;
use std::time::Duration;

/// Why the registry gave no usable answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The target or a header value cannot be used.
    #[error("{what} cannot be used in a request")]
    Unusable {
        /// Which part.
        what: &'static str,
    },
    /// No connection came about.
    #[error("cannot connect to the bootstrap server at {authority}: {source}")]
    Connect {
        /// Where to.
        authority: String,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the bootstrap server at {authority} hung up: {source}")]
    Broken {
        /// Where to.
        authority: String,
        /// What hyper said.
        source: hyper::Error,
    },
    /// No answer in time.
    #[error("the bootstrap server at {authority} did not answer within {after:?}")]
    Timeout {
        /// Where to.
        authority: String,
        /// The time given.
        after: Duration,
    },
    /// Not all ranks are there yet; ask again.
    #[error("{text}")]
    NotReady {
        /// The registry's words.
        text: String,
    },
    /// Any other status than 200.
    #[error("the bootstrap server answered {status}: {text}")]
    Status {
        /// The status.
        status: u16,
        /// Its first words.
        text: String,
    },
    /// The answer is too long or not what was asked for.
    #[error("the bootstrap server's answer to {request} makes no sense")]
    Answer {
        /// Which request.
        request: &'static str,
    },
    /// No attempt to register succeeded.
    #[error("registration failed after {attempts} attempts; the last: {last}")]
    Register {
        /// Attempts made before the deadline.
        attempts: u32,
        /// The last one's error.
        last: Box<Self>,
    },
    /// The blocking client could not make its runtime.
    #[error("cannot start a runtime: {0}")]
    Runtime(io::Error),
}

impl ClientError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Broken { .. }
            | Self::Timeout { .. }
            | Self::NotReady { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 408,
            Self::Unusable { .. }
            | Self::Answer { .. }
            | Self::Register { .. }
            | Self::Runtime(_) => false,
        }
    }
}
