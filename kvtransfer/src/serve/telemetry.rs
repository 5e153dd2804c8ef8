//! Serves an engine's telemetry: the gRPC stream, and a Prometheus page on a second listener.
//!
//! One thread with a small tokio runtime of its own. One sampler asks the engine for its picture, at most once per
//! interval and only while someone listens; all subscribers share that picture. A subscriber that does not read costs
//! one socket buffer and one old picture, and slows nobody. Nothing is opened that was not asked for (promise P9).
#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::telemetry::snapshot::Snapshot;
use crate::token::BearerToken;

mod accept;
mod grpc;
mod hub;
mod metrics;
mod tls;

pub use accept::Refusals;
pub use tls::ServerTls;

/// Where to listen and what to ask of those who connect. Start from `default()`, then assign.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TelemetryConfig {
    /// Where the gRPC stream is served. The default is 127.0.0.1 with a port of the system's choice.
    pub listen: SocketAddr,
    /// Where `GET /metrics` is served. The default is nowhere.
    pub metrics: Option<SocketAddr>,
    /// Asked of every request on both listeners. The default is none.
    pub token: Option<BearerToken>,
    /// Spoken on both listeners. The default is plain text.
    pub tls: Option<ServerTls>,
    /// Least time between two looks at the engine, 1 ms to 1 min. The default is 20 ms.
    pub interval: Duration,
    /// Longest silence on a stream, from `interval` to 1 min. The default is 1 s.
    pub keep_alive: Duration,
    /// Streams at a time, 1 to [`SUBSCRIBERS_MAX`], which is the default.
    pub subscribers_max: usize,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            metrics: None,
            token: None,
            tls: None,
            interval: Duration::from_millis(20),
            keep_alive: Duration::from_secs(1),
            subscribers_max: SUBSCRIBERS_MAX,
        }
    }
}

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A listener could not be opened.
    #[error("cannot listen on {addr}")]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// What the system said.
        #[source]
        error: std::io::Error,
    },
    /// A setting is outside of its range.
    #[error("telemetry setting `{setting}` is out of range")]
    Setting {
        /// The field of [`TelemetryConfig`].
        setting: &'static str,
    },
    /// The thread or its runtime could not be made.
    #[error("cannot start the telemetry thread")]
    Thread(#[source] std::io::Error),
    /// The certificates are no good.
    #[error(transparent)]
    Tls(#[from] super::tls::TlsError),
}

/// The thread did not end within [`CLOSE_MAX`]; most likely the engine's `source` does not return. It ends on its own
/// as soon as `source` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the telemetry thread did not end within {CLOSE_MAX:?}")]
pub struct CloseError;

/// A running server. Dropping it closes it.
#[derive(Debug)]
pub struct TelemetryServer {
    addr: SocketAddr,
    metrics_addr: Option<SocketAddr>,
    refusals: Arc<accept::Counters>,
    close: Option<oneshot::Sender<()>>,
    ended: crossbeam_channel::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl TelemetryServer {
    /// Opens the listeners and starts to serve `source`, which is called on the server's own thread. Should `source`
    /// panic, the server ends, and its consumers see their streams break.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left open then.
    pub fn start(
        config: TelemetryConfig,
        source: Arc<dyn Fn() -> Snapshot + Send + Sync>,
    ) -> Result<Self, StartError> {
        validate(&config)?;
        let tls = config.tls.as_ref().map(ServerTls::acceptors).transpose()?;
        let (grpc_tls, metrics_tls) =
            tls.map_or((None, None), |(grpc, http)| (Some(grpc), Some(http)));
        let (stream_listener, addr) = bind(config.listen)?;
        let metrics = config.metrics.map(bind).transpose()?;
        let metrics_addr = metrics.as_ref().map(|(_, addr)| *addr);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(StartError::Thread)?;
        let refusals = Arc::new(accept::Counters::default());
        let (close, closing) = oneshot::channel();
        let (ending, ended) = crossbeam_channel::bounded(1);
        let parts = Parts {
            hub: Arc::new(hub::Hub::new(source, &config)),
            token: config.token.map(Arc::new),
            counters: Arc::clone(&refusals),
            stream: (stream_listener, grpc_tls),
            metrics: metrics.map(|(listener, _)| (listener, metrics_tls)),
        };
        let thread = std::thread::Builder::new()
            .name("kvt-telemetry".to_owned())
            .spawn(move || {
                runtime.block_on(parts.serve(closing));
                // Ends every connection; nothing on this runtime blocks.
                drop(runtime);
                let _ = ending.send(());
            })
            .map_err(StartError::Thread)?;
        Ok(Self {
            addr,
            metrics_addr,
            refusals,
            close: Some(close),
            ended,
            thread: Some(thread),
        })
    }

    /// Where the gRPC stream is served.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where `/metrics` is served, if it is.
    #[must_use]
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics_addr
    }

    /// What peers were refused so far.
    #[must_use]
    pub fn refusals(&self) -> Refusals {
        self.refusals.read()
    }

    /// Ends all streams and listeners; waits at most [`CLOSE_MAX`].
    ///
    /// # Errors
    /// [`CloseError`] when the thread still runs; it is left to end on its own.
    pub fn close(mut self) -> Result<(), CloseError> {
        self.shut()
    }

    fn shut(&mut self) -> Result<(), CloseError> {
        // The thread may have ended before, then nobody listens.
        let _ = self.close.take().map(|close| close.send(()));
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        // An error means that the thread dropped its end, so it has ended too.
        if self.ended.recv_timeout(CLOSE_MAX) == Err(crossbeam_channel::RecvTimeoutError::Timeout) {
            return Err(CloseError);
        }
        if thread.join().is_err() {
            tracing::error!("the telemetry thread panicked");
        }
        Ok(())
    }
}

impl Drop for TelemetryServer {
    fn drop(&mut self) {
        if let Err(error) = self.shut() {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "telemetry left running"
            );
        }
    }
}

/// What the thread owns.
struct Parts {
    hub: Arc<hub::Hub>,
    token: Option<Arc<BearerToken>>,
    counters: Arc<accept::Counters>,
    stream: (TcpListener, Option<tokio_rustls::TlsAcceptor>),
    metrics: Option<(TcpListener, Option<tokio_rustls::TlsAcceptor>)>,
}

impl Parts {
    async fn serve(self, closing: oneshot::Receiver<()>) {
        let sampler = tokio::spawn(Arc::clone(&self.hub).sample_while_watched());
        let grpc = grpc::Grpc::new(
            Arc::clone(&self.hub),
            self.token.clone(),
            Arc::clone(&self.counters),
        );
        let metrics = metrics::Metrics::new(self.hub, self.token, Arc::clone(&self.counters));
        let streams = accept::accept(
            self.stream,
            CONNECTIONS_MAX,
            Arc::clone(&self.counters),
            move |socket| grpc.clone().connection(socket),
        );
        let pages = async {
            match self.metrics {
                None => std::future::pending().await,
                Some(listener) => {
                    accept::accept(
                        listener,
                        SCRAPES_MAX,
                        Arc::clone(&self.counters),
                        move |socket| metrics.clone().connection(socket),
                    )
                    .await
                }
            }
        };
        tokio::select! {
            _ = closing => {}
            _ = sampler => tracing::error!("the telemetry source panicked; telemetry ends"),
            () = streams => {}
            () = pages => {}
        }
    }
}

fn validate(config: &TelemetryConfig) -> Result<(), StartError> {
    let longest = Duration::from_secs(60);
    let check = |setting, fits| {
        if fits {
            Ok(())
        } else {
            Err(StartError::Setting { setting })
        }
    };
    check(
        "interval",
        (Duration::from_millis(1)..=longest).contains(&config.interval),
    )?;
    check(
        "keep_alive",
        (config.interval..=longest).contains(&config.keep_alive),
    )?;
    check(
        "subscribers_max",
        (1..=SUBSCRIBERS_MAX).contains(&config.subscribers_max),
    )
}

fn bind(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let open = || {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    open().map_err(|error| StartError::Listen { addr, error })
}

/// Streams at a time: some router replicas, some of them reconnecting, and people who look.
pub const SUBSCRIBERS_MAX: usize = 64;

/// Connections on the stream's listener: each subscriber may have a dying one beside its new one.
pub const CONNECTIONS_MAX: usize = 2 * SUBSCRIBERS_MAX;

/// Connections on the page's listener: a few scrapers.
pub const SCRAPES_MAX: usize = 16;

/// Longest wait for the thread when closing.
pub const CLOSE_MAX: Duration = Duration::from_secs(3);
