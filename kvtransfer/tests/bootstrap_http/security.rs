//! Bearer tokens and mutual TLS.

use kvtransfer::serve::access::{Access, Scope};
use kvtransfer::serve::bootstrap_client::{BlockingBootstrapClient, BootstrapTarget, ClientError};
use kvtransfer::serve::tls::{TlsError, client_config_from_pem, server_config_from_pem};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::*;

#[test]
fn a_token_guards_what_its_scope_says() {
    for (scope, reads_need_it) in [(Scope::Writes, false), (Scope::All, true)] {
        let server = start(|config| config.access = Access::bearer("s3cret", scope).unwrap());
        let mut wire = Wire::connect(server.local_addr());
        assert_eq!(wire.send("GET", "/health", "", None).status, 200);
        let read = wire.send("GET", INFO, "", None);
        assert_eq!(read.status, if reads_need_it { 401 } else { 503 });
        let body = row(1, 0, 4001, "");
        for wrong in [
            "",
            "Authorization: Bearer s3creT\r\n",
            "Authorization: Basic s3cret\r\n",
        ] {
            let mut wire = Wire::connect(server.local_addr());
            let response = wire.send("PUT", "/route", wrong, Some(&body));
            assert_eq!(
                (response.status, response.header("www-authenticate")),
                (401, Some("Bearer"))
            );
        }
        let mut wire = Wire::connect(server.local_addr());
        let right = "Authorization: Bearer s3cret\r\n";
        assert_eq!(wire.send("PUT", "/route", right, Some(&body)).status, 200);
        assert_eq!(wire.send("GET", INFO, right, None).status, 200);
        let mut target = BootstrapTarget::new(server.local_addr().to_string());
        target.token = Some("s3cret".to_owned());
        let mut client = BlockingBootstrapClient::new(target).unwrap();
        client
            .wait(async |client| client.register_dp_rank(7, 1).await)
            .unwrap();
    }
}

struct Issued {
    cert: String,
    key: String,
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn issue(authority: &CertifiedIssuer<'_, KeyPair>) -> Issued {
    let key = KeyPair::generate().unwrap();
    let params =
        CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let cert = params.signed_by(&key, authority).unwrap();
    Issued {
        cert: cert.pem(),
        key: key.serialize_pem(),
    }
}

fn health(addr: SocketAddr, ca: &str, identity: Option<&Issued>) -> Result<(), ClientError> {
    let identity = identity.map(|issued| (issued.cert.as_bytes(), issued.key.as_bytes()));
    let mut target = BootstrapTarget::new(format!("127.0.0.1:{}", addr.port()));
    target.tls = Some(client_config_from_pem(ca.as_bytes(), identity).unwrap());
    BlockingBootstrapClient::new(target)?.wait(async |client| client.health().await)
}

#[test]
fn tls_serves_trusting_clients_and_mtls_known_ones_only() {
    let (ours, theirs) = (authority(), authority());
    let (server_side, known, stranger) = (issue(&ours), issue(&ours), issue(&theirs));
    let (cert, key) = (server_side.cert.as_bytes(), server_side.key.as_bytes());

    let plain_tls = server_config_from_pem(cert, key, None).unwrap();
    let server = start(|config| config.tls = Some(plain_tls));
    health(server.local_addr(), &ours.pem(), None).unwrap();
    assert!(
        health(server.local_addr(), &theirs.pem(), None).is_err(),
        "an unknown server is not trusted"
    );
    drop(server);

    let mutual = server_config_from_pem(cert, key, Some(ours.pem().as_bytes())).unwrap();
    let server = start(|config| config.tls = Some(mutual));
    health(server.local_addr(), &ours.pem(), Some(&known)).unwrap();
    assert!(
        health(server.local_addr(), &ours.pem(), None).is_err(),
        "no certificate"
    );
    assert!(
        health(server.local_addr(), &ours.pem(), Some(&stranger)).is_err(),
        "a stranger's certificate"
    );
    // Plain HTTP to a TLS port gets nothing, and the server lives on.
    let mut plain = Wire::connect(server.local_addr());
    plain
        .0
        .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    assert!(plain.is_closed());
    health(server.local_addr(), &ours.pem(), Some(&known)).unwrap();
}

#[test]
fn unusable_pem_is_named() {
    let issued = issue(&authority());
    let (cert, key) = (issued.cert.as_bytes(), issued.key.as_bytes());
    let part = |result: Result<_, TlsError>| {
        result
            .map(|_: std::sync::Arc<_>| ())
            .unwrap_err()
            .to_string()
    };
    assert!(part(server_config_from_pem(b"", key, None)).contains("certificate is no PEM"));
    assert!(part(server_config_from_pem(cert, b"junk", None)).contains("private key is no PEM"));
    assert!(part(server_config_from_pem(cert, key, Some(b"x"))).contains("client CA is no PEM"));
    let other = issue(&authority());
    assert!(
        part(server_config_from_pem(cert, other.key.as_bytes(), None))
            .contains("identity is unusable")
    );
}
