//! What can happen to a session, and what its legs have to say.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

use tokio::time::Sleep;

use crate::epp::decide::{Underway, Verdict};
use crate::epp::protocol::ext_proc::ProcessingRequest;
use crate::proxy::deadline::Stage;
use crate::proxy::leg::{LegCause, LegFailure};
use crate::proxy::live::Outlook;
use crate::respond::RouteError;

/// What happened next.
pub(super) enum Event {
    Message(Box<ProcessingRequest>),
    /// Envoy ended the stream, or its connection did.
    Closed,
    Decided(Result<Verdict, RouteError>),
    /// Prefill refused; the reason follows.
    Doomed,
    Failed(LegFailure),
    /// Prefill's log-probabilities are here, or are waited for no longer.
    LogprobsKnown,
    Late(Stage),
    Cut,
}

/// An answer that waits for prefill's log-probabilities.
pub(super) struct Held {
    pub(super) messages: VecDeque<ProcessingRequest>,
    pub(super) patience: Pin<Box<Sleep>>,
}

/// What the prefill leg or a time limit has to say.
pub(super) async fn leg_event(underway: &mut Option<Underway>, held: &mut Option<Held>) -> Event {
    let Some(Underway { live, deadline, .. }) = underway else {
        return std::future::pending().await;
    };
    std::future::poll_fn(|cx| {
        if live.is_prefill_open()
            && let Poll::Ready(news) = live.poll_outlook(cx)
        {
            return Poll::Ready(match news {
                Ok(Outlook::Fine | Outlook::Doomed) => Event::Doomed,
                Err(failure) => Event::Failed(failure),
            });
        }
        if let Some(held) = held
            && (!live.is_prefill_open() || held.patience.as_mut().poll(cx).is_ready())
        {
            return Poll::Ready(Event::LogprobsKnown);
        }
        deadline.poll_expired(cx).map(Event::Late)
    })
    .await
}

/// What Envoy's details of an answer of its own say about the worker.
pub(super) fn cause_of(details: &str) -> Option<LegCause> {
    if details.contains("connection_failure") || details.contains("connection_timeout") {
        return Some(LegCause::Connect(details.to_owned()));
    }
    if details.starts_with("upstream_reset") || details.contains("connection_termination") {
        return Some(LegCause::Reset(details.to_owned()));
    }
    details
        .contains("response_timeout")
        .then_some(LegCause::Stall)
}
