//! Reads a client's request within bounds.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::{Body, Incoming};
use hyper::header::CONTENT_ENCODING;
use hyper::http::uri::PathAndQuery;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Front;
use super::headers::strip_for_worker;
use super::pair::PairRequest;
use super::shape::{self, PairEndpoint};
use crate::respond::RouteError;

/// A client that sends nothing of its body for this long is given up: its connection and buffer are worth more.
pub const BODY_SILENCE_MAX: Duration = Duration::from_secs(60);

/// The unit in which body memory is counted.
pub const KIB: usize = 1024;

/// Memory set aside on the word of a Content-Length alone; the rest must arrive first.
const BODY_TRUSTED_BYTES: usize = 1 << 20;

/// Reads and understands a generation request.
///
/// # Errors
/// [`RouteError`] when the body is too large, broken, slow, encoded, or not what the endpoint takes.
pub async fn read(
    front: &Arc<Front>,
    endpoint: PairEndpoint,
    request: Request<Incoming>,
) -> Result<PairRequest, RouteError> {
    let (mut parts, body) = request.into_parts();
    if let Some(encoding) = parts.headers.get(CONTENT_ENCODING)
        && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return Err(RouteError::Encoding);
    }
    let (body, memory) = read_body(front, body).await?;
    let read_at = Instant::now();
    let shape = shape::read(endpoint, &body)?;
    strip_for_worker(&mut parts.headers);
    let path = match parts.uri.query() {
        None => PathAndQuery::from_static(endpoint.path()),
        Some(_) => parts
            .uri
            .into_parts()
            .path_and_query
            .unwrap_or_else(|| PathAndQuery::from_static(endpoint.path())),
    };
    Ok(PairRequest {
        path,
        headers: parts.headers,
        body,
        memory,
        shape,
        read_at,
    })
}

async fn read_body(
    front: &Front,
    mut body: Incoming,
) -> Result<(Bytes, OwnedSemaphorePermit), RouteError> {
    let limit = front.config.body_bytes_max;
    let mut memory = reserve(front, 0)?;
    let too_large = RouteError::BodyTooLarge { limit };
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > limit {
        return Err(too_large);
    }
    let mut whole = Bytes::new();
    let mut joined = BytesMut::new();
    loop {
        let frame = tokio::time::timeout(BODY_SILENCE_MAX, body.frame());
        let frame = match frame.await {
            Err(_) => return Err(RouteError::BodySilent),
            Ok(None) => break,
            Ok(Some(frame)) => frame.map_err(|_| RouteError::BodyBroken)?,
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if whole.len() + joined.len() + data.len() > limit {
            return Err(too_large);
        }
        let needed = (whole.len() + joined.len() + data.len()).div_ceil(KIB);
        memory.merge(reserve(front, needed - memory.num_permits())?);
        if whole.is_empty() && joined.is_empty() {
            // Most bodies arrive in one piece and need no copy.
            whole = data;
            continue;
        }
        if joined.is_empty() {
            joined.reserve(
                announced
                    .min(BODY_TRUSTED_BYTES)
                    .max(whole.len() + data.len()),
            );
            joined.extend_from_slice(&std::mem::take(&mut whole));
        }
        joined.extend_from_slice(&data);
    }
    Ok((
        if joined.is_empty() {
            whole
        } else {
            joined.freeze()
        },
        memory,
    ))
}

fn reserve(front: &Front, kib: usize) -> Result<OwnedSemaphorePermit, RouteError> {
    let full = RouteError::BuffersFull {
        limit: front.config.buffered_bytes_max,
    };
    let Ok(kib) = u32::try_from(kib) else {
        return Err(full);
    };
    Arc::clone(&front.body_memory)
        .try_acquire_many_owned(kib)
        .map_err(|_| full)
}
