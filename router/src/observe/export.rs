//! Sends spans to an OpenTelemetry collector: OTLP over HTTP, protobuf.
//!
//! Requests never wait for it: spans that do not fit into the queue are dropped and counted.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::otlp::{ExportRequest, KeyValue, Resource, ResourceSpans, Scope, ScopeSpans, Span};
use crate::config::TraceSettings;
use crate::metrics::{Metrics, add};
use crate::pool::tls::{TlsError, WorkerConnector, connector};

/// Spans that may wait: about 4 MiB, and four seconds of 1000 requests per second with three spans each.
pub const QUEUE_MAX: usize = 12_288;

/// Spans sent at a time.
pub const BATCH_MAX: usize = 512;

/// A span waits no longer than this for others to travel with.
pub const BATCH_WAIT: Duration = Duration::from_millis(500);

/// A collector that does not answer within this time has failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Tries per batch; meanwhile the queue fills, and what does not fit is dropped.
const TRIES: u32 = 3;

/// Pause before the second try; twice as long before the third.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// At shutdown, the time that waiting spans get.
const CLOSING_TIME: Duration = Duration::from_secs(2);

/// A collector's answer is a few bytes; more is not read.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Where spans go in.
#[derive(Clone, Debug)]
pub struct SpanQueue {
    spans: mpsc::Sender<Span>,
    metrics: Arc<Metrics>,
    zero: (Instant, SystemTime),
}

/// Where they come out; run it on a task.
#[derive(Debug)]
pub struct Exporter {
    spans: mpsc::Receiver<Span>,
    http: Client<WorkerConnector, Full<Bytes>>,
    uri: Uri,
    resource: Resource,
    metrics: Arc<Metrics>,
}

impl SpanQueue {
    /// Hands a span over. Never waits.
    pub fn push(&self, span: Span) {
        if self.spans.try_send(span).is_err() {
            add(&self.metrics.spans_dropped, 1);
        }
    }

    /// Nanoseconds since 1970 at `time`.
    pub fn unix_nanos(&self, time: Instant) -> u64 {
        let (zero, wall) = self.zero;
        let wall = if time >= zero {
            wall + (time - zero)
        } else {
            wall - (zero - time)
        };
        let since = wall.duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        })
    }
}

/// A queue and what empties it.
///
/// # Errors
/// [`TlsError`] when the collector is reached over TLS and no authority can be read.
pub fn channel(
    settings: &TraceSettings,
    metrics: &Arc<Metrics>,
) -> Result<(SpanQueue, Exporter), TlsError> {
    let tls = if settings.endpoint.scheme_str() == Some("https") {
        Some(connector(None)?)
    } else {
        None
    };
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CALL_TIMEOUT));
    let http = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(1)
        .pool_timer(TokioTimer::new())
        .build(WorkerConnector::new(tcp, tls));
    let (sender, spans) = mpsc::channel(QUEUE_MAX);
    #[expect(
        clippy::disallowed_methods,
        reason = "read once: spans carry wall time, everything else counts from this moment"
    )]
    let zero = (Instant::now(), SystemTime::now());
    let resource = Resource {
        attributes: vec![
            KeyValue::new("service.name", settings.service.as_str()),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new(
                "service.instance.id",
                format!("{:032x}", rand::random::<u128>()),
            ),
        ],
    };
    let queue = SpanQueue {
        spans: sender,
        metrics: Arc::clone(metrics),
        zero,
    };
    let exporter = Exporter {
        spans,
        http,
        uri: traces_uri(&settings.endpoint),
        resource,
        metrics: Arc::clone(metrics),
    };
    Ok((queue, exporter))
}

/// The address of traces at a collector: `/v1/traces`, unless a path was given.
fn traces_uri(endpoint: &Uri) -> Uri {
    if !matches!(endpoint.path(), "" | "/") {
        return endpoint.clone();
    }
    let mut parts = endpoint.clone().into_parts();
    parts.path_and_query = Some(hyper::http::uri::PathAndQuery::from_static("/v1/traces"));
    Uri::from_parts(parts).unwrap_or_else(|_| endpoint.clone())
}

impl Exporter {
    /// Sends spans until `closing` resolves, then those that are left, for at most `CLOSING_TIME`.
    pub async fn run(mut self, closing: impl Future<Output = ()>) {
        tokio::pin!(closing);
        let mut batch = Vec::with_capacity(BATCH_MAX);
        loop {
            tokio::select! {
                () = &mut closing => break,
                () = self.gather(&mut batch) => {}
            }
            if batch.is_empty() {
                return;
            }
            tokio::select! {
                () = self.send(&mut batch) => {}
                () = &mut closing => break,
            }
        }
        self.spans.close();
        let rest = async {
            loop {
                while batch.len() < BATCH_MAX {
                    match self.spans.try_recv() {
                        Ok(span) => batch.push(span),
                        Err(_) => break,
                    }
                }
                if batch.is_empty() {
                    break;
                }
                self.send(&mut batch).await;
            }
        };
        if tokio::time::timeout(CLOSING_TIME, rest).await.is_err() {
            tracing::warn!("some spans were not exported: the collector did not answer in time");
        }
    }

    /// Waits for the first span, then a little for more. None: the router is gone.
    async fn gather(&mut self, batch: &mut Vec<Span>) {
        if batch.is_empty() {
            match self.spans.recv().await {
                Some(span) => batch.push(span),
                None => return,
            }
        }
        let full = async {
            while batch.len() < BATCH_MAX {
                match self.spans.recv().await {
                    Some(span) => batch.push(span),
                    None => return,
                }
            }
        };
        // Either it is full or it has waited long enough.
        let _ = tokio::time::timeout(BATCH_WAIT, full).await;
    }

    /// Sends a batch, which is empty afterwards unless this is cancelled.
    async fn send(&self, batch: &mut Vec<Span>) {
        let count = batch.len() as u64;
        let body = self.encode(batch);
        for attempt in 1..=TRIES {
            let failure = match tokio::time::timeout(CALL_TIMEOUT, self.call(&body)).await {
                Ok(Ok(())) => {
                    add(&self.metrics.spans_exported, count);
                    batch.clear();
                    return;
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure::passing("it did not answer in time".to_owned()),
            };
            if failure.is_final || attempt == TRIES {
                tracing::warn!(spans = count, collector = %self.uri, "spans were lost: {}", failure.text);
                break;
            }
            tokio::time::sleep(RETRY_PAUSE * (1 << (attempt - 1))).await;
        }
        add(&self.metrics.spans_dropped, count);
        batch.clear();
    }

    fn encode(&self, batch: &[Span]) -> Bytes {
        let request = ExportRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans {
                    scope: Some(Scope {
                        name: "kvrouter".to_owned(),
                        version: env!("CARGO_PKG_VERSION").to_owned(),
                    }),
                    spans: batch.to_vec(),
                }],
            }],
        };
        request.encode_to_vec().into()
    }

    async fn call(&self, body: &Bytes) -> Result<(), Failure> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header(CONTENT_TYPE, "application/x-protobuf")
            .body(Full::new(body.clone()))
            .map_err(|error| Failure {
                text: error.to_string(),
                is_final: true,
            })?;
        let sent = self.http.request(request).await;
        let response = sent.map_err(|error| Failure::passing(error.to_string()))?;
        let status = response.status();
        // Reading the answer to its end lets the connection serve again.
        let _ = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await;
        if status.is_success() {
            return Ok(());
        }
        // The statuses that OTLP's specification lets clients try again.
        let is_passing = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT
        );
        Err(Failure {
            text: format!("it answered {status}"),
            is_final: !is_passing,
        })
    }
}

struct Failure {
    text: String,
    is_final: bool,
}

impl Failure {
    fn passing(text: String) -> Self {
        Self {
            text,
            is_final: false,
        }
    }
}
