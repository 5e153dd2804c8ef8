//! The command line that fills in the settings.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};

use super::epp::EppArguments;
use super::gossip::GossipArguments;
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

`kvrouter epp …`, with the same options, also serves Envoy's external processing: see router/deploy/envoy.
`kvrouter simulate --help`: replay a trace against a fleet described in a file.";

/// Routes LLM requests to pairs of SGLang prefill and decode workers.
#[derive(Debug, Parser)]
#[command(name = "kvrouter", version, after_help = EXAMPLE)]
struct Arguments {
    /// Serve prefill/decode pairs. Accepted so that SGLang's command lines work; there is no other mode yet.
    #[arg(long)]
    pd_disaggregation: bool,
    /// A prefill worker and its bootstrap port (or `none`); repeat for more.
    #[arg(long, num_args = 1..=2, value_names = ["URL", "BOOTSTRAP_PORT"],
        required_unless_present_any = ["kubernetes", "fleet_file", "rbg_config"])]
    prefill: Vec<String>,
    /// A decode worker; repeat for more.
    #[arg(long, value_name = "URL", required_unless_present_any = ["kubernetes", "fleet_file", "rbg_config"])]
    decode: Vec<WorkerUrl>,
    /// A worker outside the pairs, for embeddings, rerank, score and classify; repeat for more.
    #[arg(long, value_name = "URL")]
    worker: Vec<WorkerUrl>,
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    host: String,
    /// Port to listen on; 0 picks a free one.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    #[command(flatten)]
    scheduling: SchedulingArguments,
    #[command(flatten)]
    telemetry: TelemetryArguments,
    #[command(flatten)]
    gossip: GossipArguments,
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
    /// Generation requests at one time; more wait in the queue.
    #[arg(long, value_name = "COUNT", default_value_t = REQUESTS_MAX_DEFAULT)]
    max_concurrent_requests: usize,
    /// Requests that may wait; more get 429 with Retry-After, those of the lowest priority first.
    #[arg(long, value_name = "COUNT", default_value_t = QUEUE_MAX_DEFAULT)]
    queue_size: usize,
    /// Longest wait in the queue; then clients get 503 with Retry-After.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    queue_timeout: Duration,
    /// Requests that one prefill worker computes or sends at a time [default: no limit].
    #[arg(long, value_name = "COUNT")]
    max_requests_per_prefill: Option<usize>,
    /// Bytes of request bodies that one prefill worker computes or sends at a time [default: no limit].
    #[arg(long, value_name = "BYTES")]
    max_bytes_per_prefill: Option<usize>,
    /// Requests that one decode worker holds at a time [default: no limit].
    #[arg(long, value_name = "COUNT")]
    max_requests_per_decode: Option<usize>,
    /// Pairs a request may meet before its first byte.
    #[arg(long, value_name = "COUNT", default_value_t = ATTEMPTS_MAX_DEFAULT)]
    max_attempts: u32,
    /// Failures in a row after which a worker is left out; 0 never leaves one out.
    #[arg(long, value_name = "COUNT", default_value_t = BreakerLimits::default().failures)]
    breaker_failures: u32,
    /// How long it is left out the first time.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_time)]
    breaker_open: Duration,
    /// Data-parallel ranks of each prefill worker [default: what its /server_info says].
    #[arg(long, value_name = "COUNT")]
    prefill_dp_size: Option<u32>,
    /// Let clients choose data-parallel ranks (routed_dp_rank, X-Data-Parallel-Rank).
    #[arg(long)]
    trust_dp_rank: bool,
    /// All workers run with SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1: leave simple request bodies untouched.
    #[arg(long)]
    header_overrides: bool,
    /// Serve TLS with this certificate chain (PEM).
    #[arg(long, value_name = "FILE")]
    tls_certificate: Option<PathBuf>,
    /// The private key of the certificate (PEM).
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Who signs the certificates of https workers (PEM) [default: the system's authorities].
    #[arg(long, value_name = "FILE")]
    worker_authorities: Option<PathBuf>,
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
    #[command(flatten)]
    epp: EppArguments,
    sources: SourceArguments,
}

/// A parsed command line.
#[derive(Debug)]
pub struct CommandLine {
    /// The settings.
    pub config: Config,
    /// Where workers come from.
    pub source: Source,
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
        let mut args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        let is_epp = args.get(1).is_some_and(|first| first == "epp");
        if is_epp {
            args.remove(1);
        }
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
            epp: is_epp
                .then(|| arguments.epp.into_config())
                .transpose()
                .map_err(refuse)?,
            ..Config::new(prefills, arguments.decode)
        };
        let source = arguments.sources.source().map_err(refuse)?;
        match source {
            Source::Flags => config.check(),
            _ => config.check_settings(),
        }
        .map_err(refuse)?;
        Ok(Self {
            config,
            source,
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
