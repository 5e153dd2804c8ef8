//! What an engine can be told. Every field says its default, its unit and what it costs.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use crate::{
    serve::{bootstrap::BootstrapConfig, telemetry::TelemetryConfig},
    transfer::NodeConfig,
    transport::verbs::library::Library,
    wire::{hello::LANES_MAX, rdma::Connector},
};

/// Which same-host paths may be used when two engines run under one kernel and one user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SameHost {
    /// Pull with `process_vm_readv` if the kernel allows it, else a shared ring, else TCP.
    #[default]
    Auto,
    /// Pull or TCP.
    PullOnly,
    /// Ring or TCP.
    RingOnly,
    /// Always TCP.
    Off,
}

/// Whether RDMA is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RdmaUse {
    /// No. Nothing is registered, libibverbs is not opened.
    #[default]
    Off,
    /// To peers on other hosts that have it too; else tcp, and the peer's path says why.
    Auto,
    /// Nothing else: the engine does not start without a usable device, and does not talk to peers by another path.
    Required,
}

/// How an engine uses RDMA devices. Start from `default()` and assign.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RdmaConfig {
    /// Default [`RdmaUse::Off`]: all registered memory is pinned, which needs an unlimited memlock limit.
    pub usage: RdmaUse,
    /// Which devices, as SGLang's `--disaggregation-ib-device` says it: `"a"`, `"a,b"`, a JSON map from GPU to devices, or
    /// the path of a JSON file. Default empty: every usable device.
    pub devices: String,
    /// The GPU whose entry of a JSON map applies. Default 0.
    pub gpu: u32,
    /// How queue pairs are connected. Default `None`: as the device's transport type asks for.
    pub connector: Option<Connector>,
    /// Queue pairs per peer and rail that this side opens when it dials. Default 4; at most 16 per peer over all rails.
    pub queue_pairs: u8,
    /// Whether the notice of a batch is a WRITE_WITH_IMM where both sides' devices can do it. Default false: a SEND costs as
    /// much, carries more, and exists everywhere.
    pub immediate: bool,
    /// Most bytes of one batch. Default 2 MiB. No more than half of the peer's [`RdmaConfig::landing_bytes`], unless that is 0:
    /// whether a batch is packed shows when it is cut already.
    pub batch_bytes: u64,
    /// Batches whose pieces have fewer bytes on average, after touching ones are joined, are *packed*: gathered by the sender,
    /// written as one piece to landing memory of the receiver, and moved to the pages by it. Default 4096: a work request for
    /// a smaller piece costs more than copying it twice. 0: only memory that the devices do not reach is packed;
    /// `u64::MAX`: every batch is.
    pub pack_below: u64,
    /// Bytes of the landing memory that a queue pair offers to a peer whose batches may be packed; a packed batch has at most
    /// half of them. Default 2 MiB, pinned while the queue pair is there, and as much at the sender once it packs; over all
    /// queue pairs at most [`EngineConfig::staging_bytes`]. 0: nothing is packed for this engine.
    pub landing_bytes: u64,
    /// Most unacknowledged batches per queue pair. Default 8: with 4 queue pairs, 64 MiB on the wire.
    pub window: usize,
    /// Work requests that one queue pair holds. Default 256, of which a chain has at most 64.
    pub send_queue: u32,
    /// How long the rail's thread looks for work before it sleeps. Default 50 µs.
    pub spin: Duration,
    /// How long a failed queue pair may take to give back its work requests before it is destroyed. Default 20 ms.
    pub drain: Duration,
    /// An idle queue pair says so often that it works; after three such spans of silence it is taken for dead.
    /// Default 2 s.
    pub heartbeat: Duration,
    /// Devices that a test made up, instead of the host's.
    #[cfg(feature = "testing")]
    pub fake: Option<crate::testing::fake_verbs::FakeVerbs>,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self {
            usage: RdmaUse::Off,
            devices: String::new(),
            gpu: 0,
            connector: None,
            queue_pairs: 4,
            immediate: false,
            batch_bytes: 2 << 20,
            pack_below: 4096,
            landing_bytes: 2 << 20,
            window: 8,
            send_queue: 256,
            spin: Duration::from_micros(50),
            drain: Duration::from_millis(20),
            heartbeat: Duration::from_secs(2),
            #[cfg(feature = "testing")]
            fake: None,
        }
    }
}

impl RdmaConfig {
    /// The libraries, or why they cannot be had.
    pub(crate) fn open_library(&self) -> Result<Arc<Library>, String> {
        #[cfg(feature = "testing")]
        if let Some(fake) = &self.fake {
            return Ok(fake.library());
        }
        Library::open().map_err(|error| error.to_string())
    }
}

/// Configuration of an [`Engine`](crate::engine::Engine). Start from `default()` and assign.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineConfig {
    /// Where peers connect. Default `None`: the engine only dials, and has no listener at all (promise P9).
    /// Port 0 picks a free one, see [`Engine::local_addr`](crate::engine::Engine::local_addr).
    pub listen: Option<SocketAddr>,
    /// Bearer token that both sides must know. Default `None`: anybody who can connect may talk.
    pub token: Option<String>,
    /// Data connections per peer that this side opens when it dials, 1..=16. Default 2. Each costs two threads on
    /// both sides, and (with rings) one ring.
    pub lanes: u8,
    /// Same-host paths. Default [`SameHost::Auto`].
    pub same_host: SameHost,
    /// RDMA. Default off.
    pub rdma: RdmaConfig,
    /// Most bytes of one batch on TCP. Default 1 MiB: large enough that its header and acknowledgement (about 5 µs)
    /// vanish, small enough that lanes share a transfer evenly.
    pub batch_bytes: u64,
    /// Most unacknowledged batches per TCP lane. Default 32.
    pub lane_window: usize,
    /// Most bytes of one pull batch. Default 8 MiB.
    pub pull_batch_bytes: u64,
    /// Most bytes of one batch where a device's memory goes over a wire, and of one chunk of staging memory. Default 4 MiB:
    /// a copy of it takes some ten times as long as starting one.
    pub staged_batch_bytes: u64,
    /// Most bytes of pinned memory through which a device's memory goes over a wire; half for each direction. Default
    /// 256 MiB, pinned when needed. Further batches wait. With RDMA, as many again for packed batches
    /// ([`RdmaConfig::landing_bytes`]); queue pairs beyond that go without.
    pub staging_bytes: u64,
    /// Most bytes of one batch that a device copies out of its peer's memory. Default 128 MiB: some 300 µs within 8 % of an H200.
    pub device_pull_batch_bytes: u64,
    /// Bytes of a same-host ring per lane and direction. Default 8 MiB, touched only when used.
    pub ring_bytes: usize,
    /// The same where a device's memory goes through the ring, since devices that do not map each other's memory. Default
    /// 32 MiB, touched and pinned only when used: a batch is a slot, an eighth of it, and two processes on one GPU take some
    /// 320 µs for a batch of any size.
    pub device_ring_bytes: usize,
    /// Chunks of at most so many bytes are written by the pushing thread itself if the lane is idle. Default 256 KiB;
    /// 0 leaves all writing to the lane's thread.
    pub inline_bytes: u64,
    /// Whether a thread that waits for its own transfer reads the socket itself instead of being woken by the lane's
    /// thread. Default true; saves one thread switch (some 5 µs) per small transfer.
    pub drive_while_waiting: bool,
    /// How long a thread that waits for its own small transfer looks for the answer before it sleeps. Default 20 µs, about
    /// what a 16 KiB transfer takes on one host; zero for the lowest use of the CPU.
    pub spin: Duration,
    /// Whether peers may write to any address in this engine's regions ([`Engine::write`](crate::engine::Engine::write)
    /// at their side). Default false. Layouts then need not fit: a rank without any may use
    /// [`Layout::raw`](crate::layout::Layout::raw).
    pub writable_by_address: bool,
    /// For measurements: data connections plan and count every write, but carry no bytes. Default false; two engines
    /// connect only if both say the same, and RDMA must be off. See [`Engine::null_counts`](crate::engine::Engine::null_counts).
    pub null_wire: bool,
    /// How long a connecting peer may take to introduce itself. Default 5 s.
    pub handshake_timeout: Duration,
    /// Most connected peers. Default 4096; further ones are turned away with a sentence.
    pub peers_max: usize,
    /// Most connections that have not introduced themselves yet. Default 256; the oldest is dropped for a new one.
    pub strangers_max: usize,
    /// A bootstrap registry run by this engine. Default `None`: no such listener. One per prefill server is enough; its
    /// ranks and the decode ranks all talk to it.
    pub bootstrap: Option<BootstrapConfig>,
    /// Live telemetry (gRPC, and Prometheus text if asked for). Default `None`: no such listener, no cost.
    pub telemetry: Option<TelemetryConfig>,
    /// Bounds and periods of the state machine.
    pub node: NodeConfig,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            listen: None,
            token: None,
            lanes: 2,
            same_host: SameHost::Auto,
            rdma: RdmaConfig::default(),
            batch_bytes: 1 << 20,
            lane_window: 32,
            pull_batch_bytes: 8 << 20,
            staged_batch_bytes: 4 << 20,
            staging_bytes: 256 << 20,
            device_pull_batch_bytes: 128 << 20,
            ring_bytes: 8 << 20,
            device_ring_bytes: 32 << 20,
            inline_bytes: 256 << 10,
            drive_while_waiting: true,
            spin: Duration::from_micros(20),
            writable_by_address: false,
            null_wire: false,
            handshake_timeout: Duration::from_secs(5),
            peers_max: 4096,
            strangers_max: 256,
            bootstrap: None,
            telemetry: None,
            node: NodeConfig::default(),
        }
    }
}

impl EngineConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// A sentence that names the field, its value and its range.
    pub(crate) fn validate(&self) -> Result<(), String> {
        use crate::wire::{
            hello::TOKEN_BYTES_MAX,
            lane::{BATCH_BYTES_MAX, PULL_BATCH_BYTES_MAX},
        };
        let ranges = [
            ("lanes", u64::from(self.lanes), 1, u64::from(LANES_MAX)),
            ("batch_bytes", self.batch_bytes, 4096, BATCH_BYTES_MAX),
            (
                "pull_batch_bytes",
                self.pull_batch_bytes,
                4096,
                PULL_BATCH_BYTES_MAX,
            ),
            (
                "staged_batch_bytes",
                self.staged_batch_bytes,
                4096,
                BATCH_BYTES_MAX,
            ),
            (
                "staging_bytes",
                self.staging_bytes,
                2 * self.staged_batch_bytes,
                1 << 40,
            ),
            (
                "device_pull_batch_bytes",
                self.device_pull_batch_bytes,
                4096,
                PULL_BATCH_BYTES_MAX,
            ),
            ("lane_window", self.lane_window as u64, 1, 4096),
            (
                "ring_bytes",
                self.ring_bytes as u64,
                RING_SLOTS * 4096,
                1 << 30,
            ),
            (
                "device_ring_bytes",
                self.device_ring_bytes as u64,
                RING_SLOTS * 4096,
                RING_SLOTS * BATCH_BYTES_MAX,
            ),
            ("peers_max", self.peers_max as u64, 1, 1 << 20),
            ("strangers_max", self.strangers_max as u64, 1, 1 << 16),
            (
                "the token's length",
                self.token.as_ref().map_or(1, String::len) as u64,
                1,
                TOKEN_BYTES_MAX as u64,
            ),
        ];
        if self.null_wire && self.rdma.usage != RdmaUse::Off {
            return Err(
                "null_wire moves no bytes, and does not go with rdma.usage: leave it off".into(),
            );
        }
        for (name, value, least, most) in ranges.into_iter().chain(self.rdma.ranges()) {
            if !(least..=most).contains(&value) {
                return Err(format!(
                    "{name} is {value}, it must be within {least}..={most}"
                ));
            }
        }
        Ok(())
    }
}

impl RdmaConfig {
    /// Names, values, and the least and most that they may be.
    fn ranges(&self) -> [(&'static str, u64, u64, u64); 7] {
        use crate::wire::{lane::BATCH_BYTES_MAX, rdma::LANDING_BYTES_MAX};
        let (pairs, queue) = (self.queue_pairs.into(), self.send_queue.into());
        let heartbeat = millis(self.heartbeat);
        [
            ("rdma.queue_pairs", pairs, 1, u64::from(LANES_MAX)),
            ("rdma.batch_bytes", self.batch_bytes, 4096, BATCH_BYTES_MAX),
            (
                "rdma.landing_bytes",
                self.landing_bytes,
                0,
                LANDING_BYTES_MAX.into(),
            ),
            ("rdma.window", self.window as u64, 1, 256),
            ("rdma.send_queue", queue, 16, 8192),
            ("rdma.drain in ms", millis(self.drain), 0, 200),
            ("rdma.heartbeat in ms", heartbeat, 10, 60_000),
        ]
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Slots of a ring: two would let both sides work at once, more smooth the hand-over.
pub(crate) const RING_SLOTS: u64 = 8;
