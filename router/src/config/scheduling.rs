//! Settings of the scheduler.
#![forbid(unsafe_code)]

use std::time::Duration;

use clap::Args;

use super::{ConfigError, command_line::parse_time};
use crate::schedule::facts::{Facts, Role};
use crate::schedule::{Policy, Settings};

/// What the scheduler assumes of workers that do not tell.
#[derive(Clone, Debug, PartialEq)]
pub struct Nominal {
    /// Bytes of KV cache per token, over all tensor-parallel ranks.
    pub kv_bytes_per_token: u64,
    /// Tokens per page.
    pub page_tokens: u64,
    /// Bandwidth of a worker's network cards in bytes per second.
    pub link_bytes_per_s: f64,
    /// Prefill speed of one data-parallel rank in tokens per second.
    pub prefill_tokens_per_s: f64,
    /// Tokens that a decode's KV pool holds; none: unknown, which disables its admission gate.
    pub kv_tokens: Option<u64>,
    /// Tokens that an answer without a bound is expected to have. Default 512: SGLang's `num_reserved_decode_tokens`, which its
    /// decodes keep free for each request.
    pub output_tokens: u64,
}

impl Default for Nominal {
    fn default() -> Self {
        let facts = Facts::new("", Role::Prefill);
        Self {
            kv_bytes_per_token: facts.kv_bytes_per_token,
            page_tokens: facts.page_tokens,
            link_bytes_per_s: facts.bytes_per_s,
            prefill_tokens_per_s: facts.prefill_tokens_per_s,
            kv_tokens: None,
            output_tokens: 512,
        }
    }
}

/// Whether answers say in their headers why they came from where they came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Explain {
    /// No: clients learn nothing about workers.
    #[default]
    Never,
    /// Those whose request has the header `x-kvrouter-explain: 1`.
    Asked,
    /// Every one.
    Always,
}

/// How pairs are chosen.
#[derive(Clone, Debug)]
pub struct Scheduling {
    /// The policy and its weights.
    pub settings: Settings,
    /// What is assumed.
    pub nominal: Nominal,
}

impl Default for Scheduling {
    /// The fused policy, with chance of its own on every replica.
    fn default() -> Self {
        Self {
            settings: Settings {
                seed: rand::random(),
                replica: rand::random(),
                ..Settings::default()
            },
            nominal: Nominal::default(),
        }
    }
}

impl Scheduling {
    /// The default settings with this policy.
    pub fn with(policy: Policy) -> Self {
        let mut scheduling = Self::default();
        scheduling.settings.policy = policy;
        scheduling
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigError`] naming the option.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (settings, nominal) = (&self.settings, &self.nominal);
        let positive = |number: f64| number.is_finite() && number > 0.0;
        let share = |number: f64| positive(number) && number <= 1.0;
        for (option, fits) in [
            ("--kv-bytes-per-token", nominal.kv_bytes_per_token > 0),
            ("--page-tokens", nominal.page_tokens > 0),
            ("--kv-tokens-per-decode", nominal.kv_tokens != Some(0)),
            ("--link-bandwidth", positive(nominal.link_bytes_per_s)),
            ("--prefill-speed", positive(nominal.prefill_tokens_per_s)),
            ("--egress-limit", settings.egress_bytes_max > 0),
            ("--kv-share", share(settings.kv_share_max)),
            ("--low-priority-share", share(settings.low_priority_share)),
            (
                "--cross-zone-bandwidth",
                settings.cross_zone_bytes_per_s.is_none_or(positive),
            ),
        ] {
            if !fits {
                return Err(ConfigError::Scheduling { option });
            }
        }
        Ok(())
    }
}

/// The scheduler's options.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub struct SchedulingArguments {
    /// How pairs are chosen.
    #[arg(long, value_enum, default_value_t)]
    policy: Policy,
    /// Chance is drawn from this number, so that choices can be repeated [default: another one at each start].
    #[arg(long, value_name = "NUMBER")]
    policy_seed: Option<u64>,
    /// KV cache per token in bytes, over all tensor-parallel ranks.
    #[arg(long, value_name = "BYTES", default_value_t = Nominal::default().kv_bytes_per_token)]
    kv_bytes_per_token: u64,
    /// Tokens per page of workers whose /server_info does not tell.
    #[arg(long, value_name = "TOKENS", default_value_t = Nominal::default().page_tokens)]
    page_tokens: u64,
    /// Tokens that a decode's KV cache holds, where /server_info does not tell [default: no gate].
    #[arg(long, value_name = "TOKENS")]
    kv_tokens_per_decode: Option<u64>,
    /// Tokens that an answer is expected to have, where the client sets no bound: booked in a decode's KV cache.
    #[arg(long, value_name = "TOKENS", default_value_t = Nominal::default().output_tokens)]
    output_tokens: u64,
    /// Bandwidth of a worker in bytes per second, until it is measured.
    #[arg(long, value_name = "BYTES", default_value_t = Nominal::default().link_bytes_per_s)]
    link_bandwidth: f64,
    /// Prefill speed in tokens per second, until it is measured.
    #[arg(long, value_name = "TOKENS", default_value_t = Nominal::default().prefill_tokens_per_s)]
    prefill_speed: f64,
    /// Bandwidth between zones in bytes per second [default: as within].
    #[arg(long, value_name = "BYTES")]
    cross_zone_bandwidth: Option<f64>,
    /// Bytes that may wait or move before one prefill's wire; further requests wait in the router.
    #[arg(long, value_name = "BYTES", default_value_t = Settings::default().egress_bytes_max)]
    egress_limit: u64,
    /// How full a decode's KV cache may be booked, from 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = Settings::default().kv_share_max)]
    kv_share: f64,
    /// The share of both limits that requests of negative priority may use.
    #[arg(long, value_name = "SHARE", default_value_t = Settings::default().low_priority_share)]
    low_priority_share: f64,
    /// Decodes take a request's pages when its prefill is complete (SGLang's `prefill_complete` allocation) instead of at once.
    #[arg(long)]
    decode_allocates_late: bool,
    /// A pair is kept for a sticky key while it is at most this much slower than the best.
    #[arg(long, value_name = "TIME", default_value = "250ms", value_parser = parse_time)]
    sticky_slack: Duration,
    /// How long a sticky key is remembered after its last use.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    sticky_ttl: Duration,
    /// Say in the headers of answers (`x-kvrouter-…`) why they came from where they came.
    #[arg(long, value_enum, default_value_t, num_args = 0..=1, default_missing_value = "always")]
    pub(super) explain: Explain,
    /// Do not count on prompts that a prefill has seen before.
    #[arg(long)]
    no_prefix_credit: bool,
}

impl From<SchedulingArguments> for Scheduling {
    fn from(arguments: SchedulingArguments) -> Self {
        let Self { settings, .. } = Self::default();
        Self {
            settings: Settings {
                policy: arguments.policy,
                seed: arguments.policy_seed.unwrap_or(settings.seed),
                egress_bytes_max: arguments.egress_limit,
                kv_share_max: arguments.kv_share,
                low_priority_share: arguments.low_priority_share,
                decode_allocates_early: !arguments.decode_allocates_late,
                cross_zone_bytes_per_s: arguments.cross_zone_bandwidth,
                sticky_slack: arguments.sticky_slack,
                sticky_ttl: arguments.sticky_ttl,
                prefix_credit: !arguments.no_prefix_credit,
                ..settings
            },
            nominal: Nominal {
                kv_bytes_per_token: arguments.kv_bytes_per_token,
                page_tokens: arguments.page_tokens,
                link_bytes_per_s: arguments.link_bandwidth,
                prefill_tokens_per_s: arguments.prefill_speed,
                kv_tokens: arguments.kv_tokens_per_decode,
                output_tokens: arguments.output_tokens,
            },
        }
    }
}
