//! `kvtransfer bootstrap`: the registry as a process of its own.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use kvtransfer::bootstrap::registry::RegistryLimits;
use kvtransfer::serve::access::{Access, Scope};
use kvtransfer::serve::bootstrap::{BootstrapConfig, BootstrapServer};
use kvtransfer::serve::tls::{TlsFiles, server_config};
use tokio::signal::unix::{SignalKind, signal};

const EXAMPLES: &str = "\
Examples:
  kvtransfer bootstrap
      Listen on 0.0.0.0:8998, SGLang's default --disaggregation-bootstrap-port, for everybody.
  kvtransfer bootstrap --port 34000 --token-file /run/secrets/bootstrap
      Only holders of the token may register; stock decode ranks can still look ranks up.
  kvtransfer bootstrap --tls-cert tls.crt --tls-key tls.key --client-ca ca.crt
      HTTPS, and only for clients with a certificate of that CA. Stock SGLang speaks plain HTTP only.

Try it:
  curl http://127.0.0.1:8998/health
  curl 'http://127.0.0.1:8998/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1'

One registry serves one prefill instance. It starts before the prefill ranks do: SGLang's ranks try to register for
about 15 seconds, then never again. Set KVTRANSFER_LOG=debug to see every refused request. SIGTERM or SIGINT stops it.";

/// Which requests need the token.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum TokenScope {
    /// PUT and POST: registering ranks, registering and querying rooms
    Writes,
    /// Everything but /health
    All,
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Address or host name to listen on
    #[arg(long, default_value = "0.0.0.0", env = "KVTRANSFER_BOOTSTRAP_HOST")]
    host: String,
    /// Port to listen on; 0 picks a free one and logs it
    #[arg(long, default_value_t = 8998, env = "KVTRANSFER_BOOTSTRAP_PORT")]
    port: u16,
    /// File with the bearer token that requests must carry
    #[arg(long, env = "KVTRANSFER_BOOTSTRAP_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Which requests need the token
    #[arg(long, value_enum, default_value = "writes", requires = "token_file")]
    token_scope: TokenScope,
    /// Certificate chain (PEM): speak HTTPS
    #[arg(long, requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert (PEM)
    #[arg(long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// CA certificates (PEM); clients must show a certificate one of them signed
    #[arg(long, requires = "tls_cert")]
    client_ca: Option<PathBuf>,
    /// Seconds a room's data-parallel rank is kept
    #[arg(
        long,
        default_value_t = 120,
        value_parser = clap::value_parser!(u32).range(1..=86_400),
        env = "SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL"
    )]
    room_ttl: u32,
    /// Connections held at a time; each costs about 20 KiB and a file descriptor
    #[arg(
        long,
        default_value_t = 16_384,
        env = "KVTRANSFER_BOOTSTRAP_CONNECTIONS_MAX"
    )]
    connections_max: usize,
    /// Never connect to ranks to find out whether a replaced instance is dead
    #[arg(long)]
    no_probe: bool,
}

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(options: Options) -> anyhow::Result<()> {
    let config = config(options)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Before the server: a signal that comes at once must find its handler.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let server = BootstrapServer::start(config)?;
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
        server.close();
        Ok(())
    })
}

fn config(options: Options) -> anyhow::Result<BootstrapConfig> {
    let mut registry = RegistryLimits::default();
    registry.room_ttl = Duration::from_secs(options.room_ttl.into());
    let mut config = BootstrapConfig::default();
    config.listen = resolve(&options.host, options.port)?;
    config.registry = registry;
    config.connections_max = options.connections_max;
    if options.no_probe {
        config.probe_interval = None;
    }
    if let Some(path) = options.token_file {
        let token = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let scope = match options.token_scope {
            TokenScope::Writes => Scope::Writes,
            TokenScope::All => Scope::All,
        };
        config.access =
            Access::bearer(&token, scope).with_context(|| path.display().to_string())?;
    }
    if let (Some(cert), Some(key)) = (options.tls_cert, options.tls_key) {
        config.tls = Some(server_config(&TlsFiles {
            cert,
            key,
            client_ca: options.client_ca,
        })?);
    }
    Ok(config)
}

fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    (host.trim_matches(['[', ']']), port)
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve {host}"))?
        .next()
        .with_context(|| format!("{host} has no address"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[derive(clap::Parser)]
    struct Only {
        #[command(flatten)]
        options: super::Options,
    }

    #[test]
    fn options_are_consistent() {
        Only::command().debug_assert();
        let parse = |arguments: &[&str]| <Only as clap::Parser>::try_parse_from(arguments);
        assert_eq!(parse(&["x"]).unwrap().options.port, 8998);
        assert!(
            parse(&["x", "--tls-cert", "a"]).is_err(),
            "a certificate needs its key"
        );
        assert!(parse(&["x", "--client-ca", "a"]).is_err(), "mTLS needs TLS");
        assert!(parse(&["x", "--room-ttl", "0"]).is_err());
    }
}
