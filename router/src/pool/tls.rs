//! TLS on both sides: for clients of the router, and towards workers named by `https://`.
#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use tower_service::Service;

use crate::config::TlsFiles;
use crate::config::gossip::MutualTls;

/// Where systems keep the authorities they trust, in the order of trial.
const SYSTEM_AUTHORITIES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file is missing or holds nothing usable.
    #[error("cannot use {file}: {reason}")]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Workers are named by `https://`, but nobody is trusted to sign their certificates.
    #[error(
        "https workers need --worker-authorities: this system has no file of trusted authorities"
    )]
    NoAuthorities,
    /// The key and the certificates do not fit.
    #[error("the certificate and the key do not work together")]
    Rustls(#[from] tokio_rustls::rustls::Error),
}

fn file_error(file: &Path, reason: &impl ToString) -> TlsError {
    TlsError::File {
        file: file.to_owned(),
        reason: reason.to_string(),
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| file_error(file, &error))?;
    if found.is_empty() {
        return Err(file_error(file, &"it holds no certificate"));
    }
    Ok(found)
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn own(files: &TlsFiles) -> Result<Own, TlsError> {
    let chain = certificates(&files.certificates)?;
    let key =
        PrivateKeyDer::from_pem_file(&files.key).map_err(|error| file_error(&files.key, &error))?;
    Ok((chain, key))
}

fn authorities(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    // A system's file may hold certificates of kinds that are not supported; the others still count.
    let (added, _) = roots.add_parsable_certificates(certificates(file)?);
    if added == 0 {
        return Err(file_error(file, &"no certificate in it is usable"));
    }
    Ok(roots)
}

/// Accepts clients with the certificate in `files`.
///
/// # Errors
/// [`TlsError`] when the files cannot be used.
pub fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, TlsError> {
    let (chain, key) = own(files)?;
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts HTTP/2 from those whose certificates the authorities in `tls` have signed.
///
/// # Errors
/// [`TlsError`] when the files cannot be used.
pub fn mutual_acceptor(tls: &MutualTls) -> Result<TlsAcceptor, TlsError> {
    let roots = authorities(&tls.authorities)?;
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
        .build()
        .map_err(|error| file_error(&tls.authorities, &error))?;
    let (chain, key) = own(&tls.files)?;
    let mut config = ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// What tonic's clients need for the same on their side.
///
/// # Errors
/// [`TlsError`] when the files cannot be read.
pub fn mutual_client(tls: &MutualTls) -> Result<ClientTlsConfig, TlsError> {
    let read = |file: &Path| std::fs::read(file).map_err(|error| file_error(file, &error));
    let identity = Identity::from_pem(read(&tls.files.certificates)?, read(&tls.files.key)?);
    Ok(ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read(&tls.authorities)?))
        .identity(identity))
}

/// Reaches `https://` workers whose certificates are signed by the authorities in `file`, or by the system's.
///
/// # Errors
/// [`TlsError`] when no authority is found.
pub fn connector(file: Option<&Path>) -> Result<TlsConnector, TlsError> {
    let file = file
        .or_else(|| {
            let mut known = SYSTEM_AUTHORITIES.iter().map(Path::new);
            known.find(|file| file.exists())
        })
        .ok_or(TlsError::NoAuthorities)?;
    let config = ClientConfig::builder()
        .with_root_certificates(authorities(file)?)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Opens connections to workers, plain or over TLS, as their URLs say.
#[derive(Clone)]
pub struct WorkerConnector {
    tcp: HttpConnector,
    tls: Option<TlsConnector>,
}

impl std::fmt::Debug for WorkerConnector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerConnector")
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}

impl WorkerConnector {
    /// A connector over `tcp`; without `tls` only plain workers can be reached.
    pub fn new(mut tcp: HttpConnector, tls: Option<TlsConnector>) -> Self {
        tcp.enforce_http(false);
        Self { tcp, tls }
    }

    /// Connects to the server that `uri` names.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub async fn connect(&self, uri: Uri) -> Result<WorkerStream, ConnectError> {
        let is_tls = uri.scheme_str() == Some("https");
        let host = uri.host().unwrap_or_default();
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(name.to_owned());
        let mut tcp = self.tcp.clone();
        poll_fn(|cx| tcp.poll_ready(cx)).await?;
        let stream = tcp.call(uri).await?;
        if !is_tls {
            return Ok(WorkerStream::Plain(stream));
        }
        let tls = self.tls.as_ref();
        let tls = tls.ok_or("TLS towards workers is not set up")?;
        let shake = tls.connect(name?, stream.into_inner());
        let stream = tokio::time::timeout(super::client::CONNECT_TIMEOUT, shake).await??;
        Ok(WorkerStream::Tls(Box::new(TokioIo::new(stream))))
    }
}

/// Why a connection could not be made.
pub type ConnectError = Box<dyn std::error::Error + Send + Sync>;

/// For hyper's general client.
impl Service<Uri> for WorkerConnector {
    type Response = WorkerStream;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<WorkerStream, ConnectError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(uri).await })
    }
}

/// A connection to a worker.
#[derive(Debug)]
pub enum WorkerStream {
    /// Over TCP alone.
    Plain(TokioIo<TcpStream>),
    /// Over TLS.
    Tls(Box<TokioIo<TlsStream<TcpStream>>>),
}

impl Connection for WorkerStream {
    fn connected(&self) -> Connected {
        match self {
            Self::Plain(stream) => stream.inner().connected(),
            Self::Tls(stream) => stream.inner().get_ref().0.connected(),
        }
    }
}

impl Read for WorkerStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl Write for WorkerStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }
}
