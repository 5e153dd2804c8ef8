//! The body a client receives.
#![forbid(unsafe_code)]

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Full;
use hyper::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use tokio::sync::OwnedSemaphorePermit;

use super::deadline::{Deadline, Stage};
use super::leg::{LegCause, LegFailure};
use super::pair::{FirstBytes, LivePair};
use crate::metrics::bump;
use crate::respond::{self, RouteError};

/// Why a body was cut off; the client sees an incomplete message, never a complete one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The pair failed after the head had been sent.
    #[error("{0}")]
    Pair(String),
    /// A forwarded answer broke off.
    #[error(transparent)]
    Worker(#[from] hyper::Error),
}

/// Any body this router sends.
#[derive(Debug)]
pub enum ReplyBody {
    /// The router's own words.
    Whole(Full<Bytes>),
    /// Decode's bytes, under the watch of the pair.
    Pair(Box<PairBody>),
    /// One worker's bytes.
    Worker(Incoming),
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body)
                .poll_frame(cx)
                .map_err(|never| match never {}),
            Self::Pair(body) => body.poll_next(cx),
            Self::Worker(body) => Pin::new(body).poll_frame(cx).map_err(StreamError::Worker),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Pair(body) => body.flow.is_none(),
            Self::Worker(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Pair(_) => SizeHint::default(),
            Self::Worker(body) => body.size_hint(),
        }
    }
}

/// Decode's answer on its way to the client.
#[derive(Debug)]
pub struct PairBody {
    /// `None` once the answer has ended.
    flow: Option<Flow>,
    deadline: Deadline,
    /// Errors can be told in-band: the body is an event stream of open length, uncompressed.
    is_event_stream: bool,
    /// How the last bytes sent end, to know whether an event is still open.
    tail: [u8; 2],
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Flow {
    live: LivePair,
    first: Option<Frame<Bytes>>,
    rest: Incoming,
}

impl PairBody {
    /// Continues an answer whose head is about to be sent.
    pub fn new(
        mut live: LivePair,
        first: FirstBytes,
        deadline: Deadline,
        permit: OwnedSemaphorePermit,
        headers: &HeaderMap,
    ) -> Self {
        let is_event_stream = !headers.contains_key(CONTENT_ENCODING)
            && !headers.contains_key(CONTENT_LENGTH)
            && headers.get(CONTENT_TYPE).is_some_and(|kind| {
                kind.as_bytes()
                    .to_ascii_lowercase()
                    .starts_with(b"text/event-stream")
            });
        let flow = if first.empty {
            live.complete();
            None
        } else {
            Some(Flow {
                live,
                first: first.frame,
                rest: first.rest,
            })
        };
        // Before any byte no event is open.
        Self {
            flow,
            deadline,
            is_event_stream,
            tail: *b"\n\n",
            _permit: permit,
        }
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        let Some(Flow { live, first, rest }) = &mut self.flow else {
            return Poll::Ready(None);
        };
        if let Some(frame) = first.take() {
            self.pass(&frame);
            return Poll::Ready(Some(Ok(frame)));
        }
        if let Some(failure) = live.poll_failure(cx) {
            return Poll::Ready(Some(self.fail(&failure.into())));
        }
        match Pin::new(rest).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.deadline.byte_arrived();
                self.pass(&frame);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                let failure = LegFailure::broken(live.decode(), &error);
                let failure = live.decode_failed(failure);
                Poll::Ready(Some(self.fail(&failure.into())))
            }
            Poll::Ready(None) => {
                live.complete();
                self.flow = None;
                Poll::Ready(None)
            }
            Poll::Pending => {
                let stage = ready!(self.deadline.poll_expired(cx));
                if stage == Stage::Stall {
                    // Counted against decode, which has begun its answer; the abort still goes to both.
                    drop(LegFailure::new(live.decode(), LegCause::Stall));
                }
                let error = live.timed_out(stage);
                Poll::Ready(Some(self.fail(&error)))
            }
        }
    }

    /// Ends the stream with an error event, or, where the format has no place for one, by breaking it off.
    fn fail(&mut self, error: &RouteError) -> Result<Frame<Bytes>, StreamError> {
        if let Some(Flow { live, .. }) = &self.flow {
            bump(&live.metrics().broken_streams);
        }
        // Dropping the pair cancels what is left of it.
        self.flow = None;
        if !self.is_event_stream {
            return Err(StreamError::Pair(error.to_string()));
        }
        // An event that was cut in the middle must be closed first, or it would swallow ours.
        let is_open = self.tail != *b"\n\n";
        Ok(Frame::data(respond::error_event(error, is_open)))
    }

    /// Notes what goes to the client. An answer of known length ends with its last byte: nobody asks for more after it.
    fn pass(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            match data[..] {
                [.., a, b] => self.tail = [a, b],
                [b] => self.tail = [self.tail[1], b],
                [] => {}
            }
        }
        if let Some(Flow {
            live,
            first: None,
            rest,
        }) = &mut self.flow
            && rest.is_end_stream()
        {
            live.complete();
            self.flow = None;
        }
    }
}
