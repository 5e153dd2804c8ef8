//! What the two processes say to each other: a JSON line per command and per answer, over the target's stdin and stdout.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, time::Duration};

use clap::ValueEnum;
use kvtransfer::config::{EngineConfig, RdmaConfig, RdmaUse, SameHost};
use kvtransfer::wire::rdma::Connector;
use serde::{Deserialize, Serialize};

use crate::{
    case::{CaseName, Extent},
    gpu::Gpu,
};

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
    /// RDMA verbs between two devices of this host, beside perftest on the same devices
    Verbs,
}

impl Path {
    /// The paths that every host has.
    pub(crate) const SAME_HOST: [Self; 3] = [Self::Tcp, Self::Shm, Self::Ring];

    /// What is measured over it, if nothing else is asked for.
    pub(crate) fn cases(self) -> &'static [CaseName] {
        match self {
            Self::Tcp | Self::Shm | Self::Ring => &CaseName::SAME_HOST,
            Self::Verbs => &CaseName::VERBS,
        }
    }

    /// What an engine must be told to take this path and no other. Where the best one is refused to it, nothing: it has to
    /// find the way itself.
    pub(crate) fn same_host(self, is_refused: bool) -> SameHost {
        match self {
            _ if is_refused => SameHost::Auto,
            Self::Tcp | Self::Verbs => SameHost::Off,
            Self::Shm => SameHost::PullOnly,
            Self::Ring => SameHost::RingOnly,
        }
    }

    /// Its name in `PeerInfo::path`.
    pub(crate) fn engine_name(self, on_gpu: bool) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Shm if on_gpu => "device-pull",
            Self::Shm => "shm-pull",
            Self::Ring => "shm-ring",
            Self::Verbs => "verbs",
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
            Self::Verbs => ReferenceKind::Perftest,
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
    /// `ib_write_bw`, `ib_write_lat` and `ib_send_lat`, which are processes of their own.
    #[serde(rename = "perftest")]
    Perftest,
}

/// Where the target finds the reference's socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum ReferenceAddress {
    Tcp(SocketAddr),
    /// An abstract name.
    Unix(String),
}

/// How an engine uses RDMA.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Rdma {
    pub(crate) device: String,
    pub(crate) is_standard: bool,
    pub(crate) tuning: Tuning,
}

/// What can be tried out; the engine's defaults where nothing is said.
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
pub(crate) struct Tuning {
    /// Queue pairs [verbs; default: the engine's]
    #[arg(long, value_name = "COUNT")]
    rdma_queue_pairs: Option<u8>,
    /// Most KiB of a batch [verbs; default: the engine's]
    #[arg(long, value_name = "KIB")]
    rdma_batch_kib: Option<u64>,
    /// Pack pieces of fewer bytes; 0: none [verbs; default: the engine's]
    #[arg(long, value_name = "BYTES")]
    rdma_pack_below: Option<u64>,
    /// Unacknowledged batches per queue pair [verbs; default: the engine's]
    #[arg(long, value_name = "COUNT")]
    rdma_window: Option<usize>,
    /// Work requests of a send queue [verbs; default: the engine's]
    #[arg(long, value_name = "COUNT")]
    rdma_send_queue: Option<u32>,
    /// Microseconds of looking for work before sleeping [verbs; default: the engine's]
    #[arg(long, value_name = "US")]
    rdma_spin_us: Option<u64>,
    /// Notices as immediate data, where both devices can (verbs)
    #[arg(long)]
    rdma_immediate: bool,
    /// MiB of a ring [same-host rings; default: the engine's]
    #[arg(long, value_name = "MIB")]
    ring_mib: Option<usize>,
    /// Most KiB of a batch that goes through pinned memory [--gpu; default: the engine's]
    #[arg(long, value_name = "KIB")]
    staged_kib: Option<u64>,
    /// Most MiB of a batch that a GPU copies out of the other's memory [--gpu; default: the engine's]
    #[arg(long, value_name = "MIB")]
    pull_mib: Option<u64>,
}

impl Tuning {
    /// What concerns every path.
    pub(crate) fn apply(&self, config: &mut EngineConfig) {
        config.ring_bytes = self.ring_mib.map_or(config.ring_bytes, |mib| mib << 20);
        let ring = self.ring_mib.map(|mib| mib << 20);
        config.device_ring_bytes = ring.unwrap_or(config.device_ring_bytes);
        let staged = self.staged_kib.map(|kib| kib << 10);
        config.staged_batch_bytes = staged.unwrap_or(config.staged_batch_bytes);
        let pulled = self.pull_mib.map(|mib| mib << 20);
        config.device_pull_batch_bytes = pulled.unwrap_or(config.device_pull_batch_bytes);
    }
}

impl Rdma {
    /// The engine's configuration.
    pub(crate) fn config(&self) -> RdmaConfig {
        let mut config = RdmaConfig::default();
        config.usage = RdmaUse::Required;
        config.devices.clone_from(&self.device);
        config.connector = Some(if self.is_standard {
            Connector::Standard
        } else {
            Connector::Compat
        });
        let tuning = &self.tuning;
        config.queue_pairs = tuning.rdma_queue_pairs.unwrap_or(config.queue_pairs);
        let batch_bytes = tuning.rdma_batch_kib.map(|kib| kib << 10);
        config.batch_bytes = batch_bytes.unwrap_or(config.batch_bytes);
        config.pack_below = tuning.rdma_pack_below.unwrap_or(config.pack_below);
        config.window = tuning.rdma_window.unwrap_or(config.window);
        config.send_queue = tuning.rdma_send_queue.unwrap_or(config.send_queue);
        let spin = tuning.rdma_spin_us.map(Duration::from_micros);
        config.spin = spin.unwrap_or(config.spin);
        config.immediate = tuning.rdma_immediate;
        config
    }
}

/// What the target needs to take part in a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) case: CaseName,
    pub(crate) path: Path,
    pub(crate) extent: Extent,
    pub(crate) lanes: u8,
    /// What the target's engine does with RDMA; nothing without it.
    pub(crate) rdma: Option<Rdma>,
    /// Where the target engine's memory lies, if not in the host's.
    pub(crate) gpu: Option<Gpu>,
    pub(crate) tuning: Tuning,
    /// The initiator's engine.
    pub(crate) engine: SocketAddr,
    pub(crate) reference: Option<ReferenceAddress>,
    /// The initiator's process and where its region starts, for pulls.
    pub(crate) source_pid: u32,
    pub(crate) source_base: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Command {
    Setup(Box<Setup>),
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
    /// As `Grant`, for a transfer that ends in so many milliseconds at most; its end is watched, and what the blocks hold then
    /// is remembered.
    GrantBriefly {
        room: u64,
        millis: u64,
    },
    /// The same the other way round: this side sends the pages before the target's, to be granted by the initiator.
    SendBack {
        room: u64,
        millis: u64,
    },
    /// As the two before, `count` of them from that room on, and nothing is remembered.
    GrantMany {
        room: u64,
        count: u64,
        millis: u64,
    },
    SendMany {
        room: u64,
        count: u64,
        millis: u64,
    },
    /// Stop the initiator's process after some microseconds, for some milliseconds.
    Freeze {
        after_micros: u64,
        millis: u64,
    },
    /// How the first of the watched transfers ended.
    End,
    /// Count blocks that have changed since the watched transfer ended.
    Late,
    /// Replace the engine by a new one.
    Restart,
    /// Count what this process holds.
    Resources,
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
    /// The reason of a failure, and milliseconds from its opening.
    Ended {
        error: Option<String>,
        millis: u64,
    },
    Resources(Resources),
    /// Blocks that differ.
    Checked {
        wrong: usize,
    },
    Failed {
        error: String,
    },
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resources {
    /// Open descriptors.
    pub(crate) descriptors: usize,
    /// Mappings of its address space.
    pub(crate) mappings: usize,
    /// KiB that drivers have pinned or locked.
    pub(crate) pinned_kib: u64,
    /// Free MiB of its GPU, whoever holds the rest.
    pub(crate) gpu_free_mib: Option<u64>,
}

/// Sent on the reference's socket by a target that is about to read it.
pub(crate) const READY: u8 = b'r';
