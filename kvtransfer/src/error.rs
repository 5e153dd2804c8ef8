//! What can go wrong, one enum per moment, sorted by whose fault it is.
#![forbid(unsafe_code)]

use std::time::Duration;

use thiserror::Error;

use crate::{
    ids::Room,
    wire::control::{FailureCode, REASON_BYTES_MAX},
};

/// Why a call to the engine was refused. Nothing was changed by the call.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The room has a live transfer of the same role on this engine.
    #[error("room {0} is already in use on this engine; draw a new room number for every request")]
    DuplicateRoom(Room),
    /// Back-pressure: a bounded queue is full. Try again when transfers have completed.
    #[error(
        "{what} is full: {used} in use, {asked} asked, the limit is {limit} (raise {setting} or slow down)"
    )]
    Full {
        /// Which queue or table.
        what: &'static str,
        /// In use now.
        used: u64,
        /// Wanted by this call.
        asked: u64,
        /// The bound.
        limit: u64,
        /// The field of `EngineConfig` that sets it.
        setting: &'static str,
    },
    /// The peer is not connected (any more).
    #[error("the peer is not connected")]
    UnknownPeer,
    /// The transfer ended before the call.
    #[error("the transfer has ended: {0}")]
    Ended(TransferError),
    /// Pages were pushed before every receiver granted its pages.
    #[error("the receiver has not granted its pages yet; wait for the transfer to be ready")]
    NotReady,
    /// The page lists do not fit.
    #[error("{0}")]
    Items(String),
    /// Memory of this engine is released.
    #[error(
        "region {region} is released; transfers can be opened again when Engine::restore_memory has taken it back"
    )]
    Released {
        /// The first such region.
        region: u32,
    },
    /// The engine has shut down.
    #[error("the engine has shut down")]
    Shutdown,
}

/// How a transfer failed. Both sides learn one of these (promise P2).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Cancelled by this side's application.
    #[error("cancelled by the application")]
    Cancelled,
    /// Cancelled by this side's application, which said why. The other side is told `reason` alone, as the text of its
    /// [`PeerFailed`](Self::PeerFailed).
    #[error("cancelled by the application: {reason}")]
    CancelledBecause {
        /// The application's words, see [`plain_text`].
        reason: String,
    },
    /// This side's deadline passed.
    #[error("timed out after {elapsed:?} while {stage}")]
    Timeout {
        /// What it was waiting for.
        stage: &'static str,
        /// Since the transfer was opened.
        elapsed: Duration,
    },
    /// This side's deadline passed, and no data connection to the peer was up.
    #[error("timed out after {elapsed:?} without a data connection to the peer: {reason}")]
    NoPath {
        /// Since the transfer was opened.
        elapsed: Duration,
        /// Why the last one went down, with the device's own status in words.
        reason: String,
    },
    /// The other side ended it and said why.
    #[error("the peer ended it ({}): {reason}", .code.name())]
    PeerFailed {
        /// Its reason.
        code: FailureCode,
        /// In words.
        reason: String,
    },
    /// The connection to the peer ended, or the peer stopped answering.
    #[error("lost the peer: {reason}")]
    PeerLost {
        /// What was seen.
        reason: String,
    },
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {reason}")]
    PeerMisbehaved {
        /// What it did.
        reason: String,
    },
    /// Memory on this side or the peer's could not be accessed.
    #[error("{op} failed with errno {errno}")]
    Memory {
        /// The system call.
        op: &'static str,
        /// Its errno.
        errno: i32,
    },
    /// A device did not copy its memory.
    #[error("{reason}")]
    Device {
        /// The driver call, the device, and what the driver said.
        reason: String,
    },
    /// This engine shut down.
    #[error("the engine shut down")]
    Shutdown,
}

impl TransferError {
    /// Whether the same request may succeed with a new room.
    pub fn is_retryable(&self) -> bool {
        !matches!(
            self,
            Self::Cancelled | Self::CancelledBecause { .. } | Self::Shutdown
        )
    }

    /// A stable name for metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cancelled | Self::CancelledBecause { .. } => "cancelled",
            Self::Timeout { .. } => "timeout",
            Self::NoPath { .. } => "no_path",
            Self::PeerFailed { .. } => "peer_failed",
            Self::PeerLost { .. } => "peer_lost",
            Self::PeerMisbehaved { .. } => "peer_misbehaved",
            Self::Memory { .. } => "memory",
            Self::Device { .. } => "device",
            Self::Shutdown => "shutdown",
        }
    }

    /// What the other side is told.
    pub fn code(&self) -> FailureCode {
        match self {
            Self::Cancelled | Self::CancelledBecause { .. } => FailureCode::Cancelled,
            Self::Timeout { .. } | Self::NoPath { .. } => FailureCode::Timeout,
            Self::PeerFailed { .. } | Self::PeerLost { .. } => FailureCode::OtherPeer,
            Self::PeerMisbehaved { .. } => FailureCode::Misbehaved,
            Self::Memory { .. } | Self::Device { .. } => FailureCode::Memory,
            Self::Shutdown => FailureCode::Shutdown,
        }
    }

    /// The words for the other side: the application's own where it gave some, else the message.
    pub(crate) fn words(&self) -> String {
        match self {
            Self::CancelledBecause { reason } => reason.clone(),
            other => other.to_string(),
        }
    }
}

/// A text of an application or a peer, fit for a log line and for the wire: control characters become spaces, and what
/// is beyond [`REASON_BYTES_MAX`] bytes is cut off, between two characters.
pub fn plain_text(text: &str) -> String {
    let mut plain = String::with_capacity(text.len().min(REASON_BYTES_MAX));
    for letter in text.chars() {
        let letter = if letter.is_control() { ' ' } else { letter };
        if plain.len() + letter.len_utf8() > REASON_BYTES_MAX {
            break;
        }
        plain.push(letter);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::{REASON_BYTES_MAX, TransferError, plain_text};

    #[test]
    fn a_text_of_an_application_is_one_line_of_bounded_length() {
        assert_eq!(plain_text("a\nb\u{1b}[31m\0c"), "a b [31m c");
        let long = plain_text(&"é".repeat(REASON_BYTES_MAX));
        assert_eq!(
            long.len(),
            REASON_BYTES_MAX,
            "whole characters up to the bound"
        );
        let odd = plain_text(&format!("x{}", "é".repeat(REASON_BYTES_MAX)));
        assert_eq!(odd.len(), REASON_BYTES_MAX - 1, "never half a character");
    }

    #[test]
    fn the_other_side_gets_the_applications_own_words() {
        let reason = "KV of the prefix was evicted".to_owned();
        let error = TransferError::CancelledBecause { reason };
        assert_eq!(error.words(), "KV of the prefix was evicted");
        assert_eq!(
            error.to_string(),
            "cancelled by the application: KV of the prefix was evicted"
        );
        assert_eq!(
            TransferError::Cancelled.words(),
            "cancelled by the application"
        );
    }
}
