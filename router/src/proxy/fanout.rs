//! Several choices from one prompt: `n` requests with rooms of their own, and one answer.
//!
//! SGLang cannot serve `n > 1` with a pair: the samples would share a room. So the router sends `n` requests for one choice
//! each and puts the answers together as SGLang numbers them: choice `s` of prompt `i` is number `i·n + s`.
#![forbid(unsafe_code)]

mod merge;

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body_util::Full;
use hyper::Response;
use hyper::body::Frame;
use hyper::header::CONTENT_LENGTH;
use hyper::http::response::Parts;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Front;
use super::admission::Permit;
use super::leg::is_event_stream;
use super::pair::{self, PairRequest};
use super::shape::{self, PairEndpoint, Trust};
use super::sse::{self, Events};
use super::stream::{PairBody, ReplyBody};
use crate::respond::{self, RouteError};
use merge::StreamMerge;

/// Longest answer of one choice that is put together with others.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Events that wait for a slow client, over all choices; then the workers wait.
const EVENTS_WAITING_MAX: usize = 64;

/// Serves `request`, whose shape asks for several choices.
///
/// # Errors
/// [`RouteError`] when one of the choices fails before anything went to the client; the others are cancelled.
pub async fn serve(
    front: &Arc<Front>,
    endpoint: PairEndpoint,
    request: PairRequest,
    permit: Permit,
) -> Result<Response<ReplyBody>, RouteError> {
    let (choices, streams) = (request.shape.choices, request.shape.streams);
    let body = Bytes::from(shape::single_choice(&request.body, &request.shape));
    let trust = Trust {
        rank: front.config.trusts_dp_rank,
        rid: false,
    };
    let mut shape = shape::read(endpoint, &body, trust)?;
    // What headers and the fleet's rules said stands in no body.
    shape.priority = request.shape.priority;
    shape.sticky.clone_from(&request.shape.sticky);
    shape.rank = request.shape.rank;
    let single = PairRequest {
        body,
        shape,
        ..request
    };
    if streams {
        stream(front, endpoint, single, choices, permit).await
    } else {
        whole(front, endpoint, single, choices).await
    }
}

async fn whole(
    front: &Arc<Front>,
    endpoint: PairEndpoint,
    request: PairRequest,
    choices: usize,
) -> Result<Response<ReplyBody>, RouteError> {
    // Dropped on an error or with the client: that cancels what is still open.
    let mut tasks = JoinSet::new();
    for choice in 0..choices {
        let (front, request) = (Arc::clone(front), request.clone());
        tasks.spawn(async move {
            let opened = pair::open(&front, &request).await?;
            drop(request);
            let (parts, body) = opened.into_body(None);
            let answer = gather(body, ANSWER_BYTES_MAX).await?;
            Ok::<_, RouteError>((choice, parts, answer))
        });
    }
    drop(request);
    let mut answers = vec![Bytes::new(); choices];
    let mut head: Option<Parts> = None;
    while let Some(done) = tasks.join_next().await {
        let (choice, parts, answer) =
            done.map_err(|error| RouteError::Broken(error.to_string()))??;
        answers[choice] = answer;
        head.get_or_insert(parts);
    }
    let merged = match endpoint {
        PairEndpoint::Generate => merge::lists(&answers),
        _ => merge::choices(&answers),
    };
    let merged = merged.ok_or_else(|| RouteError::Broken("an answer is no JSON".to_owned()))?;
    let mut parts = head.ok_or_else(|| RouteError::Broken("there is no answer".to_owned()))?;
    parts.headers.remove(CONTENT_LENGTH);
    let body = ReplyBody::Whole(Full::new(merged.into()));
    Ok(Response::from_parts(parts, body))
}

/// Reads an answer to its end.
///
/// # Errors
/// [`RouteError::Broken`] when it breaks off or is longer than `limit` bytes.
pub async fn gather(mut body: PairBody, limit: usize) -> Result<Bytes, RouteError> {
    let mut whole = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|cx| body.poll_next(cx)).await {
        let frame = frame.map_err(|error| RouteError::Broken(error.to_string()))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if whole.len() + data.len() > limit {
            return Err(RouteError::Broken(format!(
                "an answer is longer than {limit} bytes"
            )));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

/// What the task of one choice reports.
#[derive(Debug)]
enum Part {
    Begun(Box<Parts>),
    /// The data of an event.
    Event(usize, Bytes),
    Ended,
    Failed(RouteError),
}

async fn stream(
    front: &Arc<Front>,
    endpoint: PairEndpoint,
    request: PairRequest,
    choices: usize,
    permit: Permit,
) -> Result<Response<ReplyBody>, RouteError> {
    let (sender, mut parts) = mpsc::channel(EVENTS_WAITING_MAX);
    let mut tasks = JoinSet::new();
    for choice in 0..choices {
        let (front, request, sender) = (Arc::clone(front), request.clone(), sender.clone());
        tasks.spawn(async move {
            let last = match drive(&front, request, choice, &sender).await {
                Ok(()) => Part::Ended,
                Err(error) => Part::Failed(error),
            };
            // Nobody listens when the client has gone.
            let _ = sender.send(last).await;
        });
    }
    drop((sender, request));
    let head = match parts.recv().await {
        Some(Part::Begun(head)) => *head,
        Some(Part::Failed(error)) => return Err(error),
        Some(Part::Event(..) | Part::Ended) | None => {
            return Err(RouteError::Broken("an answer has no head".to_owned()));
        }
    };
    let body = MergedBody {
        merge: StreamMerge::new(endpoint == PairEndpoint::Generate, choices),
        parts,
        left: choices,
        tasks,
        _permit: permit,
    };
    Ok(Response::from_parts(
        head,
        ReplyBody::Merged(Box::new(body)),
    ))
}

async fn drive(
    front: &Arc<Front>,
    request: PairRequest,
    choice: usize,
    parts: &mpsc::Sender<Part>,
) -> Result<(), RouteError> {
    let opened = pair::open(front, &request).await?;
    drop(request);
    let (mut head, mut body) = opened.into_body(None);
    if !is_event_stream(&head.headers) {
        return Err(RouteError::Broken(
            "a worker answered a request for a stream with something else".to_owned(),
        ));
    }
    head.headers.remove(CONTENT_LENGTH);
    let gone = |_| RouteError::Broken("the client has gone".to_owned());
    parts
        .send(Part::Begun(Box::new(head)))
        .await
        .map_err(gone)?;
    let mut events = Events::default();
    while let Some(frame) = std::future::poll_fn(|cx| body.poll_next(cx)).await {
        let frame = frame.map_err(|error| RouteError::Broken(error.to_string()))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        events
            .push(&data)
            .map_err(|error| RouteError::Broken(error.to_string()))?;
        while let Some(event) = events.pop() {
            let data = sse::data(&event);
            if !data.is_empty() {
                let data = Bytes::copy_from_slice(&data);
                parts.send(Part::Event(choice, data)).await.map_err(gone)?;
            }
        }
    }
    Ok(())
}

/// The event streams of several choices in one.
#[derive(Debug)]
pub struct MergedBody {
    merge: StreamMerge,
    parts: mpsc::Receiver<Part>,
    /// Choices that have not ended.
    left: usize,
    /// Dropped with the body, which cancels what is still open.
    tasks: JoinSet<()>,
    _permit: Permit,
}

impl MergedBody {
    /// The next piece.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        while self.left > 0 {
            let part = std::task::ready!(self.parts.poll_recv(cx));
            let out = match part {
                Some(Part::Begun(_)) => continue,
                Some(Part::Event(choice, data)) => {
                    if let Some(error) = sse::InbandAbort::of_data(&data) {
                        tracing::debug!(choice, "a choice failed: {}", error.message);
                        self.give_up();
                    }
                    self.merge.event(choice, &data)
                }
                Some(Part::Ended) => {
                    self.left -= 1;
                    if self.left > 0 {
                        continue;
                    }
                    self.merge.finish()
                }
                Some(Part::Failed(error)) => {
                    self.give_up();
                    respond::error_event(&error, false)
                }
                None => {
                    self.give_up();
                    let error = RouteError::Broken("a choice was lost".to_owned());
                    respond::error_event(&error, false)
                }
            };
            if !out.is_empty() {
                return Poll::Ready(Some(Frame::data(out)));
            }
        }
        Poll::Ready(None)
    }

    fn give_up(&mut self) {
        self.left = 0;
        self.tasks.abort_all();
    }
}
