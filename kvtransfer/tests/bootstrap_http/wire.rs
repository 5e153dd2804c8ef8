//! Every row of the contract, byte for byte. The expected texts were read off SGLang 0.5.23's own
//! `CommonKVBootstrapServer` under aiohttp 3.14.

use super::*;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json; charset=utf-8";
const TROUBLE: &str = "500 Internal Server Error\n\nServer got itself in trouble";
const MISSING: &str = "Missing inputs for bootstrap server.";
const SERVER_INFO: &str = "{\"attn_tp_size\": 2, \"attn_cp_size\": 1, \"dp_size\": 1, \"pp_size\": 1, \
    \"page_size\": 64, \"kv_cache_dtype\": \"torch.bfloat16\", \"follow_bootstrap_room\": true, \
    \"enable_dsa_cache_layer_split\": false, \"decode_allocation_policy\": \"early\", \
    \"enable_kv_cache_sharding\": false, \"prefill_http_port\": null, \"target_tp_rank\": null, \
    \"target_tp_ranks\": null, \"target_cp_ranks\": null, \"target_pp_ranks\": null, \
    \"required_dst_info_num\": null, \"required_prefill_response_num\": null}";

type Expectation<'a> = (&'a str, &'a str, Option<&'a str>, u16, &'a str, &'a str);

/// All on one keep-alive connection, which also shows that no reply leaves bytes behind.
fn check(wire: &mut Wire, table: &[Expectation<'_>]) {
    for &(method, path, body, status, content_type, expected) in table {
        let response = wire.send(method, path, "", body);
        let found = (
            response.status,
            response.header("content-type"),
            response.body.as_str(),
        );
        assert_eq!(
            found,
            (status, Some(content_type), expected),
            "{method} {path} {body:?}"
        );
    }
}

fn route(dp: &str, cp: &str, tp: &str, pp: &str) -> String {
    format!(
        "/route?prefill_dp_rank={dp}&prefill_cp_rank={cp}&target_tp_rank={tp}&target_pp_rank={pp}"
    )
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table, one request a row")]
fn replies_are_sglangs_byte_for_byte() {
    let server = start(|_| {});
    let mut wire = Wire::connect(server.local_addr());
    let none = "Prefill server not fully registered yet (0 workers registered).";
    check(
        &mut wire,
        &[
            ("GET", "/health", None, 200, TEXT, "OK"),
            ("HEAD", "/health", None, 200, TEXT, ""),
            ("GET", "/health?x=1", None, 200, TEXT, "OK"),
            ("GET", "/%68ealth", None, 200, TEXT, "OK"),
            (
                "POST",
                "/health",
                Some("x"),
                405,
                TEXT,
                "405: Method Not Allowed",
            ),
            (
                "OPTIONS",
                "/health",
                None,
                405,
                TEXT,
                "405: Method Not Allowed",
            ),
            ("GET", "/nope", None, 404, TEXT, "404: Not Found"),
            ("GET", "/health/", None, 404, TEXT, "404: Not Found"),
            ("HEAD", "/", None, 404, TEXT, ""),
            ("GET", "/route", None, 400, TEXT, MISSING),
            ("GET", &route("", "0", "0", "0"), None, 400, TEXT, MISSING),
            ("GET", "/route?prefill_dp_rank=0", None, 400, TEXT, MISSING),
            ("GET", INFO, None, 503, TEXT, none),
            ("GET", &route("0", "0", "0", "0"), None, 503, TEXT, none),
            ("GET", &route("0", "-1", "x", "-1"), None, 503, TEXT, none),
            ("GET", &route("a", "0", "0", "0"), None, 500, TEXT, TROUBLE),
            (
                "GET",
                &route("-1", "-1", "-1", "x"),
                None,
                500,
                TEXT,
                TROUBLE,
            ),
            (
                "POST",
                "/route",
                Some("{}"),
                405,
                JSON,
                "Method not allowed",
            ),
            ("DELETE", "/route", None, 405, JSON, "Method not allowed"),
            ("PATCH", "/route", None, 405, JSON, "Method not allowed"),
            ("OPTIONS", "/route", None, 405, JSON, "Method not allowed"),
            ("HEAD", "/route", None, 405, JSON, ""),
            ("PUT", "/route", Some("not json"), 500, TEXT, TROUBLE),
            ("PUT", "/route", Some(""), 500, TEXT, TROUBLE),
            ("PUT", "/route", Some("{}"), 500, TEXT, TROUBLE),
            ("PUT", "/route", Some("[]"), 500, TEXT, TROUBLE),
            ("PUT", "/route", Some(&row(2, 0, 4001, "")), 200, TEXT, "OK"),
            (
                "GET",
                INFO,
                None,
                503,
                TEXT,
                "Prefill server not fully registered yet (1 workers registered).",
            ),
            // Registered again: upstream would count two workers and call itself ready with one rank missing.
            ("PUT", "/route", Some(&row(2, 0, 4001, "")), 200, TEXT, "OK"),
            (
                "GET",
                INFO,
                None,
                503,
                TEXT,
                "Prefill server not fully registered yet (1 workers registered).",
            ),
        ],
    );
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table, one request a row")]
fn lookups_are_sglangs_byte_for_byte() {
    let server = start(|_| {});
    let mut wire = Wire::connect(server.local_addr());
    // Ports and page sizes may come as text: Python applies int() to them.
    let texts = row(2, 1, 4002, "")
        .replace("4002", "\"4002\"")
        .replace("64,", "\"64\",");
    let rank_0 = "{\"rank_ip\": \"127.0.0.1\", \"rank_port\": 4001}";
    let not_found = |ranks: &str| format!("Bootstrap info not found for {ranks}");
    check(
        &mut wire,
        &[
            ("PUT", "/route", Some(&row(2, 0, 4001, "")), 200, TEXT, "OK"),
            ("PUT", "/route", Some(&texts), 200, TEXT, "OK"),
            ("GET", INFO, None, 200, JSON, SERVER_INFO),
            ("GET", &route("0", "0", "0", "0"), None, 200, JSON, rank_0),
            (
                "GET",
                &route("0", "%2b0", "+0", "0"),
                None,
                200,
                JSON,
                rank_0,
            ),
            (
                "GET",
                &(route("0", "0", "0", "0") + "&prefill_dp_rank=7"),
                None,
                200,
                JSON,
                rank_0,
            ),
            (
                "GET",
                &route("0", "0", "1", "0"),
                None,
                200,
                JSON,
                &rank_0.replace("4001", "4002"),
            ),
            (
                "GET",
                &route("0", "0", "2", "0"),
                None,
                404,
                TEXT,
                &not_found("dp_rank=0 cp_rank=0 tp_rank=2 pp_rank=0"),
            ),
            (
                "GET",
                &route("0", "0", "0", "-1"),
                None,
                404,
                TEXT,
                &not_found("dp_rank=0 cp_rank=0 tp_rank=0 pp_rank=-1"),
            ),
            (
                "GET",
                &route("5", "x", "0", "0"),
                None,
                404,
                TEXT,
                &not_found("dp_rank=5 cp_rank=x tp_rank=0 pp_rank=0"),
            ),
            (
                "GET",
                &route("0", "0", "1_0", "0"),
                None,
                404,
                TEXT,
                &not_found("dp_rank=0 cp_rank=0 tp_rank=1_0 pp_rank=0"),
            ),
            (
                "GET",
                &route("0", "9", "%3Cb%3E%20%41", "0"),
                None,
                404,
                TEXT,
                &not_found("dp_rank=0 cp_rank=9 tp_rank=<b> A pp_rank=0"),
            ),
            ("GET", &route("a", "0", "0", "0"), None, 500, TEXT, TROUBLE),
            (
                "GET",
                &route("0", "%F0%9F%98%80", "0", "0"),
                None,
                500,
                TEXT,
                TROUBLE,
            ),
            (
                "PUT",
                "/route",
                Some(&row(2, 0, 4001, ", \"dsv41_spec_layout\": {\"a\": 1}")),
                400,
                TEXT,
                "DeepSeek-V4.1 DSpark PD layout differs across prefill ranks",
            ),
            (
                "PUT",
                "/route",
                Some(&row(
                    2,
                    0,
                    4001,
                    ", \"decode_allocation_policy\": \"prefill_complete\"",
                )),
                400,
                TEXT,
                "Inconsistent prefill allocation policies",
            ),
            (
                "PUT",
                "/route",
                Some(&row(2, 0, 4001, ", \"decode_allocation_policy\": null")),
                400,
                TEXT,
                "Inconsistent prefill allocation policies",
            ),
        ],
    );
}

#[test]
fn optional_fields_appear_in_the_order_of_the_dataclass() {
    let server = start(|_| {});
    let mut wire = Wire::connect(server.local_addr());
    let extra = ", \"kv_layout\": \"nhd\", \"dsv41_spec_layout\": {\"z\": [1, true], \"a\": null}, \
        \"load_balance_method\": \"round_robin\", \"enable_dsa_cache_layer_split\": true, \
        \"enable_kv_cache_sharding\": 1, \"prefill_http_port\": 30000, \"decode_allocation_policy\": \"prefill_complete\"";
    let body = row(1, 0, 4001, extra).replace("\"system_dp_size\": 1", "\"system_dp_size\": 2");
    wire.send("PUT", "/route", "", Some(&body));
    let other = body.replace("\"system_dp_rank\": 0", "\"system_dp_rank\": 1");
    wire.send("PUT", "/route", "", Some(&other));
    assert_eq!(
        wire.send("GET", INFO, "", None).body,
        "{\"attn_tp_size\": 1, \"attn_cp_size\": 1, \"dp_size\": 2, \"pp_size\": 1, \"page_size\": 64, \
         \"kv_cache_dtype\": \"torch.bfloat16\", \"follow_bootstrap_room\": false, \
         \"enable_dsa_cache_layer_split\": true, \"dsv41_spec_layout\": {\"z\": [1, true], \"a\": null}, \
         \"kv_layout\": \"nhd\", \"decode_allocation_policy\": \"prefill_complete\", \
         \"enable_kv_cache_sharding\": true, \"prefill_http_port\": 30000, \"target_tp_rank\": null, \
         \"target_tp_ranks\": null, \"target_cp_ranks\": null, \"target_pp_ranks\": null, \
         \"required_dst_info_num\": null, \"required_prefill_response_num\": null}"
    );
}

/// A decode rank of an older release refuses a key it does not know, so an instance is described in its own ranks' keys.
#[test]
fn an_older_release_is_answered_in_its_own_keys() {
    let server = start(|_| {});
    let mut wire = Wire::connect(server.local_addr());
    let common = "{\"attn_tp_size\": 2, \"attn_cp_size\": 1, \"dp_size\": 1, \"pp_size\": 1, \"page_size\": 64, \
        \"kv_cache_dtype\": \"torch.bfloat16\", \"follow_bootstrap_room\": true";
    let ranks = "\"target_tp_rank\": null, \"target_tp_ranks\": null, \"target_cp_ranks\": null, \
        \"target_pp_ranks\": null, \"required_dst_info_num\": null, \"required_prefill_response_num\": null}";
    wire.send("PUT", "/route", "", Some(&old_row(2, 0, 4001, "")));
    let second = old_row(2, 1, 4002, "");
    wire.send("PUT", "/route", "", Some(&second));
    assert_eq!(
        wire.send("GET", INFO, "", None).body,
        format!("{common}, {ranks}")
    );

    // One rank that knows a key is enough, and null is not absent.
    let newer = old_row(2, 1, 4002, ", \"prefill_http_port\": null");
    wire.send("PUT", "/route", "", Some(&newer));
    assert_eq!(
        wire.send("GET", INFO, "", None).body,
        format!("{common}, \"prefill_http_port\": null, {ranks}")
    );
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table, one request a row")]
fn rooms_are_sglangs_byte_for_byte() {
    let server = start(|_| {});
    let mut wire = Wire::connect(server.local_addr());
    let (register, query) = ("/register_dp_rank", "/query_dp_ranks");
    check(
        &mut wire,
        &[
            (
                "POST",
                register,
                Some("{\"bootstrap_room\": 5, \"dp_rank\": 1}"),
                200,
                TEXT,
                "OK",
            ),
            (
                "POST",
                register,
                Some("{\"bootstrap_room\": \"7\", \"dp_rank\": \"3\"}"),
                200,
                TEXT,
                "OK",
            ),
            (
                "POST",
                register,
                Some("{\"bootstrap_room\": 9223372036854775807, \"dp_rank\": 0}"),
                200,
                TEXT,
                "OK",
            ),
            (
                "POST",
                register,
                Some("{\"bootstrap_room\": 18446744073709551615, \"dp_rank\": 4}"),
                200,
                TEXT,
                "OK",
            ),
            (
                "POST",
                register,
                Some("{\"bootstrap_room\": 5.9, \"dp_rank\": 2.5}"),
                200,
                TEXT,
                "OK",
            ),
            ("POST", register, Some("{}"), 500, TEXT, TROUBLE),
            ("POST", register, Some("x"), 500, TEXT, TROUBLE),
            ("GET", register, None, 405, TEXT, "405: Method Not Allowed"),
            (
                "PUT",
                register,
                Some("{}"),
                405,
                TEXT,
                "405: Method Not Allowed",
            ),
            (
                "POST",
                query,
                Some("{\"bootstrap_rooms\": [5, 7, 11, 9223372036854775807]}"),
                200,
                JSON,
                "{\"5\": 2, \"7\": 3, \"9223372036854775807\": 0}",
            ),
            (
                "POST",
                query,
                Some("{\"bootstrap_rooms\": [\"7\", \"7\", 5, 5.2, true, -3]}"),
                200,
                JSON,
                "{\"7\": 3, \"5\": 2}",
            ),
            (
                "POST",
                query,
                Some("{\"bootstrap_rooms\": [18446744073709551615]}"),
                200,
                JSON,
                "{\"18446744073709551615\": 4}",
            ),
            (
                "POST",
                query,
                Some("{\"bootstrap_rooms\": []}"),
                200,
                JSON,
                "{}",
            ),
            (
                "POST",
                query,
                Some("{\"bootstrap_rooms\": [null]}"),
                500,
                TEXT,
                TROUBLE,
            ),
            ("POST", query, Some("{}"), 500, TEXT, TROUBLE),
            ("GET", query, None, 405, TEXT, "405: Method Not Allowed"),
            ("HEAD", query, None, 405, TEXT, ""),
        ],
    );
}

#[test]
fn headers_tell_what_bodies_must_not() {
    let server = start(|_| {});
    let mut wire = Wire::connect(server.local_addr());
    assert_eq!(
        wire.send("POST", "/health", "", Some("")).header("allow"),
        Some("GET,HEAD")
    );
    assert_eq!(
        wire.send("GET", "/query_dp_ranks", "", None)
            .header("allow"),
        Some("POST")
    );
    assert_eq!(
        wire.send("HEAD", "/health", "", None)
            .header("content-length"),
        Some("2")
    );
    let id = "X-SGLang-Disaggregation-Instance-ID";
    wire.send(
        "PUT",
        "/route",
        &format!("{id}: pod-a\r\n"),
        Some(&row(2, 0, 4001, "")),
    );
    wire.send(
        "PUT",
        "/route",
        &format!("{id}: pod-b\r\n"),
        Some(&row(2, 1, 4002, "")),
    );
    let rank = wire.send("GET", &route("0", "0", "1", "0"), "", None);
    assert_eq!(rank.header(id), Some("pod-b"));
    assert_eq!(rank.header("x-kvtransfer-generation"), Some("1"));
    let info = wire.send("GET", INFO, "", None);
    assert_eq!(
        (info.status, info.body.as_str()),
        (200, SERVER_INFO),
        "identity adds no key to the body"
    );
    assert!(info.header(id).unwrap().starts_with("ranks-"));
    assert_eq!(
        wire.send(
            "PUT",
            "/route",
            &format!("{id}: a b\r\n"),
            Some(&row(2, 0, 1, ""))
        )
        .status,
        400
    );
    let lease = wire.send(
        "PUT",
        "/route",
        "X-KVTransfer-Lease-Seconds: soon\r\n",
        Some(&row(2, 0, 1, "")),
    );
    assert_eq!(lease.status, 400);
    assert_eq!(
        lease.body,
        "X-KVTransfer-Lease-Seconds must be a whole number from 0 to 3600"
    );
}
