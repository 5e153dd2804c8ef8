//! Tells other replicas of this one's bookings.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kvtransfer::token::BearerToken;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::Service;
use tonic::{Request, Response, Status};

use super::v1::gossip_server::{Gossip, GossipServer};
use super::v1::{Booking, FollowRequest, FollowResponse};
use super::{COALESCE, KEEP_ALIVE, REPLICAS_MAX};
use crate::pick::Picker;
use crate::pick::feed::{Following, News};
use crate::schedule::board::Record;

/// Messages that may wait for a follower who reads slowly; what changes meanwhile is told together.
const WAITING_MAX: usize = 2;

/// How often the other end is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// A request holds nothing but its head.
const REQUEST_BYTES_MAX: usize = 4 << 10;

/// A replica that has not finished its TLS handshake in this time is let go.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// When accepting fails, the next try comes after this pause.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where replicas are told, and how they are known.
pub struct Door {
    /// Listens.
    pub listener: TcpListener,
    /// Asks for a token.
    pub token: Option<BearerToken>,
    /// Asks for a certificate.
    pub tls: Option<TlsAcceptor>,
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Door")
            .field("listener", &self.listener)
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}

/// Serves until it is dropped.
pub async fn serve(picker: Arc<Picker>, replica: u64, door: Door) {
    let Door {
        listener,
        token,
        tls,
    } = door;
    let service = GossipServer::new(Teller {
        picker,
        replica,
        token,
    })
    .max_decoding_message_size(REQUEST_BYTES_MAX);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < REPLICAS_MAX => match accepted {
                Ok((stream, _)) => { connections.spawn(greet(stream, tls.clone(), service.clone())); }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a replica's connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn greet(stream: TcpStream, tls: Option<TlsAcceptor>, service: GossipServer<Teller>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a replica was gone before it was told anything");
        return;
    }
    let Some(tls) = tls else {
        return connection(stream, service).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => connection(stream, service).await,
        Ok(Err(error)) => tracing::warn!(%error, "somebody who is no replica wants to be told"),
        Err(_) => tracing::debug!("a replica's TLS handshake took too long"),
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: GossipServer<Teller>,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut service = service.clone();
        async move { service.call(request).await }
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .max_concurrent_streams(1)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a replica's connection ended");
    }
}

#[derive(Debug)]
struct Teller {
    picker: Arc<Picker>,
    replica: u64,
    token: Option<BearerToken>,
}

#[tonic::async_trait]
impl Gossip for Teller {
    type FollowStream = ReceiverStream<Result<FollowResponse, Status>>;

    async fn follow(
        &self,
        request: Request<FollowRequest>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        if let Some(token) = &self.token {
            let shown = request.metadata().get("authorization");
            if !shown.is_some_and(|shown| token.accepts(shown.as_bytes())) {
                return Err(Status::unauthenticated("a bearer token is needed"));
            }
        }
        if self.picker.followers() >= REPLICAS_MAX {
            return Err(Status::resource_exhausted("there are enough followers"));
        }
        let (sender, messages) = mpsc::channel(WAITING_MAX);
        tokio::spawn(tell(self.picker.follow(), self.replica, sender));
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

/// Tells one follower until it is gone.
async fn tell(
    following: Following,
    replica: u64,
    sender: mpsc::Sender<Result<FollowResponse, Status>>,
) {
    loop {
        let message = match following.news() {
            Some(news) => message(replica, news),
            None => {
                let rings = following.bell.notified();
                tokio::select! {
                    () = sender.closed() => return,
                    rung = tokio::time::timeout(KEEP_ALIVE, rings) => {
                        if rung.is_ok() {
                            tokio::time::sleep(COALESCE).await;
                            continue;
                        }
                    }
                }
                FollowResponse {
                    replica,
                    ..FollowResponse::default()
                }
            }
        };
        if sender.send(Ok(message)).await.is_err() {
            return;
        }
    }
}

fn message(replica: u64, news: News) -> FollowResponse {
    FollowResponse {
        replica,
        begins: news.begins,
        bookings: news.bookings.into_iter().map(booking).collect(),
        ended: news.ended,
    }
}

fn booking(record: Record) -> Booking {
    Booking {
        number: record.key.number,
        prefill: record.prefill,
        decode: record.decode,
        dp_rank: record.dp_rank,
        compute_tokens: record.compute_tokens,
        kv_bytes: record.kv_bytes,
        kv_tokens: record.kv_tokens,
        age_s: record.age.as_secs_f64(),
        ready_in_s: record.ready_in_s,
        ready_known: record.ready_known,
        transferred: record.transferred,
    }
}
