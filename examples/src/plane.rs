//! The plane of a PD worker process: one transfer engine per tensor-parallel rank behind the seam of [`crate::pd`].
//!
//! A prefill worker runs the bootstrap registry itself, as SGLang's does, and keeps every rank registered under a lease.
//! A decode worker asks the registry that a request names, connects each of its ranks to the prefill ranks that hold
//! its heads, and lends pages to all of them; a room has succeeded when it has on every rank. Whatever takes time
//! (HTTP, connecting, registering) runs on a small runtime of the plane's own, never on the scheduler's thread, and ends
//! by the room's deadline with a reason that the client reads.
#![forbid(unsafe_code)]

mod decode;
mod directory;
mod outcome;
mod prefill;
mod registry;
mod store;
mod watch;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::sync::Arc;

use anyhow::Context as _;
use kvtransfer::config::{EngineConfig, RdmaUse, SameHost};
use kvtransfer::engine::{Engine, Memory};
use kvtransfer::layout::Shard;
use kvtransfer::memory::Region;
use kvtransfer::serve::telemetry::{TelemetryConfig, TelemetryServer};
use kvtransfer::wire::rdma::Connector;
use tokio::runtime::Runtime;

use crate::cache::heap::heap_ranks;
use crate::cache::{RankMemory, RankShape};
use crate::pd::{Doorbell, Plane, Role};
use crate::server::Mode;
use crate::settings::Settings;
use store::RegionStore;

pub use watch::Watch;

/// Which path bytes take between two workers of one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TransferPath {
    /// The fastest that the host allows.
    #[default]
    Auto,
    /// Let the receiver read the sender's memory, else TCP.
    Pull,
    /// A ring of shared memory, else TCP.
    Ring,
    /// Always TCP.
    Tcp,
    /// Always RDMA verbs, even within one host; the worker does not start without a usable device.
    Verbs,
}

/// How queue pairs are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RdmaConnector {
    /// Out of band, as RoCE and eRDMA's compat mode want it.
    Compat,
    /// Through `rdma_cm`, as iWARP and eRDMA's standard mode want it.
    Standard,
}

impl From<RdmaConnector> for Connector {
    fn from(connector: RdmaConnector) -> Self {
        match connector {
            RdmaConnector::Compat => Self::Compat,
            RdmaConnector::Standard => Self::Standard,
        }
    }
}

impl From<TransferPath> for SameHost {
    fn from(path: TransferPath) -> Self {
        match path {
            TransferPath::Auto => Self::Auto,
            TransferPath::Pull => Self::PullOnly,
            TransferPath::Ring => Self::RingOnly,
            TransferPath::Tcp | TransferPath::Verbs => Self::Off,
        }
    }
}

/// Makes the plane that the settings describe.
///
/// # Errors
/// When memory, an address, a port or a thread cannot be had; the sentence names it.
pub fn build(settings: &Settings, bell: Doorbell) -> anyhow::Result<Plane> {
    match settings.disaggregation_mode {
        Mode::Null => {
            let whole = RankShape {
                kv_heads: settings.kv_heads as usize,
                ..settings.rank()
            };
            Ok(Plane {
                ranks: heap_ranks(whole, settings.tp as usize),
                role: Role::Null,
                watch: None,
            })
        }
        Mode::Prefill => prefill::plane(settings, bell),
        Mode::Decode => decode::plane(settings, bell),
    }
}

/// Starts one engine per rank over fresh memory. With `listen`, each listens there on a port of the system's choice.
fn start_ranks(
    settings: &Settings,
    listen: Option<IpAddr>,
) -> anyhow::Result<(Vec<RankMemory>, Arc<[Engine]>)> {
    let shape = settings.rank();
    let mut ranks = Vec::new();
    let mut engines = Vec::new();
    for rank in 0..settings.tp {
        let bytes = usize::try_from(shape.region_bytes()).context("the KV cache is too large")?;
        let region = Arc::new(Region::mmap(bytes).context("cannot get memory for the KV cache")?);
        let mut memory = Memory::new();
        let id = memory.add_shared(region.clone());
        let place = Shard {
            rank,
            size: settings.tp,
        };
        let layout = shape.layout(id, place, settings.kv_heads as usize);
        let mut config = EngineConfig::default();
        config.listen = listen.map(|ip| SocketAddr::new(ip, 0));
        config.same_host = settings.transfer_path.into();
        if settings.transfer_path == TransferPath::Verbs {
            config.rdma.usage = RdmaUse::Required;
            config.rdma.devices.clone_from(&settings.rdma_devices);
            config.rdma.connector = settings.rdma_connector.map(Connector::from);
        }
        let engine = Engine::start(config, memory, layout)
            .with_context(|| format!("cannot start the transfer engine of rank {rank}"))?;
        engines.push(engine);
        ranks.push(RankMemory {
            shape,
            store: Arc::new(RegionStore::new(region, &shape)),
        });
    }
    Ok((ranks, engines.into()))
}

/// Serves the ranks' telemetry if the settings ask for it.
fn serve_telemetry(
    settings: &Settings,
    watch: &Arc<Watch>,
) -> anyhow::Result<Option<TelemetryServer>> {
    let Some(port) = settings.telemetry_port else {
        return Ok(None);
    };
    let ip = resolve(&settings.host)?;
    let mut config = TelemetryConfig::default();
    config.listen = SocketAddr::new(ip, port);
    config.metrics = settings.metrics_port.map(|port| SocketAddr::new(ip, port));
    let picture = watch.clone();
    let server = TelemetryServer::start(config, Arc::new(move || picture.snapshot()))
        .context("cannot serve telemetry")?;
    watch.set_telemetry(server.addr());
    tracing::info!(stream = %server.addr(), metrics = ?server.metrics_addr(), "telemetry");
    Ok(Some(server))
}

/// The first address of a host name.
fn resolve(host: &str) -> anyhow::Result<IpAddr> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut found = (bare, 0)
        .to_socket_addrs()
        .with_context(|| format!("--host {host} has no address"))?;
    let first = found
        .next()
        .with_context(|| format!("--host {host} has no address"))?;
    Ok(first.ip())
}

/// The address that peers are told to connect to, for a listener on `ip`. A listener on all addresses has no single
/// one: then it is the address from which this host would reach others.
fn advertised(settings: &Settings, ip: IpAddr) -> IpAddr {
    if let Some(told) = settings.advertise_ip {
        return told;
    }
    if !ip.is_unspecified() {
        return ip;
    }
    // Connecting a datagram socket sends nothing; it only asks for the route. The target is a documentation address.
    let (any, far) = match ip {
        IpAddr::V4(_) => (ip, IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))),
        IpAddr::V6(_) => (
            ip,
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        ),
    };
    let route = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((far, 9))?;
        socket.local_addr()
    };
    route().map_or_else(|_| loopback_of(ip), |address| address.ip())
}

/// How this host reaches a listener of its own.
fn loopback_of(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    }
}

/// The plane's own runtime. Unlike tokio's it may be dropped inside another one.
#[derive(Debug)]
struct Background(Option<Runtime>);

/// Threads that may connect or look names up at once. A prefill that does not answer holds one for [`directory`]'s
/// connect timeout, so this many silent prefills slow each other, and nobody else.
const BLOCKING_THREADS_MAX: usize = 16;

impl Background {
    fn start() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name("pd-plane")
            .enable_all()
            .build()
            .context("cannot start the plane's runtime")?;
        Ok(Self(Some(runtime)))
    }

    fn runtime(&self) -> &Runtime {
        self.0.as_ref().expect("invariant: taken only by drop")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
