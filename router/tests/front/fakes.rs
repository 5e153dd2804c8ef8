//! Workers that do what a test tells them, and a client that looks closely.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::serve::ListenerExt;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kvrouter::config::scheduling::Scheduling;
use kvrouter::config::{Config, PrefillTarget};
use kvrouter::schedule::Policy;
use kvrouter::{Router, RunError};
use serde_json::Value as Json;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Far beyond anything that should happen; reaching it is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for an event of a test, but not for ever.
pub async fn soon<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event)
        .await
        .expect("the event never came")
}

/// What a worker does with its next generation request.
pub enum Script {
    /// Answers with this status and JSON.
    Reply(u16, &'static str),
    /// Answers 200 with this JSON.
    Say(String),
    /// Never answers.
    Hang,
    /// Answers 200 with this content type and the chunks the test sends; an `Err` breaks the connection.
    Stream(&'static str, mpsc::Receiver<Result<Bytes, std::io::Error>>),
}

/// A chunk sender and the script that forwards it as an event stream.
pub fn event_stream() -> (mpsc::Sender<Result<Bytes, std::io::Error>>, Script) {
    let (sender, receiver) = mpsc::channel(16);
    (sender, Script::Stream("text/event-stream", receiver))
}

pub fn chunk(text: &'static str) -> Result<Bytes, std::io::Error> {
    Ok(Bytes::from_static(text.as_bytes()))
}

pub fn breakage() -> Result<Bytes, std::io::Error> {
    Err(std::io::Error::other("the test broke it"))
}

pub struct Received {
    pub target: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Received {
    pub fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap()
    }
}

struct Inner {
    scripts: Mutex<VecDeque<Script>>,
    requests: mpsc::Sender<Received>,
    aborts: mpsc::Sender<Json>,
    drops: mpsc::Sender<()>,
    probes: mpsc::Sender<(String, HeaderMap)>,
    connections: AtomicUsize,
    ready_status: AtomicU16,
    health_status: AtomicU16,
    default_status: AtomicU16,
    get_status: AtomicU16,
    is_probe_silent: AtomicBool,
    info: Mutex<Option<String>>,
    loads: Mutex<Option<String>>,
    models: Mutex<Option<String>>,
}

/// A worker on a port of its own.
pub struct FakeWorker {
    pub url: String,
    inner: Arc<Inner>,
    requests: mpsc::Receiver<Received>,
    aborts: mpsc::Receiver<Json>,
    drops: mpsc::Receiver<()>,
    probes: mpsc::Receiver<(String, HeaderMap)>,
}

/// Reports that an exchange was dropped before the worker had finished it.
struct DropReport {
    drops: mpsc::Sender<()>,
    finished: AtomicBool,
}

impl Drop for DropReport {
    fn drop(&mut self) {
        if !self.finished.load(Ordering::Relaxed) {
            let _ = self.drops.try_send(());
        }
    }
}

impl FakeWorker {
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    pub async fn start_at(address: &str) -> Self {
        let (requests_in, requests) = mpsc::channel(512);
        let (aborts_in, aborts) = mpsc::channel(4096);
        let (drops_in, drops) = mpsc::channel(4096);
        let (probes_in, probes) = mpsc::channel(4096);
        let inner = Arc::new(Inner {
            scripts: Mutex::default(),
            requests: requests_in,
            aborts: aborts_in,
            drops: drops_in,
            probes: probes_in,
            connections: AtomicUsize::new(0),
            ready_status: AtomicU16::new(200),
            health_status: AtomicU16::new(200),
            default_status: AtomicU16::new(200),
            get_status: AtomicU16::new(200),
            is_probe_silent: AtomicBool::new(false),
            info: Mutex::default(),
            loads: Mutex::default(),
            models: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&inner));
        // Without it the fake's own small writes would wait for the router's delayed acknowledgements.
        let counted = Arc::clone(&inner);
        let listener = listener.tap_io(move |stream| {
            counted.connections.fetch_add(1, Ordering::Relaxed);
            stream.set_nodelay(true).unwrap();
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self {
            url,
            inner,
            requests,
            aborts,
            drops,
            probes,
        }
    }

    /// Sets what the next request meets; without a script it gets `{}`.
    pub fn then(&self, script: Script) -> &Self {
        self.inner.scripts.lock().unwrap().push_back(script);
        self
    }

    pub fn set_probe_answers(&self, ready: u16, health: u16) {
        self.inner.ready_status.store(ready, Ordering::Relaxed);
        self.inner.health_status.store(health, Ordering::Relaxed);
    }

    /// The status of all answers without a script.
    pub fn set_default(&self, status: u16) {
        self.inner.default_status.store(status, Ordering::Relaxed);
    }

    /// The status of all answers to questions.
    pub fn set_get_status(&self, status: u16) {
        self.inner.get_status.store(status, Ordering::Relaxed);
    }

    /// Probes are taken and never answered.
    pub fn ignore_probes(&self) {
        self.inner.is_probe_silent.store(true, Ordering::Relaxed);
    }

    /// What `/server_info` says.
    pub fn set_info(&self, info: &Json) {
        *self.inner.info.lock().unwrap() = Some(info.to_string());
    }

    /// What `/v1/loads` says.
    pub fn set_loads(&self, loads: &Json) {
        *self.inner.loads.lock().unwrap() = Some(loads.to_string());
    }

    /// What `/v1/models` says.
    pub fn set_models(&self, models: &Json) {
        *self.inner.models.lock().unwrap() = Some(models.to_string());
    }

    /// The next request, if one has come.
    pub fn request_now(&mut self) -> Option<Received> {
        self.requests.try_recv().ok()
    }

    pub async fn request(&mut self) -> Received {
        soon(self.requests.recv()).await.unwrap()
    }

    pub async fn abort(&mut self) -> Json {
        soon(self.aborts.recv()).await.unwrap()
    }

    pub async fn dropped(&mut self) {
        soon(self.drops.recv()).await.unwrap();
    }

    pub async fn probe(&mut self) -> (String, HeaderMap) {
        soon(self.probes.recv()).await.unwrap()
    }

    /// The next probe, if one has come.
    pub fn probe_now(&mut self) -> Option<(String, HeaderMap)> {
        self.probes.try_recv().ok()
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.inner.connections.load(Ordering::Relaxed)
    }

    pub fn was_left_alone(&mut self) -> bool {
        self.aborts.try_recv().is_err() && self.drops.try_recv().is_err()
    }
}

async fn answer(State(worker): State<Arc<Inner>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let target = parts.uri.path_and_query().unwrap().to_string();
    let probe = match parts.uri.path() {
        "/ready" => Some(&worker.ready_status),
        "/health" => Some(&worker.health_status),
        _ => None,
    };
    if let Some(status) = probe {
        let _ = worker.probes.try_send((target, parts.headers));
        if worker.is_probe_silent.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        return StatusCode::from_u16(status.load(Ordering::Relaxed))
            .unwrap()
            .into_response();
    }
    let body = to_bytes(body, usize::MAX).await.unwrap();
    if parts.uri.path() == "/abort_request" {
        worker
            .aborts
            .try_send(serde_json::from_slice(&body).unwrap())
            .unwrap();
        return StatusCode::OK.into_response();
    }
    let page = match parts.uri.path() {
        "/server_info" => worker.info.lock().unwrap().clone(),
        "/v1/loads" => worker.loads.lock().unwrap().clone(),
        "/v1/models" => worker.models.lock().unwrap().clone(),
        _ => None,
    };
    if let Some(page) = page {
        return page.into_response();
    }
    if parts.method == Method::GET {
        let status = StatusCode::from_u16(worker.get_status.load(Ordering::Relaxed)).unwrap();
        return (status, format!("worker answers {target}")).into_response();
    }
    let script = worker.scripts.lock().unwrap().pop_front();
    let report = DropReport {
        drops: worker.drops.clone(),
        finished: AtomicBool::new(false),
    };
    // A test that sends more than the queue holds is not interested in the rest.
    let _ = worker.requests.try_send(Received {
        target,
        headers: parts.headers,
        body,
    });
    let default = || Script::Reply(worker.default_status.load(Ordering::Relaxed), "{}");
    perform(script.unwrap_or_else(default), report).await
}

async fn perform(script: Script, report: DropReport) -> Response {
    match script {
        Script::Say(json) => {
            report.finished.store(true, Ordering::Relaxed);
            ([("content-type", "application/json")], json).into_response()
        }
        Script::Reply(status, json) => {
            report.finished.store(true, Ordering::Relaxed);
            let headers = [("content-type", "application/json"), ("x-worker", "yes")];
            (StatusCode::from_u16(status).unwrap(), headers, json).into_response()
        }
        Script::Hang => {
            std::future::pending::<()>().await;
            drop(report);
            unreachable!()
        }
        Script::Stream(kind, chunks) => {
            let chunks = stream::unfold((chunks, report), |(mut chunks, report)| async {
                let next = chunks.recv().await;
                report
                    .finished
                    .store(!matches!(next, Some(Ok(_))), Ordering::Relaxed);
                next.map(|chunk| (chunk, (chunks, report)))
            });
            ([("content-type", kind)], Body::from_stream(chunks)).into_response()
        }
    }
}

/// A router in front of fake workers.
pub struct Running {
    pub url: String,
    client: Client<HttpConnector, Full<Bytes>>,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

pub fn config(prefills: &[&str], decodes: &[&str]) -> Config {
    let target = |url: &&str| PrefillTarget {
        url: url.parse().unwrap(),
        bootstrap_port: Some(8998),
    };
    let config = Config::new(
        prefills.iter().map(target).collect(),
        decodes.iter().map(|url| url.parse().unwrap()).collect(),
    );
    Config {
        host: "127.0.0.1".to_owned(),
        port: 0,
        probe_interval: Duration::from_millis(20),
        // Tests of the front know whose turn it is.
        scheduling: Scheduling::with(Policy::RoundRobin),
        ..config
    }
}

impl Running {
    pub async fn start(config: Config) -> Self {
        Self::try_start(config).await.unwrap()
    }

    pub async fn try_start(config: Config) -> Result<Self, RunError> {
        Ok(Self::serve(Router::bind(config).await?))
    }

    /// A router whose workers the test publishes.
    pub async fn start_with(config: Config, fleet: kvrouter::discover::FleetWatch) -> Self {
        Self::serve(Router::bind_with(config, fleet).await.unwrap())
    }

    /// A router that was bound.
    pub fn serve(router: Router) -> Self {
        let url = format!("http://{}", router.local_addr());
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(router.serve(async {
            let _ = stopped.await;
        }));
        let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
        Self {
            url,
            client,
            stop: Some(stop),
            served,
        }
    }

    /// A client of a router that runs elsewhere.
    pub fn elsewhere(url: &str) -> Self {
        let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
        Self {
            url: url.to_owned(),
            client,
            stop: None,
            served: tokio::spawn(async {}),
        }
    }

    pub async fn between(prefill: &FakeWorker, decode: &FakeWorker) -> Self {
        Self::start(config(&[&prefill.url], &[&decode.url])).await
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> hyper::Response<Incoming> {
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        soon(self.client.request(request)).await.unwrap()
    }

    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> hyper::Response<Incoming> {
        self.send(Method::POST, path, &[], body).await
    }

    pub async fn read(&self, path: &str) -> (u16, String) {
        whole(self.send(Method::GET, path, &[], "").await).await
    }

    /// The value of one line of `/metrics`, or 0.
    pub async fn metric(&self, line: &str) -> u64 {
        let (_, text) = self.read("/metrics").await;
        let found = text
            .lines()
            .find_map(|have| have.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or(0)
    }

    /// Waits until so many workers of each role are ready.
    pub async fn ready(&self, prefills: usize, decodes: usize) {
        let wanted = [
            format!("\"ready_prefill_workers\":{prefills}"),
            format!("\"ready_decode_workers\":{decodes}"),
        ];
        soon(async {
            loop {
                let (_, state) = self.read("/ready").await;
                if wanted.iter().all(|part| state.contains(part)) {
                    return;
                }
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// A gauge or counter of one worker.
    pub async fn of_worker(&self, name: &str, worker: &FakeWorker) -> u64 {
        let (_, text) = self.read("/metrics").await;
        let part = format!("worker=\"{}\"", worker.url);
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")) && line.contains(&part));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub async fn failures(&self, worker: &FakeWorker) -> u64 {
        let (_, text) = self.read("/metrics").await;
        let part = format!("worker=\"{}\"", worker.url);
        let lines = text
            .lines()
            .filter(|line| line.starts_with("kvrouter_leg_failures_total") && line.contains(&part));
        lines
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    /// Ends it without a word.
    pub fn kill(self) {
        self.served.abort();
    }

    /// Begins the drain.
    pub fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    pub async fn ended(self) {
        soon(self.served).await.unwrap();
    }
}

pub async fn whole(response: hyper::Response<Incoming>) -> (u16, String) {
    let status = response.status().as_u16();
    let body = soon(response.into_body().collect())
        .await
        .unwrap()
        .to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// An event stream that is complete at once.
pub async fn whole_stream(events: &[&str]) -> Script {
    let (sender, script) = event_stream();
    for event in events {
        let event = Bytes::from(format!("data: {event}\n\n"));
        sender.send(Ok(event)).await.unwrap();
    }
    script
}

/// The data of all events of a stream.
pub fn events_of(text: &str) -> Vec<Json> {
    let events = text.split("\n\n").filter(|event| !event.is_empty());
    events
        .map(|event| {
            let data = event.lines().find_map(|line| line.strip_prefix("data: "));
            serde_json::from_str(data.unwrap()).unwrap_or(Json::Null)
        })
        .collect()
}

/// The next piece of a body; `None` at its clean end, `Err` when it was cut.
pub async fn next_piece(body: &mut Incoming) -> Result<Option<String>, hyper::Error> {
    match soon(body.frame()).await {
        None => Ok(None),
        Some(Err(error)) => Err(error),
        Some(Ok(frame)) => Ok(Some(
            String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap(),
        )),
    }
}
