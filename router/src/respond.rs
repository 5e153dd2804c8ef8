//! Turns outcomes into HTTP answers. No other module picks a status code.
#![forbid(unsafe_code)]

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde_json::json;

use crate::overview::Overview;
use crate::pick::Picker;
use crate::pick::notes::SHOWN_DEFAULT;
use crate::pool::Role;
use crate::proxy::deadline::Stage;
use crate::proxy::headers::strip_connection_headers;
use crate::proxy::leg::{LegCause, LegFailure, WorkerError};
use crate::proxy::shape::ShapeError;
use crate::proxy::stream::ReplyBody;
use crate::ui::{self, Asset};

/// What a client turned away at the request bound is told to wait, in seconds: live requests end all the time.
const RETRY_AFTER_SECONDS: &str = "1";

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// The body is not what the endpoint takes.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The body exceeds the limit.
    #[error("the request body is larger than the limit of {limit} bytes")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The body ended early or was framed wrongly.
    #[error("the request body could not be read")]
    BodyBroken,
    /// The body stopped coming.
    #[error("the request body did not arrive in time")]
    BodySilent,
    /// The body is compressed.
    #[error("the request body must be plain JSON, without a Content-Encoding")]
    Encoding,
    /// As many requests wait as may, and none of them is less important.
    #[error("the router is full, and so is its queue; try again")]
    QueueFull,
    /// A request waited as long as it may.
    #[error("no worker became free in time; try again")]
    QueueTimeout,
    /// No worker of a role is there, or none of them is ready.
    #[error("no {role} worker is ready; try again")]
    NoWorker {
        /// The role.
        role: Role,
    },
    /// Too many bytes of request bodies are waiting.
    #[error("the router holds its limit of {limit} bytes of waiting request bodies; try again")]
    BuffersFull {
        /// The limit in bytes.
        limit: usize,
    },
    /// A leg failed.
    #[error("{0}")]
    Leg(LegFailure),
    /// An answer could not be put together.
    #[error("the answer broke off: {0}")]
    Broken(String),
    /// A time limit was exceeded.
    #[error(transparent)]
    Timeout(Stage),
    /// No worker answered a question in time.
    #[error("no worker answered in time")]
    Silent,
    /// The path is not served.
    #[error("this router does not serve {path}")]
    NoEndpoint {
        /// The path.
        path: String,
    },
    /// Served by the router's own front, but not through Envoy.
    #[error("{what} cannot be served through Envoy; {fix}")]
    NotThroughEnvoy {
        /// What the request asks for.
        what: &'static str,
        /// What the operator can do.
        fix: &'static str,
    },
    /// No worker that may be chosen is ready.
    #[error("no ready pair of workers may serve this request; try again")]
    NoneEligible,
    /// Envoy is set up so that the picker cannot work.
    #[error("Envoy's request_body_mode is {mode}; set it to FULL_DUPLEX_STREAMED or BUFFERED")]
    EnvoyMode {
        /// What it is set to.
        mode: &'static str,
    },
    /// The path is served for another method.
    #[error("this endpoint takes {allowed} requests only")]
    Method {
        /// The method it takes.
        allowed: &'static str,
    },
}

impl From<LegFailure> for RouteError {
    fn from(failure: LegFailure) -> Self {
        Self::Leg(failure)
    }
}

impl RouteError {
    /// The status a client gets, and the error type in OpenAI's vocabulary.
    fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Shape(_) | Self::BodyBroken => (StatusCode::BAD_REQUEST, "invalid_request_error"),
            Self::BodyTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error"),
            Self::BodySilent => (StatusCode::REQUEST_TIMEOUT, "invalid_request_error"),
            Self::Encoding => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error"),
            Self::QueueFull => (StatusCode::TOO_MANY_REQUESTS, "overloaded_error"),
            Self::QueueTimeout
            | Self::NoWorker { .. }
            | Self::BuffersFull { .. }
            | Self::NoneEligible => (StatusCode::SERVICE_UNAVAILABLE, "overloaded_error"),
            Self::Broken(_) => (StatusCode::BAD_GATEWAY, "worker_error"),
            Self::Leg(failure) => match &failure.cause {
                LegCause::Status(error) => (worker_status(error.status), "worker_error"),
                LegCause::Aborted(abort) => (
                    StatusCode::from_u16(abort.status).unwrap_or(StatusCode::BAD_GATEWAY),
                    "worker_error",
                ),
                LegCause::Connect(_) | LegCause::Reset(_) => {
                    (StatusCode::BAD_GATEWAY, "worker_error")
                }
                LegCause::Stall => (StatusCode::GATEWAY_TIMEOUT, "timeout_error"),
            },
            Self::Timeout(_) | Self::Silent => (StatusCode::GATEWAY_TIMEOUT, "timeout_error"),
            Self::NoEndpoint { .. } | Self::NotThroughEnvoy { .. } => {
                (StatusCode::NOT_IMPLEMENTED, "unsupported_endpoint")
            }
            Self::EnvoyMode { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "configuration_error"),
            Self::Method { .. } => (StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error"),
        }
    }

    fn json(&self) -> String {
        let (status, kind) = self.status();
        let message = self.to_string();
        json!({"error": {"message": message, "type": kind, "param": null, "code": status.as_u16()}})
            .to_string()
    }
}

/// A worker's error status is the client's; a status that is neither success nor error (a redirect) makes no sense from a
/// worker.
fn worker_status(status: StatusCode) -> StatusCode {
    if status.is_client_error() || status.is_server_error() {
        status
    } else {
        StatusCode::BAD_GATEWAY
    }
}

/// The answer to a request that failed before anything was sent.
pub fn respond(error: RouteError) -> Response<ReplyBody> {
    let (status, _) = error.status();
    let json = error.json();
    let mut response = match error {
        RouteError::Leg(LegFailure {
            cause: LegCause::Status(error),
            ..
        }) => pass_on(*error, status, json),
        RouteError::Method { allowed } => {
            let mut response = whole(status, "application/json", json);
            let allowed = HeaderValue::from_static(allowed);
            response.headers_mut().insert(ALLOW, allowed);
            response
        }
        _ => whole(status, "application/json", json),
    };
    let is_full = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    );
    if is_full && !response.headers().contains_key(RETRY_AFTER) {
        let seconds = HeaderValue::from_static(RETRY_AFTER_SECONDS);
        response.headers_mut().insert(RETRY_AFTER, seconds);
    }
    response
}

/// The same for Anthropic's clients, in their form.
pub fn respond_anthropic(error: RouteError) -> Response<ReplyBody> {
    let (status, _) = error.status();
    let message = match &error {
        RouteError::Leg(LegFailure {
            cause: LegCause::Status(error),
            ..
        }) => words_of(error),
        _ => None,
    };
    let message = message.unwrap_or_else(|| error.to_string());
    let json = anthropic_json(status, &message);
    let mut response = respond(error);
    let headers = response.headers_mut();
    headers.remove(CONTENT_LENGTH);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.map(|_| ReplyBody::Whole(Full::new(json.into())))
}

fn anthropic_json(status: StatusCode, message: &str) -> String {
    let kind = match status.as_u16() {
        400 | 405 | 415 | 422 => "invalid_request_error",
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": message}}).to_string()
}

/// A worker's error answer in the form of Anthropic's clients.
pub fn anthropic_error(status: StatusCode, body: &[u8]) -> String {
    let message = words_in(body).unwrap_or_else(|| format!("the worker answered {status}"));
    anthropic_json(status, &message)
}

/// The message in a worker's error, in any of the forms SGLang uses.
fn words_of(error: &WorkerError) -> Option<String> {
    words_in(error.body.as_ref()?)
}

fn words_in(body: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(body).ok()?;
    let places = ["/error/message", "/message", "/detail", "/error"];
    let mut found = places
        .iter()
        .filter_map(|place| json.pointer(place)?.as_str());
    found.next().map(str::to_owned)
}

/// The worker's own words, or `otherwise` if they did not arrive.
fn pass_on(error: WorkerError, status: StatusCode, otherwise: String) -> Response<ReplyBody> {
    match error.body {
        Some(body) if status == error.status => {
            let mut headers = error.headers;
            strip_connection_headers(&mut headers);
            headers.remove(CONTENT_LENGTH);
            let mut response = Response::new(ReplyBody::Whole(Full::new(body)));
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            response
        }
        _ => whole(status, "application/json", otherwise),
    }
}

/// The in-band form of an error, for event streams whose head is gone. `is_open` says that an event was cut in the
/// middle and must be closed first.
pub fn error_event(error: &RouteError, is_open: bool) -> Bytes {
    let close = if is_open { "\n\n" } else { "" };
    format!("{close}data: {}\n\n", error.json()).into()
}

/// The answer to `/health`.
pub fn alive() -> Response<ReplyBody> {
    whole(
        StatusCode::OK,
        "text/plain; charset=utf-8",
        "ok\n".to_owned(),
    )
}

/// The answer to `/ready`: a pair can be formed, and the router is not about to stop.
pub fn readiness(prefills: usize, decodes: usize, is_draining: bool) -> Response<ReplyBody> {
    let is_ready = prefills > 0 && decodes > 0 && !is_draining;
    let status = if is_ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let state = json!({
        "ready": is_ready,
        "ready_prefill_workers": prefills,
        "ready_decode_workers": decodes,
        "draining": is_draining,
    });
    whole(status, "application/json", state.to_string())
}

/// A part of the page at `/ui`. It may load its own parts and nothing else, and nobody may frame it.
pub fn asset(asset: Asset) -> Response<ReplyBody> {
    let (kind, text) = asset.content();
    let mut response = whole(StatusCode::OK, kind, text.to_owned());
    let headers = response.headers_mut();
    for (name, value) in ui::HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The answer to `/debug/state`.
pub fn state(overview: &Overview) -> Response<ReplyBody> {
    match serde_json::to_string(overview) {
        Ok(json) => {
            let mut response = whole(StatusCode::OK, "application/json", json);
            let fresh = HeaderValue::from_static("no-store");
            response.headers_mut().insert(CACHE_CONTROL, fresh);
            response
        }
        Err(error) => respond(RouteError::Broken(error.to_string())),
    }
}

/// The answer to `/debug/decisions`, of which `query` may say how many are wanted (`limit=10`).
pub fn decisions(picker: &Picker, query: Option<&str>) -> Response<ReplyBody> {
    let limit = query.and_then(|query| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let (_, limit) = pairs.find(|(name, _)| *name == "limit")?;
        limit.parse().ok()
    });
    let notes = picker.notes(limit.unwrap_or(SHOWN_DEFAULT));
    let now = picker.now();
    let decisions: Vec<_> = notes.iter().map(|note| note.json(now)).collect();
    let text = json!({ "decisions": decisions }).to_string();
    whole(StatusCode::OK, "application/json", text)
}

/// The answer to `/metrics`.
pub fn metrics(text: String) -> Response<ReplyBody> {
    whole(
        StatusCode::OK,
        "text/plain; version=0.0.4; charset=utf-8",
        text,
    )
}

fn whole(status: StatusCode, kind: &'static str, body: String) -> Response<ReplyBody> {
    let mut response = Response::new(ReplyBody::Whole(Full::new(body.into())));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
