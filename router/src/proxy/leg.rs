//! One of the two requests of a pair, and the ways in which it fails.
//!
//! A [`LegFailure`] can only be made together with the worker to blame, and making it counts the blame: so the healthy
//! partner of a failed worker is never counted.
#![forbid(unsafe_code)]

use std::error::Error;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Response;
use hyper::body::Incoming;
use hyper_util::client::legacy::{Error as ClientError, ResponseFuture};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::abort::Aborts;
use crate::pool::{Blame, Worker};

/// After decode's answer is complete, the time the prefill answer has to end too, so that its connection can serve again.
pub const PREFILL_LINGER: Duration = Duration::from_secs(5);

/// How a leg failed.
#[derive(Debug)]
pub enum LegCause {
    /// No connection.
    Connect(String),
    /// The connection ended before the answer did.
    Reset(String),
    /// The worker answered with a status that is not a success.
    Status(Box<Response<Incoming>>),
    /// The worker fell silent in the middle of its answer.
    Stall,
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
        worker.blame(match &cause {
            LegCause::Connect(_) => Blame::Connect,
            LegCause::Reset(_) => Blame::Reset,
            LegCause::Status(response) if response.status().is_client_error() => Blame::ClientError,
            LegCause::Status(_) => Blame::ServerError,
            LegCause::Stall => Blame::Timeout,
        });
        let failure = Self {
            worker: Arc::clone(worker),
            cause,
        };
        tracing::warn!(leg = %worker.role(), url = %worker.url(), "{failure}");
        failure
    }

    /// Blames `worker` for an exchange that ended without an answer.
    pub fn unanswered(worker: &Arc<Worker>, error: &ClientError) -> Self {
        let text = root_cause(error);
        let cause = if error.is_connect() {
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
            LegCause::Status(response) => {
                write!(f, "the {role} worker answered {}", response.status())
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

/// What the prefill leg reports.
#[derive(Debug)]
pub enum PrefillNews {
    /// It answered with a success; the body may take until the KV transfer is done.
    Accepted,
    /// Its answer is complete.
    Finished,
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
    pub fn start(worker: Arc<Worker>, exchange: ResponseFuture, partner: Partner) -> Self {
        // One Accepted and one of Finished and Failed: the channel is never full.
        let (sender, news) = mpsc::channel(2);
        let (linger, lingering) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut leg = std::pin::pin!(watch(&worker, exchange, &sender));
            let end = tokio::select! {
                end = &mut leg => end,
                Ok(()) = lingering => match tokio::time::timeout(PREFILL_LINGER, leg).await {
                    Ok(end) => end,
                    Err(_) => return give_up_silent_prefill(&partner, &worker),
                },
            };
            let last = match end {
                Ok(()) => PrefillNews::Finished,
                Err(failure) => {
                    partner.aborts.submit(&partner.worker, &partner.rids);
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
    exchange: ResponseFuture,
    news: &mpsc::Sender<PrefillNews>,
) -> Result<(), LegFailure> {
    let response = exchange
        .await
        .map_err(|error| LegFailure::unanswered(worker, &error))?;
    if !response.status().is_success() {
        return Err(LegFailure::new(
            worker,
            LegCause::Status(Box::new(response)),
        ));
    }
    // Nobody listens any more when decode has already finished.
    let _ = news.try_send(PrefillNews::Accepted);
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        frame.map_err(|error| LegFailure::broken(worker, &error))?;
    }
    Ok(())
}
