//! The state machine alone: what it says to which messages, in good order and in bad.

use proptest::prelude::*;
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};

use super::*;
use crate::epp::message::{
    CHUNK_BYTES_MAX, DESTINATION, DESTINATION_NAMESPACE, SERVED, SUBSET, SUBSET_NAMESPACE,
};
use crate::epp::protocol::core;
use crate::epp::protocol::ext_proc::processing_response::Response;
use crate::epp::protocol::ext_proc::{CommonResponse, HttpTrailers};

const LIMIT: usize = 1 << 20;

fn header_map(headers: &[(&str, &str)]) -> Option<core::HeaderMap> {
    let headers = headers.iter().map(|(key, value)| core::HeaderValue {
        key: (*key).to_owned(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
        value: String::new(),
    });
    Some(core::HeaderMap {
        headers: headers.collect(),
    })
}

fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest {
        request: Some(request),
        ..ProcessingRequest::default()
    }
}

fn request_head(ends: bool) -> ProcessingRequest {
    message(Request::RequestHeaders(HttpHeaders {
        headers: header_map(&[
            (":method", "POST"),
            (":path", "/generate?a=b"),
            ("x-one", "1"),
            ("x-one", "2"),
        ]),
        end_of_stream: ends,
    }))
}

fn request_body(text: &str, ends: bool) -> ProcessingRequest {
    message(Request::RequestBody(HttpBody {
        body: Bytes::copy_from_slice(text.as_bytes()),
        end_of_stream: ends,
    }))
}

fn trailers(way: Way) -> ProcessingRequest {
    let none = HttpTrailers { trailers: None };
    message(match way {
        Way::Request => Request::RequestTrailers(none),
        Way::Response => Request::ResponseTrailers(none),
    })
}

fn answer_head(status: &str, kind: &str, ends: bool) -> ProcessingRequest {
    message(Request::ResponseHeaders(HttpHeaders {
        headers: header_map(&[
            (":status", status),
            ("content-type", kind),
            ("content-length", "5"),
        ]),
        end_of_stream: ends,
    }))
}

fn answer_body(text: &str, ends: bool) -> ProcessingRequest {
    message(Request::ResponseBody(HttpBody {
        body: Bytes::copy_from_slice(text.as_bytes()),
        end_of_stream: ends,
    }))
}

fn with_modes(
    mut first: ProcessingRequest,
    request: BodySendMode,
    response: BodySendMode,
    eager: bool,
) -> ProcessingRequest {
    first.protocol_config = Some(ProtocolConfiguration {
        request_body_mode: request.into(),
        response_body_mode: response.into(),
        send_body_without_waiting_for_header_response: eager,
    });
    first
}

fn feed(
    exchange: &mut Exchange,
    messages: impl IntoIterator<Item = ProcessingRequest>,
) -> Vec<Effect> {
    let mut out = Vec::new();
    for message in messages {
        exchange.take(message, &mut out);
    }
    out
}

fn exchange() -> Exchange {
    Exchange::new(LIMIT, false)
}

fn plan_of(body: &str) -> Plan {
    let mut edit = HeadEdit::default();
    edit.set(DESTINATION, "10.0.0.1:1".parse().unwrap());
    Plan {
        destination: "10.0.0.1:1".to_owned(),
        edit,
        body: Bytes::copy_from_slice(body.as_bytes()),
        rewrite: Rewrite::Nothing,
    }
}

/// An exchange that has sent its request on.
fn routed(rewrite: Rewrite) -> Exchange {
    let mut exchange = exchange();
    feed(
        &mut exchange,
        [request_head(false), request_body("{}", true)],
    );
    let plan = Plan {
        rewrite,
        ..plan_of("{}")
    };
    exchange.route(plan, &mut Vec::new());
    exchange
}

/// A short name for each effect, and what bodies it carries.
fn told(effects: &[Effect]) -> Vec<String> {
    effects.iter().map(tell).collect()
}

fn tell(effect: &Effect) -> String {
    let body_of = |common: &Option<CommonResponse>| {
        let mutation = common
            .as_ref()
            .and_then(|common| common.body_mutation.clone());
        match mutation.and_then(|mutation| mutation.mutation) {
            None => String::new(),
            Some(Mutation::ClearBody(_)) => " clear".to_owned(),
            Some(Mutation::Body(body)) => format!(" ={}", String::from_utf8_lossy(&body)),
            Some(Mutation::StreamedResponse(piece)) => format!(
                " +{}{}",
                String::from_utf8_lossy(&piece.body),
                if piece.end_of_stream { "|" } else { "" }
            ),
        }
    };
    match effect {
        Effect::Send(reply) => {
            let meta = if reply.dynamic_metadata.is_some() {
                " to"
            } else {
                ""
            };
            match reply.response.as_ref().unwrap() {
                Response::RequestHeaders(_) => format!("head{meta}"),
                Response::RequestBody(body) => format!("body{meta}{}", body_of(&body.response)),
                Response::RequestTrailers(_) => "trailers".to_owned(),
                Response::ResponseHeaders(_) => "answer head".to_owned(),
                Response::ResponseBody(body) => format!("answer{}", body_of(&body.response)),
                Response::ResponseTrailers(_) => "answer trailers".to_owned(),
                Response::ImmediateResponse(own) => {
                    format!("own {}", own.status.unwrap().code)
                }
            }
        }
        Effect::Decide(request) => format!("decide {}", String::from_utf8_lossy(&request.body)),
        Effect::Refuse(early) => format!("refuse {early:?}"),
        Effect::Answer(head) => format!("answered {}", head.status.as_u16()),
        Effect::FirstByte => "first byte".to_owned(),
        Effect::AbortedFirst(abort) => format!("aborted first {}", abort.status),
        Effect::Aborted(abort) => format!("aborted {}", abort.status),
        Effect::Untranslatable => "untranslatable".to_owned(),
        Effect::Complete(words) => format!("complete {}", String::from_utf8_lossy(words)),
        Effect::End(Ok(())) => "end".to_owned(),
        Effect::End(Err(violation)) => format!("violation {violation:?}"),
    }
}

#[test]
fn a_head_alone_is_decided_at_once() {
    let mut exchange = exchange();
    let mut out = feed(&mut exchange, [request_head(true)]);
    let Effect::Decide(request) = &out[0] else {
        panic!("{out:?}");
    };
    assert_eq!(request.head.method, "POST");
    assert_eq!(request.head.path, "/generate?a=b");
    assert_eq!(request.head.headers.get_all("x-one").iter().count(), 2);
    assert!(request.subset.is_none() && request.may_rewrite);
    out.clear();
    exchange.route(plan_of(""), &mut out);
    assert_eq!(told(&out), ["head to"]);
    assert_eq!(exchange.closing(), Closing::CutOff);
}

#[test]
fn a_streamed_body_is_answered_after_its_end() {
    let mut exchange = exchange();
    let out = feed(
        &mut exchange,
        [request_head(false), request_body("{\"a\"", false)],
    );
    assert_eq!(told(&out), Vec::<String>::new());
    assert_eq!(exchange.held_bytes(), 4);
    let mut out = feed(
        &mut exchange,
        [request_body(":1}", false), request_body("", true)],
    );
    assert_eq!(told(&out), ["decide {\"a\":1}"]);
    assert_eq!(exchange.held_bytes(), 0);
    out.clear();
    exchange.route(plan_of("new"), &mut out);
    assert_eq!(told(&out), ["head to", "body +new|"]);
    let Effect::Send(head) = &out[0] else {
        panic!("{out:?}");
    };
    let metadata = head.dynamic_metadata.as_ref().unwrap();
    let Some(Kind::StructValue(within)) = &metadata.fields[DESTINATION_NAMESPACE].kind else {
        panic!("{metadata:?}");
    };
    assert_eq!(
        within.fields[DESTINATION].kind,
        Some(Kind::StringValue("10.0.0.1:1".to_owned()))
    );
    let Some(Response::RequestHeaders(reply)) = &head.response else {
        panic!("{head:?}");
    };
    assert!(reply.response.as_ref().unwrap().clear_route_cache);
}

#[test]
fn a_large_body_goes_on_in_pieces() {
    let mut exchange = exchange();
    feed(
        &mut exchange,
        [request_head(false), request_body("{}", true)],
    );
    let body = "x".repeat(2 * CHUNK_BYTES_MAX + 1);
    let mut out = Vec::new();
    exchange.route(plan_of(&body), &mut out);
    let sizes: Vec<_> = told(&out).iter().map(String::len).collect();
    let frame = "body +".len();
    assert_eq!(
        sizes,
        [
            "head to".len(),
            CHUNK_BYTES_MAX + frame,
            CHUNK_BYTES_MAX + frame,
            1 + frame + 1
        ]
    );
}

#[test]
fn trailers_end_a_body_and_come_last() {
    let mut exchange = exchange();
    let pieces = [
        request_head(false),
        request_body("{}", false),
        trailers(Way::Request),
    ];
    let mut out = feed(&mut exchange, pieces);
    assert_eq!(told(&out), ["decide {}"]);
    out.clear();
    exchange.route(plan_of("new"), &mut out);
    assert_eq!(told(&out), ["head to", "body +new", "trailers"]);
}

#[test]
fn other_modes_are_answered_as_they_ask() {
    use BodySendMode::{Buffered, BufferedPartial, Grpc, None, Streamed};
    let first = |mode, eager| with_modes(request_head(false), mode, Streamed, eager);
    // Buffered: the head first, the destination with the body.
    let mut buffered = exchange();
    let out = feed(
        &mut buffered,
        [first(Buffered, false), request_body("{}", false)],
    );
    assert_eq!(told(&out), ["head", "decide {}"]);
    let mut out = Vec::new();
    buffered.route(plan_of("new"), &mut out);
    out.extend(feed(&mut buffered, [trailers(Way::Request)]));
    assert_eq!(told(&out), ["body to =new", "trailers"]);
    // Streamed: one answer for each piece.
    let mut streamed = exchange();
    let pieces = [
        first(Streamed, true),
        request_body("{", false),
        request_body("}", false),
        request_body("", true),
    ];
    assert_eq!(told(&feed(&mut streamed, pieces)), ["decide {}"]);
    let mut out = Vec::new();
    streamed.route(plan_of("new"), &mut out);
    assert_eq!(
        told(&out),
        ["head to", "body clear", "body clear", "body =new"]
    );
    for (mode, eager) in [
        (Streamed, false),
        (None, false),
        (BufferedPartial, false),
        (Grpc, true),
    ] {
        let out = feed(&mut exchange(), [first(mode, eager)]);
        assert_eq!(told(&out), [format!("refuse Mode({mode:?})")]);
    }
}

#[test]
fn odd_orders_end_the_stream() {
    let cases: [(&str, Vec<ProcessingRequest>); 9] = [
        ("OutOfOrder", vec![request_body("{}", true)]),
        ("OutOfOrder", vec![trailers(Way::Request)]),
        ("TwoHeads", vec![request_head(false), request_head(false)]),
        ("TwoHeads", vec![request_head(true), request_head(true)]),
        (
            "OutOfOrder",
            vec![request_head(true), request_body("x", true)],
        ),
        ("AnswerOutOfOrder", vec![answer_body("x", true)]),
        (
            "AnswerOutOfOrder",
            vec![request_head(false), trailers(Way::Response)],
        ),
        ("Empty", vec![ProcessingRequest::default()]),
        (
            "Observed",
            vec![ProcessingRequest {
                observability_mode: true,
                ..request_head(false)
            }],
        ),
    ];
    for (violation, messages) in cases {
        let out = feed(&mut exchange(), messages);
        assert_eq!(
            told(&out).last().unwrap(),
            &format!("violation {violation}")
        );
    }
    let mut twice = routed(Rewrite::Nothing);
    let heads = [
        answer_head("200", "text/plain", true),
        answer_head("200", "text/plain", true),
    ];
    let out = feed(&mut twice, heads);
    assert_eq!(told(&out).last().unwrap(), "violation AnswerOutOfOrder");
}

#[test]
fn bodies_are_bounded() {
    let mut exchange = Exchange::new(4, false);
    let out = feed(
        &mut exchange,
        [request_head(false), request_body("1234", false)],
    );
    assert!(out.is_empty());
    let mut out = feed(&mut exchange, [request_body("5", true)]);
    assert_eq!(told(&out), ["refuse TooLarge"]);
    out.clear();
    exchange.refuse(
        StatusCode::PAYLOAD_TOO_LARGE,
        &HeaderMap::new(),
        Bytes::new(),
        &mut out,
    );
    assert_eq!(told(&out), ["own 413", "end"]);
    // What was on its way already is swallowed, and nothing is said twice.
    assert!(feed(&mut exchange, [request_body("more", true)]).is_empty());
    out.clear();
    exchange.refuse(StatusCode::OK, &HeaderMap::new(), Bytes::new(), &mut out);
    assert!(out.is_empty());
    assert_eq!(exchange.closing(), Closing::Over);
    let empty = (0..=EMPTY_PIECES_MAX).map(|_| request_body("", false));
    let out = feed(
        &mut self::exchange(),
        std::iter::once(request_head(false)).chain(empty),
    );
    assert_eq!(told(&out), ["violation EmptyPieces"]);
}

#[test]
fn a_stream_that_closes_early_says_how_it_stood() {
    let mut early = exchange();
    assert_eq!(early.closing(), Closing::Early);
    feed(&mut early, [request_head(false), request_body("{", false)]);
    assert_eq!(early.closing(), Closing::Early);
    let mut answered = routed(Rewrite::Nothing);
    assert_eq!(answered.closing(), Closing::CutOff);
    feed(
        &mut answered,
        [answer_head("200", "application/json", false)],
    );
    assert_eq!(answered.closing(), Closing::CutOff);
    feed(&mut answered, [answer_body("{}", true)]);
    assert_eq!(answered.closing(), Closing::Over);
    // Without the body there is no telling.
    let mut unseen = exchange();
    let first = with_modes(
        request_head(true),
        BodySendMode::FullDuplexStreamed,
        BodySendMode::None,
        false,
    );
    feed(&mut unseen, [first]);
    unseen.route(plan_of(""), &mut Vec::new());
    feed(&mut unseen, [answer_head("200", "application/json", false)]);
    assert_eq!(unseen.closing(), Closing::Unseen);
}

#[test]
fn an_answer_of_envoys_own_may_come_before_the_decision() {
    let mut exchange = exchange();
    feed(
        &mut exchange,
        [request_head(false), request_body("{}", true)],
    );
    let out = feed(
        &mut exchange,
        [
            answer_head("413", "text/plain", false),
            answer_body("no", true),
        ],
    );
    assert_eq!(
        told(&out),
        ["answered 413", "answer head", "answer +no|", "complete no"]
    );
}

#[test]
fn plain_answers_pass_and_their_ends_are_told() {
    let mut whole = routed(Rewrite::Nothing);
    let out = feed(
        &mut whole,
        [
            answer_head("200", "application/json", false),
            answer_body("{\"a\"", false),
            answer_body(":1}", true),
        ],
    );
    assert_eq!(
        told(&out),
        [
            "answered 200",
            "answer head",
            "first byte",
            "answer +{\"a\"",
            "answer +:1}|",
            "complete "
        ]
    );
    let mut error = routed(Rewrite::Nothing);
    let out = feed(
        &mut error,
        [
            answer_head("500", "application/json", false),
            answer_body("words", false),
            trailers(Way::Response),
        ],
    );
    assert_eq!(
        told(&out),
        [
            "answered 500",
            "answer head",
            "answer +words",
            "answer trailers",
            "complete words"
        ]
    );
    let mut empty = routed(Rewrite::Nothing);
    let out = feed(&mut empty, [answer_head("204", "", true)]);
    assert_eq!(told(&out), ["answered 204", "answer head", "complete "]);
}

#[test]
fn the_first_event_is_known_before_an_event_stream_begins() {
    let stream = || answer_head("200", "text/event-stream", false);
    let mut good = routed(Rewrite::Nothing);
    let out = feed(&mut good, [stream(), answer_body("data: 1\n", false)]);
    assert_eq!(told(&out), ["answered 200", "first byte"]);
    assert!(!good.is_answered());
    let out = feed(&mut good, [answer_body("\nda", false)]);
    assert_eq!(told(&out), ["answer head", "answer +data: 1\n\nda"]);
    assert!(good.is_answered());
    let abort =
        "ta: {\"meta_info\":{\"finish_reason\":{\"type\":\"abort\",\"status_code\":503}}}\n\n";
    let out = feed(&mut good, [answer_body(abort, true)]);
    assert_eq!(
        told(&out),
        [
            "aborted 503".to_owned(),
            format!("answer +{abort}|"),
            "complete ".to_owned()
        ]
    );
    let mut bad = routed(Rewrite::Nothing);
    let abort = "data: {\"error\":{\"message\":\"m\",\"code\":400}}\n\n";
    let out = feed(&mut bad, [stream(), answer_body(abort, false)]);
    assert_eq!(
        told(&out),
        ["answered 200", "first byte", "aborted first 400"]
    );
    let mut out = Vec::new();
    bad.refuse(
        StatusCode::BAD_REQUEST,
        &HeaderMap::new(),
        Bytes::new(),
        &mut out,
    );
    assert_eq!(told(&out), ["own 400", "end"]);
    // An end without a whole event is passed on as it is.
    let mut short = routed(Rewrite::Nothing);
    let out = feed(&mut short, [stream(), answer_body("data", true)]);
    assert_eq!(
        told(&out),
        [
            "answered 200",
            "first byte",
            "answer head",
            "answer +data|",
            "complete "
        ]
    );
}

#[test]
fn an_answer_can_be_ended_with_an_error_event() {
    let mut exchange = routed(Rewrite::Nothing);
    let head = answer_head("200", "text/event-stream", false);
    feed(&mut exchange, [head, answer_body("data: 1\n\nda", false)]);
    let mut out = Vec::new();
    assert!(exchange.finish_answer(&RouteError::Silent, &mut out));
    let told = told(&out);
    assert!(
        told[0].starts_with("answer +\n\ndata: {\"error\""),
        "{told:?}"
    );
    assert!(told[0].ends_with('|'), "{told:?}");
    assert!(feed(&mut exchange, [answer_body("late", true)]).is_empty());
    // JSON has no place for one.
    let mut whole = routed(Rewrite::Nothing);
    feed(&mut whole, [answer_head("200", "application/json", false)]);
    assert!(!whole.finish_answer(&RouteError::Silent, &mut Vec::new()));
}

#[test]
fn modes_without_full_duplex_pass_answers_untouched() {
    for mode in [BodySendMode::Streamed, BodySendMode::Buffered] {
        let mut exchange = exchange();
        let first = with_modes(request_head(true), BodySendMode::Buffered, mode, false);
        let out = feed(&mut exchange, [first]);
        let Effect::Decide(request) = &out[0] else {
            panic!("{out:?}");
        };
        assert!(!request.may_rewrite);
        exchange.route(plan_of(""), &mut Vec::new());
        let out = feed(
            &mut exchange,
            [
                answer_head("200", "text/event-stream", false),
                answer_body("data: 1\n\n", false),
                answer_body("data: {\"error\":{\"code\":500}}\n\n", true),
            ],
        );
        assert_eq!(
            told(&out),
            [
                "answered 200",
                "answer head",
                "first byte",
                "answer",
                "aborted 500",
                "answer",
                "complete "
            ]
        );
    }
}

const CHAT: &str = r#"{"id":"x","choices":[{"message":{"content":"hi"},"finish_reason":"stop"}]}"#;

#[test]
fn messages_are_translated_whole_and_in_events() {
    let message = || Rewrite::Message {
        model: "m".to_owned(),
    };
    let mut whole = routed(message());
    let head = answer_head("200", "application/json", false);
    let out = feed(&mut whole, [head, answer_body(CHAT, true)]);
    let said = told(&out);
    assert_eq!(said[..3], ["answered 200", "first byte", "answer head"]);
    assert!(
        said[3].contains("\"type\":\"message\"") && said[3].ends_with('|'),
        "{said:?}"
    );
    let Effect::Send(head) = &out[2] else {
        panic!("{out:?}");
    };
    let Some(Response::ResponseHeaders(reply)) = &head.response else {
        panic!("{head:?}");
    };
    let edit = reply.response.as_ref().unwrap().header_mutation.as_ref();
    assert_eq!(edit.unwrap().remove_headers, ["content-length"]);
    let mut error = routed(message());
    let head = answer_head("429", "application/json", false);
    let out = feed(
        &mut error,
        [head, answer_body(r#"{"message":"busy"}"#, true)],
    );
    let said = told(&out);
    assert!(
        said[2].contains("rate_limit_error") && said[2].contains("busy"),
        "{said:?}"
    );
    let mut broken = routed(message());
    let head = answer_head("200", "application/json", false);
    let out = feed(&mut broken, [head, answer_body("[]", true)]);
    assert_eq!(told(&out), ["answered 200", "first byte", "untranslatable"]);
    let mut events = routed(message());
    let pieces = [
        answer_head("200", "text/event-stream", false),
        answer_body(
            "data: {\"id\":\"x\",\"choices\":[{\"delta\":{\"content\":\"hi\"},\"finish_reason\":\"stop\"}]}\n\n",
            false,
        ),
        answer_body("data: [DONE]\n\n", true),
    ];
    let said = told(&feed(&mut events, pieces)).concat();
    for part in ["message_start", "text_delta", "message_stop", "|"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn logprobs_are_merged() {
    let known =
        PromptLogprobs::of_answer(br#"{"meta_info":{"input_token_logprobs":[[-1.0,7,null]]}}"#);
    let mut exchange = routed(Rewrite::Nothing);
    exchange.learn_logprobs(&Arc::new(known));
    let decode = r#"{"meta_info":{"input_token_logprobs":[[-2.0,8,null]]}}"#;
    let head = answer_head("200", "application/json", false);
    let said = told(&feed(&mut exchange, [head, answer_body(decode, true)]));
    assert!(
        said.concat().contains("[[-1.0,7,null],[-2.0,8,null]]"),
        "{said:?}"
    );
}

fn struct_of(name: &str, kind: Kind) -> Struct {
    Struct {
        fields: [(name.to_owned(), Value { kind: Some(kind) })].into(),
    }
}

#[test]
fn metadata_is_read_as_gateways_write_it() {
    let text = |text: &str| Kind::StringValue(text.to_owned());
    let list = |items: &[&str]| {
        Kind::ListValue(ListValue {
            values: items
                .iter()
                .map(|item| Value {
                    kind: Some(text(item)),
                })
                .collect(),
        })
    };
    for (hint, expected) in [
        (text("a:1, b:2,,"), vec!["a:1", "b:2"]),
        (list(&["a:1", "b:2, c:3"]), vec!["a:1", "b:2", "c:3"]),
        (text(""), vec![]),
        (list(&[]), vec![]),
        (Kind::NumberValue(1.0), vec![]),
    ] {
        let mut first = request_head(true);
        first.metadata_context = Some(core::Metadata {
            filter_metadata: [(SUBSET_NAMESPACE.to_owned(), struct_of(SUBSET, hint))].into(),
        });
        let out = feed(&mut exchange(), [first]);
        let Effect::Decide(request) = &out[0] else {
            panic!("{out:?}");
        };
        assert_eq!(request.subset.as_deref().unwrap(), expected);
    }
    let mut exchange = Exchange::new(LIMIT, true);
    feed(&mut exchange, [request_head(true)]);
    exchange.route(plan_of(""), &mut Vec::new());
    let mut head = answer_head("503", "text/plain", true);
    head.metadata_context = Some(core::Metadata {
        filter_metadata: [(
            DESTINATION_NAMESPACE.to_owned(),
            struct_of(SERVED, text("b:2")),
        )]
        .into(),
    });
    let details = struct_of("response.code_details", text("no_healthy_upstream"));
    head.attributes = [("envoy.filters.http.ext_proc".to_owned(), details)].into();
    let out = feed(&mut exchange, [head]);
    let (Effect::Answer(answer), Effect::Send(reply)) = (&out[0], &out[1]) else {
        panic!("{out:?}");
    };
    assert_eq!(answer.served.as_deref(), Some("b:2"));
    assert_eq!(answer.own.as_deref(), Some("no_healthy_upstream"));
    assert!(format!("{reply:?}").contains("x-conformance-test-served-endpoint"));
}

fn any_message() -> impl Strategy<Value = ProcessingRequest> {
    let text = prop::collection::vec(any::<u8>(), 0..40);
    (0..7_u8, text, any::<bool>(), 0..6_i32).prop_map(|(kind, text, ends, mode)| {
        let body = HttpBody {
            body: text.into(),
            end_of_stream: ends,
        };
        match kind {
            0 => request_head(ends),
            1 => with_modes(
                request_head(ends),
                BodySendMode::try_from(mode).unwrap(),
                BodySendMode::try_from((mode * 5 + 4) % 6).unwrap(),
                ends,
            ),
            2 => message(Request::RequestBody(body)),
            3 => trailers(if ends { Way::Request } else { Way::Response }),
            4 => answer_head("200", "text/event-stream", ends),
            5 => answer_head("500", "application/json", ends),
            _ => message(Request::ResponseBody(body)),
        }
    })
}

proptest! {
    /// Whatever comes in whatever order: nothing panics, nothing is said after the end, a decision is asked for once, and
    /// the body's last piece is marked as such exactly once.
    #[test]
    fn any_order_is_survived(messages in prop::collection::vec(any_message(), 0..12), refuses in any::<bool>()) {
        let mut exchange = Exchange::new(64, false);
        let (mut decided, mut ends) = (0, 0);
        for one in messages {
            let mut out = Vec::new();
            exchange.take(one, &mut out);
            let mut more = Vec::new();
            for effect in &out {
                match effect {
                    Effect::Decide(_) => {
                        decided += 1;
                        if refuses {
                            exchange.refuse(StatusCode::OK, &HeaderMap::new(), Bytes::new(), &mut more);
                        } else {
                            exchange.route(plan_of("body"), &mut more);
                        }
                    }
                    Effect::Refuse(_) | Effect::AbortedFirst(_) | Effect::Untranslatable => {
                        exchange.refuse(StatusCode::OK, &HeaderMap::new(), Bytes::new(), &mut more);
                    }
                    _ => {}
                }
            }
            out.extend(more);
            let said = told(&out);
            ends += said.iter().filter(|line| line.starts_with("answer +") && line.ends_with('|')).count();
            prop_assert!(exchange.held_bytes() <= 64);
            if said.iter().any(|line| line.starts_with("violation") || line == "end") {
                break;
            }
        }
        prop_assert!(decided <= 1);
        prop_assert!(ends <= 1);
        let _ = exchange.closing();
    }
}
