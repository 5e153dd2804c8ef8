//! The real engine as a fabric: every rank in this process, over loopback.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use super::{Fabric, Outcome, PREFIX, Receive, SOON, room};
use crate::{
    clock,
    config::{EngineConfig, RdmaConfig, SameHost},
    engine::{Engine, Memory, Transfer},
    error::{SubmitError, TransferError},
    ids::PeerId,
    layout::RegionId,
    memory::Region,
    testing::sim::RankSpec,
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

/// Which path the engines take.
pub trait Path {
    /// The setting.
    const SAME_HOST: SameHost;
    /// The name that the engine must report.
    const NAME: &'static str;
    /// What the ranks of one fabric share; it is dropped after they are.
    type Network;
    /// What all copies on the way through host memory may hold at once, in bytes.
    const STAGING_BYTES: u64 = 256 << 10;
    /// Makes it.
    fn network() -> Self::Network;
    /// Memory for the rank's region of that index.
    ///
    /// # Panics
    /// If this host has none.
    fn region(_network: &Self::Network, _rank: usize, _index: usize, len: usize) -> Region {
        Region::heap(len).expect("this host has memory")
    }
    /// How the rank of that index uses RDMA.
    fn rdma(_network: &Self::Network, _rank: usize) -> RdmaConfig {
        RdmaConfig::default()
    }
}

/// Loopback TCP.
pub struct TcpPath;
/// Same host, by pull.
pub struct PullPath;
/// Same host, through a shared ring.
pub struct RingPath;

impl Path for TcpPath {
    const SAME_HOST: SameHost = SameHost::Off;
    const NAME: &'static str = "tcp";
    type Network = ();
    fn network() {}
}

impl Path for PullPath {
    const SAME_HOST: SameHost = SameHost::PullOnly;
    const NAME: &'static str = "shm-pull";
    type Network = ();
    fn network() {}
}

impl Path for RingPath {
    const SAME_HOST: SameHost = SameHost::RingOnly;
    const NAME: &'static str = "shm-ring";
    type Network = ();
    fn network() {}
}

struct Rank {
    spec: RankSpec,
    engine: Engine,
    address: SocketAddr,
}

/// Engines in this process.
pub struct EngineFabric<P: Path> {
    ranks: Vec<Rank>,
    // Dropped after the engines that use it.
    network: P::Network,
}

fn start<P: Path>(
    network: &P::Network,
    rank: usize,
    spec: &RankSpec,
    address: SocketAddr,
) -> Engine {
    let mut memory = Memory::new();
    for (index, len) in spec.regions.iter().enumerate() {
        memory.add(P::region(network, rank, index, *len));
    }
    let config = EngineConfig {
        listen: Some(address),
        same_host: P::SAME_HOST,
        rdma: P::rdma(network, rank),
        batch_bytes: 64 << 10,
        pull_batch_bytes: 64 << 10,
        ring_bytes: 512 << 10,
        device_ring_bytes: 256 << 10,
        staged_batch_bytes: 64 << 10,
        staging_bytes: P::STAGING_BYTES,
        device_pull_batch_bytes: 64 << 10,
        node: spec.node.clone(),
        // On an emulated machine with busy processors, RDMA over its network has taken more than the default's 5 s.
        handshake_timeout: Duration::from_secs(60),
        ..EngineConfig::default()
    };
    Engine::start(config, memory, spec.layout.clone()).expect("the engine starts")
}

impl<P: Path> EngineFabric<P> {
    /// Starts the ranks on a network that the test has made.
    ///
    /// # Panics
    /// If an engine does not start.
    pub fn on(network: P::Network, ranks: Vec<RankSpec>) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let ranks = ranks.into_iter().enumerate().map(|(rank, spec)| {
            let engine = start::<P>(&network, rank, &spec, any);
            let address = engine.local_addr().expect("it listens");
            Rank {
                spec,
                engine,
                address,
            }
        });
        Self {
            ranks: ranks.collect(),
            network,
        }
    }

    /// What the ranks share.
    pub fn network(&self) -> &P::Network {
        &self.network
    }

    /// Where a rank listens.
    pub fn address(&self, rank: usize) -> SocketAddr {
        self.ranks[rank].address
    }

    /// The engine of a rank.
    pub fn engine(&self, rank: usize) -> &Engine {
        &self.ranks[rank].engine
    }

    /// How `rank` calls `other`, the newest connection if there are several.
    pub fn peer(&self, rank: usize, other: usize) -> Option<PeerId> {
        let instance = self.ranks[other].engine.instance();
        let peers = self.ranks[rank].engine.peers().into_iter();
        let known = peers.filter(|info| info.instance == instance);
        known.map(|info| info.peer).max()
    }
}

impl<P: Path> Fabric for EngineFabric<P> {
    type Transfer = Transfer;

    fn start(ranks: Vec<RankSpec>) -> Self {
        Self::on(P::network(), ranks)
    }

    fn path(&mut self, from: usize, to: usize) -> (String, &'static str) {
        let peer = self.peer(from, to);
        let mut peers = self.ranks[from].engine.peers().into_iter();
        let found = peers.find(|info| Some(info.peer) == peer);
        let path = found.map_or("none", |info| info.path);
        (path.to_owned(), P::NAME)
    }

    fn connect(&mut self, from: usize, to: usize) -> Result<(), String> {
        let address = self.ranks[to].address;
        let connected = self.ranks[from].engine.connect(address, SOON);
        connected.map(|_| ()).map_err(|error| error.to_string())
    }

    fn is_connected(&mut self, rank: usize, other: usize) -> bool {
        self.peer(rank, other).is_some()
    }

    fn write(&mut self, rank: usize, region: RegionId, offset: u64, bytes: &[u8]) {
        let region = self.ranks[rank].engine.region(region).expect("it exists");
        region.write_at(offset, bytes).expect("in bounds");
    }

    fn read(&mut self, rank: usize, region: RegionId, offset: u64, len: u64) -> Vec<u8> {
        let region = self.ranks[rank].engine.region(region).expect("it exists");
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        region.read_at(offset, &mut bytes).expect("in bounds");
        bytes
    }

    fn send(&mut self, rank: usize, request: &SendRequest) -> Result<Transfer, SubmitError> {
        self.ranks[rank].engine.send(request)
    }

    fn receive(&mut self, rank: usize, request: &Receive) -> Result<Transfer, SubmitError> {
        let sources = request.sources.iter().map(|(other, dummy)| {
            let dummy = *dummy;
            let peer = self.peer(rank, *other);
            peer.map(|peer| Source { peer, dummy })
                .ok_or(SubmitError::UnknownPeer)
        });
        let request = ReceiveRequest {
            room: room(request.room),
            sources: sources.collect::<Result<_, _>>()?,
            receivers_expected: request.receivers_expected,
            prefix_tokens: PREFIX,
            items: request
                .items
                .iter()
                .map(|l| Arc::from(l.as_slice()))
                .collect(),
            timeout: request.timeout,
        };
        self.ranks[rank].engine.receive(&request)
    }

    fn push(&mut self, transfer: &Transfer, chunk: &Chunk) -> Result<(), SubmitError> {
        transfer.push(chunk)
    }

    fn wait_ready(&mut self, transfer: &Transfer) -> Result<u32, TransferError> {
        transfer.wait_ready(SOON)
    }

    fn wait(&mut self, transfer: &Transfer, timeout: Duration) -> Option<Outcome> {
        transfer.wait(timeout)
    }

    fn cancel(&mut self, transfer: &Transfer) {
        transfer.cancel();
    }

    fn pass(&mut self, time: Duration) {
        // Nothing can be waited for where nothing may happen.
        let end = clock::now() + time;
        while clock::now() < end {
            std::thread::sleep(end.since(clock::now()));
        }
    }

    fn reset_lane(&mut self, rank: usize, other: usize, lane: u8) {
        if let Some(peer) = self.peer(rank, other) {
            self.ranks[rank].engine.reset_lane(peer, lane);
        }
    }

    fn shut_down(&mut self, rank: usize) {
        self.ranks[rank].engine.shut_down();
    }

    fn restart(&mut self, rank: usize) {
        let index = rank;
        let rank = &mut self.ranks[index];
        rank.engine.shut_down();
        rank.engine = start::<P>(&self.network, index, &rank.spec, rank.address);
    }

    fn late_messages(&mut self, rank: usize) -> u64 {
        self.ranks[rank].engine.late_messages()
    }
}
