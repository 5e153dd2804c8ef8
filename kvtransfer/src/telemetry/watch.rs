//! Follows one engine's telemetry stream: connects, applies, notices silence, connects again.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::message::MESSAGE_BYTES_MAX;
use super::replica::{BrokenStream, Replica};
use super::snapshot::Snapshot;
use super::v1::WatchRequest;
use super::v1::telemetry_client::TelemetryClient;
use crate::token::BearerToken;

/// Which engine to follow, and how patiently. Start from [`WatchConfig::new`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WatchConfig {
    /// `http://host:port`, or `https://host:port` with [`WatchConfig::tls`].
    pub endpoint: String,
    /// Presented to the engine. The default is none.
    pub token: Option<BearerToken>,
    /// The default is none: plain text.
    pub tls: Option<WatchTls>,
    /// Time to connect and to get the first message. The default is 2 s.
    pub connect_max: Duration,
    /// A stream that is silent for this long is dead. The default is 3 s, three keep-alives.
    pub silence_max: Duration,
    /// Pause before the second attempt; it doubles with each failure. The default is 50 ms.
    pub backoff_min: Duration,
    /// Longest pause between attempts. The default is 5 s.
    pub backoff_max: Duration,
}

/// How to trust the engine, and how to be trusted by it.
#[derive(Clone)]
#[non_exhaustive]
pub struct WatchTls {
    /// The authority that signed the engine's certificate, PEM.
    pub ca_pem: Vec<u8>,
    /// The name the certificate must carry; `None`: the endpoint's host.
    pub server_name: Option<String>,
    /// Our certificate chain and key, PEM, for engines that ask for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// What is known of the engine.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Sighting {
    /// The latest picture, of this connection or, while there is none, of the last; `None` before the first.
    pub picture: Option<Arc<Snapshot>>,
    /// When the last message came (keep-alives count).
    pub heard: Option<Instant>,
    /// Whether the stream stands.
    pub live: bool,
    /// How many times a stream delivered its first message.
    pub connects: u64,
    /// How many times the picture came from another start of the engine than the one before.
    pub restarts: u64,
    /// Why the last attempt or stream ended.
    pub lost: Option<Arc<WatchError>>,
}

impl Sighting {
    /// How old the picture is at `now`; `None` while there is none.
    #[must_use]
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.heard.map(|heard| now.saturating_duration_since(heard))
    }
}

/// Why an attempt or a stream ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The endpoint or its TLS settings are no good; returned by [`Watcher::spawn`], never later.
    #[error("the endpoint cannot be used")]
    Endpoint(#[source] tonic::transport::Error),
    /// No connection.
    #[error("could not connect")]
    Connect(#[source] tonic::transport::Error),
    /// The engine refused, or the connection broke.
    #[error("the stream failed")]
    Stream(#[from] Box<tonic::Status>),
    /// The engine ended the stream.
    #[error("the engine ended the stream")]
    Ended,
    /// Nothing came for this long.
    #[error("nothing came for {0:?}")]
    Silent(Duration),
    /// The engine broke the protocol.
    #[error(transparent)]
    Broken(#[from] BrokenStream),
}

/// Follows one engine until dropped.
#[derive(Debug)]
pub struct Watcher {
    sighting: watch::Receiver<Sighting>,
    task: JoinHandle<()>,
}

impl Watcher {
    /// Starts to follow, on the current tokio runtime.
    ///
    /// # Errors
    /// [`WatchError::Endpoint`] when the endpoint or the TLS settings cannot be used at all.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn spawn(config: WatchConfig) -> Result<Self, WatchError> {
        let endpoint = endpoint(&config).map_err(WatchError::Endpoint)?;
        let (publish, sighting) = watch::channel(Sighting::default());
        let task = tokio::spawn(follow(config, endpoint, publish));
        Ok(Self { sighting, task })
    }

    /// What is known now.
    #[must_use]
    pub fn latest(&self) -> Sighting {
        self.sighting.borrow().clone()
    }

    /// A view that can be awaited (`changed`) and read, by any number of readers.
    #[must_use]
    pub fn view(&self) -> watch::Receiver<Sighting> {
        self.sighting.clone()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl WatchConfig {
    /// Follows the engine at `endpoint`, with the defaults.
    #[must_use]
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            token: None,
            tls: None,
            connect_max: Duration::from_secs(2),
            silence_max: Duration::from_secs(3),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
        }
    }
}

impl WatchTls {
    /// Trusts certificates that `ca_pem` signed.
    #[must_use]
    pub fn new(ca_pem: impl Into<Vec<u8>>) -> Self {
        Self {
            ca_pem: ca_pem.into(),
            server_name: None,
            identity: None,
        }
    }
}

impl std::fmt::Debug for WatchTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys stay out of logs.
        f.debug_struct("WatchTls")
            .field("server_name", &self.server_name)
            .finish_non_exhaustive()
    }
}

fn endpoint(config: &WatchConfig) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(config.endpoint.clone())?
        .connect_timeout(config.connect_max)
        .tcp_nodelay(true);
    let Some(tls) = &config.tls else {
        return Ok(endpoint);
    };
    let mut settings = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.ca_pem));
    if let Some(name) = &tls.server_name {
        settings = settings.domain_name(name);
    }
    if let Some((chain, key)) = &tls.identity {
        settings = settings.identity(Identity::from_pem(chain, key));
    }
    endpoint.tls_config(settings)
}

/// Attempt after attempt, until the watcher is dropped.
async fn follow(config: WatchConfig, endpoint: Endpoint, publish: watch::Sender<Sighting>) {
    let mut backoff = config.backoff_min;
    loop {
        let started = Instant::now();
        let lost = attempt(&config, &endpoint, &publish).await;
        tracing::debug!(
            endpoint = config.endpoint,
            error = &lost as &dyn std::error::Error,
            "telemetry lost"
        );
        publish.send_modify(|sighting| {
            sighting.live = false;
            sighting.lost = Some(Arc::new(lost));
        });
        // A stream that stood for a while was a good one; one that breaks at once must not be retried in a rush.
        if started.elapsed() > config.backoff_max.max(config.silence_max) {
            backoff = config.backoff_min;
        }
        sleep(jittered(backoff)).await;
        backoff = (backoff * 2).min(config.backoff_max);
    }
}

/// One connection, until it ends.
async fn attempt(
    config: &WatchConfig,
    endpoint: &Endpoint,
    publish: &watch::Sender<Sighting>,
) -> WatchError {
    let opening = timeout(config.connect_max, open(config, endpoint)).await;
    let mut messages = match opening {
        Ok(Ok(messages)) => messages,
        Ok(Err(error)) => return error,
        Err(_elapsed) => return WatchError::Silent(config.connect_max),
    };
    let mut replica = Replica::default();
    let mut patience = config.connect_max;
    let mut first = true;
    loop {
        let message = match timeout(patience, messages.message()).await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return WatchError::Ended,
            Ok(Err(status)) => return WatchError::Stream(Box::new(status)),
            Err(_elapsed) => return WatchError::Silent(patience),
        };
        let heard = Instant::now();
        let mut broken = None;
        // Applied inside, so that the channel's own copy does not force the replica to copy the picture.
        publish.send_modify(|sighting| {
            let epoch = sighting.picture.as_ref().map(|picture| picture.epoch);
            if !first {
                sighting.picture = None;
            }
            match replica.accept(message) {
                Ok(picture) => {
                    sighting.restarts +=
                        u64::from(epoch.is_some_and(|epoch| epoch != picture.epoch));
                    sighting.connects += u64::from(first);
                    sighting.picture = Some(picture);
                    sighting.heard = Some(heard);
                    sighting.live = true;
                }
                Err(error) => broken = Some(error),
            }
            if sighting.picture.is_none() {
                sighting.picture = replica.picture();
            }
        });
        if let Some(error) = broken {
            return error.into();
        }
        first = false;
        patience = config.silence_max;
    }
}

async fn open(
    config: &WatchConfig,
    endpoint: &Endpoint,
) -> Result<tonic::Streaming<super::v1::WatchResponse>, WatchError> {
    let channel: Channel = endpoint.connect().await.map_err(WatchError::Connect)?;
    let mut client = TelemetryClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut request = tonic::Request::new(WatchRequest {});
    if let Some(token) = &config.token {
        let value = token.authorization().parse();
        let value = value.expect("invariant: a token is visible ASCII");
        request.metadata_mut().insert("authorization", value);
    }
    let response = client.watch(request).await.map_err(Box::new)?;
    Ok(response.into_inner())
}

/// Half to all of the pause, so that the watchers of a restarted engine do not come back as one.
fn jittered(pause: Duration) -> Duration {
    let part = getrandom::u32().unwrap_or(u32::MAX);
    pause.mul_f64(0.5 + 0.5 * f64::from(part) / f64::from(u32::MAX))
}
