//! Arrivals: from a trace in the Mooncake format, or made up.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::Deserialize;

use crate::schedule::dice::Dice;

/// Most requests of a trace.
pub const REQUESTS_MAX: usize = 2_000_000;

/// Most tokens of one request's prompt or answer.
pub const TOKENS_MAX: u64 = 16 << 20;

/// Mooncake's public traces are written in bursts: most timestamps are multiples of this.
const BURST_MS: u64 = 3000;

/// Tokens per entry of a Mooncake trace's `hash_ids`.
pub const BLOCK_TOKENS: u64 = 512;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// When it arrives.
    pub at: Duration,
    /// Tokens of its prompt, at least 1.
    pub input: u64,
    /// Tokens of its answer, at least 1.
    pub output: u64,
    /// Names of its prompt's blocks of [`BLOCK_TOKENS`]; equal beginnings have equal names.
    pub blocks: Vec<u64>,
}

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Why a trace was refused.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A line is not what it should be.
    #[error("line {number}: {reason}")]
    Line {
        /// From 1.
        number: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is no request in it.
    #[error("the trace has no requests")]
    Empty,
    /// There are more than [`REQUESTS_MAX`].
    #[error("the trace has more than {REQUESTS_MAX} requests")]
    TooLong,
    /// A made-up trace is described wrongly.
    #[error("`{text}` does not describe a trace: {reason} (example: {EXAMPLE})")]
    Made {
        /// What was given.
        text: String,
        /// What is wrong.
        reason: &'static str,
    },
}

/// How a made-up trace is written.
pub const EXAMPLE: &str =
    "synthetic:requests=2000,rate=3.4,input=12035,input_sigma=1.05,output=343";

/// Reads JSON lines with `timestamp` (ms), `input_length`, `output_length` and optionally `hash_ids`. If most timestamps
/// are multiples of 3 s, as in Mooncake's traces, each is smeared evenly over the 3 s that follow it.
///
/// # Errors
/// [`TraceError`] naming the line.
pub fn read(text: &str, seed: u64) -> Result<Vec<Arrival>, TraceError> {
    let mut arrivals = Vec::new();
    let mut bursts = 0;
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let bad = |reason: String| TraceError::Line { number, reason };
        let line: Line = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
        if line.input_length.max(line.output_length) > TOKENS_MAX {
            return Err(bad(format!("more than {TOKENS_MAX} tokens")));
        }
        if arrivals.len() == REQUESTS_MAX {
            return Err(TraceError::TooLong);
        }
        bursts += usize::from(line.timestamp.is_multiple_of(BURST_MS));
        arrivals.push(Arrival {
            at: Duration::from_millis(line.timestamp),
            input: line.input_length.max(1),
            output: line.output_length.max(1),
            blocks: line.hash_ids,
        });
    }
    if arrivals.is_empty() {
        return Err(TraceError::Empty);
    }
    if bursts * 2 > arrivals.len() {
        let mut dice = Dice::new(seed, 1);
        for arrival in &mut arrivals {
            arrival.at += Duration::from_millis(BURST_MS).mul_f64(dice.unit());
        }
    }
    arrivals.sort_by_key(|arrival| arrival.at);
    Ok(arrivals)
}

/// What a made-up trace looks like.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// Requests.
    pub requests: usize,
    /// Requests per second; gaps are exponential.
    pub rate: f64,
    /// Mean tokens of a prompt.
    pub input: f64,
    /// Deviation of the logarithm of prompt lengths.
    pub input_sigma: f64,
    /// Mean tokens of an answer.
    pub output: f64,
    /// Deviation of the logarithm of answer lengths.
    pub output_sigma: f64,
    /// Longest prompt.
    pub input_max: f64,
}

impl Default for Made {
    /// Rates and lengths as in Mooncake's conversation trace.
    fn default() -> Self {
        Self {
            requests: 2000,
            rate: 3.4,
            input: 12_035.0,
            input_sigma: 1.05,
            output: 343.0,
            output_sigma: 0.5,
            input_max: 126_000.0,
        }
    }
}

impl Made {
    /// Reads what follows `synthetic:`: `name=number` with commas between, each of which may be left out.
    ///
    /// # Errors
    /// [`TraceError::Made`].
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let bad = |reason| TraceError::Made {
            text: text.to_owned(),
            reason,
        };
        let mut made = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (name, number) = part
                .split_once('=')
                .ok_or_else(|| bad("a `=` is missing"))?;
            if name == "requests" {
                made.requests = number
                    .parse()
                    .map_err(|_| bad("requests is a whole number"))?;
                continue;
            }
            let number: f64 = number.parse().map_err(|_| bad("numbers are needed"))?;
            let field = match name {
                "rate" => &mut made.rate,
                "input" => &mut made.input,
                "input_sigma" => &mut made.input_sigma,
                "output" => &mut made.output,
                "output_sigma" => &mut made.output_sigma,
                "input_max" => &mut made.input_max,
                _ => return Err(bad("a name is unknown")),
            };
            *field = number;
        }
        let numbers = [made.rate, made.input, made.output, made.input_max];
        let sigmas = [made.input_sigma, made.output_sigma];
        if !numbers
            .iter()
            .all(|number| number.is_finite() && *number > 0.0)
            || !sigmas.iter().all(|sigma| (0.0..=10.0).contains(sigma))
        {
            return Err(bad("numbers must be positive, sigmas 0 to 10"));
        }
        if made.requests == 0 || made.requests > REQUESTS_MAX {
            return Err(bad("requests must be 1 to 2000000"));
        }
        Ok(made)
    }

    /// The arrivals: a Poisson stream with lognormal lengths.
    pub fn arrivals(&self, seed: u64) -> Vec<Arrival> {
        let mut dice = Dice::new(seed, 2);
        let mut at = 0.0;
        (0..self.requests)
            .map(|_| {
                at += dice.exponential(1.0 / self.rate);
                let input = length(&mut dice, self.input, self.input_sigma, self.input_max);
                let output = length(&mut dice, self.output, self.output_sigma, 1e5);
                Arrival {
                    at: Duration::try_from_secs_f64(at).unwrap_or(Duration::MAX / 2),
                    input,
                    output,
                    blocks: Vec::new(),
                }
            })
            .collect()
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to what fits"
)]
fn length(dice: &mut Dice, mean: f64, sigma: f64, most: f64) -> u64 {
    // The mean of a lognormal lies above its median by exp(sigma²/2).
    let log = mean.ln() - sigma * sigma / 2.0 + sigma * dice.normal();
    log.exp().round().clamp(1.0, most.min(TOKENS_MAX as f64)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_smeared_and_others_are_not() {
        let line = |ms: u64| {
            format!(
                "{{\"timestamp\": {ms}, \"input_length\": 5, \"output_length\": 0, \"hash_ids\": [1]}}"
            )
        };
        let burst: Vec<String> = (0..100).map(|n| line(n / 20 * 3000)).collect();
        let arrivals = read(&burst.join("\n"), 7).unwrap();
        assert_eq!(arrivals, read(&burst.join("\n"), 7).unwrap());
        assert_ne!(arrivals, read(&burst.join("\n"), 8).unwrap());
        let distinct: std::collections::HashSet<_> = arrivals.iter().map(|a| a.at).collect();
        assert!(distinct.len() > 95);
        assert!(arrivals.is_sorted_by_key(|a| a.at));
        assert!(
            arrivals[19].at < Duration::from_secs(3) && arrivals[20].at >= Duration::from_secs(3)
        );
        assert_eq!(
            (arrivals[0].output, arrivals[0].blocks.as_slice()),
            (1, &[1][..])
        );
        let fine = [line(1), line(17)].join("\n\n");
        assert_eq!(read(&fine, 7).unwrap()[1].at, Duration::from_millis(17));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(matches!(read("\n", 0), Err(TraceError::Empty)));
        let error = read("{\"timestamp\": 1}", 0).unwrap_err().to_string();
        assert!(
            error.starts_with("line 1") && error.contains("input_length"),
            "{error}"
        );
        let long = "{\"timestamp\": 1, \"input_length\": 99999999, \"output_length\": 1}";
        assert!(read(long, 0).unwrap_err().to_string().contains("tokens"));
        for text in [
            "rate",
            "rate=x",
            "speed=3",
            "rate=-1",
            "requests=0",
            "input_sigma=nan",
        ] {
            assert!(
                Made::parse(text)
                    .unwrap_err()
                    .to_string()
                    .contains("example"),
                "{text}"
            );
        }
    }

    #[test]
    fn made_traces_have_their_means() {
        let spec = EXAMPLE.strip_prefix("synthetic:").unwrap();
        let made = Made {
            requests: 20_000,
            ..Made::parse(spec).unwrap()
        };
        let arrivals = made.arrivals(3);
        let mean = |of: fn(&Arrival) -> u64| {
            arrivals.iter().map(of).sum::<u64>() as f64 / arrivals.len() as f64
        };
        assert!((mean(|a| a.input) / made.input - 1.0).abs() < 0.05);
        assert!((mean(|a| a.output) / made.output - 1.0).abs() < 0.05);
        let span = arrivals.last().unwrap().at.as_secs_f64();
        assert!((20_000.0 / span / made.rate - 1.0).abs() < 0.05);
    }
}
