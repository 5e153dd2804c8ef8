//! Certificates for the listeners.

use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::serve::tls::{TlsError, server_config_from_pem};

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
        let client_ca = self.client_ca_pem.as_deref();
        let config = server_config_from_pem(&self.chain_pem, &self.key_pem, client_ca)?;
        Ok(Arc::unwrap_or_clone(config))
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
