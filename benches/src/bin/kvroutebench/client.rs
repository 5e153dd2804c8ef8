//! The load: as many connections as wanted, each with one request at a time, and every answer checked.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::http::{Answer, BadAnswer};

/// An answer that takes longer than this, and a stream that pauses as long, is an error.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is asked for, over and over.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// The request as it goes over the wire.
    bytes: Vec<u8>,
    /// Events that the answer must have.
    events: Option<u64>,
    /// Acknowledge at once what comes, as clients without delayed acknowledgements do.
    pub(crate) quick_ack: bool,
}

impl Job {
    fn new(path: &str, body: &str, events: Option<u64>) -> Self {
        let length = body.len();
        let bytes = format!(
            "POST {path} HTTP/1.1\r\nHost: router\r\nUser-Agent: kvroutebench\r\nAccept: */*\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        Self {
            bytes: bytes.into_bytes(),
            events,
            quick_ack: false,
        }
    }

    /// A chat completion whose prompt has about `prompt_bytes`, answered whole.
    pub(crate) fn chat(prompt_bytes: usize) -> Self {
        let body = chat_body("", prompt_bytes, false);
        Self::new("/v1/chat/completions", &body, None)
    }

    /// The same as a stream of `tokens`, so far apart.
    pub(crate) fn stream(tokens: u64, gap: Duration) -> Self {
        let orders = format!("tokens={tokens} gap_us={} ", gap.as_micros());
        let body = chat_body(&orders, 80, true);
        // One event more says that all is told.
        Self::new("/v1/chat/completions", &body, Some(tokens + 1))
    }

    /// SGLang's own `/generate`, answered whole.
    pub(crate) fn native(prompt_bytes: usize) -> Self {
        let text = "lorem ipsum ".repeat(prompt_bytes.div_ceil(12));
        let body = format!(
            "{{\"text\":\"{text}\",\"sampling_params\":{{\"temperature\":0.7,\"max_new_tokens\":1}},\"stream\":false}}"
        );
        Self::new("/generate", &body, None)
    }
}

fn chat_body(orders: &str, prompt_bytes: usize, stream: bool) -> String {
    let text = "lorem ipsum ".repeat(prompt_bytes.div_ceil(12));
    format!(
        "{{\"model\":\"m\",\"messages\":[{{\"role\":\"user\",\"content\":\"{orders}{text}\"}}],\"max_tokens\":50,\
         \"temperature\":0.7,\"stream\":{stream}}}"
    )
}

/// What came of a load.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) answers: u64,
    pub(crate) errors: u64,
    /// One of them.
    pub(crate) error: Option<String>,
    pub(crate) seconds: f64,
    /// To the first byte of the body and to the last, in nanoseconds.
    pub(crate) first: Histogram<u64>,
    pub(crate) total: Histogram<u64>,
    /// Most answers that had begun and not ended at one time.
    pub(crate) open_max: u64,
}

impl Outcome {
    fn new() -> Self {
        let times = || {
            let times = Histogram::new_with_bounds(1, 600_000_000_000, 3);
            times.expect("invariant: ten minutes in nanoseconds, three digits")
        };
        Self {
            answers: 0,
            errors: 0,
            error: None,
            seconds: 0.0,
            first: times(),
            total: times(),
            open_max: 0,
        }
    }
}

struct Shared {
    address: SocketAddr,
    job: Job,
    left: AtomicU64,
    /// No request begins after it.
    until: Instant,
    open: AtomicU64,
    open_max: AtomicU64,
    outcome: Mutex<Outcome>,
}

impl Shared {
    fn new(address: SocketAddr, job: &Job, requests: u64, until: Instant) -> Arc<Self> {
        Arc::new(Self {
            address,
            job: job.clone(),
            left: AtomicU64::new(requests),
            until,
            open: AtomicU64::new(0),
            open_max: AtomicU64::new(0),
            outcome: Mutex::new(Outcome::new()),
        })
    }

    fn take_one(&self) -> bool {
        let left = |left: u64| left.checked_sub(1);
        let left = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, left);
        left.is_ok() && Instant::now() < self.until
    }

    fn record(&self, result: anyhow::Result<(Duration, Duration)>) {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok((first, total)) => {
                outcome.answers += 1;
                let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
                outcome.first.saturating_record(nanos(first));
                outcome.total.saturating_record(nanos(total));
            }
            Err(error) => {
                outcome.errors += 1;
                outcome.error = Some(format!("{error:#}"));
            }
        }
    }

    fn finish(&self, began: Instant) -> Outcome {
        let mut outcome = self
            .outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        outcome.seconds = began.elapsed().as_secs_f64();
        outcome.open_max = self.open_max.load(Ordering::Relaxed);
        outcome
    }
}

/// Sends `requests` over `connections`, each of which sends its next one when the last is answered; none after `time`.
pub(crate) async fn closed_loop(
    address: SocketAddr,
    job: &Job,
    connections: usize,
    requests: u64,
    time: Duration,
) -> Outcome {
    let began = Instant::now();
    let shared = Shared::new(address, job, requests, began + time);
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let shared = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut connection = None;
            while shared.take_one() {
                let result = ask(&shared, &mut connection).await;
                if result.is_err() {
                    connection = None;
                }
                shared.record(result);
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    shared.finish(began)
}

/// One request on each of `connections`, which begin evenly within `ramp`.
pub(crate) async fn all_at_once(
    address: SocketAddr,
    job: &Job,
    connections: usize,
    ramp: Duration,
) -> Outcome {
    let began = Instant::now();
    let shared = Shared::new(address, job, 0, began);
    let mut tasks = JoinSet::new();
    for number in 0..connections {
        let shared = Arc::clone(&shared);
        let share = number as f64 / connections as f64;
        tasks.spawn(async move {
            tokio::time::sleep_until(began + ramp.mul_f64(share)).await;
            let result = ask(&shared, &mut None).await;
            shared.record(result);
        });
    }
    while tasks.join_next().await.is_some() {}
    shared.finish(began)
}

/// Sends one request; the times from its sending to the first byte of the answer's body, and to the last.
async fn ask(
    shared: &Shared,
    connection: &mut Option<TcpStream>,
) -> anyhow::Result<(Duration, Duration)> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(shared.address).await?;
            stream.set_nodelay(true)?;
            connection.insert(stream)
        }
    };
    let began = Instant::now();
    stream.write_all(&shared.job.bytes).await?;
    let mut answer = Answer::new();
    let mut first = None;
    let result = receive(shared, stream, &mut answer, &mut first).await;
    if first.is_some() {
        shared.open.fetch_sub(1, Ordering::Relaxed);
    }
    result?;
    let total = began.elapsed();
    answer.check(shared.job.events)?;
    let first = first.map_or(total, |first| first - began);
    Ok((first, total))
}

async fn receive(
    shared: &Shared,
    stream: &mut TcpStream,
    answer: &mut Answer,
    first: &mut Option<Instant>,
) -> anyhow::Result<()> {
    let mut buffer = [0; 8 << 10];
    loop {
        if shared.job.quick_ack {
            rustix::net::sockopt::set_tcp_quickack(&*stream, true)?;
        }
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await??;
        if read == 0 {
            return Err(BadAnswer::Cut.into());
        }
        let is_done = answer.take(&buffer[..read])?;
        if answer.has_begun && first.is_none() {
            *first = Some(Instant::now());
            let open = shared.open.fetch_add(1, Ordering::Relaxed) + 1;
            shared.open_max.fetch_max(open, Ordering::Relaxed);
        }
        if is_done {
            return Ok(());
        }
    }
}
