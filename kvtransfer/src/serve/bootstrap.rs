//! The bootstrap registry on a socket: SGLang's HTTP wire, on a thread of its own.
//!
//! One current-thread runtime serves every connection: a handler takes microseconds, and thousands of decode ranks only
//! poll. What a stranger can hold is bounded: connections, bytes of heads and bodies, and how long each may take.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tracing::{debug, info, warn};

use super::ServeError;
use super::access::Access;
use super::paced::{Limits, Pace, Paced, Phase};
use super::probe::find_dead;
use crate::bootstrap::registry::{Registry, RegistryLimits};
use crate::bootstrap::{ContentType, Method, Reply, Request, answer};

/// The header by which our ranks ask for a lease, in whole seconds; `0` withdraws the row.
pub const LEASE_HEADER: HeaderName = HeaderName::from_static("x-kvtransfer-lease-seconds");
/// The header that names the process behind a rank, both ways.
pub const INSTANCE_HEADER: HeaderName =
    HeaderName::from_static("x-sglang-disaggregation-instance-id");
/// The header that numbers the instance generation a reply is from.
pub const GENERATION_HEADER: HeaderName = HeaderName::from_static("x-kvtransfer-generation");

/// Bytes of a request head (and of hyper's read buffer). SGLang's heads have about 200.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Bytes of bodies held in memory at a time, over all connections; later bodies wait for earlier ones.
const BODIES_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Connections the kernel keeps for us while we are busy.
const BACKLOG: u32 = 4096;
/// Pause after `accept` fails for want of file descriptors; each closed connection frees one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const THREAD_NAME: &str = "kvt-bootstrap";
const FULL_REPLY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\n\
connection: close\r\ncontent-length: 45\r\n\r\nThe bootstrap server has too many connections";

/// What a [`BootstrapServer`] listens on and allows.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BootstrapConfig {
    /// Where to listen. Default `127.0.0.1:8998` (SGLang's port); port 0 picks a free one.
    pub listen: SocketAddr,
    /// Bearer token rule. Default: none is asked for, as in SGLang.
    pub access: Access,
    /// TLS; `None` (the default) speaks plain HTTP, the only thing stock SGLang can. See `serve::tls`.
    pub tls: Option<Arc<ServerConfig>>,
    /// Connections held at a time. Default 16 384, each about 20 KiB and a file descriptor. The next one is answered
    /// 503 (plain HTTP) and closed.
    pub connections_max: usize,
    /// Bytes of one request body. Default 1 MiB, aiohttp's. A larger one is answered 413.
    pub body_bytes_max: usize,
    /// Longest time for a request head after its first byte, and for a TLS handshake. Default 10 s.
    pub head_timeout: Duration,
    /// Longest time for a request body after its head. Default 10 s.
    pub body_timeout: Duration,
    /// Longest time for the peer to take a reply. Default 10 s.
    pub reply_timeout: Duration,
    /// How long a connection may be quiet between requests. Default 300 s: 60 of SGLang's heartbeats.
    pub idle_timeout: Duration,
    /// How often ranks in the way of a new instance are looked for. Default 2 s; `None` never connects anywhere, so
    /// that only leases and reused addresses end an instance.
    pub probe_interval: Option<Duration>,
    /// Bounds and times of the registry itself.
    pub registry: RegistryLimits,
}

impl Default for BootstrapConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8998)),
            access: Access::open(),
            tls: None,
            connections_max: 16_384,
            body_bytes_max: 1 << 20,
            head_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            probe_interval: Some(Duration::from_secs(2)),
            registry: RegistryLimits::default(),
        }
    }
}

/// A running registry. Dropping it closes it.
#[derive(Debug)]
pub struct BootstrapServer {
    local_addr: SocketAddr,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl BootstrapServer {
    /// Listens and starts serving; returns once connections are accepted.
    ///
    /// # Errors
    /// [`ServeError`] names the address and, if it is busy, what to do.
    pub fn start(config: BootstrapConfig) -> Result<Self, ServeError> {
        let on_thread = |source| ServeError::Thread {
            thread: THREAD_NAME,
            source,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(on_thread)?;
        let listen = config.listen;
        // Entered, not blocked on: the caller may be inside a runtime of its own.
        let bound = {
            let _entered = runtime.enter();
            bind(listen)
        };
        let (listener, local_addr) = match bound {
            Ok(bound) => bound,
            Err(source) => {
                // Dropping it instead would panic inside another runtime.
                runtime.shutdown_background();
                return Err(match source.kind() {
                    io::ErrorKind::AddrInUse => ServeError::AddressInUse { addr: listen },
                    _ => ServeError::Bind {
                        addr: listen,
                        source,
                    },
                });
            }
        };
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name(THREAD_NAME.to_owned())
            .spawn(move || {
                runtime.block_on(serve(config, listener, stopped));
                // Nothing in this runtime blocks, but a name lookup might one day.
                runtime.shutdown_timeout(Duration::from_secs(1));
            })
            .map_err(on_thread)?;
        info!(%local_addr, "the bootstrap registry listens");
        Ok(Self {
            local_addr,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens, with the port it was given.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Stops accepting, drops every connection and joins the thread; takes milliseconds, and at most about a second.
    pub fn close(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the bootstrap thread had panicked");
        }
    }
}

impl Drop for BootstrapServer {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn bind(listen: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let socket = if listen.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // A restarted server must not wait for its predecessor's connections to time out.
    socket.set_reuseaddr(true)?;
    socket.bind(listen)?;
    let listener = socket.listen(BACKLOG)?;
    let local_addr = listener.local_addr()?;
    Ok((listener, local_addr))
}

struct Shared {
    config: BootstrapConfig,
    registry: Mutex<Registry>,
    origin: Instant,
    /// One permit per KiB of body in memory.
    bodies: Semaphore,
}

impl Shared {
    fn with_registry<T>(&self, work: impl FnOnce(&mut Registry, Duration) -> T) -> T {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut registry, self.origin.elapsed())
    }
}

async fn serve(config: BootstrapConfig, listener: TcpListener, mut stopped: watch::Receiver<bool>) {
    let tls = config.tls.clone().map(TlsAcceptor::from);
    let shared = Arc::new(Shared {
        registry: Mutex::new(Registry::new(config.registry.clone())),
        origin: Instant::now(),
        bodies: Semaphore::new(BODIES_BYTES_MAX / 1024),
        config,
    });
    let mut tasks = JoinSet::new();
    if let Some(interval) = shared.config.probe_interval {
        tasks.spawn(probe_forever(Arc::clone(&shared), interval));
    }
    let others = tasks.len();
    let mut was_full = false;
    let mut was_failing = false;
    loop {
        tokio::select! {
            // An error means the sender is gone, which also means stop.
            _ = stopped.wait_for(|&stop| stop) => break,
            Some(_) = tasks.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if tasks.len().saturating_sub(others) >= shared.config.connections_max => {
                    if !was_full {
                        warn!(limit = shared.config.connections_max, "too many connections: new ones are refused");
                    }
                    was_full = true;
                    refuse(stream, tls.is_some());
                }
                Ok((stream, peer)) => {
                    (was_full, was_failing) = (false, false);
                    tasks.spawn(serve_connection(Arc::clone(&shared), stream, peer, tls.clone()));
                }
                Err(error) => {
                    if !was_failing {
                        warn!(%error, "connections cannot be accepted; is `ulimit -n` above the connection limit?");
                    }
                    was_failing = true;
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    tasks.shutdown().await;
}

/// Says why, where one write suffices, and closes.
fn refuse(stream: TcpStream, is_tls: bool) {
    if let (false, Ok(mut stream)) = (is_tls, stream.into_std()) {
        // Still non-blocking: a fresh socket has room for this, and if not, closing says enough.
        if stream.write_all(FULL_REPLY).is_ok() {
            stream.shutdown(std::net::Shutdown::Write).ok();
        }
    }
}

async fn serve_connection(
    shared: Arc<Shared>,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
) {
    // Replies are small and final; waiting to fill a segment only adds latency.
    stream.set_nodelay(true).ok();
    let Some(acceptor) = tls else {
        return serve_http(shared, stream, peer).await;
    };
    match timeout(shared.config.head_timeout, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => serve_http(shared, stream, peer).await,
        Ok(Err(error)) => debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => debug!(%peer, "TLS handshake timed out"),
    }
}

async fn serve_http<S>(shared: Arc<Shared>, socket: S, peer: SocketAddr)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let pace = Pace::new();
    // The first head is due at once; only later ones may be awaited idly.
    pace.enter(Phase::Head);
    let limits = Limits {
        idle: shared.config.idle_timeout,
        head: shared.config.head_timeout,
        reply: shared.config.reply_timeout,
    };
    let service = service_fn(|request| respond(&shared, &pace, peer, request));
    let io = TokioIo::new(Paced {
        socket,
        pace: Arc::clone(&pace),
    });
    let connection = http1::Builder::new()
        .max_buf_size(HEAD_BYTES_MAX)
        .header_read_timeout(None)
        // As aiohttp spells them, for whoever reads the wire.
        .title_case_headers(true)
        .serve_connection(io, service);
    tokio::select! {
        result = connection => if let Err(error) = result {
            debug!(%peer, %error, "connection ended");
        },
        phase = pace.overdue(limits) => debug!(%peer, ?phase, "connection was too slow"),
    }
}

async fn respond(
    shared: &Shared,
    pace: &Pace,
    peer: SocketAddr,
    request: hyper::Request<Incoming>,
) -> Result<hyper::Response<Full<Bytes>>, Infallible> {
    pace.enter(Phase::Serving);
    let response = match reply_to(shared, request).await {
        Ok(reply) => {
            if reply.parked {
                warn!(%peer, "a rank disagrees with the registered instance; its row is parked beside it");
            }
            encode(reply, false)
        }
        Err(reply) => {
            debug!(%peer, status = reply.status, "request refused before the registry saw it");
            encode(reply, true)
        }
    };
    pace.enter(Phase::Replying);
    Ok(response)
}

/// `Err` is a reply after which the connection closes, because the body was not read to its end.
async fn reply_to(shared: &Shared, request: hyper::Request<Incoming>) -> Result<Reply, Reply> {
    let (head, body) = request.into_parts();
    let method = match head.method {
        hyper::Method::GET => Method::Get,
        hyper::Method::HEAD => Method::Head,
        hyper::Method::PUT => Method::Put,
        hyper::Method::POST => Method::Post,
        _ => Method::Other,
    };
    let is_read = matches!(method, Method::Get | Method::Head);
    let is_health = is_read && head.uri.path() == "/health";
    let authorization = head
        .headers
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes);
    if !is_health && !shared.config.access.permits(!is_read, authorization) {
        return Err(Reply::text(
            401,
            "A bearer token is required, and this is not it.",
        ));
    }
    let (body, _permit) = if matches!(method, Method::Put | Method::Post) {
        read_body(shared, body).await?
    } else {
        (Bytes::new(), None)
    };
    // A header that is no text can be no lease and no identity; the empty text is refused as such.
    let text = |name| {
        head.headers
            .get(name)
            .map(|value: &HeaderValue| value.to_str().unwrap_or_default())
    };
    let request = Request {
        method,
        path: head.uri.path(),
        query: head.uri.query().unwrap_or_default(),
        body: &body,
        lease: text(LEASE_HEADER),
        instance: text(INSTANCE_HEADER),
    };
    Ok(shared.with_registry(|registry, now| answer(registry, &request, now)))
}

async fn read_body<'a>(
    shared: &'a Shared,
    body: Incoming,
) -> Result<(Bytes, Option<tokio::sync::SemaphorePermit<'a>>), Reply> {
    let bytes_max = shared.config.body_bytes_max;
    let too_large = || {
        Reply::text(
            413,
            format!("Maximum request body size {bytes_max} exceeded."),
        )
    };
    let declared = body.size_hint().upper().unwrap_or(u64::MAX);
    if body.size_hint().lower() > bytes_max as u64 {
        return Err(too_large());
    }
    let bytes = usize::try_from(declared)
        .unwrap_or(usize::MAX)
        .min(bytes_max)
        .min(BODIES_BYTES_MAX);
    let kib = u32::try_from(bytes.div_ceil(1024)).expect("invariant: at most 64 Ki");
    let reading = async {
        let permit = shared.bodies.acquire_many(kib).await.ok();
        Limited::new(body, bytes_max)
            .collect()
            .await
            .map(|collected| (collected.to_bytes(), permit))
    };
    match timeout(shared.config.body_timeout, reading).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Reply::text(400, "The request body ended early.")),
        Err(_) => Err(Reply::text(408, "408: Request Timeout")),
    }
}

fn encode(reply: Reply, closes: bool) -> hyper::Response<Full<Bytes>> {
    let body = match reply.body {
        std::borrow::Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
        std::borrow::Cow::Owned(text) => Bytes::from(text),
    };
    let mut response = hyper::Response::new(Full::new(body));
    *response.status_mut() = hyper::StatusCode::from_u16(reply.status)
        .unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static(match reply.content_type {
            ContentType::Text => "text/plain; charset=utf-8",
            ContentType::Json => "application/json; charset=utf-8",
        }),
    );
    if let Some(allow) = reply.allow {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if reply.status == 401 {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(generation) = reply.generation {
        headers.insert(GENERATION_HEADER, HeaderValue::from(generation));
    }
    if let Some(instance) = reply
        .instance
        .and_then(|text| HeaderValue::from_str(&text).ok())
    {
        headers.insert(INSTANCE_HEADER, instance);
    }
    if closes {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn probe_forever(shared: Arc<Shared>, interval: Duration) {
    let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(10)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(probe) = shared.with_registry(Registry::probe) else {
            continue;
        };
        let dead = find_dead(probe).await;
        if !dead.is_empty() {
            info!(
                ranks = dead.len(),
                "ranks of the registered instance are gone"
            );
            shared.with_registry(|registry, now| registry.mark_dead(&dead, now));
        }
    }
}
