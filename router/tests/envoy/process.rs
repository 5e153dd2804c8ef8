//! The binary as a picker, and its health service. These need no Envoy.

use kvrouter::config::epp::{EppConfig, GrpcTls};
use kvrouter::epp::protocol::ext_proc::external_processor_client::ExternalProcessorClient;
use kvrouter::epp::protocol::health::HealthCheckRequest;
use kvrouter::epp::protocol::health::health_check_response::ServingStatus;
use kvrouter::epp::protocol::health::health_client::HealthClient;
use tokio::process::Command;
use tonic::transport::Channel;

use crate::fakes::{FakeWorker, soon};
use crate::gateway::{Binary, Picker, config, with_epp};

async fn status(
    health: &mut HealthClient<Channel>,
    service: &str,
) -> Result<ServingStatus, tonic::Code> {
    let asked = HealthCheckRequest {
        service: service.to_owned(),
    };
    let answer = soon(health.check(asked)).await;
    answer
        .map(|answer| answer.get_ref().status())
        .map_err(|status| status.code())
}

#[tokio::test]
async fn health_follows_the_workers_and_the_drain() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    prefill.set_probe_answers(503, 503);
    let mut picker = Picker::start(config(&[&prefill.url], &[&decode.url])).await;
    picker.front.ready(0, 1).await;
    let url = format!("http://{}", picker.address);
    let mut health = HealthClient::connect(url).await.unwrap();
    let ready = [
        "",
        "readiness",
        "envoy.service.ext_proc.v3.ExternalProcessor",
    ];
    for service in ready {
        assert_eq!(
            status(&mut health, service).await,
            Ok(ServingStatus::NotServing)
        );
    }
    assert_eq!(
        status(&mut health, "liveness").await,
        Ok(ServingStatus::Serving)
    );
    assert_eq!(
        status(&mut health, "other").await,
        Err(tonic::Code::NotFound)
    );
    let asked = HealthCheckRequest::default();
    let mut watched = health.watch(asked).await.unwrap().into_inner();
    let next = soon(watched.message()).await.unwrap().unwrap();
    assert_eq!(next.status(), ServingStatus::NotServing);
    prefill.set_probe_answers(200, 200);
    picker.front.ready(1, 1).await;
    let next = soon(watched.message()).await.unwrap().unwrap();
    assert_eq!(next.status(), ServingStatus::Serving);
    for service in ready {
        assert_eq!(
            status(&mut health, service).await,
            Ok(ServingStatus::Serving)
        );
    }
    picker.stop();
    let next = soon(watched.message()).await.unwrap().unwrap();
    assert_eq!(next.status(), ServingStatus::NotServing);
    drop((watched, health));
    picker.ended().await;
}

#[tokio::test]
async fn the_binary_picks_until_sigterm() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let Binary {
        mut child,
        address,
        front: _front,
    } = Binary::start(&prefill, &decode, "0").await;
    let url = format!("http://{address}");
    let mut health = HealthClient::connect(url.clone()).await.unwrap();
    assert_eq!(status(&mut health, "").await, Ok(ServingStatus::Serving));
    // A stream without messages ends when its sender does.
    let mut process = ExternalProcessorClient::connect(url).await.unwrap();
    let none = tokio_stream::empty();
    let mut answers = process.process(none).await.unwrap().into_inner();
    assert!(soon(answers.message()).await.unwrap().is_none());
    drop((health, process, answers));
    let pid = child.id().unwrap().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .await
            .unwrap()
            .success()
    );
    assert!(soon(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn tls_is_served_with_files_and_with_a_made_certificate() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let home = std::env::temp_dir().join(format!("kvrouter-epp-{:032x}", rand::random::<u128>()));
    std::fs::create_dir(&home).unwrap();
    let files = kvrouter::config::TlsFiles {
        certificates: home.join("cert.pem"),
        key: home.join("key.pem"),
    };
    std::fs::write(&files.certificates, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let both = config(&[&prefill.url], &[&decode.url]);
    let picker = Picker::start(with_epp(both.clone(), |epp| {
        epp.tls = GrpcTls::Files(files.clone())
    }))
    .await;
    let port = picker.address.rsplit_once(':').unwrap().1;
    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(made.cert.pem()));
    let channel = Channel::from_shared(format!("https://localhost:{port}"))
        .unwrap()
        .tls_config(tls)
        .unwrap();
    let channel = soon(channel.connect()).await.unwrap();
    let mut health = HealthClient::new(channel);
    assert_eq!(
        status(&mut health, "liveness").await,
        Ok(ServingStatus::Serving)
    );
    // Nobody can check this one; that it answers a handshake at all is what there is to see.
    let picker = Picker::start(with_epp(both.clone(), |epp| epp.tls = GrpcTls::SelfSigned)).await;
    let plain = HealthClient::connect(format!("http://{}", picker.address)).await;
    if let Ok(mut plain) = plain {
        assert!(
            status(&mut plain, "liveness").await.is_err(),
            "it spoke without TLS"
        );
    }
    std::fs::remove_file(&files.key).unwrap();
    let broken = with_epp(both, |epp| epp.tls = GrpcTls::Files(files));
    let error = kvrouter::Router::bind(broken)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("key.pem"), "{error}");
    std::fs::remove_dir_all(&home).unwrap();
    assert_eq!(EppConfig::default().port, 9002);
}
