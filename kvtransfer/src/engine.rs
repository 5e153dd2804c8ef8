//! The shell around the pure core: threads, sockets, memory, and the handles that applications hold.
//!
//! Threads of one engine: `kvt-control` (listener, handshakes, control streams, deadlines) and two (`kvt-lane-P-L`, reader, and `kvt-lane-P-Lw`, writer) per
//! data connection. All share one `Hub`, whose one lock guards the node and is held for short, bounded work only;
//! bytes move outside of it. A dial runs in the caller's thread.

mod accept;
mod awaited;
mod control;
pub(crate) mod devices;
mod dial;
mod effects;
mod greeting;
mod handle;
pub(crate) mod hub;
pub(crate) mod lanes;
pub(crate) mod link;
mod probe;
mod queue_pairs;
pub(crate) mod redial;
mod release;
mod write;

pub use awaited::EVENTS_MAX;
pub use dial::ConnectError;
pub use handle::{CompletionQueue, Poll, Transfer};
pub use probe::ProbeError;
pub use release::MemoryError;
pub use write::WriteError;

pub use crate::plan::blocks::Block;
pub use crate::transport::null_wire::NullCounts;

pub use crate::transport::rail::RailCounts;

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use thiserror::Error;

use crate::{
    clock,
    config::{EngineConfig, RdmaConfig, RdmaUse},
    error::SubmitError,
    ids::{InstanceId, PeerId},
    layout::{Layout, RegionId},
    memory::Region,
    serve::{
        ServeError,
        bootstrap::BootstrapServer,
        telemetry::{StartError, TelemetryServer},
    },
    telemetry::snapshot::Snapshot,
    transfer::{ReceiveRequest, SendRequest, Summary},
    transport::rail::Rails,
};

/// Why an engine could not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A configuration field is out of range.
    #[error("configuration: {0}")]
    Config(String),
    /// The layout contradicts itself or the regions.
    #[error("layout: {0}")]
    Layout(String),
    /// RDMA is required, but cannot be used here.
    #[error("RDMA: {0}")]
    Rdma(String),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}{}", fix(.source))]
    Listen {
        /// Which address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The engine's bootstrap registry did not start.
    #[error("bootstrap registry: {0}")]
    Bootstrap(#[from] ServeError),
    /// The engine's telemetry did not start.
    #[error("telemetry: {0}")]
    Telemetry(#[from] StartError),
    /// The system has no thread, event or random number for us.
    #[error("starting the engine: {0}")]
    System(#[from] io::Error),
}

fn fix(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            " (another process has that port: stop it, or use port 0 for a free one)"
        }
        io::ErrorKind::AddrNotAvailable => " (no interface of this host has that address)",
        io::ErrorKind::PermissionDenied => " (ports below 1024 need privileges)",
        _ => "",
    }
}

/// The memory of an engine: regions, named by the order in which they are added.
#[derive(Debug, Default)]
pub struct Memory {
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// No regions yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a region; its id goes into the layout's entries.
    ///
    /// # Panics
    /// With more than 2^32 regions.
    pub fn add(&mut self, region: Region) -> RegionId {
        self.add_shared(Arc::new(region))
    }

    /// Adds a region that the application keeps using.
    ///
    /// # Panics
    /// With more than 2^32 regions.
    pub fn add_shared(&mut self, region: Arc<Region>) -> RegionId {
        let id = u32::try_from(self.regions.len()).expect("invariant: fewer than 2^32 regions");
        self.regions.push(region);
        RegionId(id)
    }

    /// A region by its id.
    pub fn region(&self, id: RegionId) -> Option<&Arc<Region>> {
        self.regions.get(id.0 as usize)
    }
}

/// What is known of a connected peer.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// This engine's number for the connection.
    pub peer: PeerId,
    /// The peer's identity.
    pub instance: InstanceId,
    /// Its address.
    pub address: String,
    /// The path that data to and from it takes: `tcp`, `shm-pull`, `shm-ring`; `none` until the first data
    /// connection is open.
    pub path: &'static str,
    /// Why it is not a better one; empty if it is the best.
    pub path_reason: String,
    /// How long the handshake took.
    pub handshake: Duration,
}

/// One rank's engine.
pub struct Engine {
    hub: Arc<hub::Hub>,
    control: Mutex<Option<JoinHandle<()>>>,
    local_addr: Option<SocketAddr>,
    bootstrap: Option<BootstrapServer>,
    telemetry: Option<TelemetryServer>,
}

impl Engine {
    /// Starts an engine over its memory.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn start(config: EngineConfig, memory: Memory, layout: Layout) -> Result<Self, BuildError> {
        config.validate().map_err(BuildError::Config)?;
        layout
            .validate()
            .map_err(|error| BuildError::Layout(error.to_string()))?;
        let regions: Vec<(u64, u64)> = memory
            .regions
            .iter()
            .map(|r| (r.base_address(), r.len() as u64))
            .collect();
        let lengths = regions.iter().map(|(_, len)| *len).collect::<Vec<_>>();
        greeting::check_regions(&layout, &lengths).map_err(BuildError::Layout)?;
        let listener = config
            .listen
            .map(|address| {
                std::net::TcpListener::bind(address)
                    .map_err(|source| BuildError::Listen { address, source })
            })
            .transpose()?;
        let local_addr = listener
            .as_ref()
            .map(std::net::TcpListener::local_addr)
            .transpose()?;
        let (bootstrap, telemetry) = (config.bootstrap.clone(), config.telemetry.clone());
        let bootstrap = bootstrap.map(BootstrapServer::start).transpose()?;
        let rails = open_rails(&config.rdma, &memory.regions)?;
        let devices = devices::DeviceSide::new(&config, &memory.regions);
        let devices = devices.map_err(BuildError::Config)?;
        let (hub, waker) = hub::Hub::new(config, memory.regions, devices, layout, rails)?;
        let hub = Arc::new(hub);
        let telemetry = telemetry
            .map(|config| TelemetryServer::start(config, snapshot_source(&hub)))
            .transpose()?;
        let control = control::start(Arc::clone(&hub), listener, waker)?;
        let control = Mutex::new(Some(control));
        Ok(Self {
            hub,
            control,
            local_addr,
            bootstrap,
            telemetry,
        })
    }

    /// This engine's identity.
    pub fn instance(&self) -> InstanceId {
        self.hub.instance
    }

    /// Where it listens.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.local_addr
    }

    /// Where its bootstrap registry listens, if it runs one.
    pub fn bootstrap_addr(&self) -> Option<SocketAddr> {
        self.bootstrap.as_ref().map(BootstrapServer::local_addr)
    }

    /// Where its telemetry stream is served, if it is.
    pub fn telemetry_addr(&self) -> Option<SocketAddr> {
        self.telemetry.as_ref().map(TelemetryServer::addr)
    }

    /// Where its Prometheus text is served, if it is.
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.telemetry
            .as_ref()
            .and_then(TelemetryServer::metrics_addr)
    }

    /// Its memory region of that id.
    pub fn region(&self, id: RegionId) -> Option<&Region> {
        self.hub.region(id)
    }

    /// Its layout.
    pub fn layout(&self) -> &Layout {
        &self.hub.layout
    }

    /// Connects to a peer's listener, agrees on layouts and opens the data connections. Blocks the calling thread.
    ///
    /// # Errors
    /// Unreachable, refused with the peer's sentence, incompatible layouts, or the timeout.
    pub fn connect(
        &self,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<PeerInfo, ConnectError> {
        dial::dial(&self.hub, address, timeout)
    }

    /// Ends the connection to a peer; transfers that need it fail with that reason.
    pub fn disconnect(&self, peer: PeerId, reason: &str) {
        self.hub.drop_peer(peer, reason);
    }

    /// Asks a peer whether it answers, and waits for that; how long the answer took. A frozen process does not answer,
    /// although its connections stand.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn probe(&self, peer: PeerId, timeout: Duration) -> Result<Duration, ProbeError> {
        self.hub.probe(peer, timeout)
    }

    /// Every connected peer.
    pub fn peers(&self) -> Vec<PeerInfo> {
        self.hub.peers()
    }

    /// Opens the sending side of a room.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn send(&self, request: &SendRequest) -> Result<Transfer, SubmitError> {
        Transfer::open_send(&self.hub, request)
    }

    /// Opens the receiving side of a room and grants its pages to the senders.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn receive(&self, request: &ReceiveRequest) -> Result<Transfer, SubmitError> {
        Transfer::open_receive(&self.hub, request)
    }

    /// Writes blocks of this engine's memory to addresses of a peer's, which must allow it
    /// ([`writable_by_address`](EngineConfig::writable_by_address)), and waits until the peer has confirmed the last
    /// byte. Any number of threads may write at once; at most 32 rooms of 16 384 merged blocks each are on their way to
    /// one peer, and further ones wait for their turn. Order between blocks and between calls is not kept. `timeout`
    /// counts for at most ten minutes.
    ///
    /// # Errors
    /// [`WriteError`]: nothing was written, or some was but nothing will be any more, or (only if the peer does not
    /// answer) that is not known.
    pub fn write(
        &self,
        peer: PeerId,
        blocks: &[Block],
        timeout: Duration,
    ) -> Result<Summary, WriteError> {
        write::write(&self.hub, peer, blocks, timeout)
    }

    /// Gives up the memory behind regions: their owner may free it, and must not before this returns `Ok`. No new transfer
    /// opens from now on, and live ones are waited for, for at most `timeout`. Then nothing touches the memory: gates are
    /// closed, RDMA registrations undone. Peers of an engine that uses RDMA or a device's memory are disconnected with that
    /// reason; others stay.
    /// Until [`restore_memory`](Self::restore_memory) transfers are refused with
    /// [`SubmitError::Released`] and peers cannot connect. Regions that are released already stay so.
    ///
    /// # Errors
    /// [`MemoryError`]. If it is [`Busy`](MemoryError::Busy) nothing has changed; after [`Rdma`](MemoryError::Rdma) the
    /// memory is not in use by transfers but still registered, and releasing again tries again.
    pub fn release_memory(
        &self,
        regions: &[RegionId],
        timeout: Duration,
    ) -> Result<(), MemoryError> {
        self.hub.release(regions, timeout)
    }

    /// Takes regions into use again, when memory is back behind the same addresses. With the last one, RDMA devices are
    /// opened and the memory registered anew; peers that were disconnected must connect again.
    ///
    /// # Errors
    /// [`MemoryError`]; the memory stays released then.
    pub fn restore_memory(&self, regions: &[RegionId]) -> Result<(), MemoryError> {
        self.hub.restore(regions)
    }

    /// Whether memory is released, or about to be.
    pub fn is_memory_released(&self) -> bool {
        self.hub.released().is_some()
    }

    /// What connections without a wire were asked to move so far, see [`EngineConfig::null_wire`].
    pub fn null_counts(&self) -> NullCounts {
        self.hub.null_wire.counts()
    }

    /// The queue of ended transfers, with a descriptor to poll. Transfers opened after this call appear in it.
    pub fn completions(&self) -> Arc<CompletionQueue> {
        self.hub.completions()
    }

    /// The live picture for telemetry.
    pub fn snapshot(&self) -> Snapshot {
        self.hub.snapshot()
    }

    /// A function that takes the live picture, for a telemetry server of the application's own. It does not keep the
    /// engine or its memory alive; afterwards it shows an empty picture.
    pub fn snapshot_source(&self) -> Arc<dyn Fn() -> Snapshot + Send + Sync> {
        snapshot_source(&self.hub)
    }

    /// Connections and frames that were refused because their bytes were not the protocol.
    pub fn malformed(&self) -> u64 {
        self.hub.malformed()
    }

    /// What each RDMA device was asked to do so far; empty without RDMA.
    pub fn rail_counts(&self) -> Vec<RailCounts> {
        self.hub.rails().counts()
    }

    /// Ends every transfer with [`TransferError::Shutdown`](crate::error::TransferError::Shutdown), closes every
    /// connection and joins the threads.
    pub fn shut_down(&self) {
        self.hub.shut_down();
        let control = self
            .control
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(control) = control {
            let _ = control.join();
        }
        self.hub.rails().stop();
        self.hub.join_lanes();
    }

    /// How each RDMA device in use reaches the GPU's memory, where regions lie there: decided by registering it.
    pub fn gpu_direct(&self) -> Vec<crate::gpu::verdict::GpuDirect> {
        self.hub.rails().verdicts()
    }

    /// Resets one data connection of a peer, as a broken network would. Whether there was one.
    #[cfg(feature = "testing")]
    pub fn reset_lane(&self, peer: PeerId, lane: u8) -> bool {
        let link = self.hub.link(peer);
        let lanes = link.map(|link| link.lanes.all()).unwrap_or_default();
        let found = lanes.iter().find(|known| known.id().0 == lane);
        found.inspect(|lane| lane.fence("reset")).is_some()
    }

    /// Messages and batches about rooms that are over, since the start.
    pub fn late_messages(&self) -> u64 {
        self.hub.late_messages()
    }

    /// Time on the engine's own clock, as in snapshots.
    pub fn now() -> crate::time::Time {
        clock::now()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn open_rails(config: &RdmaConfig, regions: &[Arc<Region>]) -> Result<Rails, BuildError> {
    if config.usage == RdmaUse::Off {
        return Ok(Rails::none("RDMA is switched off here".into()));
    }
    let library = config.open_library();
    let opened = library.and_then(|library| Rails::open(config, &library, regions));
    match opened {
        Ok(rails) => Ok(rails),
        Err(reason) if config.usage == RdmaUse::Required => Err(BuildError::Rdma(reason)),
        Err(reason) => {
            tracing::info!(reason, "RDMA is not used");
            Ok(Rails::none(reason))
        }
    }
}

fn snapshot_source(hub: &Arc<hub::Hub>) -> Arc<dyn Fn() -> Snapshot + Send + Sync> {
    let hub = Arc::downgrade(hub);
    Arc::new(move || {
        hub.upgrade()
            .map_or_else(Snapshot::default, |hub| hub.snapshot())
    })
}

/// Reads the host's boot id, which tells one kernel's life from another's.
pub(crate) fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id"))?;
    let mut id = [0; 16];
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(pair[0] * 16 + pair[1]).unwrap_or(0);
    }
    Ok(id)
}
