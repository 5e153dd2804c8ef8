//! A pair at work: both legs from the dispatch to the end.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::http::response::Parts;
use hyper::{HeaderMap, Method};
use tokio::time::Instant;

use super::Front;
use super::deadline::{Deadline, Stage};
use super::dispatch;
use super::first_bytes::FirstBytes;
use super::leg::{
    LegCause, LegFailure, Partner, PrefillLeg, PrefillNews, WorkerError, is_event_stream,
};
use super::logprobs::PromptLogprobs;
use super::pair::PairRequest;
use super::placement::{Booking, Placement};
use super::shape::Shape;
use super::sse::InbandAbort;
use crate::metrics::bump;
use crate::observe::{Attempt, LegEnd};
use crate::pool::lines::Exchange;
use crate::pool::{Role, Worker};
use crate::respond::RouteError;
use crate::schedule::rooms::RoomLease;

/// How long an answer that needs prefill's log-probabilities waits for them once decode has begun. Prefill tells them when
/// the transfer is done, which is before decode begins: only a busy prefill server makes them late.
pub const LOGPROBS_WAIT: Duration = Duration::from_secs(10);

/// How it stands with the prefill leg.
#[derive(Debug)]
pub enum Outlook {
    /// As it should.
    Fine,
    /// It was refused: the decode leg may be dropped, the reason follows.
    Doomed,
}

/// A pair at work. Dropping it cancels each leg that is still open: its connection is closed and its worker told.
#[derive(Debug)]
pub struct LivePair {
    front: Arc<Front>,
    prefill: Arc<Worker>,
    decode: Arc<Worker>,
    rids: Arc<[String]>,
    leg: PrefillLeg,
    exchange: Option<Exchange>,
    booking: Booking,
    attempt: Arc<Attempt>,
    sent_at: Instant,
    read_at: Instant,
    wants_logprobs: bool,
    logprobs: Option<Arc<PromptLogprobs>>,
    prefill_open: bool,
    decode_open: bool,
    failed: bool,
    /// The rooms are free again when the pair is dropped.
    _rooms: RoomLease,
}

/// The ids of a request on the workers, as JSON: the client's, or our own, by which it can be aborted.
fn rids_of(shape: &Shape, count: usize) -> Arc<[String]> {
    if !shape.client_rids.is_empty() {
        return shape.client_rids.as_slice().into();
    }
    (0..count).map(|_| random_rid()).collect()
}

/// 32 hexadecimal digits in quotes.
fn random_rid() -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| char::from(DIGITS[usize::from(half)]);
    let mut rid = String::with_capacity(34);
    rid.push('"');
    for byte in rand::random::<[u8; 16]>() {
        rid.push(digit(byte >> 4));
        rid.push(digit(byte & 15));
    }
    rid.push('"');
    rid
}

impl LivePair {
    /// Sends both requests to the pair of `placement`.
    pub fn start(front: &Arc<Front>, request: &PairRequest, placement: Placement) -> Self {
        let (mut live, mut headers, body) = Self::start_prefill(front, request, placement);
        live.attempt.mark(Role::Decode, &mut headers);
        live.exchange = Some(front.client.send(
            &live.decode,
            Method::POST,
            request.path.clone(),
            headers,
            body,
        ));
        live
    }

    /// Sends prefill's request only. Decode's, with the headers and the body returned, is for somebody else to send, who
    /// tells what becomes of it.
    pub fn start_prefill(
        front: &Arc<Front>,
        request: &PairRequest,
        placement: Placement,
    ) -> (Self, HeaderMap, Bytes) {
        let Placement {
            prefill,
            decode,
            rank,
            dp_size,
            booking,
        } = placement;
        let shape = &request.shape;
        let count = shape.batch.unwrap_or(1);
        let rooms = front
            .rooms
            .reserve(count, u64::from(rank), u64::from(dp_size));
        booking.rooms(rooms.rooms());
        let rids = rids_of(shape, count);
        let (headers, body) = dispatch::joined(
            &request.headers,
            &request.body,
            shape,
            &prefill,
            rooms.rooms(),
            &rids,
        );
        let attempt = request
            .trail
            .attempt(&prefill, &decode, rooms.rooms(), &rids);
        let (path, mut sent) = (request.path.clone(), headers.clone());
        attempt.mark(Role::Prefill, &mut sent);
        let exchange = front
            .client
            .send(&prefill, Method::POST, path, sent, body.clone());
        let partner = Partner {
            worker: Arc::clone(&decode),
            rids: Arc::clone(&rids),
            aborts: front.aborts.clone(),
        };
        let leg = PrefillLeg::start(
            Arc::clone(&prefill),
            exchange,
            partner,
            booking.clone(),
            Arc::clone(&attempt),
            shape.wants_logprobs,
        );
        let live = Self {
            front: Arc::clone(front),
            prefill,
            decode,
            rids,
            leg,
            exchange: None,
            booking,
            attempt,
            sent_at: Instant::now(),
            read_at: request.read_at,
            wants_logprobs: shape.wants_logprobs,
            logprobs: None,
            prefill_open: true,
            decode_open: true,
            failed: false,
            _rooms: rooms,
        };
        (live, headers, body)
    }

    /// Waits until the answer may begin: decode has answered with a success, and its first event is here and is no abort.
    /// So a request that either side refuses can be tried again, or gets the refusal's status instead of a broken stream.
    /// Prefill's answer is not waited for, unless the client wants what only prefill knows.
    ///
    /// # Errors
    /// [`RouteError`] when a leg fails or time runs out; the other leg is being cancelled.
    pub async fn first_bytes(
        &mut self,
        deadline: &mut Deadline,
    ) -> Result<(Parts, FirstBytes), RouteError> {
        let (parts, rest) = self.head(deadline).await?;
        let mut begun_at = Instant::now();
        let mut first = FirstBytes::new(rest, is_event_stream(&parts.headers));
        let patience = tokio::time::sleep(LOGPROBS_WAIT);
        tokio::pin!(patience);
        while !first.is_known() || (self.wants_logprobs && self.prefill_open) {
            tokio::select! {
                biased;
                frame = first.rest.frame(), if !first.is_known() => match frame.transpose() {
                    Err(error) => {
                        let failure = LegFailure::broken(&self.decode, &error);
                        return Err(self.decode_failed(failure).into());
                    }
                    Ok(frame) => {
                        deadline.byte_arrived();
                        begun_at = Instant::now();
                        if self.wants_logprobs {
                            patience.as_mut().reset(begun_at + LOGPROBS_WAIT);
                        }
                        if let Some(abort) = first.take(frame) {
                            bump(&self.front.metrics.inband_aborts);
                            let failure = LegFailure::new(&self.decode, LegCause::Aborted(abort));
                            return Err(self.decode_failed(failure).into());
                        }
                    }
                },
                news = self.leg.next_news(), if self.prefill_open => {
                    if matches!(self.learn(news)?, Outlook::Doomed) {
                        drop(first);
                        return Err(self.last_words().await.into());
                    }
                }
                () = &mut patience, if first.is_known() => break,
                stage = deadline.expired() => return Err(self.timed_out(stage)),
            }
        }
        if self.wants_logprobs && self.logprobs.is_none() {
            bump(&self.front.metrics.logprobs_unmerged);
        }
        self.attempt.first_byte(first.is_event_stream);
        if first.is_event_stream {
            let parts = self.booking.note().decision.prediction.parts_s();
            let took = self.sent_at.elapsed();
            self.front.metrics.predicted(parts, took);
        }
        // What the client itself made us wait for is not the router's time.
        self.decode_began(if self.wants_logprobs {
            Duration::ZERO
        } else {
            begun_at.elapsed()
        });
        Ok((parts, first))
    }

    /// Notes that decode's answer has begun, and how long the router held its first bytes.
    pub fn decode_began(&self, held: Duration) {
        self.booking.first_byte();
        let sending = self.sent_at.saturating_duration_since(self.read_at);
        self.front.metrics.added_latency(sending + held);
    }

    /// Notes that decode answered an error, whose explanation is still to come: prefill is freed now.
    pub fn decode_refused(&mut self) {
        self.cancel_prefill();
    }

    /// Notes that another worker than the chosen one turned out to be decode.
    pub fn decode_is(&mut self, worker: &Arc<Worker>) {
        self.decode = Arc::clone(worker);
    }

    /// Whether the prefill leg is still at work.
    pub fn is_prefill_open(&self) -> bool {
        self.prefill_open
    }

    /// Whether prefill is to tell the prompt's log-probabilities.
    pub fn wants_logprobs(&self) -> bool {
        self.wants_logprobs
    }

    /// Waits for the head of decode's answer.
    async fn head(&mut self, deadline: &mut Deadline) -> Result<(Parts, Incoming), RouteError> {
        let mut exchange = self.exchange.take().expect("invariant: called once");
        let response = loop {
            tokio::select! {
                biased;
                news = self.leg.next_news(), if self.prefill_open => {
                    if matches!(self.learn(news)?, Outlook::Doomed) {
                        drop(exchange);
                        return Err(self.last_words().await.into());
                    }
                }
                response = &mut exchange => {
                    break response.map_err(|error| {
                        self.decode_failed(LegFailure::unanswered(&self.decode, &error))
                    })?;
                }
                stage = deadline.expired() => return Err(self.timed_out(stage)),
            }
        };
        let status = response.status().as_u16();
        self.attempt.status(Role::Decode, status);
        if response.status().is_success() {
            return Ok(response.into_parts());
        }
        // First prefill is freed, then the explanation is read.
        self.cancel_prefill();
        let error = WorkerError::read(response).await;
        let failure = LegFailure::new(&self.decode, LegCause::Status(Box::new(error)));
        Err(self.decode_failed(failure).into())
    }

    /// The reason of a refusal that has been announced.
    async fn last_words(&mut self) -> LegFailure {
        loop {
            let news = self.leg.next_news().await;
            if let Err(failure) = self.learn(news) {
                return failure;
            }
        }
    }

    /// Takes note of what the prefill leg reports.
    ///
    /// # Errors
    /// Its failure; the decode worker has been told already.
    pub fn learn(&mut self, news: Option<PrefillNews>) -> Result<Outlook, LegFailure> {
        match news {
            Some(PrefillNews::Refused) => {
                self.decode_open = false;
                self.failed = true;
                Ok(Outlook::Doomed)
            }
            Some(PrefillNews::Finished(logprobs)) => {
                self.prefill_open = false;
                self.logprobs = logprobs;
                Ok(Outlook::Fine)
            }
            Some(PrefillNews::Failed(failure)) => {
                if matches!(failure.cause, LegCause::Aborted(_)) {
                    bump(&self.front.metrics.inband_aborts);
                }
                self.prefill_open = false;
                self.decode_open = false;
                self.failed = true;
                Err(failure)
            }
            None => {
                // The task ended without a last word: it panicked, or the runtime is going down.
                self.prefill_open = false;
                self.failed = true;
                let cause = LegCause::Reset("the router stopped watching".to_owned());
                Err(LegFailure::new(&self.prefill, cause))
            }
        }
    }

    /// Polls for news of the prefill leg; ready when decode's answer is of no more use.
    pub fn poll_outlook(&mut self, cx: &mut Context<'_>) -> Poll<Result<Outlook, LegFailure>> {
        while self.prefill_open {
            let news = std::task::ready!(self.leg.poll_news(cx));
            match self.learn(news) {
                Ok(Outlook::Fine) => {}
                other => return Poll::Ready(other),
            }
        }
        Poll::Pending
    }

    /// What the scheduler is told.
    pub fn booking(&self) -> &Booking {
        &self.booking
    }

    /// The decode worker.
    pub fn decode(&self) -> &Arc<Worker> {
        &self.decode
    }

    /// The prefill worker.
    pub fn prefill(&self) -> &Arc<Worker> {
        &self.prefill
    }

    /// The prompt's log-probabilities, if the client wants them and prefill has told them.
    pub fn logprobs(&self) -> Option<&Arc<PromptLogprobs>> {
        self.logprobs.as_ref()
    }

    /// The counters.
    pub fn metrics(&self) -> &crate::metrics::Metrics {
        &self.front.metrics
    }

    /// Notes that decode failed by itself: only prefill is left to cancel.
    pub fn decode_failed(&mut self, failure: LegFailure) -> LegFailure {
        self.decode_open = false;
        self.failed = true;
        self.attempt.ended(Role::Decode, &LegEnd::Failed(&failure));
        self.booking
            .leg_failed(self.decode.role(), failure.cause.blame());
        failure
    }

    /// Notes that decode aborted in the middle of its answer: it will end by itself, without a success.
    pub fn decode_aborted(&mut self, abort: InbandAbort) {
        bump(&self.front.metrics.inband_aborts);
        let failure = LegFailure::new(&self.decode, LegCause::Aborted(abort));
        self.decode_failed(failure);
        self.cancel_prefill();
    }

    /// Notes that time ran out: both legs are cancelled.
    pub fn timed_out(&mut self, stage: Stage) -> RouteError {
        self.failed = true;
        tracing::warn!(prefill = %self.prefill.url(), decode = %self.decode.url(), "{stage}");
        RouteError::Timeout(stage)
    }

    /// Notes that decode's answer is complete: prefill's is of no more interest, and ends by itself.
    pub fn complete(&mut self) {
        self.decode_open = false;
        if !self.failed {
            self.decode.succeeded();
            self.attempt.ended(Role::Decode, &LegEnd::Complete);
        }
        self.booking.ended();
        if self.prefill_open {
            self.prefill_open = false;
            self.leg.release();
        }
    }

    fn cancel_prefill(&mut self) {
        if self.prefill_open {
            self.prefill_open = false;
            self.leg.cancel();
            self.front.aborts.submit(&self.prefill, &self.rids);
        }
    }
}

impl Drop for LivePair {
    fn drop(&mut self) {
        self.cancel_prefill();
        if self.decode_open {
            self.front.aborts.submit(&self.decode, &self.rids);
            if !self.failed {
                bump(&self.front.metrics.client_disconnects);
                tracing::debug!(decode = %self.decode.url(), "the client went away");
            }
        }
        self.booking.ended();
    }
}
