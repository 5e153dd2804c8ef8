//! Whom a decode worker's ranks talk to: prefill workers by their registry, looked up and connected once.
//!
//! An entry holds as long as all its connections do. When one is lost (the prefill was restarted, say, and its ranks
//! listen on new ports) the registry is asked again; also every [`RECHECK`], in case that the name now leads to another
//! instance. Requests that need the same prefill wait for one look-up and share its failure.

use std::collections::btree_map::Entry::Vacant;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvtransfer::bootstrap::RankKey;
use kvtransfer::bootstrap::ranks::{DecodeRank, RankMapping, map_ranks};
use kvtransfer::engine::{ConnectError, Engine, PeerInfo};
use kvtransfer::ids::PeerId;
use kvtransfer::serve::bootstrap_client::{
    Answered, BootstrapClient, BootstrapTarget, ClientError, RankAddress, ServerInfo,
};
use kvtransfer::transfer::Source;
use tokio::time::{Instant, sleep, timeout};

/// Prefill workers known at once. Names come from requests, so there must be an end; those without a live connection
/// give way to new ones.
const ENTRIES_MAX: usize = 256;

/// Longest time for one connection, handshake and all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a registry that cannot be reached, or whose ranks are not all there, is asked again. A restarting prefill
/// is back within it; its requests' deadlines are usually longer.
const LOOK_UP_PATIENCE: Duration = Duration::from_secs(3);

/// First pause between attempts; it doubles up to a second.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// A failed attempt answers everybody who asks within this time, so that many requests to one dead prefill do not queue
/// up for one connection timeout each.
const FAILURE_SHARED: Duration = Duration::from_millis(200);

/// How often a working entry is compared with the registry.
const RECHECK: Duration = Duration::from_secs(5);

/// Longest time for that; a registry that does not answer changes nothing while the connections live.
const RECHECK_TIMEOUT: Duration = Duration::from_millis(500);

/// Where the pages of a room come from, for every rank of this worker.
#[derive(Debug)]
pub(super) struct Route {
    /// One per rank, in order.
    pub(super) ranks: Vec<RankRoute>,
    /// `host:port` of the registry.
    pub(super) registry: String,
    identity: Identity,
}

/// The part of one rank.
#[derive(Debug)]
pub(super) struct RankRoute {
    /// The prefill ranks it receives from.
    pub(super) sources: Vec<Source>,
    /// How many decode ranks each of them serves.
    pub(super) receivers_expected: u16,
    /// What is known of the connections, in the order of `sources`.
    pub(super) peers: Vec<PeerInfo>,
}

/// Tells one life of a prefill from the next.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    generation: Option<u64>,
    instance: Option<String>,
}

impl Identity {
    fn of<T>(answer: &Answered<T>) -> Self {
        Self {
            generation: answer.generation,
            instance: answer.instance.clone(),
        }
    }
}

/// Why there is no route. The text reaches the client.
#[derive(Debug, thiserror::Error)]
pub(super) enum RouteError {
    #[error("{0}")]
    Registry(#[from] ClientError),
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Shared(String),
    #[error("the prefill at {registry} is being replaced")]
    Changing { registry: String },
    #[error("the prefill at {registry} does not fit: {reason}")]
    Misfit { registry: String, reason: String },
    #[error("already {ENTRIES_MAX} prefill workers are connected")]
    Full,
}

impl RouteError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Registry(error) => error.is_retryable(),
            Self::Connect(error) => error.is_retryable(),
            Self::Shared(_) | Self::Changing { .. } => true,
            Self::Misfit { .. } | Self::Full => false,
        }
    }
}

struct Entry {
    client: BootstrapClient,
    route: Option<Arc<Route>>,
    checked: Instant,
    failed: Option<(Instant, String)>,
}

/// The prefill workers known to a decode worker.
pub(super) struct Directory {
    engines: Arc<[Engine]>,
    entries: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<Entry>>>>,
}

impl Directory {
    /// Knows nobody yet.
    pub(super) fn new(engines: Arc<[Engine]>) -> Self {
        Self {
            engines,
            entries: Mutex::default(),
        }
    }

    /// The route to the prefill whose registry is at `host` and `port`, connected if need be. The caller sets the
    /// deadline by dropping the future.
    pub(super) async fn find(&self, host: &str, port: u16) -> Result<Arc<Route>, RouteError> {
        let registry = if host.contains(':') && !host.starts_with('[') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        let give_up = Instant::now() + LOOK_UP_PATIENCE;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.find_once(&registry).await {
                Err(error) if error.is_retryable() && Instant::now() + pause < give_up => {
                    sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                result => return result,
            }
        }
    }

    async fn find_once(&self, registry: &str) -> Result<Arc<Route>, RouteError> {
        let entry = self.entry(registry)?;
        let mut entry = entry.lock().await;
        if let Some(route) = entry.route.clone() {
            if self.is_alive(&route) && self.is_current(&mut entry, &route).await {
                return Ok(route);
            }
            entry.route = None;
        }
        if let Some((_, reason)) = entry
            .failed
            .as_ref()
            .filter(|(when, _)| when.elapsed() < FAILURE_SHARED)
        {
            return Err(RouteError::Shared(reason.clone()));
        }
        match self.look_up(&mut entry.client, registry).await {
            Ok(route) => {
                let route = Arc::new(route);
                entry.route = Some(route.clone());
                entry.checked = Instant::now();
                entry.failed = None;
                Ok(route)
            }
            Err(error) => {
                entry.failed = error
                    .is_retryable()
                    .then(|| (Instant::now(), error.to_string()));
                Err(error)
            }
        }
    }

    fn entry(&self, registry: &str) -> Result<Arc<tokio::sync::Mutex<Entry>>, RouteError> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get(registry) {
            return Ok(entry.clone());
        }
        if entries.len() >= ENTRIES_MAX {
            let idle = |entry: &Arc<tokio::sync::Mutex<Entry>>| {
                Arc::strong_count(entry) == 1
                    && entry.try_lock().is_ok_and(|entry| {
                        !entry
                            .route
                            .as_ref()
                            .is_some_and(|route| self.is_alive(route))
                    })
            };
            let gone = entries
                .iter()
                .find(|(_, entry)| idle(entry))
                .map(|(name, _)| name.clone())
                .ok_or(RouteError::Full)?;
            entries.remove(&gone);
        }
        let entry = Arc::new(tokio::sync::Mutex::new(Entry {
            client: BootstrapClient::new(BootstrapTarget::new(registry)),
            route: None,
            checked: Instant::now(),
            failed: None,
        }));
        entries.insert(registry.to_owned(), entry.clone());
        Ok(entry)
    }

    /// Whether all connections of a route still stand.
    pub(super) fn is_alive(&self, route: &Route) -> bool {
        self.engines.iter().zip(&route.ranks).all(|(engine, rank)| {
            let connected: BTreeSet<PeerId> = engine.peers().iter().map(|info| info.peer).collect();
            rank.sources
                .iter()
                .all(|source| connected.contains(&source.peer))
        })
    }

    /// Whether the registry, asked now and then, still names the instance of `route`.
    async fn is_current(&self, entry: &mut Entry, route: &Route) -> bool {
        if entry.checked.elapsed() < RECHECK {
            return true;
        }
        entry.checked = Instant::now();
        match timeout(RECHECK_TIMEOUT, entry.client.server_info()).await {
            Ok(Ok(answer)) => Identity::of(&answer) == route.identity,
            // Connections outlive a registry that is slow or gone.
            Ok(Err(_)) | Err(_) => true,
        }
    }

    async fn look_up(
        &self,
        client: &mut BootstrapClient,
        registry: &str,
    ) -> Result<Route, RouteError> {
        let info = client.server_info().await?;
        let identity = Identity::of(&info);
        let mappings = self.map(&info.value, registry)?;
        let mut addresses = BTreeMap::new();
        for key in mappings.iter().flat_map(keys) {
            let Vacant(unknown) = addresses.entry(key) else {
                continue;
            };
            let answer = client.rank(key).await?;
            if Identity::of(&answer) != identity {
                let registry = registry.to_owned();
                return Err(RouteError::Changing { registry });
            }
            unknown.insert(socket_address(&answer.value, registry).await?);
        }
        let mut ranks = Vec::with_capacity(mappings.len());
        for (rank, mapping) in mappings.iter().enumerate() {
            let mut peers = Vec::with_capacity(mapping.targets.len());
            for key in keys(mapping) {
                peers.push(self.connect(rank, addresses[&key]).await?);
            }
            let sources = peers.iter().zip(&mapping.targets);
            ranks.push(RankRoute {
                sources: sources
                    .map(|(info, target)| Source {
                        peer: info.peer,
                        dummy: target.is_dummy,
                    })
                    .collect(),
                receivers_expected: u16::try_from(mapping.required_dst_info_num)
                    .unwrap_or(u16::MAX),
                peers,
            });
        }
        Ok(Route {
            ranks,
            registry: registry.to_owned(),
            identity,
        })
    }

    /// Which prefill ranks each of ours needs.
    fn map(&self, info: &ServerInfo, registry: &str) -> Result<Vec<RankMapping>, RouteError> {
        let misfit = |reason: String| RouteError::Misfit {
            registry: registry.to_owned(),
            reason,
        };
        if info.dp_size != 1 {
            let reason = format!("it has {} data-parallel groups", info.dp_size);
            return Err(misfit(reason));
        }
        let size = u32::try_from(self.engines.len()).expect("invariant: --tp is 32 bits");
        let map = |attn_tp_rank| {
            let decode = DecodeRank {
                attn_tp_rank,
                attn_tp_size: size,
                attn_cp_size: 1,
                pp_rank: 0,
                pp_size: 1,
                is_mla: false,
                all_cp_ranks: false,
            };
            map_ranks(&info.shape(), &decode, 0).map_err(|error| misfit(error.to_string()))
        };
        (0..size).map(map).collect()
    }

    /// The connection of one of our ranks to an address, an existing one if it lives.
    async fn connect(&self, rank: usize, address: SocketAddr) -> Result<PeerInfo, RouteError> {
        let name = address.to_string();
        let known = self.engines[rank].peers();
        if let Some(info) = known.into_iter().rev().find(|info| info.address == name) {
            return Ok(info);
        }
        let engines = self.engines.clone();
        let dialed =
            tokio::task::spawn_blocking(move || engines[rank].connect(address, CONNECT_TIMEOUT))
                .await;
        // The task is cancelled only with the whole runtime.
        let info =
            dialed.map_err(|_| RouteError::Shared("the worker is stopping".to_owned()))??;
        tracing::info!(rank, %address, instance = %info.instance, path = info.path, "connected to a prefill rank");
        Ok(info)
    }
}

fn keys(mapping: &RankMapping) -> impl Iterator<Item = RankKey> {
    mapping.targets.iter().map(|target| RankKey {
        dp: target.dp,
        cp: target.cp,
        tp: target.tp,
        pp: target.pp,
    })
}

async fn socket_address(rank: &RankAddress, registry: &str) -> Result<SocketAddr, RouteError> {
    let bare = rank.rank_ip.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, rank.rank_port));
    }
    let found = timeout(
        CONNECT_TIMEOUT,
        tokio::net::lookup_host((bare, rank.rank_port)),
    )
    .await;
    let first = found
        .ok()
        .and_then(Result::ok)
        .and_then(|mut addresses| addresses.next());
    first.ok_or_else(|| RouteError::Misfit {
        registry: registry.to_owned(),
        reason: format!("its rank's name {:?} has no address", rank.rank_ip),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_that_lead_nowhere_give_way_to_new_ones() {
        let directory = Directory::new(Vec::new().into());
        for number in 0..ENTRIES_MAX + 20 {
            let registry = format!("127.1.{}.{}:1", number / 200, number % 200 + 1);
            let error = directory
                .find_once(&registry)
                .await
                .expect_err("nobody is there");
            assert!(matches!(error, RouteError::Registry(_)), "{error}");
            assert!(error.to_string().contains(&registry), "{error}");
        }
        let known = directory.entries.lock().expect("no panic").len();
        assert_eq!(known, ENTRIES_MAX);
    }

    #[tokio::test]
    async fn entries_in_use_stay_and_the_bound_is_a_sentence() {
        let directory = Directory::new(Vec::new().into());
        let name = |number: usize| format!("h{number}:1");
        let in_use: Vec<_> = (0..ENTRIES_MAX)
            .map(|number| directory.entry(&name(number)).expect("room for it"))
            .collect();
        let refused = directory.entry("one-more:1").err().expect("full");
        assert!(refused.to_string().contains("256"), "{refused}");
        assert!(!refused.is_retryable());
        assert!(directory.entry(&name(7)).is_ok(), "known names are found");
        drop(in_use);
        assert!(directory.entry("one-more:1").is_ok());
    }

    #[tokio::test]
    async fn those_who_wait_share_one_failure() {
        let directory = Directory::new(Vec::new().into());
        let first = directory
            .find_once("127.0.0.1:1")
            .await
            .expect_err("nobody is there");
        let second = directory
            .find_once("127.0.0.1:1")
            .await
            .expect_err("nobody is there");
        assert!(matches!(second, RouteError::Shared(_)), "{second:?}");
        assert_eq!(first.to_string(), second.to_string());
    }
}
