//! One HTTP request in, one HTTP reply out: the registry's whole contract, including aiohttp's own error pages.
//!
//! Known differences from SGLang, all on requests its own clients never send: rows that could never become ready are
//! refused with a 400 sentence instead of `OK`; non-ASCII digits, and rooms that are no list, answer 500; a full
//! room table answers 503; pages for broken HTTP itself are hyper's; aiohttp's HTML variant of the 500 page is not offered.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::Value;

use super::generation::{Entry, Generation};
use super::python_text::{decode, python_int, query_value};
use super::registry::{INSTANCE_BYTES_MAX, Lease, Registered, Registry};
use super::row::{RankKey, Row, RowError, python_int_of};

/// Rooms one `/query_dp_ranks` may name. SGLang asks once per scheduling step for the requests that wait.
const ROOMS_PER_QUERY_MAX: usize = 65_536;
/// Bytes of a query parameter that a 404 repeats; a rank has a few digits.
const ECHO_BYTES_MAX: usize = 4096;

/// The request methods the registry tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `GET`.
    Get,
    /// `HEAD`; the edge leaves the body out.
    Head,
    /// `PUT`.
    Put,
    /// `POST`.
    Post,
    /// Any other.
    Other,
}

/// What the registry needs to see of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The method.
    pub method: Method,
    /// The path, still percent-encoded, without the query.
    pub path: &'a str,
    /// The query without its question mark, still encoded; empty if there is none.
    pub query: &'a str,
    /// The whole body.
    pub body: &'a [u8],
    /// `X-KVTransfer-Lease-Seconds`, if sent.
    pub lease: Option<&'a str>,
    /// `X-SGLang-Disaggregation-Instance-ID`, if sent.
    pub instance: Option<&'a str>,
}

/// What a reply's body is. The edge adds `; charset=utf-8`, as aiohttp does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentType {
    /// `text/plain`.
    Text,
    /// `application/json`.
    Json,
}

/// A reply, but for the headers every reply has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Type of the body.
    pub content_type: ContentType,
    /// The `Allow` header of a 405 page.
    pub allow: Option<&'static str>,
    /// The body.
    pub body: Cow<'static, str>,
    /// Number of the generation that answered, for `X-KVTransfer-Generation`.
    pub generation: Option<u64>,
    /// Identity of the rank or instance, for `X-SGLang-Disaggregation-Instance-ID`.
    pub instance: Option<String>,
    /// Whether a row was parked: it disagrees with a live instance, and somebody should know.
    pub parked: bool,
}

impl Reply {
    /// A plain-text reply.
    #[must_use]
    pub fn text(status: u16, body: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            content_type: ContentType::Text,
            allow: None,
            body: body.into(),
            generation: None,
            instance: None,
            parked: false,
        }
    }

    fn json(body: String) -> Self {
        Self {
            content_type: ContentType::Json,
            ..Self::text(200, body)
        }
    }

    fn ok() -> Self {
        Self::text(200, "OK")
    }

    /// aiohttp's page for an exception in a handler.
    fn trouble() -> Self {
        Self::text(
            500,
            "500 Internal Server Error\n\nServer got itself in trouble",
        )
    }

    fn not_allowed(allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::text(405, "405: Method Not Allowed")
        }
    }

    fn not_ready(workers: usize) -> Self {
        Self::text(
            503,
            format!("Prefill server not fully registered yet ({workers} workers registered)."),
        )
    }
}

/// Answers one request. Never panics, whatever the bytes.
#[must_use]
pub fn answer(registry: &mut Registry, request: &Request<'_>, now: Duration) -> Reply {
    match (decode(request.path, false).as_str(), request.method) {
        ("/health", Method::Get | Method::Head) => Reply::ok(),
        ("/health", _) => Reply::not_allowed("GET,HEAD"),
        ("/route", Method::Put) => put_route(registry, request, now),
        ("/route", Method::Get) => get_route(registry, request.query, now),
        ("/route", _) => Reply {
            content_type: ContentType::Json,
            ..Reply::text(405, "Method not allowed")
        },
        ("/register_dp_rank", Method::Post) => register_dp_rank(registry, request.body, now),
        ("/query_dp_ranks", Method::Post) => query_dp_ranks(registry, request.body, now),
        ("/register_dp_rank" | "/query_dp_ranks", _) => Reply::not_allowed("POST"),
        _ => Reply::text(404, "404: Not Found"),
    }
}

fn put_route(registry: &mut Registry, request: &Request<'_>, now: Duration) -> Reply {
    let row = match Row::parse(request.body) {
        Ok(row) => row,
        Err(RowError::Malformed) => return Reply::trouble(),
        Err(error) => return Reply::text(400, error.to_string()),
    };
    let lease = match Lease::parse(request.lease) {
        Ok(lease) => lease,
        Err(error) => return Reply::text(400, error.to_string()),
    };
    if let Some(instance) = request.instance
        && (instance.is_empty()
            || instance.len() > INSTANCE_BYTES_MAX
            || !instance.bytes().all(|b| b.is_ascii_graphic()))
    {
        return Reply::text(
            400,
            format!(
                "the instance id must be 1 to {INSTANCE_BYTES_MAX} printable ASCII characters without spaces"
            ),
        );
    }
    match registry.register(row, lease, request.instance.map(str::to_owned), now) {
        Ok(registered) => Reply {
            parked: registered == Registered::Parked,
            ..Reply::ok()
        },
        Err(refusal) => Reply::text(400, refusal.to_string()),
    }
}

fn get_route(registry: &mut Registry, query: &str, now: Duration) -> Reply {
    let names = [
        "prefill_dp_rank",
        "prefill_cp_rank",
        "target_tp_rank",
        "target_pp_rank",
    ];
    let values = names.map(|name| query_value(query, name).filter(|value| !value.is_empty()));
    let [Some(dp), Some(cp), Some(tp), Some(pp)] = values else {
        return Reply::text(400, "Missing inputs for bootstrap server.");
    };
    let ranks = [dp, cp, tp, pp];
    // As in Python, the first value that is not -1 decides, and the ones behind it are not read yet.
    let mut asks_for_info = true;
    for rank in &ranks {
        match python_int(rank) {
            None => return Reply::trouble(),
            Some(-1) => {}
            Some(_) => {
                asks_for_info = false;
                break;
            }
        }
    }
    let Some((number, live)) = registry.live(now) else {
        return Reply::not_ready(0);
    };
    if !live.is_ready() {
        return Reply::not_ready(live.row_count());
    }
    if asks_for_info {
        let instance = live.instance().map(str::to_owned);
        return Reply {
            generation: Some(number),
            instance,
            ..Reply::json(live.server_info())
        };
    }
    match find_rank(live, &ranks) {
        Err(NotInteger) => Reply::trouble(),
        Ok(None) if ranks.iter().map(String::len).sum::<usize>() > ECHO_BYTES_MAX => {
            Reply::text(404, "Bootstrap info not found")
        }
        Ok(None) => {
            let [dp, cp, tp, pp] = ranks;
            Reply::text(
                404,
                format!(
                    "Bootstrap info not found for dp_rank={dp} cp_rank={cp} tp_rank={tp} pp_rank={pp}"
                ),
            )
        }
        Ok(Some(entry)) => {
            let mut body = String::from("{\"rank_ip\": ");
            super::python_text::dump_string(&mut body, &entry.rank_ip);
            write!(body, ", \"rank_port\": {}}}", entry.rank_port)
                .expect("invariant: writing to a String cannot fail");
            Reply {
                generation: Some(number),
                instance: entry.instance.clone(),
                ..Reply::json(body)
            }
        }
    }
}

struct NotInteger;

/// Walks dp, cp, tp, pp as the nested Python tables do: a missing level ends the search before the next is parsed.
fn find_rank<'a>(
    live: &'a Generation,
    ranks: &[String; 4],
) -> Result<Option<&'a Entry>, NotInteger> {
    let mut path = [0_u32; 4];
    for (level, rank) in ranks.iter().enumerate() {
        let number = python_int(rank).ok_or(NotInteger)?;
        let Ok(number) = u32::try_from(number) else {
            return Ok(None);
        };
        path[level] = number;
        if !live.has_rank_under(&path[..=level]) {
            return Ok(None);
        }
    }
    let [dp, cp, tp, pp] = path;
    Ok(live.rank(RankKey { dp, cp, tp, pp }))
}

fn register_dp_rank(registry: &mut Registry, body: &[u8], now: Duration) -> Reply {
    let fields = serde_json::from_slice::<Value>(body).ok().and_then(|body| {
        let room = python_int_of(body.get("bootstrap_room")?)?;
        let dp_rank = python_int_of(body.get("dp_rank")?)?;
        Some((u64::try_from(room).ok()?, i64::try_from(dp_rank).ok()?))
    });
    let Some((room, dp_rank)) = fields else {
        return Reply::trouble();
    };
    match registry.rooms().insert(room, dp_rank, now) {
        Ok(()) => Reply::ok(),
        Err(full) => Reply::text(503, full.to_string()),
    }
}

fn query_dp_ranks(registry: &mut Registry, body: &[u8], now: Duration) -> Reply {
    let body: Option<Value> = serde_json::from_slice(body).ok();
    let Some(rooms) = body
        .as_ref()
        .and_then(|body| body.get("bootstrap_rooms")?.as_array())
    else {
        return Reply::trouble();
    };
    if rooms.len() > ROOMS_PER_QUERY_MAX {
        return Reply::text(
            400,
            format!(
                "{} rooms in one query; {ROOMS_PER_QUERY_MAX} are accepted",
                rooms.len()
            ),
        );
    }
    let mut out = String::from("{");
    let mut seen = HashSet::new();
    for room in rooms {
        let Some(room) = python_int_of(room) else {
            return Reply::trouble();
        };
        let Ok(room) = u64::try_from(room) else {
            continue;
        };
        if let Some(dp_rank) = registry.rooms().dp_rank(room, now)
            && seen.insert(room)
        {
            let comma = if out.len() > 1 { ", " } else { "" };
            write!(out, "{comma}\"{room}\": {dp_rank}")
                .expect("invariant: writing to a String cannot fail");
        }
    }
    out.push('}');
    Reply::json(out)
}

#[cfg(test)]
mod tests;
