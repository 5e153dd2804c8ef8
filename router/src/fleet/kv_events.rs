//! Listens to the events that a prefill worker's engine publishes of its prefix cache (SGLang's `--kv-events-config`), and hands
//! them to the scheduler. Where they are published, the worker's `/server_info` says.
//!
//! * `zmtp`: the connection; `msgpack`, `batch`: what comes over it.
//!
//! A stream that breaks, or of which something was lost, costs the knowledge of that rank's cache and nothing else: the scheduler
//! guesses by what it sent there, until the stream tells more. Prompts can be matched that come as token ids; for text the
//! router has no tokenizer, and guesses.
#![forbid(unsafe_code)]

mod batch;
mod msgpack;
mod zmtp;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::pool::{CacheFeed, Worker};
use crate::proxy::Front;
use crate::schedule::sample::KvEvent;
use zmtp::Subscriber;

/// How often it is looked whether a worker publishes, and where.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Shortest and longest pause between two attempts to connect.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Listens for as long as the worker is there. Until it publishes, nothing is asked.
pub async fn watch(front: Arc<Front>, worker: Arc<Worker>) {
    let mut refused = None;
    loop {
        let Some(feed) = worker.cache_feed() else {
            tokio::time::sleep(LOOK_INTERVAL).await;
            continue;
        };
        let Some(_blocks) = front.picker.blocks().enter(feed.block_tokens) else {
            if refused.replace(feed.block_tokens) != Some(feed.block_tokens) {
                tracing::warn!(
                    name = worker.name(),
                    block_tokens = feed.block_tokens,
                    "other workers tell of blocks of another size; this one's cache is guessed"
                );
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
            continue;
        };
        let mut ranks = JoinSet::new();
        for rank in 0..feed.ranks {
            let (front, worker) = (Arc::clone(&front), Arc::clone(&worker));
            ranks.spawn(follow(front, worker, feed.clone(), rank));
        }
        while worker.cache_feed().as_ref() == Some(&feed) {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// Follows one data-parallel rank, whose port is so many behind the first one.
async fn follow(front: Arc<Front>, worker: Arc<Worker>, feed: CacheFeed, rank: u32) {
    let Some(port) = u16::try_from(rank)
        .ok()
        .and_then(|rank| feed.port.checked_add(rank))
    else {
        return;
    };
    let told = Told {
        front: &front,
        worker: &worker,
        rank,
    };
    let mut pause = PAUSE_MIN;
    loop {
        let host = worker.url().host().trim_matches(['[', ']']).to_owned();
        let lost = match Subscriber::connect(&host, port, feed.topic.as_bytes()).await {
            Ok(subscriber) => {
                pause = PAUSE_MIN;
                tracing::info!(
                    name = worker.name(),
                    rank,
                    "worker tells of its prefix cache"
                );
                let lost = told.listen(subscriber, feed.block_tokens).await;
                told.tell(&[KvEvent::Lost]);
                tracing::warn!(name = worker.name(), rank, error = %lost, "worker tells no more of its prefix cache, trying again");
                lost
            }
            Err(lost) => lost,
        };
        tracing::debug!(name = worker.name(), rank, error = %lost, "not listening to a prefix cache");
        tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * rand::random::<f64>())).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// What one rank told; forgotten with this.
struct Told<'a> {
    front: &'a Front,
    worker: &'a Arc<Worker>,
    rank: u32,
}

impl Told<'_> {
    fn tell(&self, events: &[KvEvent]) {
        self.front
            .picker
            .cache_events(self.worker, self.rank, events);
    }

    /// Hands batches on until the stream ends.
    async fn listen(&self, mut subscriber: Subscriber, block_tokens: u32) -> zmtp::Lost {
        let mut order = Order::default();
        loop {
            match subscriber.receive().await {
                Ok(message) => self.tell(&order.events(&message, block_tokens)),
                Err(lost) => return lost,
            }
        }
    }
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.tell(&[KvEvent::Lost]);
    }
}

/// Notices what is missing.
#[derive(Debug, Default)]
struct Order {
    /// The number of the batch that must come next; none: whichever comes.
    next: Option<u64>,
}

impl Order {
    /// What a message tells. When batches before it are missing, or it cannot be understood, what was told before is void.
    fn events(&mut self, message: &[Bytes], block_tokens: u32) -> Vec<KvEvent> {
        let [_topic, number, payload] = message else {
            return self.lose();
        };
        let Ok(number) = <[u8; 8]>::try_from(number.as_ref()).map(u64::from_be_bytes) else {
            return self.lose();
        };
        let Ok(told) = batch::events(payload, block_tokens) else {
            return self.lose();
        };
        let mut events = Vec::with_capacity(told.len() + 1);
        if self.next != Some(number) {
            // The first batch of all is told to those who were there before the engine had anything to tell.
            events.push(KvEvent::Begins { whole: number == 0 });
        }
        self.next = number.checked_add(1);
        events.extend(told);
        events
    }

    fn lose(&mut self) -> Vec<KvEvent> {
        self.next = None;
        vec![KvEvent::Lost]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[0.0, [{"type": "AllBlocksCleared"}]]`
    const CLEARED: &[u8] = b"\x92\x00\x91\x81\xa4type\xb0AllBlocksCleared";

    fn message(number: u64) -> Vec<Bytes> {
        vec![
            Bytes::new(),
            Bytes::copy_from_slice(&number.to_be_bytes()),
            Bytes::from_static(CLEARED),
        ]
    }

    #[test]
    fn gaps_restarts_and_nonsense_void_what_was_told() {
        let mut order = Order::default();
        let begins = |whole| vec![KvEvent::Begins { whole }, KvEvent::Cleared];
        assert_eq!(order.events(&message(0), 4), begins(true));
        assert_eq!(order.events(&message(1), 4), [KvEvent::Cleared]);
        assert_eq!(order.events(&message(3), 4), begins(false), "2 is missing");
        assert_eq!(order.events(&message(4), 4), [KvEvent::Cleared]);
        assert_eq!(order.events(&message(0), 4), begins(true), "a restart");
        for broken in [
            &message(1)[..2],
            &[
                Bytes::new(),
                Bytes::from_static(b"1"),
                Bytes::from_static(CLEARED),
            ],
            &[
                Bytes::new(),
                message(1)[1].clone(),
                Bytes::from_static(b"\xc1"),
            ],
            &[],
        ] {
            assert_eq!(order.events(broken, 4), [KvEvent::Lost]);
        }
        assert_eq!(order.events(&message(2), 4), begins(false));
        assert_eq!(order.events(&message(u64::MAX), 4), begins(false));
        assert_eq!(order.events(&message(0), 4), begins(true));
    }
}
