//! Where workers tell of their queues.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvtransfer::token::BearerToken;

use super::command_line::parse_time;
use super::{ConfigError, TlsFiles, WorkerUrl};

/// Default of [`Telemetry::loads_interval`].
pub const LOADS_INTERVAL_DEFAULT: Duration = Duration::from_secs(1);

/// How workers are listened to.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// The port of every worker's telemetry stream that is not told otherwise. Default none: a worker that nobody said
    /// anything of is not asked.
    pub port: Option<u16>,
    /// Ports of single workers of the command line.
    pub ports: Vec<(WorkerUrl, u16)>,
    /// Bearer token of the listeners.
    pub token: Option<BearerToken>,
    /// PEM file with the authorities that sign their certificates. Default none: they speak plain text.
    pub authorities: Option<PathBuf>,
    /// Shown to listeners that ask who we are. Default none.
    pub identity: Option<TlsFiles>,
    /// How often SGLang's `/v1/loads` is asked, default 1 s; `None`: never.
    pub loads_interval: Option<Duration>,
    /// Listen to the events of prefix caches where workers publish them. Default yes.
    pub kv_events: bool,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            port: None,
            ports: Vec::new(),
            token: None,
            authorities: None,
            identity: None,
            loads_interval: Some(LOADS_INTERVAL_DEFAULT),
            kv_events: true,
        }
    }
}

impl Telemetry {
    /// The port told for the worker at `url`.
    pub fn port_of(&self, url: &WorkerUrl) -> Option<u16> {
        let told = self.ports.iter().find(|(known, _)| known == url);
        told.map(|(_, port)| *port)
    }
}

/// The telemetry options.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "What workers tell")]
pub struct TelemetryArguments {
    /// Port of the live transfer telemetry (kvtransfer's gRPC stream) of all workers [default: they have none].
    #[arg(long, value_name = "PORT")]
    telemetry_port: Option<u16>,
    /// The telemetry port of one worker, if it is another one; repeat for more.
    #[arg(long, num_args = 2, value_names = ["URL", "PORT"])]
    telemetry: Vec<String>,
    /// Bearer token of the telemetry listeners.
    #[arg(long, env = "KVROUTER_TELEMETRY_TOKEN", hide_env_values = true)]
    telemetry_token: Option<String>,
    /// Who signs the certificates of the telemetry listeners (PEM) [default: they speak plain text].
    #[arg(long, value_name = "FILE")]
    telemetry_authorities: Option<PathBuf>,
    /// Our certificate chain (PEM) for telemetry listeners that ask for one.
    #[arg(long, value_name = "FILE")]
    telemetry_certificate: Option<PathBuf>,
    /// That certificate's private key (PEM).
    #[arg(long, value_name = "FILE")]
    telemetry_key: Option<PathBuf>,
    /// How often the workers' /v1/loads is asked.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    loads_interval: Duration,
    /// Do not ask for /v1/loads.
    #[arg(long, conflicts_with = "loads_interval")]
    no_loads: bool,
    /// Do not listen to the events of prefix caches (SGLang's --kv-events-config), which workers' /server_info tells of.
    #[arg(long)]
    no_kv_events: bool,
}

impl TryFrom<TelemetryArguments> for Telemetry {
    type Error = ConfigError;

    fn try_from(arguments: TelemetryArguments) -> Result<Self, ConfigError> {
        let (pairs, _) = arguments.telemetry.as_chunks::<2>();
        let ports = pairs.iter().map(|[url, port]| {
            let port = port.parse().ok().filter(|port| *port != 0);
            let port = port.ok_or_else(|| ConfigError::TelemetryPort { text: url.clone() })?;
            Ok((url.parse()?, port))
        });
        let token = arguments.telemetry_token.map(BearerToken::new).transpose();
        let files = (arguments.telemetry_certificate, arguments.telemetry_key);
        let identity = match files {
            (Some(certificates), Some(key)) if arguments.telemetry_authorities.is_some() => {
                Some(TlsFiles { certificates, key })
            }
            (None, None) => None,
            _ => return Err(ConfigError::HalfTelemetryTls),
        };
        Ok(Self {
            identity,
            port: arguments.telemetry_port,
            ports: ports.collect::<Result<_, ConfigError>>()?,
            token: token.map_err(|_| ConfigError::TelemetryToken)?,
            authorities: arguments.telemetry_authorities,
            loads_interval: (!arguments.no_loads).then_some(arguments.loads_interval),
            kv_events: !arguments.no_kv_events,
        })
    }
}
