//! Settings of what operators see: logs, traces, pages.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use hyper::Uri;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

/// Options of this area.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Configuration, logs, traces")]
pub struct OpsArgs {
    /// Read settings from this TOML file too; it is watched, and limits and the policy follow it.
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// What to log, on stderr: error, warn, info, debug, trace, or a filter such as kvrouter=debug.
    #[arg(long, env = "KVROUTER_LOG", default_value = "info", value_parser = filter_text)]
    pub log_level: String,
    /// The form of log lines.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Log without colours.
    #[arg(long)]
    pub log_plain: bool,
    /// Log one line per answered request: id, pair, statuses, time to the first byte, bytes.
    #[arg(long)]
    pub access_log: bool,
    /// Send spans of requests to this OpenTelemetry collector (OTLP over HTTP), as http://127.0.0.1:4318.
    #[arg(long, value_name = "URL", value_parser = otlp_endpoint)]
    pub otlp_endpoint: Option<Uri>,
    /// The share of requests that get spans when their client did not decide (0 to 1).
    #[arg(long, value_name = "RATIO", default_value_t = 1.0, value_parser = ratio)]
    pub otlp_sample_ratio: f64,
    /// The name under which the collector knows this router.
    #[arg(long, value_name = "NAME", default_value = "kvrouter")]
    pub otlp_service_name: String,
    /// Do not serve /ui and /debug/state.
    #[arg(long)]
    pub no_ui: bool,
}

/// Where spans go.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSettings {
    /// The collector; without a path, OTLP's own (`/v1/traces`) is meant.
    pub endpoint: Uri,
    /// The share of requests traced when the client did not decide, 0 to 1.
    pub ratio: f64,
    /// The router's `service.name`.
    pub service: String,
}

impl OpsArgs {
    /// Where spans go, if anywhere.
    pub fn traces(&self) -> Option<TraceSettings> {
        Some(TraceSettings {
            endpoint: self.otlp_endpoint.clone()?,
            ratio: self.otlp_sample_ratio,
            service: self.otlp_service_name.clone(),
        })
    }

    /// What is logged, and how.
    pub fn into_logs(self) -> LogSettings {
        LogSettings {
            filter: self.log_level,
            format: self.log_format,
            colours: !self.log_plain,
        }
    }
}

fn filter_text(text: &str) -> Result<String, String> {
    EnvFilter::from_str(text)
        .map(|_| text.to_owned())
        .map_err(|error| error.to_string())
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
    if (0.0..=1.0).contains(&ratio) {
        Ok(ratio)
    } else {
        Err("it must be from 0 to 1".to_owned())
    }
}

fn otlp_endpoint(text: &str) -> Result<Uri, String> {
    let uri: Uri = text.parse().map_err(|_| "it is not a URL".to_owned())?;
    match uri.scheme_str() {
        Some("http" | "https") if uri.port_u16() == Some(4317) => Err(
            "port 4317 is the collector's gRPC door; OTLP over HTTP is spoken on 4318".to_owned(),
        ),
        Some("http" | "https") => Ok(uri),
        _ => Err("it must start with http:// or https://".to_owned()),
    }
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// A filter in the form of `tracing-subscriber`'s environment variable, known to be valid.
    pub filter: String,
    /// The form of the lines.
    pub format: LogFormat,
    /// Colours, where a terminal shows them.
    pub colours: bool,
}

/// Changes the filter of a running process.
#[derive(Clone, Debug)]
pub struct LogSwitch {
    handle: Arc<reload::Handle<EnvFilter, Registry>>,
}

impl LogSwitch {
    /// Logs by this filter from now on. A filter that is not valid changes nothing.
    pub fn set(&self, filter: &str) {
        if let Ok(filter) = EnvFilter::from_str(filter)
            && self.handle.reload(filter).is_err()
        {
            tracing::debug!("the log filter is not ours to change");
        }
    }
}

impl LogSettings {
    /// Sends logs to stderr. Does nothing when the process already has a subscriber.
    pub fn init(&self) -> LogSwitch {
        let filter = EnvFilter::from_str(&self.filter).unwrap_or_default();
        let (filter, handle) = reload::Layer::new(filter);
        let colours = self.colours && std::io::IsTerminal::is_terminal(&std::io::stderr());
        let lines = fmt::layer().with_writer(std::io::stderr);
        let lines = match self.format {
            LogFormat::Text => lines.with_ansi(colours).boxed(),
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
        };
        let subscriber = tracing_subscriber::registry().with(filter).with(lines);
        if tracing::subscriber::set_global_default(subscriber).is_err() {
            tracing::debug!("logs keep going where the process sent them before");
        }
        LogSwitch {
            handle: Arc::new(handle),
        }
    }
}
