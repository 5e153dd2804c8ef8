//! The pooled connections to the workers.
#![forbid(unsafe_code)]

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Request, Response, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::Worker;
use super::tls::{TlsError, WorkerConnector, connector};
use crate::config::Config;

/// A worker that does not accept within this time is down. Workers are neighbours: a healthy one takes milliseconds.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// SGLang's HTTP server closes idle connections after 5 s; the router lets go first, so that no request meets a
/// connection in the act of closing.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Idle connections kept per worker: enough for a burst, few enough file descriptors.
pub const IDLE_PER_WORKER_MAX: usize = 512;

/// Silent peers are noticed by the kernel after this time, even when no request timeout is set.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// Sends requests to workers.
#[derive(Clone, Debug)]
pub struct WorkerClient {
    http: Client<WorkerConnector, Full<Bytes>>,
    authorization: Option<HeaderValue>,
}

impl WorkerClient {
    /// A client for the workers of a checked configuration, or for those that come later if it names none.
    ///
    /// # Errors
    /// [`TlsError`] when a named worker is reached over TLS and no authority can be read.
    pub fn new(config: &Config) -> Result<Self, TlsError> {
        let urls = config.prefills.iter().map(|target| &target.url);
        let mut urls = urls.chain(&config.decodes).chain(&config.others);
        let tls = if urls.any(|url| url.is_tls()) || config.worker_authorities.is_some() {
            Some(connector(config.worker_authorities.as_deref())?)
        } else if config.prefills.is_empty() && config.decodes.is_empty() {
            // Whether any is reached over TLS is not known yet; without authorities those that are will say so.
            connector(None).ok()
        } else {
            None
        };
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_keepalive(Some(TCP_KEEPALIVE));
        let http = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_PER_WORKER_MAX)
            .pool_timer(TokioTimer::new())
            .build(WorkerConnector::new(tcp, tls));
        let authorization = config.api_key.as_ref().map(|key| {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .expect("invariant: the configuration checked the key");
            value.set_sensitive(true);
            value
        });
        Ok(Self {
            http,
            authorization,
        })
    }

    /// What workers get as Authorization when a client brings none.
    pub fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// Sends a request. Dropping the future, or later the body of its response, closes the connection unless the answer
    /// was complete: that is how a leg is cancelled.
    pub fn send(
        &self,
        worker: &Worker,
        method: Method,
        path: PathAndQuery,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> ResponseFuture {
        if let Some(key) = &self.authorization
            && !headers.contains_key(AUTHORIZATION)
        {
            headers.insert(AUTHORIZATION, key.clone());
        }
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = worker.uri(path);
        *request.headers_mut() = headers;
        self.http.request(request)
    }

    /// Asks a server beside the workers, which gets no key.
    pub fn get_elsewhere(&self, uri: Uri) -> ResponseFuture {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = uri;
        self.http.request(request)
    }

    /// Sends a small JSON body of the router's own.
    pub fn post_json(&self, worker: &Worker, path: &'static str, json: String) -> ResponseFuture {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.send(
            worker,
            Method::POST,
            PathAndQuery::from_static(path),
            headers,
            json.into(),
        )
    }

    /// Asks for `path`.
    ///
    /// # Errors
    /// When the worker cannot be reached or closes the connection.
    pub async fn get(
        &self,
        worker: &Worker,
        path: &'static str,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        let path = PathAndQuery::from_static(path);
        self.send(worker, Method::GET, path, HeaderMap::new(), Bytes::new())
            .await
    }
}
