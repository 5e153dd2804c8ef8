//! What the two processes say to each other: a JSON line per command and per answer, over the target's stdin and stdout.
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use clap::ValueEnum;
use kvtransfer::config::SameHost;
use serde::{Deserialize, Serialize};

use crate::case::CaseName;

/// The way that bytes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Path {
    /// TCP over loopback
    Tcp,
    /// The receiver reads the sender's memory (process_vm_readv)
    Shm,
    /// Shared memory between both, one copy in and one out
    Ring,
}

impl Path {
    /// What an engine must be told to take this path and no other.
    pub(crate) fn same_host(self) -> SameHost {
        match self {
            Self::Tcp => SameHost::Off,
            Self::Shm => SameHost::PullOnly,
            Self::Ring => SameHost::RingOnly,
        }
    }

    /// Its name in `PeerInfo::path`.
    pub(crate) fn engine_name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Shm => "shm-pull",
            Self::Ring => "shm-ring",
        }
    }

    /// The plain limit that this path is held against.
    pub(crate) fn reference(self, case: CaseName) -> ReferenceKind {
        match self {
            Self::Tcp => ReferenceKind::Tcp,
            Self::Shm => ReferenceKind::Pull,
            // A copy of one page within one process tells nobody anything: the other side must learn of it.
            Self::Ring if case == CaseName::Latency16k => ReferenceKind::Unix,
            Self::Ring => ReferenceKind::Memcpy,
        }
    }
}

/// A plain limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReferenceKind {
    /// One TCP connection: writev from the pages, readv into the pages, one byte back per transfer.
    #[serde(rename = "plain-tcp")]
    Tcp,
    /// The same over a Unix socket.
    #[serde(rename = "plain-unix-socket")]
    Unix,
    /// The target is asked by one byte, pulls with full lists, and answers with one byte.
    #[serde(rename = "process_vm_readv")]
    Pull,
    /// One thread copies the blocks within one process.
    #[serde(rename = "memcpy")]
    Memcpy,
}

/// Where the target finds the reference's socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum ReferenceAddress {
    Tcp(SocketAddr),
    /// An abstract name.
    Unix(String),
}

/// What the target needs to take part in a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) case: CaseName,
    pub(crate) path: Path,
    pub(crate) rounds: usize,
    pub(crate) seed: u64,
    pub(crate) tiny: bool,
    pub(crate) lanes: u8,
    /// The initiator's engine.
    pub(crate) engine: SocketAddr,
    pub(crate) reference: Option<ReferenceAddress>,
    /// The initiator's process and where its region starts, for pulls.
    pub(crate) source_pid: u32,
    pub(crate) source_base: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Command {
    Setup(Setup),
    /// Overwrite the target blocks.
    Poison,
    /// Open a receiving room per transfer, numbered from `first_room`.
    Grant {
        first_room: u64,
    },
    /// Wait for the end of every room.
    Await,
    /// Serve one pass of the reference; says [`READY`] on its socket before.
    Reference,
    /// Tell the processor time used so far.
    Usage,
    /// Compare every target block with these checksums.
    Check {
        sums: Vec<u64>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The path that the engines agreed on, and why it is no better one.
    Connected {
        path: String,
        reason: String,
    },
    Done,
    Usage {
        cpu_seconds: f64,
    },
    /// Blocks that differ.
    Checked {
        wrong: usize,
    },
    Failed {
        error: String,
    },
}

/// Sent on the reference's socket by a target that is about to read it.
pub(crate) const READY: u8 = b'r';
