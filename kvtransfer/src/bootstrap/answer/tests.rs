//! Hostile bytes against the pure part; the byte-exact table is `tests/bootstrap_wire.rs`, over real HTTP.

use proptest::prelude::*;

use super::super::registry::RegistryLimits;
use super::*;

const ROW: &str = r#"{"attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0,
    "attn_dp_size": 1, "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0,
    "rank_ip": "10.0.0.1", "rank_port": 4001, "page_size": 64, "kv_cache_dtype": null,
    "dsv41_spec_layout": {"b": [1, {"c": "\u00e9"}], "a": 1.5}, "decode_allocation_policy": "early"}"#;

fn request<'a>(method: Method, path: &'a str, query: &'a str, body: &'a [u8]) -> Request<'a> {
    Request {
        method,
        path,
        query,
        body,
        lease: None,
        instance: None,
    }
}

fn put(registry: &mut Registry, body: &str) -> (u16, String) {
    let reply = answer(
        registry,
        &request(Method::Put, "/route", "", body.as_bytes()),
        Duration::ZERO,
    );
    (reply.status, reply.body.into_owned())
}

#[test]
fn rows_that_could_never_be_ready_are_refused_with_a_sentence() {
    let mut registry = Registry::new(RegistryLimits::default());
    for (from, to, sentence) in [
        (
            "\"attn_tp_size\": 1",
            "\"attn_tp_size\": 0",
            "attn_tp_size 0 is not in 1..=16384",
        ),
        (
            "\"attn_tp_rank\": 0",
            "\"attn_tp_rank\": 1",
            "attn_tp_rank 1 is not in 0..1",
        ),
        (
            "\"rank_port\": 4001",
            "\"rank_port\": 70000",
            "rank_port 70000 is out of range",
        ),
        (
            "\"page_size\": 64",
            "\"page_size\": -1",
            "page_size -1 is out of range",
        ),
        ("10.0.0.1", "", "rank_ip has 0 bytes; 1 to 255 are accepted"),
    ] {
        let body = ROW.replace(from, to);
        assert_ne!(body, ROW);
        assert_eq!(put(&mut registry, &body), (400, sentence.to_owned()));
    }
    let wide = ROW.replace("_size\": 1,", "_size\": 1000,");
    assert!(put(&mut registry, &wide).1.contains("more than the 16384"));
    let long = ROW.replace("10.0.0.1", &"x".repeat(256));
    assert_eq!(put(&mut registry, &long).0, 400);
    let deep = ROW.replace("1.5", &("[".repeat(5000) + &"]".repeat(5000)));
    assert_eq!(put(&mut registry, &deep).0, 500);
    let fat = ROW.replace("1.5", &format!("\"{}\"", "x".repeat(20_000)));
    assert_eq!(put(&mut registry, &fat).0, 400);
    assert_eq!(put(&mut registry, ROW), (200, "OK".to_owned()));
}

#[test]
fn every_required_key_is_required() {
    let row: Value = serde_json::from_str(ROW).unwrap();
    for (key, _) in row.as_object().unwrap() {
        let mut without = row.clone();
        without.as_object_mut().unwrap().remove(key);
        let mut registry = Registry::new(RegistryLimits::default());
        let optional = ["dsv41_spec_layout", "decode_allocation_policy"].contains(&key.as_str());
        let expected = if optional { 200 } else { 500 };
        assert_eq!(
            put(&mut registry, &without.to_string()).0,
            expected,
            "{key}"
        );
    }
}

#[test]
fn spec_layout_is_echoed_in_its_own_order_and_compared_as_a_value() {
    let mut registry = Registry::new(RegistryLimits::default());
    put(&mut registry, ROW);
    let reordered = ROW.replace(
        "{\"b\": [1, {\"c\": \"\\u00e9\"}], \"a\": 1.5}",
        "{\"a\":1.5,\"b\":[1,{\"c\":\"é\"}]}",
    );
    assert_ne!(reordered, ROW);
    assert_eq!(put(&mut registry, &reordered).0, 200);
    let query = "prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";
    let reply = answer(
        &mut registry,
        &request(Method::Get, "/route", query, b""),
        Duration::ZERO,
    );
    assert_eq!(reply.status, 200);
    assert!(
        reply.body.contains(r#""kv_cache_dtype": null, "#),
        "{}",
        reply.body
    );
    assert!(
        reply
            .body
            .contains(r#""dsv41_spec_layout": {"b": [1, {"c": "\u00e9"}], "a": 1.5}, "decode_"#),
        "{}",
        reply.body
    );
}

#[test]
fn room_bounds_answer_with_a_sentence() {
    let limits = RegistryLimits {
        rooms_max: 1,
        ..RegistryLimits::default()
    };
    let mut registry = Registry::new(limits);
    let mut post = |path, body: &str, now| {
        let reply = answer(
            &mut registry,
            &request(Method::Post, path, "", body.as_bytes()),
            now,
        );
        (reply.status, reply.body.into_owned())
    };
    let room = |room| format!("{{\"bootstrap_room\": {room}, \"dp_rank\": 0}}");
    assert_eq!(post("/register_dp_rank", &room(1), Duration::ZERO).0, 200);
    let full = post("/register_dp_rank", &room(2), Duration::from_secs(119));
    assert_eq!(full.0, 503);
    assert!(full.1.contains("room table is full: 1 rooms"), "{}", full.1);
    let later = Duration::from_secs(120);
    assert_eq!(post("/register_dp_rank", &room(2), later).0, 200);
    let query = |count| format!("{{\"bootstrap_rooms\": {:?}}}", vec![2; count]);
    let most = post("/query_dp_ranks", &query(ROOMS_PER_QUERY_MAX), later);
    assert_eq!(most, (200, "{\"2\": 0}".to_owned()));
    assert_eq!(
        post("/query_dp_ranks", &query(ROOMS_PER_QUERY_MAX + 1), later).0,
        400
    );
}

proptest! {
    #[test]
    fn mutated_requests_get_a_reply_and_never_a_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
        path in prop_oneof![Just("/route"), Just("/register_dp_rank"), Just("/query_dp_ranks"), Just("/%")],
        query in "[a-z_=&%+0-9-]{0,80}",
        method in prop_oneof![Just(Method::Put), Just(Method::Post), Just(Method::Get)],
        lease in prop::option::of("[0-9]{0,25}"),
    ) {
        let mut body = ROW.as_bytes().to_vec();
        for (at, byte) in edits {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if cut.index(4) == 0 {
            body.truncate(cut.index(ROW.len()));
        }
        let mut registry = Registry::new(RegistryLimits::default());
        let request = Request { lease: lease.as_deref(), ..request(method, path, &query, &body) };
        let reply = answer(&mut registry, &request, Duration::ZERO);
        prop_assert!([200, 400, 404, 405, 500, 503].contains(&reply.status));
        let info = "prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";
        let after = answer(&mut registry, &Request { query: info, ..request_get() }, Duration::ZERO);
        prop_assert!([200, 503].contains(&after.status));
        if after.status == 200 {
            prop_assert!(serde_json::from_str::<Value>(&after.body).is_ok());
        }
    }
}

fn request_get() -> Request<'static> {
    request(Method::Get, "/route", "", b"")
}
