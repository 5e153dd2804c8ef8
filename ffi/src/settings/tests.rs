//! The JSON reaches every field of the library's configuration, and nothing else.

use std::time::Duration;

use kvt::config::{RdmaUse, SameHost};

use super::{BootstrapSettings, EngineSettings, parse, resolve};
use crate::status::{KVT_BAD_CONFIG, KVT_SYSTEM};

const ALL: &str = r#"{
  "listen": "127.0.0.1:7", "token": "t", "lanes": 3, "same_host": "ring",
  "rdma": {"usage": "auto", "devices": "a,b", "gpu": 2, "connector": "standard", "queue_pairs": 5, "immediate": true,
           "batch_bytes": 8192, "pack_below": 39, "landing_bytes": 40, "window": 9, "send_queue": 64, "spin_us": 6, "drain_ms": 7, "heartbeat_ms": 80},
  "gpu": {"multiprocessors_percent": 50, "staging_bytes": 131072, "staged_batch_bytes": 16384, "pull_batch_bytes": 20480,
          "ring_bytes": 131072},
  "batch_bytes": 4096, "lane_window": 11, "pull_batch_bytes": 12288, "ring_bytes": 65536, "inline_bytes": 13,
  "drive_while_waiting": false, "spin_us": 14, "handshake_timeout_ms": 15, "peers_max": 16, "strangers_max": 17,
  "writable_by_address": true, "null_wire": true,
  "bootstrap": {"listen": "127.0.0.1:8", "token": "b", "token_scope": "all", "connections_max": 18,
                "body_bytes_max": 19, "head_timeout_ms": 20, "body_timeout_ms": 21, "reply_timeout_ms": 22,
                "idle_timeout_ms": 23, "probe_interval_ms": 0, "room_ttl_ms": 24, "rooms_max": 25, "parked_ttl_ms": 26},
  "telemetry": {"listen": "127.0.0.1:9", "metrics": "127.0.0.1:10", "token": "s", "interval_ms": 27,
                "keep_alive_ms": 28, "subscribers_max": 29},
  "node": {"queue_windows_max": 30, "queue_bytes_max": 31, "transfers_max": 32, "orphans_max": 33, "orphan_ttl_ms": 34,
           "heartbeat_ms": 35, "peer_silence_max_ms": 36, "ebb_max_ms": 37, "first_epoch": 38}
}"#;

#[test]
fn every_field_arrives() {
    let config = parse::<EngineSettings>(ALL, "config").and_then(EngineSettings::config);
    let config = config.expect("all fields are known");
    let ms = Duration::from_millis;
    assert_eq!(config.listen, Some(([127, 0, 0, 1], 7).into()));
    assert_eq!(config.token.as_deref(), Some("t"));
    assert_eq!((config.lanes, config.same_host), (3, SameHost::RingOnly));
    let rdma = config.rdma;
    assert_eq!(
        (rdma.usage, &*rdma.devices, rdma.gpu),
        (RdmaUse::Auto, "a,b", 2)
    );
    assert_eq!(
        (rdma.connector, rdma.queue_pairs),
        (Some(super::Connector::Standard), 5)
    );
    assert_eq!(
        (
            rdma.immediate,
            rdma.batch_bytes,
            rdma.window,
            rdma.send_queue
        ),
        (true, 8192, 9, 64)
    );
    assert_eq!((rdma.pack_below, rdma.landing_bytes), (39, 40));
    assert_eq!(
        (rdma.spin, rdma.drain, rdma.heartbeat),
        (Duration::from_micros(6), ms(7), ms(80))
    );
    assert_eq!(
        (
            config.batch_bytes,
            config.lane_window,
            config.pull_batch_bytes
        ),
        (4096, 11, 12_288)
    );
    assert_eq!((config.ring_bytes, config.inline_bytes), (65_536, 13));
    assert_eq!(
        (
            config.staging_bytes,
            config.staged_batch_bytes,
            config.device_pull_batch_bytes
        ),
        (131_072, 16_384, 20_480)
    );
    assert_eq!(config.device_ring_bytes, 131_072);
    assert!(!config.drive_while_waiting);
    assert_eq!(
        (config.spin, config.handshake_timeout),
        (Duration::from_micros(14), ms(15))
    );
    assert_eq!((config.peers_max, config.strangers_max), (16, 17));
    assert!(config.writable_by_address && config.null_wire);
}

#[test]
fn copies_take_a_share_of_a_gpu() {
    let percent = |json: &str| {
        let settings = parse::<EngineSettings>(json, "config").expect("it is known");
        settings.gpu.percent().ok()
    };
    assert_eq!(percent("{}"), Some(8));
    assert_eq!(percent(ALL), Some(50));
    assert_eq!(percent(r#"{"gpu": {"multiprocessors_percent": 0}}"#), None);
    assert_eq!(
        percent(r#"{"gpu": {"multiprocessors_percent": 101}}"#),
        None
    );
}

#[test]
fn every_field_of_its_listeners_and_its_state_machine_arrives() {
    let config = parse::<EngineSettings>(ALL, "config").and_then(EngineSettings::config);
    let config = config.expect("all fields are known");
    let ms = Duration::from_millis;
    let bootstrap = config.bootstrap.expect("asked for");
    assert_eq!(bootstrap.listen.port(), 8);
    assert!(
        !bootstrap.access.permits(false, None),
        "all requests need the token"
    );
    assert_eq!(
        (bootstrap.connections_max, bootstrap.body_bytes_max),
        (18, 19)
    );
    assert_eq!(
        (bootstrap.head_timeout, bootstrap.body_timeout),
        (ms(20), ms(21))
    );
    assert_eq!(
        (bootstrap.reply_timeout, bootstrap.idle_timeout),
        (ms(22), ms(23))
    );
    assert_eq!(bootstrap.probe_interval, None, "0 is never");
    assert_eq!(
        (bootstrap.registry.room_ttl, bootstrap.registry.rooms_max),
        (ms(24), 25)
    );
    assert_eq!(bootstrap.registry.parked_ttl, ms(26));
    let telemetry = config.telemetry.expect("asked for");
    assert_eq!(
        (
            telemetry.listen.port(),
            telemetry.metrics.map(|at| at.port())
        ),
        (9, Some(10))
    );
    assert!(telemetry.token.is_some());
    assert_eq!(
        (
            telemetry.interval,
            telemetry.keep_alive,
            telemetry.subscribers_max
        ),
        (ms(27), ms(28), 29)
    );
    let node = config.node;
    assert_eq!(
        (
            node.queue_windows_max,
            node.queue_bytes_max,
            node.transfers_max
        ),
        (30, 31, 32)
    );
    assert_eq!(
        (node.orphans_max, node.orphan_ttl, node.heartbeat),
        (33, ms(34), ms(35))
    );
    assert_eq!(
        (node.peer_silence_max, node.ebb_max, node.first_epoch),
        (ms(36), ms(37), 38)
    );
}

#[test]
fn what_is_left_out_keeps_its_default() {
    for json in ["", " \n", "{}"] {
        let config = parse::<EngineSettings>(json, "config").and_then(EngineSettings::config);
        let config = config.expect("nothing is needed");
        let default = kvt::config::EngineConfig::default();
        assert_eq!(format!("{config:?}"), format!("{default:?}"));
    }
    let registry = parse::<BootstrapSettings>("", "config").and_then(BootstrapSettings::config);
    let default = kvt::serve::bootstrap::BootstrapConfig::default();
    assert_eq!(
        format!("{:?}", registry.expect("nothing is needed")),
        format!("{default:?}")
    );
}

#[test]
fn unknown_fields_are_named_at_every_depth() {
    for json in [
        r#"{"x1": 1}"#,
        r#"{"rdma": {"x1": 1}}"#,
        r#"{"node": {"x1": 1}}"#,
        r#"{"telemetry": {"x1": 1}}"#,
        r#"{"bootstrap": {"x1": 1}}"#,
        r#"{"bootstrap": {"tls": {"x1": 1}}}"#,
    ] {
        let failure = parse::<EngineSettings>(json, "config").expect_err("refused");
        assert_eq!(failure.status, KVT_BAD_CONFIG);
        assert!(failure.text.contains("`x1`"), "{}", failure.text);
    }
}

#[test]
fn addresses_are_resolved_or_refused_with_a_sentence() {
    assert_eq!(
        resolve("[::1]:5", "x").map(|at| at.to_string()),
        Ok("[::1]:5".to_owned())
    );
    assert_eq!(resolve("localhost:5", "x").map(|at| at.port()), Ok(5));
    for bad in ["", "host", "host:", "host:99999", ":::x"] {
        let failure = resolve(bad, "listen").expect_err("refused");
        assert_eq!(failure.status, KVT_BAD_CONFIG, "{bad}");
    }
    assert_eq!(resolve(":5", "x").expect_err("no name").status, KVT_SYSTEM);
}
