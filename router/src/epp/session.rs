//! One stream of Envoy's: its messages, the decision, and the prefill leg, each as it comes.
#![forbid(unsafe_code)]

mod legs;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::header::CONTENT_LENGTH;
use hyper::{HeaderMap, Response};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::choice;
use super::counters::Outcome;
use super::decide::{self, Underway, Verdict};
use super::exchange::{AnswerHead, ClientRequest, Closing, Early, Effect, Exchange, Violation};
use super::message::Head;
use super::protocol::BodySendMode;
use super::protocol::ext_proc::processing_request::Request as Piece;
use super::protocol::ext_proc::{ProcessingRequest, ProcessingResponse};
use crate::config::epp::EppConfig;
use crate::drain::DrainSwitch;
use crate::metrics::{Route, bump};
use crate::proxy::Front;
use crate::proxy::deadline::Stage;
use crate::proxy::fanout::ANSWER_BYTES_MAX;
use crate::proxy::leg::{LegCause, LegFailure, WorkerError, is_event_stream};
use crate::proxy::live::LOGPROBS_WAIT;
use crate::proxy::request::{self, KIB};
use crate::proxy::stream::ReplyBody;
use crate::respond::{self, RouteError};
use legs::{Event, Held, cause_of, leg_event};

/// Messages for Envoy that wait for its connection.
pub const REPLIES_MAX: usize = 8;

/// Messages of an answer that wait for prefill's log-probabilities.
const HELD_MAX: usize = 64;

type Deciding = Pin<Box<dyn Future<Output = Result<Verdict, RouteError>> + Send>>;

/// What all streams share.
#[derive(Debug)]
pub struct Shared {
    /// The router.
    pub front: Arc<Front>,
    /// The settings.
    pub config: Arc<EppConfig>,
    /// Thrown when streams must end at once.
    pub cut: DrainSwitch,
}

/// The stream is over.
struct Over;

struct Session {
    shared: Arc<Shared>,
    exchange: Exchange,
    replies: mpsc::Sender<Result<ProcessingResponse, Status>>,
    effects: Vec<Effect>,
    /// Room for the body until it has gone on.
    memory: Option<OwnedSemaphorePermit>,
    route: Route,
    complete_at: Option<Instant>,
    deciding: Option<Deciding>,
    underway: Option<Underway>,
    held: Option<Held>,
    /// The head of an error answer, until its explanation is complete.
    error: Option<Box<AnswerHead>>,
    is_counted: bool,
}

/// Serves one stream to its end.
pub async fn run(
    shared: Arc<Shared>,
    mut inbound: Streaming<ProcessingRequest>,
    replies: mpsc::Sender<Result<ProcessingResponse, Status>>,
) {
    let counters = &shared.front.epp;
    bump(&counters.streams);
    let limit = shared.front.config.body_bytes_max;
    let mut session = Session {
        exchange: Exchange::new(limit, shared.config.conformance),
        shared: Arc::clone(&shared),
        replies,
        effects: Vec::new(),
        memory: None,
        route: Route::Other,
        complete_at: None,
        deciding: None,
        underway: None,
        held: None,
        error: None,
        is_counted: false,
    };
    loop {
        let event = session.next(&mut inbound).await;
        if session.handle(event).await.is_err() {
            break;
        }
    }
    session.close();
}

impl Session {
    async fn next(&mut self, inbound: &mut Streaming<ProcessingRequest>) -> Event {
        let cut = self.shared.cut.clone();
        let is_full = self
            .held
            .as_ref()
            .is_some_and(|held| held.messages.len() >= HELD_MAX);
        let deciding = &mut self.deciding;
        let (underway, held) = (&mut self.underway, &mut self.held);
        tokio::select! {
            biased;
            event = leg_event(underway, held) => event,
            decided = async { deciding.as_mut().expect("invariant: checked below").await },
                if deciding.is_some() => {
                self.deciding = None;
                Event::Decided(decided)
            }
            message = inbound.message(), if !is_full => match message {
                Ok(Some(message)) => Event::Message(Box::new(message)),
                Ok(None) | Err(_) => Event::Closed,
            },
            () = cut.thrown() => Event::Cut,
        }
    }

    async fn handle(&mut self, event: Event) -> Result<(), Over> {
        match event {
            Event::Message(message) => self.take(*message),
            Event::Closed => return Err(Over),
            Event::Decided(Ok(Verdict::Routed(decision))) => {
                self.decided(decision.outcome);
                self.underway = decision.underway;
                self.exchange.route(decision.plan, &mut self.effects);
            }
            Event::Decided(Ok(Verdict::Own(response))) => {
                self.decided(Outcome::Own);
                self.answer(response).await;
            }
            Event::Decided(Err(error)) => {
                self.decided(Outcome::Refused);
                self.refuse(error).await;
            }
            // Its reason follows.
            Event::Doomed => {}
            Event::Failed(failure) => self.fail(failure.into()).await,
            Event::LogprobsKnown => self.release_held(),
            Event::Late(stage) => self.late(stage).await,
            Event::Cut => {
                // Nobody may be left to hear it.
                let gone = Status::unavailable("the picker stops");
                let _ = self.replies.send(Err(gone)).await;
                return Err(Over);
            }
        }
        self.apply().await
    }

    fn take(&mut self, message: ProcessingRequest) {
        if let Some(held) = &mut self.held {
            held.messages.push_back(message);
            return;
        }
        if matches!(message.request, Some(Piece::ResponseHeaders(_)))
            && let Some(Underway { live, .. }) = &self.underway
            && live.wants_logprobs()
        {
            self.held = Some(Held {
                messages: [message].into(),
                patience: Box::pin(tokio::time::sleep(LOGPROBS_WAIT)),
            });
            return;
        }
        self.feed(message);
    }

    fn feed(&mut self, message: ProcessingRequest) {
        if let Some(Piece::RequestBody(body)) = &message.request {
            let bytes = body.body.len() as u64;
            let counter = &self.shared.front.epp.body_bytes;
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
        self.explain(&message);
        self.exchange.take(message, &mut self.effects);
    }

    /// Puts the decision's headers on the answer's head. One that waits for its first event gets them anew with that, when
    /// more is known.
    fn explain(&mut self, message: &ProcessingRequest) {
        let Some(Underway {
            live,
            explains: true,
            ..
        }) = &self.underway
        else {
            return;
        };
        let has_begun = match &message.request {
            Some(Piece::ResponseHeaders(head)) => {
                let head = Head::of(head.headers.clone());
                head.status.is_some_and(|status| status.is_success())
                    && !is_event_stream(&head.headers)
            }
            Some(Piece::ResponseBody(_)) => !self.exchange.is_answered(),
            _ => return,
        };
        if has_begun {
            live.booking().first_byte();
        }
        let mut headers = HeaderMap::new();
        live.booking().note().put_headers(&mut headers);
        self.exchange.add_to_answer(headers);
    }

    fn release_held(&mut self) {
        let Some(held) = self.held.take() else {
            return;
        };
        match self.underway.as_ref().and_then(|it| it.live.logprobs()) {
            Some(known) => self.exchange.learn_logprobs(known),
            None => bump(&self.shared.front.metrics.logprobs_unmerged),
        }
        for message in held.messages {
            self.feed(message);
        }
    }

    /// Carries out what the exchange asks for.
    async fn apply(&mut self) -> Result<(), Over> {
        if let Err(error) = self.make_room() {
            self.refuse(error).await;
        }
        // A refusal may add effects of its own.
        while !self.effects.is_empty() {
            for effect in std::mem::take(&mut self.effects) {
                match effect {
                    Effect::Send(reply) => {
                        self.replies.send(Ok(*reply)).await.map_err(|_| Over)?;
                    }
                    Effect::End(Ok(())) => return Err(Over),
                    Effect::End(Err(violation)) => return self.complain(violation).await,
                    other => self.perform(other).await,
                }
            }
        }
        Ok(())
    }

    /// Sets memory aside for what has come of the body.
    fn make_room(&mut self) -> Result<(), RouteError> {
        let front = &self.shared.front;
        let needed = self.exchange.held_bytes().div_ceil(KIB);
        let memory = match &mut self.memory {
            Some(memory) => memory,
            None if needed == 0 => return Ok(()),
            None => self.memory.insert(request::reserve(front, 0)?),
        };
        if needed > memory.num_permits() {
            memory.merge(request::reserve(front, needed - memory.num_permits())?);
        }
        Ok(())
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Decide(request) => self.decide(*request).await,
            Effect::Refuse(early) => {
                let error = match early {
                    Early::TooLarge => RouteError::BodyTooLarge {
                        limit: self.shared.front.config.body_bytes_max,
                    },
                    Early::Mode(mode) => RouteError::EnvoyMode {
                        mode: mode_name(mode),
                    },
                };
                self.refuse(error).await;
            }
            Effect::Answer(head) => self.answer_begins(head).await,
            Effect::FirstByte => {
                if let Some(Underway { live, deadline, .. }) = &mut self.underway {
                    deadline.byte_arrived();
                    live.decode_began(Duration::ZERO);
                }
            }
            Effect::AbortedFirst(abort) => {
                if let Some(mut underway) = self.underway.take() {
                    bump(&self.shared.front.metrics.inband_aborts);
                    let failure = LegFailure::new(underway.live.decode(), LegCause::Aborted(abort));
                    let failure = underway.live.decode_failed(failure);
                    self.refuse(failure.into()).await;
                }
            }
            Effect::Aborted(abort) => {
                if let Some(underway) = &mut self.underway {
                    underway.live.decode_aborted(abort);
                }
            }
            Effect::Untranslatable => {
                let what = "an answer is no chat completion".to_owned();
                self.refuse(RouteError::Broken(what)).await;
            }
            Effect::Complete(words) => self.answer_ends(words),
            Effect::Send(_) | Effect::End(_) => unreachable!("invariant: apply handles them"),
        }
    }

    async fn decide(&mut self, request: ClientRequest) {
        let front = &self.shared.front;
        self.complete_at = Some(Instant::now());
        self.route = decide::target_of(&request.head.method, &request.head.path).1;
        let memory = match self.memory.take() {
            Some(memory) => Ok(memory),
            None => request::reserve(front, 0),
        };
        let grown = memory.and_then(|mut memory| {
            let needed = request.body.len().div_ceil(KIB);
            if needed > memory.num_permits() {
                memory.merge(request::reserve(front, needed - memory.num_permits())?);
            }
            Ok(memory)
        });
        match grown {
            Ok(memory) => {
                let config = Arc::clone(&self.shared.config);
                let deciding = decide::decide(Arc::clone(front), config, request, memory);
                self.deciding = Some(Box::pin(deciding));
            }
            Err(error) => self.refuse(error).await,
        }
    }

    fn decided(&self, outcome: Outcome) {
        let took = self.complete_at.map(|at| at.elapsed()).unwrap_or_default();
        self.shared.front.epp.decided(outcome, took);
    }

    async fn answer_begins(&mut self, head: Box<AnswerHead>) {
        self.count(head.status);
        // Envoy answered before the decision: nobody needs it any more.
        self.deciding = None;
        let Some(Underway { live, .. }) = &mut self.underway else {
            return;
        };
        if let Some(endpoint) = &head.served
            && let Some(worker) = choice::worker_at(&self.shared.front, endpoint).await
        {
            live.decode_is(&worker);
        }
        if !head.status.is_success() {
            live.decode_refused();
            self.error = Some(head);
        }
    }

    fn answer_ends(&mut self, words: Bytes) {
        let Some(mut underway) = self.underway.take() else {
            return;
        };
        let live = &mut underway.live;
        let Some(head) = self.error.take() else {
            return live.complete();
        };
        let cause = match &head.own {
            None => LegCause::Status(Box::new(WorkerError {
                status: head.status,
                headers: head.headers.clone(),
                body: Some(words),
            })),
            Some(details) => match cause_of(details) {
                Some(cause) => cause,
                // Envoy's own reasons: no worker is to blame. Dropping the pair cancels it.
                None => return,
            },
        };
        let failure = LegFailure::new(live.decode(), cause);
        drop(live.decode_failed(failure));
    }

    /// The pair has failed.
    async fn fail(&mut self, error: RouteError) {
        if !self.exchange.is_answered() {
            return self.refuse(error).await;
        }
        bump(&self.shared.front.metrics.broken_streams);
        self.underway = None;
        if !self.exchange.finish_answer(&error, &mut self.effects) {
            // Its head is out: Envoy breaks the answer off, so that nobody takes it for whole.
            self.refuse(error).await;
        }
    }

    async fn late(&mut self, stage: Stage) {
        let Some(Underway { live, .. }) = &mut self.underway else {
            return;
        };
        if stage == Stage::Stall {
            // Counted against decode, which has begun its answer; the abort still goes to both.
            drop(LegFailure::new(live.decode(), LegCause::Stall));
        }
        let error = live.timed_out(stage);
        self.underway = None;
        self.fail(error).await;
    }

    async fn refuse(&mut self, error: RouteError) {
        tracing::debug!(%error, "refusing a request of Envoy's");
        let response = match self.route {
            Route::Messages => respond::respond_anthropic(error),
            _ => respond::respond(error),
        };
        self.answer(response).await;
    }

    /// Gives the picker's own answer.
    async fn answer(&mut self, response: Response<ReplyBody>) {
        // What the pair still does is of no use: dropping it cancels both legs.
        (self.underway, self.deciding, self.held) = (None, None, None);
        let (mut parts, body) = response.into_parts();
        // Envoy counts by itself.
        parts.headers.remove(CONTENT_LENGTH);
        let body = match Limited::new(body, ANSWER_BYTES_MAX).collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => Bytes::new(),
        };
        self.count(parts.status);
        self.shared.front.epp.immediate(parts.status);
        let headers: HeaderMap = parts.headers;
        self.exchange
            .refuse(parts.status, &headers, body, &mut self.effects);
    }

    fn count(&mut self, status: hyper::StatusCode) {
        if !std::mem::replace(&mut self.is_counted, true) {
            self.shared.front.metrics.answered(self.route, status);
        }
    }

    async fn complain(&mut self, violation: Violation) -> Result<(), Over> {
        tracing::warn!(%violation, "ending a stream of Envoy's");
        bump(&self.shared.front.epp.violations);
        let status = Status::invalid_argument(violation.to_string());
        // Envoy may have closed it by now.
        let _ = self.replies.send(Err(status)).await;
        Err(Over)
    }

    fn close(mut self) {
        let closing = self.exchange.closing();
        self.shared.front.epp.closed(closing);
        if closing == Closing::Unseen
            && let Some(underway) = &mut self.underway
        {
            // Whether the answer was read to its end is not known; prefill is given the time to end by itself.
            underway.live.complete();
        }
        // A pair that is still underway is cancelled by its drop.
    }
}

fn mode_name(mode: BodySendMode) -> &'static str {
    match mode {
        BodySendMode::Streamed => "STREAMED without send_body_without_waiting_for_header_response",
        other => other.as_str_name(),
    }
}
