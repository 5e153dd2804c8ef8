//! The bootstrap registry over real HTTP on loopback.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kvtransfer::serve::bootstrap::{BootstrapConfig, BootstrapServer};

#[path = "bootstrap_http/client.rs"]
mod client;
#[path = "bootstrap_http/limits.rs"]
mod limits;
#[path = "bootstrap_http/security.rs"]
mod security;
#[path = "bootstrap_http/wire.rs"]
mod wire;

const INFO: &str =
    "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";

/// A server on a free port, with the configuration changed by `change`.
fn start(change: impl FnOnce(&mut BootstrapConfig)) -> BootstrapServer {
    let mut config = BootstrapConfig::default();
    config.listen = SocketAddr::from(([127, 0, 0, 1], 0));
    change(&mut config);
    BootstrapServer::start(config).expect("a free loopback port")
}

#[derive(Debug)]
struct Response {
    status: u16,
    head: String,
    body: String,
}

impl Response {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// One keep-alive connection that reads exactly one response per request.
struct Wire(TcpStream);

impl Wire {
    fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_nodelay(true).unwrap();
        // Far above anything expected: a hang becomes a failure, not a stuck run.
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self(stream)
    }

    fn send(&mut self, method: &str, path: &str, headers: &str, body: Option<&str>) -> Response {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}");
        if let Some(body) = body {
            request += &format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            );
        }
        request += "\r\n";
        request += body.unwrap_or_default();
        self.0.write_all(request.as_bytes()).unwrap();
        self.receive(method == "HEAD")
    }

    fn receive(&mut self, is_head: bool) -> Response {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).expect("a response");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut response = Response {
            status,
            head,
            body: String::new(),
        };
        let length: usize = response
            .header("content-length")
            .map_or(0, |text| text.parse().unwrap());
        let mut body = vec![0; if is_head { 0 } else { length }];
        self.0.read_exact(&mut body).unwrap();
        response.body = String::from_utf8(body).unwrap();
        response
    }

    /// Whether the server has closed the connection; waits for it.
    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset is a close too.
        self.0.read_to_end(&mut rest).map_or_else(
            |error| error.kind() != std::io::ErrorKind::WouldBlock,
            |_| true,
        )
    }
}

fn once(addr: SocketAddr, method: &str, path: &str, body: Option<&str>) -> Response {
    Wire::connect(addr).send(method, path, "", body)
}

/// A row of a TP-`tp_size` instance, as `requests.put(json=…)` sends it.
/// A row with the keys that a rank of 0.5.23 sends, `extra` among them.
fn row(tp_size: u32, tp: u32, port: u16, extra: &str) -> String {
    let mut body = old_row(tp_size, tp, port, extra);
    body.pop();
    for (key, value) in [
        ("enable_dsa_cache_layer_split", "false"),
        ("enable_kv_cache_sharding", "false"),
        ("prefill_http_port", "null"),
        ("decode_allocation_policy", "\"early\""),
    ] {
        let key = format!("\"{key}\": ");
        if !extra.contains(&key) {
            body = format!("{body}, {key}{value}");
        }
    }
    body + "}"
}

/// A row with the keys that every release has, and `extra`.
fn old_row(tp_size: u32, tp: u32, port: u16, extra: &str) -> String {
    format!(
        "{{\"attn_tp_size\": {tp_size}, \"attn_tp_rank\": {tp}, \"attn_cp_size\": 1, \"attn_cp_rank\": 0, \
         \"attn_dp_size\": 1, \"attn_dp_rank\": 0, \"pp_size\": 1, \"pp_rank\": 0, \"system_dp_size\": 1, \
         \"system_dp_rank\": 0, \"rank_ip\": \"127.0.0.1\", \"rank_port\": {port}, \"page_size\": 64, \
         \"kv_cache_dtype\": \"torch.bfloat16\"{extra}}}"
    )
}
