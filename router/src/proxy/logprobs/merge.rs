//! Puts prefill's log-probabilities into decode's answer while that flows.
#![forbid(unsafe_code)]

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{ANSWER_BYTES_MAX, Echoed, PromptLogprobs};
use crate::proxy::sse::Events;

/// An answer on its way.
#[derive(Debug)]
pub struct Merge {
    known: Arc<PromptLogprobs>,
    gathered: Gathered,
}

#[derive(Debug)]
enum Gathered {
    /// Events are changed one by one.
    Events(Events, Echoed),
    /// A whole answer is changed at its end.
    Whole(BytesMut),
    /// Too long: passed on as it is.
    Not,
}

impl Merge {
    /// For an answer that begins now.
    pub fn new(known: &Arc<PromptLogprobs>, is_event_stream: bool) -> Self {
        Self {
            known: Arc::clone(known),
            gathered: if is_event_stream {
                Gathered::Events(Events::default(), Echoed::default())
            } else {
                Gathered::Whole(BytesMut::new())
            },
        }
    }

    /// What can go to the client after `data`.
    pub fn take(&mut self, data: Bytes) -> Bytes {
        match &mut self.gathered {
            Gathered::Not => data,
            Gathered::Whole(whole) if whole.len() + data.len() <= ANSWER_BYTES_MAX => {
                whole.extend_from_slice(&data);
                Bytes::new()
            }
            Gathered::Whole(whole) => {
                let mut out = std::mem::take(whole);
                out.extend_from_slice(&data);
                self.gathered = Gathered::Not;
                out.freeze()
            }
            Gathered::Events(events, echoed) => {
                if events.push(&data).is_err() {
                    let mut out = BytesMut::from(&events.rest()[..]);
                    out.extend_from_slice(&data);
                    self.gathered = Gathered::Not;
                    return out.freeze();
                }
                let mut out = BytesMut::new();
                while let Some(event) = events.pop() {
                    out.extend_from_slice(&self.known.merge_event(&event, echoed));
                }
                out.freeze()
            }
        }
    }

    /// What is left for the client at the end.
    pub fn finish(&mut self) -> Bytes {
        match std::mem::replace(&mut self.gathered, Gathered::Not) {
            Gathered::Not => Bytes::new(),
            Gathered::Whole(whole) => self.known.merge_answer(&whole).into(),
            Gathered::Events(mut events, _) => events.rest(),
        }
    }
}
