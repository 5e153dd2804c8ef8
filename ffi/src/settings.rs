//! The JSON in which engines and registries are configured. Every field of the library's configuration is here under its
//! own name, with its unit at the end; what is left out keeps the library's default.
#![forbid(unsafe_code)]

use std::{
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
    time::Duration,
};

use kvt::{
    bootstrap::registry::RegistryLimits,
    config::{EngineConfig, RdmaConfig, RdmaUse, SameHost},
    gpu::PERCENT_DEFAULT,
    serve::{
        access::{Access, Scope},
        bootstrap::BootstrapConfig,
        telemetry::{ServerTls, TelemetryConfig},
        tls::{TlsFiles, server_config},
    },
    token::BearerToken,
    transfer::NodeConfig,
    wire::rdma::Connector,
};
use serde::{Deserialize, de::DeserializeOwned};

use crate::status::{Failure, KVT_BAD_CONFIG, KVT_SYSTEM, sentence};

/// Reads a JSON text; the empty text is an empty object.
pub(crate) fn parse<T: DeserializeOwned>(json: &str, what: &str) -> Result<T, Failure> {
    let json = if json.trim().is_empty() { "{}" } else { json };
    serde_json::from_str(json)
        .map_err(|error| Failure::new(KVT_BAD_CONFIG, format!("{what}: {error}")))
}

/// Puts what was given into its place and leaves the default where nothing was.
macro_rules! assign {
    ($($target:expr => $given:expr),+ $(,)?) => {
        $(if let Some(given) = $given { $target = given; })+
    };
}

/// An engine's configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EngineSettings {
    listen: Option<String>,
    token: Option<String>,
    lanes: Option<u8>,
    same_host: Option<SameHostSetting>,
    rdma: RdmaSettings,
    pub(crate) gpu: GpuSettings,
    batch_bytes: Option<u64>,
    lane_window: Option<usize>,
    pull_batch_bytes: Option<u64>,
    ring_bytes: Option<usize>,
    inline_bytes: Option<u64>,
    drive_while_waiting: Option<bool>,
    spin_us: Option<u64>,
    handshake_timeout_ms: Option<u64>,
    peers_max: Option<usize>,
    strangers_max: Option<usize>,
    bootstrap: Option<BootstrapSettings>,
    telemetry: Option<TelemetrySettings>,
    writable_by_address: Option<bool>,
    null_wire: Option<bool>,
    node: NodeSettings,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SameHostSetting {
    Auto,
    Pull,
    Ring,
    Off,
}

impl EngineSettings {
    /// The library's configuration.
    pub(crate) fn config(self) -> Result<EngineConfig, Failure> {
        let mut config = EngineConfig::default();
        config.listen = self.listen.map(|at| resolve(&at, "listen")).transpose()?;
        config.token = self.token;
        config.rdma = self.rdma.config();
        config.node = self.node.config();
        config.bootstrap = self.bootstrap.map(BootstrapSettings::config).transpose()?;
        config.telemetry = self.telemetry.map(TelemetrySettings::config).transpose()?;
        assign! {
            config.lanes => self.lanes,
            config.same_host => self.same_host.map(|setting| match setting {
                SameHostSetting::Auto => SameHost::Auto,
                SameHostSetting::Pull => SameHost::PullOnly,
                SameHostSetting::Ring => SameHost::RingOnly,
                SameHostSetting::Off => SameHost::Off,
            }),
            config.batch_bytes => self.batch_bytes,
            config.lane_window => self.lane_window,
            config.pull_batch_bytes => self.pull_batch_bytes,
            config.ring_bytes => self.ring_bytes,
            config.staging_bytes => self.gpu.staging_bytes,
            config.staged_batch_bytes => self.gpu.staged_batch_bytes,
            config.device_pull_batch_bytes => self.gpu.pull_batch_bytes,
            config.device_ring_bytes => self.gpu.ring_bytes,
            config.inline_bytes => self.inline_bytes,
            config.drive_while_waiting => self.drive_while_waiting,
            config.spin => self.spin_us.map(Duration::from_micros),
            config.handshake_timeout => self.handshake_timeout_ms.map(Duration::from_millis),
            config.peers_max => self.peers_max,
            config.strangers_max => self.strangers_max,
            config.writable_by_address => self.writable_by_address,
            config.null_wire => self.null_wire,
        }
        Ok(config)
    }
}

/// How memory of GPUs is moved.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct GpuSettings {
    multiprocessors_percent: Option<u32>,
    staging_bytes: Option<u64>,
    staged_batch_bytes: Option<u64>,
    pull_batch_bytes: Option<u64>,
    ring_bytes: Option<usize>,
}

impl GpuSettings {
    /// The share of a GPU that copies may take.
    pub(crate) fn percent(&self) -> Result<u32, Failure> {
        match self.multiprocessors_percent.unwrap_or(PERCENT_DEFAULT) {
            percent @ 1..=100 => Ok(percent),
            other => {
                let text =
                    format!("gpu.multiprocessors_percent is {other}, it must be within 1..=100");
                Err(Failure::new(KVT_BAD_CONFIG, text))
            }
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RdmaSettings {
    usage: Option<RdmaUseSetting>,
    devices: Option<String>,
    gpu: Option<u32>,
    connector: Option<ConnectorSetting>,
    queue_pairs: Option<u8>,
    immediate: Option<bool>,
    batch_bytes: Option<u64>,
    pack_below: Option<u64>,
    landing_bytes: Option<u64>,
    window: Option<usize>,
    send_queue: Option<u32>,
    spin_us: Option<u64>,
    drain_ms: Option<u64>,
    heartbeat_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RdmaUseSetting {
    Off,
    Auto,
    Required,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ConnectorSetting {
    Auto,
    Compat,
    Standard,
}

impl RdmaSettings {
    fn config(self) -> RdmaConfig {
        let mut config = RdmaConfig::default();
        assign! {
            config.usage => self.usage.map(|setting| match setting {
                RdmaUseSetting::Off => RdmaUse::Off,
                RdmaUseSetting::Auto => RdmaUse::Auto,
                RdmaUseSetting::Required => RdmaUse::Required,
            }),
            config.devices => self.devices,
            config.gpu => self.gpu,
            config.connector => self.connector.map(|setting| match setting {
                ConnectorSetting::Auto => None,
                ConnectorSetting::Compat => Some(Connector::Compat),
                ConnectorSetting::Standard => Some(Connector::Standard),
            }),
            config.queue_pairs => self.queue_pairs,
            config.immediate => self.immediate,
            config.batch_bytes => self.batch_bytes,
            config.pack_below => self.pack_below,
            config.landing_bytes => self.landing_bytes,
            config.window => self.window,
            config.send_queue => self.send_queue,
            config.spin => self.spin_us.map(Duration::from_micros),
            config.drain => self.drain_ms.map(Duration::from_millis),
            config.heartbeat => self.heartbeat_ms.map(Duration::from_millis),
        }
        config
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NodeSettings {
    queue_windows_max: Option<usize>,
    queue_bytes_max: Option<u64>,
    transfers_max: Option<usize>,
    orphans_max: Option<usize>,
    orphan_ttl_ms: Option<u64>,
    heartbeat_ms: Option<u64>,
    peer_silence_max_ms: Option<u64>,
    ebb_max_ms: Option<u64>,
    first_epoch: Option<u32>,
}

impl NodeSettings {
    fn config(self) -> NodeConfig {
        let mut config = NodeConfig::default();
        assign! {
            config.queue_windows_max => self.queue_windows_max,
            config.queue_bytes_max => self.queue_bytes_max,
            config.transfers_max => self.transfers_max,
            config.orphans_max => self.orphans_max,
            config.orphan_ttl => self.orphan_ttl_ms.map(Duration::from_millis),
            config.heartbeat => self.heartbeat_ms.map(Duration::from_millis),
            config.peer_silence_max => self.peer_silence_max_ms.map(Duration::from_millis),
            config.ebb_max => self.ebb_max_ms.map(Duration::from_millis),
            config.first_epoch => self.first_epoch,
        }
        config
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsSettings {
    cert: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TokenScope {
    Writes,
    All,
}

/// A bootstrap registry's configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BootstrapSettings {
    listen: Option<String>,
    token: Option<String>,
    token_scope: Option<TokenScope>,
    tls: Option<TlsSettings>,
    connections_max: Option<usize>,
    body_bytes_max: Option<usize>,
    head_timeout_ms: Option<u64>,
    body_timeout_ms: Option<u64>,
    reply_timeout_ms: Option<u64>,
    idle_timeout_ms: Option<u64>,
    probe_interval_ms: Option<u64>,
    room_ttl_ms: Option<u64>,
    rooms_max: Option<usize>,
    parked_ttl_ms: Option<u64>,
}

impl BootstrapSettings {
    /// The library's configuration.
    pub(crate) fn config(self) -> Result<BootstrapConfig, Failure> {
        let mut config = BootstrapConfig::default();
        let mut registry = RegistryLimits::default();
        if let Some(token) = self.token {
            let scope = match self.token_scope {
                Some(TokenScope::All) => Scope::All,
                Some(TokenScope::Writes) | None => Scope::Writes,
            };
            config.access =
                Access::bearer(&token, scope).map_err(|error| bad("bootstrap.token", &error))?;
        }
        if let Some(TlsSettings {
            cert,
            key,
            client_ca,
        }) = self.tls
        {
            let files = TlsFiles {
                cert,
                key,
                client_ca,
            };
            let tls = server_config(&files).map_err(|error| bad("bootstrap.tls", &error))?;
            config.tls = Some(tls);
        }
        assign! {
            config.listen => self.listen.map(|at| resolve(&at, "bootstrap.listen")).transpose()?,
            config.connections_max => self.connections_max,
            config.body_bytes_max => self.body_bytes_max,
            config.head_timeout => self.head_timeout_ms.map(Duration::from_millis),
            config.body_timeout => self.body_timeout_ms.map(Duration::from_millis),
            config.reply_timeout => self.reply_timeout_ms.map(Duration::from_millis),
            config.idle_timeout => self.idle_timeout_ms.map(Duration::from_millis),
            // 0: never.
            config.probe_interval => self.probe_interval_ms.map(|ms| (ms > 0).then(|| Duration::from_millis(ms))),
            registry.room_ttl => self.room_ttl_ms.map(Duration::from_millis),
            registry.rooms_max => self.rooms_max,
            registry.parked_ttl => self.parked_ttl_ms.map(Duration::from_millis),
        }
        config.registry = registry;
        Ok(config)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TelemetrySettings {
    listen: Option<String>,
    metrics: Option<String>,
    token: Option<String>,
    tls: Option<TlsSettings>,
    interval_ms: Option<u64>,
    keep_alive_ms: Option<u64>,
    subscribers_max: Option<usize>,
}

impl TelemetrySettings {
    fn config(self) -> Result<TelemetryConfig, Failure> {
        let mut config = TelemetryConfig::default();
        config.metrics = self
            .metrics
            .map(|at| resolve(&at, "telemetry.metrics"))
            .transpose()?;
        let token = self.token.map(BearerToken::new).transpose();
        config.token = token.map_err(|error| bad("telemetry.token", &error))?;
        config.tls = self.tls.map(read_identity).transpose()?;
        assign! {
            config.listen => self.listen.map(|at| resolve(&at, "telemetry.listen")).transpose()?,
            config.interval => self.interval_ms.map(Duration::from_millis),
            config.keep_alive => self.keep_alive_ms.map(Duration::from_millis),
            config.subscribers_max => self.subscribers_max,
        }
        Ok(config)
    }
}

fn read_identity(files: TlsSettings) -> Result<ServerTls, Failure> {
    let read = |path: PathBuf| {
        std::fs::read(&path).map_err(|error| {
            let text = format!("telemetry.tls: cannot read {}: {error}", path.display());
            Failure::new(KVT_BAD_CONFIG, text)
        })
    };
    Ok(ServerTls {
        chain_pem: read(files.cert)?,
        key_pem: read(files.key)?,
        client_ca_pem: files.client_ca.map(read).transpose()?,
    })
}

fn bad(field: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(KVT_BAD_CONFIG, format!("{field}: {}", sentence(error)))
}

/// The first address of `host:port`.
pub(crate) fn resolve(address: &str, what: &str) -> Result<SocketAddr, Failure> {
    if let Ok(address) = address.parse() {
        return Ok(address);
    }
    if address
        .rsplit_once(':')
        .is_none_or(|(_, port)| port.parse::<u16>().is_err())
    {
        let text = format!("{what}: \"{address}\" is no address; write host:port or [v6]:port");
        return Err(Failure::new(KVT_BAD_CONFIG, text));
    }
    let unknown = |error: &str| {
        Failure::new(
            KVT_SYSTEM,
            format!("{what}: cannot resolve \"{address}\": {error}"),
        )
    };
    let mut found = address
        .to_socket_addrs()
        .map_err(|error| unknown(&error.to_string()))?;
    found
        .next()
        .ok_or_else(|| unknown("the name has no address"))
}

#[cfg(test)]
mod tests;
