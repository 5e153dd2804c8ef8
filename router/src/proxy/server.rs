//! Listens, accepts, and sends each request where it belongs.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use super::abort::{AbortRunner, Aborts};
use super::shape::PairEndpoint;
use super::stream::ReplyBody;
use super::{Front, information, pair, request};
use crate::config::{Config, ConfigError};
use crate::drain::DrainSwitch;
use crate::metrics::{Metrics, Route};
use crate::pool::client::WorkerClient;
use crate::pool::{Pool, Role, health};
use crate::respond::{self, RouteError};
use crate::schedule::pair::PairScheduler;
use crate::schedule::rooms::Rooms;

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

/// When accepting fails (no file descriptors left, for instance), the next try comes after this pause.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why the router could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The settings contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
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
#[derive(Debug)]
pub struct Router {
    listener: TcpListener,
    address: SocketAddr,
    front: Arc<Front>,
    abort_runner: AbortRunner,
}

impl Router {
    /// Checks the settings and opens the listener.
    ///
    /// # Errors
    /// [`RunError`]
    pub async fn bind(config: Config) -> Result<Self, RunError> {
        config.check()?;
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
        let metrics = Arc::new(Metrics::default());
        let client = WorkerClient::new(config.api_key.as_deref());
        let (aborts, abort_runner) = Aborts::new(client.clone(), Arc::clone(&metrics));
        let front = Arc::new(Front {
            pool: Pool::new(&config),
            scheduler: PairScheduler::new(config.policy),
            rooms: Arc::new(Rooms::default()),
            client,
            aborts,
            metrics,
            admission: Arc::new(Semaphore::new(config.requests_max)),
            body_memory: Arc::new(Semaphore::new(
                config.buffered_bytes_max.div_ceil(request::KIB),
            )),
            drain: DrainSwitch::default(),
            config,
        });
        Ok(Self {
            listener,
            address,
            front,
            abort_runner,
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` resolves, then finishes live requests for at most the drain timeout; what is left is
    /// cancelled on its workers.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) {
        let Self {
            listener,
            address,
            front,
            abort_runner,
        } = self;
        let (prefills, decodes) = (
            front.pool.of_role(Role::Prefill).len(),
            front.pool.of_role(Role::Decode).len(),
        );
        tracing::info!(prefills, decodes, "listening on http://{address}");
        let mut probes = JoinSet::new();
        for worker in front.pool.workers() {
            let interval = front.config.probe_interval;
            probes.spawn(health::watch(
                Arc::clone(worker),
                front.client.clone(),
                interval,
            ));
        }
        let (close_aborts, closing) = oneshot::channel::<()>();
        let aborts = tokio::spawn(abort_runner.run(async {
            // An error means that the router was dropped, which closes the queue too.
            let _ = closing.await;
        }));
        let mut connections = JoinSet::new();
        accept_until(shutdown, &listener, &front, &mut connections).await;
        drop(listener);
        front.drain.throw();
        let finished = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(front.config.drain_timeout, finished)
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
    }
}

async fn accept_until(
    shutdown: impl Future<Output = ()>,
    listener: &TcpListener,
    front: &Arc<Front>,
    connections: &mut JoinSet<()>,
) {
    tokio::pin!(shutdown);
    let most = front.config.requests_max.saturating_add(CONNECTIONS_SPARE);
    loop {
        tokio::select! {
            () = &mut shutdown => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve_connection(stream, Arc::clone(front)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn serve_connection(stream: TcpStream, front: Arc<Front>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "the client was gone before it was served");
        return;
    }
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

/// Where a path leads.
enum Target {
    Pair(PairEndpoint, Route),
    Information,
    Health,
    Ready,
    Metrics,
}

impl Target {
    fn of(path: &str) -> Option<Self> {
        Some(match path {
            "/generate" => Self::Pair(PairEndpoint::Generate, Route::Generate),
            "/v1/chat/completions" => Self::Pair(PairEndpoint::Chat, Route::Chat),
            "/v1/completions" => Self::Pair(PairEndpoint::Completions, Route::Completions),
            "/health" => Self::Health,
            "/ready" => Self::Ready,
            "/metrics" => Self::Metrics,
            path if information::PATHS.contains(&path) => Self::Information,
            _ => return None,
        })
    }

    fn route(&self) -> Route {
        match self {
            Self::Pair(_, route) => *route,
            Self::Information => Route::Information,
            Self::Health | Self::Ready | Self::Metrics => Route::Own,
        }
    }

    fn allows(&self, method: &Method) -> bool {
        match self {
            Self::Pair(..) => method == Method::POST,
            _ => method == Method::GET || method == Method::HEAD,
        }
    }
}

async fn answer(front: &Arc<Front>, request: Request<Incoming>) -> Response<ReplyBody> {
    let target = Target::of(request.uri().path());
    let route = target.as_ref().map_or(Route::Other, Target::route);
    let response = match serve_target(front, target, request).await {
        Ok(response) => response,
        Err(error) => respond::respond(error).await,
    };
    front.metrics.answered(route, response.status());
    response
}

async fn serve_target(
    front: &Arc<Front>,
    target: Option<Target>,
    request: Request<Incoming>,
) -> Result<Response<ReplyBody>, RouteError> {
    let Some(target) = target else {
        return Err(RouteError::NoEndpoint {
            path: request.uri().path().to_owned(),
        });
    };
    if !target.allows(request.method()) {
        let allowed = if matches!(target, Target::Pair(..)) {
            "POST"
        } else {
            "GET"
        };
        return Err(RouteError::Method { allowed });
    }
    match target {
        Target::Pair(endpoint, _) => {
            // Taken before the body is read: bodies are what fills memory.
            let permit = Arc::clone(&front.admission)
                .try_acquire_owned()
                .map_err(|_| RouteError::Busy {
                    limit: front.config.requests_max,
                })?;
            let request = request::read(front, endpoint, request).await?;
            pair::serve(front, request, permit).await
        }
        Target::Information => information::forward(front, request).await,
        Target::Health => Ok(respond::alive()),
        Target::Ready => Ok(respond::readiness(
            front.pool.ready(Role::Prefill),
            front.pool.ready(Role::Decode),
            front.drain.is_thrown(),
        )),
        Target::Metrics => {
            let live = (front.live_requests(), front.rooms.live());
            Ok(respond::metrics(front.metrics.render(
                &front.pool,
                live.0,
                live.1,
            )))
        }
    }
}
