//! The command line that fills in the settings.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};

use super::epp::{EppArguments, EppConfig};
use super::file::{Problem, Stamp};
use super::gossip::GossipArguments;
use super::layers::{self, Setting};
use super::ops::{LogSettings, OpsArgs};
use super::scheduling::SchedulingArguments;
use super::sources::SourceArguments;
use super::telemetry::TelemetryArguments;
use super::{
    ATTEMPTS_MAX_DEFAULT, BODY_BYTES_MAX_DEFAULT, BUFFERED_BYTES_MAX_DEFAULT, Config, ConfigError,
    PrefillTarget, QUEUE_MAX_DEFAULT, REQUESTS_MAX_DEFAULT, TlsFiles, WorkerUrl,
};
use crate::discover::source::Source;
use crate::pool::breaker::BreakerLimits;

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

Every option can also stand in the environment (KVROUTER_ and its name: KVROUTER_QUEUE_SIZE=50) or in a TOML
file (--config kvrouter.toml with lines like `queue-size = 50`). The command line wins over the environment,
the environment over the file. `--flag=false` takes a flag back.

`kvrouter check-config` with the same options: what is in effect and where it comes from, without serving.

`kvrouter epp …`, with the same options, also serves Envoy's external processing: see router/deploy/envoy.
`kvrouter simulate --help`: replay a trace against a fleet described in a file.";

/// Routes LLM requests to pairs of SGLang prefill and decode workers.
#[derive(Debug, Parser)]
#[command(name = "kvrouter", version, after_help = EXAMPLE)]
struct Arguments {
    /// Serve prefill/decode pairs. Accepted so that SGLang's command lines work; there is no other mode yet.
    #[arg(long, help_heading = "Workers")]
    pd_disaggregation: bool,
    /// A prefill worker and its bootstrap port (or `none`); repeat for more.
    #[arg(long, num_args = 1..=2, value_names = ["URL", "BOOTSTRAP_PORT"], help_heading = "Workers")]
    prefill: Vec<String>,
    /// A decode worker; repeat for more.
    #[arg(long, value_name = "URL", help_heading = "Workers")]
    decode: Vec<WorkerUrl>,
    /// A worker outside the pairs, for embeddings, rerank, score and classify; repeat for more.
    #[arg(long, value_name = "URL", help_heading = "Workers")]
    worker: Vec<WorkerUrl>,
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0", help_heading = "Listening")]
    host: String,
    /// Port to listen on; 0 picks a free one.
    #[arg(long, default_value_t = 8080, help_heading = "Listening")]
    port: u16,
    #[command(flatten)]
    scheduling: SchedulingArguments,
    #[command(flatten)]
    telemetry: TelemetryArguments,
    #[command(flatten)]
    gossip: GossipArguments,
    /// Longest time for a whole request [default: none].
    #[arg(long, value_name = "TIME", value_parser = parse_time, help_heading = "Time limits")]
    request_timeout: Option<Duration>,
    /// Longest wait for the first byte of an answer [default: none].
    #[arg(long, value_name = "TIME", value_parser = parse_time, help_heading = "Time limits")]
    first_byte_timeout: Option<Duration>,
    /// Longest silence within an answer [default: none].
    #[arg(long, value_name = "TIME", value_parser = parse_time, help_heading = "Time limits")]
    stall_timeout: Option<Duration>,
    /// Largest request body; larger ones get 413.
    #[arg(long, value_name = "BYTES", default_value_t = BODY_BYTES_MAX_DEFAULT, help_heading = "Load limits")]
    max_body_bytes: usize,
    /// Memory for the bodies of all requests that wait for an answer; more get 503 with Retry-After.
    #[arg(long, value_name = "BYTES", default_value_t = BUFFERED_BYTES_MAX_DEFAULT, help_heading = "Load limits")]
    max_buffered_bytes: usize,
    /// Generation requests at one time; more wait in the queue.
    #[arg(long, value_name = "COUNT", default_value_t = REQUESTS_MAX_DEFAULT, help_heading = "Load limits")]
    max_concurrent_requests: usize,
    /// Requests that may wait; more get 429 with Retry-After, those of the lowest priority first.
    #[arg(long, value_name = "COUNT", default_value_t = QUEUE_MAX_DEFAULT, help_heading = "Load limits")]
    queue_size: usize,
    /// Longest wait in the queue; then clients get 503 with Retry-After.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time, help_heading = "Load limits")]
    queue_timeout: Duration,
    /// Requests that one prefill worker computes or sends at a time [default: no limit].
    #[arg(long, value_name = "COUNT", help_heading = "Load limits")]
    max_requests_per_prefill: Option<usize>,
    /// Bytes of request bodies that one prefill worker computes or sends at a time [default: no limit].
    #[arg(long, value_name = "BYTES", help_heading = "Load limits")]
    max_bytes_per_prefill: Option<usize>,
    /// Requests that one decode worker holds at a time [default: no limit].
    #[arg(long, value_name = "COUNT", help_heading = "Load limits")]
    max_requests_per_decode: Option<usize>,
    /// Pairs a request may meet before its first byte.
    #[arg(long, value_name = "COUNT", default_value_t = ATTEMPTS_MAX_DEFAULT, help_heading = "Failures")]
    max_attempts: u32,
    /// Failures in a row after which a worker is left out; 0 never leaves one out.
    #[arg(long, value_name = "COUNT", default_value_t = BreakerLimits::default().failures, help_heading = "Failures")]
    breaker_failures: u32,
    /// How long it is left out the first time.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time, help_heading = "Failures")]
    breaker_open: Duration,
    /// Data-parallel ranks of each prefill worker [default: what its /server_info says].
    #[arg(long, value_name = "COUNT", help_heading = "Workers")]
    prefill_dp_size: Option<u32>,
    /// Let clients choose data-parallel ranks (routed_dp_rank, X-Data-Parallel-Rank).
    #[arg(long, help_heading = "Choosing pairs")]
    trust_dp_rank: bool,
    /// All workers run with SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1: leave simple request bodies untouched.
    #[arg(long, help_heading = "Workers")]
    header_overrides: bool,
    /// Serve TLS with this certificate chain (PEM).
    #[arg(long, value_name = "FILE", help_heading = "Listening")]
    tls_certificate: Option<PathBuf>,
    /// The private key of the certificate (PEM).
    #[arg(long, value_name = "FILE", help_heading = "Listening")]
    tls_key: Option<PathBuf>,
    /// Who signs the certificates of https workers (PEM) [default: the system's authorities].
    #[arg(long, value_name = "FILE", help_heading = "Workers")]
    worker_authorities: Option<PathBuf>,
    /// Bearer token of the workers (their --api-key). Clients that send their own Authorization keep it.
    #[arg(
        long,
        env = "KVROUTER_API_KEY",
        hide_env_values = true,
        help_heading = "Workers"
    )]
    api_key: Option<String>,
    /// How often each worker is asked whether it is ready.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time, help_heading = "Workers")]
    probe_interval: Duration,
    /// How long live requests may go on after SIGTERM or SIGINT.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_time, help_heading = "Listening")]
    drain_timeout: Duration,
    #[command(flatten)]
    ops: OpsArgs,
    #[command(flatten)]
    sources: SourceArguments,
    // Last: its heading would hold for what follows.
    #[command(flatten)]
    epp: EppArguments,
}

/// A parsed command line.
#[derive(Debug)]
pub struct CommandLine {
    /// The settings.
    pub config: Config,
    /// Where workers come from.
    pub source: Source,
    /// What is logged, and how.
    pub logs: LogSettings,
    /// Every setting with its origin.
    pub settings: Vec<Setting>,
    /// What is odd without being wrong.
    pub warnings: Vec<Problem>,
    /// The configuration file.
    pub file: Option<PathBuf>,
    /// That file, just before it was read.
    pub stamp: Option<Stamp>,
}

/// Settings with their types, not yet checked against each other.
#[derive(Debug)]
pub(super) struct Typed {
    pub(super) config: Config,
    /// What `kvrouter epp` adds.
    pub(super) epp: EppConfig,
    pub(super) logs: LogSettings,
    pub(super) source: Source,
}

impl Typed {
    /// Checks them against each other.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        match self.source {
            Source::Flags => self.config.check(),
            _ => self.config.check_settings(),
        }
    }
}

/// The definition of all settings.
pub(super) fn definition() -> clap::Command {
    Arguments::command()
}

impl CommandLine {
    /// Reads `args`, of which the first is the program's name, with the environment and the configuration file.
    ///
    /// # Errors
    /// clap's error, which is also how `--help` arrives: print it with its `exit()`.
    pub fn from_args(
        args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    ) -> Result<Self, clap::Error> {
        let mut args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        let is_epp = args.get(1).is_some_and(|first| first == "epp");
        if is_epp {
            args.remove(1);
        }
        let layers = layers::read(definition(), &args)?;
        let typed = Self::typed(&layers.matches)?;
        let refuse = |error: ConfigError| definition().error(ErrorKind::ValueValidation, error);
        typed.check().map_err(refuse)?;
        let Typed {
            mut config,
            epp,
            logs,
            source,
        } = typed;
        config.epp = is_epp.then_some(epp);
        Ok(Self {
            config,
            source,
            logs,
            settings: layers.settings,
            warnings: layers.warnings,
            file: layers.file,
            stamp: layers.stamp,
        })
    }

    /// Typed settings, not yet checked against each other.
    ///
    /// # Errors
    /// clap's error when a value is unusable.
    pub(super) fn typed(matches: &ArgMatches) -> Result<Typed, clap::Error> {
        let arguments = Arguments::from_arg_matches(matches)?;
        let refuse = |error: ConfigError| definition().error(ErrorKind::ValueValidation, error);
        let prefills = prefill_targets(&arguments.prefill).map_err(refuse)?;
        let config = Config {
            host: arguments.host,
            port: arguments.port,
            explain: arguments.scheduling.explain,
            scheduling: arguments.scheduling.into(),
            telemetry: arguments.telemetry.try_into().map_err(refuse)?,
            gossip: arguments.gossip.try_into().map_err(refuse)?,
            request_timeout: arguments.request_timeout,
            first_byte_timeout: arguments.first_byte_timeout,
            stall_timeout: arguments.stall_timeout,
            body_bytes_max: arguments.max_body_bytes,
            buffered_bytes_max: arguments.max_buffered_bytes,
            requests_max: arguments.max_concurrent_requests,
            others: arguments.worker,
            queue_max: arguments.queue_size,
            queue_timeout: arguments.queue_timeout,
            prefill_requests_max: arguments.max_requests_per_prefill,
            prefill_bytes_max: arguments.max_bytes_per_prefill,
            decode_requests_max: arguments.max_requests_per_decode,
            attempts_max: arguments.max_attempts,
            breaker: BreakerLimits {
                failures: arguments.breaker_failures,
                open: arguments.breaker_open,
            },
            prefill_dp_size: arguments.prefill_dp_size,
            trusts_dp_rank: arguments.trust_dp_rank,
            header_overrides: arguments.header_overrides,
            tls: tls_files(arguments.tls_certificate, arguments.tls_key).map_err(refuse)?,
            worker_authorities: arguments.worker_authorities,
            api_key: arguments.api_key,
            probe_interval: arguments.probe_interval,
            drain_timeout: arguments.drain_timeout,
            access_log: arguments.ops.access_log,
            traces: arguments.ops.traces(),
            serves_pages: !arguments.ops.no_ui,
            ..Config::new(prefills, arguments.decode)
        };
        let source = arguments.sources.source().map_err(refuse)?;
        let epp = arguments.epp.into_config().map_err(refuse)?;
        let logs = arguments.ops.into_logs();
        Ok(Typed {
            config,
            epp,
            logs,
            source,
        })
    }
}

/// Prefill workers from their words: a URL, and behind it the port of its bootstrap server, as words of their own or in
/// one text.
fn prefill_targets(values: &[String]) -> Result<Vec<PrefillTarget>, ConfigError> {
    let mut targets: Vec<(PrefillTarget, bool)> = Vec::new();
    for word in values.iter().flat_map(|value| value.split_whitespace()) {
        let is_port =
            matches!(word, "none" | "None") || word.bytes().all(|byte| byte.is_ascii_digit());
        if !is_port {
            let target = PrefillTarget {
                url: word.parse()?,
                bootstrap_port: None,
            };
            targets.push((target, false));
            continue;
        }
        let bad = || ConfigError::BootstrapPort {
            text: word.to_owned(),
        };
        let (target, has_port) = targets.last_mut().ok_or_else(bad)?;
        if std::mem::replace(has_port, true) {
            return Err(bad());
        }
        target.bootstrap_port = match word.parse() {
            _ if word.eq_ignore_ascii_case("none") => None,
            Ok(port) if port != 0 => Some(port),
            _ => return Err(bad()),
        };
    }
    Ok(targets.into_iter().map(|(target, _)| target).collect())
}

fn tls_files(
    certificates: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<TlsFiles>, ConfigError> {
    match (certificates, key) {
        (Some(certificates), Some(key)) => Ok(Some(TlsFiles { certificates, key })),
        (None, None) => Ok(None),
        _ => Err(ConfigError::HalfTls),
    }
}

pub(super) fn parse_time(text: &str) -> Result<Duration, ConfigError> {
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
    use crate::schedule::Policy;

    fn parse(text: &str) -> Result<Config, String> {
        CommandLine::from_args(text.split_whitespace())
            .map(|line| line.config)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sglang_command_lines_work() {
        let config = parse(
            "kvrouter --pd-disaggregation --prefill http://10.0.0.1:30000 8998 --prefill http://[::1]:30001 none \
             --prefill http://c:1 --decode http://d:2 --decode http://e:3/ --policy random --stall-timeout 500ms \
             --worker https://w:7 --tls-certificate c.pem --tls-key k.pem --breaker-failures 0",
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
        assert_eq!(config.scheduling.settings.policy, Policy::Random);
        assert_eq!(config.stall_timeout, Some(Duration::from_millis(500)));
        assert_eq!((config.host.as_str(), config.port), ("0.0.0.0", 8080));
        assert_eq!(config.request_timeout, None);
        assert_eq!(config.breaker.failures, 0);
        assert!(config.others[0].is_tls() && config.tls.is_some());
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
                "kvrouter --prefill ftp://a:1 --decode http://b:2",
                "https://",
            ),
            (
                "kvrouter --prefill http://a:1/x --decode http://b:2",
                "nothing may follow",
            ),
            ("kvrouter --prefill http://a:1", "--decode"),
            (&format!("{both} --request-timeout 3x"), "no time"),
            (&format!("{both} --request-timeout 0"), "no time"),
            (&format!("{both} --max-concurrent-requests 0"), "at least 1"),
            (&format!("{both} --max-requests-per-decode 0"), "at least 1"),
            (&format!("{both} --max-attempts 17"), "from 1 to 16"),
            (&format!("{both} --tls-key k.pem"), "belong together"),
            (&format!("{both} --kv-share 1.5"), "--kv-share"),
            (&format!("{both} --policy best"), "round_robin"),
            (&format!("{both} --worker http://b:2"), "named twice"),
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
