//! The listeners beside an engine: bootstrap registry, telemetry stream, metrics page.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
};

use kvtransfer::{
    config::EngineConfig,
    serve::{
        bootstrap::{BootstrapConfig, BootstrapServer},
        telemetry::{TelemetryConfig, TelemetryServer},
    },
    telemetry::watch::{WatchConfig, Watcher},
};

use super::{
    rig,
    watch::{Dice, Watch},
};

const REQUESTS: u64 = 100_000;
const PER_CONNECTION: u64 = 500;
const HTTP2_FRAMES: u64 = 60_000;
const METRICS: u64 = 10_000;

/// Sends in one thread, reads in this one, until the server hangs up; how much it said.
fn converse(address: SocketAddr, bytes: Vec<u8>) -> usize {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream
        .set_read_timeout(Some(rig::WATCHDOG))
        .expect("a socket");
    let mut writer = stream.try_clone().expect("a descriptor");
    let sender = thread::spawn(move || {
        if writer.write_all(&bytes).is_ok() {
            let _ = writer.shutdown(Shutdown::Write);
        }
    });
    let mut heard = 0;
    let mut sink = vec![0; 64 << 10];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => break,
            Ok(got) => heard += got,
            Err(error) => {
                let kind = error.kind();
                assert_ne!(kind, std::io::ErrorKind::WouldBlock, "it hangs");
                break;
            }
        }
    }
    sender.join().expect("no panic");
    heard
}

fn text(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("text");
    reply
}

/// A request that is well framed, about anything.
fn odd_request(dice: &mut Dice, out: &mut Vec<u8>) {
    const PATHS: [&str; 7] = [
        "/route",
        "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1",
        "/route?prefill_dp_rank=99999999999999999999",
        "/register_dp_rank",
        "/query_dp_ranks",
        "/health",
        "/%00%ff/../route?=&&&%",
    ];
    const ROW: &str = "{\"attn_tp_size\": 2, \"attn_tp_rank\": 1, \"attn_cp_size\": 1, \"attn_cp_rank\": 0, \
        \"attn_dp_size\": 1, \"attn_dp_rank\": 0, \"pp_size\": 1, \"pp_rank\": 0, \"system_dp_size\": 1, \
        \"system_dp_rank\": 0, \"rank_ip\": \"127.0.0.1\", \"rank_port\": 4001, \"page_size\": 64, \
        \"kv_cache_dtype\": \"torch.bfloat16\"}";
    let path = PATHS[usize::try_from(dice.below(7)).expect("it fits")];
    let method = ["GET", "PUT", "POST", "HEAD", "BREW"];
    let method = method[usize::try_from(dice.below(5)).expect("it fits")];
    let mut body = match dice.below(4) {
        0 => Vec::new(),
        1 => {
            let len = dice.below(200);
            dice.bytes(len)
        }
        2 => b"{\"bootstrap_rooms\": [1, 2, 18446744073709551616, null]}".to_vec(),
        _ => ROW.as_bytes().to_vec(),
    };
    dice.mutate(&mut body, 0);
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(&body);
}

#[test]
fn the_bootstrap_registry() {
    let watch = Watch::start();
    let mut config = BootstrapConfig::default();
    config.listen = ([127, 0, 0, 1], 0).into();
    // Rows name made-up ranks; nobody is to be called.
    config.probe_interval = None;
    let server = BootstrapServer::start(config).expect("a free port");
    let mut dice = Dice::new(7);
    let (mut sent, mut heard) = (0, 0);
    while sent < REQUESTS {
        let mut bytes = Vec::new();
        for _ in 0..PER_CONNECTION {
            odd_request(&mut dice, &mut bytes);
            sent += 1;
        }
        // And one that is not even HTTP.
        let len = dice.below(300);
        bytes.extend(dice.bytes(len));
        sent += 1;
        heard += converse(server.local_addr(), bytes);
    }
    println!("bootstrap registry: {sent} frames, {heard} bytes of answers");
    assert!(
        heard as u64 > REQUESTS * 20,
        "most were answered: {heard} bytes"
    );
    watch.check_process(&[]);
    let reply = text(server.local_addr(), "/health");
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    server.close();
}

/// An HTTP/2 frame with a right length and odd contents.
fn odd_frame(dice: &mut Dice, is_tame: bool, out: &mut Vec<u8>) {
    let kind = if is_tame {
        // Window updates, priorities, pings and unknown kinds, which a server must put up with.
        [2, 6, 8, 0x2A][usize::try_from(dice.below(4)).expect("it fits")]
    } else {
        dice.roll().to_le_bytes()[0] % 12
    };
    let (len, stream) = match kind {
        2 => (5, 1 + 2 * dice.below(9)),
        6 => (8, 0),
        8 => (4, 0),
        _ => (dice.below(40), dice.below(20)),
    };
    let len = if is_tame { len } else { dice.below(40) };
    let mut payload = dice.bytes(len);
    if is_tame && kind == 8 {
        // By one byte, or the window would overflow.
        payload = vec![0, 0, 0, 1];
    }
    if is_tame && kind == 2 {
        payload[..4].fill(0);
    }
    let flags = if is_tame {
        0
    } else {
        dice.roll().to_le_bytes()[0]
    };
    out.extend_from_slice(&u32::try_from(len).expect("it fits").to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&u32::try_from(stream).expect("it fits").to_be_bytes());
    out.extend_from_slice(&payload);
}

fn odd_http2(dice: &mut Dice) -> (Vec<u8>, u64) {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    let tame = dice.below(400);
    for _ in 0..tame {
        odd_frame(dice, true, &mut bytes);
    }
    for _ in 0..4 {
        odd_frame(dice, false, &mut bytes);
    }
    (bytes, tame + 4)
}

#[tokio::test(flavor = "multi_thread")]
async fn telemetry_and_metrics() {
    let watch = Watch::start();
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let mut config = TelemetryConfig::default();
    config.metrics = Some(([127, 0, 0, 1], 0).into());
    let server = TelemetryServer::start(config, engine.snapshot_source()).expect("free ports");
    let (stream, page) = (server.addr(), server.metrics_addr().expect("asked for"));
    let attack = tokio::task::spawn_blocking(move || {
        let mut dice = Dice::new(8);
        let (mut frames, mut requests) = (0, 0);
        while frames < HTTP2_FRAMES {
            let (bytes, count) = odd_http2(&mut dice);
            converse(stream, bytes);
            frames += count;
        }
        while requests < METRICS {
            let mut bytes = Vec::new();
            for _ in 0..PER_CONNECTION {
                bytes.extend_from_slice(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ");
                let value = dice.below(100);
                bytes.extend((0..value).map(|_| b'a' + dice.roll().to_le_bytes()[0] % 26));
                bytes.extend_from_slice(b"\r\n\r\n");
                requests += 1;
            }
            let len = dice.below(300);
            bytes.extend(dice.bytes(len));
            converse(page, bytes);
        }
        (frames, requests)
    });
    let (frames, requests) = attack.await.expect("no panic");
    println!("telemetry: {frames} frames; metrics: {requests} frames");
    let watcher = Watcher::spawn(WatchConfig::new(format!("http://{stream}"))).expect("an address");
    let seen = tokio::time::timeout(rig::WATCHDOG, async {
        let mut view = watcher.view();
        view.wait_for(|seen| seen.live).await.map(|seen| seen.live)
    });
    assert!(seen.await.expect("in time").expect("the watcher lives"));
    let reply = tokio::task::spawn_blocking(move || text(page, "/metrics"));
    let reply = reply.await.expect("no panic");
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    tokio::task::block_in_place(|| watch.check(&engine));
}
