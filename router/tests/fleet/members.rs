//! Workers come, drain and go while requests are served.

use std::sync::Arc;

use kvrouter::discover::{Fleet, Member};
use kvrouter::pool::Role;
use tokio::sync::watch;

use crate::fakes::{FakeWorker, Running, chunk, config, event_stream, next_piece, soon, whole};

pub fn member(name: &str, role: Role, worker: &FakeWorker) -> Member {
    Member {
        name: name.to_owned(),
        role,
        url: worker.url.parse().unwrap(),
        bootstrap_port: Some(8998),
        bootstrap_port_assumed: None,
        probes_bootstrap: false,
        telemetry_port: None,
        zone: None,
        draining: false,
    }
}

pub fn fleet(members: Vec<Member>) -> Arc<Fleet> {
    Arc::new(Fleet {
        members,
        ..Fleet::default()
    })
}

const BODY: &str = r#"{"text":"a"}"#;

#[tokio::test]
async fn an_empty_pool_fills_and_serves() {
    let (source, fleet_watch) = watch::channel(fleet(Vec::new()));
    let router = Running::start_with(config(&[], &[]), fleet_watch).await;
    let (status, text) = whole(router.post("/generate", BODY).await).await;
    assert_eq!(status, 503, "{text}");
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let members = vec![
        member("p", Role::Prefill, &prefill),
        member("d", Role::Decode, &decode),
    ];
    source.send_replace(fleet(members));
    router.ready(1, 1).await;
    let (status, text) = whole(router.post("/generate", BODY).await).await;
    assert_eq!((status, text.as_str()), (200, "{}"));
    source.send_replace(fleet(Vec::new()));
    router.ready(0, 0).await;
    let (status, _) = whole(router.post("/generate", BODY).await).await;
    assert_eq!(status, 503);
}

#[tokio::test]
async fn a_draining_worker_ends_what_it_holds_and_gets_nothing_new() {
    let (mut prefill, mut old, mut new) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let members = |draining: bool| {
        vec![
            member("p", Role::Prefill, &prefill),
            Member {
                draining,
                ..member("old", Role::Decode, &old)
            },
        ]
    };
    let with_new = |mut members: Vec<Member>| {
        members.push(member("new", Role::Decode, &new));
        members
    };
    let (before, during) = (members(false), with_new(members(true)));
    let mut after = during.clone();
    after.remove(1);
    let (source, fleet_watch) = watch::channel(fleet(before));
    let router = Running::start_with(config(&[], &[]), fleet_watch).await;
    router.ready(1, 1).await;
    let (chunks, script) = event_stream();
    old.then(script);
    chunks.send(chunk("data: {\"a\":1}\n\n")).await.unwrap();
    let mut body = router
        .post("/generate", r#"{"text":"a","stream":true}"#)
        .await
        .into_body();
    next_piece(&mut body).await.unwrap().unwrap();
    old.request().await;
    prefill.request().await;

    source.send_replace(fleet(during));
    soon(async { while router.of_worker("kvrouter_worker_ready", &new).await == 0 {} }).await;
    for _ in 0..8 {
        let (status, _) = whole(router.post("/generate", BODY).await).await;
        assert_eq!(status, 200);
        new.request().await;
        prefill.request().await;
    }
    assert!(old.request_now().is_none());
    // Gone altogether, it may still end what it holds.
    source.send_replace(fleet(after));
    soon(async { while router.read("/metrics").await.1.contains(&old.url) {} }).await;
    chunks.send(chunk("data: [DONE]\n\n")).await.unwrap();
    drop(chunks);
    assert_eq!(
        next_piece(&mut body).await.unwrap().as_deref(),
        Some("data: [DONE]\n\n")
    );
    assert_eq!(next_piece(&mut body).await.unwrap(), None);
    assert!(old.was_left_alone());
    assert_eq!(
        router.of_worker("kvrouter_worker_requests", &prefill).await,
        0
    );
}

#[tokio::test]
async fn a_worker_that_moves_is_a_new_one() {
    let (prefill, first, mut second) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let at = |decode: &FakeWorker| {
        fleet(vec![
            member("p", Role::Prefill, &prefill),
            member("d", Role::Decode, decode),
        ])
    };
    let (source, fleet_watch) = watch::channel(at(&first));
    let router = Running::start_with(config(&[], &[]), fleet_watch).await;
    router.ready(1, 1).await;
    whole(router.post("/generate", BODY).await).await;
    assert_eq!(
        router
            .of_worker("kvrouter_leg_successes_total", &first)
            .await,
        1
    );
    // The same once more changes nothing, not even the counters.
    source.send_replace(at(&first));
    whole(router.post("/generate", BODY).await).await;
    assert_eq!(
        router
            .of_worker("kvrouter_leg_successes_total", &first)
            .await,
        2
    );
    source.send_replace(at(&second));
    soon(async { while !router.read("/metrics").await.1.contains(&second.url) {} }).await;
    router.ready(1, 1).await;
    whole(router.post("/generate", BODY).await).await;
    second.request().await;
    assert_eq!(
        router
            .of_worker("kvrouter_leg_successes_total", &second)
            .await,
        1
    );
}
