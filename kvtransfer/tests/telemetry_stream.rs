//! The telemetry server and its watcher over loopback, with good, slow, dead and hostile peers.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use kvtransfer::serve::telemetry::{
    CONNECTIONS_MAX, CloseError, ServerTls, StartError, TelemetryConfig, TelemetryServer,
};
use kvtransfer::telemetry::message::{Stamp, delta_message, snapshot_message};
use kvtransfer::telemetry::replica::{BrokenStream, Replica};
use kvtransfer::telemetry::snapshot::{RailStat, Snapshot};
use kvtransfer::telemetry::v1::telemetry_client::TelemetryClient;
use kvtransfer::telemetry::v1::watch_response::Picture;
use kvtransfer::telemetry::v1::{self, WatchRequest};
use kvtransfer::telemetry::watch::{Sighting, WatchConfig, WatchError, WatchTls, Watcher};
use kvtransfer::token::BearerToken;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An engine with one number to tell.
#[derive(Default)]
struct Engine {
    queued: AtomicU64,
    looks: AtomicU64,
}

impl Engine {
    fn source(
        self: &Arc<Self>,
        epoch: u64,
        rails: usize,
    ) -> Arc<dyn Fn() -> Snapshot + Send + Sync> {
        let engine = Arc::clone(self);
        Arc::new(move || {
            let look = engine.looks.fetch_add(1, Relaxed) + 1;
            let bytes_queued = engine.queued.load(Relaxed);
            let rail = |n| RailStat {
                peer: format!("peer-{n}"),
                bytes_queued,
                ..RailStat::default()
            };
            Snapshot {
                instance: "engine".into(),
                epoch,
                monotonic_ns: look,
                rails: (0..rails).map(rail).collect(),
                ..Snapshot::default()
            }
        })
    }
}

fn quick() -> TelemetryConfig {
    let mut config = TelemetryConfig::default();
    config.interval = Duration::from_millis(2);
    config.keep_alive = Duration::from_millis(100);
    config
}

fn watch(addr: std::net::SocketAddr) -> WatchConfig {
    let mut config = WatchConfig::new(format!("http://{addr}"));
    config.backoff_min = Duration::from_millis(5);
    config.backoff_max = Duration::from_millis(20);
    config
}

/// Waits, at most a watchdog's time, until the watcher sees what it should.
async fn until(watcher: &Watcher, wanted: impl FnMut(&Sighting) -> bool) -> Sighting {
    within(async {
        watcher
            .view()
            .wait_for(wanted)
            .await
            .expect("the watcher lives")
            .clone()
    })
    .await
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(30), future)
        .await
        .expect("the watchdog barked")
}

fn queued(sighting: &Sighting) -> Option<u64> {
    sighting
        .picture
        .as_ref()
        .map(|picture| picture.rails[0].bytes_queued)
}

fn refused_with(sighting: &Sighting, code: tonic::Code) -> bool {
    matches!(sighting.lost.as_deref(), Some(WatchError::Stream(status)) if status.code() == code)
}

#[tokio::test]
async fn a_watcher_follows_an_engine_and_its_restart() {
    let engine = Arc::new(Engine::default());
    let server = TelemetryServer::start(quick(), engine.source(1, 3)).expect("it starts");
    let watcher = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&watcher, |seen| queued(seen) == Some(0)).await;
    for value in [5, 6, 7] {
        engine.queued.store(value, Relaxed);
        let seen = until(&watcher, |seen| queued(seen) == Some(value)).await;
        assert_eq!((seen.connects, seen.restarts, seen.live), (1, 0, true));
    }
    // Nothing changes: keep-alives still move the clocks.
    let clock = |seen: &Sighting| {
        seen.picture
            .as_ref()
            .map_or(0, |picture| picture.monotonic_ns)
    };
    let before = clock(&watcher.latest());
    let seen = until(&watcher, |seen| clock(seen) > before).await;
    assert!(seen.age(tokio::time::Instant::now()).expect("heard") < Duration::from_secs(3));

    let mut config = quick();
    config.listen = server.addr();
    server
        .close()
        .expect("it ends in time, with a subscriber connected");
    let seen = until(&watcher, |seen| !seen.live).await;
    assert_eq!(queued(&seen), Some(7), "the last picture stays");
    let server = TelemetryServer::start(config, engine.source(2, 3)).expect("it starts again");
    let seen = until(&watcher, |seen| seen.live).await;
    assert_eq!((seen.connects, seen.restarts), (2, 1));
    server.close().expect("it ends in time");
}

#[tokio::test]
async fn a_subscriber_that_never_reads_costs_nobody_else() {
    let engine = Arc::new(Engine::default());
    let mut config = quick();
    config.interval = Duration::from_millis(1);
    let server = TelemetryServer::start(config, engine.source(1, 1_000)).expect("it starts");
    // A small window, so that what piles up would have to pile up in the server.
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", server.addr()))
        .expect("an address")
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(65_535);
    let channel = within(endpoint.connect()).await.expect("it connects");
    let mut slow = within(TelemetryClient::new(channel).watch(WatchRequest {}))
        .await
        .expect("a stream")
        .into_inner();
    let watcher = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&watcher, |seen| seen.live).await;
    for value in 1..=400 {
        engine.queued.store(value, Relaxed);
        until(&watcher, |seen| queued(seen) == Some(value)).await;
    }
    // Each state is some 20 kB. The slow one finds a few of them queued, skips the others, and ends up to date.
    let mut replica = Replica::default();
    let mut messages = 0;
    loop {
        let message = within(slow.message())
            .await
            .expect("no error")
            .expect("not the end");
        messages += 1;
        let picture = replica
            .accept(message)
            .expect("in sequence, though states were skipped");
        if picture.rails[0].bytes_queued == 400 {
            break;
        }
    }
    assert!(messages < 40, "{messages} messages were queued");
}

#[tokio::test]
async fn places_are_bounded_and_a_dead_subscriber_frees_its_own() {
    let engine = Arc::new(Engine::default());
    let mut config = quick();
    config.subscribers_max = 1;
    let server = TelemetryServer::start(config, engine.source(1, 1)).expect("it starts");
    let first = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&first, |seen| seen.live).await;
    let second = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&second, |seen| {
        refused_with(seen, tonic::Code::ResourceExhausted)
    })
    .await;
    assert!(server.refusals().subscribers > 0);
    drop(first);
    until(&second, |seen| seen.live).await;
}

#[tokio::test]
async fn a_frozen_subscriber_loses_its_place() {
    let engine = Arc::new(Engine::default());
    let mut config = quick();
    config.subscribers_max = 1;
    let server = TelemetryServer::start(config, engine.source(1, 1)).expect("it starts");
    // A relay that can stop to relay, with both connections left open.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let relay_addr = listener.local_addr().expect("an address");
    let (freeze, frozen) = tokio::sync::oneshot::channel::<()>();
    let addr = server.addr();
    let relay = tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.expect("the watcher comes");
        let mut far = TcpStream::connect(addr).await.expect("it connects");
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            _ = frozen => std::future::pending().await,
        }
    });
    let first = Watcher::spawn(watch(relay_addr)).expect("a good endpoint");
    until(&first, |seen| seen.live).await;
    freeze.send(()).expect("the relay runs");
    let second = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&second, |seen| {
        refused_with(seen, tonic::Code::ResourceExhausted)
    })
    .await;
    until(&second, |seen| seen.live).await;
    assert!(
        !relay.is_finished(),
        "the frozen one still holds its connection"
    );
    relay.abort();
}

#[tokio::test]
async fn only_the_token_opens_stream_and_page() {
    let engine = Arc::new(Engine::default());
    let mut config = quick();
    config.token = Some(BearerToken::new("s3cret").expect("a token"));
    config.metrics = Some(([127, 0, 0, 1], 0).into());
    let server = TelemetryServer::start(config, engine.source(1, 1)).expect("it starts");
    for token in [None, Some("wrong!")] {
        let mut config = watch(server.addr());
        config.token = token.map(|token| BearerToken::new(token).expect("a token"));
        let watcher = Watcher::spawn(config).expect("a good endpoint");
        until(&watcher, |seen| {
            refused_with(seen, tonic::Code::Unauthenticated)
        })
        .await;
        assert!(watcher.latest().picture.is_none());
    }
    assert_eq!(
        engine.looks.load(Relaxed),
        0,
        "strangers cost the engine nothing"
    );
    let mut config = watch(server.addr());
    config.token = Some(BearerToken::new("s3cret").expect("a token"));
    let watcher = Watcher::spawn(config).expect("a good endpoint");
    until(&watcher, |seen| seen.live).await;

    let page = server.metrics_addr().expect("a page");
    let request = |more: &str| format!("GET /metrics HTTP/1.1\r\nhost: x\r\n{more}\r\n");
    assert!(http(page, &request("")).await.starts_with("HTTP/1.1 401"));
    assert!(
        http(page, &request("authorization: Bearer wrong!\r\n"))
            .await
            .starts_with("HTTP/1.1 401")
    );
    let text = http(page, &request("authorization: Bearer s3cret\r\n")).await;
    assert!(
        text.starts_with("HTTP/1.1 200") && text.contains("text/plain; version=0.0.4"),
        "{text}"
    );
    assert!(
        text.contains("kvtransfer_rail_queued_bytes{peer=\"peer-0\""),
        "{text}"
    );
    let other = "authorization: Bearer s3cret\r\nhost: x\r\n\r\n";
    assert!(
        http(page, &format!("GET / HTTP/1.1\r\n{other}"))
            .await
            .starts_with("HTTP/1.1 404")
    );
    assert!(
        http(page, &format!("PUT /metrics HTTP/1.1\r\n{other}"))
            .await
            .starts_with("HTTP/1.1 405")
    );
}

async fn http(addr: std::net::SocketAddr, request: &str) -> String {
    let exchange = async {
        let mut socket = TcpStream::connect(addr).await.expect("it connects");
        socket
            .write_all(request.as_bytes())
            .await
            .expect("it takes the request");
        let mut answer = String::new();
        socket
            .read_to_string(&mut answer)
            .await
            .expect("it answers and closes");
        answer
    };
    within(exchange).await
}

#[tokio::test]
async fn hostile_bytes_cost_only_their_sender() {
    let engine = Arc::new(Engine::default());
    let mut config = quick();
    config.metrics = Some(([127, 0, 0, 1], 0).into());
    let server = TelemetryServer::start(config, engine.source(1, 1)).expect("it starts");
    let watcher = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&watcher, |seen| seen.live).await;
    let page = server.metrics_addr().expect("a page");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..200_usize {
        let mut garbage = match round % 4 {
            // A proper preface and a SETTINGS frame, so that the garbage reaches the frame reader.
            0 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
            1 => b"GET /metrics HTTP/1.1\r\n".to_vec(),
            _ => Vec::new(),
        };
        garbage.extend((0..round * 7).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        }));
        let addr = if round % 2 == 0 { server.addr() } else { page };
        let mut socket = within(TcpStream::connect(addr)).await.expect("it accepts");
        // The server may hang up in the middle; then the garbage was noticed early.
        let _ = within(socket.write_all(&garbage)).await;
        let _ = socket.shutdown().await;
        let _ = within(socket.read_to_end(&mut Vec::new())).await;
    }
    assert!(server.refusals().protocol > 0);
    engine.queued.store(77, Relaxed);
    let seen = until(&watcher, |seen| queued(seen) == Some(77)).await;
    assert_eq!(seen.connects, 1, "the good stream never broke");
    let fresh = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&fresh, |seen| queued(seen) == Some(77)).await;
    assert!(
        http(page, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .contains(" 77\n")
    );
}

#[tokio::test]
async fn silent_connections_cannot_keep_others_out() {
    let engine = Arc::new(Engine::default());
    let server = TelemetryServer::start(quick(), engine.source(1, 1)).expect("it starts");
    let mut squatters = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        squatters.push(
            within(TcpStream::connect(server.addr()))
                .await
                .expect("it accepts"),
        );
    }
    let watcher = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&watcher, |seen| seen.lost.is_some()).await;
    assert!(server.refusals().connections > 0);
    // The squatters lose their places on their own, though they all still hold their end.
    until(&watcher, |seen| seen.live).await;
    drop(squatters);
}

#[tokio::test]
async fn closing_is_bounded_even_if_the_engine_hangs() {
    let (looked, looking) = std::sync::mpsc::sync_channel(1);
    let (free, freed) = std::sync::mpsc::sync_channel::<()>(1);
    let freed = std::sync::Mutex::new(freed);
    let source = move || {
        let _ = looked.try_send(());
        let _ = freed.lock().expect("not poisoned").recv();
        Snapshot::default()
    };
    let server = TelemetryServer::start(quick(), Arc::new(source)).expect("it starts");
    let watcher = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    let closed = tokio::task::spawn_blocking(move || {
        looking
            .recv_timeout(Duration::from_secs(30))
            .expect("the engine is asked");
        server.close()
    });
    assert_eq!(within(closed).await.expect("no panic"), Err(CloseError));
    drop(free);
    drop(watcher);
}

#[tokio::test]
async fn an_engine_that_panics_ends_the_server_not_the_process() {
    let source = || -> Snapshot { panic!("expected by this test") };
    let server = TelemetryServer::start(quick(), Arc::new(source)).expect("it starts");
    let watcher = Watcher::spawn(watch(server.addr())).expect("a good endpoint");
    until(&watcher, |seen| seen.lost.is_some()).await;
    assert!(!watcher.latest().live);
    server.close().expect("it ends in time");
}

#[tokio::test]
async fn settings_out_of_range_are_named() {
    let engine = Arc::new(Engine::default());
    let start = |config| TelemetryServer::start(config, engine.source(1, 1)).map(drop);
    let mut config = quick();
    config.interval = Duration::ZERO;
    assert!(matches!(
        start(config),
        Err(StartError::Setting {
            setting: "interval"
        })
    ));
    let mut config = quick();
    config.keep_alive = Duration::from_millis(1);
    assert!(matches!(
        start(config),
        Err(StartError::Setting {
            setting: "keep_alive"
        })
    ));
    let mut config = quick();
    config.subscribers_max = 0;
    assert!(matches!(
        start(config),
        Err(StartError::Setting {
            setting: "subscribers_max"
        })
    ));
    let taken = TelemetryServer::start(quick(), engine.source(1, 1)).expect("it starts");
    let mut config = quick();
    config.listen = taken.addr();
    assert!(matches!(start(config), Err(StartError::Listen { .. })));
}

struct Authority {
    pem: Vec<u8>,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params
            .self_signed(&key)
            .expect("a certificate")
            .pem()
            .into_bytes();
        Self {
            pem,
            issuer: rcgen::Issuer::new(params, key),
        }
    }

    fn sign(&self, name: &str) -> (Vec<u8>, Vec<u8>) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (
            certificate.pem().into_bytes(),
            key.serialize_pem().into_bytes(),
        )
    }
}

#[tokio::test]
async fn mutual_tls_lets_in_whom_the_authority_signed() {
    let (ours, stranger) = (Authority::new(), Authority::new());
    let (chain_pem, key_pem) = ours.sign("engine.test");
    let mut config = quick();
    config.tls = Some(ServerTls {
        chain_pem,
        key_pem,
        client_ca_pem: Some(ours.pem.clone()),
    });
    let engine = Arc::new(Engine::default());
    let server = TelemetryServer::start(config, engine.source(1, 1)).expect("it starts");
    let follow = |ca: &Authority, identity| {
        let mut config = watch(server.addr());
        config.endpoint = format!("https://{}", server.addr());
        let mut tls = WatchTls::new(ca.pem.clone());
        tls.server_name = Some("engine.test".to_owned());
        tls.identity = identity;
        config.tls = Some(tls);
        Watcher::spawn(config).expect("a good endpoint")
    };
    for refused in [
        follow(&ours, None),
        follow(&ours, Some(stranger.sign("router.test"))),
        follow(&stranger, Some(ours.sign("router.test"))),
        Watcher::spawn(watch(server.addr())).expect("a good endpoint"),
    ] {
        until(&refused, |seen| seen.lost.is_some()).await;
        assert!(refused.latest().picture.is_none());
    }
    let welcome = follow(&ours, Some(ours.sign("router.test")));
    until(&welcome, |seen| seen.live).await;
    assert!(server.refusals().handshakes > 0);
}

/// An engine that says on each stream what the test tells it to, and then nothing.
struct Puppet(Vec<v1::WatchResponse>);

#[tonic::async_trait]
impl v1::telemetry_server::Telemetry for Puppet {
    type WatchStream = stream::BoxStream<'static, Result<v1::WatchResponse, tonic::Status>>;

    async fn watch(
        &self,
        _request: tonic::Request<WatchRequest>,
    ) -> Result<tonic::Response<Self::WatchStream>, tonic::Status> {
        let lines = stream::iter(self.0.clone().into_iter().map(Ok));
        Ok(tonic::Response::new(lines.chain(stream::pending()).boxed()))
    }
}

async fn told(lines: Vec<v1::WatchResponse>) -> Watcher {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let addr = listener.local_addr().expect("an address");
    let incoming = stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(socket, _)| socket);
        Some((accepted, listener))
    });
    let service = v1::telemetry_server::TelemetryServer::new(Puppet(lines));
    tokio::spawn(
        tonic::transport::Server::builder().serve_with_incoming(service, incoming.boxed()),
    );
    let mut config = watch(addr);
    config.silence_max = Duration::from_millis(200);
    Watcher::spawn(config).expect("a good endpoint")
}

#[tokio::test]
async fn a_watcher_leaves_engines_that_fall_silent_or_break_the_protocol() {
    let picture = Snapshot {
        epoch: 5,
        ..Snapshot::default()
    };
    let stamp = |sequence, epoch| Stamp {
        sequence,
        epoch,
        monotonic_ns: 0,
        wall_ns: 0,
    };
    let whole = || snapshot_message(stamp(0, 5), &picture);
    let still = |sequence, epoch| delta_message(stamp(sequence, epoch), &Default::default());

    let silent = told(vec![whole()]).await;
    let seen = until(&silent, |seen| seen.connects >= 2).await;
    assert!(
        matches!(seen.lost.as_deref(), Some(WatchError::Silent(_))),
        "{:?}",
        seen.lost
    );

    let broken = |seen: &Sighting, wanted: BrokenStream| matches!(seen.lost.as_deref(), Some(WatchError::Broken(error)) if *error == wanted);
    let gap = told(vec![whole(), still(1, 5), still(3, 5)]).await;
    until(&gap, |seen| {
        broken(
            seen,
            BrokenStream::Gap {
                expected: 2,
                got: 3,
            },
        )
    })
    .await;
    let restarted = told(vec![whole(), still(1, 6)]).await;
    until(&restarted, |seen| {
        broken(seen, BrokenStream::EpochChanged { epoch: 5, got: 6 })
    })
    .await;
    let headless = told(vec![still(0, 5)]).await;
    until(&headless, |seen| broken(seen, BrokenStream::NoSnapshot)).await;
    assert!(headless.latest().picture.is_none());
    let bad = v1::WatchResponse {
        picture: Some(Picture::Snapshot(v1::Snapshot {
            instance: "x".repeat(300),
            ..Default::default()
        })),
        ..Default::default()
    };
    let malformed = told(vec![bad]).await;
    until(&malformed, |seen| {
        matches!(
            seen.lost.as_deref(),
            Some(WatchError::Broken(BrokenStream::Malformed(_)))
        )
    })
    .await;
}
