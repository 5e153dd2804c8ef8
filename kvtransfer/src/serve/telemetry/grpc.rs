//! The gRPC side of a connection: HTTP/2 within bounds, the token, and the `Watch` call.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tonic::codegen::Service;
use tonic::{Status, body::Body};

use super::accept::{Counters, Duplex, authorised, refuse};
use super::hub::Hub;
use crate::telemetry::message::MESSAGE_BYTES_MAX;
use crate::telemetry::v1::telemetry_server::{Telemetry, TelemetryServer};
use crate::telemetry::v1::{WatchRequest, WatchResponse};
use crate::token::BearerToken;

/// Serves connections of the stream's listener.
#[derive(Clone)]
pub(super) struct Grpc {
    service: TelemetryServer<Watch>,
    token: Option<Arc<BearerToken>>,
    counters: Arc<Counters>,
}

impl Grpc {
    pub(super) fn new(
        hub: Arc<Hub>,
        token: Option<Arc<BearerToken>>,
        counters: Arc<Counters>,
    ) -> Self {
        let watch = Watch {
            hub,
            counters: Arc::clone(&counters),
        };
        let service = TelemetryServer::new(watch)
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Self {
            service,
            token,
            counters,
        }
    }

    /// Serves one connection until it ends, or until it has had no call open for [`IDLE_MAX`].
    pub(super) async fn connection(self, socket: Box<dyn Duplex>) {
        let counters = Arc::clone(&self.counters);
        let usage = Arc::new(Usage::default());
        let calls = Arc::clone(&usage);
        let service = service_fn(move |request| self.clone().call(request, OpenCall::new(&calls)));
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(Some(PING_INTERVAL))
            .keep_alive_timeout(PING_MAX)
            .max_concurrent_streams(CALLS_PER_CONNECTION_MAX)
            .max_header_list_size(HEADER_BYTES_MAX)
            .max_send_buf_size(SEND_BYTES_MAX)
            .serve_connection(TokioIo::new(socket), service);
        let mut connection = std::pin::pin!(connection);
        let mut look = interval(IDLE_MAX);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.tick().await;
        let mut begun = 0;
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if ended.is_err() {
                        refuse(&counters.protocol, "a connection broke the protocol");
                    }
                    return;
                }
                _ = look.tick() => {
                    let now = usage.begun.load(Relaxed);
                    if usage.open.load(Relaxed) == 0 && now == begun {
                        refuse(&counters.protocol, "a connection without a call");
                        return;
                    }
                    begun = now;
                }
            }
        }
    }

    async fn call(
        mut self,
        mut request: Request<Incoming>,
        open: OpenCall,
    ) -> Result<Response<Body>, Infallible> {
        if !authorised(request.headers(), self.token.as_deref()) {
            refuse(&self.counters.unauthenticated, "no or a wrong bearer token");
            return Ok(Status::unauthenticated("a bearer token is needed").into_http());
        }
        request.extensions_mut().insert(Arc::new(open));
        match timeout(REQUEST_MAX, self.service.call(request)).await {
            Ok(response) => response,
            Err(_elapsed) => Ok(Status::deadline_exceeded("the request did not come").into_http()),
        }
    }
}

/// The `Watch` call.
struct Watch {
    hub: Arc<Hub>,
    counters: Arc<Counters>,
}

#[tonic::async_trait]
impl Telemetry for Watch {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: tonic::Request<WatchRequest>,
    ) -> Result<tonic::Response<Self::WatchStream>, Status> {
        let Some(subscription) = self.hub.subscribe(Instant::now()) else {
            refuse(&self.counters.subscribers, "too many subscribers");
            return Err(Status::resource_exhausted(
                "as many subscribers as allowed are connected",
            ));
        };
        // The connection is in use for as long as the stream lives.
        let open = request.extensions().get::<Arc<OpenCall>>().cloned();
        let stream = unfold(
            (subscription, open),
            |(mut subscription, open)| async move {
                let message = subscription.next().await?;
                Some((Ok(message), (subscription, open)))
            },
        );
        Ok(tonic::Response::new(Box::pin(stream)))
    }
}

/// How much a connection is used.
#[derive(Default)]
struct Usage {
    open: AtomicUsize,
    begun: AtomicU64,
}

/// Counts a call while it lives.
struct OpenCall(Arc<Usage>);

impl OpenCall {
    fn new(usage: &Arc<Usage>) -> Self {
        usage.open.fetch_add(1, Relaxed);
        usage.begun.fetch_add(1, Relaxed);
        Self(Arc::clone(usage))
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// A `WatchRequest` is empty today; unknown fields of later versions may fit in here.
const REQUEST_BYTES_MAX: usize = 4 << 10;

/// Longest wait for a request's message.
const REQUEST_MAX: Duration = Duration::from_secs(5);

/// How long a connection may hold its place without a call.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// A peer that does not answer a ping is dead, or does not read; either way its place is needed.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_MAX: Duration = Duration::from_secs(5);

/// A consumer needs one call; a second may overlap when it starts over.
const CALLS_PER_CONNECTION_MAX: u32 = 4;

/// Headers of a call: a token and a few hundred bytes.
const HEADER_BYTES_MAX: u32 = 16 << 10;

/// What HTTP/2 may buffer per stream for a peer that does not read.
const SEND_BYTES_MAX: usize = 64 << 10;
