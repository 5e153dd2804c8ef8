//! What operators rely on: readiness, limits, refusals, draining.

use std::{net::SocketAddr, time::Duration};

use hyper::Method;
use kvrouter::Config;

use crate::fakes::{
    FakeWorker, Running, Script, chunk, config, event_stream, next_piece, soon, whole,
};

async fn until_ready_is(router: &Running, wanted: u16) -> String {
    soon(async {
        loop {
            let (status, body) = router.read("/ready").await;
            if status == wanted {
                return body;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

/// This process's TCP connections between addresses, and whether small writes wait in them for what was sent before.
fn connections() -> Vec<(SocketAddr, SocketAddr, bool)> {
    let own = rustix::process::getpid();
    let own = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).unwrap();
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = open.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let mut found = Vec::new();
    for number in numbers.collect::<Vec<i32>>() {
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let copy = match rustix::process::pidfd_getfd(&own, number, flags) {
            Ok(copy) => copy,
            // Other tests close theirs meanwhile.
            Err(rustix::io::Errno::BADF) => continue,
            Err(error) => panic!(
                "pidfd_getfd of this process: {error}; in a container, allow it with --cap-add SYS_PTRACE"
            ),
        };
        let socket = std::net::TcpStream::from(copy);
        if let (Ok(local), Ok(peer)) = (socket.local_addr(), socket.peer_addr()) {
            let waits = !socket.nodelay().unwrap();
            found.push((local, peer, waits));
        }
    }
    found
}

#[tokio::test]
async fn no_small_write_waits_for_what_was_sent_before() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let address = |url: &str| url.trim_start_matches("http://").parse().unwrap();
    let (front, legs): (SocketAddr, [SocketAddr; 2]) = (
        address(&router.url),
        [&prefill, &decode].map(|worker| address(&worker.url)),
    );
    let (_prefill_chunks, held) = event_stream();
    prefill.then(held);
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let response = router
        .post("/generate", r#"{"text":"a","stream":true}"#)
        .await;
    let mut body = response.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    // All three connections of a stream are open now: the client's, and the router's to each worker.
    let open = connections();
    let accepted: Vec<_> = open.iter().filter(|(local, ..)| *local == front).collect();
    assert!(!accepted.is_empty());
    assert!(accepted.iter().all(|(.., waits)| !waits), "{accepted:?}");
    for leg in legs {
        let dialled: Vec<_> = open.iter().filter(|(_, peer, _)| *peer == leg).collect();
        assert!(!dialled.is_empty());
        assert!(dialled.iter().all(|(.., waits)| !waits), "{dialled:?}");
    }
}

#[tokio::test]
async fn readiness_follows_the_workers() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    prefill.set_probe_answers(503, 200);
    decode.set_probe_answers(404, 200);
    let router = Running::start(Config {
        api_key: Some("secret".to_owned()),
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    // Decode has no /ready, so its /health counts, and each probe carries the key.
    let (path, headers) = decode.probe().await;
    assert_eq!(
        (path.as_str(), &headers["authorization"]),
        ("/ready", &"Bearer secret".parse().unwrap())
    );
    assert_eq!(decode.probe().await.0, "/health");
    let body = until_ready_is(&router, 503).await;
    assert!(body.contains("\"ready_prefill_workers\":0"), "{body}");
    assert_eq!(router.read("/health").await, (200, "ok\n".to_owned()));
    prefill.set_probe_answers(200, 200);
    until_ready_is(&router, 200).await;
    decode.set_probe_answers(404, 500);
    let body = until_ready_is(&router, 503).await;
    assert!(body.contains("\"ready_decode_workers\":0"), "{body}");
    decode.set_probe_answers(200, 500);
    until_ready_is(&router, 200).await;
    // A client's own key wins, a client without one gets the router's.
    for (headers, key) in [
        (&[("authorization", "Bearer own")][..], "Bearer own"),
        (&[], "Bearer secret"),
    ] {
        whole(
            router
                .send(Method::POST, "/generate", headers, r#"{"text":"a"}"#)
                .await,
        )
        .await;
        assert_eq!(decode.request().await.headers["authorization"], key);
    }
}

/// Sends a request that must be refused with `status` and an explanation that contains `part`.
async fn assert_refused(
    router: &Running,
    (method, path): (Method, &str),
    headers: &[(&str, &str)],
    body: &str,
    (status, part): (u16, &str),
) {
    let response = router.send(method, path, headers, body.to_owned()).await;
    let (found, text) = whole(response).await;
    assert_eq!(found, status, "{path} {body}: {text}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(
        json["error"]["message"].as_str().unwrap().contains(part),
        "{text}"
    );
    assert_eq!(json["error"]["code"], status);
}

#[tokio::test]
async fn what_is_not_served_is_said() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let limits = Config {
        body_bytes_max: 100,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let router = Running::start(limits).await;
    for (method, path, status, part) in [
        (Method::POST, "/v1/embeddings", 501, "/v1/embeddings"),
        (Method::GET, "/nowhere", 501, "/nowhere"),
        (Method::GET, "/generate", 405, "POST"),
        (Method::POST, "/health", 405, "GET"),
    ] {
        assert_refused(&router, (method, path), &[], "", (status, part)).await;
    }
    let long = format!("{{\"text\":\"{}\"}}", "x".repeat(100));
    for (body, status, part) in [
        (long.as_str(), 413, "100 bytes"),
        ("{\"text\":", 400, "ends too early"),
        ("[]", 400, "object"),
        ("", 400, "object"),
        ("{\"text\":[]}", 400, "empty"),
    ] {
        let generate = (Method::POST, "/generate");
        assert_refused(&router, generate, &[], body, (status, part)).await;
    }
    let (generate, gzip) = ((Method::POST, "/generate"), [("content-encoding", "gzip")]);
    assert_refused(&router, generate, &gzip, "{}", (415, "Content-Encoding")).await;
    // None of these reached a worker: the first request it sees is this one.
    whole(router.post("/generate", r#"{"text":"first"}"#).await).await;
    assert_eq!(prefill.request().await.json()["text"], "first");
    let bad = "kvrouter_requests_total{route=\"/generate\",status=\"400\"}";
    assert_eq!(router.metric(bad).await, 4);
    let foreign = "kvrouter_requests_total{route=\"other\",status=\"501\"}";
    assert_eq!(router.metric(foreign).await, 1);
    let passed = "kvrouter_requests_total{route=\"passthrough\",status=\"501\"}";
    assert_eq!(router.metric(passed).await, 1);
}

#[tokio::test]
async fn the_request_bound_is_kept() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::start(Config {
        requests_max: 1,
        queue_max: 0,
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    router.ready(1, 1).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router
        .post("/generate", r#"{"text":"a"}"#)
        .await
        .into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    decode.request().await;
    assert_eq!(router.metric("kvrouter_live_requests").await, 1);
    assert_eq!(router.metric("kvrouter_live_rooms").await, 1);
    let response = router.post("/generate", r#"{"text":"b"}"#).await;
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["retry-after"]
        ),
        (429, &"1".parse().unwrap())
    );
    drop(chunks);
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    assert_eq!(
        whole(router.post("/generate", r#"{"text":"c"}"#).await)
            .await
            .0,
        200
    );
    assert_eq!(decode.request().await.json()["text"], "c");
    assert_eq!(router.metric("kvrouter_live_rooms").await, 0);
}

#[tokio::test]
async fn the_memory_for_bodies_is_bounded() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let limits = Config {
        buffered_bytes_max: 4096,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let router = Running::start(limits).await;
    let body = |bytes| format!("{{\"text\":\"{}\"}}", "x".repeat(bytes));
    decode.then(Script::Hang);
    let mut waiting = Box::pin(router.post("/generate", body(3000)));
    tokio::select! {
        _ = &mut waiting => panic!("nobody answered"),
        _ = prefill.request() => {}
    }
    // Three of four KiB are taken until the first request has an answer.
    let response = router.post("/generate", body(2000)).await;
    assert_eq!(
        (
            response.status().as_u16(),
            response.headers().contains_key("retry-after")
        ),
        (503, true)
    );
    assert_eq!(
        whole(router.post("/generate", body(500)).await).await.0,
        200
    );
    drop(waiting);
    soon(async { while router.metric("kvrouter_live_requests").await > 0 {} }).await;
    assert_eq!(
        whole(router.post("/generate", body(2000)).await).await.0,
        200
    );
}

#[tokio::test]
async fn draining_finishes_what_is_live() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut router = Running::between(&prefill, &decode).await;
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router
        .post("/generate", r#"{"text":"a"}"#)
        .await
        .into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    router.stop();
    // The listener closes, the stream goes on.
    let address = router.url.strip_prefix("http://").unwrap().to_owned();
    soon(async { while tokio::net::TcpStream::connect(&address).await.is_ok() {} }).await;
    chunks.send(chunk("data: 2\n\n")).await.unwrap();
    assert_eq!(next_piece(&mut body).await.unwrap().unwrap(), "data: 2\n\n");
    drop(chunks);
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    router.ended().await;
}

#[tokio::test]
async fn a_drain_that_takes_too_long_cancels_on_the_workers() {
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    prefill.then(Script::Hang);
    let (chunks, script) = event_stream();
    decode.then(script);
    let mut router = Running::start(Config {
        drain_timeout: Duration::from_millis(30),
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let mut body = router
        .post("/generate", r#"{"text":"a"}"#)
        .await
        .into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    let rid = decode.request().await.json()["rid"].clone();
    router.stop();
    router.ended().await;
    assert_eq!(decode.abort().await["rid"], rid);
    decode.dropped().await;
    assert!(next_piece(&mut body).await.is_err());
}

#[tokio::test]
async fn a_taken_address_is_an_error_with_a_reason() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let first = Running::between(&prefill, &decode).await;
    let port = first.url.rsplit(':').next().unwrap().parse().unwrap();
    let taken = Config {
        port,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let error = Running::try_start(taken).await.err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("cannot listen on 127.0.0.1:{port}")
    );
}

#[tokio::test]
async fn a_body_of_unannounced_length_is_bounded_too() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let limits = Config {
        body_bytes_max: 100,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let router = Running::start(limits).await;
    for (bytes, status) in [(100, "HTTP/1.1 200"), (101, "HTTP/1.1 413")] {
        let address = router.url.strip_prefix("http://").unwrap();
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        // Two chunks, so that neither exceeds the limit alone.
        let (head, tail) = ("{\"text\":\"", format!("{}\"}}", "x".repeat(bytes - 11)));
        let request = format!(
            "POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n\
             {:x}\r\n{head}\r\n{:x}\r\n{tail}\r\n0\r\n\r\n",
            head.len(),
            tail.len()
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        soon(socket.read_exact(&mut answer)).await.unwrap();
        assert_eq!(std::str::from_utf8(&answer).unwrap(), status);
    }
}

#[tokio::test]
async fn heads_of_requests_are_bounded() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let address = router.url.strip_prefix("http://").unwrap();
    // What is bounded is the whole head, and the number of its lines: 128 with `host`.
    let long = |bytes: usize| format!("x-long: {}\r\n", "x".repeat(bytes));
    let many = |lines: usize| -> String { (1..lines).map(|n| format!("x-{n}: y\r\n")).collect() };
    for (headers, status) in [
        (long(63 << 10), "HTTP/1.1 200"),
        (long(65 << 10), "HTTP/1.1 431"),
        (many(128), "HTTP/1.1 200"),
        (many(129), "HTTP/1.1 431"),
    ] {
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET /health HTTP/1.1\r\nhost: r\r\n{headers}\r\n");
        // The answer to too long a head may come, and the connection end, before all of it is written.
        let _written = socket.write_all(request.as_bytes()).await;
        let mut answer = [0; 12];
        soon(socket.read_exact(&mut answer)).await.unwrap();
        assert_eq!(std::str::from_utf8(&answer).unwrap(), status);
    }
}
