//! Which headers pass the router.
//!
//! All of them, both ways, but for three groups: those that describe one connection (RFC 9110 §7.6.1), those that the
//! router's own client writes, and those by which a client could overrule the bootstrap fields that the router sets.
#![forbid(unsafe_code)]

use hyper::HeaderMap;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
    TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};

const CONNECTION_HEADERS: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// SGLang can be told to let these headers (`x-override-rid`, `x-override-bootstrap-room`, …) win over the body.
const OVERRIDE_PREFIX: &str = "x-override-";

/// Requests with the same value prefer the same workers.
pub const STICKY_HEADER: HeaderName = HeaderName::from_static("x-smg-routing-key");

/// Asks for the scheduler's reasons in the answer's headers.
pub const EXPLAIN_HEADER: HeaderName = HeaderName::from_static("x-kvrouter-explain");

/// Picks the data-parallel rank of the worker that reads it, which on the prefill side must be `room % dp`.
pub const RANK_HEADER: HeaderName = HeaderName::from_static("x-data-parallel-rank");

/// Removes what describes the connection it came over.
pub fn strip_connection_headers(headers: &mut HeaderMap) {
    strip(headers, |_| false);
}

/// Removes what describes the connection, and what `also` says. Messages have a handful of headers, so each of theirs is
/// looked at instead of asking for all that there could be.
fn strip(headers: &mut HeaderMap, also: impl Fn(&HeaderName) -> bool) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let found = headers
        .keys()
        .filter(|name| CONNECTION_HEADERS.contains(name) || also(name));
    let found: Vec<HeaderName> = found.cloned().collect();
    for name in found.iter().chain(&named) {
        headers.remove(name);
    }
}

/// Leaves what a worker may see of a client's headers. The rank header stays only if `trusts_rank`.
pub fn strip_for_worker(headers: &mut HeaderMap, trusts_rank: bool) {
    strip(headers, |name| {
        [HOST, CONTENT_LENGTH, EXPECT].contains(name)
            || (!trusts_rank && *name == RANK_HEADER)
            || name.as_str().starts_with(OVERRIDE_PREFIX)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_end_to_end_headers_pass() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Hop"),
            ("connection", "x-other"),
            ("x-hop", "1"),
            ("x-other", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("host", "router"),
            ("content-length", "7"),
            ("expect", "100-continue"),
            ("x-data-parallel-rank", "3"),
            ("x-override-bootstrap-room", "7"),
            ("x-override-rid", "7"),
            ("authorization", "Bearer x"),
            ("x-custom", "a"),
            ("x-custom", "b"),
        ] {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        let mut trusted = headers.clone();
        strip_for_worker(&mut trusted, true);
        assert_eq!(trusted.remove(RANK_HEADER).unwrap(), "3");
        strip_for_worker(&mut headers, false);
        assert_eq!(headers, trusted);
        let mut left: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
            .collect();
        left.sort_unstable();
        assert_eq!(
            left,
            [
                ("authorization", "Bearer x"),
                ("x-custom", "a"),
                ("x-custom", "b")
            ]
        );
    }
}
