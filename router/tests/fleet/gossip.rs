//! Two routers decide like one, and a lost one leaves nothing behind.

use kvrouter::config::TlsFiles;
use kvrouter::config::gossip::{Gossip, MutualTls};
use kvrouter::config::scheduling::Scheduling;
use kvrouter::schedule::Policy;
use kvrouter::{Config, Router};
use kvtransfer::token::BearerToken;
use serde_json::Value as Json;

use crate::fakes::{FakeWorker, Running, Script, config, event_stream, soon, whole};

async fn siblings(router: &Running, count: u64) {
    soon(async { while router.metric("kvrouter_sibling_bookings").await != count {} }).await;
}

#[tokio::test]
async fn bookings_of_one_router_move_the_choice_of_the_other() {
    let (prefill, other, mut decode) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let token = Some(BearerToken::new("between-us").unwrap());
    let settings = |gossip| Config {
        gossip,
        scheduling: Scheduling::with(Policy::LeastTokens),
        ..config(&[&prefill.url, &other.url], &[&decode.url])
    };
    let teller = Router::bind(settings(Gossip {
        port: Some(0),
        token: token.clone(),
        ..Gossip::default()
    }))
    .await
    .unwrap();
    let address = teller.gossip_addr().unwrap().to_string();
    let teller = Running::serve(teller);
    let listener = Running::start(settings(Gossip {
        peers: vec![address.clone()],
        token,
        ..Gossip::default()
    }))
    .await;
    // Who does not know the token is told nothing.
    let stranger = Running::start(settings(Gossip {
        peers: vec![address],
        ..Gossip::default()
    }))
    .await;
    for router in [&teller, &listener, &stranger] {
        router.ready(2, 1).await;
    }
    // Prefill never ends, so its prompt keeps being counted.
    for worker in [&prefill, &other] {
        worker.then(Script::Hang);
    }
    let (chunks, script) = event_stream();
    decode.then(script);
    let body = format!(r#"{{"text":"{}","stream":true}}"#, "a".repeat(8000));
    let busy = async {
        let waiting = teller.post("/generate", body);
        tokio::select! {
            _ = waiting => panic!("nobody answered"),
            () = told(&listener, &stranger, &teller) => {}
        }
    };
    busy.await;
    // Its client has gone, and so has the booking everywhere.
    siblings(&listener, 0).await;
    soon(chunks.closed()).await;
    decode.request().await;
}

/// The listener knows of the teller's booking and avoids its prefill.
async fn told(listener: &Running, stranger: &Running, teller: &Running) {
    siblings(listener, 1).await;
    let made = decisions(teller, 1).await;
    let busy = made[0]["prefill"].clone();
    for _ in 0..6 {
        let (status, _) = whole(listener.post("/generate", r#"{"text":"b"}"#).await).await;
        assert_eq!(status, 200);
    }
    let made = decisions(listener, 6).await;
    assert!(made.iter().all(|one| one["prefill"] != busy), "{made:?}");
    assert_eq!(stranger.metric("kvrouter_sibling_bookings").await, 0);
}

async fn decisions(router: &Running, count: usize) -> Vec<Json> {
    let (_, text) = router
        .read(&format!("/debug/decisions?limit={count}"))
        .await;
    let page: Json = serde_json::from_str(&text).unwrap();
    page["decisions"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_lost_replica_leaves_nothing_behind() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let settings = |gossip| Config {
        gossip,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let teller = Router::bind(settings(Gossip {
        port: Some(0),
        ..Gossip::default()
    }))
    .await
    .unwrap();
    let address = teller.gossip_addr().unwrap().to_string();
    let teller = Running::serve(teller);
    let listener = Running::start(settings(Gossip {
        // Found twice, followed once.
        dns: Some(address.replace("127.0.0.1", "localhost")),
        peers: vec![address],
        ..Gossip::default()
    }))
    .await;
    teller.ready(1, 1).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let (chunks, script) = event_stream();
        decode.then(script);
        chunks
            .send(crate::fakes::chunk("data: 1\n\n"))
            .await
            .unwrap();
        let body = teller.post("/generate", r#"{"text":"a","stream":true}"#);
        streams.push((chunks, body.await.into_body()));
    }
    siblings(&listener, 3).await;
    teller.kill();
    siblings(&listener, 0).await;
    drop(streams);
}

/// An authority that exists in this test alone, and files of what it signs.
struct Authority {
    folder: std::path::PathBuf,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        let folder = std::env::temp_dir().join(format!("kvrouter-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.join("authority.pem"), certificate.pem()).unwrap();
        Self {
            folder,
            issuer: rcgen::Issuer::new(params, key),
        }
    }

    /// A replica that `name` leads to.
    fn replica(&self, name: &str) -> MutualTls {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let file = |kind: &str| self.folder.join(format!("{name}-{kind}.pem"));
        let files = TlsFiles {
            certificates: file("certificate"),
            key: file("key"),
        };
        std::fs::write(&files.certificates, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        MutualTls {
            files,
            authorities: self.folder.join("authority.pem"),
        }
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test]
async fn replicas_know_each_other_by_their_certificates() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let settings = |gossip| Config {
        gossip,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let teller = Router::bind(settings(Gossip {
        port: Some(0),
        tls: Some(ours.replica("127.0.0.1")),
        ..Gossip::default()
    }));
    let teller = teller.await.unwrap();
    let address = teller.gossip_addr().unwrap().to_string();
    let teller = Running::serve(teller);
    let follow = |tls| {
        Running::start(settings(Gossip {
            peers: vec![address.clone()],
            tls,
            ..Gossip::default()
        }))
    };
    let known = follow(Some(ours.replica("elsewhere"))).await;
    // One whom others vouch for, one that trusts others, and one that knows of no certificates.
    let foreign = MutualTls {
        files: theirs.replica("127.0.0.1").files,
        ..ours.replica("127.0.0.1")
    };
    let doubting = MutualTls {
        authorities: theirs.replica("127.0.0.1").authorities,
        ..ours.replica("127.0.0.1")
    };
    let strangers = [
        follow(Some(foreign)).await,
        follow(Some(doubting)).await,
        follow(None).await,
    ];
    for router in strangers.iter().chain([&teller, &known]) {
        router.ready(1, 1).await;
    }
    let (chunks, script) = event_stream();
    decode.then(script);
    prefill.then(Script::Hang);
    let body = r#"{"text":"a","stream":true}"#;
    tokio::select! {
        _ = teller.post("/generate", body) => panic!("nobody answered"),
        () = siblings(&known, 1) => {}
    }
    siblings(&known, 0).await;
    soon(chunks.closed()).await;
    for stranger in &strangers {
        assert_eq!(stranger.metric("kvrouter_sibling_bookings").await, 0);
    }
}

#[tokio::test]
async fn a_certificate_for_another_name_is_not_trusted() {
    let ours = Authority::new("misnamed");
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let settings = |gossip| Config {
        gossip,
        ..config(&[&prefill.url], &[&decode.url])
    };
    let misnamed = Router::bind(settings(Gossip {
        port: Some(0),
        tls: Some(ours.replica("another.name")),
        ..Gossip::default()
    }));
    let misnamed = misnamed.await.unwrap();
    let peers = vec![misnamed.gossip_addr().unwrap().to_string()];
    let misnamed = Running::serve(misnamed);
    let careful = Running::start(settings(Gossip {
        peers,
        tls: Some(ours.replica("127.0.0.1")),
        ..Gossip::default()
    }))
    .await;
    for router in [&misnamed, &careful] {
        router.ready(1, 1).await;
    }
    prefill.then(Script::Hang);
    let (_chunks, script) = event_stream();
    decode.then(script);
    tokio::select! {
        _ = misnamed.post("/generate", r#"{"text":"a","stream":true}"#) => panic!("nobody answered"),
        // Time for several attempts to connect.
        () = tokio::time::sleep(std::time::Duration::from_millis(700)) => {}
    }
    assert_eq!(careful.metric("kvrouter_sibling_bookings").await, 0);
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_named() {
    let authority = Authority::new("unusable");
    let mut tls = authority.replica("127.0.0.1");
    tls.authorities = tls.files.key.clone();
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let refused = Router::bind(Config {
        gossip: Gossip {
            port: Some(0),
            tls: Some(tls.clone()),
            ..Gossip::default()
        },
        ..config(&[&prefill.url], &[&decode.url])
    });
    let error = refused.await.unwrap_err().to_string();
    assert!(error.contains(tls.authorities.to_str().unwrap()), "{error}");
}
