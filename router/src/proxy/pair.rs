//! Serves one generation request with a pair of workers, or with another one if that fails before the first byte.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use hyper::http::response::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Response};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Front;
use super::admission::Permit;
use super::deadline::Deadline;
use super::first_bytes::FirstBytes;
use super::headers::strip_connection_headers;
use super::leg::LegFailure;
use super::live::LivePair;
use super::placement::{self, Prompt, Wish};
use super::shape::Shape;
use super::stream::{PairBody, ReplyBody};
use crate::metrics::bump;
use crate::observe::Trail;
use crate::pool::{Blame, Role, Worker};
use crate::respond::RouteError;

/// Second tries under way at a time, as a share of the requests at work: more would feed an outage.
const RETRIES_SHARE: usize = 5;

/// Second tries that are always allowed, so that an idle router can try again too.
const RETRIES_FREE: usize = 10;

/// A request that has been read and understood. Clones share its bytes.
#[derive(Clone, Debug)]
pub struct PairRequest {
    /// Path and query on the worker.
    pub path: PathAndQuery,
    /// The headers for the workers.
    pub headers: HeaderMap,
    /// The client's bytes.
    pub body: Bytes,
    /// The room they take in [`Front::body_memory`].
    pub memory: Arc<OwnedSemaphorePermit>,
    /// What is known of them.
    pub shape: Shape,
    /// When the request was complete.
    pub read_at: Instant,
    /// Is told what becomes of it.
    pub trail: Arc<Trail>,
    /// The answer's headers shall say why it went where it went.
    pub explains: bool,
}

/// Sends `request` to a pair and returns decode's answer as soon as it begins. `permit` is held until it ends.
///
/// # Errors
/// [`RouteError`] when a leg fails, or time runs out, before anything went to the client.
pub async fn serve(
    front: &Arc<Front>,
    request: PairRequest,
    permit: Permit,
) -> Result<Response<ReplyBody>, RouteError> {
    let opened = open(front, &request).await?;
    drop(request);
    let (parts, body) = opened.into_body(Some(permit));
    Ok(Response::from_parts(parts, ReplyBody::Pair(Box::new(body))))
}

/// An answer that has begun.
#[derive(Debug)]
pub struct Opened {
    live: LivePair,
    parts: Parts,
    first: FirstBytes,
    deadline: Deadline,
}

impl Opened {
    /// The head for the client, and the body, which holds `permit` until it ends.
    pub fn into_body(self, permit: Option<Permit>) -> (Parts, PairBody) {
        let Self {
            live,
            mut parts,
            first,
            deadline,
        } = self;
        strip_connection_headers(&mut parts.headers);
        let body = PairBody::new(live, first, deadline, permit, &mut parts.headers);
        (parts, body)
    }
}

/// Tries pairs until an answer begins.
///
/// # Errors
/// See [`serve`].
pub async fn open(front: &Arc<Front>, request: &PairRequest) -> Result<Opened, RouteError> {
    let mut deadline = Deadline::new(&front.live.now(), request.read_at);
    let prompt = Prompt::of(
        &request.body,
        &request.shape,
        front.picker.blocks().tokens(),
    );
    let mut plan = Plan::default();
    let mut retrying = None;
    for attempt in 1.. {
        let wish = plan.wish(request, &prompt);
        let placement = tokio::select! {
            placement = placement::wait(front, &wish) => placement?,
            stage = deadline.expired() => return Err(RouteError::Timeout(stage)),
        };
        let mut live = LivePair::start(front, request, placement);
        let failure = match live.first_bytes(&mut deadline).await {
            Ok((mut parts, first)) => {
                if request.explains {
                    live.booking().note().put_headers(&mut parts.headers);
                }
                return Ok(Opened {
                    live,
                    parts,
                    first,
                    deadline,
                });
            }
            Err(RouteError::Leg(failure)) => failure,
            Err(error) => return Err(error),
        };
        // A request with an id of the client's is not tried again: the abort of its first try could hit the second.
        let may = attempt < front.live.now().attempts_max
            && failure.cause.is_worth_another_try()
            && request.shape.client_rids.is_empty()
            && plan.go_on(front, &failure, &live);
        if retrying.is_none() && may {
            retrying = begin_retrying(front);
        }
        if !may || retrying.is_none() {
            return Err(failure.into());
        }
        bump(&front.metrics.retries);
    }
    unreachable!("invariant: the loop above returns by its last attempt")
}

/// Which workers the next try should meet.
#[derive(Debug, Default)]
struct Plan {
    excluded: Vec<Arc<Worker>>,
    kept: Option<Arc<Worker>>,
}

impl Plan {
    fn wish<'a>(&'a self, request: &'a PairRequest, prompt: &'a Prompt) -> Wish<'a> {
        let shape = &request.shape;
        Wish {
            prompt_bytes: request.body.len(),
            prompt: Some(prompt),
            items: shape.batch.unwrap_or(1),
            output_tokens: shape.output_tokens,
            model: shape.model.as_deref(),
            priority: shape.priority,
            sticky: shape.sticky.as_deref(),
            rank: shape.rank,
            excluded: &self.excluded,
            kept: self.kept.as_ref(),
            ..Wish::default()
        }
    }

    /// Learns from a failure; false if no other worker is left to try.
    fn go_on(&mut self, front: &Front, failure: &LegFailure, live: &LivePair) -> bool {
        let now = front.pool.now();
        let mut exclude = |worker: &Arc<Worker>| {
            let is_last = now.of_role(worker.role()).iter().all(|other| {
                Arc::ptr_eq(other, worker)
                    || other.is_draining()
                    || self.excluded.iter().any(|gone| Arc::ptr_eq(gone, other))
            });
            if !is_last {
                self.excluded.push(Arc::clone(worker));
            }
            !is_last
        };
        if failure.cause.blame() == Blame::Transfer {
            // The transfer broke between the two, and neither knows at which end.
            self.kept = None;
            let found = [exclude(live.prefill()), exclude(live.decode())];
            return found.contains(&true);
        }
        let found = exclude(&failure.worker);
        self.kept = Some(Arc::clone(match failure.worker.role() {
            Role::Prefill => live.decode(),
            Role::Decode | Role::Other => live.prefill(),
        }));
        found
    }
}

/// Counts something up for as long as it lives.
#[derive(Debug)]
struct Counted<'a> {
    counter: &'a AtomicUsize,
    before: usize,
}

impl<'a> Counted<'a> {
    fn begin(counter: &'a AtomicUsize) -> Self {
        let before = counter.fetch_add(1, Ordering::Relaxed);
        Self { counter, before }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes a share in the bound of second tries, if there is one left.
fn begin_retrying(front: &Front) -> Option<Counted<'_>> {
    let most = (front.admission.taken() / RETRIES_SHARE).max(RETRIES_FREE);
    let counted = Counted::begin(&front.retrying);
    if counted.before < most {
        return Some(counted);
    }
    bump(&front.metrics.retries_refused);
    None
}
