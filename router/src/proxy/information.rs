//! Questions about the model that any one worker can answer.
#![forbid(unsafe_code)]

use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::http::uri::PathAndQuery;
use hyper::{Request, Response};

use super::Front;
use super::headers::{strip_connection_headers, strip_for_worker};
use super::leg::LegFailure;
use super::stream::ReplyBody;
use crate::pool::Role;
use crate::respond::RouteError;

/// Workers answer these at once unless they hang.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The paths, including the older names of two of them.
pub const PATHS: [&str; 5] = [
    "/v1/models",
    "/model_info",
    "/server_info",
    "/get_model_info",
    "/get_server_info",
];

/// Asks one worker after the other until one answers; prefill workers first.
///
/// # Errors
/// The failure of the last worker asked.
pub async fn forward(
    front: &Front,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, RouteError> {
    let (mut parts, _) = request.into_parts();
    strip_for_worker(&mut parts.headers);
    let path = parts.uri.into_parts().path_and_query;
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    let mut last = RouteError::Silent;
    let roles = [Role::Prefill, Role::Decode];
    for worker in roles
        .into_iter()
        .flat_map(|role| front.pool.candidates(role, None))
    {
        let headers = parts.headers.clone();
        let exchange = front.client.send(
            worker,
            parts.method.clone(),
            path.clone(),
            headers,
            Bytes::new(),
        );
        match tokio::time::timeout(ANSWER_TIMEOUT, exchange).await {
            Ok(Ok(response)) => {
                let mut response = response.map(ReplyBody::Worker);
                strip_connection_headers(response.headers_mut());
                return Ok(response);
            }
            Ok(Err(error)) => last = LegFailure::unanswered(worker, &error).into(),
            Err(_) => last = RouteError::Silent,
        }
    }
    Err(last)
}
