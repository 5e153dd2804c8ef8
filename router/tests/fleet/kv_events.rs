//! What prefill workers publish of their prefix caches changes where token prompts go.

use std::time::Duration;

use kvrouter::Config;
use kvrouter::config::scheduling::Scheduling;
use kvrouter::config::telemetry::Telemetry;
use kvrouter::schedule::Policy;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fakes::{FakeWorker, Running, config, soon, whole};

const BLOCK: usize = 4;

/// A publisher that says what a test tells it, in ZMTP 3.0.
struct Publisher {
    listener: TcpListener,
}

/// Somebody who subscribed.
struct Subscription {
    stream: TcpStream,
    number: u64,
}

impl Publisher {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { listener }
    }

    /// What `/server_info` says of it.
    fn info(&self) -> Json {
        json!({"kv_events": {
            "publisher": "zmq", "endpoint_host": "*", "topic": "", "block_size": BLOCK, "dp_size": 1,
            "endpoint_port_base": self.listener.local_addr().unwrap().port(),
        }})
    }

    async fn subscriber(&self) -> Subscription {
        soon(async {
            let (mut stream, _) = self.listener.accept().await.unwrap();
            let mut greeting = [0; 64];
            stream.read_exact(&mut greeting).await.unwrap();
            assert_eq!(&greeting[10..16], b"\x03\0NULL");
            // Its own greeting says the same.
            stream.write_all(&greeting).await.unwrap();
            let mut ready = [0; 27];
            stream.read_exact(&mut ready).await.unwrap();
            assert!(ready.ends_with(b"SUB"));
            let own = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB";
            stream.write_all(own).await.unwrap();
            let mut subscription = [0; 3];
            stream.read_exact(&mut subscription).await.unwrap();
            assert_eq!(subscription, *b"\0\x01\x01");
            Subscription { stream, number: 0 }
        })
        .await
    }
}

/// MessagePack of the forms that events need.
fn pack(value: &Json) -> Vec<u8> {
    match value {
        Json::Null => vec![0xc0],
        Json::Number(number) => [&[0xcf][..], &number.as_u64().unwrap().to_be_bytes()].concat(),
        Json::String(text) => {
            [&[0xd9, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
        }
        Json::Array(items) => {
            let head = [
                &[0xdd][..],
                &u32::try_from(items.len()).unwrap().to_be_bytes(),
            ]
            .concat();
            head.into_iter()
                .chain(items.iter().flat_map(pack))
                .collect()
        }
        Json::Object(fields) => {
            let head = [0xde, 0, u8::try_from(fields.len()).unwrap()];
            let pairs = fields
                .iter()
                .flat_map(|(name, value)| [pack(&Json::from(name.as_str())), pack(value)].concat());
            head.into_iter().chain(pairs).collect()
        }
        Json::Bool(_) => unreachable!(),
    }
}

impl Subscription {
    async fn publish(&mut self, events: Json) {
        let payload = pack(&json!([0, events, 0]));
        let number = self.number.to_be_bytes();
        self.number += 1;
        let mut message = vec![1, 0, 1, 8];
        message.extend(number);
        message.push(2);
        message.extend((payload.len() as u64).to_be_bytes());
        message.extend(payload);
        self.stream.write_all(&message).await.unwrap();
    }
}

/// Blocks of `tokens`, whose hashes begin with `first`.
fn stored(first: u64, tokens: &[u64]) -> Json {
    let hashes: Vec<u64> = (first..).take(tokens.len() / BLOCK).collect();
    json!({"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": null, "token_ids": tokens,
           "block_size": BLOCK, "lora_id": null, "medium": "GPU"})
}

fn tokens() -> Vec<u64> {
    (100_000..100_064).collect()
}

/// The last decision for a prompt of token ids.
async fn decided(router: &Running, tokens: &[u64]) -> Json {
    let body = json!({"input_ids": tokens}).to_string();
    assert_eq!(whole(router.post("/generate", body).await).await.0, 200);
    let (_, text) = router.read("/debug/decisions?limit=1").await;
    let page: Json = serde_json::from_str(&text).unwrap();
    page["decisions"][0].clone()
}

async fn blocks(router: &Running, prefill: &FakeWorker, count: Option<u64>) {
    let part = format!("worker=\"{}\"", prefill.url);
    soon(async {
        loop {
            let (_, text) = router.read("/metrics").await;
            let line = text.lines().find(|line| {
                line.starts_with("kvrouter_worker_cached_blocks{") && line.contains(&part)
            });
            let found = line.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap());
            if found == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn router(prefills: [&FakeWorker; 2], decode: &FakeWorker, kv_events: bool) -> Running {
    let router = Running::start(Config {
        scheduling: Scheduling::with(Policy::CacheAware),
        telemetry: Telemetry {
            kv_events,
            ..Telemetry::default()
        },
        ..config(&[&prefills[0].url, &prefills[1].url], &[&decode.url])
    })
    .await;
    router.ready(2, 1).await;
    router
}

fn name(worker: &FakeWorker) -> &str {
    worker.url.strip_prefix("http://").unwrap()
}

#[tokio::test]
async fn token_prompts_go_where_their_blocks_are() {
    let (prefill, other, decode) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let publisher = Publisher::start().await;
    prefill.set_info(&publisher.info());
    let router = router([&other, &prefill], &decode, true).await;
    let mut subscription = publisher.subscriber().await;
    subscription.publish(json!([stored(1, &tokens())])).await;
    blocks(&router, &prefill, Some(16)).await;
    for _ in 0..3 {
        let decision = decided(&router, &tokens()).await;
        assert_eq!(decision["prefill"], name(&prefill));
        assert_eq!(decision["cached_tokens"], 64);
    }
    // Its engine evicts the second half.
    let evicted: Vec<u64> = (9..17).collect();
    subscription
        .publish(json!([{"type": "BlockRemoved", "block_hashes": evicted, "medium": "GPU"}]))
        .await;
    blocks(&router, &prefill, Some(8)).await;
    assert_eq!(decided(&router, &tokens()).await["cached_tokens"], 32);
    // All that was ever there was told of: what was sent there since does not count.
    subscription
        .publish(json!([{"type": "AllBlocksCleared"}]))
        .await;
    blocks(&router, &prefill, Some(0)).await;
    let decision = decided(&router, &tokens()).await;
    assert!(decision["prefill"] != name(&prefill) || decision["cached_tokens"] == 0);
}

#[tokio::test]
async fn what_was_lost_or_broken_is_forgotten_and_listened_to_again() {
    let (prefill, other, decode) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let publisher = Publisher::start().await;
    prefill.set_info(&publisher.info());
    let router = router([&other, &prefill], &decode, true).await;
    let mut subscription = publisher.subscriber().await;
    subscription.publish(json!([stored(1, &tokens())])).await;
    blocks(&router, &prefill, Some(16)).await;
    // One batch is lost on the way.
    subscription.number += 1;
    subscription
        .publish(json!([stored(30, &tokens()[..8])]))
        .await;
    blocks(&router, &prefill, Some(2)).await;
    // Nonsense: nothing is known, until the next batch.
    subscription.publish(json!(["nonsense"])).await;
    blocks(&router, &prefill, None).await;
    subscription
        .publish(json!([stored(50, &tokens()[..16])]))
        .await;
    blocks(&router, &prefill, Some(4)).await;
    // The connection breaks; and what comes next is no protocol at all.
    drop(subscription);
    blocks(&router, &prefill, None).await;
    let (mut stream, _) = soon(publisher.listener.accept()).await.unwrap();
    stream.write_all(&[0x55; 200]).await.unwrap();
    drop(stream);
    // The worker comes back with an empty cache.
    let mut subscription = publisher.subscriber().await;
    subscription.publish(json!([stored(1, &tokens())])).await;
    blocks(&router, &prefill, Some(16)).await;
    let decision = decided(&router, &tokens()).await;
    assert_eq!(decision["prefill"], name(&prefill));
    assert_eq!(decision["cached_tokens"], 64);
}

#[tokio::test]
async fn who_does_not_want_events_is_left_alone() {
    let (prefill, other, decode) = (
        FakeWorker::start().await,
        FakeWorker::start().await,
        FakeWorker::start().await,
    );
    let publisher = Publisher::start().await;
    prefill.set_info(&publisher.info());
    let deaf = router([&other, &prefill], &decode, false).await;
    // Another router that does want them is served at the same time: the first connection is its.
    let listening = router([&other, &prefill], &decode, true).await;
    let mut subscription = publisher.subscriber().await;
    subscription.publish(json!([stored(1, &tokens())])).await;
    blocks(&listening, &prefill, Some(16)).await;
    blocks(&deaf, &prefill, None).await;
    let second = tokio::time::timeout(Duration::from_millis(300), publisher.listener.accept());
    assert!(second.await.is_err(), "nobody else connects");
}
