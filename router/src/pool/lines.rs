//! Connections to one worker: those that wait for a request, and how a request gets one.
//!
//! hyper's general client does the same for any number of hosts and protocols, which takes a tenth of a small request's
//! time. Here a worker's connections are found without looking for its address.
#![forbid(unsafe_code)]

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderValue};
use hyper::http::uri::{Authority, Scheme};
use hyper::{Request, Response, Uri};
use tokio::time::Instant;

use super::tls::{ConnectError, WorkerConnector};

/// SGLang's HTTP server closes idle connections after 5 s; the router lets go first, so that no request meets a
/// connection in the act of closing.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Idle connections kept per worker: enough for a burst, few enough file descriptors.
pub const IDLE_MAX: usize = 512;

/// How often idle connections are looked through.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// No connection could be made.
    #[error("cannot connect")]
    Connect(#[source] ConnectError),
    /// The connection ended before the answer began.
    #[error("the connection broke")]
    Broken(#[source] hyper::Error),
}

type Line = SendRequest<Full<Bytes>>;

#[derive(Debug)]
struct Waiting {
    line: Line,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    /// The one that was used last comes last, and is taken first.
    waiting: Vec<Waiting>,
    is_swept: bool,
}

/// The connections to one server.
#[derive(Debug)]
pub struct Lines {
    base: Uri,
    host: HeaderValue,
    state: Mutex<State>,
}

impl Lines {
    /// None yet, to the server at `authority`.
    pub fn new(scheme: Scheme, authority: Authority) -> Self {
        let default_port = if scheme == Scheme::HTTPS { 443 } else { 80 };
        let host = match authority.port_u16().filter(|port| *port != default_port) {
            Some(port) => format!("{}:{port}", authority.host()),
            None => authority.host().to_owned(),
        };
        let base = Uri::builder()
            .scheme(scheme)
            .authority(authority)
            .path_and_query("/")
            .build();
        Self {
            base: base.expect("invariant: all three parts are present and parsed"),
            host: HeaderValue::try_from(host).expect("invariant: authorities are visible ASCII"),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that wait for a request.
    pub fn idle(&self) -> usize {
        self.lock().waiting.len()
    }

    fn take(&self) -> Option<Line> {
        let mut state = self.lock();
        while let Some(Waiting { line, since }) = state.waiting.pop() {
            if since.elapsed() >= IDLE_TIMEOUT {
                // All others have waited even longer.
                state.waiting.clear();
                return None;
            }
            if line.is_ready() {
                return Some(line);
            }
        }
        None
    }

    /// Keeps a connection for other requests, once its answer has been read to its end.
    fn keep(self: &Arc<Self>, mut line: Line) {
        if line.is_ready() {
            return self.put(line);
        }
        let lines = Arc::clone(self);
        tokio::spawn(async move {
            // An answer that nobody reads to its end closes the connection.
            if line.ready().await.is_ok() {
                lines.put(line);
            }
        });
    }

    fn put(self: &Arc<Self>, line: Line) {
        let since = Instant::now();
        let mut state = self.lock();
        if state.waiting.len() >= IDLE_MAX {
            return;
        }
        state.waiting.push(Waiting { line, since });
        if !std::mem::replace(&mut state.is_swept, true) {
            let lines = Arc::downgrade(self);
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(SWEEP_INTERVAL).await;
                    if lines.upgrade().is_none_or(|lines| lines.sweep()) {
                        return;
                    }
                }
            });
        }
    }

    /// Lets go of those that have waited for too long; true if none is left.
    fn sweep(&self) -> bool {
        let mut state = self.lock();
        state
            .waiting
            .retain(|waiting| waiting.line.is_ready() && waiting.since.elapsed() < IDLE_TIMEOUT);
        state.is_swept = !state.waiting.is_empty();
        !state.is_swept
    }

    /// Sends `request`, whose URI is a path. Nothing happens before the exchange is polled; dropping it, or later the body of
    /// its response, closes the connection unless the answer was complete.
    pub fn send(
        self: &Arc<Self>,
        connector: &Arc<WorkerConnector>,
        mut request: Request<Full<Bytes>>,
    ) -> Exchange {
        let host = request.headers_mut().entry(HOST);
        host.or_insert_with(|| self.host.clone());
        let exchange = exchange(Arc::clone(self), Arc::clone(connector), request);
        Exchange(Box::pin(exchange))
    }
}

async fn exchange(
    lines: Arc<Lines>,
    connector: Arc<WorkerConnector>,
    mut request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, ExchangeError> {
    loop {
        let kept = lines.take();
        let is_kept = kept.is_some();
        let mut line = match kept {
            Some(line) => line,
            None => connect(&lines, &connector).await?,
        };
        match line.try_send_request(request).await {
            Ok(response) => {
                lines.keep(line);
                return Ok(response);
            }
            Err(mut error) => match error.take_message() {
                // It was closed while it waited, and nothing of the request has left: another one will do.
                Some(unsent) if is_kept => request = unsent,
                _ => return Err(ExchangeError::Broken(error.into_error())),
            },
        }
    }
}

async fn connect(lines: &Lines, connector: &WorkerConnector) -> Result<Line, ExchangeError> {
    let stream = connector.connect(lines.base.clone()).await;
    let stream = stream.map_err(ExchangeError::Connect)?;
    let (line, connection) = http1::handshake(stream)
        .await
        .map_err(ExchangeError::Broken)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a worker ended early");
        }
    });
    Ok(line)
}

/// A request under way; resolves when its answer begins.
pub struct Exchange(
    Pin<Box<dyn Future<Output = Result<Response<Incoming>, ExchangeError>> + Send>>,
);

impl Future for Exchange {
    type Output = Result<Response<Incoming>, ExchangeError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::config::Config;
    use crate::pool::client::WorkerClient;

    async fn server() -> (TcpListener, Arc<Lines>, Arc<WorkerConnector>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let lines = Lines::new(Scheme::HTTP, authority.parse().unwrap());
        let client = WorkerClient::new(&Config::new(Vec::new(), Vec::new())).unwrap();
        (listener, Arc::new(lines), Arc::clone(client.connector()))
    }

    /// Answers a request, whose head it returns.
    async fn answer(stream: &mut TcpStream, body: &str) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0);
        }
        let length = body.len();
        let text = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(text.as_bytes()).await.unwrap();
        String::from_utf8(head).unwrap()
    }

    fn request() -> Request<Full<Bytes>> {
        Request::builder()
            .uri("/path?query")
            .body(Full::default())
            .unwrap()
    }

    async fn until_idle(lines: &Lines, count: usize) {
        while lines.idle() != count {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_connection_serves_again() {
        let (listener, lines, connector) = server().await;
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = answer(&mut stream, "one").await;
            let port = listener.local_addr().unwrap().port();
            assert!(head.starts_with("GET /path?query HTTP/1.1\r\n"), "{head}");
            assert!(
                head.contains(&format!("host: 127.0.0.1:{port}\r\n")),
                "{head}"
            );
            answer(&mut stream, "two").await;
            // Stays open until it is known to wait again.
            stream
        });
        for body in ["one", "two"] {
            let response = lines.send(&connector, request()).await.unwrap();
            assert_eq!(
                response.into_body().collect().await.unwrap().to_bytes(),
                body
            );
            until_idle(&lines, 1).await;
        }
        drop(serving.await.unwrap());
    }

    #[tokio::test]
    async fn one_that_was_closed_meanwhile_is_replaced() {
        let (listener, lines, connector) = server().await;
        let serving = tokio::spawn(async move {
            for _ in 0..3 {
                let (mut stream, _) = listener.accept().await.unwrap();
                answer(&mut stream, "").await;
            }
        });
        for _ in 0..3 {
            let response = lines.send(&connector, request()).await.unwrap();
            assert_eq!(response.status(), 200);
        }
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn one_that_waited_for_long_is_not_used() {
        let (listener, lines, connector) = server().await;
        let serving = tokio::spawn(async move {
            let mut streams = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                answer(&mut stream, "").await;
                streams.push(stream);
            }
            streams
        });
        drop(lines.send(&connector, request()).await.unwrap());
        until_idle(&lines, 1).await;
        tokio::time::pause();
        // No sweep has come by.
        tokio::time::advance(IDLE_TIMEOUT).await;
        tokio::time::resume();
        drop(lines.send(&connector, request()).await.unwrap());
        let mut streams = serving.await.unwrap();
        let mut rest = Vec::new();
        assert_eq!(streams[0].read_to_end(&mut rest).await.unwrap(), 0);
        until_idle(&lines, 1).await;
        tokio::time::pause();
        tokio::time::sleep(IDLE_TIMEOUT + SWEEP_INTERVAL).await;
        assert_eq!(lines.idle(), 0);
    }

    #[tokio::test]
    async fn more_than_the_bound_are_let_go() {
        let (_listener, lines, _) = server().await;
        let mut peers = Vec::new();
        for _ in 0..=IDLE_MAX {
            let (ours, theirs) = tokio::io::duplex(64);
            let (mut line, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
            tokio::spawn(connection);
            line.ready().await.unwrap();
            lines.put(line);
            peers.push(theirs);
        }
        assert_eq!(lines.idle(), IDLE_MAX);
        let mut rest = Vec::new();
        let last = peers.last_mut().unwrap();
        assert_eq!(last.read_to_end(&mut rest).await.unwrap(), 0);
        assert_eq!(lines.idle(), IDLE_MAX);
    }

    #[tokio::test]
    async fn dropping_an_exchange_closes_its_connection() {
        let (listener, lines, connector) = server().await;
        let exchange = tokio::spawn(lines.send(&connector, request()));
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        assert_ne!(stream.read_buf(&mut head).await.unwrap(), 0);
        exchange.abort();
        assert!(exchange.await.unwrap_err().is_cancelled());
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(lines.idle(), 0);
    }

    #[tokio::test]
    async fn nobody_there_is_told_apart() {
        let (listener, lines, connector) = server().await;
        drop(listener);
        let error = lines.send(&connector, request()).await.unwrap_err();
        assert!(matches!(error, ExchangeError::Connect(_)), "{error:?}");
        assert_eq!(Lines::new(Scheme::HTTP, "a:80".parse().unwrap()).host, "a");
        assert_eq!(
            Lines::new(Scheme::HTTPS, "[::1]:80".parse().unwrap()).host,
            "[::1]:80"
        );
    }
}
