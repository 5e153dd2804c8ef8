//! One HTTP request on its way through Envoy, as a state machine: messages in, messages and effects out, no sockets.
//!
//! What Envoy sends follows its configured modes. The picker answers nothing of the request before it is complete (but for
//! what a mode demands), because the pair depends on the whole body; then the head is answered with the destination and the
//! body with the bootstrap fields in it. The way back is watched, and changed only where the router's own front changes it.
#![forbid(unsafe_code)]

mod response;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use hyper::{HeaderMap, StatusCode};

use super::message::{self, Head, HeadEdit, Way};
use super::protocol::BodySendMode;
use super::protocol::ext_proc::body_mutation::Mutation;
use super::protocol::ext_proc::processing_request::Request;
use super::protocol::ext_proc::{
    HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse, ProtocolConfiguration,
};
use crate::proxy::logprobs::PromptLogprobs;
use crate::proxy::sse::InbandAbort;
use crate::respond::RouteError;
use response::ResponseSide;
pub use response::{AnswerHead, Rewrite};

/// A request without a body in it is complete with fewer messages than this; more of them are an attack.
const EMPTY_PIECES_MAX: usize = 1024;

/// Memory set aside for a body before more than one piece has come.
const BODY_RESERVE_BYTES: usize = 128 << 10;

/// Why a stream is ended with an error. Envoy then fails the request, or lets it pass, as its `failure_mode_allow` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message without content.
    #[error("a message holds nothing this picker knows")]
    Empty,
    /// Something of the request comes before its head or after its end.
    #[error("a piece of the request came out of order")]
    OutOfOrder,
    /// Something of the answer comes before its head or after its end.
    #[error("a piece of the answer came out of order")]
    AnswerOutOfOrder,
    /// A second head.
    #[error("the request has two heads")]
    TwoHeads,
    /// Copies are of no use to a picker.
    #[error("observability_mode is set: a picker must be able to answer")]
    Observed,
    /// Very many pieces without a byte in them.
    #[error("too many empty pieces of a body")]
    EmptyPieces,
}

/// Why a request is refused before it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Early {
    /// The body exceeds the limit.
    TooLarge,
    /// Envoy's request body mode does not let the picker change the body.
    Mode(BodySendMode),
}

/// What is to be done after a message.
#[derive(Debug)]
pub enum Effect {
    /// Goes to Envoy.
    Send(Box<ProcessingResponse>),
    /// The request is complete; [`Exchange::route`] or [`Exchange::refuse`] is to follow.
    Decide(Box<ClientRequest>),
    /// The request cannot be served; [`Exchange::refuse`] is to follow.
    Refuse(Early),
    /// An answer begins.
    Answer(Box<AnswerHead>),
    /// The first bytes of a successful answer are here.
    FirstByte,
    /// The answer's first event is an abort, and nothing has gone to the client: [`Exchange::refuse`] is to follow.
    AbortedFirst(InbandAbort),
    /// The worker ended its answer with an abort in it.
    Aborted(InbandAbort),
    /// An answer that should be translated cannot be, and nothing has gone to the client: [`Exchange::refuse`] is to follow.
    Untranslatable,
    /// The answer is complete; an error's explanation comes with it.
    Complete(Bytes),
    /// Nothing more is to be said on this stream.
    End(Result<(), Violation>),
}

/// A complete request.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    /// Its head.
    pub head: Head,
    /// Its body.
    pub body: Bytes,
    /// The endpoints that may be chosen, if Envoy limits them.
    pub subset: Option<Vec<String>>,
    /// Envoy lets the picker change answers.
    pub may_rewrite: bool,
}

/// Where a request goes, and as what.
#[derive(Debug, Default)]
pub struct Plan {
    /// Endpoints, the best one first, with commas.
    pub destination: String,
    /// Changes of the head.
    pub edit: HeadEdit,
    /// The body that goes on.
    pub body: Bytes,
    /// What is done with the answer.
    pub rewrite: Rewrite,
}

/// How it stood when Envoy closed the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// Nothing was decided yet.
    Early,
    /// The answer was complete, or the picker had refused the request.
    Over,
    /// The answer had not ended: the client has gone, or the worker.
    CutOff,
    /// The answer had begun well; its body is not shown to the picker.
    Unseen,
}

/// Where the request stands.
#[derive(Debug)]
enum Phase {
    /// No message yet.
    Start,
    /// The body is coming.
    Gathering(Box<Gathering>),
    /// Somebody decides.
    Deciding(Asked),
    /// On its way to a worker.
    Routed,
    /// Refused.
    Refused,
}

#[derive(Debug)]
struct Gathering {
    head: Head,
    subset: Option<Vec<String>>,
    whole: Bytes,
    joined: BytesMut,
    pieces: usize,
    empty_pieces: usize,
}

/// What Envoy waits for.
#[derive(Debug)]
struct Asked {
    /// Messages with a body, none if the request has none.
    pieces: usize,
    /// Trailers came.
    trailers: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Exchange {
    body_bytes_max: usize,
    mode: BodySendMode,
    /// Envoy sends the body before the head is answered.
    eager: bool,
    may_rewrite: bool,
    phase: Phase,
    response: ResponseSide,
}

impl Exchange {
    /// A stream without messages so far, that takes bodies of at most `body_bytes_max`. With `tells_served` clients are told
    /// the endpoint that served them, as the conformance tests of the Gateway API ask for.
    pub fn new(body_bytes_max: usize, tells_served: bool) -> Self {
        Self {
            body_bytes_max,
            mode: BodySendMode::FullDuplexStreamed,
            eager: true,
            may_rewrite: true,
            phase: Phase::Start,
            response: ResponseSide::new(tells_served),
        }
    }

    /// Bytes of the body that are held.
    pub fn held_bytes(&self) -> usize {
        match &self.phase {
            Phase::Gathering(gathering) => gathering.len(),
            _ => 0,
        }
    }

    /// Whether something of an answer has gone to the client.
    pub fn is_answered(&self) -> bool {
        self.response.is_open() || matches!(self.phase, Phase::Refused)
    }

    /// Takes Envoy's next message.
    pub fn take(&mut self, message: ProcessingRequest, out: &mut Vec<Effect>) {
        if let Err(violation) = self.try_take(message, out) {
            out.push(Effect::End(Err(violation)));
        }
    }

    fn try_take(
        &mut self,
        mut message: ProcessingRequest,
        out: &mut Vec<Effect>,
    ) -> Result<(), Violation> {
        if message.observability_mode {
            return Err(Violation::Observed);
        }
        if matches!(self.phase, Phase::Refused) {
            // What Envoy sent before it heard of the refusal.
            return Ok(());
        }
        match message.request.take().ok_or(Violation::Empty)? {
            Request::RequestHeaders(head) => self.begin(head, &message, out),
            Request::RequestBody(body) => self.gather(body, out),
            Request::RequestTrailers(_) => self.request_trailers(out),
            Request::ResponseHeaders(head) => self.response.head(head, &message, out),
            Request::ResponseBody(body) => self.response.body(body, out),
            Request::ResponseTrailers(_) => self.response.trailers(out),
        }
    }

    fn begin(
        &mut self,
        head: HttpHeaders,
        message: &ProcessingRequest,
        out: &mut Vec<Effect>,
    ) -> Result<(), Violation> {
        if !matches!(self.phase, Phase::Start) {
            return Err(Violation::TwoHeads);
        }
        if let Some(modes) = &message.protocol_config {
            self.learn_modes(modes);
        }
        let gathering = Box::new(Gathering {
            head: Head::of(head.headers),
            subset: message::subset(message),
            whole: Bytes::new(),
            joined: BytesMut::new(),
            pieces: 0,
            empty_pieces: 0,
        });
        if head.end_of_stream {
            self.decide(gathering, false, out);
            return Ok(());
        }
        match self.mode {
            BodySendMode::FullDuplexStreamed => {}
            BodySendMode::Streamed if self.eager => {}
            // Here the body comes only after the head is answered, and the head waits for the body's answer.
            BodySendMode::Buffered => out.push(send(message::headers_reply(
                Way::Request,
                message::common(HeadEdit::default(), None, false),
            ))),
            other => {
                out.push(Effect::Refuse(Early::Mode(other)));
                return Ok(());
            }
        }
        self.phase = Phase::Gathering(gathering);
        Ok(())
    }

    fn learn_modes(&mut self, modes: &ProtocolConfiguration) {
        self.mode = modes.request_body_mode();
        self.eager = modes.send_body_without_waiting_for_header_response;
        self.may_rewrite = modes.response_body_mode() == BodySendMode::FullDuplexStreamed;
        self.response.set_mode(modes.response_body_mode());
    }

    fn gather(&mut self, body: HttpBody, out: &mut Vec<Effect>) -> Result<(), Violation> {
        let Phase::Gathering(gathering) = &mut self.phase else {
            return Err(Violation::OutOfOrder);
        };
        if body.body.is_empty() {
            gathering.empty_pieces += 1;
            if gathering.empty_pieces > EMPTY_PIECES_MAX {
                return Err(Violation::EmptyPieces);
            }
        }
        if gathering.len() + body.body.len() > self.body_bytes_max {
            out.push(Effect::Refuse(Early::TooLarge));
            return Ok(());
        }
        gathering.add(body.body);
        // A buffered body comes whole; trailers may follow its answer.
        if body.end_of_stream || self.mode == BodySendMode::Buffered {
            self.complete(false, out);
        }
        Ok(())
    }

    fn request_trailers(&mut self, out: &mut Vec<Effect>) -> Result<(), Violation> {
        match &mut self.phase {
            Phase::Gathering(_) => self.complete(true, out),
            Phase::Deciding(asked) if !asked.trailers => asked.trailers = true,
            Phase::Routed => out.push(send(message::trailers_reply(Way::Request))),
            _ => return Err(Violation::OutOfOrder),
        }
        Ok(())
    }

    fn complete(&mut self, trailers: bool, out: &mut Vec<Effect>) {
        if let Phase::Gathering(gathering) = std::mem::replace(&mut self.phase, Phase::Start) {
            self.decide(gathering, trailers, out);
        }
    }

    fn decide(&mut self, gathering: Box<Gathering>, trailers: bool, out: &mut Vec<Effect>) {
        let Gathering {
            head,
            subset,
            whole,
            joined,
            pieces,
            ..
        } = *gathering;
        self.phase = Phase::Deciding(Asked { pieces, trailers });
        out.push(Effect::Decide(Box::new(ClientRequest {
            head,
            body: if joined.is_empty() {
                whole
            } else {
                joined.freeze()
            },
            subset,
            may_rewrite: self.may_rewrite,
        })));
    }

    /// Lets a decided request go on.
    pub fn route(&mut self, plan: Plan, out: &mut Vec<Effect>) {
        let Phase::Deciding(asked) = &self.phase else {
            return;
        };
        let Asked { pieces, trailers } = *asked;
        self.phase = Phase::Routed;
        let Plan {
            destination,
            edit,
            body,
            rewrite,
        } = plan;
        self.response.set_rewrite(rewrite);
        let metadata = message::destination_metadata(&destination);
        let with_destination = |mut reply: ProcessingResponse| {
            reply.dynamic_metadata = Some(metadata.clone());
            send(reply)
        };
        if pieces > 0 && self.mode == BodySendMode::Buffered {
            let edit = message::common(edit, Some(Mutation::Body(body)), true);
            out.push(with_destination(message::body_reply(Way::Request, edit)));
        } else {
            let head = message::common(edit, None, true);
            out.push(with_destination(message::headers_reply(Way::Request, head)));
            match (pieces, self.mode) {
                (0, _) if !trailers => {}
                (_, BodySendMode::Streamed) => stand_in(pieces, body, out),
                _ => out.extend(message::streamed(Way::Request, body, !trailers).map(send)),
            }
        }
        if trailers {
            out.push(send(message::trailers_reply(Way::Request)));
        }
    }

    /// Answers the client in the place of a worker; after the answer has begun, Envoy breaks it off instead.
    pub fn refuse(
        &mut self,
        status: StatusCode,
        headers: &HeaderMap,
        body: Bytes,
        out: &mut Vec<Effect>,
    ) {
        if matches!(self.phase, Phase::Refused) {
            return;
        }
        self.phase = Phase::Refused;
        out.push(send(message::immediate(
            status,
            headers,
            body,
            "kvrouter_refused",
        )));
        out.push(Effect::End(Ok(())));
    }

    /// Ends an answer that has begun with an event that tells of `error`; false if its form has no place for one.
    pub fn finish_answer(&mut self, error: &RouteError, out: &mut Vec<Effect>) -> bool {
        self.response.finish_with(error, out)
    }

    /// Puts headers into the answer's head, in time before it.
    pub fn add_to_answer(&mut self, headers: HeaderMap) {
        self.response.add(headers);
    }

    /// Learns what prefill told, in time before the answer's head.
    pub fn learn_logprobs(&mut self, known: &Arc<PromptLogprobs>) {
        self.response
            .set_rewrite(Rewrite::Logprobs(Arc::clone(known)));
    }

    /// Envoy has closed the stream.
    pub fn closing(&self) -> Closing {
        match self.phase {
            Phase::Start | Phase::Gathering(_) | Phase::Deciding(_) => Closing::Early,
            Phase::Refused => Closing::Over,
            Phase::Routed => self.response.closing(),
        }
    }
}

impl Gathering {
    fn len(&self) -> usize {
        self.whole.len() + self.joined.len()
    }

    /// Most bodies come in one piece and need no copy.
    fn add(&mut self, data: Bytes) {
        self.pieces += 1;
        if self.whole.is_empty() && self.joined.is_empty() {
            self.whole = data;
            return;
        }
        if data.is_empty() {
            return;
        }
        if self.joined.is_empty() {
            self.joined
                .reserve(BODY_RESERVE_BYTES.max(self.whole.len() + data.len()));
            self.joined
                .extend_from_slice(&std::mem::take(&mut self.whole));
        }
        self.joined.extend_from_slice(&data);
    }
}

/// Answers each of `pieces` messages: all but the last become nothing, the last one the whole `body`.
fn stand_in(pieces: usize, body: Bytes, out: &mut Vec<Effect>) {
    let reply = |mutation| {
        send(message::body_reply(
            Way::Request,
            message::common(HeadEdit::default(), Some(mutation), false),
        ))
    };
    out.extend((1..pieces).map(|_| reply(Mutation::ClearBody(true))));
    out.push(reply(Mutation::Body(body)));
}

fn send(reply: ProcessingResponse) -> Effect {
    Effect::Send(Box::new(reply))
}

#[cfg(test)]
mod tests;
