//! A small client of the bootstrap registry for our own ranks: one keep-alive connection, every wait bounded.
//!
//! [`BootstrapClient`] is for callers on a tokio runtime, [`BlockingBootstrapClient`] brings its own. Both speak to our
//! registry and to stock SGLang's alike.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use super::bootstrap::{GENERATION_HEADER, INSTANCE_HEADER, LEASE_HEADER};
use crate::bootstrap::RankKey;

mod error;
mod messages;

pub use error::ClientError;
pub use messages::{Answered, RankAddress, RankRow, ServerInfo};

/// Attempts of [`BootstrapClient::register`], as in SGLang's `_register_topology_row`.
pub const REGISTER_ATTEMPTS: u32 = 5;
/// First pause between attempts; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of one reply. The longest honest one is a query for 65 536 rooms: about 2 MB.
const REPLY_BYTES_MAX: usize = 4 << 20;
/// Bytes of a reply that an error repeats.
const ERROR_TEXT_MAX: usize = 200;

/// Where the registry is and how to talk to it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BootstrapTarget {
    /// `host:port`, or `[v6]:port`.
    pub authority: String,
    /// Bearer token, if the registry asks for one.
    pub token: Option<String>,
    /// TLS, if the registry speaks it.
    pub tls: Option<Arc<ClientConfig>>,
    /// Longest time for one request, connecting included. Default 5 s, SGLang's.
    pub request_timeout: Duration,
}

impl BootstrapTarget {
    /// A registry without token or TLS.
    pub fn new(authority: impl Into<String>) -> Self {
        Self {
            authority: authority.into(),
            token: None,
            tls: None,
            request_timeout: Duration::from_secs(5),
        }
    }
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

/// A client on the caller's tokio runtime. One request at a time; clone the target for more.
pub struct BootstrapClient {
    target: BootstrapTarget,
    connection: Option<Connection>,
}

impl BootstrapClient {
    /// A client that connects when first asked.
    #[must_use]
    pub fn new(target: BootstrapTarget) -> Self {
        Self {
            target,
            connection: None,
        }
    }

    /// Registers a row, or renews it: up to [`REGISTER_ATTEMPTS`] attempts with pauses of 1, 2, 4, 8 s (times 0.75 to
    /// 1), all within `deadline` from now.
    ///
    /// # Errors
    /// [`ClientError::Register`] with the last attempt's error.
    pub async fn register(
        &mut self,
        row: &RankRow,
        lease: Option<Duration>,
        instance: Option<&str>,
        deadline: Duration,
    ) -> Result<(), ClientError> {
        let body = to_json(row)?;
        let mut headers = HeaderMap::new();
        if let Some(lease) = lease {
            headers.insert(LEASE_HEADER, HeaderValue::from(lease.as_secs()));
        }
        if let Some(instance) = instance {
            headers.insert(INSTANCE_HEADER, header_value(instance, "the instance id")?);
        }
        let end = Instant::now() + deadline;
        let mut attempts = 0;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let sent = self
                .request(Method::PUT, "/route", &headers, body.clone(), left)
                .await;
            attempts += 1;
            let Err(last) = sent.and_then(expect_ok) else {
                return Ok(());
            };
            // 400 is final in a table that never changes, but here the old instance may be about to end.
            let pause = FIRST_PAUSE
                .saturating_mul(1 << (attempts - 1))
                .mul_f64(0.75 + 0.25 * random_fraction());
            if attempts >= REGISTER_ATTEMPTS || Instant::now() + pause >= end {
                return Err(ClientError::Register {
                    attempts,
                    last: Box::new(last),
                });
            }
            sleep(pause).await;
        }
    }

    /// Takes the row back, so that others need not wait for its lease to end.
    ///
    /// # Errors
    /// [`ClientError`]; the lease then ends it.
    pub async fn withdraw(&mut self, row: &RankRow) -> Result<(), ClientError> {
        let mut headers = HeaderMap::new();
        headers.insert(LEASE_HEADER, HeaderValue::from(0_u16));
        let reply = self
            .request(
                Method::PUT,
                "/route",
                &headers,
                to_json(row)?,
                Duration::MAX,
            )
            .await?;
        expect_ok(reply)
    }

    /// What kind of instance registered here.
    ///
    /// # Errors
    /// [`ClientError::NotReady`] until all its ranks have.
    pub async fn server_info(&mut self) -> Result<Answered<ServerInfo>, ClientError> {
        let path =
            "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";
        self.fetch(path, "server info").await
    }

    /// Where a rank listens.
    ///
    /// # Errors
    /// [`ClientError::NotReady`], or a 404 status for a rank the instance does not have.
    pub async fn rank(&mut self, key: RankKey) -> Result<Answered<RankAddress>, ClientError> {
        let path = format!(
            "/route?prefill_dp_rank={}&prefill_cp_rank={}&target_tp_rank={}&target_pp_rank={}",
            key.dp, key.cp, key.tp, key.pp
        );
        self.fetch(&path, "a rank").await
    }

    /// Says which data-parallel rank serves a room.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn register_dp_rank(&mut self, room: u64, dp_rank: u32) -> Result<(), ClientError> {
        let body = to_json(&serde_json::json!({ "bootstrap_room": room, "dp_rank": dp_rank }))?;
        let reply = self
            .request(
                Method::POST,
                "/register_dp_rank",
                &HeaderMap::new(),
                body,
                Duration::MAX,
            )
            .await?;
        expect_ok(reply)
    }

    /// Asks which data-parallel ranks serve these rooms; unknown rooms are left out.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn query_dp_ranks(
        &mut self,
        rooms: &[u64],
    ) -> Result<HashMap<u64, u32>, ClientError> {
        let body = to_json(&serde_json::json!({ "bootstrap_rooms": rooms }))?;
        let reply = self
            .request(
                Method::POST,
                "/query_dp_ranks",
                &HeaderMap::new(),
                body,
                Duration::MAX,
            )
            .await?;
        let reply = expect_success(reply)?;
        serde_json::from_slice(&reply.body).map_err(|_| ClientError::Answer {
            request: "room ranks",
        })
    }

    /// Whether the registry answers.
    ///
    /// # Errors
    /// [`ClientError`] if it does not.
    pub async fn health(&mut self) -> Result<(), ClientError> {
        let reply = self
            .request(
                Method::GET,
                "/health",
                &HeaderMap::new(),
                Bytes::new(),
                Duration::MAX,
            )
            .await?;
        expect_ok(reply)
    }

    async fn fetch<T: for<'de> Deserialize<'de>>(
        &mut self,
        path: &str,
        request: &'static str,
    ) -> Result<Answered<T>, ClientError> {
        let reply = self
            .request(
                Method::GET,
                path,
                &HeaderMap::new(),
                Bytes::new(),
                Duration::MAX,
            )
            .await?;
        let reply = expect_success(reply)?;
        let text = |name| {
            reply
                .headers
                .get(name)
                .and_then(|value: &HeaderValue| value.to_str().ok())
        };
        Ok(Answered {
            value: serde_json::from_slice(&reply.body)
                .map_err(|_| ClientError::Answer { request })?,
            generation: text(GENERATION_HEADER).and_then(|text| text.parse().ok()),
            instance: text(INSTANCE_HEADER).map(str::to_owned),
        })
    }

    /// Sends one request. A kept connection may have died unseen, so a failure on one is tried again on a new one; all
    /// requests here may be sent twice.
    async fn request(
        &mut self,
        method: Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
        left: Duration,
    ) -> Result<Reply, ClientError> {
        let after = self.target.request_timeout.min(left);
        let exchange = async {
            let was_kept = self.connection.is_some();
            match self.exchange(&method, path, headers, body.clone()).await {
                Err(ClientError::Broken { .. }) if was_kept => {
                    self.exchange(&method, path, headers, body).await
                }
                result => result,
            }
        };
        let result = timeout(after, exchange).await;
        if !matches!(result, Ok(Ok(_))) {
            // A connection in an unknown state must not answer the next request with this one's reply.
            self.connection = None;
        }
        result.unwrap_or_else(|_| {
            Err(ClientError::Timeout {
                authority: self.target.authority.clone(),
                after,
            })
        })
    }

    async fn exchange(
        &mut self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Reply, ClientError> {
        let mut connection = match self.connection.take() {
            Some(kept) if !kept.sender.is_closed() => kept,
            _ => connect(&self.target).await?,
        };
        let request = assemble(&self.target, method, path, headers, body)?;
        let broken = |source| ClientError::Broken {
            authority: self.target.authority.clone(),
            source,
        };
        connection.sender.ready().await.map_err(broken)?;
        let response = connection
            .sender
            .send_request(request)
            .await
            .map_err(broken)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, REPLY_BYTES_MAX)
            .collect()
            .await
            .map_err(|_| ClientError::Answer {
                request: "any request",
            })?
            .to_bytes();
        self.connection = Some(connection);
        Ok(Reply {
            status: head.status,
            headers: head.headers,
            body,
        })
    }
}

async fn connect(target: &BootstrapTarget) -> Result<Connection, ClientError> {
    let failed = |source| ClientError::Connect {
        authority: target.authority.clone(),
        source,
    };
    let stream = TcpStream::connect(&target.authority)
        .await
        .map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let Some(config) = &target.tls else {
        return handshake(target, stream).await;
    };
    let host = target
        .authority
        .rsplit_once(':')
        .map_or(target.authority.as_str(), |(host, _)| host);
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(|_| {
        ClientError::Unusable {
            what: "the server's name",
        }
    })?;
    let stream = TlsConnector::from(Arc::clone(config))
        .connect(name, stream)
        .await
        .map_err(failed)?;
    handshake(target, stream).await
}

async fn handshake<S>(target: &BootstrapTarget, stream: S) -> Result<Connection, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|source| ClientError::Broken {
            authority: target.authority.clone(),
            source,
        })?;
    let driver = tokio::task::spawn(async move {
        // Its error reaches the caller through the sender.
        connection.await.ok();
    });
    Ok(Connection { sender, driver })
}

fn assemble(
    target: &BootstrapTarget,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<hyper::Request<Full<Bytes>>, ClientError> {
    let mut request = hyper::Request::new(Full::new(body));
    *request.method_mut() = method.clone();
    *request.uri_mut() = path
        .parse()
        .map_err(|_| ClientError::Unusable { what: "the path" })?;
    *request.headers_mut() = headers.clone();
    let headers = request.headers_mut();
    headers.insert(
        header::HOST,
        header_value(&target.authority, "the server's address")?,
    );
    if method != Method::GET {
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
    }
    if let Some(token) = &target.token {
        let mut value = header_value(&format!("Bearer {}", token.trim()), "the token")?;
        value.set_sensitive(true);
        headers.insert(HeaderName::from_static("authorization"), value);
    }
    Ok(request)
}

fn header_value(text: &str, what: &'static str) -> Result<HeaderValue, ClientError> {
    HeaderValue::from_str(text).map_err(|_| ClientError::Unusable { what })
}

fn to_json(value: &impl Serialize) -> Result<Bytes, ClientError> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|_| ClientError::Unusable { what: "the body" })
}

fn expect_success(reply: Reply) -> Result<Reply, ClientError> {
    let text = || {
        String::from_utf8_lossy(&reply.body)
            .chars()
            .take(ERROR_TEXT_MAX)
            .collect()
    };
    match reply.status {
        StatusCode::OK => Ok(reply),
        StatusCode::SERVICE_UNAVAILABLE => Err(ClientError::NotReady { text: text() }),
        status => Err(ClientError::Status {
            status: status.as_u16(),
            text: text(),
        }),
    }
}

fn expect_ok(reply: Reply) -> Result<(), ClientError> {
    expect_success(reply).map(drop)
}

/// A number in `0.0..1.0`, so that a thousand ranks of one restart do not retry in step.
fn random_fraction() -> f64 {
    f64::from(getrandom::u32().unwrap_or(0)) / (f64::from(u32::MAX) + 1.0)
}

/// The same client for callers without a runtime. Must not be used inside one.
pub struct BlockingBootstrapClient {
    runtime: tokio::runtime::Runtime,
    client: BootstrapClient,
}

impl BlockingBootstrapClient {
    /// A client that connects when first asked.
    ///
    /// # Errors
    /// [`ClientError::Runtime`].
    pub fn new(target: BootstrapTarget) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ClientError::Runtime)?;
        Ok(Self {
            runtime,
            client: BootstrapClient::new(target),
        })
    }

    /// Runs one call of the asynchronous client to its end, e.g. `client.wait(async |c| c.server_info().await)`.
    pub fn wait<T>(&mut self, call: impl AsyncFnOnce(&mut BootstrapClient) -> T) -> T {
        self.runtime.block_on(call(&mut self.client))
    }
}
