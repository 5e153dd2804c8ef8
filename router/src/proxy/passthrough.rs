//! Endpoints that one worker can answer by itself.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Response, StatusCode};

use super::Front;
use super::headers::{strip_connection_headers, strip_for_worker};
use super::leg::LegFailure;
use super::request::{read_body, refuse_encoding};
use super::stream::ReplyBody;
use crate::pool::Role;
use crate::respond::RouteError;

/// Questions are answered at once unless a worker hangs.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Which workers can answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Any one knows: models, settings, the tokenizer.
    Anyone,
    /// Only workers outside the pairs: what has no decode step, or is not split in two.
    Others,
    /// One of the decode workers has it, the others do not know it.
    Owner,
}

const ANYONE: [Role; 3] = [Role::Other, Role::Prefill, Role::Decode];

impl Asked {
    /// Who answers `method` on `path`; `None` if this router does not serve it.
    pub fn of(method: &Method, path: &str) -> Option<Self> {
        let is_question = method == Method::GET || method == Method::HEAD;
        if is_question {
            return match path {
                "/v1/models" | "/model_info" | "/server_info" | "/get_model_info"
                | "/get_server_info" | "/version" => Some(Self::Anyone),
                _ if path.starts_with("/v1/models/") => Some(Self::Anyone),
                _ if path.starts_with("/v1/responses/") => Some(Self::Owner),
                _ => None,
            };
        }
        if method != Method::POST {
            return None;
        }
        match path {
            "/tokenize"
            | "/v1/tokenize"
            | "/detokenize"
            | "/v1/detokenize"
            | "/v1/messages/count_tokens" => Some(Self::Anyone),
            "/v1/embeddings" | "/encode" | "/v1/rerank" | "/rerank" | "/v1/score" | "/classify"
            | "/v1/classify" => Some(Self::Others),
            _ if path.starts_with("/v1/responses/") && path.ends_with("/cancel") => {
                Some(Self::Owner)
            }
            _ => None,
        }
    }

    /// The kinds of workers to ask, in this order.
    pub fn roles(self) -> &'static [Role] {
        match self {
            Self::Anyone => &ANYONE,
            Self::Others => &[Role::Other],
            Self::Owner => &[Role::Decode],
        }
    }
}

/// The paths of questions, to tell a wrong method from an unknown path.
pub fn is_question(path: &str) -> bool {
    Asked::of(&Method::GET, path).is_some()
}

/// Asks one worker after the other until one answers.
///
/// # Errors
/// The failure of the last worker asked, or [`RouteError::NoEndpoint`] when no worker of the kind is configured.
pub async fn forward(
    front: &Arc<Front>,
    asked: Asked,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, RouteError> {
    let (mut parts, body) = request.into_parts();
    let roles = asked.roles().iter();
    let now = front.pool.now();
    let workers: Vec<_> = roles.flat_map(|role| now.candidates(*role, &[])).collect();
    if workers.is_empty() {
        let path = parts.uri.path().to_owned();
        return Err(RouteError::NoEndpoint { path });
    }
    let (body, _memory) = if parts.method == Method::POST {
        refuse_encoding(&parts.headers)?;
        let (body, memory) = read_body(front, body).await?;
        (body, Some(memory))
    } else {
        (Bytes::new(), None)
    };
    strip_for_worker(&mut parts.headers, false);
    let path = parts.uri.into_parts().path_and_query;
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    let mut last = RouteError::Silent;
    let mut not_found = None;
    for worker in workers {
        let exchange = front.client.send(
            worker,
            parts.method.clone(),
            path.clone(),
            parts.headers.clone(),
            body.clone(),
        );
        // An embedding of many texts may take long; a question may not.
        let answer = if asked == Asked::Others {
            Ok(exchange.await)
        } else {
            tokio::time::timeout(ANSWER_TIMEOUT, exchange).await
        };
        match answer {
            Ok(Ok(response)) => {
                if worker.role() == Role::Other && response.status().is_success() {
                    worker.succeeded();
                }
                let mut response = response.map(ReplyBody::Worker);
                strip_connection_headers(response.headers_mut());
                if asked == Asked::Owner && response.status() == StatusCode::NOT_FOUND {
                    not_found = Some(response);
                    continue;
                }
                return Ok(response);
            }
            Ok(Err(error)) => last = LegFailure::unanswered(worker, &error).into(),
            Err(_) => last = RouteError::Silent,
        }
    }
    not_found.ok_or(last)
}
