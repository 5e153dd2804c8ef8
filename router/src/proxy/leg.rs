//! One of the two requests of a pair, and the ways in which it fails.
//!
//! A [`LegFailure`] can only be made together with the worker to blame, and making it counts the blame: so the healthy
//! partner of a failed worker is never counted.
#![forbid(unsafe_code)]

use std::error::Error;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::{HeaderMap, Response, StatusCode};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::abort::Aborts;
use super::logprobs::{self, PromptLogprobs};
use super::placement::Booking;
use super::sse::{self, AbortWatch, Events, InbandAbort};
use crate::observe::{Attempt, LegEnd};
use crate::pool::lines::{Exchange, ExchangeError};
use crate::pool::{Blame, Role, Worker};

/// After decode's answer is complete, the time the prefill answer has to end too, so that its connection can serve again.
pub const PREFILL_LINGER: Duration = Duration::from_secs(5);

/// Most of a failing worker's explanation that is read.
pub const WORKER_ERROR_BYTES_MAX: usize = 1 << 20;

/// How long a failing worker may take to explain itself once its status is known. The other leg is cancelled before.
pub const WORKER_ERROR_TIME_MAX: Duration = Duration::from_secs(2);

/// A worker's refusal.
#[derive(Debug)]
pub struct WorkerError {
    /// Its status, which is not a success.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its explanation; `None` if that did not arrive in time or is too long.
    pub body: Option<Bytes>,
}

impl WorkerError {
    /// Reads the explanation.
    pub async fn read(response: Response<Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, WORKER_ERROR_BYTES_MAX).collect();
        let body = match tokio::time::timeout(WORKER_ERROR_TIME_MAX, body).await {
            Ok(Ok(body)) => Some(body.to_bytes()),
            _ => None,
        };
        Self {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }
}

/// How a leg failed.
#[derive(Debug)]
pub enum LegCause {
    /// No connection.
    Connect(String),
    /// The connection ended before the answer did.
    Reset(String),
    /// The worker answered with a status that is not a success.
    Status(Box<WorkerError>),
    /// The worker began an answer and then aborted it in-band.
    Aborted(InbandAbort),
    /// The worker fell silent in the middle of its answer.
    Stall,
}

impl LegCause {
    /// What kind of failure this is.
    pub fn blame(&self) -> Blame {
        let of_status = |status: u16| match status {
            429 | 503 => Blame::Overload,
            400..=499 => Blame::ClientError,
            _ => Blame::ServerError,
        };
        match self {
            Self::Connect(_) => Blame::Connect,
            Self::Reset(_) => Blame::Reset,
            Self::Stall => Blame::Timeout,
            Self::Status(error) => match &error.body {
                Some(body) if sse::tells_of_transfer(body) => Blame::Transfer,
                _ => of_status(error.status.as_u16()),
            },
            Self::Aborted(abort) if abort.is_transfer() => Blame::Transfer,
            Self::Aborted(abort) => match of_status(abort.status) {
                Blame::ServerError => Blame::Aborted,
                other => other,
            },
        }
    }

    /// Whether another worker may succeed where this one failed. A 4xx is the client's and stays one.
    pub fn is_worth_another_try(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Reset(_) => true,
            Self::Status(error) => error.status.is_server_error(),
            Self::Aborted(abort) => abort.status >= 500,
            Self::Stall => false,
        }
    }
}

/// A failed leg and the worker to blame for it.
#[derive(Debug)]
pub struct LegFailure {
    /// The worker to blame.
    pub worker: Arc<Worker>,
    /// What it did.
    pub cause: LegCause,
}

impl LegFailure {
    /// Blames `worker`.
    pub fn new(worker: &Arc<Worker>, cause: LegCause) -> Self {
        worker.blame(cause.blame());
        let failure = Self {
            worker: Arc::clone(worker),
            cause,
        };
        tracing::warn!(leg = %worker.role(), url = %worker.url(), "{failure}");
        failure
    }

    /// Blames `worker` for an exchange that ended without an answer.
    pub fn unanswered(worker: &Arc<Worker>, error: &ExchangeError) -> Self {
        let text = root_cause(error);
        let cause = if matches!(error, ExchangeError::Connect(_)) {
            LegCause::Connect(text)
        } else {
            LegCause::Reset(text)
        };
        Self::new(worker, cause)
    }

    /// Blames `worker` for an answer that broke off.
    pub fn broken(worker: &Arc<Worker>, error: &hyper::Error) -> Self {
        Self::new(worker, LegCause::Reset(root_cause(error)))
    }
}

impl std::fmt::Display for LegFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let role = self.worker.role();
        match &self.cause {
            LegCause::Connect(text) => write!(f, "the {role} worker cannot be reached: {text}"),
            LegCause::Reset(text) => write!(f, "the {role} worker broke off its answer: {text}"),
            LegCause::Status(error) => write!(f, "the {role} worker answered {}", error.status),
            LegCause::Aborted(abort) => {
                write!(
                    f,
                    "the {role} worker aborted the request: {}",
                    abort.message
                )
            }
            LegCause::Stall => write!(f, "the {role} worker fell silent"),
        }
    }
}

fn root_cause(error: &dyn Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

/// Whether an answer with these headers is an event stream.
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.as_bytes();
        kind.get(..17)
            .is_some_and(|start| start.eq_ignore_ascii_case(b"text/event-stream"))
    })
}

/// What the prefill leg reports.
#[derive(Debug)]
pub enum PrefillNews {
    /// It refused the request, and the decode worker has been told to abort; the details follow.
    Refused,
    /// Its answer is complete. The prompt's log-probabilities are there if they were wanted and came.
    Finished(Option<Arc<PromptLogprobs>>),
    /// It failed, and the decode worker has been told to abort.
    Failed(LegFailure),
}

/// The prefill leg runs on a task of its own: it must fail the pair even while a slow client keeps the decode side from
/// being read.
#[derive(Debug)]
pub struct PrefillLeg {
    news: mpsc::Receiver<PrefillNews>,
    task: AbortHandle,
    linger: Option<oneshot::Sender<()>>,
}

/// Who has to give up when the prefill leg fails.
#[derive(Debug)]
pub struct Partner {
    /// The decode worker.
    pub worker: Arc<Worker>,
    /// The ids of the request.
    pub rids: Arc<[String]>,
    /// Where to say so.
    pub aborts: Aborts,
}

impl PrefillLeg {
    /// Starts watching `exchange`, a request already made to `worker`.
    pub fn start(
        worker: Arc<Worker>,
        exchange: Exchange,
        partner: Partner,
        booking: Booking,
        attempt: Arc<Attempt>,
        wants_logprobs: bool,
    ) -> Self {
        // One Refused and one of Finished and Failed: the channel is never full.
        let (sender, news) = mpsc::channel(2);
        let (linger, lingering) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut leg = std::pin::pin!(watch(
                &worker,
                exchange,
                &sender,
                &partner,
                &attempt,
                wants_logprobs
            ));
            let end = tokio::select! {
                end = &mut leg => end,
                Ok(()) = lingering => match tokio::time::timeout(PREFILL_LINGER, leg).await {
                    Ok(end) => end,
                    Err(_) => return give_up_silent_prefill(&partner, &worker),
                },
            };
            let last = match end {
                Ok(logprobs) => {
                    worker.succeeded();
                    attempt.ended(Role::Prefill, &LegEnd::Complete);
                    booking.prefill_done();
                    PrefillNews::Finished(logprobs)
                }
                Err(failure) => {
                    attempt.ended(Role::Prefill, &LegEnd::Failed(&failure));
                    booking.leg_failed(worker.role(), failure.cause.blame());
                    // Those that answered with a status have been dealt with before their explanation was read.
                    if !matches!(failure.cause, LegCause::Status(_)) {
                        partner.aborts.submit(&partner.worker, &partner.rids);
                    }
                    PrefillNews::Failed(failure)
                }
            };
            // Nobody listens any more when decode has already finished.
            let _ = sender.try_send(last);
        });
        Self {
            news,
            task: task.abort_handle(),
            linger: Some(linger),
        }
    }

    /// The next report; `None` after the last one.
    pub fn poll_news(&mut self, cx: &mut Context<'_>) -> Poll<Option<PrefillNews>> {
        self.news.poll_recv(cx)
    }

    /// See [`PrefillLeg::poll_news`].
    pub async fn next_news(&mut self) -> Option<PrefillNews> {
        self.news.recv().await
    }

    /// Closes the leg's connection.
    pub fn cancel(&self) {
        self.task.abort();
    }

    /// Lets the leg end by itself, for a while.
    pub fn release(&mut self) {
        if let Some(linger) = self.linger.take() {
            // If the task has ended already there is nothing to release.
            let _ = linger.send(());
        }
    }
}

/// The prefill worker still holds a request whose answer is long complete: it is told to drop it.
fn give_up_silent_prefill(partner: &Partner, worker: &Arc<Worker>) {
    tracing::warn!(url = %worker.url(), "prefill did not end after decode had finished");
    partner.aborts.submit(worker, &partner.rids);
}

async fn watch(
    worker: &Arc<Worker>,
    exchange: Exchange,
    news: &mpsc::Sender<PrefillNews>,
    partner: &Partner,
    attempt: &Attempt,
    wants_logprobs: bool,
) -> Result<Option<Arc<PromptLogprobs>>, LegFailure> {
    let response = exchange
        .await
        .map_err(|error| LegFailure::unanswered(worker, &error))?;
    attempt.status(Role::Prefill, response.status().as_u16());
    if !response.status().is_success() {
        partner.aborts.submit(&partner.worker, &partner.rids);
        // Nobody listens any more when decode has already finished.
        let _ = news.try_send(PrefillNews::Refused);
        let error = WorkerError::read(response).await;
        return Err(LegFailure::new(worker, LegCause::Status(Box::new(error))));
    }
    let mut watch = is_event_stream(response.headers()).then(AbortWatch::default);
    let mut reader = wants_logprobs.then(|| LogprobReader::new(watch.is_some()));
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| LegFailure::broken(worker, &error))?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        if let Some(abort) = watch.as_mut().and_then(|watch| watch.look(data)) {
            return Err(LegFailure::new(worker, LegCause::Aborted(abort)));
        }
        if let Some(reader) = &mut reader {
            reader.take(data);
        }
    }
    Ok(reader.and_then(LogprobReader::finish))
}

/// Picks the log-probabilities out of a prefill answer as it comes.
struct LogprobReader {
    whole: BytesMut,
    events: Option<(Events, PromptLogprobs)>,
    is_lost: bool,
}

impl LogprobReader {
    fn new(is_event_stream: bool) -> Self {
        Self {
            whole: BytesMut::new(),
            events: is_event_stream.then(Default::default),
            is_lost: false,
        }
    }

    fn take(&mut self, data: &[u8]) {
        match &mut self.events {
            Some((events, found)) => {
                self.is_lost |= events.push(data).is_err();
                while let Some(event) = events.pop() {
                    found.learn_event(&event);
                }
            }
            None if self.whole.len() + data.len() <= logprobs::ANSWER_BYTES_MAX => {
                self.whole.extend_from_slice(data);
            }
            None => self.is_lost = true,
        }
    }

    fn finish(self) -> Option<Arc<PromptLogprobs>> {
        let found = match self.events {
            Some((_, found)) => found,
            None => PromptLogprobs::of_answer(&self.whole),
        };
        (!self.is_lost && !found.is_empty()).then(|| Arc::new(found))
    }
}
