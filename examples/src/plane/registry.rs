//! The bootstrap registry that a prefill worker runs, and the rows it keeps there.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kvtransfer::engine::Engine;
use kvtransfer::serve::bootstrap::{BootstrapConfig, BootstrapServer};
use kvtransfer::serve::bootstrap_client::{BootstrapClient, BootstrapTarget, RankRow};

use super::loopback_of;
use super::watch::Watch;
use crate::settings::Settings;

/// How long a row lives without being renewed: three renewals may be lost.
const LEASE: Duration = Duration::from_secs(30);

/// How often rows are renewed.
const RENEWAL: Duration = Duration::from_secs(10);

/// Pause after a failed registration.
const RETRY: Duration = Duration::from_millis(500);

/// Longest time for one row, retries included.
const REGISTER_PATIENCE: Duration = Duration::from_secs(5);

/// A running registry.
pub(super) struct OwnRegistry(BootstrapServer);

impl OwnRegistry {
    /// Listens on `ip` and `port` (0 picks a free one).
    ///
    /// # Errors
    /// The port is taken, or cannot be listened on.
    pub(super) fn start(ip: IpAddr, port: u16) -> anyhow::Result<Self> {
        let mut config = BootstrapConfig::default();
        config.listen = SocketAddr::new(ip, port);
        let server = BootstrapServer::start(config).with_context(|| {
            format!(
                "the bootstrap registry cannot start (--disaggregation-bootstrap-port {port}; two prefill workers of \
                 one host need different ones)"
            )
        })?;
        Ok(Self(server))
    }

    /// Where this host reaches it.
    pub(super) fn address(&self) -> SocketAddr {
        let bound = self.0.local_addr();
        SocketAddr::new(loopback_of(bound.ip()), bound.port())
    }

    /// One row per engine.
    pub(super) fn rows(
        &self,
        settings: &Settings,
        advertised: IpAddr,
        engines: &[Engine],
    ) -> Vec<RankRow> {
        let row = |(rank, engine): (u32, &Engine)| RankRow {
            attn_tp_size: settings.tp,
            attn_tp_rank: rank,
            attn_cp_size: 1,
            attn_cp_rank: 0,
            attn_dp_size: 1,
            attn_dp_rank: 0,
            pp_size: 1,
            pp_rank: 0,
            system_dp_size: 1,
            system_dp_rank: 0,
            rank_ip: advertised.to_string(),
            rank_port: engine
                .local_addr()
                .expect("invariant: a prefill's engines listen")
                .port(),
            page_size: settings.page_size,
            kv_cache_dtype: Some("float32".to_owned()),
            kv_layout: Some("nhd".to_owned()),
            dsv41_spec_layout: None,
            load_balance_method: "follow_bootstrap_room".to_owned(),
            enable_dsa_cache_layer_split: false,
            enable_kv_cache_sharding: false,
            prefill_http_port: (settings.port != 0).then_some(settings.port),
            decode_allocation_policy: "early".to_owned(),
        };
        (0..).zip(engines).map(row).collect()
    }

    /// Registers the rows and renews them for ever. `watch` learns how that goes, and is ready once all are in.
    pub(super) fn keep_registered(
        &self,
        rows: Vec<RankRow>,
        instance: String,
        watch: Arc<Watch>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let target = BootstrapTarget::new(self.address().to_string());
        async move {
            let mut client = BootstrapClient::new(target);
            loop {
                let registered = register_all(&mut client, &rows, &instance).await;
                let pause = if registered.is_ok() { RENEWAL } else { RETRY };
                if let Err(error) = &registered {
                    tracing::warn!(%error, "the ranks are not registered");
                }
                watch.set_standing(registered);
                tokio::time::sleep(pause).await;
            }
        }
    }
}

async fn register_all(
    client: &mut BootstrapClient,
    rows: &[RankRow],
    instance: &str,
) -> Result<(), String> {
    for row in rows {
        client
            .register(row, Some(LEASE), Some(instance), REGISTER_PATIENCE)
            .await
            .map_err(|error| format!("rank {}: {error}", row.attn_tp_rank))?;
    }
    Ok(())
}
