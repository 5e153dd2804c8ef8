//! Server-sent events: one JSON per event, `[DONE]` at the end.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt as _};
use serde::Serialize;

/// One event.
pub(super) fn event(data: &impl Serialize) -> String {
    let json = serde_json::to_string(data).expect("invariant: answers have string keys only");
    format!("data: {json}\n\n")
}

/// A response that sends the events as they come, then `[DONE]`.
pub(super) fn response(events: impl Stream<Item = String> + Send + 'static) -> Response {
    let done = stream::once(std::future::ready("data: [DONE]\n\n".to_owned()));
    let body = Body::from_stream(events.chain(done).map(Ok::<_, Infallible>));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, body).into_response()
}
