//! The Prometheus page: `GET /metrics`, one request per connection.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::{Instant, timeout};

use super::accept::{Counters, Duplex, authorised, refuse};
use super::hub::Hub;
use crate::telemetry::prometheus;
use crate::token::BearerToken;

/// Serves connections of the page's listener.
#[derive(Clone)]
pub(super) struct Metrics {
    hub: Arc<Hub>,
    token: Option<Arc<BearerToken>>,
    counters: Arc<Counters>,
}

impl Metrics {
    pub(super) fn new(
        hub: Arc<Hub>,
        token: Option<Arc<BearerToken>>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            hub,
            token,
            counters,
        }
    }

    /// Serves one request.
    pub(super) async fn connection(self, socket: Box<dyn Duplex>) {
        let counters = Arc::clone(&self.counters);
        let service = service_fn(move |request| {
            let response = self.respond(&request);
            async move { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .keep_alive(false)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(socket), service);
        if !matches!(timeout(SCRAPE_MAX, connection).await, Ok(Ok(()))) {
            refuse(
                &counters.protocol,
                "a scrape broke the protocol or took too long",
            );
        }
    }

    fn respond(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !authorised(request.headers(), self.token.as_deref()) {
            refuse(&self.counters.unauthenticated, "no or a wrong bearer token");
            let mut response = plain(StatusCode::UNAUTHORIZED);
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return response;
        }
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND);
        }
        if request.method() != Method::GET {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED);
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET"));
            return response;
        }
        let page = prometheus::render(&self.hub.picture(Instant::now()));
        let mut response = Response::new(Full::new(Bytes::from(page)));
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static(prometheus::CONTENT_TYPE),
        );
        response
    }
}

fn plain(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// Longest time for a whole scrape, from accept to the last byte: scrapers give up after 10 s.
const SCRAPE_MAX: Duration = Duration::from_secs(10);

/// Request line and headers. (The least that the HTTP library accepts is 8 KiB.)
const HEADER_BYTES_MAX: usize = 16 << 10;
