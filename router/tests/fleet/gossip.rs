//! Two routers decide like one, and a lost one leaves nothing behind.

use kvrouter::config::gossip::Gossip;
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
