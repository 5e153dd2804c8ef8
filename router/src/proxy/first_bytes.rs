//! The beginning of decode's answer.
#![forbid(unsafe_code)]

use bytes::{Bytes, BytesMut};
use hyper::body::{Frame, Incoming};

use super::sse::{self, InbandAbort};

/// Most of a first event that is read before it is let through: an abort is shorter.
const FIRST_EVENT_BYTES_MAX: usize = 64 << 10;

/// The beginning of decode's body, read to know that it flows and is not an abort.
#[derive(Debug)]
pub struct FirstBytes {
    /// The first frame.
    pub frame: Option<Frame<Bytes>>,
    /// The body ended without one.
    pub is_empty: bool,
    /// What follows.
    pub rest: Incoming,
    /// The answer is an event stream.
    pub is_event_stream: bool,
    /// Pieces of a first event that is not complete.
    begun: BytesMut,
}

impl FirstBytes {
    pub(super) fn new(rest: Incoming, is_event_stream: bool) -> Self {
        Self {
            frame: None,
            is_empty: false,
            rest,
            is_event_stream,
            begun: BytesMut::new(),
        }
    }

    pub(super) fn is_known(&self) -> bool {
        self.is_empty || self.frame.is_some()
    }

    /// Takes the next frame, `None` at the body's end; tells of an abort that came first.
    pub(super) fn take(&mut self, frame: Option<Frame<Bytes>>) -> Option<InbandAbort> {
        let frame = match frame.map(Frame::into_data) {
            Some(Ok(data)) if !self.is_event_stream => {
                self.frame = (!data.is_empty()).then(|| Frame::data(data));
                return None;
            }
            Some(Ok(data)) => {
                // Nearly always the first frame is a whole event.
                let data = if self.begun.is_empty() {
                    data
                } else {
                    self.begun.extend_from_slice(&data);
                    self.begun.split().freeze()
                };
                let Some(end) = sse::end_of_event(&data) else {
                    if data.len() > FIRST_EVENT_BYTES_MAX {
                        self.frame = Some(Frame::data(data));
                    } else {
                        self.begun.extend_from_slice(&data);
                    }
                    return None;
                };
                let abort = InbandAbort::of_data(&sse::data(&data[..end]));
                self.frame = Some(Frame::data(data));
                return abort;
            }
            // Trailers come last: the body holds no more data.
            Some(Err(trailers)) => Some(trailers),
            None => None,
        };
        if self.begun.is_empty() {
            self.is_empty = frame.is_none();
            self.frame = frame;
        } else {
            self.frame = Some(Frame::data(self.begun.split().freeze()));
        }
        None
    }
}
