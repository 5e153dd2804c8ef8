//! TLS on both sides, and what it refuses.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvrouter::Config;
use kvrouter::config::TlsFiles;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::fakes::{FakeWorker, Running, Script, config, soon, whole};

/// A certificate for the loopback, in files of this test's own.
struct Identity {
    folder: PathBuf,
    files: TlsFiles,
    certificate: rcgen::Certificate,
}

impl Identity {
    fn new(name: &str) -> Self {
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let process = std::process::id();
        let folder = std::env::temp_dir().join(format!("kvrouter-{name}-{process}"));
        std::fs::create_dir_all(&folder).unwrap();
        let files = TlsFiles {
            certificates: folder.join("certificate.pem"),
            key: folder.join("key.pem"),
        };
        std::fs::write(&files.certificates, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        Self {
            folder,
            files,
            certificate: made.cert,
        }
    }

    fn connector(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        let config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // What is left lies in the system's folder for such things.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test]
async fn clients_and_workers_are_reached_over_tls() {
    let identity = Identity::new("both");
    let (prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    decode.then(Script::Reply(200, r#"{"answer":1}"#));
    // The inner router speaks TLS; for the outer one it is a worker.
    let inner = Running::start(Config {
        tls: Some(identity.files.clone()),
        ..config(&[&prefill.url], &[&decode.url])
    })
    .await;
    let address = inner.url.strip_prefix("http://").unwrap().to_owned();
    let https = format!("https://{address}");
    let plain = FakeWorker::start().await;
    let outer = Running::start(Config {
        worker_authorities: Some(identity.files.certificates.clone()),
        ..config(&[&plain.url], &[&https])
    })
    .await;
    outer.ready(1, 1).await;
    let answer = whole(outer.post("/generate", r#"{"text":"a"}"#).await).await;
    assert_eq!(answer, (200, r#"{"answer":1}"#.to_owned()));
    assert_eq!(decode.request().await.json()["text"], "a");

    // And by hand, to see that it is TLS indeed.
    let stream = TcpStream::connect(&address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = identity.connector().connect(name, stream).await.unwrap();
    let request = b"GET /health HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    soon(stream.read_to_string(&mut text)).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");

    // Who does not know the authority gets no further than the handshake.
    let stranger = Identity::new("stranger");
    let wary = Running::start(Config {
        worker_authorities: Some(stranger.files.certificates.clone()),
        ..config(&[&plain.url], &[&https])
    })
    .await;
    let (status, text) = whole(wary.post("/generate", r#"{"text":"a"}"#).await).await;
    assert_eq!(status, 503, "{text}");
    assert!(text.contains("no decode worker is ready"), "{text}");
}

#[tokio::test]
async fn unusable_files_are_named() {
    let identity = Identity::new("bad");
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let base = || config(&[&prefill.url], &[&decode.url]);
    let missing = Path::new("/nonexistent/x.pem").to_owned();
    for (config, part) in [
        (
            Config {
                tls: Some(TlsFiles {
                    certificates: missing.clone(),
                    ..identity.files.clone()
                }),
                ..base()
            },
            "/nonexistent/x.pem",
        ),
        (
            Config {
                tls: Some(TlsFiles {
                    key: identity.files.certificates.clone(),
                    ..identity.files.clone()
                }),
                ..base()
            },
            "certificate.pem",
        ),
        (
            Config {
                worker_authorities: Some(identity.files.key.clone()),
                ..base()
            },
            "it holds no certificate",
        ),
    ] {
        let error = Running::try_start(config).await.err().unwrap();
        assert!(error.to_string().contains(part), "{error}");
    }
}
