//! Serves one generation request with a pair of workers.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Response};
use hyper_util::client::legacy::ResponseFuture;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Front;
use super::deadline::Deadline;
use super::headers::strip_connection_headers;
use super::leg::{LegCause, LegFailure, Partner, PrefillLeg, PrefillNews};
use super::shape::Shape;
use super::stream::{PairBody, ReplyBody};
use crate::metrics::bump;
use crate::pool::{Pool, Role, Worker};
use crate::respond::RouteError;
use crate::schedule::rooms::RoomLease;

/// How many pairs a request may meet: a second one only when a worker refused the connection, so that nothing can have
/// been computed or sent twice.
pub const ATTEMPTS_MAX: usize = 2;

/// SGLang's workers have one data-parallel rank as far as this version knows.
const DP_SIZE: u64 = 1;

/// A request that has been read and understood.
#[derive(Debug)]
pub struct PairRequest {
    /// Path and query on the worker.
    pub path: PathAndQuery,
    /// The headers for the workers.
    pub headers: HeaderMap,
    /// The client's bytes.
    pub body: Bytes,
    /// The room they take in [`Front::body_memory`].
    pub memory: OwnedSemaphorePermit,
    /// What is known of them.
    pub shape: Shape,
    /// When the request was complete.
    pub read_at: Instant,
}

/// Sends `request` to a pair and returns decode's answer as soon as it begins. `permit` is held until it ends.
///
/// # Errors
/// [`RouteError`] when a leg fails, or time runs out, before anything went to the client.
pub async fn serve(
    front: &Arc<Front>,
    request: PairRequest,
    permit: OwnedSemaphorePermit,
) -> Result<Response<ReplyBody>, RouteError> {
    let mut deadline = Deadline::new(&front.config, request.read_at);
    let mut avoid: Option<Arc<Worker>> = None;
    for attempt in 1.. {
        let mut live = LivePair::start(front, &request, avoid.as_ref());
        match live.first_bytes(&mut deadline).await {
            Ok((response, first)) => {
                return Ok(reply(live, response, first, deadline, permit));
            }
            Err(RouteError::Leg(LegFailure {
                worker,
                cause: LegCause::Connect(_),
            })) if attempt < ATTEMPTS_MAX
                && request.shape.client_rids.is_empty()
                && front.pool.of_role(worker.role()).len() > 1 =>
            {
                // A request with an id of the client's is not tried again: the abort of its first try could hit the second.
                bump(&front.metrics.retries);
                avoid = Some(worker);
            }
            Err(error) => return Err(error),
        }
    }
    unreachable!("invariant: the loop above returns by its last attempt")
}

fn reply(
    live: LivePair,
    response: Response<()>,
    first: FirstBytes,
    deadline: Deadline,
    permit: OwnedSemaphorePermit,
) -> Response<ReplyBody> {
    let mut response = response;
    strip_connection_headers(response.headers_mut());
    let body = PairBody::new(live, first, deadline, permit, response.headers());
    response.map(|()| ReplyBody::Pair(Box::new(body)))
}

/// Decode's body, and the frame that was read to know that it flows.
#[derive(Debug)]
pub struct FirstBytes {
    /// The first frame; `None` if the head went out before it.
    pub frame: Option<Frame<Bytes>>,
    /// The body ended without one.
    pub empty: bool,
    /// What follows.
    pub rest: Incoming,
}

/// A pair at work. Dropping it cancels each leg that is still open: its connection is closed and its worker told.
#[derive(Debug)]
pub struct LivePair {
    front: Arc<Front>,
    prefill: Arc<Worker>,
    decode: Arc<Worker>,
    rids: Arc<[String]>,
    leg: PrefillLeg,
    exchange: Option<ResponseFuture>,
    sent_at: Instant,
    read_at: Instant,
    prefill_accepted: bool,
    prefill_open: bool,
    decode_open: bool,
    failed: bool,
    /// The rooms are free again when the pair is dropped.
    _rooms: RoomLease,
}

impl LivePair {
    /// Picks a pair and sends both requests.
    fn start(front: &Arc<Front>, request: &PairRequest, avoid: Option<&Arc<Worker>>) -> Self {
        let (prefill, decode) = choose(front, avoid);
        let count = request.shape.batch.unwrap_or(1);
        let rooms = front.rooms.reserve(count, 0, DP_SIZE);
        let rids: Arc<[String]> = if request.shape.client_rids.is_empty() {
            (0..count)
                .map(|_| format!("\"{:032x}\"", rand::random::<u128>()))
                .collect()
        } else {
            request.shape.client_rids.as_slice().into()
        };
        let members = bootstrap_members(&prefill, rooms.rooms(), &request.shape, &rids);
        let body = Bytes::from(request.shape.scan.inject(&request.body, members.as_bytes()));
        let post = |worker: &Worker, body| {
            let (path, headers) = (request.path.clone(), request.headers.clone());
            front.client.send(worker, Method::POST, path, headers, body)
        };
        let exchange = post(&decode, body.clone());
        let partner = Partner {
            worker: Arc::clone(&decode),
            rids: Arc::clone(&rids),
            aborts: front.aborts.clone(),
        };
        let leg = PrefillLeg::start(Arc::clone(&prefill), post(&prefill, body), partner);
        Self {
            front: Arc::clone(front),
            prefill,
            decode,
            rids,
            leg,
            exchange: Some(exchange),
            sent_at: Instant::now(),
            read_at: request.read_at,
            prefill_accepted: false,
            prefill_open: true,
            decode_open: true,
            failed: false,
            _rooms: rooms,
        }
    }

    /// Waits until the answer may begin: decode has answered with a success, and either its first byte is here or prefill
    /// has accepted the request too. So a request that prefill refuses gets prefill's status instead of a broken stream,
    /// and an accepted one is never held back by prefill's answer.
    async fn first_bytes(
        &mut self,
        deadline: &mut Deadline,
    ) -> Result<(Response<()>, FirstBytes), RouteError> {
        let mut exchange = self.exchange.take().expect("invariant: called once");
        let response = loop {
            tokio::select! {
                biased;
                news = self.leg.next_news(), if self.prefill_open => self.learn(news)?,
                response = &mut exchange => {
                    break response.map_err(|error| {
                        self.decode_failed(LegFailure::unanswered(&self.decode, &error))
                    })?;
                }
                stage = deadline.expired() => return Err(self.timed_out(stage)),
            }
        };
        let head_at = Instant::now();
        if !response.status().is_success() {
            let cause = LegCause::Status(Box::new(response));
            return Err(self
                .decode_failed(LegFailure::new(&self.decode, cause))
                .into());
        }
        let (parts, rest) = response.into_parts();
        let mut first = FirstBytes {
            frame: None,
            empty: false,
            rest,
        };
        while !self.prefill_accepted && first.frame.is_none() && !first.empty {
            tokio::select! {
                biased;
                frame = first.rest.frame() => match frame {
                    None => first.empty = true,
                    Some(Ok(frame)) => {
                        deadline.byte_arrived();
                        first.frame = Some(frame);
                    }
                    Some(Err(error)) => {
                        let failure = LegFailure::broken(&self.decode, &error);
                        return Err(self.decode_failed(failure).into());
                    }
                },
                news = self.leg.next_news(), if self.prefill_open => self.learn(news)?,
                stage = deadline.expired() => return Err(self.timed_out(stage)),
            }
        }
        let sending = self.sent_at.saturating_duration_since(self.read_at);
        self.front
            .metrics
            .added_latency(sending + head_at.elapsed());
        Ok((Response::from_parts(parts, ()), first))
    }

    /// Takes note of what the prefill leg reports.
    ///
    /// # Errors
    /// Its failure; the decode worker has been told already.
    pub fn learn(&mut self, news: Option<PrefillNews>) -> Result<(), LegFailure> {
        match news {
            Some(PrefillNews::Accepted) => self.prefill_accepted = true,
            Some(PrefillNews::Finished) => {
                self.prefill_accepted = true;
                self.prefill_open = false;
            }
            Some(PrefillNews::Failed(failure)) => {
                self.prefill_open = false;
                self.decode_open = false;
                self.failed = true;
                return Err(failure);
            }
            None => {
                // The task ended without a last word: it panicked, or the runtime is going down.
                self.prefill_open = false;
                self.failed = true;
                let cause = LegCause::Reset("the router stopped watching".to_owned());
                return Err(LegFailure::new(&self.prefill, cause));
            }
        }
        Ok(())
    }

    /// Polls for news that end the pair.
    pub fn poll_failure(&mut self, cx: &mut std::task::Context<'_>) -> Option<LegFailure> {
        while self.prefill_open {
            match self.leg.poll_news(cx) {
                std::task::Poll::Pending => return None,
                std::task::Poll::Ready(news) => {
                    if let Err(failure) = self.learn(news) {
                        return Some(failure);
                    }
                }
            }
        }
        None
    }

    /// The decode worker, for blame.
    pub fn decode(&self) -> &Arc<Worker> {
        &self.decode
    }

    /// The counters.
    pub fn metrics(&self) -> &crate::metrics::Metrics {
        &self.front.metrics
    }

    /// Notes that decode failed by itself: only prefill is left to cancel.
    pub fn decode_failed(&mut self, failure: LegFailure) -> LegFailure {
        self.decode_open = false;
        self.failed = true;
        failure
    }

    /// Notes that time ran out: both legs are cancelled.
    pub fn timed_out(&mut self, stage: super::deadline::Stage) -> RouteError {
        self.failed = true;
        tracing::warn!(prefill = %self.prefill.url(), decode = %self.decode.url(), "{stage}");
        RouteError::Timeout(stage)
    }

    /// Notes that decode's answer is complete: prefill's is of no more interest, and ends by itself.
    pub fn complete(&mut self) {
        self.decode_open = false;
        if self.prefill_open {
            self.prefill_open = false;
            self.leg.release();
        }
    }
}

impl Drop for LivePair {
    fn drop(&mut self) {
        if self.prefill_open {
            self.leg.cancel();
            self.front.aborts.submit(&self.prefill, &self.rids);
        }
        if self.decode_open {
            self.front.aborts.submit(&self.decode, &self.rids);
            if !self.failed {
                bump(&self.front.metrics.client_disconnects);
                tracing::debug!(decode = %self.decode.url(), "the client went away");
            }
        }
    }
}

fn choose(front: &Front, avoid: Option<&Arc<Worker>>) -> (Arc<Worker>, Arc<Worker>) {
    let candidates = |pool: &Pool, role| -> Vec<Arc<Worker>> {
        pool.candidates(role, avoid).into_iter().cloned().collect()
    };
    let prefills = candidates(&front.pool, Role::Prefill);
    let decodes = candidates(&front.pool, Role::Decode);
    let (prefill, decode) = front.scheduler.choose(prefills.len(), decodes.len());
    (Arc::clone(&prefills[prefill]), Arc::clone(&decodes[decode]))
}

/// The members that both legs get: where the prefill worker's bootstrap server is, the rooms, and the ids if the client
/// chose none. Arrays for a batch, scalars for a single prompt, as SGLang's own router sends them.
fn bootstrap_members(prefill: &Worker, rooms: &[u64], shape: &Shape, rids: &[String]) -> String {
    let host = serde_json::Value::from(prefill.url().host()).to_string();
    let port = prefill
        .bootstrap_port()
        .map_or("null".to_owned(), |port| port.to_string());
    let mut out = String::with_capacity(96 + rooms.len() * 96);
    let mut member = |name: &str, of_item: &dyn Fn(usize) -> String| {
        let comma = if out.is_empty() { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(out, "{comma}\"{name}\":");
        if shape.batch.is_none() {
            out.push_str(&of_item(0));
            return;
        }
        for item in 0..rooms.len() {
            out.push(if item == 0 { '[' } else { ',' });
            out.push_str(&of_item(item));
        }
        out.push(']');
    };
    member("bootstrap_host", &|_| host.clone());
    member("bootstrap_port", &|_| port.clone());
    member("bootstrap_room", &|item| rooms[item].to_string());
    if shape.client_rids.is_empty() {
        member("rid", &|item| rids[item].clone());
    }
    out
}
