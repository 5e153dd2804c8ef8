//! TLS for listeners and their clients: rustls with ring, PEM in, optional client certificates (mTLS).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};

/// Where the PEM files of a listener are.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain, the listener's own first.
    pub cert: PathBuf,
    /// Its private key (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
    /// Certificates that must have signed the client's; `None` accepts clients without one.
    pub client_ca: Option<PathBuf>,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// PEM text holds no usable certificate or key.
    #[error("the {part} is no PEM this library can use: {reason}")]
    Pem {
        /// Which part.
        part: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key do not fit, or rustls refuses them.
    #[error("the TLS identity is unusable: {0}")]
    Identity(#[from] rustls::Error),
    /// The client CA cannot verify anybody.
    #[error("the client CA is unusable: {0}")]
    ClientCa(#[from] VerifierBuilderError),
}

/// Reads the files of a listener.
///
/// # Errors
/// [`TlsError`] names the file or part at fault.
pub fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let ca = files.client_ca.as_deref().map(read).transpose()?;
    server_config_from_pem(&read(&files.cert)?, &read(&files.key)?, ca.as_deref())
}

/// Builds a listener's configuration from PEM text; with `client_ca`, clients must show a certificate it signed.
///
/// # Errors
/// [`TlsError`] names the part at fault.
pub fn server_config_from_pem(
    cert: &[u8],
    key: &[u8],
    client_ca: Option<&[u8]>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let roots = Arc::new(roots(pem, "client CA")?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder.with_single_cert(certificates(cert, "certificate")?, private_key(key)?)?;
    Ok(Arc::new(config))
}

/// Builds a client's configuration: trust `ca`, and show `identity` (chain, key) if there is one.
///
/// # Errors
/// [`TlsError`] names the part at fault.
pub fn client_config_from_pem(
    ca: &[u8],
    identity: Option<(&[u8], &[u8])>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(ca, "CA")?);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder
            .with_client_auth_cert(certificates(cert, "client certificate")?, private_key(key)?)?,
    };
    Ok(Arc::new(config))
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn certificates(pem: &[u8], part: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        Ok(_) => Err(TlsError::Pem {
            part,
            reason: "it holds no certificate".to_owned(),
        }),
        Err(error) => Err(TlsError::Pem {
            part,
            reason: error.to_string(),
        }),
    }
}

fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| TlsError::Pem {
        part: "private key",
        reason: error.to_string(),
    })
}

fn roots(pem: &[u8], part: &'static str) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, part)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}
