//! Listens, accepts, and sends each request where it belongs.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use super::abort::AbortRunner;
use super::admission::{Permit, Refused};
use super::passthrough;
use super::request::Dialect;
use super::shape::Shape;
use super::stream::ReplyBody;
use super::target::Target;
use super::{Front, fanout, messages, models, pair, request};
use crate::config::{Config, ConfigError};
use crate::discover::source::SourceError;
use crate::discover::{FleetWatch, flags};
use crate::epp::serve::{ExternalPicker, ExternalPickerError};
use crate::fleet;
use crate::gossip;
use crate::metrics::Route;
use crate::observe::{Trail, WatchedBody};
use crate::overview::Overview;
use crate::pool::Role;
use crate::pool::tls::{self, TlsError};
use crate::respond::{self, RouteError};

/// Connections beyond one per generation request, for probes, scrapes and idle clients. Above the sum the router stops
/// accepting until one closes.
pub const CONNECTIONS_SPARE: usize = 1024;

/// A connection that has not sent a whole request head for this long is closed: slow attackers and idle clients alike.
/// Common clients keep idle connections for 60 s at most, and should be the ones to let go.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(75);

/// Largest request head in bytes; larger ones get 431. Room for a long token and a browser's cookies.
pub const HEAD_BYTES_MAX: usize = 64 << 10;

/// Most headers of a request; more get 431.
pub const HEADERS_MAX: usize = 128;

/// A client that has not finished its TLS handshake in this time is let go.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// When accepting fails (no file descriptors left, for instance), the next try comes after this pause.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why the router could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The settings contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The Envoy picker cannot start.
    #[error(transparent)]
    External(#[from] ExternalPickerError),
    /// The source of workers cannot be followed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The address cannot be listened on.
    #[error("cannot listen on {host}:{port}")]
    Listen {
        /// The address asked for.
        host: String,
        /// The port asked for.
        port: u16,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A router that listens but does not serve yet.
pub struct Router {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<TlsAcceptor>,
    gossip: gossip::Talk,
    front: Arc<Front>,
    abort_runner: AbortRunner,
    external: Option<ExternalPicker>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router")
            .field("address", &self.address)
            .field("tls", &self.tls.is_some())
            .field("front", &self.front)
            .finish_non_exhaustive()
    }
}

impl Router {
    /// Checks the settings and opens the listener. The workers are those that the settings name.
    ///
    /// # Errors
    /// [`RunError`]
    pub async fn bind(config: Config) -> Result<Self, RunError> {
        config.check()?;
        let fleet = flags::watch(&config);
        Self::bind_with(config, fleet).await
    }

    /// The same with the workers that `fleet` publishes, now none perhaps, instead of those in the settings.
    ///
    /// # Errors
    /// [`RunError`]
    pub async fn bind_with(config: Config, fleet: FleetWatch) -> Result<Self, RunError> {
        config.check_settings()?;
        let listen = |source| RunError::Listen {
            host: config.host.clone(),
            port: config.port,
            source,
        };
        let host = config.host.trim_start_matches('[').trim_end_matches(']');
        let listener = TcpListener::bind((host, config.port))
            .await
            .map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let tls = config.tls.as_ref().map(tls::acceptor).transpose()?;
        let external = match &config.epp {
            Some(epp) => Some(ExternalPicker::bind(epp.clone()).await?),
            None => None,
        };
        let gossip =
            gossip::Talk::prepare(&config.gossip, host)
                .await
                .map_err(|error| match error {
                    gossip::TalkError::Tls(error) => RunError::Tls(error),
                    gossip::TalkError::Listen { port, source } => RunError::Listen {
                        host: config.host.clone(),
                        port,
                        source,
                    },
                })?;
        let (front, abort_runner) = Front::new(config, fleet)?;
        Ok(Self {
            listener,
            address,
            tls,
            gossip,
            front,
            abort_runner,
            external,
        })
    }

    /// What its requests share, for those who watch or steer it.
    pub fn front(&self) -> &Arc<Front> {
        &self.front
    }

    /// Where other replicas are told of this one's bookings, if they are.
    pub fn gossip_addr(&self) -> Option<SocketAddr> {
        self.gossip.address()
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Where Envoy's external processing is served, if it is.
    pub fn grpc_addr(&self) -> Option<SocketAddr> {
        self.external.as_ref().map(ExternalPicker::local_addr)
    }

    /// Serves until `shutdown` resolves, then finishes live requests for at most the drain timeout; what is left is
    /// cancelled on its workers.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let Self {
            listener,
            address,
            tls,
            gossip,
            front,
            abort_runner,
            external,
        } = self;
        let workers = front.pool.now();
        let (prefills, decodes) = (
            workers.of_role(Role::Prefill).len(),
            workers.of_role(Role::Decode).len(),
        );
        let scheme = if tls.is_some() { "https" } else { "http" };
        tracing::info!(prefills, decodes, "listening on {scheme}://{address}");
        let mut background = JoinSet::new();
        background.spawn(fleet::follow(Arc::clone(&front), front.fleet.clone()));
        gossip.begin(&front.picker, &mut background);
        let (close_aborts, closing) = oneshot::channel::<()>();
        let aborts = tokio::spawn(abort_runner.run(async {
            // An error means that the router was dropped, which closes the queue too.
            let _ = closing.await;
        }));
        let (close_spans, spans_closing) = oneshot::channel::<()>();
        let exporter = front.exporter.lock();
        let exporter = exporter.unwrap_or_else(PoisonError::into_inner).take();
        let exporting = exporter.map(|exporter| {
            // An error means the same as above.
            tokio::spawn(exporter.run(async {
                let _ = spans_closing.await;
            }))
        });
        let mut connections = JoinSet::new();
        if let Some(external) = external {
            connections.spawn(external.serve(Arc::clone(&front)));
        }
        accept_until(shutdown, &listener, tls.as_ref(), &front, &mut connections).await;
        drop(listener);
        front.drain.throw();
        let finished = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(front.live.now().drain_timeout, finished)
            .await
            .is_err()
        {
            tracing::warn!(
                left = connections.len(),
                "the drain timeout is over, cancelling requests"
            );
            connections.shutdown().await;
        }
        // Cancelled requests have queued their aborts by now; they are carried out before the router is gone.
        drop(close_aborts);
        if let Err(error) = aborts.await {
            tracing::error!(%error, "the abort queue failed");
        }
        drop(close_spans);
        if let Some(exporting) = exporting
            && let Err(error) = exporting.await
        {
            tracing::error!(%error, "the export of spans failed");
        }
    }
}

async fn accept_until(
    shutdown: impl Future<Output = ()>,
    listener: &TcpListener,
    tls: Option<&TlsAcceptor>,
    front: &Arc<Front>,
    connections: &mut JoinSet<()>,
) {
    tokio::pin!(shutdown);
    loop {
        let config = front.live.now();
        let most = config
            .requests_max
            .saturating_add(config.queue_max)
            .saturating_add(CONNECTIONS_SPARE);
        tokio::select! {
            () = &mut shutdown => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(greet(stream, tls.cloned(), Arc::clone(front)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn greet(stream: TcpStream, tls: Option<TlsAcceptor>, front: Arc<Front>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "the client was gone before it was served");
        return;
    }
    let Some(tls) = tls else {
        return serve_connection(stream, front).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => serve_connection(stream, front).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    front: Arc<Front>,
) {
    let service = service_fn(|request| {
        let front = Arc::clone(&front);
        async move { Ok::<_, Infallible>(answer(&front, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_header_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let drain = front.drain.clone();
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = drain.thrown() => {
            // The request under way is finished, then the connection closes.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn answer(front: &Arc<Front>, mut request: Request<Incoming>) -> Response<WatchedBody> {
    let target = Target::of(request.method(), request.uri().path());
    let route = target.as_ref().map_or(Route::Other, Target::route);
    let trail = Trail::begin(front, route, request.headers());
    request.extensions_mut().insert(Arc::clone(&trail));
    let response = match serve_target(front, target, request).await {
        Ok(response) => response,
        Err(error) if route == Route::Messages => respond::respond_anthropic(error),
        Err(error) => respond::respond(error),
    };
    front.metrics.answered(route, response.status());
    trail.answered(response.status());
    response.map(|body| WatchedBody::new(body, trail))
}

async fn serve_target(
    front: &Arc<Front>,
    target: Option<Target>,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, RouteError> {
    let path = request.uri().path();
    let Some(target) = target else {
        let path = path.to_owned();
        return Err(RouteError::NoEndpoint { path });
    };
    if let Some(allowed) = target.other_method(request.method(), path) {
        return Err(RouteError::Method { allowed });
    }
    let serves_pages = front.live.now().serves_pages;
    match target {
        Target::Pair(dialect, _) => generate(front, dialect, request).await,
        Target::Pass(asked) => {
            let is_list = path == "/v1/models" && request.method() == Method::GET;
            let answer = passthrough::forward(front, asked, request).await?;
            if !is_list {
                return Ok(answer);
            }
            let fleet = Arc::clone(&front.fleet.borrow());
            Ok(models::list(&fleet, answer).await)
        }
        Target::Health => Ok(respond::alive()),
        Target::Ready => {
            let workers = front.pool.now();
            Ok(respond::readiness(
                workers.ready(Role::Prefill),
                workers.ready(Role::Decode),
                front.drain.is_thrown(),
            ))
        }
        Target::Decisions => Ok(respond::decisions(&front.picker, request.uri().query())),
        Target::Metrics => {
            let mut text = front
                .metrics
                .render(&front.pool.now(), &Overview::of(front));
            if front.config.epp.is_some() {
                front.epp.render(&mut text);
            }
            Ok(respond::metrics(text))
        }
        Target::Page(asset) if serves_pages => Ok(respond::asset(asset)),
        Target::State if serves_pages => Ok(respond::state(&Overview::of(front))),
        Target::Page(_) | Target::State => {
            let path = path.to_owned();
            Err(RouteError::NoEndpoint { path })
        }
    }
}

async fn generate(
    front: &Arc<Front>,
    dialect: Dialect,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, RouteError> {
    let request = request::read(front, dialect, request).await?;
    let shape = &request.shape;
    let permit = admit(front, shape).await?;
    match dialect {
        Dialect::Messages => messages::serve(front, request, permit).await,
        Dialect::Native(endpoint) if shape.choices > 1 => {
            fanout::serve(front, endpoint, request, permit).await
        }
        Dialect::Native(_) => pair::serve(front, request, permit).await,
    }
}

/// Waits for the places that a request takes.
///
/// # Errors
/// [`RouteError`] when there are too many others.
pub async fn admit(front: &Front, shape: &Shape) -> Result<Permit, RouteError> {
    let patience = front.live.now().queue_timeout;
    let asked_at = Instant::now();
    let entering = front
        .admission
        .enter(shape.choices, shape.priority, patience);
    let permit = entering.await.map_err(|refused| match refused {
        Refused::QueueFull => RouteError::QueueFull,
        Refused::TooLate => RouteError::QueueTimeout,
    })?;
    front.metrics.queue_wait.observe(asked_at.elapsed());
    Ok(permit)
}
