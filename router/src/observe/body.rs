//! An answer's body under watch: it knows how many bytes went out, and when the last one did.
#![forbid(unsafe_code)]

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use super::{Outcome, Trail};
use crate::proxy::stream::{ReplyBody, StreamError};

/// A body whose end its trail is told of.
#[derive(Debug)]
pub struct WatchedBody {
    body: ReplyBody,
    trail: Arc<Trail>,
    bytes: u64,
}

impl WatchedBody {
    /// Watches `body` for `trail`.
    pub fn new(body: ReplyBody, trail: Arc<Trail>) -> Self {
        Self {
            body,
            trail,
            bytes: 0,
        }
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => this.bytes += frame.data_ref().map_or(0, |data| data.len() as u64),
            Some(Err(_)) => this.trail.finish(Outcome::Broken, this.bytes),
            None => this.trail.finish(Outcome::Complete, this.bytes),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for WatchedBody {
    fn drop(&mut self) {
        // Nobody asks for more after the last byte of an answer of known length.
        let outcome = if self.body.is_end_stream() {
            Outcome::Complete
        } else {
            Outcome::ClientGone
        };
        self.trail.finish(outcome, self.bytes);
    }
}
