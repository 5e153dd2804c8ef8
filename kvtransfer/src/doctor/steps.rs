//! The checks that need a peer, as a list: what each asks, when it is asked, and what came out.
//!
//! The list is pure. Whoever runs it hands in a function that performs one step and returns its [`Outcome`].
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::findings::PeerPath;

/// One check between two hosts. The RDMA ones are those of the first hour on a new eRDMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Step {
    /// Round trip of a small message over TCP.
    TcpLatency,
    /// Bytes per second over one TCP connection, in messages of 64 KiB.
    TcpBandwidth,
    /// A WRITE from four places and a SEND behind it; the peer compares every byte.
    WriteAndSend,
    /// Time of a small WRITE until the peer's SEND answers it.
    WriteLatency,
    /// Round trip of a small SEND.
    SendLatency,
    /// Bytes per second in WRITEs of 64 KiB.
    Bandwidth {
        /// Over so many queue pairs.
        queue_pairs: u8,
    },
    /// A SEND that finds no receive posted: how long until this side learns of it.
    EmptyReceiveQueue,
    /// A WRITE with a key that the peer never gave: how long until this side learns of it.
    BadKey,
}

impl Step {
    /// What is asked, in words.
    pub fn words(self) -> String {
        match self {
            Self::TcpLatency => "TCP round trip, 64 B".to_owned(),
            Self::TcpBandwidth => "TCP bandwidth, 64 KiB messages".to_owned(),
            Self::WriteAndSend => "WRITE of 4 SGE + SEND, bytes compared".to_owned(),
            Self::WriteLatency => "WRITE latency, 64 B".to_owned(),
            Self::SendLatency => "SEND round trip, 16 B inline".to_owned(),
            Self::Bandwidth { queue_pairs } => {
                format!("WRITE bandwidth, 64 KiB, {queue_pairs} queue pair(s)")
            }
            Self::EmptyReceiveQueue => {
                "SEND into an empty receive queue, time to detect".to_owned()
            }
            Self::BadKey => "WRITE with a bad key, time to detect".to_owned(),
        }
    }

    /// Whether nothing that follows on the same path means anything once this one failed.
    fn is_ground(self) -> bool {
        matches!(self, Self::TcpLatency | Self::WriteAndSend)
    }

    fn is_tcp(self) -> bool {
        matches!(self, Self::TcpLatency | Self::TcpBandwidth)
    }
}

/// A measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What, e.g. `median`.
    pub name: String,
    /// How much.
    pub value: f64,
    /// In which unit, e.g. `us` or `MB/s`.
    pub unit: String,
}

impl Figure {
    /// A value with its name and unit.
    pub fn new(name: &str, value: f64, unit: &str) -> Self {
        Self {
            name: name.to_owned(),
            value,
            unit: unit.to_owned(),
        }
    }

    /// Median and 99th percentile of times, in microseconds; none of no times.
    pub fn quantiles(mut times: Vec<Duration>) -> Vec<Self> {
        times.sort_unstable();
        let at = |name: &str, percent: usize| {
            let last = times.len().checked_sub(1)?;
            let time = times[percent * last / 100];
            Some(Self::new(name, time.as_secs_f64() * 1e6, "us"))
        };
        [("median", 50), ("p99", 99)]
            .into_iter()
            .filter_map(|(name, percent)| at(name, percent))
            .collect()
    }

    /// Bytes per time, in MB/s.
    pub fn rate(bytes: u64, time: Duration) -> Self {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a rate for people; 53 bits are more than its accuracy"
        )]
        let rate = bytes as f64 / time.as_secs_f64() / 1e6;
        Self::new("rate", rate, "MB/s")
    }
}

/// What came out of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Outcome {
    /// It went as it should.
    Passed(Vec<Figure>),
    /// Something that has no right or wrong was seen, such as how a device reports a fault.
    Seen {
        /// What was seen.
        what: String,
        /// What was measured.
        figures: Vec<Figure>,
    },
    /// It did not.
    Failed {
        /// What happened.
        why: String,
        /// What to do.
        fix: String,
    },
    /// It was not tried.
    NotRun {
        /// Why not.
        why: String,
    },
}

/// A step and what came out of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// The step.
    pub step: Step,
    /// What came out.
    pub outcome: Outcome,
}

/// Steps for a path, in the order in which they are run: TCP for comparison, then RDMA if there is a pair of devices;
/// the two that break connections come last.
pub fn steps(path: &PeerPath) -> Vec<Step> {
    let mut steps = vec![Step::TcpLatency, Step::TcpBandwidth];
    if path.pairs.is_empty() {
        return steps;
    }
    steps.extend([Step::WriteAndSend, Step::WriteLatency, Step::SendLatency]);
    steps.extend([1, 2, 4].map(|queue_pairs| Step::Bandwidth { queue_pairs }));
    steps.extend([Step::EmptyReceiveQueue, Step::BadKey]);
    steps
}

/// Runs steps in order. Once the first step of a path fails, the others of that path are not tried.
pub fn run(steps: &[Step], mut perform: impl FnMut(Step) -> Outcome) -> Vec<Done> {
    let mut broken: [Option<Step>; 2] = [None; 2];
    let run_one = |&step: &Step| {
        let lane = usize::from(step.is_tcp());
        let outcome = match broken[lane] {
            Some(first) => Outcome::NotRun {
                why: format!("`{}` failed", first.words()),
            },
            None => perform(step),
        };
        let has_failed = matches!(outcome, Outcome::Failed { .. });
        if has_failed && step.is_ground() {
            broken[lane] = Some(step);
        }
        Done { step, outcome }
    };
    steps.iter().map(run_one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(pairs: usize) -> PeerPath {
        PeerPath {
            path: "x".to_owned(),
            pairs: vec![("a".to_owned(), "b".to_owned()); pairs],
            refused: Vec::new(),
        }
    }

    #[test]
    fn without_a_pair_of_devices_only_tcp_is_measured() {
        assert_eq!(steps(&path(0)), [Step::TcpLatency, Step::TcpBandwidth]);
        let all = steps(&path(2));
        assert_eq!(all.len(), 10);
        assert_eq!(
            all[8..],
            [Step::EmptyReceiveQueue, Step::BadKey],
            "breakers last"
        );
    }

    #[test]
    fn a_failed_ground_step_spares_the_rest_of_its_path_only() {
        let mut asked = Vec::new();
        let done = run(&steps(&path(1)), |step| {
            asked.push(step);
            match step {
                Step::WriteAndSend => Outcome::Failed {
                    why: "byte 7 differs".to_owned(),
                    fix: "x".to_owned(),
                },
                _ => Outcome::Passed(Vec::new()),
            }
        });
        assert_eq!(
            asked,
            [Step::TcpLatency, Step::TcpBandwidth, Step::WriteAndSend]
        );
        assert_eq!(done.len(), 10);
        let spared = |done: &&Done| matches!(&done.outcome, Outcome::NotRun { why } if why.contains("4 SGE"));
        assert_eq!(done.iter().filter(spared).count(), 7);
    }

    #[test]
    fn a_failed_measurement_spares_nothing() {
        let fail = |step| match step {
            Step::WriteLatency => Outcome::Failed {
                why: String::new(),
                fix: String::new(),
            },
            _ => Outcome::Passed(Vec::new()),
        };
        let done = run(&steps(&path(1)), fail);
        assert!(
            done.iter()
                .all(|done| !matches!(done.outcome, Outcome::NotRun { .. }))
        );
    }
}
