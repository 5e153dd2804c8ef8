use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::time::{advance, sleep, timeout};

use super::*;
use crate::telemetry::replica::Replica;
use crate::telemetry::snapshot::RailStat;
use crate::telemetry::v1::watch_response::Picture;

/// An engine with one number to tell, and a clock that moves at every look.
#[derive(Default)]
struct Engine {
    queued: AtomicU64,
    epoch: AtomicU64,
    looks: AtomicU64,
}

impl Engine {
    fn hub(self: &Arc<Self>, config: &TelemetryConfig) -> Arc<Hub> {
        let engine = Arc::clone(self);
        let source = move || {
            let look = engine.looks.fetch_add(1, Relaxed) + 1;
            let rail = |peer: &str, bytes_queued| RailStat {
                peer: peer.into(),
                bytes_queued,
                oldest_enqueued_ns: 1,
                ..RailStat::default()
            };
            Snapshot {
                instance: "engine".into(),
                epoch: engine.epoch.load(Relaxed),
                monotonic_ns: look,
                wall_ns: look,
                rails: vec![
                    rail("still", 0),
                    rail("moving", engine.queued.load(Relaxed)),
                ],
                ..Snapshot::default()
            }
        };
        let hub = Arc::new(Hub::new(Arc::new(source), config));
        tokio::spawn(Arc::clone(&hub).sample_while_watched());
        hub
    }

    fn looks(&self) -> u64 {
        self.looks.load(Relaxed)
    }
}

fn changed_rails(message: &v1::WatchResponse) -> Option<usize> {
    match message.picture.as_ref()? {
        Picture::Snapshot(_) => None,
        Picture::Delta(delta) => Some(delta.rails.len()),
    }
}

fn queued(picture: &Snapshot) -> u64 {
    picture
        .rails
        .iter()
        .find(|rail| rail.peer == "moving")
        .expect("the rail is there")
        .bytes_queued
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_whole_then_deltas_then_quiet() {
    let engine = Arc::new(Engine::default());
    let hub = engine.hub(&TelemetryConfig::default());
    let mut stream = hub.subscribe(Instant::now()).expect("a place");
    let mut replica = Replica::default();
    let first = stream.next().await.expect("a message");
    assert_eq!((first.sequence, changed_rails(&first)), (0, None));
    assert_eq!(
        replica.accept(first).map(|picture| picture.rails.len()),
        Ok(2)
    );

    // Nothing changes but the clocks: silence, then a keep-alive with fresh clocks after exactly a second.
    let since = Instant::now();
    let still = stream.next().await.expect("a message");
    assert_eq!(since.elapsed(), Duration::from_secs(1));
    assert_eq!((still.sequence, changed_rails(&still)), (1, Some(0)));
    let picture = replica.accept(still).expect("in sequence");
    assert!(
        picture.monotonic_ns >= 49,
        "stale clocks: {}",
        picture.monotonic_ns
    );

    // A change comes within one interval, and only the changed rail.
    for value in 1..=20 {
        engine.queued.store(value, Relaxed);
        let since = Instant::now();
        let delta = stream.next().await.expect("a message");
        assert!(
            since.elapsed() <= Duration::from_millis(21),
            "{:?}",
            since.elapsed()
        );
        assert_eq!(
            (delta.sequence, changed_rails(&delta)),
            (1 + value, Some(1))
        );
        assert_eq!(queued(&replica.accept(delta).expect("in sequence")), value);
    }
}

#[tokio::test(start_paused = true)]
async fn the_engine_is_asked_only_while_someone_listens_and_never_more_often() {
    let engine = Arc::new(Engine::default());
    let hub = engine.hub(&TelemetryConfig::default());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(engine.looks(), 0);
    let streams: Vec<_> = (0..8)
        .map(|_| hub.subscribe(Instant::now()).expect("a place"))
        .collect();
    for _ in 0..1000 {
        hub.picture(Instant::now());
        sleep(Duration::from_millis(1)).await;
    }
    // One second has fifty intervals.
    assert!((45..=51).contains(&engine.looks()), "{}", engine.looks());
    drop(streams);
    sleep(Duration::from_millis(50)).await;
    let before = engine.looks();
    sleep(Duration::from_secs(60)).await;
    assert_eq!(engine.looks(), before);
    // The next stream begins with a fresh picture, not with the one of a minute ago.
    engine.queued.store(9, Relaxed);
    let mut stream = hub.subscribe(Instant::now()).expect("a place");
    let first = Replica::default()
        .accept(stream.next().await.expect("a message"))
        .expect("whole");
    assert_eq!((queued(&first), first.monotonic_ns), (9, before + 1));
}

#[tokio::test(start_paused = true)]
async fn a_slow_subscriber_skips_states_and_delays_nobody() {
    let engine = Arc::new(Engine::default());
    let hub = engine.hub(&TelemetryConfig::default());
    let mut slow = hub.subscribe(Instant::now()).expect("a place");
    let mut quick = hub.subscribe(Instant::now()).expect("a place");
    let (mut slow_replica, mut quick_replica) = (Replica::default(), Replica::default());
    slow_replica
        .accept(slow.next().await.expect("a message"))
        .expect("whole");
    quick_replica
        .accept(quick.next().await.expect("a message"))
        .expect("whole");
    let since = Instant::now();
    for value in 1..=10_000 {
        engine.queued.store(value, Relaxed);
        let seen = quick_replica
            .accept(quick.next().await.expect("a message"))
            .expect("in sequence");
        assert_eq!(queued(&seen), value);
    }
    // The sampler kept its pace of 20 ms (timers are good to a millisecond) ...
    assert!(
        since.elapsed() <= Duration::from_millis(10_000 * 21),
        "{:?}",
        since.elapsed()
    );
    // ... and the slow one holds two pictures, not ten thousand: its own and the latest.
    assert_eq!(
        slow.told
            .as_ref()
            .map(|(_, picture)| Arc::strong_count(picture)),
        Some(1)
    );
    let delta = slow.next().await.expect("a message");
    assert_eq!((delta.sequence, changed_rails(&delta)), (1, Some(1)));
    assert_eq!(
        queued(&slow_replica.accept(delta).expect("in sequence")),
        10_000
    );
}

#[tokio::test(start_paused = true)]
async fn a_state_that_comes_back_is_no_news() {
    let engine = Arc::new(Engine::default());
    let hub = engine.hub(&TelemetryConfig::default());
    let mut stream = hub.subscribe(Instant::now()).expect("a place");
    stream.next().await.expect("a message");
    for value in [1, 0] {
        engine.queued.store(value, Relaxed);
        sleep(Duration::from_millis(50)).await;
    }
    assert!(
        timeout(Duration::from_millis(500), stream.next())
            .await
            .is_err()
    );
}

#[tokio::test(start_paused = true)]
async fn a_new_epoch_comes_whole() {
    let engine = Arc::new(Engine::default());
    let hub = engine.hub(&TelemetryConfig::default());
    let mut stream = hub.subscribe(Instant::now()).expect("a place");
    let mut replica = Replica::default();
    replica
        .accept(stream.next().await.expect("a message"))
        .expect("whole");
    engine.epoch.store(7, Relaxed);
    let message = stream.next().await.expect("a message");
    assert_eq!(
        (message.epoch, message.sequence, changed_rails(&message)),
        (7, 1, None)
    );
    assert_eq!(replica.accept(message).map(|picture| picture.epoch), Ok(7));
}

#[tokio::test(start_paused = true)]
async fn places_are_bounded_and_come_back() {
    let engine = Arc::new(Engine::default());
    let config = TelemetryConfig {
        subscribers_max: 3,
        ..TelemetryConfig::default()
    };
    let hub = engine.hub(&config);
    let mut streams: Vec<_> = (0..3)
        .map(|_| hub.subscribe(Instant::now()).expect("a place"))
        .collect();
    assert!(hub.subscribe(Instant::now()).is_none());
    streams.pop();
    assert!(hub.subscribe(Instant::now()).is_some());
    advance(Duration::from_millis(1)).await;
}
