//! What strangers and crowds can do to the server: nothing that outlasts a bound.

use tokio::time::Instant;

use proptest::strategy::{Strategy, ValueTree as _};
use proptest::test_runner::{Config, TestRunner};

use super::*;

#[test]
fn two_thousand_pollers_keep_their_connections() {
    let server = start(|_| {});
    once(
        server.local_addr(),
        "PUT",
        "/route",
        Some(&row(1, 0, 4001, "")),
    );
    let mut pollers: Vec<_> = (0..2000)
        .map(|_| Wire::connect(server.local_addr()))
        .collect();
    for _ in 0..3 {
        for wire in &mut pollers {
            wire.0
                .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                .unwrap();
        }
        for wire in &mut pollers {
            let response = wire.receive(false);
            assert_eq!((response.status, response.body.as_str()), (200, "OK"));
        }
    }
    assert_eq!(pollers[1999].send("GET", INFO, "", None).status, 200);
}

#[test]
fn the_connection_limit_refuses_new_ones_and_spares_old_ones() {
    let server = start(|config| config.connections_max = 3);
    let mut held: Vec<_> = (0..3).map(|_| Wire::connect(server.local_addr())).collect();
    for wire in &mut held {
        assert_eq!(wire.send("GET", "/health", "", None).status, 200);
    }
    let mut extra = Wire::connect(server.local_addr());
    let refused = extra.receive(false);
    assert_eq!(refused.status, 503);
    assert_eq!(
        refused.body,
        "The bootstrap server has too many connections"
    );
    assert!(extra.is_closed());
    assert_eq!(held[2].send("GET", "/health", "", None).status, 200);
    drop(held.pop());
    // The place is free once the server has seen the close; until then it refuses.
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let mut next = Wire::connect(server.local_addr());
        next.0
            .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            .ok();
        let mut first = [0; 12];
        if next.0.read_exact(&mut first).is_ok() && &first == b"HTTP/1.1 200" {
            break;
        }
        assert!(
            Instant::now() < until,
            "a closed connection frees its place"
        );
    }
}

#[test]
fn oversized_requests_are_refused() {
    let server = start(|_| {});
    let addr = server.local_addr();
    let large = "x".repeat(1 << 20);
    assert_eq!(
        once(addr, "PUT", "/route", Some(&large)).status,
        500,
        "exactly the limit is still read"
    );
    let mut wire = Wire::connect(addr);
    // Declared only: the server need not wait for the bytes.
    wire.0
        .write_all(b"PUT /route HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n")
        .unwrap();
    let declared = wire.receive(false);
    assert_eq!(
        (declared.status, declared.body.as_str()),
        (413, "Maximum request body size 1048576 exceeded.")
    );
    assert!(wire.is_closed());
    let mut wire = Wire::connect(addr);
    wire.0
        .write_all(b"PUT /route HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = [b"10000\r\n".as_slice(), &[b'x'; 0x10000], b"\r\n"].concat();
    for _ in 0..17 {
        // The server may hang up before the last chunk is out.
        wire.0.write_all(&chunk).ok();
    }
    assert_eq!(wire.receive(false).status, 413);
    for request in [
        format!(
            "GET /health HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n",
            "a".repeat(40_000)
        ),
        format!(
            "GET /health HTTP/1.1\r\nHost: x\r\n{}\r\n",
            "A: b\r\n".repeat(500)
        ),
        format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(40_000)),
    ] {
        let mut wire = Wire::connect(addr);
        wire.0.write_all(request.as_bytes()).ok();
        let mut reply = Vec::new();
        wire.0.read_to_end(&mut reply).ok();
        assert!(
            !reply.starts_with(b"HTTP/1.1 200"),
            "{}",
            String::from_utf8_lossy(&reply)
        );
    }
    assert_eq!(once(addr, "GET", "/health", None).body, "OK");
}

#[test]
fn slow_heads_and_bodies_end_but_idle_pollers_stay() {
    let limit = Duration::from_millis(300);
    let server = start(|config| {
        config.head_timeout = limit;
        config.body_timeout = limit;
    });
    let addr = server.local_addr();
    let mut poller = Wire::connect(addr);
    assert_eq!(poller.send("GET", "/health", "", None).status, 200);
    let started = Instant::now();
    let mut silent = Wire::connect(addr);
    let mut trickler = Wire::connect(addr);
    trickler
        .0
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let mut body = Wire::connect(addr);
    body.0
        .write_all(b"PUT /route HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        .unwrap();
    // One byte at a time does not buy more time than the whole head has.
    trickler
        .0
        .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nA: ")
        .unwrap();
    let closed_after = loop {
        match trickler.0.read(&mut [0; 64]) {
            Ok(0) => break started.elapsed(),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                break started.elapsed();
            }
            Ok(_) => panic!("a reply to half a head"),
            Err(_) => {
                trickler.0.write_all(b"a").ok();
            }
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "the trickler was never cut off"
        );
    };
    assert!(closed_after >= limit, "{closed_after:?}");
    assert!(silent.is_closed());
    let late = body.receive(false);
    assert_eq!(
        (late.status, late.body.as_str()),
        (408, "408: Request Timeout")
    );
    assert!(body.is_closed());
    assert!(started.elapsed() >= limit);
    // Quiet all that time between two requests, which the idle limit allows.
    assert_eq!(poller.send("GET", "/health", "", None).status, 200);
}

#[test]
fn a_hundred_thousand_hostile_requests_leave_it_answering() {
    let server = start(|_| {});
    let addr = server.local_addr();
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let template = format!(
        "PUT /route HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{}",
        row(2, 0, 1, "").len(),
        row(2, 0, 1, "")
    );
    let edits = proptest::collection::vec((0..template.len(), proptest::num::u8::ANY), 1..8);
    let noise = proptest::collection::vec(proptest::num::u8::ANY, 0..200);
    let (mut requests, mut replies) = (0, 0);
    // Mutated requests back to back on 1000 connections; the server reads on until one of them breaks the framing.
    for _ in 0..1000 {
        let mut bytes = Vec::new();
        for at in 0..100 {
            let mut request = template.clone().into_bytes();
            for (place, byte) in edits.new_tree(&mut runner).unwrap().current() {
                // Early requests keep their framing and hit the JSON, later ones hit everything.
                let body_at = template.find("\r\n\r\n").unwrap() + 4;
                let place = if at < 90 {
                    body_at + place % (template.len() - body_at)
                } else {
                    place
                };
                request[place] = byte;
            }
            bytes.extend_from_slice(&request);
            requests += 1;
        }
        bytes.extend_from_slice(&noise.new_tree(&mut runner).unwrap().current());
        let wire = Wire::connect(addr);
        let mut reader = wire.0.try_clone().unwrap();
        let drain = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).ok();
            String::from_utf8_lossy(&bytes).matches("HTTP/1.1 ").count()
        });
        (&wire.0).write_all(&bytes).ok();
        wire.0.shutdown(std::net::Shutdown::Write).ok();
        replies += drain.join().unwrap();
    }
    assert_eq!(requests, 100_000);
    // 90 of each 100 keep their framing, so at least those must have been read and answered.
    assert!(replies >= 90_000, "{replies}");
    assert_eq!(once(addr, "GET", "/health", None).body, "OK");
    assert!([200, 503].contains(&once(addr, "GET", INFO, None).status));
    server.close();
}

#[test]
fn closing_joins_soon_with_connections_open_and_frees_the_port() {
    let server = start(|_| {});
    let addr = server.local_addr();
    let mut held: Vec<_> = (0..50).map(|_| Wire::connect(addr)).collect();
    for wire in &mut held {
        assert_eq!(wire.send("GET", "/health", "", None).status, 200);
    }
    held[0]
        .0
        .write_all(b"PUT /route HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        .unwrap();
    let busy = BootstrapServer::start({
        let mut config = BootstrapConfig::default();
        config.listen = addr;
        config
    });
    let sentence = busy.unwrap_err().to_string();
    assert!(
        sentence.starts_with(&format!("{addr} is in use: stop")),
        "{sentence}"
    );
    let started = Instant::now();
    server.close();
    assert!(started.elapsed() < Duration::from_secs(3));
    assert!(held.iter_mut().all(Wire::is_closed));
    let next = start(|config| config.listen = addr);
    assert_eq!(next.local_addr(), addr);
}

#[test]
fn it_starts_and_closes_inside_a_callers_runtime() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let server = start(|_| {});
        let mut config = BootstrapConfig::default();
        config.listen = server.local_addr();
        assert!(BootstrapServer::start(config).is_err());
        server.close();
    });
}
