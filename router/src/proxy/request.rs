//! Reads a client's request within bounds.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_ENCODING, HeaderValue};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Request};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::Front;
use super::headers::{EXPLAIN_HEADER, RANK_HEADER, STICKY_HEADER, strip_for_worker};
use super::pair::PairRequest;
use super::shape::{self, PairEndpoint, Shape, Trust};
use super::{messages, models};
use crate::config::scheduling::Explain;
use crate::metrics::Route;
use crate::observe::Trail;
use crate::respond::RouteError;

/// A client that sends nothing of its body for this long is given up: its connection and buffer are worth more.
pub const BODY_SILENCE_MAX: Duration = Duration::from_secs(60);

/// Headers of Anthropic's clients that mean nothing to a chat endpoint.
const ANTHROPIC_HEADERS: [&str; 2] = ["anthropic-version", "anthropic-beta"];

/// The unit in which body memory is counted.
pub const KIB: usize = 1024;

/// Memory set aside on the word of a Content-Length alone; the rest must arrive first.
const BODY_TRUSTED_BYTES: usize = 1 << 20;

/// What a path takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// The bodies that SGLang takes there.
    Native(PairEndpoint),
    /// Anthropic's messages, which become chat.
    Messages,
}

/// Reads and understands a generation request.
///
/// # Errors
/// [`RouteError`] when the body is too large, broken, slow, encoded, or not what the endpoint takes.
pub async fn read(
    front: &Arc<Front>,
    dialect: Dialect,
    request: Request<Incoming>,
) -> Result<PairRequest, RouteError> {
    let (parts, body) = request.into_parts();
    refuse_encoding(&parts.headers)?;
    let (body, memory) = read_body(front, body).await?;
    understand(front, dialect, parts, body, memory)
}

/// Understands a generation request whose body is here, taking `memory` in [`Front::body_memory`].
///
/// # Errors
/// [`RouteError`] when the body is not what the endpoint takes.
pub fn understand(
    front: &Front,
    dialect: Dialect,
    mut parts: Parts,
    mut body: Bytes,
    memory: OwnedSemaphorePermit,
) -> Result<PairRequest, RouteError> {
    let trail = parts.extensions.remove::<Arc<Trail>>();
    let trail = trail.unwrap_or_else(|| Trail::begin(front, Route::Other, &parts.headers));
    let read_at = Instant::now();
    let endpoint = match dialect {
        Dialect::Native(endpoint) => endpoint,
        Dialect::Messages => {
            body = messages::request::to_chat(&body)?.into();
            leave_anthropic(&mut parts.headers);
            PairEndpoint::Chat
        }
    };
    let config = front.live.now();
    let trusts_rank = config.trusts_dp_rank;
    let fleet = Arc::clone(&front.fleet.borrow());
    let trust = Trust {
        rank: trusts_rank,
        rid: true,
    };
    let may_be_opaque = config.header_overrides && !models::matter(&fleet);
    let shape = if may_be_opaque && shape::is_plain(endpoint, &body) {
        Shape::opaque()
    } else {
        shape::read(endpoint, &body, trust)?
    };
    let (body, mut shape) = models::apply(&fleet, &parts.headers, endpoint, trust, body, shape)?;
    let text = |name| parts.headers.get(name)?.to_str().ok();
    if let Some(key) = text(STICKY_HEADER) {
        shape.sticky = Some(key.to_owned());
    }
    if let Some(rank) = text(RANK_HEADER).filter(|_| trusts_rank) {
        shape.rank = rank.trim().parse().ok();
    }
    let asked = parts.headers.remove(EXPLAIN_HEADER);
    let explains = match front.config.explain {
        Explain::Never => false,
        Explain::Asked => asked.is_some_and(|value| value == "1" || value == "true"),
        Explain::Always => true,
    };
    strip_for_worker(&mut parts.headers, trusts_rank);
    let path = match (dialect, parts.uri.query()) {
        (Dialect::Native(_), Some(_)) => parts.uri.into_parts().path_and_query,
        _ => None,
    };
    Ok(PairRequest {
        path: path.unwrap_or_else(|| PathAndQuery::from_static(endpoint.path())),
        headers: parts.headers,
        body,
        memory: Arc::new(memory),
        shape,
        read_at,
        trail,
        explains,
    })
}

/// Turns the headers of Anthropic's clients into those that SGLang's chat endpoint knows.
fn leave_anthropic(headers: &mut HeaderMap) {
    for name in ANTHROPIC_HEADERS {
        headers.remove(name);
    }
    // They send their key in a header of its own.
    if let Some(key) = headers.remove("x-api-key")
        && !headers.contains_key(AUTHORIZATION)
        && let Ok(mut bearer) = HeaderValue::from_bytes(&[b"Bearer ", key.as_bytes()].concat())
    {
        bearer.set_sensitive(true);
        headers.insert(AUTHORIZATION, bearer);
    }
}

/// The router looks into bodies, and does not unpack them.
///
/// # Errors
/// [`RouteError::Encoding`]
pub fn refuse_encoding(headers: &HeaderMap) -> Result<(), RouteError> {
    match headers.get(CONTENT_ENCODING) {
        Some(encoding) if !encoding.as_bytes().eq_ignore_ascii_case(b"identity") => {
            Err(RouteError::Encoding)
        }
        _ => Ok(()),
    }
}

/// Reads a body whole, within the bounds for one and for all.
///
/// # Errors
/// [`RouteError`] when it is too large, broken or slow.
pub async fn read_body(
    front: &Front,
    mut body: Incoming,
) -> Result<(Bytes, OwnedSemaphorePermit), RouteError> {
    let limit = front.live.now().body_bytes_max;
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

/// Sets `kib` KiB aside for a body.
///
/// # Errors
/// [`RouteError::BuffersFull`]
pub fn reserve(front: &Front, kib: usize) -> Result<OwnedSemaphorePermit, RouteError> {
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
