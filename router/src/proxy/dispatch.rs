//! What goes to the workers: the client's bytes, and the few members or headers that join the two legs.
#![forbid(unsafe_code)]

use std::fmt::Write;

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};

use super::shape::Shape;
use crate::pool::Worker;

/// SGLang's override headers (`entrypoints/request_headers.py`).
const OVERRIDE_RID: HeaderName = HeaderName::from_static("x-override-rid");
const OVERRIDE_HOST: HeaderName = HeaderName::from_static("x-override-bootstrap-host");
const OVERRIDE_PORT: HeaderName = HeaderName::from_static("x-override-bootstrap-port");
const OVERRIDE_ROOM: HeaderName = HeaderName::from_static("x-override-bootstrap-room");

/// Headers and body for both legs: in the body if `shape` knows where, else in headers.
pub fn joined(
    headers: &HeaderMap,
    body: &Bytes,
    shape: &Shape,
    prefill: &Worker,
    rooms: &[u64],
    rids: &[String],
) -> (HeaderMap, Bytes) {
    let mut headers = headers.clone();
    match &shape.scan {
        Some(scan) => {
            let members = bootstrap_members(prefill, rooms, shape, rids);
            (headers, scan.inject(body, members.as_bytes()).into())
        }
        None => {
            override_headers(&mut headers, prefill, rooms, rids);
            (headers, body.clone())
        }
    }
}

fn override_headers(headers: &mut HeaderMap, prefill: &Worker, rooms: &[u64], rids: &[String]) {
    let mut insert = |name: HeaderName, text: &str| {
        let value = HeaderValue::try_from(text);
        headers.insert(
            name,
            value.expect("invariant: hosts, numbers and our ids are visible ASCII"),
        );
    };
    insert(OVERRIDE_HOST, prefill.url().host());
    if let Some(port) = prefill.bootstrap_port() {
        insert(OVERRIDE_PORT, &port.to_string());
    }
    for room in rooms.iter().take(1) {
        insert(OVERRIDE_ROOM, &room.to_string());
    }
    for rid in rids.iter().take(1) {
        insert(OVERRIDE_RID, rid.trim_matches('"'));
    }
}

/// The members that both legs get: where the prefill worker's bootstrap server is, the rooms, and the ids if the client
/// chose none. Arrays for a batch, scalars for a single prompt, as SGLang's own router sends them.
fn bootstrap_members(prefill: &Worker, rooms: &[u64], shape: &Shape, rids: &[String]) -> String {
    let host = serde_json::Value::from(prefill.url().host()).to_string();
    let port = prefill
        .bootstrap_port()
        .map_or("null".to_owned(), |port| port.to_string());
    let mut out = String::with_capacity(96 + rooms.len() * 96);
    let mut member = |name: &str, of_item: &dyn Fn(usize) -> String| {
        let comma = if out.is_empty() { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(out, "{comma}\"{name}\":");
        if shape.batch.is_none() {
            out.push_str(&of_item(0));
            return;
        }
        for item in 0..rooms.len() {
            out.push(if item == 0 { '[' } else { ',' });
            out.push_str(&of_item(item));
        }
        out.push(']');
    };
    member("bootstrap_host", &|_| host.clone());
    member("bootstrap_port", &|_| port.clone());
    member("bootstrap_room", &|item| rooms[item].to_string());
    if shape.client_rids.is_empty() {
        member("rid", &|item| rids[item].clone());
    }
    out
}
