//! The way back of an exchange.
#![forbid(unsafe_code)]

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, StatusCode};

use super::{Closing, Effect, Violation, send};
use crate::epp::message::{self, Head, HeadEdit, Way};
use crate::epp::protocol::BodySendMode;
use crate::epp::protocol::ext_proc::{HttpBody, HttpHeaders, ProcessingRequest};
use crate::proxy::fanout::ANSWER_BYTES_MAX;
use crate::proxy::leg::{WORKER_ERROR_BYTES_MAX, is_event_stream};
use crate::proxy::logprobs::PromptLogprobs;
use crate::proxy::logprobs::merge::Merge;
use crate::proxy::messages::answer::{self, StreamTranslator};
use crate::proxy::sse::{self, AbortWatch, Events, InbandAbort};
use crate::respond::{self, RouteError};

/// Most of a first event that is read before the answer begins: an abort is shorter.
const FIRST_EVENT_BYTES_MAX: usize = 64 << 10;

/// Where the conformance tests of the Gateway API look for the endpoint that served them.
const CONFORMANCE_SERVED: &str = "x-conformance-test-served-endpoint";

/// What is done with an answer. Only full duplex streaming allows more than nothing.
#[derive(Clone, Debug, Default)]
pub enum Rewrite {
    /// Nothing.
    #[default]
    Nothing,
    /// A chat answer becomes an Anthropic message.
    Message {
        /// The model asked for.
        model: String,
    },
    /// Prefill's log-probabilities are put in front of decode's.
    Logprobs(Arc<PromptLogprobs>),
}

/// What is known when an answer begins.
#[derive(Debug)]
pub struct AnswerHead {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// The endpoint that served the request, if Envoy tells.
    pub served: Option<String>,
    /// Why Envoy answered by itself, if it did and tells.
    pub own: Option<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Phase {
    /// No head yet.
    #[default]
    Waiting,
    /// The head is here and not answered.
    Held,
    /// It has gone to the client.
    Open,
    /// All is here.
    Over,
    /// Ended by the picker; what the worker still sends is swallowed.
    Cut,
}

/// How pieces of a body are changed.
#[derive(Debug, Default)]
enum Transform {
    #[default]
    Pass,
    Merge(Merge),
    Translate(Events, Box<StreamTranslator>),
    /// Gathered, and changed at its end.
    Whole(BytesMut),
}

/// See the module.
#[derive(Debug)]
pub(super) struct ResponseSide {
    tells_served: bool,
    mode: BodySendMode,
    rewrite: Rewrite,
    phase: Phase,
    status: StatusCode,
    edit: HeadEdit,
    added: HeaderMap,
    transform: Transform,
    watch: Option<AbortWatch>,
    /// The beginning of the body of a held answer.
    begun: BytesMut,
    /// A failing worker's explanation.
    words: BytesMut,
    has_begun: bool,
    /// Errors can be told in an event.
    is_event_stream: bool,
    /// How the last bytes sent end, to know whether an event is still open.
    tail: [u8; 2],
}

impl ResponseSide {
    pub(super) fn new(tells_served: bool) -> Self {
        Self {
            tells_served,
            mode: BodySendMode::FullDuplexStreamed,
            rewrite: Rewrite::Nothing,
            phase: Phase::Waiting,
            status: StatusCode::OK,
            edit: HeadEdit::default(),
            added: HeaderMap::new(),
            transform: Transform::Pass,
            watch: None,
            begun: BytesMut::new(),
            words: BytesMut::new(),
            has_begun: false,
            is_event_stream: false,
            // Before any byte no event is open.
            tail: *b"\n\n",
        }
    }

    pub(super) fn set_mode(&mut self, mode: BodySendMode) {
        self.mode = mode;
    }

    pub(super) fn set_rewrite(&mut self, rewrite: Rewrite) {
        self.rewrite = rewrite;
    }

    /// Headers for the answer's head, instead of those added before. Later than that head they come to nothing.
    pub(super) fn add(&mut self, headers: HeaderMap) {
        self.added = headers;
    }

    pub(super) fn is_open(&self) -> bool {
        !matches!(self.phase, Phase::Waiting | Phase::Held)
    }

    fn is_duplex(&self) -> bool {
        self.mode == BodySendMode::FullDuplexStreamed
    }

    pub(super) fn head(
        &mut self,
        head: HttpHeaders,
        message: &ProcessingRequest,
        out: &mut Vec<Effect>,
    ) -> Result<(), Violation> {
        if self.phase != Phase::Waiting {
            return Err(Violation::AnswerOutOfOrder);
        }
        let ends = head.end_of_stream;
        let Head {
            status, headers, ..
        } = Head::of(head.headers);
        self.status = status.unwrap_or(StatusCode::BAD_GATEWAY);
        let served = message::served(message);
        if self.tells_served {
            let told = served.as_deref().unwrap_or("fail: not told by the proxy");
            if let Ok(value) = HeaderValue::try_from(told) {
                self.edit.set(CONFORMANCE_SERVED, value);
            }
        }
        if !ends {
            self.prepare(&headers);
        }
        let is_success = self.status.is_success();
        out.push(Effect::Answer(Box::new(AnswerHead {
            status: self.status,
            headers,
            served,
            own: message::own_answer(message),
        })));
        // An event stream's head says nothing yet: its first event may still be an abort.
        let holds =
            matches!(self.transform, Transform::Whole(_)) || (self.is_event_stream && is_success);
        if holds && self.is_duplex() {
            self.phase = Phase::Held;
            return Ok(());
        }
        self.open(out);
        if ends {
            self.end(out);
        }
        Ok(())
    }

    /// Chooses what is done with the body of an answer with these headers.
    fn prepare(&mut self, headers: &HeaderMap) {
        let is_plain = !headers.contains_key(CONTENT_ENCODING);
        self.is_event_stream = is_event_stream(headers) && is_plain;
        if self.is_event_stream && self.status.is_success() {
            self.watch = Some(AbortWatch::default());
        }
        if !self.is_duplex() || !is_plain {
            return;
        }
        self.transform = match (&self.rewrite, self.is_event_stream) {
            (Rewrite::Logprobs(known), is_event_stream) if self.status.is_success() => {
                Transform::Merge(Merge::new(known, is_event_stream))
            }
            (Rewrite::Message { model }, true) if self.status.is_success() => Transform::Translate(
                Events::default(),
                Box::new(StreamTranslator::new(model.clone())),
            ),
            (Rewrite::Message { .. }, _) => Transform::Whole(BytesMut::new()),
            _ => return,
        };
        self.edit.remove.push(CONTENT_LENGTH.to_string());
    }

    fn open(&mut self, out: &mut Vec<Effect>) {
        self.phase = Phase::Open;
        let mut edit = std::mem::take(&mut self.edit);
        for (name, value) in &std::mem::take(&mut self.added) {
            edit.set(name.as_str(), value.clone());
        }
        let reply = message::common(edit, None, false);
        out.push(send(message::headers_reply(Way::Response, reply)));
    }

    pub(super) fn body(&mut self, body: HttpBody, out: &mut Vec<Effect>) -> Result<(), Violation> {
        let HttpBody {
            body: data,
            end_of_stream: ends,
        } = body;
        match self.phase {
            Phase::Waiting | Phase::Over => return Err(Violation::AnswerOutOfOrder),
            Phase::Cut => return Ok(()),
            Phase::Held | Phase::Open => {}
        }
        self.listen(&data, out);
        let data = match &mut self.transform {
            Transform::Whole(whole) => {
                if whole.len() + data.len() > ANSWER_BYTES_MAX {
                    return self.give_up(out);
                }
                whole.extend_from_slice(&data);
                return if ends {
                    self.translate(true, out)
                } else {
                    Ok(())
                };
            }
            _ if self.phase == Phase::Held => match self.first_event(data, ends, out) {
                Some(data) => data,
                None => return Ok(()),
            },
            _ => data,
        };
        self.pass(data, ends, out);
        if ends {
            self.end(out);
        }
        Ok(())
    }

    /// Takes note of what a worker says.
    fn listen(&mut self, data: &Bytes, out: &mut Vec<Effect>) {
        if !self.status.is_success() {
            let room = WORKER_ERROR_BYTES_MAX.saturating_sub(self.words.len());
            self.words.extend_from_slice(&data[..data.len().min(room)]);
            return;
        }
        if !self.has_begun && !data.is_empty() {
            self.has_begun = true;
            out.push(Effect::FirstByte);
        }
        if self.phase == Phase::Open
            && let Some(abort) = self.watch.as_mut().and_then(|watch| watch.look(data))
        {
            self.watch = None;
            out.push(Effect::Aborted(abort));
        }
    }

    /// Adds to the beginning of a held event stream; gives what may go on once its first event is known to be no abort.
    fn first_event(&mut self, data: Bytes, ends: bool, out: &mut Vec<Effect>) -> Option<Bytes> {
        let begun = if self.begun.is_empty() {
            data
        } else {
            self.begun.extend_from_slice(&data);
            self.begun.split().freeze()
        };
        match sse::end_of_event(&begun) {
            Some(end) => {
                if let Some(abort) = InbandAbort::of_data(&sse::data(&begun[..end])) {
                    out.push(Effect::AbortedFirst(abort));
                    return None;
                }
            }
            None if !ends && begun.len() <= FIRST_EVENT_BYTES_MAX => {
                self.begun.extend_from_slice(&begun);
                return None;
            }
            None => {}
        }
        self.open(out);
        if let Some(abort) = self.watch.as_mut().and_then(|watch| watch.look(&begun)) {
            self.watch = None;
            out.push(Effect::Aborted(abort));
        }
        Some(begun)
    }

    /// Sends a piece on, changed as it must be.
    fn pass(&mut self, data: Bytes, ends: bool, out: &mut Vec<Effect>) {
        if !self.is_duplex() {
            let reply = message::common(HeadEdit::default(), None, false);
            out.push(send(message::body_reply(Way::Response, reply)));
            return;
        }
        let mut changed = match &mut self.transform {
            Transform::Pass | Transform::Whole(_) => data,
            Transform::Merge(merge) => merge.take(data),
            Transform::Translate(events, translator) => {
                let mut told = BytesMut::new();
                if events.push(&data).is_err() {
                    translator.fail("an event is too long", &mut told);
                }
                while let Some(event) = events.pop() {
                    translator.event(&sse::data(&event), &mut told);
                }
                told.freeze()
            }
        };
        if ends {
            changed = self.with_last(changed);
        }
        if let Some(tail) = changed.last_chunk() {
            self.tail = *tail;
        } else if let [last] = changed[..] {
            self.tail = [self.tail[1], last];
        }
        if ends || !changed.is_empty() {
            out.extend(message::streamed(Way::Response, changed, ends).map(send));
        }
    }

    /// `data` and what the transform kept back.
    fn with_last(&mut self, data: Bytes) -> Bytes {
        let last = match &mut self.transform {
            Transform::Pass | Transform::Whole(_) => Bytes::new(),
            Transform::Merge(merge) => merge.finish(),
            Transform::Translate(_, translator) => {
                let mut told = BytesMut::new();
                if !translator.is_over() {
                    translator.finish(&mut told);
                }
                told.freeze()
            }
        };
        if last.is_empty() {
            return data;
        }
        if data.is_empty() {
            return last;
        }
        [data, last].concat().into()
    }

    /// The whole answer is here and becomes another one.
    fn translate(&mut self, ends: bool, out: &mut Vec<Effect>) -> Result<(), Violation> {
        let Transform::Whole(whole) = std::mem::take(&mut self.transform) else {
            return Ok(());
        };
        let told = match &self.rewrite {
            Rewrite::Message { .. } if !self.status.is_success() => {
                Some(respond::anthropic_error(self.status, &whole).into_bytes())
            }
            Rewrite::Message { model } => answer::whole(&whole, model),
            Rewrite::Nothing | Rewrite::Logprobs(_) => Some(whole.to_vec()),
        };
        let Some(told) = told else {
            return self.give_up(out);
        };
        let json = HeaderValue::from_static("application/json");
        self.edit.set(CONTENT_TYPE.as_str(), json);
        self.open(out);
        out.extend(message::streamed(Way::Response, told.into(), ends).map(send));
        if !ends {
            out.push(send(message::trailers_reply(Way::Response)));
        }
        self.end(out);
        Ok(())
    }

    fn give_up(&mut self, out: &mut Vec<Effect>) -> Result<(), Violation> {
        self.transform = Transform::Pass;
        self.phase = Phase::Cut;
        out.push(Effect::Untranslatable);
        Ok(())
    }

    pub(super) fn trailers(&mut self, out: &mut Vec<Effect>) -> Result<(), Violation> {
        match self.phase {
            Phase::Waiting | Phase::Over => return Err(Violation::AnswerOutOfOrder),
            Phase::Cut => return Ok(()),
            Phase::Held if matches!(self.transform, Transform::Whole(_)) => {
                return self.translate(false, out);
            }
            Phase::Held => {
                self.open(out);
                let begun = self.begun.split().freeze();
                self.pass(begun, false, out);
            }
            Phase::Open => {}
        }
        let last = self.with_last(Bytes::new());
        if !last.is_empty() {
            out.extend(message::streamed(Way::Response, last, false).map(send));
        }
        out.push(send(message::trailers_reply(Way::Response)));
        self.end(out);
        Ok(())
    }

    fn end(&mut self, out: &mut Vec<Effect>) {
        self.phase = Phase::Over;
        out.push(Effect::Complete(self.words.split().freeze()));
    }

    pub(super) fn finish_with(&mut self, error: &RouteError, out: &mut Vec<Effect>) -> bool {
        if self.phase != Phase::Open || !self.is_duplex() || !self.is_event_stream {
            return false;
        }
        self.phase = Phase::Cut;
        let last = match &mut self.transform {
            Transform::Translate(_, translator) => {
                let mut told = BytesMut::new();
                translator.fail(&error.to_string(), &mut told);
                told.freeze()
            }
            // An event that was cut in the middle must be closed first, or it would swallow ours.
            _ => respond::error_event(error, self.tail != *b"\n\n"),
        };
        out.extend(message::streamed(Way::Response, last, true).map(send));
        true
    }

    pub(super) fn closing(&self) -> Closing {
        match self.phase {
            Phase::Over | Phase::Cut => Closing::Over,
            Phase::Open if self.mode == BodySendMode::None && self.status.is_success() => {
                Closing::Unseen
            }
            Phase::Waiting | Phase::Held | Phase::Open => Closing::CutOff,
        }
    }
}
