//! Requests to the workers.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{HeaderMap, Method, Request, Response, Uri};
use hyper_util::client::legacy::connect::HttpConnector;

use super::Worker;
use super::lines::{Exchange, ExchangeError, Lines};
use super::tls::{TlsError, WorkerConnector, connector};
use crate::config::Config;

/// A worker that does not accept within this time is down. Workers are neighbours: a healthy one takes milliseconds.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Silent peers are noticed by the kernel after this time, even when no request timeout is set.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// Sends requests to workers.
#[derive(Clone, Debug)]
pub struct WorkerClient {
    connector: Arc<WorkerConnector>,
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
        let authorization = config.api_key.as_ref().map(|key| {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .expect("invariant: the configuration checked the key");
            value.set_sensitive(true);
            value
        });
        Ok(Self {
            connector: Arc::new(WorkerConnector::new(tcp, tls)),
            authorization,
        })
    }

    /// Makes the connections.
    pub fn connector(&self) -> &Arc<WorkerConnector> {
        &self.connector
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
    ) -> Exchange {
        if let Some(key) = &self.authorization
            && !headers.contains_key(AUTHORIZATION)
        {
            headers.insert(AUTHORIZATION, key.clone());
        }
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = Uri::from(path);
        *request.headers_mut() = headers;
        worker.lines().send(&self.connector, request)
    }

    /// Asks a server beside the workers, over a connection of its own; it gets no key.
    pub fn get_elsewhere(&self, authority: Authority, path: PathAndQuery) -> Exchange {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = Uri::from(path);
        Arc::new(Lines::new(Scheme::HTTP, authority)).send(&self.connector, request)
    }

    /// Sends a small JSON body of the router's own.
    pub fn post_json(&self, worker: &Worker, path: &'static str, json: String) -> Exchange {
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
    ) -> Result<Response<Incoming>, ExchangeError> {
        let path = PathAndQuery::from_static(path);
        self.send(worker, Method::GET, path, HeaderMap::new(), Bytes::new())
            .await
    }
}
