//! The router's settings, with their defaults, units and costs, and the command line that fills them in.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::OsString;
use std::time::Duration;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};
use hyper::Uri;
use hyper::http::uri::Authority;

use crate::schedule::pair::Policy;

/// Default of [`Config::body_bytes_max`]: what SGLang's own router allows, enough for a batch of images in base64.
pub const BODY_BYTES_MAX_DEFAULT: usize = 512 << 20;

/// Default of [`Config::buffered_bytes_max`].
pub const BUFFERED_BYTES_MAX_DEFAULT: usize = 4 << 30;

/// Default of [`Config::requests_max`].
pub const REQUESTS_MAX_DEFAULT: usize = 10_000;

/// Default of [`Config::probe_interval`].
pub const PROBE_INTERVAL_DEFAULT: Duration = Duration::from_secs(5);

/// Default of [`Config::drain_timeout`]: what Kubernetes grants a pod after SIGTERM.
pub const DRAIN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// Where a worker listens: `http://host:port`, nothing behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerUrl {
    authority: Authority,
}

impl WorkerUrl {
    /// Host and port, as they stand in the URL.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The host alone; an IPv6 address keeps its brackets, as SGLang's own router sends it.
    pub fn host(&self) -> &str {
        self.authority.host()
    }
}

impl std::fmt::Display for WorkerUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}", self.authority)
    }
}

impl std::str::FromStr for WorkerUrl {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = |reason| ConfigError::WorkerUrl {
            url: text.to_owned(),
            reason,
        };
        let uri: Uri = text.parse().map_err(|_| bad("it is not a URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(bad("workers are reached over plain http in this version"));
            }
            _ => return Err(bad("it must start with http://")),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad("nothing may follow the port"));
        }
        let authority = uri.into_parts().authority.ok_or(bad("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it may not hold a password"));
        }
        Ok(Self { authority })
    }
}

/// A prefill worker and the port of its bootstrap server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillTarget {
    /// The worker's HTTP address.
    pub url: WorkerUrl,
    /// Its `--disaggregation-bootstrap-port`. `None` sends null: each worker then assumes its own flag, which is right
    /// only when all share one value.
    pub bootstrap_port: Option<u16>,
}

/// Everything the router can be told. [`Config::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to listen on, default `0.0.0.0`.
    pub host: String,
    /// Port to listen on, default 8080; 0 picks a free one.
    pub port: u16,
    /// Prefill workers, at least one.
    pub prefills: Vec<PrefillTarget>,
    /// Decode workers, at least one.
    pub decodes: Vec<WorkerUrl>,
    /// How pairs are chosen, default round robin.
    pub policy: Policy,
    /// From the whole request read to the last byte sent. Default none: generations may take hours.
    pub request_timeout: Option<Duration>,
    /// From the dispatch to decode's first body byte. Default none.
    pub first_byte_timeout: Option<Duration>,
    /// Between two reads of decode's body. Default none.
    pub stall_timeout: Option<Duration>,
    /// Largest request body in bytes, default 512 MiB. A body is held in memory (once, twice while it is edited).
    pub body_bytes_max: usize,
    /// Memory for the bodies of all requests that have no answer yet, in bytes, default 4 GiB; above it clients get 503 with
    /// Retry-After.
    pub buffered_bytes_max: usize,
    /// Generation requests at one time, default 10 000; above it clients get 503 with Retry-After.
    pub requests_max: usize,
    /// Bearer token for workers: used for probes and aborts, and for requests that bring no Authorization of their own.
    pub api_key: Option<String>,
    /// How often a worker is asked whether it is ready, default 5 s.
    pub probe_interval: Duration,
    /// How long live requests may go on after the stop signal, default 30 s.
    pub drain_timeout: Duration,
}

impl Config {
    /// The default settings for these workers.
    pub fn new(prefills: Vec<PrefillTarget>, decodes: Vec<WorkerUrl>) -> Self {
        Self {
            host: "0.0.0.0".to_owned(),
            port: 8080,
            prefills,
            decodes,
            policy: Policy::default(),
            request_timeout: None,
            first_byte_timeout: None,
            stall_timeout: None,
            body_bytes_max: BODY_BYTES_MAX_DEFAULT,
            buffered_bytes_max: BUFFERED_BYTES_MAX_DEFAULT,
            requests_max: REQUESTS_MAX_DEFAULT,
            api_key: None,
            probe_interval: PROBE_INTERVAL_DEFAULT,
            drain_timeout: DRAIN_TIMEOUT_DEFAULT,
        }
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigError`] naming the first contradiction.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.prefills.is_empty() || self.decodes.is_empty() {
            return Err(ConfigError::NoWorkers);
        }
        let urls = self
            .prefills
            .iter()
            .map(|target| &target.url)
            .chain(&self.decodes);
        let mut seen = HashSet::new();
        for url in urls {
            if !seen.insert(url.authority.as_str()) {
                return Err(ConfigError::DuplicateWorker {
                    url: url.to_string(),
                });
            }
        }
        if !(1..=tokio::sync::Semaphore::MAX_PERMITS).contains(&self.requests_max) {
            return Err(ConfigError::RequestsMax);
        }
        let key_fits = |key: &String| key.bytes().all(|byte| byte.is_ascii_graphic());
        if !self.api_key.as_ref().is_none_or(key_fits) {
            return Err(ConfigError::ApiKey);
        }
        Ok(())
    }
}

/// Why settings were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A worker's address is unusable.
    #[error("`{url}` is no worker address: {reason} (example: http://10.0.0.1:30000)")]
    WorkerUrl {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// One role has no worker.
    #[error("at least one --prefill and one --decode worker are needed")]
    NoWorkers,
    /// One address appears twice.
    #[error("the worker {url} is named twice")]
    DuplicateWorker {
        /// The address.
        url: String,
    },
    /// No request could be served, or more than can be counted.
    #[error("--max-concurrent-requests must be at least 1")]
    RequestsMax,
    /// The key cannot stand in a header.
    #[error("the --api-key may hold visible ASCII characters only")]
    ApiKey,
    /// The bootstrap port is neither a port nor `none`.
    #[error("`{text}` is no bootstrap port: give a number from 1 to 65535, or `none`")]
    BootstrapPort {
        /// What was given.
        text: String,
    },
    /// A time without a known form.
    #[error("`{text}` is no time: write 30, 1.5, 500ms, 30s, 10m or 2h")]
    Time {
        /// What was given.
        text: String,
    },
}

const EXAMPLE: &str = "\
Example: two prefill workers (bootstrap servers on port 8998) and one decode worker:

  kvrouter --pd-disaggregation \\
    --prefill http://10.0.0.1:30000 8998 \\
    --prefill http://10.0.0.2:30000 8998 \\
    --decode  http://10.0.0.3:30000

  curl http://127.0.0.1:8080/ready
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"m\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}], \"max_tokens\": 50}'

The workers are SGLang servers started with --disaggregation-mode prefill or decode. The port after a
prefill URL is that worker's --disaggregation-bootstrap-port. Times are seconds, or 500ms, 10m, 2h.

`kvrouter simulate --help`: replay a trace against a fleet described in a file.";

/// Routes LLM requests to pairs of SGLang prefill and decode workers.
#[derive(Debug, Parser)]
#[command(name = "kvrouter", version, after_help = EXAMPLE)]
struct Arguments {
    /// Serve prefill/decode pairs. Accepted so that SGLang's command lines work; there is no other mode yet.
    #[arg(long)]
    pd_disaggregation: bool,
    /// A prefill worker and its bootstrap port (or `none`); repeat for more.
    #[arg(long, num_args = 1..=2, value_names = ["URL", "BOOTSTRAP_PORT"], required = true)]
    prefill: Vec<String>,
    /// A decode worker; repeat for more.
    #[arg(long, value_name = "URL", required = true)]
    decode: Vec<WorkerUrl>,
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    host: String,
    /// Port to listen on; 0 picks a free one.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// How pairs are chosen.
    #[arg(long, value_enum, default_value_t)]
    policy: Policy,
    /// Longest time for a whole request [default: none].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    request_timeout: Option<Duration>,
    /// Longest wait for the first byte of an answer [default: none].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    first_byte_timeout: Option<Duration>,
    /// Longest silence within an answer [default: none].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    stall_timeout: Option<Duration>,
    /// Largest request body; larger ones get 413.
    #[arg(long, value_name = "BYTES", default_value_t = BODY_BYTES_MAX_DEFAULT)]
    max_body_bytes: usize,
    /// Memory for the bodies of all requests that wait for an answer; more get 503 with Retry-After.
    #[arg(long, value_name = "BYTES", default_value_t = BUFFERED_BYTES_MAX_DEFAULT)]
    max_buffered_bytes: usize,
    /// Generation requests at one time; more get 503 with Retry-After.
    #[arg(long, value_name = "COUNT", default_value_t = REQUESTS_MAX_DEFAULT)]
    max_concurrent_requests: usize,
    /// Bearer token of the workers (their --api-key). Clients that send their own Authorization keep it.
    #[arg(long, env = "KVROUTER_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// How often each worker is asked whether it is ready.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    probe_interval: Duration,
    /// How long live requests may go on after SIGTERM or SIGINT.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time)]
    drain_timeout: Duration,
    /// What to log, on stderr: error, warn, info, debug, trace, or a filter such as kvrouter=debug.
    #[arg(long, env = "KVROUTER_LOG", default_value = "info")]
    log_level: tracing_subscriber::EnvFilter,
    /// Log without colours.
    #[arg(long)]
    log_plain: bool,
}

/// A parsed command line.
#[derive(Debug)]
pub struct CommandLine {
    /// The settings.
    pub config: Config,
    filter: tracing_subscriber::EnvFilter,
    colours: bool,
}

impl CommandLine {
    /// Reads `args`, of which the first is the program's name.
    ///
    /// # Errors
    /// clap's error, which is also how `--help` arrives: print it with its `exit()`.
    pub fn from_args(
        args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        let mut command = Arguments::command();
        let matches = command.try_get_matches_from_mut(args)?;
        let arguments = Arguments::from_arg_matches(&matches)?;
        let refuse = |error: ConfigError| {
            Arguments::command().error(clap::error::ErrorKind::ValueValidation, error)
        };
        let prefills = prefill_targets(&matches).map_err(refuse)?;
        let config = Config {
            host: arguments.host,
            port: arguments.port,
            policy: arguments.policy,
            request_timeout: arguments.request_timeout,
            first_byte_timeout: arguments.first_byte_timeout,
            stall_timeout: arguments.stall_timeout,
            body_bytes_max: arguments.max_body_bytes,
            buffered_bytes_max: arguments.max_buffered_bytes,
            requests_max: arguments.max_concurrent_requests,
            api_key: arguments.api_key,
            probe_interval: arguments.probe_interval,
            drain_timeout: arguments.drain_timeout,
            ..Config::new(prefills, arguments.decode)
        };
        config.check().map_err(refuse)?;
        Ok(Self {
            config,
            filter: arguments.log_level,
            colours: !arguments.log_plain,
        })
    }

    /// Sends logs to stderr as the command line asks. Does nothing when the process already has a subscriber.
    pub fn init_logs(&self) {
        let colours = self.colours && std::io::IsTerminal::is_terminal(&std::io::stderr());
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(self.filter.to_string())
            .with_writer(std::io::stderr)
            .with_ansi(colours)
            .finish();
        if tracing::subscriber::set_global_default(subscriber).is_err() {
            tracing::debug!("logs keep going where the process sent them before");
        }
    }
}

fn prefill_targets(matches: &ArgMatches) -> Result<Vec<PrefillTarget>, ConfigError> {
    let occurrences = matches
        .get_occurrences::<String>("prefill")
        .into_iter()
        .flatten();
    occurrences
        .map(|mut values| {
            let url = values
                .next()
                .map(String::as_str)
                .unwrap_or_default()
                .parse()?;
            let bootstrap_port = match values.next().map(String::as_str) {
                None | Some("none" | "None") => None,
                Some(text) => match text.parse() {
                    Ok(port) if port != 0 => Some(port),
                    _ => {
                        return Err(ConfigError::BootstrapPort {
                            text: text.to_owned(),
                        });
                    }
                },
            };
            Ok(PrefillTarget {
                url,
                bootstrap_port,
            })
        })
        .collect()
}

fn parse_time(text: &str) -> Result<Duration, ConfigError> {
    let bad = || ConfigError::Time {
        text: text.to_owned(),
    };
    let unit_at = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(bad()),
    };
    let seconds = number.parse::<f64>().map_err(|_| bad())? * scale;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        CommandLine::from_args(text.split_whitespace())
            .map(|line| line.config)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sglang_command_lines_work() {
        let config = parse(
            "kvrouter --pd-disaggregation --prefill http://10.0.0.1:30000 8998 --prefill http://[::1]:30001 none \
             --prefill http://c:1 --decode http://d:2 --decode http://e:3/ --policy random --stall-timeout 500ms",
        )
        .unwrap();
        let ports: Vec<_> = config
            .prefills
            .iter()
            .map(|target| target.bootstrap_port)
            .collect();
        assert_eq!(ports, [Some(8998), None, None]);
        assert_eq!(config.prefills[1].url.host(), "[::1]");
        assert_eq!(config.decodes[1].to_string(), "http://e:3");
        assert_eq!(config.policy, Policy::Random);
        assert_eq!(config.stall_timeout, Some(Duration::from_millis(500)));
        assert_eq!((config.host.as_str(), config.port), ("0.0.0.0", 8080));
        assert_eq!(config.request_timeout, None);
    }

    #[test]
    fn mistakes_are_explained() {
        let both = "kvrouter --prefill http://a:1 8998 --decode http://b:2";
        for (line, part) in [
            (
                "kvrouter --prefill a:1 --decode http://b:2",
                "no worker address",
            ),
            (
                "kvrouter --prefill http://a:1 70000 --decode http://b:2",
                "no bootstrap port",
            ),
            (
                "kvrouter --prefill http://a:1 0 --decode http://b:2",
                "no bootstrap port",
            ),
            (
                "kvrouter --prefill http://a:1 --decode http://a:1",
                "named twice",
            ),
            (
                "kvrouter --prefill https://a:1 --decode http://b:2",
                "plain http",
            ),
            (
                "kvrouter --prefill http://a:1/x --decode http://b:2",
                "nothing may follow",
            ),
            ("kvrouter --prefill http://a:1", "--decode"),
            (&format!("{both} --request-timeout 3x"), "no time"),
            (&format!("{both} --request-timeout 0"), "no time"),
            (&format!("{both} --max-concurrent-requests 0"), "at least 1"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
        parse(both).unwrap();
    }

    #[test]
    fn help_teaches_by_example() {
        let help = parse("kvrouter --help").unwrap_err();
        assert!(
            help.contains("--prefill http://10.0.0.1:30000 8998"),
            "{help}"
        );
    }
}
