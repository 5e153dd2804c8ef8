//! The picker's gRPC server.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};
use tower_service::Service;

use super::health::HealthService;
use super::protocol::ext_proc::external_processor_server::{
    ExternalProcessor, ExternalProcessorServer,
};
use super::protocol::ext_proc::{ProcessingRequest, ProcessingResponse};
use super::protocol::health::health_server::HealthServer;
use super::session::{self, REPLIES_MAX, Shared};
use crate::config::epp::{EppConfig, GrpcTls};
use crate::drain::DrainSwitch;
use crate::pool::tls::TlsError;
use crate::proxy::Front;
use crate::proxy::server::CONNECTIONS_SPARE;

/// What Envoy may send on one stream before the picker has read it: some pieces of a body.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// The same for all streams of a connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Room in a message for what is around a body.
const MESSAGE_SPARE_BYTES: usize = 1 << 20;

/// Streams that Envoy reset before the picker took them up. Hundreds of clients may leave at one time, and HTTP/2's usual
/// bound of 20 would end the connection, and with it the requests of all others.
const RESETS_MAX: usize = 10_000;

/// A silent Envoy is asked for a sign of life this often; one that gives none in [`KEEP_ALIVE_TIMEOUT`] is gone, and its
/// requests are cancelled.
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// A picker that listens but does not serve yet.
#[derive(Debug)]
pub struct ExternalPicker {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Identity>,
    config: EppConfig,
}

/// Why the picker could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExternalPickerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {host}:{port} for Envoy")]
    Listen {
        /// The address asked for.
        host: String,
        /// The port asked for.
        port: u16,
        /// What the system said.
        source: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A certificate could not be made.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
}

impl ExternalPicker {
    /// Opens the listener.
    ///
    /// # Errors
    /// [`ExternalPickerError`]
    pub async fn bind(config: EppConfig) -> Result<Self, ExternalPickerError> {
        let tls = identity(&config.tls)?;
        let listen = |source| ExternalPickerError::Listen {
            host: config.host.clone(),
            port: config.port,
            source,
        };
        let host = config.host.trim_start_matches('[').trim_end_matches(']');
        let listener = TcpListener::bind((host, config.port))
            .await
            .map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        Ok(Self {
            listener,
            address,
            tls,
            config,
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `front` drains and the last stream has ended. Dropped before, it ends all streams at once.
    pub async fn serve(self, front: Arc<Front>) {
        let shared = Arc::new(Shared {
            front: Arc::clone(&front),
            config: Arc::new(self.config),
            cut: DrainSwitch::default(),
        });
        let _cut = CutOnDrop(shared.cut.clone());
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        tracing::info!(
            "serving Envoy's external processing on {scheme}://{}",
            self.address
        );
        let largest = front
            .config
            .body_bytes_max
            .saturating_add(MESSAGE_SPARE_BYTES);
        let process = ExternalProcessorServer::new(ProcessService {
            shared: Arc::clone(&shared),
        })
        .max_decoding_message_size(largest)
        .max_encoding_message_size(largest);
        let streams = streams_max(&front);
        let mut server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(u32::try_from(streams).unwrap_or(u32::MAX))
            .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
            .http2_keepalive_interval(Some(KEEP_ALIVE_PERIOD))
            .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT));
        if let Some(identity) = self.tls {
            let tls = ServerTlsConfig::new().identity(identity);
            server = match server.tls_config(tls) {
                Ok(server) => server,
                Err(error) => return tracing::error!(%error, "the picker's certificate is no good"),
            };
        }
        let incoming = TcpIncoming::from(self.listener).with_nodelay(Some(true));
        let drain = front.drain.clone();
        let services = Services {
            process,
            health: HealthServer::new(HealthService::new(shared)),
        };
        let drained = async move { drain.thrown().await };
        let served = server.serve_with_incoming_shutdown(services, incoming, drained);
        if let Err(error) = served.await {
            tracing::error!(%error, "the picker's server ended");
        }
    }
}

/// Ends what is left when the server is gone.
struct CutOnDrop(DrainSwitch);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        self.0.throw();
    }
}

fn streams_max(front: &Front) -> usize {
    front
        .config
        .requests_max
        .saturating_add(front.config.queue_max)
        .saturating_add(CONNECTIONS_SPARE)
}

fn identity(tls: &GrpcTls) -> Result<Option<Identity>, ExternalPickerError> {
    Ok(match tls {
        GrpcTls::Off => None,
        GrpcTls::SelfSigned => {
            let made = rcgen::generate_simple_self_signed(["kvrouter".to_owned()])?;
            Some(Identity::from_pem(
                made.cert.pem(),
                made.signing_key.serialize_pem(),
            ))
        }
        GrpcTls::Files(files) => {
            // Checked by the front's own reader, which says what is wrong with which file.
            crate::pool::tls::acceptor(files)?;
            let read = |file: &std::path::Path| {
                std::fs::read(file).map_err(|error| TlsError::File {
                    file: file.to_owned(),
                    reason: error.to_string(),
                })
            };
            Some(Identity::from_pem(
                read(&files.certificates)?,
                read(&files.key)?,
            ))
        }
    })
}

/// Both services on one listener.
#[derive(Clone)]
struct Services {
    process: ExternalProcessorServer<ProcessService>,
    health: HealthServer<HealthService>,
}

impl Service<hyper::Request<Body>> for Services {
    type Response = hyper::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: hyper::Request<Body>) -> Self::Future {
        let service = request.uri().path().split('/').nth(1);
        if service == Some(HealthServer::<HealthService>::NAME) {
            self.health.call(request)
        } else {
            // Which says that it does not know the others.
            self.process.call(request)
        }
    }
}

struct ProcessService {
    shared: Arc<Shared>,
}

#[tonic::async_trait]
impl ExternalProcessor for ProcessService {
    type ProcessStream = ReceiverStream<Result<ProcessingResponse, Status>>;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Self::ProcessStream>, Status> {
        let counters = &self.shared.front.epp;
        let (begun, ended) = (&counters.streams, &counters.ended);
        let open = begun
            .load(Ordering::Relaxed)
            .saturating_sub(ended.load(Ordering::Relaxed));
        if open >= streams_max(&self.shared.front) as u64 {
            return Err(Status::resource_exhausted("too many requests at one time"));
        }
        let (replies, receiver) = mpsc::channel(REPLIES_MAX);
        let shared = Arc::clone(&self.shared);
        tokio::spawn(session::run(shared, request.into_inner(), replies));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
