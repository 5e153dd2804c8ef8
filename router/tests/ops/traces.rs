//! Spans, as a collector sees them with OpenTelemetry's own eyes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use axum::body::Bytes;
use axum::extract::State;
use hyper::{HeaderMap, Method, StatusCode};
use kvrouter::Config;
use kvrouter::config::TraceSettings;
use kvrouter::config::scheduling::Scheduling;
use kvrouter::schedule::Policy;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;
use tokio::sync::mpsc;

use crate::fakes::{
    FakeWorker, Running, Script, chunk, config, event_stream, next_piece, soon, whole, whole_stream,
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT: &str = "b7ad6b7169203331";

struct Collector {
    url: String,
    spans: mpsc::Receiver<(String, Span)>,
    status: Arc<AtomicU16>,
}

type Shared = (mpsc::Sender<(String, Span)>, Arc<AtomicU16>);

async fn collect(
    State((spans, status)): State<Shared>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let status = StatusCode::from_u16(status.load(Ordering::Relaxed)).unwrap();
    if !status.is_success() {
        return status;
    }
    assert_eq!(headers["content-type"], "application/x-protobuf");
    let request = ExportTraceServiceRequest::decode(body).unwrap();
    for resource in request.resource_spans {
        let about = resource.resource.unwrap().attributes;
        let service = about.iter().find(|pair| pair.key == "service.name");
        let Some(Value::StringValue(service)) = service.unwrap().value.clone().unwrap().value
        else {
            panic!("no service name");
        };
        for span in resource
            .scope_spans
            .into_iter()
            .flat_map(|scope| scope.spans)
        {
            spans.try_send((service.clone(), span)).unwrap();
        }
    }
    status
}

impl Collector {
    async fn start() -> Self {
        let (sender, spans) = mpsc::channel(4096);
        let status = Arc::new(AtomicU16::new(200));
        let app = axum::Router::new()
            .route("/v1/traces", axum::routing::post(collect))
            .with_state((sender, Arc::clone(&status)));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, spans, status }
    }

    async fn spans<const N: usize>(&mut self) -> [Span; N] {
        let mut found = Vec::new();
        while found.len() < N {
            let (service, span) = soon(self.spans.recv()).await.unwrap();
            assert_eq!(service, "front door");
            found.push(span);
        }
        // Whoever asks who contains whom.
        found.sort_by_key(|span| span.name.clone());
        found.try_into().unwrap()
    }

    fn config(&self, prefills: &[&str], decodes: &[&str], ratio: f64) -> Config {
        Config {
            traces: Some(TraceSettings {
                endpoint: self.url.parse().unwrap(),
                ratio,
                service: "front door".to_owned(),
            }),
            ..config(prefills, decodes)
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute(span: &Span, key: &str) -> Option<Value> {
    let found = span.attributes.iter().find(|pair| pair.key == key);
    found.and_then(|pair| pair.value.clone()?.value)
}

fn text(span: &Span, key: &str) -> String {
    match attribute(span, key) {
        Some(Value::StringValue(text)) => text,
        other => panic!("{key} is {other:?}"),
    }
}

#[tokio::test]
async fn one_span_per_request_with_both_legs_as_linked_children() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut collector = Collector::start().await;
    let router = Running::start(collector.config(&[&prefill.url], &[&decode.url], 0.0)).await;
    decode.then(whole_stream(&["{\"a\":1}", "[DONE]"]).await);
    let parent = format!("00-{TRACE}-{CLIENT}-01");
    let headers = [
        ("traceparent", parent.as_str()),
        ("tracestate", "x=1"),
        ("x-request-id", "me"),
    ];
    let body = r#"{"messages":[],"stream":true}"#;
    let answer = router
        .send(Method::POST, "/v1/chat/completions", &headers, body)
        .await;
    assert_eq!(whole(answer).await.0, 200);

    let [root, of_decode, of_prefill] = collector.spans().await;
    assert_eq!(root.name, "POST /v1/chat/completions");
    assert_eq!(
        (root.kind(), hex(&root.parent_span_id)),
        (SpanKind::Server, CLIENT.to_owned())
    );
    assert_eq!(
        attribute(&root, "http.response.status_code"),
        Some(Value::IntValue(200))
    );
    assert_eq!(text(&root, "kvrouter.request_id"), "me");
    assert_eq!(text(&root, "kvrouter.outcome"), "complete");
    assert!(attribute(&root, "kvrouter.ttft_seconds").is_some());
    let legs = [
        (&of_prefill, "prefill", &mut prefill, &of_decode),
        (&of_decode, "decode", &mut decode, &of_prefill),
    ];
    for (span, role, worker, partner) in legs {
        let received = worker.request().await;
        assert_eq!((span.name.as_str(), span.kind()), (role, SpanKind::Client));
        assert_eq!(span.parent_span_id, root.span_id);
        assert_eq!(hex(&span.trace_id), TRACE);
        assert_eq!(span.links[0].span_id, partner.span_id);
        assert_eq!(text(span, "kvrouter.worker"), worker.url);
        // The worker's own spans become children of its leg.
        let sent = received.headers["traceparent"].to_str().unwrap();
        assert_eq!(sent, format!("00-{TRACE}-{}-01", hex(&span.span_id)));
        assert_eq!(received.headers["tracestate"], "x=1");
        let room = received.json()["bootstrap_room"].as_i64().unwrap();
        assert_eq!(
            attribute(span, "kvrouter.room"),
            Some(Value::IntValue(room))
        );
        assert_eq!(
            attribute(&root, "kvrouter.room"),
            Some(Value::IntValue(room))
        );
        assert_eq!(text(span, "kvrouter.rid"), received.json()["rid"]);
        assert_eq!(
            attribute(span, "http.response.status_code"),
            Some(Value::IntValue(200))
        );
        assert!(span.start_time_unix_nano >= root.start_time_unix_nano);
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
        assert!(span.status.is_none());
    }
    assert_eq!(of_decode.events[0].name, "first byte");
    // The collector knows of them a moment before the router knows that it does.
    soon(async { while router.metric("kvrouter_spans_exported_total").await < 3 {} }).await;
}

#[tokio::test]
async fn failures_retries_and_cancelled_legs_are_told() {
    let (bad, good) = (FakeWorker::start().await, FakeWorker::start().await);
    let decode = FakeWorker::start().await;
    let mut collector = Collector::start().await;
    let settings = collector.config(&[&bad.url, &good.url], &[&decode.url], 1.0);
    let router = Running::start(Config {
        // It begins at the first.
        scheduling: Scheduling::with(Policy::RoundRobin),
        ..settings
    })
    .await;
    router.ready(2, 1).await;
    bad.then(Script::Reply(500, "{}"));
    // A hanging decode shows that it is cancelled.
    decode.then(Script::Hang);
    let answer = router.post("/generate", r#"{"text":"a"}"#).await;
    assert_eq!(whole(answer).await.0, 200);
    let [root, d1, d2, p1, p2] = collector.spans().await;
    assert_eq!(
        attribute(&root, "kvrouter.attempts"),
        Some(Value::IntValue(2))
    );
    assert!(root.parent_span_id.is_empty());
    let attempts = |a, b| {
        let first = attribute(a, "kvrouter.attempt") == Some(Value::IntValue(1));
        if first { (a, b) } else { (b, a) }
    };
    let (failed, served) = attempts(&p1, &p2);
    let (cancelled, decoded) = attempts(&d1, &d2);
    assert_eq!(failed.status.as_ref().unwrap().code, 2);
    assert_eq!(text(failed, "error.type"), "server_error");
    assert_eq!(
        attribute(failed, "http.response.status_code"),
        Some(Value::IntValue(500))
    );
    assert_eq!(text(cancelled, "kvrouter.cancelled"), "true");
    assert!(served.status.is_none() && decoded.status.is_none());
    assert_eq!(text(served, "kvrouter.worker"), good.url);
    assert_ne!(
        attribute(served, "kvrouter.room"),
        attribute(failed, "kvrouter.room")
    );
}

#[tokio::test]
async fn who_does_not_sample_is_followed() {
    let (mut prefill, mut decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut collector = Collector::start().await;
    let router = Running::start(collector.config(&[&prefill.url], &[&decode.url], 0.0)).await;
    let unsampled = format!("00-{TRACE}-{CLIENT}-00");
    for incoming in [unsampled.as_str(), "nonsense"] {
        let headers = [("traceparent", incoming)];
        let answer = router.send(Method::POST, "/generate", &headers, r#"{"text":"a"}"#);
        assert_eq!(whole(answer.await).await.0, 200);
        for worker in [&mut prefill, &mut decode] {
            let sent = worker.request().await.headers["traceparent"].clone();
            let sent = sent.to_str().unwrap();
            assert!(sent.ends_with("-00") && sent.len() == 55, "{sent}");
            assert_eq!(sent == unsampled, incoming == unsampled);
        }
    }
    let sampled = [("traceparent", &*format!("00-{TRACE}-{CLIENT}-01"))];
    let answer = router.send(Method::POST, "/generate", &sampled, r#"{"text":"a"}"#);
    whole(answer.await).await;
    // These are the first spans at all.
    let spans: [Span; 3] = collector.spans().await;
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE));
}

#[tokio::test]
async fn without_tracing_the_clients_context_passes_untouched() {
    let (mut prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let router = Running::between(&prefill, &decode).await;
    let headers = [("traceparent", "whatever it is")];
    let answer = router.send(Method::POST, "/generate", &headers, r#"{"text":"a"}"#);
    whole(answer.await).await;
    assert_eq!(
        prefill.request().await.headers["traceparent"],
        "whatever it is"
    );
}

#[tokio::test]
async fn a_failing_collector_costs_spans_and_nothing_else() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let mut collector = Collector::start().await;
    collector.status.store(400, Ordering::Relaxed);
    let mut router = Running::start(collector.config(&[&prefill.url], &[&decode.url], 1.0)).await;
    let answer = router.post("/generate", r#"{"text":"a"}"#).await;
    assert_eq!(whole(answer).await.0, 200);
    soon(async { while router.metric("kvrouter_spans_dropped_total").await < 3 {} }).await;
    collector.status.store(200, Ordering::Relaxed);
    // What is under way when the router stops is exported before it is gone.
    let (chunks, script) = event_stream();
    decode.then(script);
    chunks.send(chunk("data: 1\n\n")).await.unwrap();
    let answer = router.post("/generate", r#"{"text":"b"}"#).await;
    let mut body = answer.into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    router.stop();
    drop(chunks);
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    router.ended().await;
    let spans: [Span; 3] = collector.spans().await;
    assert_eq!(spans[0].name, "POST /generate");
}
