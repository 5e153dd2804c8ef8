//! What is measured, and how one measurement goes.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::Serialize;

use crate::client::{self, Job, Outcome};
use crate::routers::Running;

/// How far apart the tokens of paced streams are.
const GAP: Duration = Duration::from_millis(10);

/// Tokens of the two lengths of streams whose difference tells what one token costs.
const TOKENS_FEW: u64 = 2;
const TOKENS_MANY: u64 = 102;

/// How far apart the tokens of the many streams are, and how many each has: they last longer than their ramp.
const MANY_GAP: Duration = Duration::from_secs(1);
const MANY_TOKENS: u64 = 25;
const MANY_RAMP: Duration = Duration::from_secs(15);

/// A load that takes longer is cut short: a router whose answers wait for delayed acknowledgements, for instance.
const TIME_MAX: Duration = Duration::from_secs(6);

/// The soak has all the time it needs.
const SOAK_TIME_MAX: Duration = Duration::from_secs(3600);

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    /// Chat completions of 0.2 KiB, answered whole, 32 at a time
    Small,
    /// The same over SGLang's own /generate
    Generate,
    /// Chat completions of 0.2 KiB, one after the other
    Single,
    /// Chat completions of 32 KiB, 8 at a time
    Large,
    /// Streams one after the other over one connection: time to the first byte
    FirstByte,
    /// The same with a client that acknowledges at once
    FirstByteQuick,
    /// Streams of tokens 10 ms apart, 64 at a time
    Tokens,
    /// Resident memory after many small requests
    Soak,
    /// As many streams at a time as are asked for
    Many,
}

impl Case {
    /// What a table says about it.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Small => "chat, 0.2 KiB, c=32",
            Self::Generate => "/generate, 0.2 KiB, c=32",
            Self::Single => "chat, 0.2 KiB, c=1",
            Self::Large => "chat, 32 KiB, c=8",
            Self::FirstByte => "stream, keep-alive, c=1",
            Self::FirstByteQuick => "the same, TCP_QUICKACK",
            Self::Tokens => "102 tokens 10 ms apart, c=64",
            Self::Soak => "many small requests, c=32",
            Self::Many => "many streams at a time",
        }
    }

    /// Whether asking a worker directly says something.
    pub(crate) const fn has_direct(self) -> bool {
        !matches!(self, Self::Tokens | Self::Soak | Self::Many)
    }

    /// Whether each router is started for it alone, because memory is what is looked at.
    pub(crate) const fn wants_fresh_router(self) -> bool {
        matches!(self, Self::Soak | Self::Many)
    }
}

/// How much is asked for.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Size {
    /// Requests of each closed loop, as a share of the full number.
    pub(crate) scale: f64,
    /// Requests of the soak.
    pub(crate) soak: u64,
    /// Streams at a time.
    pub(crate) streams: usize,
}

impl Size {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "some thousand requests, scaled"
    )]
    fn of(self, full: u64) -> u64 {
        ((full as f64 * self.scale) as u64).max(50)
    }
}

/// Resident memory after some requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Resident {
    pub(crate) after_requests: u64,
    pub(crate) mib: f64,
}

/// What one measurement found. Times are microseconds; what does not apply is absent.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Figures {
    pub(crate) answers: u64,
    pub(crate) errors: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    pub(crate) per_second: f64,
    /// Processor time of the router per request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_us: Option<f64>,
    /// The same per token: the difference of two lengths of streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_us_per_token: Option<f64>,
    /// To the first byte of the answer's body.
    pub(crate) first_p50_us: f64,
    pub(crate) first_p99_us: f64,
    pub(crate) total_p50_us: f64,
    pub(crate) total_p99_us: f64,
    /// Resident memory of the router at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) resident_mib: Option<f64>,
    /// And on the way there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) resident: Vec<Resident>,
    /// Most streams that were open at one time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) open_max: Option<u64>,
}

impl Figures {
    fn of(outcome: &Outcome) -> Self {
        let micros = |times: &hdrhistogram::Histogram<u64>, quantile| {
            times.value_at_quantile(quantile) as f64 / 1e3
        };
        Self {
            answers: outcome.answers,
            errors: outcome.errors,
            error: outcome.error.clone(),
            per_second: outcome.answers as f64 / outcome.seconds,
            first_p50_us: micros(&outcome.first, 0.5),
            first_p99_us: micros(&outcome.first, 0.99),
            total_p50_us: micros(&outcome.total, 0.5),
            total_p99_us: micros(&outcome.total, 0.99),
            ..Self::default()
        }
    }
}

/// A load on a router: how many at a time, how many in all, for how long at most.
struct Load {
    job: Job,
    connections: usize,
    requests: u64,
    time: Duration,
}

impl Load {
    fn new(job: Job, connections: usize, requests: u64) -> Self {
        Self {
            job,
            connections,
            requests,
            time: TIME_MAX,
        }
    }

    /// Puts it on `router`, after a tenth of it that is not counted.
    async fn measure(&self, router: &Running) -> anyhow::Result<Figures> {
        let warm_up = self.requests / 10;
        let run = |requests| {
            client::closed_loop(
                router.address,
                &self.job,
                self.connections,
                requests,
                self.time,
            )
        };
        run(warm_up).await;
        let before = router.usage()?;
        let outcome = run(self.requests).await;
        let after = router.usage()?;
        let mut figures = Figures::of(&outcome);
        if router.is_router() {
            let spent = (after.cpu - before.cpu).as_secs_f64() * 1e6;
            figures.cpu_us = Some(spent / outcome.answers.max(1) as f64);
            figures.resident_mib = Some(mib(after.resident));
        }
        Ok(figures)
    }
}

pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Measures `case` on `router` once.
pub(crate) async fn measure(case: Case, router: &Running, size: Size) -> anyhow::Result<Figures> {
    let few = || Job::stream(5, Duration::ZERO);
    let load = match case {
        Case::Small => Load::new(Job::chat(80), 32, size.of(8000)),
        Case::Generate => Load::new(Job::native(80), 32, size.of(8000)),
        Case::Single => Load::new(Job::chat(80), 1, size.of(4000)),
        Case::Large => Load::new(Job::chat(32 << 10), 8, size.of(4000)),
        Case::FirstByte => Load::new(few(), 1, size.of(2000)),
        Case::FirstByteQuick => {
            let mut job = few();
            job.quick_ack = true;
            Load::new(job, 1, size.of(2000))
        }
        Case::Tokens => return tokens(router, size).await,
        Case::Soak => return soak(router, size).await,
        Case::Many => return many(router, size).await,
    };
    load.measure(router).await
}

async fn tokens(router: &Running, size: Size) -> anyhow::Result<Figures> {
    let few = Load::new(Job::stream(TOKENS_FEW, GAP), 64, size.of(3200));
    let many = Load::new(Job::stream(TOKENS_MANY, GAP), 64, size.of(192));
    let few = few.measure(router).await?;
    let mut figures = many.measure(router).await?;
    let per_token = |few: f64, many: f64| (many - few) / (TOKENS_MANY - TOKENS_FEW) as f64;
    figures.cpu_us_per_token = few
        .cpu_us
        .zip(figures.cpu_us)
        .map(|(few, many)| per_token(few, many));
    figures.errors += few.errors;
    figures.error = figures.error.or(few.error);
    Ok(figures)
}

async fn soak(router: &Running, size: Size) -> anyhow::Result<Figures> {
    let mut load = Load::new(Job::chat(80), 32, 0);
    load.time = SOAK_TIME_MAX;
    let (mut done, mut all) = (0, Figures::default());
    for percent in [1, 5, 10, 25, 50, 75, 100] {
        let due = size.soak * percent / 100;
        let outcome = client::closed_loop(
            router.address,
            &load.job,
            load.connections,
            due - done,
            load.time,
        )
        .await;
        done = due;
        let mib = mib(router.usage()?.resident);
        let resident = Resident {
            after_requests: done,
            mib,
        };
        let mut figures = Figures::of(&outcome);
        figures.answers += all.answers;
        figures.errors += all.errors;
        figures.resident = all.resident;
        figures.resident.push(resident);
        figures.resident_mib = Some(mib);
        all = figures;
    }
    Ok(all)
}

async fn many(router: &Running, size: Size) -> anyhow::Result<Figures> {
    let job = Job::stream(MANY_TOKENS, MANY_GAP);
    let before = router.usage()?;
    let outcome = client::all_at_once(router.address, &job, size.streams, MANY_RAMP).await;
    let after = router.usage()?;
    let mut figures = Figures::of(&outcome);
    let spent = (after.cpu - before.cpu).as_secs_f64() * 1e6;
    figures.cpu_us = Some(spent / outcome.answers.max(1) as f64);
    figures.resident_mib = Some(mib(after.resident));
    figures.open_max = Some(outcome.open_max);
    Ok(figures)
}
