//! Envoy's messages in the router's own words, and back.
#![forbid(unsafe_code)]

use bytes::Bytes;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{HeaderMap, StatusCode};
use prost_types::value::Kind;
use prost_types::{Struct, Value};

use super::protocol::HttpStatus;
use super::protocol::core::header_value_option::HeaderAppendAction;
use super::protocol::core::{self, HeaderValueOption};
use super::protocol::ext_proc::body_mutation::Mutation;
use super::protocol::ext_proc::processing_response::Response;
use super::protocol::ext_proc::{
    BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, ImmediateResponse,
    ProcessingRequest, ProcessingResponse, StreamedBodyResponse, TrailersResponse,
};

/// Where the picker tells Envoy the endpoints, as a header and in the metadata of [`DESTINATION_NAMESPACE`].
pub const DESTINATION: &str = "x-gateway-destination-endpoint";

/// The metadata namespace of [`DESTINATION`] and [`SERVED`].
pub const DESTINATION_NAMESPACE: &str = "envoy.lb";

/// Where Envoy tells which of the endpoints served the request.
pub const SERVED: &str = "x-gateway-destination-endpoint-served";

/// The metadata namespace of [`SUBSET`].
pub const SUBSET_NAMESPACE: &str = "envoy.lb.subset_hint";

/// Where Envoy tells which endpoints may be chosen.
pub const SUBSET: &str = "x-gateway-destination-endpoint-subset";

/// Most endpoints of a subset hint that are looked at: as many as a fleet has members.
pub const SUBSET_MAX: usize = crate::discover::MEMBERS_MAX;

/// Envoy takes at most 64 KiB of a body in one message; less leaves room for what is around it.
pub const CHUNK_BYTES_MAX: usize = 62 << 10;

/// The attribute that tells why Envoy answered by itself. Sent if `response_attributes` asks for it.
const CODE_DETAILS: &str = "response.code_details";

/// The head of a request or response as Envoy tells it.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// `:method`, empty in a response.
    pub method: String,
    /// `:path` with its query, empty in a response.
    pub path: String,
    /// `:status`, `None` in a request.
    pub status: Option<StatusCode>,
    /// The others.
    pub headers: HeaderMap,
}

impl Head {
    /// Reads Envoy's list. What is no header is left out: Envoy has checked it, and passes it on by itself.
    pub fn of(map: Option<core::HeaderMap>) -> Self {
        let mut head = Self::default();
        for core::HeaderValue {
            key,
            value,
            raw_value,
        } in map.map(|map| map.headers).unwrap_or_default()
        {
            let raw = if raw_value.is_empty() {
                Bytes::from(value)
            } else {
                raw_value
            };
            let text = || String::from_utf8_lossy(&raw).into_owned();
            match key.as_str() {
                ":method" => head.method = text(),
                ":path" => head.path = text(),
                ":status" => head.status = StatusCode::from_bytes(&raw).ok(),
                _ => {
                    if let (Ok(name), Ok(value)) = (
                        HeaderName::try_from(key.as_str()),
                        HeaderValue::from_maybe_shared(raw),
                    ) {
                        head.headers.append(name, value);
                    }
                }
            }
        }
        head
    }
}

fn field<'a>(within: &'a Struct, name: &str) -> Option<&'a Kind> {
    within.fields.get(name)?.kind.as_ref()
}

fn metadata<'a>(message: &'a ProcessingRequest, namespace: &str) -> Option<&'a Struct> {
    let metadata = message.metadata_context.as_ref()?;
    metadata.filter_metadata.get(namespace)
}

/// The endpoints that may be chosen, if Envoy limits them: from a list, or from text with commas.
pub fn subset(message: &ProcessingRequest) -> Option<Vec<String>> {
    let hint = field(metadata(message, SUBSET_NAMESPACE)?, SUBSET)?;
    Some(match hint {
        Kind::StringValue(text) => endpoints(text),
        Kind::ListValue(list) => list
            .values
            .iter()
            .filter_map(|value| match &value.kind {
                Some(Kind::StringValue(text)) => Some(endpoints(text)),
                _ => None,
            })
            .flatten()
            .take(SUBSET_MAX)
            .collect(),
        // Whatever else it is, it names no endpoint.
        _ => Vec::new(),
    })
}

/// The endpoints in a text with commas.
pub fn endpoints(text: &str) -> Vec<String> {
    let named = text.split(',').map(str::trim);
    named
        .filter(|name| !name.is_empty())
        .take(SUBSET_MAX)
        .map(str::to_owned)
        .collect()
}

/// The endpoint that served the request, if Envoy tells.
pub fn served(message: &ProcessingRequest) -> Option<String> {
    match field(metadata(message, DESTINATION_NAMESPACE)?, SERVED)? {
        Kind::StringValue(endpoint) => Some(endpoint.clone()),
        _ => None,
    }
}

/// Why Envoy answered by itself, if it did and tells. A worker's answer has the details `via_upstream`.
pub fn own_answer(message: &ProcessingRequest) -> Option<String> {
    let mut attributes = message.attributes.values();
    match attributes.find_map(|attributes| field(attributes, CODE_DETAILS))? {
        Kind::StringValue(details) if details != "via_upstream" && !details.is_empty() => {
            Some(details.clone())
        }
        _ => None,
    }
}

/// What is to change in a head.
#[derive(Clone, Debug, Default)]
pub struct HeadEdit {
    /// Headers with their new values, pseudo headers among them.
    pub set: Vec<(String, HeaderValue)>,
    /// Headers to take out.
    pub remove: Vec<String>,
}

impl HeadEdit {
    /// Adds a header with its new value.
    pub fn set(&mut self, name: impl Into<String>, value: HeaderValue) {
        self.set.push((name.into(), value));
    }

    fn into_mutation(self) -> Option<HeaderMutation> {
        if self.set.is_empty() && self.remove.is_empty() {
            return None;
        }
        let mut seen = Vec::with_capacity(self.set.len());
        let set_headers = self.set.into_iter().map(|(name, value)| {
            // Of several values of one name the first one replaces what there was.
            let is_first = !seen.contains(&name);
            if is_first {
                seen.push(name.clone());
            }
            HeaderValueOption {
                header: Some(core::HeaderValue {
                    key: name,
                    value: String::new(),
                    raw_value: Bytes::copy_from_slice(value.as_bytes()),
                }),
                append_action: if is_first {
                    HeaderAppendAction::OverwriteIfExistsOrAdd
                } else {
                    HeaderAppendAction::AppendIfExistsOrAdd
                }
                .into(),
            }
        });
        Some(HeaderMutation {
            set_headers: set_headers.collect(),
            remove_headers: self.remove,
        })
    }
}

/// The common part of answers.
pub fn common(edit: HeadEdit, body: Option<Mutation>, reroutes: bool) -> CommonResponse {
    CommonResponse {
        header_mutation: edit.into_mutation(),
        body_mutation: body.map(|mutation| BodyMutation {
            mutation: Some(mutation),
        }),
        clear_route_cache: reroutes,
    }
}

/// Which of the two ways of a request a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client.
    Request,
    /// To the client.
    Response,
}

/// An answer to a head.
pub fn headers_reply(way: Way, response: CommonResponse) -> ProcessingResponse {
    let reply = HeadersResponse {
        response: Some(response),
    };
    of(match way {
        Way::Request => Response::RequestHeaders(reply),
        Way::Response => Response::ResponseHeaders(reply),
    })
}

/// An answer to a piece of a body.
pub fn body_reply(way: Way, response: CommonResponse) -> ProcessingResponse {
    let reply = BodyResponse {
        response: Some(response),
    };
    of(match way {
        Way::Request => Response::RequestBody(reply),
        Way::Response => Response::ResponseBody(reply),
    })
}

/// An answer to trailers, which never change.
pub fn trailers_reply(way: Way) -> ProcessingResponse {
    let reply = TrailersResponse::default();
    of(match way {
        Way::Request => Response::RequestTrailers(reply),
        Way::Response => Response::ResponseTrailers(reply),
    })
}

/// The pieces in which a body is streamed to Envoy; `ends` says that nothing follows, not even trailers.
pub fn streamed(way: Way, mut body: Bytes, ends: bool) -> impl Iterator<Item = ProcessingResponse> {
    let mut is_over = false;
    std::iter::from_fn(move || {
        if is_over {
            return None;
        }
        let piece = body.split_to(body.len().min(CHUNK_BYTES_MAX));
        is_over = body.is_empty();
        let mutation = Mutation::StreamedResponse(StreamedBodyResponse {
            body: piece,
            end_of_stream: ends && is_over,
        });
        Some(body_reply(
            way,
            common(HeadEdit::default(), Some(mutation), false),
        ))
    })
}

/// An answer to the client in the place of a worker's.
pub fn immediate(
    status: StatusCode,
    headers: &HeaderMap,
    body: Bytes,
    details: &'static str,
) -> ProcessingResponse {
    let mut edit = HeadEdit::default();
    for (name, value) in headers {
        edit.set(name.as_str(), value.clone());
    }
    of(Response::ImmediateResponse(ImmediateResponse {
        status: Some(HttpStatus {
            code: i32::from(status.as_u16()),
        }),
        headers: edit.into_mutation(),
        body,
        details: details.to_owned(),
    }))
}

/// The metadata that names the endpoints.
pub fn destination_metadata(endpoints: &str) -> Struct {
    let text = |kind| Value { kind: Some(kind) };
    let inner = Struct {
        fields: [(
            DESTINATION.to_owned(),
            text(Kind::StringValue(endpoints.to_owned())),
        )]
        .into(),
    };
    Struct {
        fields: [(
            DESTINATION_NAMESPACE.to_owned(),
            text(Kind::StructValue(inner)),
        )]
        .into(),
    }
}

fn of(response: Response) -> ProcessingResponse {
    ProcessingResponse {
        response: Some(response),
        dynamic_metadata: None,
    }
}
