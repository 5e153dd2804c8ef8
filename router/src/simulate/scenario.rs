//! A fleet to simulate.
#![forbid(unsafe_code)]

use serde::Deserialize;

use crate::schedule::facts::WORKERS_MAX;

/// Most router replicas of a scenario.
pub const REPLICAS_MAX: usize = 64;

/// A fleet, its load and what its routers know. Read from a TOML file in which every field may be left out; unknown ones
/// are refused.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scenario {
    /// What it is for.
    pub description: String,
    /// Prefill workers.
    pub prefills: usize,
    /// Decode workers.
    pub decodes: usize,
    /// Arrivals come so many times faster than in the trace.
    pub load: f64,
    /// Router replicas; each gets requests by chance and knows its own bookings.
    pub replicas: usize,
    /// Whether replicas tell each other their bookings.
    pub gossip: bool,
    /// How long that takes, in seconds.
    pub gossip_delay_s: f64,
    /// Whether workers stream samples.
    pub telemetry: bool,
    /// How often, in seconds.
    pub sample_period_s: f64,
    /// From a sample's picture to its arrival, in seconds.
    pub sample_delay_s: f64,
    /// Bytes of KV cache per token.
    pub kv_bytes_per_token: u64,
    /// Prefill speed in tokens per second for short prompts; also what the routers are told.
    pub prefill_tokens_per_s: f64,
    /// Seconds per token squared on top of that: attention.
    pub prefill_s_per_token2: f64,
    /// Tokens of each prefill's prefix cache; 0: none.
    pub prefix_cache_tokens: u64,
    /// KV tokens per decode.
    pub decode_kv_tokens: u64,
    /// Seconds per decode step.
    pub decode_step_s: f64,
    /// True bandwidth of every worker in bytes per second.
    pub bytes_per_s: f64,
    /// The bandwidth that routers are told; default: the true one.
    pub told_bytes_per_s: Option<f64>,
    /// Zones: worker i stands in zone i mod zones.
    pub zones: usize,
    /// Bandwidth between zones in bytes per second; routers are told.
    pub cross_zone_bytes_per_s: Option<f64>,
    /// Senders that are slower than anybody knows.
    pub degraded: Vec<Degraded>,
    /// Most bytes before a prefill's wire (rule 7); default: the router's.
    pub egress_bytes_max: Option<u64>,
}

/// A prefill whose sending is slower than its table says.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Degraded {
    /// Its number.
    pub prefill: usize,
    /// Its bandwidth's share of the others'.
    pub factor: f64,
    /// Since when, in seconds of the simulation.
    #[serde(default)]
    pub from_s: f64,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            description: String::new(),
            prefills: 8,
            decodes: 8,
            load: 1.0,
            replicas: 1,
            gossip: false,
            gossip_delay_s: 0.002,
            telemetry: true,
            sample_period_s: 0.02,
            sample_delay_s: 0.005,
            kv_bytes_per_token: 256 << 10,
            prefill_tokens_per_s: 12_000.0,
            prefill_s_per_token2: 1e-10,
            prefix_cache_tokens: 0,
            decode_kv_tokens: 1_600_000,
            decode_step_s: 0.02,
            bytes_per_s: 25e9,
            told_bytes_per_s: None,
            zones: 1,
            cross_zone_bytes_per_s: None,
            degraded: Vec::new(),
            egress_bytes_max: None,
        }
    }
}

/// Why a scenario was refused.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// It is no TOML, or has unknown fields.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// A number is outside its range.
    #[error("`{field}` must be {range}")]
    Range {
        /// Which one.
        field: &'static str,
        /// What it may be.
        range: &'static str,
    },
}

impl Scenario {
    /// Reads and checks a scenario.
    ///
    /// # Errors
    /// [`ScenarioError`] naming the first mistake.
    pub fn from_toml(text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text)?;
        scenario.check()?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), ScenarioError> {
        let positive = |number: f64| number.is_finite() && number > 0.0 && number < 1e18;
        let time = |seconds: f64| (0.0..=3600.0).contains(&seconds);
        let workers = 1..=WORKERS_MAX;
        let checks = [
            (workers.contains(&self.prefills), "prefills", "1 to 256"),
            (workers.contains(&self.decodes), "decodes", "1 to 256"),
            (
                (1..=REPLICAS_MAX).contains(&self.replicas),
                "replicas",
                "1 to 64",
            ),
            (positive(self.load), "load", "above 0"),
            (time(self.gossip_delay_s), "gossip_delay_s", "0 to 3600"),
            (
                (1e-3..=3600.0).contains(&self.sample_period_s),
                "sample_period_s",
                "0.001 to 3600",
            ),
            (time(self.sample_delay_s), "sample_delay_s", "0 to 3600"),
            (
                (1..=1 << 40).contains(&self.kv_bytes_per_token),
                "kv_bytes_per_token",
                "1 to 2^40",
            ),
            (
                positive(self.prefill_tokens_per_s),
                "prefill_tokens_per_s",
                "above 0",
            ),
            (
                (0.0..=1.0).contains(&self.prefill_s_per_token2),
                "prefill_s_per_token2",
                "0 to 1",
            ),
            (self.decode_kv_tokens > 0, "decode_kv_tokens", "above 0"),
            (
                positive(self.decode_step_s) && time(self.decode_step_s),
                "decode_step_s",
                "above 0, up to 3600",
            ),
            (positive(self.bytes_per_s), "bytes_per_s", "above 0"),
            (
                self.told_bytes_per_s.is_none_or(positive),
                "told_bytes_per_s",
                "above 0",
            ),
            (workers.contains(&self.zones), "zones", "1 to 256"),
            (
                self.cross_zone_bytes_per_s.is_none_or(positive),
                "cross_zone_bytes_per_s",
                "above 0",
            ),
            (
                self.degraded
                    .iter()
                    .all(|one| one.prefill < self.prefills && positive(one.factor)),
                "degraded",
                "prefills of the scenario with factors above 0",
            ),
        ];
        match checks.into_iter().find(|(holds, _, _)| !holds) {
            Some((_, field, range)) => Err(ScenarioError::Range { field, range }),
            None => Ok(()),
        }
    }

    /// True bytes per second from a prefill to a decode at `seconds` of the simulation.
    pub fn rate(&self, prefill: usize, decode: usize, seconds: f64) -> f64 {
        let mut rate = self.bytes_per_s;
        if prefill % self.zones != decode % self.zones {
            rate = rate.min(self.cross_zone_bytes_per_s.unwrap_or(rate));
        }
        self.degraded
            .iter()
            .filter(|one| one.prefill == prefill && one.from_s <= seconds)
            .fold(rate, |rate, one| rate * one.factor)
    }

    /// True seconds of computing `tokens`.
    pub fn compute_s(&self, tokens: u64) -> f64 {
        let tokens = tokens as f64;
        tokens / self.prefill_tokens_per_s + tokens * tokens * self.prefill_s_per_token2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_zones_and_degradation() {
        let scenario = Scenario::from_toml(
            "zones = 2\nbytes_per_s = 25e9\ncross_zone_bytes_per_s = 6.25e9\n\
             [[degraded]]\nprefill = 0\nfactor = 0.25\nfrom_s = 10.0",
        )
        .unwrap();
        assert_eq!(scenario.rate(1, 3, 0.0), 25e9);
        assert_eq!(scenario.rate(1, 2, 0.0), 6.25e9);
        assert_eq!(scenario.rate(0, 2, 9.0), 25e9);
        assert_eq!(scenario.rate(0, 2, 10.0), 6.25e9);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("prefils = 3", "prefils"),
            ("prefills = 0", "`prefills` must be 1 to 256"),
            ("load = -1.0", "`load`"),
            ("decode_step_s = nan", "`decode_step_s`"),
            ("[[degraded]]\nprefill = 8\nfactor = 0.5", "`degraded`"),
        ] {
            let error = Scenario::from_toml(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
