//! An engine's live picture: what it shows, where it is served, and that nobody who watches it can slow the data down.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use kvtransfer::{
    config::{EngineConfig, SameHost},
    engine::{Engine, Memory},
    ids::{PeerId, Room},
    layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
    memory::Region,
    serve::telemetry::TelemetryConfig,
    telemetry::{
        snapshot::{RoomRole, Snapshot},
        v1::{WatchRequest, telemetry_client::TelemetryClient},
        watch::{WatchConfig, Watcher},
    },
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;

fn layout() -> Layout {
    let entry = Entry {
        region: RegionId(0),
        offset: 0,
        item_len: PAGE,
        item_count: PAGES,
        layer_id: None,
    };
    Layout {
        page_size: 1,
        kv_dtype: "uint8".into(),
        kv_layout: "nhd".into(),
        attention: Attention::Latent,
        tp: Shard::ONE,
        pp: Shard::ONE,
        layers: 0..1,
        components: vec![Component {
            kind: ComponentKind::Kv,
            entries: vec![entry],
            draft_entries: 0,
            state: StateShape::default(),
        }],
    }
}

fn engine(config: EngineConfig) -> Engine {
    let mut memory = Memory::new();
    let bytes = usize::try_from(PAGE * PAGES).expect("a small region");
    memory.add(Region::heap(bytes).expect("memory"));
    Engine::start(config, memory, layout()).expect("an engine starts")
}

/// A prefill engine with telemetry and a decode engine connected to it over TCP.
fn pair() -> (Engine, Engine, PeerId) {
    let any = "127.0.0.1:0".parse().expect("an address");
    let mut config = EngineConfig::default();
    config.same_host = SameHost::Off;
    let decode = engine(config.clone());
    let mut telemetry = TelemetryConfig::default();
    telemetry.metrics = Some(any);
    config.listen = Some(any);
    config.telemetry = Some(telemetry);
    let prefill = engine(config);
    let address = prefill.local_addr().expect("it listens");
    let peer = decode
        .connect(address, Duration::from_secs(5))
        .expect("they connect")
        .peer;
    (prefill, decode, peer)
}

fn transfer(prefill: &Engine, decode: &Engine, peer: PeerId, room: u64) {
    let room = Room::new(room).expect("not zero");
    let items: Arc<[i32]> = (0..64).collect();
    let timeout = Duration::from_secs(20);
    let receive = ReceiveRequest {
        room,
        sources: vec![Source { peer, dummy: false }],
        receivers_expected: 1,
        prefix_tokens: 0,
        items: vec![Arc::clone(&items)],
        timeout,
    };
    let receive = decode.receive(&receive).expect("granted");
    let send = prefill
        .send(&SendRequest { room, timeout })
        .expect("opened");
    send.wait_ready(timeout).expect("the grant arrives");
    send.push(&Chunk {
        items: vec![items],
        last: true,
    })
    .expect("queued");
    send.wait(timeout).expect("in time").expect("sent");
    receive.wait(timeout).expect("in time").expect("received");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

fn endpoint(engine: &Engine) -> String {
    format!(
        "http://{}",
        engine.telemetry_addr().expect("telemetry is on")
    )
}

#[test]
fn a_watcher_sees_rails_and_rooms() {
    let (prefill, decode, peer) = pair();
    let picture: Arc<Snapshot> = runtime().block_on(async {
        let watcher = Watcher::spawn(WatchConfig::new(endpoint(&prefill))).expect("a watcher");
        let mut view = watcher.view();
        transfer(&prefill, &decode, peer, 4711);
        loop {
            let picture = view.borrow_and_update().picture.clone();
            let done = |p: &Snapshot| p.rooms.iter().any(|r| r.room == 4711 && r.done_ns > 0);
            match picture {
                Some(picture) if done(&picture) => return picture,
                _ => view.changed().await.expect("the watcher lives"),
            }
        }
    });
    let room = picture
        .rooms
        .iter()
        .find(|r| r.room == 4711)
        .expect("the room is shown");
    assert_eq!(room.role, RoomRole::Sender);
    assert_eq!((room.state.as_str(), room.bytes), ("success", PAGE * PAGES));
    assert!(room.enqueued_ns <= room.first_byte_ns && room.first_byte_ns <= room.done_ns);
    assert!(room.enqueued_ns <= room.pushed_ns && room.pushed_ns <= room.done_ns);
    assert_eq!(picture.instance, prefill.instance().to_string());
    let moved: u64 = picture.rails.iter().map(|rail| rail.bytes_total).sum();
    assert_eq!(moved, PAGE * PAGES);
    let rail = &picture.rails[0];
    assert_eq!(rail.peer, decode.instance().to_string());
    assert_eq!(rail.path, "tcp");
    assert!(
        !rail.path_reason.is_empty(),
        "it says why it is not a same-host path"
    );
}

#[test]
fn prometheus_text_shows_the_same() {
    let (prefill, decode, peer) = pair();
    transfer(&prefill, &decode, peer, 12);
    let address = prefill.metrics_addr().expect("metrics are on");
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .expect("sent");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("a page");
    let total = page
        .lines()
        .filter(|line| line.starts_with("kvtransfer_rail_transferred_bytes_total{"));
    let moved: f64 = total
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum();
    assert_eq!(moved, (PAGE * PAGES) as f64, "{page}");
}

#[test]
fn slow_and_dead_watchers_cost_the_data_nothing() {
    let (prefill, decode, peer) = pair();
    let runtime = runtime();
    // Eight streams that are opened and never read, and some connections that say nothing at all.
    let slow: Vec<_> = runtime.block_on(async {
        let mut streams = Vec::new();
        for _ in 0..8 {
            let mut client = TelemetryClient::connect(endpoint(&prefill))
                .await
                .expect("it serves");
            streams.push(client.watch(WatchRequest {}).await.expect("a place"));
        }
        streams
    });
    let address = prefill.telemetry_addr().expect("telemetry is on");
    let dead: Vec<_> = (0..8)
        .map(|_| TcpStream::connect(address).expect("it listens"))
        .collect();
    for room in 1..=500 {
        transfer(&prefill, &decode, peer, room);
    }
    // Every transfer ended well within its deadline, and the engine still answers a fresh watcher with the newest state.
    runtime.block_on(async {
        let watcher = Watcher::spawn(WatchConfig::new(endpoint(&prefill))).expect("a watcher");
        let mut view = watcher.view();
        let newest = |p: &Snapshot| p.rooms.iter().any(|r| r.room == 500 && r.done_ns > 0);
        while !view
            .borrow_and_update()
            .picture
            .as_deref()
            .is_some_and(newest)
        {
            view.changed().await.expect("the watcher lives");
        }
    });
    drop((slow, dead));
}

#[test]
fn telemetry_that_nobody_asked_for_is_not_served() {
    let quiet = engine(EngineConfig::default());
    assert_eq!(quiet.local_addr(), None);
    assert_eq!(quiet.telemetry_addr(), None);
    assert_eq!(quiet.metrics_addr(), None);
    assert_eq!(quiet.bootstrap_addr(), None);
}
