//! Pretended workers: two prefill and two decode, in one process and one thread, that answer at once or token by token.
//!
//! They speak as much of SGLang's HTTP as routers need. What they are to do stands in the prompt (`tokens=50
//! gap_us=10000`), because routers pass that on and not always headers. Both legs of a request meet here, so it is known
//! whether each request reached one worker of both roles under one room.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::http::{end_of_head, header, number_after};

/// Workers of each role.
pub(crate) const OF_EACH: usize = 2;

/// The port that prefill workers pretend to have a bootstrap server on.
pub(crate) const BOOTSTRAP_PORT: u16 = 8998;

/// Where the workers' own counts are told.
pub(crate) const COUNTS_PATH: &str = "/_counts";

/// A decode worker computes the next token of all its streams in one step, and its streams are written together.
const STEP: Duration = Duration::from_millis(10);

/// The bodies sent have some ten KiB.
const BODY_BYTES_MAX: usize = 16 << 20;

/// What reached the workers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Requests that came to one prefill and to one decode worker under one room.
    pub(crate) paired: u64,
    /// Legs whose partner has not come.
    pub(crate) alone: u64,
    /// Prefill legs without a room; decode workers are asked directly too, for comparison.
    pub(crate) roomless: u64,
    /// Rooms that came twice to one role.
    pub(crate) doubled: u64,
    /// Answers that nobody read to the end.
    pub(crate) cut: u64,
    /// Requests by worker: the prefill workers, then the decode workers.
    pub(crate) by_worker: Vec<u64>,
}

/// Where the workers listen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Addresses {
    pub(crate) prefill: Vec<SocketAddr>,
    pub(crate) decode: Vec<SocketAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Prefill,
    Decode,
}

#[derive(Debug, Default)]
struct State {
    counts: Counts,
    open: HashMap<u64, Role>,
}

impl State {
    fn meet(&mut self, role: Role, worker: usize, room: Option<u64>) {
        self.counts.by_worker[worker] += 1;
        let Some(room) = room else {
            self.counts.roomless += u64::from(role == Role::Prefill);
            return;
        };
        match self.open.remove(&room) {
            None => {
                self.open.insert(room, role);
            }
            Some(first) if first != role => self.counts.paired += 1,
            Some(_) => self.counts.doubled += 1,
        }
    }
}

type Shared = Arc<Mutex<State>>;

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until its standard input ends; prints [`Addresses`] first.
pub(crate) fn run() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let shared = Shared::default();
        let mut addresses = Addresses {
            prefill: Vec::new(),
            decode: Vec::new(),
        };
        for worker in 0..2 * OF_EACH {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let (role, list) = if worker < OF_EACH {
                (Role::Prefill, &mut addresses.prefill)
            } else {
                (Role::Decode, &mut addresses.decode)
            };
            list.push(listener.local_addr()?);
            lock(&shared).counts.by_worker.push(0);
            tokio::spawn(accept(listener, role, worker, Arc::clone(&shared)));
        }
        let line = serde_json::to_string(&addresses)?;
        writeln!(std::io::stdout(), "{line}")?;
        // The parent keeps the other end open for as long as it lives.
        let (ended, end) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            let _ = ended.send(());
        });
        end.await.context("the watch over standard input failed")
    })
}

async fn accept(listener: TcpListener, role: Role, worker: usize, shared: Shared) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            // A connection that ends in the middle of a request is a leg cancelled.
            let _ = serve(stream, role, worker, &shared).await;
        });
    }
}

async fn serve(
    mut stream: TcpStream,
    role: Role,
    worker: usize,
    shared: &Shared,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(8 << 10);
    loop {
        let head = loop {
            if let Some(end) = end_of_head(&buffer) {
                break end;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let length = header(&buffer[..head], "content-length");
        let length = length.and_then(|text| text.parse().ok()).unwrap_or(0);
        if length > BODY_BYTES_MAX {
            return Ok(());
        }
        while buffer.len() < head + length {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let (head, body) = buffer[..head + length].split_at(head);
        let path = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        match path {
            b"/v1/chat/completions" | b"/generate" => {
                let room = number_after(body, b"\"bootstrap_room\":");
                lock(shared).meet(role, worker, room);
                let answered = generate(&mut stream, role, path == b"/generate", body).await;
                if let Err(error) = answered {
                    lock(shared).counts.cut += 1;
                    return Err(error);
                }
            }
            path => stream.write_all(&about(path, shared)).await?,
        }
        buffer.drain(..head.len() + length);
    }
}

/// What a worker says of itself.
fn about(path: &[u8], shared: &Shared) -> Vec<u8> {
    let body = match path {
        b"/health" | b"/health_generate" | b"/abort_request" => String::new(),
        b"/server_info" | b"/get_server_info" => {
            "{\"model_path\":\"m\",\"served_model_name\":\"m\",\"tp_size\":1,\"dp_size\":1,\"page_size\":16,\
             \"max_total_num_tokens\":4000000,\"version\":\"0.5.0\"}"
                .to_owned()
        }
        b"/model_info" | b"/get_model_info" => {
            "{\"model_path\":\"m\",\"served_model_name\":\"m\",\"is_generation\":true}".to_owned()
        }
        b"/v1/models" => {
            "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":0,\"owned_by\":\"sglang\"}]}"
                .to_owned()
        }
        path if path == COUNTS_PATH.as_bytes() => {
            let state = lock(shared);
            let mut counts = state.counts.clone();
            counts.alone = state.open.len() as u64;
            serde_json::to_string(&counts).unwrap_or_default()
        }
        _ => return b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}".to_vec(),
    };
    answer(&body)
}

fn answer(body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

/// One event as a chunk of its own, as SGLang's server sends them.
fn event(native: bool, token: u64) -> Vec<u8> {
    let data = if native {
        format!(
            "data: {{\"text\":\" token{token}\",\"output_ids\":[{token}],\"meta_info\":{{\"id\":\"0123456789abcdef\",\
             \"finish_reason\":null,\"prompt_tokens\":12,\"completion_tokens\":{token}}}}}\n\n"
        )
    } else {
        format!(
            "data: {{\"id\":\"0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"m\",\
             \"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" token{token}\"}},\"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
        )
    };
    format!("{:x}\r\n{data}\r\n", data.len()).into_bytes()
}

/// The step that is under way at `time` ends then.
fn next_step(time: Instant) -> Instant {
    static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = time.saturating_duration_since(*ZERO).as_nanos();
    let steps = since / STEP.as_nanos();
    *ZERO + STEP * u32::try_from(steps).unwrap_or(u32::MAX)
}

async fn generate(
    stream: &mut TcpStream,
    role: Role,
    native: bool,
    body: &[u8],
) -> std::io::Result<()> {
    let whole = if native {
        "{\"text\":\" token1\",\"output_ids\":[1],\"meta_info\":{\"id\":\"0123456789abcdef\",\"finish_reason\":{\"type\":\
         \"length\",\"length\":1},\"prompt_tokens\":12,\"completion_tokens\":1,\"e2e_latency\":0.0021}}"
    } else {
        "{\"id\":\"0123456789abcdef\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"m\",\"choices\":\
         [{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\" token1\",\"tool_calls\":null},\"logprobs\":null,\
         \"finish_reason\":\"length\",\"matched_stop\":null}],\"usage\":{\"prompt_tokens\":12,\"total_tokens\":13,\
         \"completion_tokens\":1,\"prompt_tokens_details\":null}}"
    };
    let streams = [&b"\"stream\":true"[..], b"\"stream\": true"];
    let streams = streams
        .iter()
        .any(|words| memchr::memmem::find(body, words).is_some());
    if !streams {
        return stream.write_all(&answer(whole)).await;
    }
    let tokens = match role {
        // Prefill computes the first token and no more.
        Role::Prefill => 1,
        Role::Decode => number_after(body, b"tokens=").unwrap_or(1).max(1),
    };
    let gap = Duration::from_micros(number_after(body, b"gap_us=").unwrap_or(0));
    let mut piece = STREAM_HEAD.to_vec();
    for token in 1..=tokens {
        if !gap.is_zero() && token > 1 {
            tokio::time::sleep_until(next_step(Instant::now() + gap)).await;
        }
        piece.extend_from_slice(&event(native, token));
        if role == Role::Decode {
            stream.write_all(&piece).await?;
            piece.clear();
        }
    }
    piece.extend_from_slice(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    stream.write_all(&piece).await
}
