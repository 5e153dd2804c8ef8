//! Certificates for the listeners.

use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

/// The listeners' certificate, and whom they let in. All PEM.
#[derive(Clone)]
pub struct ServerTls {
    /// Our certificate chain, our own certificate first.
    pub chain_pem: Vec<u8>,
    /// Its private key.
    pub key_pem: Vec<u8>,
    /// With this, only clients whose certificate one of these authorities signed are let in.
    pub client_ca_pem: Option<Vec<u8>>,
}

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A list of certificates holds none.
    #[error("no certificate in the PEM")]
    NoCertificate,
    /// Not PEM, or not what it should hold.
    #[error("broken PEM")]
    Pem(#[from] pem::Error),
    /// Chain and key do not fit, or a certificate is broken.
    #[error("unusable certificate")]
    Certificate(#[from] rustls::Error),
    /// The client authorities are no good.
    #[error("unusable client authorities")]
    ClientAuthorities(#[from] VerifierBuilderError),
}

impl ServerTls {
    /// For the gRPC listener (HTTP/2) and for the page's listener (HTTP/1.1), in this order.
    pub(super) fn acceptors(&self) -> Result<(TlsAcceptor, TlsAcceptor), TlsError> {
        let mut http = self.config()?;
        let mut grpc = http.clone();
        grpc.alpn_protocols = vec![b"h2".to_vec()];
        http.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok((
            TlsAcceptor::from(Arc::new(grpc)),
            TlsAcceptor::from(Arc::new(http)),
        ))
    }

    fn config(&self) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = match &self.client_ca_pem {
            None => builder.with_no_client_auth(),
            Some(authorities) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(authorities)? {
                    roots.add(authority)?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let key = PrivateKeyDer::from_pem_slice(&self.key_pem)?;
        Ok(builder.with_single_cert(certificates(&self.chain_pem)?, key)?)
    }
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        f.debug_struct("ServerTls")
            .field("client_auth", &self.client_ca_pem.is_some())
            .finish_non_exhaustive()
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let list = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>()?;
    if list.is_empty() {
        Err(TlsError::NoCertificate)
    } else {
        Ok(list)
    }
}
