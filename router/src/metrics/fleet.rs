//! Series of workers and of what lies between them.
#![forbid(unsafe_code)]

use super::pairs::PAIRS_MAX;
use super::text::{Kind, Labels, Text};
use crate::overview::{Overview, WorkerView};
use crate::pool::{Blame, Worker, Workers};

/// Writes all of them.
pub(super) fn render(text: &mut Text, workers: &Workers, overview: &Overview) {
    render_workers(text, workers);
    render_views(text, overview);
    render_matrix(text, overview);
    render_gauges(text, overview);
}

fn worker_labels(leg: &str, url: &str) -> Labels {
    Labels::default().with("leg", leg).with("worker", url)
}

fn render_workers(text: &mut Text, workers: &Workers) {
    let labelled: Vec<(Labels, &Worker)> = workers
        .workers()
        .map(|worker| {
            let url = worker.url().to_string();
            (worker_labels(worker.role().name(), &url), &**worker)
        })
        .collect();
    text.family(
        "kvrouter_leg_failures_total",
        Kind::Counter,
        "Failures by the leg and worker to blame.",
    );
    for (labels, worker) in &labelled {
        for (blame, reason) in Blame::ALL {
            text.sample(
                &labels.clone().with("reason", reason),
                worker.failures(blame),
            );
        }
    }
    type Series = (&'static str, Kind, &'static str, fn(&Worker) -> u64);
    let series: [Series; 5] = [
        (
            "kvrouter_leg_successes_total",
            Kind::Counter,
            "Complete answers.",
            Worker::served,
        ),
        (
            "kvrouter_worker_ready",
            Kind::Gauge,
            "1 when the worker answered its last probes.",
            |worker| u64::from(worker.is_ready()),
        ),
        (
            "kvrouter_worker_draining",
            Kind::Gauge,
            "1 when the worker is going away and gets nothing new.",
            |worker| u64::from(worker.is_draining()),
        ),
        (
            "kvrouter_breaker_state",
            Kind::Gauge,
            "0 closed, 1 open, 2 waiting for a trial.",
            |worker| worker.breaker_state() as u64,
        ),
        (
            "kvrouter_worker_requests",
            Kind::Gauge,
            "Requests that the worker holds.",
            |worker| worker.live() as u64,
        ),
    ];
    for (name, kind, help, value) in series {
        text.family(name, kind, help);
        for (labels, worker) in &labelled {
            text.sample(labels, value(worker));
        }
    }
}

/// What the scheduler knows of each worker.
fn render_views(text: &mut Text, overview: &Overview) {
    let views = overview.prefills.iter().map(|view| ("prefill", view));
    let views = views.chain(overview.decodes.iter().map(|view| ("decode", view)));
    let views: Vec<(&str, &WorkerView)> = views.collect();
    type Series = (
        &'static str,
        &'static str,
        &'static str,
        fn(&WorkerView) -> Option<f64>,
    );
    #[expect(clippy::cast_precision_loss, reason = "gauges are doubles anyway")]
    let series: [Series; 7] = [
        (
            "prefill decode",
            "kvrouter_worker_bookings",
            "Requests booked: of a prefill until its KV cache is sent, of a decode until its answer ends.",
            |view| view.bookings.map(|count| count as f64),
        ),
        (
            "prefill",
            "kvrouter_worker_queued_tokens",
            "Prompt tokens that wait or are computed at a prefill worker.",
            |view| view.queued_tokens.map(|count| count as f64),
        ),
        (
            "prefill",
            "kvrouter_worker_egress_bytes",
            "KV cache that a prefill worker still has to send.",
            |view| view.egress_bytes.map(|count| count as f64),
        ),
        (
            "decode",
            "kvrouter_worker_kv_used_tokens",
            "KV tokens taken or booked at a decode worker.",
            |view| view.kv_tokens.map(|count| count as f64),
        ),
        (
            "decode",
            "kvrouter_worker_kv_capacity_tokens",
            "KV tokens that fit into a decode worker's pool, if it tells.",
            |view| view.kv_tokens_max.map(|count| count as f64),
        ),
        (
            "prefill",
            "kvrouter_worker_cached_blocks",
            "Blocks of a prefill worker's prefix cache that its own events told of; absent while it does not tell.",
            |view| view.cached_blocks.map(|count| count as f64),
        ),
        (
            "prefill decode",
            "kvrouter_telemetry_age_seconds",
            "Time since a worker's last telemetry; absent before the first one.",
            |view| view.telemetry_age_s,
        ),
    ];
    for (legs, name, help, value) in series {
        text.family(name, Kind::Gauge, help);
        for (leg, view) in &views {
            if let Some(value) = value(view).filter(|_| legs.contains(leg)) {
                text.sample(&worker_labels(leg, &view.url), value);
            }
        }
    }
}

/// What waits and moves between pairs, of the first [`PAIRS_MAX`]; a prefill worker's whole egress is told with it.
fn render_matrix(text: &mut Text, overview: &Overview) {
    type Series = (
        &'static str,
        &'static str,
        fn(&Overview, usize, usize) -> f64,
    );
    #[expect(clippy::cast_precision_loss, reason = "gauges are doubles anyway")]
    let series: [Series; 3] = [
        (
            "kvrouter_pair_queued_bytes",
            "KV cache that waits to be sent between a pair.",
            |overview, prefill, decode| overview.matrix.queued_bytes[prefill][decode] as f64,
        ),
        (
            "kvrouter_pair_in_flight_bytes",
            "KV cache on the wire between a pair.",
            |overview, prefill, decode| overview.matrix.in_flight_bytes[prefill][decode] as f64,
        ),
        (
            "kvrouter_pair_bandwidth_bytes_per_second",
            "Bandwidth that the scheduler counts with for a pair.",
            |overview, prefill, decode| overview.matrix.bytes_per_s[prefill][decode],
        ),
    ];
    for (name, help, value) in series {
        text.family(name, Kind::Gauge, help);
        let all = overview.prefills.iter().enumerate().flat_map(|prefill| {
            let decodes = overview.decodes.iter().enumerate();
            decodes.map(move |decode| (prefill, decode))
        });
        for ((p, prefill), (d, decode)) in all.take(PAIRS_MAX) {
            let labels = Labels::default()
                .with("prefill", &prefill.name)
                .with("decode", &decode.name);
            text.sample(&labels, value(overview, p, d));
        }
    }
}

fn render_gauges(text: &mut Text, overview: &Overview) {
    for (name, help, value) in [
        (
            "kvrouter_live_requests",
            "Choices of generation requests in flight.",
            overview.live_requests,
        ),
        (
            "kvrouter_queued_requests",
            "Requests that wait for a place.",
            overview.queued_requests,
        ),
        (
            "kvrouter_requests_without_worker",
            "Requests that wait for a worker with room.",
            overview.requests_without_worker,
        ),
        ("kvrouter_live_rooms", "Rooms in use.", overview.rooms),
        (
            "kvrouter_bookings",
            "Requests that the scheduler counts on.",
            overview.bookings,
        ),
        (
            "kvrouter_sibling_bookings",
            "Requests of other replicas that the scheduler counts on.",
            overview.sibling_bookings,
        ),
        (
            "kvrouter_buffered_bytes",
            "Request bodies held in memory.",
            overview.buffered_bytes,
        ),
    ] {
        text.single(name, Kind::Gauge, help, value);
    }
    let name = "kvrouter_ready_workers";
    text.family(name, Kind::Gauge, "Workers that may be chosen.");
    for (leg, ready) in [
        ("prefill", overview.ready_prefills),
        ("decode", overview.ready_decodes),
    ] {
        text.sample(&Labels::default().with("leg", leg), ready);
    }
    let uptime = overview.uptime_s;
    text.single(
        "kvrouter_uptime_seconds",
        Kind::Gauge,
        "Time since the router began to serve.",
        uptime,
    );
}
