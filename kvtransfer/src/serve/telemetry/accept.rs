//! Accepts connections within bounds, and checks who asks.

use std::future::Future;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::token::BearerToken;

/// What peers were refused, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusals {
    /// Connections beyond the bound.
    pub connections: u64,
    /// TLS handshakes that failed or took too long.
    pub handshakes: u64,
    /// Connections that ended with a protocol error, or without a request.
    pub protocol: u64,
    /// Streams beyond the bound.
    pub subscribers: u64,
    /// Requests without the token, or with a wrong one.
    pub unauthenticated: u64,
}

/// [`Refusals`] while they are counted. Each kind is logged when it happens first.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) connections: AtomicU64,
    pub(super) handshakes: AtomicU64,
    pub(super) protocol: AtomicU64,
    pub(super) subscribers: AtomicU64,
    pub(super) unauthenticated: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self) -> Refusals {
        Refusals {
            connections: self.connections.load(Relaxed),
            handshakes: self.handshakes.load(Relaxed),
            protocol: self.protocol.load(Relaxed),
            subscribers: self.subscribers.load(Relaxed),
            unauthenticated: self.unauthenticated.load(Relaxed),
        }
    }
}

/// Counts one refusal.
pub(super) fn refuse(counter: &AtomicU64, what: &'static str) {
    if counter.fetch_add(1, Relaxed) == 0 {
        tracing::warn!("telemetry refused a peer: {what} (further ones are only counted)");
    }
}

/// Whether a request presents the token, if one is asked for.
pub(super) fn authorised(headers: &HeaderMap, token: Option<&BearerToken>) -> bool {
    token.is_none_or(|token| {
        headers
            .get(AUTHORIZATION)
            .is_some_and(|value| token.accepts(value.as_bytes()))
    })
}

/// A connection, plain or TLS.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Serves each connection in a task of its own, `max` at a time. Ends only if the listener cannot be used at all.
pub(super) async fn accept<F>(
    (listener, tls): (TcpListener, Option<TlsAcceptor>),
    max: usize,
    counters: Arc<Counters>,
    serve: impl Fn(Box<dyn Duplex>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "telemetry cannot use its listener"
            );
            return;
        }
    };
    let places = Arc::new(Semaphore::new(max));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = tasks.join_next() => {
                if ended.is_err() {
                    tracing::error!("a telemetry connection panicked");
                }
                continue;
            }
        };
        let Ok((socket, _peer)) = accepted else {
            // Out of descriptors, or the peer left already: neither is helped by hurry.
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Beyond the bound a connection is closed at once: its owner can tell that from a slow answer.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            refuse(&counters.connections, "too many connections");
            continue;
        };
        tasks.spawn(connection(
            place,
            socket,
            tls.clone(),
            Arc::clone(&counters),
            serve.clone(),
        ));
    }
}

async fn connection<F: Future<Output = ()>>(
    _place: OwnedSemaphorePermit,
    socket: TcpStream,
    tls: Option<TlsAcceptor>,
    counters: Arc<Counters>,
    serve: impl Fn(Box<dyn Duplex>) -> F,
) {
    // Deltas are small and late ones are worthless. Should it fail, they are merely later.
    let _ = socket.set_nodelay(true);
    let Some(tls) = tls else {
        return serve(Box::new(socket)).await;
    };
    match timeout(HANDSHAKE_MAX, tls.accept(socket)).await {
        Ok(Ok(socket)) => serve(Box::new(socket)).await,
        Ok(Err(_)) | Err(_) => refuse(&counters.handshakes, "a TLS handshake failed"),
    }
}

/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Longest TLS handshake: some round trips, even across regions.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
