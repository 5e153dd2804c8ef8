//! The kinds of choice, and the numbers they depend on.
#![forbid(unsafe_code)]

use std::time::Duration;

/// How a pair is chosen among those that may serve a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Policy {
    /// The pair with the shortest predicted time to the first token: live queues and own bookings, fused.
    #[default]
    Fused,
    /// Each pair with the same chance.
    Random,
    /// Every worker in turn, and every pair in turn.
    RoundRobin,
    /// Of two prefill and two decode workers drawn by chance, those with fewer requests.
    PowerOfTwo,
    /// The prefill with the fewest queued tokens, the decode with the fewest KV tokens.
    LeastTokens,
    /// The prefill that has seen most of the prompt, unless it has too much to do; else as `LeastTokens`.
    CacheAware,
    /// Prefill queue and nominal bandwidth: what a table of the network knows, without its queues.
    Topology,
}

impl Policy {
    /// Every policy with its name on command lines and in results.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::Fused, "fused"),
        (Self::Random, "random"),
        (Self::RoundRobin, "round_robin"),
        (Self::PowerOfTwo, "power_of_two"),
        (Self::LeastTokens, "least_tokens"),
        (Self::CacheAware, "cache_aware"),
        (Self::Topology, "topology"),
    ];

    /// The policy's name.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(policy, _)| *policy == self)
            .map_or("", |(_, name)| name)
    }

    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(policy, _)| *policy)
    }
}

/// What a [`Board`](super::Board) is told once. Weights are in seconds, so that they compare with a predicted time to the
/// first token.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How pairs are chosen.
    pub policy: Policy,
    /// Chance is drawn from this seed and the request's own stream number.
    pub seed: u64,
    /// This router's own number among the replicas.
    pub replica: u64,
    /// How often a worker that is alive sends a sample, even if nothing changed. Default 1 s: the telemetry stream's
    /// keep-alive.
    pub sample_period: Duration,
    /// Samples older than so many periods say nothing any more (rule 3). Default 2.5.
    pub stale_periods: f64,
    /// Most bytes that may wait or move on one prefill's egress before further requests are held in the router (rule
    /// 7). Default 256 GiB; one request is always let through.
    pub egress_bytes_max: u64,
    /// How full a decode's KV pool may be booked, as a share of its capacity. Default 1.
    pub kv_share_max: f64,
    /// The share of both limits that requests of negative priority may use. Default 0.8.
    pub low_priority_share: f64,
    /// Whether decode takes a request's pages at its dispatch (SGLang's `early` allocation) or when its prefill is
    /// complete (`prefill_complete`). Default at dispatch.
    pub decode_allocates_early: bool,
    /// Bandwidth between zones in bytes per second, where it is below the workers' own. Default none.
    pub cross_zone_bytes_per_s: Option<f64>,
    /// λ: what a completely full decode costs, in seconds. Default 0.05.
    pub decode_load_weight: f64,
    /// What a second of transfer costs on top of itself, in seconds: it keeps both ends from others meanwhile, so a slow
    /// link is worse for the fleet than for the request. Default 1; it matters where links differ.
    pub wire_weight: f64,
    /// μ: what one recent failure of a pair costs, in seconds. Default 2; it halves every 20 s.
    pub failure_weight: f64,
    /// ν: what a prefill without a fresh sample costs, in seconds. Default 0.02.
    pub stale_weight: f64,
    /// ε: predictions closer than this are the same, and chance decides. Default 2 ms.
    pub tie: Duration,
    /// A pair that served the same sticky key is kept while its prediction is at most so many seconds worse than the
    /// best. Default 0.25 s.
    pub sticky_slack: Duration,
    /// How long a sticky key is remembered after its last use. Default 1 h.
    pub sticky_ttl: Duration,
    /// Whether prompts that a prefill has seen before count as partly computed. Default true.
    pub prefix_credit: bool,
    /// How long a sibling's booking is believed without news of it. Default 120 s.
    pub sibling_ttl: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            seed: 0,
            replica: 0,
            sample_period: Duration::from_secs(1),
            stale_periods: 2.5,
            egress_bytes_max: 256 << 30,
            kv_share_max: 1.0,
            low_priority_share: 0.8,
            decode_allocates_early: true,
            cross_zone_bytes_per_s: None,
            decode_load_weight: 0.05,
            wire_weight: 1.0,
            failure_weight: 2.0,
            stale_weight: 0.02,
            tie: Duration::from_millis(2),
            sticky_slack: Duration::from_millis(250),
            sticky_ttl: Duration::from_secs(3600),
            prefix_credit: true,
            sibling_ttl: Duration::from_secs(120),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (policy, name) in Policy::ALL {
            assert_eq!(policy.name(), name);
            assert_eq!(Policy::named(name), Some(policy));
            let value = clap::ValueEnum::to_possible_value(&policy).unwrap();
            assert_eq!(value.get_name(), name);
        }
        assert_eq!(Policy::named("best"), None);
    }
}
