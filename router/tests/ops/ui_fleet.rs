//! A fleet for the page to show; `tests/ui/run.sh` starts it and looks at the page with a browser.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use kvrouter::Router;
use kvrouter::config::Config;
use kvrouter::config::scheduling::Scheduling;
use kvrouter::pool::Role;
use kvrouter::proxy::Front;
use kvrouter::schedule::sample::{KvPool, Link, RankQueue, Sample};
use rand::RngExt;
use tokio::net::TcpListener;

use crate::fakes::{Running, config};

/// A worker that takes its time: a first token after 20 ms to 2 s, then one every 30 ms.
async fn answer(request: Request) -> Response {
    if request.method() == "GET" {
        return "{}".into_response();
    }
    let slow: f64 = rand::rng().random_range(0.0..1.0);
    let first = Duration::from_secs_f64(0.02 + 2.0 * slow.powi(4));
    let tokens = stream::unfold(0, move |token| async move {
        let pause = if token == 0 {
            first
        } else {
            Duration::from_millis(30)
        };
        tokio::time::sleep(pause).await;
        let event = Bytes::from(format!("data: {{\"token\":{token}}}\n\n"));
        (token < 30).then_some((Ok::<_, std::io::Error>(event), token + 1))
    });
    (
        [("content-type", "text/event-stream")],
        Body::from_stream(tokens),
    )
        .into_response()
}

async fn worker() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let app = axum::Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

#[expect(clippy::cast_possible_truncation, reason = "shares of small numbers")]
fn number(share: f64, most: u64) -> u64 {
    (share * most as f64) as u64
}

/// What the engines of such workers would tell: queues that come and go.
async fn tell(front: Arc<Front>) {
    for sequence in 1.. {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let (picker, workers) = (&front.picker, front.pool.now());
        let wave = |phase: usize| {
            (sequence as f64 / 12.0 + phase as f64)
                .sin()
                .max(0.0)
                .powi(2)
        };
        let ids = |role| {
            workers
                .of_role(role)
                .iter()
                .filter_map(|worker| picker.id_of(worker))
        };
        let sample = |worker, at| Sample {
            worker,
            source: 0,
            epoch: 1,
            sequence,
            at,
            tells_rooms: false,
            links: None,
            queues: None,
            pool: None,
        };
        let decodes: Vec<_> = ids(Role::Decode).collect();
        for (p, worker) in ids(Role::Prefill).enumerate() {
            // To the last one, which is down, nothing goes.
            let alive = &decodes[..decodes.len() - 1];
            let links: Vec<_> = alive
                .iter()
                .enumerate()
                .map(|(d, peer)| Link {
                    peer: *peer,
                    bytes_queued: number(wave(2 * p + 5 * d), 2 << 30),
                    bytes_in_flight: number(wave(2 * p + 5 * d).min(0.2), 1 << 30),
                    bytes_per_s: 4e9 + 3e9 * wave(p + d),
                })
                .collect();
            let queues = [RankQueue {
                rank: 0,
                tokens: number(wave(3 * p), 30_000),
                requests: number(wave(3 * p), 9),
            }];
            let sample = Sample {
                links: Some(&links),
                queues: Some(&queues),
                ..sample(worker, picker.now())
            };
            picker.ingest(&sample).unwrap();
        }
        // The last one is down.
        for (d, worker) in decodes.iter().enumerate().rev().skip(1) {
            let pool = KvPool {
                free_pages: number(1.0 - wave(d), 400_000),
                pages: 400_000,
                requests: number(wave(d), 60),
            };
            let sample = Sample {
                pool: Some(pool),
                ..sample(*worker, picker.now())
            };
            picker.ingest(&sample).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "serves until its standard input ends: run by tests/ui/run.sh"]
async fn serve() {
    let size: usize = std::env::var("FLEET").unwrap().parse().unwrap();
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for _ in 0..size {
        prefills.push(worker().await);
        decodes.push(worker().await);
    }
    // One that is down: the page must say so.
    decodes.push("http://127.0.0.1:1".to_owned());
    let refs = |urls: &[String]| -> Vec<&'static str> {
        urls.iter().map(|url| &*url.clone().leak()).collect()
    };
    let router = Router::bind(Config {
        scheduling: Scheduling::default(),
        ..config(&refs(&prefills), &refs(&decodes))
    });
    let router = router.await.unwrap();
    let url = format!("http://{}", router.local_addr());
    tokio::spawn(tell(Arc::clone(router.front())));
    tokio::spawn(router.serve(std::future::pending()));
    let router = Running::elsewhere(&url);
    router.ready(size, size).await;
    for client in 0..6 * size {
        let router = Running::elsewhere(&router.url);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(40 * client as u64)).await;
            loop {
                let body = format!(
                    "{{\"text\":\"{}\",\"stream\":true}}",
                    "x".repeat(4000 * (1 + client % 7))
                );
                let _ = crate::fakes::whole(router.post("/generate", body).await).await;
            }
        });
    }
    println!("\nURL {}", router.url);
    let end = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    end.await.unwrap().unwrap();
}
