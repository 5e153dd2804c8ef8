//! The body a client receives.
#![forbid(unsafe_code)]

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::Full;
use hyper::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH};

use super::admission::Permit;
use super::deadline::{Deadline, Stage};
use super::fanout::MergedBody;
use super::first_bytes::FirstBytes;
use super::leg::{LegCause, LegFailure};
use super::live::{LivePair, Outlook};
use super::logprobs::merge::Merge;
use super::messages::TranslatedBody;
use super::sse::AbortWatch;
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
    /// The event streams of several pairs in one.
    Merged(Box<MergedBody>),
    /// A pair's event stream in another dialect.
    Translated(Box<TranslatedBody>),
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
            Self::Merged(body) => body.poll_next(cx).map(|piece| piece.map(Ok)),
            Self::Translated(body) => body.poll_next(cx).map(|piece| piece.map(Ok)),
            Self::Worker(body) => Pin::new(body).poll_frame(cx).map_err(StreamError::Worker),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Pair(body) => body.flow.is_none(),
            Self::Merged(_) | Self::Translated(_) => false,
            Self::Worker(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Pair(_) | Self::Merged(_) | Self::Translated(_) => SizeHint::default(),
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
    watch: Option<AbortWatch>,
    merge: Option<Merge>,
    _permit: Option<Permit>,
}

#[derive(Debug)]
struct Flow {
    live: LivePair,
    first: Option<Frame<Bytes>>,
    /// `None` when the answer is of no more use and only the reason for that is waited for.
    rest: Option<Incoming>,
}

impl PairBody {
    /// Continues an answer whose head, with `headers`, is about to be sent.
    pub fn new(
        mut live: LivePair,
        first: FirstBytes,
        deadline: Deadline,
        permit: Option<Permit>,
        headers: &mut HeaderMap,
    ) -> Self {
        let is_plain = !headers.contains_key(CONTENT_ENCODING);
        let is_event_stream =
            first.is_event_stream && is_plain && !headers.contains_key(CONTENT_LENGTH);
        let merge = live
            .logprobs()
            .filter(|_| is_plain)
            .map(|known| Merge::new(known, first.is_event_stream));
        if merge.is_some() {
            headers.remove(CONTENT_LENGTH);
        }
        let flow = if first.is_empty {
            live.complete();
            None
        } else {
            Some(Flow {
                live,
                first: first.frame,
                rest: Some(first.rest),
            })
        };
        // Before any byte no event is open.
        Self {
            flow,
            deadline,
            is_event_stream,
            tail: *b"\n\n",
            watch: is_event_stream.then(AbortWatch::default),
            merge,
            _permit: permit,
        }
    }

    /// The next piece.
    pub fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        loop {
            let Some(Flow { live, first, rest }) = &mut self.flow else {
                return Poll::Ready(None);
            };
            if let Some(frame) = first.take() {
                match self.pass(frame) {
                    Some(frame) => return Poll::Ready(Some(Ok(frame))),
                    None => continue,
                }
            }
            match live.poll_outlook(cx) {
                Poll::Ready(Err(failure)) => {
                    return Poll::Ready(Some(self.fail(&failure.into())));
                }
                Poll::Ready(Ok(Outlook::Doomed)) => {
                    *rest = None;
                    continue;
                }
                Poll::Ready(Ok(Outlook::Fine)) | Poll::Pending => {}
            }
            let polled = match rest {
                Some(body) => Pin::new(body).poll_frame(cx),
                None => Poll::Pending,
            };
            match polled {
                Poll::Ready(Some(Ok(frame))) => {
                    self.deadline.byte_arrived();
                    match self.pass(frame) {
                        Some(frame) => return Poll::Ready(Some(Ok(frame))),
                        None => continue,
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    let failure = LegFailure::broken(live.decode(), &error);
                    let failure = live.decode_failed(failure);
                    return Poll::Ready(Some(self.fail(&failure.into())));
                }
                Poll::Ready(None) => {
                    let last = self.finish();
                    return Poll::Ready(last.map(|data| Ok(Frame::data(data))));
                }
                Poll::Pending => {
                    let stage = ready!(self.deadline.poll_expired(cx));
                    return Poll::Ready(Some(self.expire(stage)));
                }
            }
        }
    }

    fn expire(&mut self, stage: Stage) -> Result<Frame<Bytes>, StreamError> {
        let Some(Flow { live, .. }) = &mut self.flow else {
            return Err(StreamError::Pair(stage.to_string()));
        };
        if stage == Stage::Stall {
            // Counted against decode, which has begun its answer; the abort still goes to both.
            drop(LegFailure::new(live.decode(), LegCause::Stall));
        }
        let error = live.timed_out(stage);
        self.fail(&error)
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

    fn finish(&mut self) -> Option<Bytes> {
        if let Some(mut flow) = self.flow.take() {
            flow.live.complete();
        }
        let last = self.merge.as_mut().map(Merge::finish);
        last.filter(|data| !data.is_empty())
    }

    /// Looks at a frame of decode's and gives what the client gets of it now.
    fn pass(&mut self, frame: Frame<Bytes>) -> Option<Frame<Bytes>> {
        let data = match frame.into_data() {
            Ok(data) => data,
            Err(trailers) => return Some(trailers),
        };
        if let Some(abort) = self.watch.as_mut().and_then(|watch| watch.look(&data))
            && let Some(Flow { live, .. }) = &mut self.flow
        {
            live.decode_aborted(abort);
        }
        let mut out = match &mut self.merge {
            Some(merge) => merge.take(data),
            None => data,
        };
        // An answer of known length ends with its last byte: nobody asks for more after it.
        let is_last = matches!(
            &self.flow,
            Some(Flow { first: None, rest: Some(rest), .. }) if rest.is_end_stream()
        );
        if is_last && let Some(last) = self.finish() {
            out = [out, last].concat().into();
        }
        match out[..] {
            [.., a, b] => self.tail = [a, b],
            [b] => self.tail = [self.tail[1], b],
            [] => {}
        }
        (!out.is_empty()).then(|| Frame::data(out))
    }
}
