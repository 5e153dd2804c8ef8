//! Anthropic's `/v1/messages`, served by `/v1/chat/completions`.
//!
//! SGLang has the endpoint too, but builds a new request from the fields it knows, so the bootstrap fields would be lost and
//! the pair never meet. The router therefore translates, and what the workers see is a chat request.
#![forbid(unsafe_code)]

pub mod answer;
pub mod request;

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body_util::Full;
use hyper::Response;
use hyper::body::Frame;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};

use super::Front;
use super::admission::Permit;
use super::fanout::{self, gather};
use super::pair::{self, PairRequest};
use super::sse::{self, Events};
use super::stream::{PairBody, ReplyBody};
use crate::respond::RouteError;
use answer::StreamTranslator;

/// Serves a translated request and translates the answer back.
///
/// # Errors
/// [`RouteError`] when the pair fails before anything went to the client.
pub async fn serve(
    front: &Arc<Front>,
    request: PairRequest,
    permit: Permit,
) -> Result<Response<ReplyBody>, RouteError> {
    let streams = request.shape.streams;
    let model = request.shape.model.clone().unwrap_or_default();
    let opened = pair::open(front, &request).await?;
    drop(request);
    let (mut parts, body) = opened.into_body(streams.then_some(permit));
    parts.headers.remove(CONTENT_LENGTH);
    if streams && super::leg::is_event_stream(&parts.headers) {
        let body = TranslatedBody {
            inner: Some(body),
            events: Events::default(),
            translator: StreamTranslator::new(model),
        };
        return Ok(Response::from_parts(
            parts,
            ReplyBody::Translated(Box::new(body)),
        ));
    }
    let whole = gather(body, fanout::ANSWER_BYTES_MAX).await?;
    let message = answer::whole(&whole, &model)
        .ok_or_else(|| RouteError::Broken("an answer is no chat completion".to_owned()))?;
    parts
        .headers
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(Response::from_parts(
        parts,
        ReplyBody::Whole(Full::new(message.into())),
    ))
}

/// A chat stream on its way to an Anthropic client.
#[derive(Debug)]
pub struct TranslatedBody {
    /// `None` once it has ended.
    inner: Option<PairBody>,
    events: Events,
    translator: StreamTranslator,
}

impl TranslatedBody {
    /// The next piece.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        loop {
            let Some(inner) = &mut self.inner else {
                return Poll::Ready(None);
            };
            let mut out = BytesMut::new();
            match std::task::ready!(inner.poll_next(cx)) {
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else {
                        continue;
                    };
                    if self.events.push(&data).is_err() {
                        self.translator.fail("an event is too long", &mut out);
                    }
                    while let Some(event) = self.events.pop() {
                        self.translator.event(&sse::data(&event), &mut out);
                    }
                }
                Some(Err(error)) => self.translator.fail(&error.to_string(), &mut out),
                None => {
                    self.inner = None;
                    self.translator.finish(&mut out);
                }
            }
            if self.translator.is_over() {
                // Dropping the pair cancels what is left of it, which after a good end is nothing.
                self.inner = None;
            }
            if !out.is_empty() {
                return Poll::Ready(Some(Frame::data(out.freeze())));
            }
        }
    }
}
