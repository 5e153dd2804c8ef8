//! Follows other replicas.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use super::v1::gossip_client::GossipClient;
use super::v1::{Booking, FollowRequest, FollowResponse};
use super::{MESSAGE_BYTES_MAX, REPLICAS_MAX, SILENCE_MAX, Sibling, Siblings};
use crate::config::gossip::Gossip;
use crate::pick::Picker;
use crate::schedule::board::{Key, Record};

/// How often a name is resolved anew.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(5);

/// Shortest and longest pause between two attempts.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// An address that turned out to be this router itself, or a replica that is followed already, is tried again after this.
const SELF_PAUSE: Duration = Duration::from_secs(10);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest name of a worker that is believed.
const NAME_BYTES_MAX: usize = 512;

/// Longer ago than this nothing was dispatched.
const AGE_MAX_S: f64 = 1e9;

/// Follows all replicas that the settings name, until it is dropped; over TLS with `tls`.
pub async fn follow_all(
    picker: Arc<Picker>,
    settings: Gossip,
    tls: Option<ClientTlsConfig>,
    siblings: Siblings,
) {
    let mut tasks = JoinSet::new();
    let mut followed: HashMap<String, AbortHandle> = HashMap::new();
    loop {
        if let Some(wanted) = addresses(&settings).await {
            followed.retain(|address, task| {
                let stays = wanted.contains_key(address);
                if !stays {
                    task.abort();
                }
                stays
            });
            for (address, name) in wanted {
                followed.entry(address).or_insert_with_key(|address| {
                    let tls = tls.clone().map(|tls| tls.domain_name(name));
                    let follower = Follower {
                        tls,
                        picker: Arc::clone(&picker),
                        settings: settings.clone(),
                        siblings: siblings.clone(),
                        address: address.clone(),
                    };
                    tasks.spawn(follower.run())
                });
            }
        }
        while tasks.try_join_next().is_some() {}
        tokio::time::sleep(RESOLVE_INTERVAL).await;
    }
}

/// Where replicas may be, and the names that their certificates must carry; none: the name cannot be resolved now, and what is
/// followed stays.
async fn addresses(settings: &Gossip) -> Option<BTreeMap<String, String>> {
    let host = |address: &str| {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        host.trim_matches(['[', ']']).to_owned()
    };
    let peers = settings.peers.iter();
    let mut all: BTreeMap<_, _> = peers.map(|peer| (peer.clone(), host(peer))).collect();
    if let Some(name) = &settings.dns {
        match tokio::net::lookup_host(name).await {
            Ok(found) => all.extend(found.map(|address| (address.to_string(), host(name)))),
            Err(error) => {
                tracing::warn!(name, %error, "the other replicas cannot be looked up");
                return None;
            }
        }
    }
    // The own address is among them.
    while all.len() > REPLICAS_MAX + 1 {
        all.pop_last();
    }
    Some(all)
}

struct Follower {
    picker: Arc<Picker>,
    settings: Gossip,
    siblings: Siblings,
    address: String,
    tls: Option<ClientTlsConfig>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("could not connect")]
    Connect(#[from] tonic::transport::Error),
    #[error("the stream failed: {0}")]
    Stream(#[from] Box<tonic::Status>),
    #[error("it ended the stream")]
    Ended,
    #[error("nothing came for {SILENCE_MAX:?}")]
    Silent,
    #[error("it changed its number within a stream")]
    Changed,
    /// This router, or one that is followed already.
    #[error("this replica need not be followed")]
    Known,
}

/// A replica whose bookings end with this.
struct Followed<'a> {
    picker: &'a Picker,
    sibling: Sibling,
}

impl Drop for Followed<'_> {
    fn drop(&mut self) {
        self.picker.drop_replica(self.sibling.replica);
    }
}

impl Follower {
    async fn run(self) {
        let mut pause = PAUSE_MIN;
        loop {
            let mut stood = false;
            let lost = self.attempt(&mut stood).await;
            if stood {
                pause = PAUSE_MIN;
                tracing::warn!(address = self.address, error = %lost, "lost a replica");
            } else {
                tracing::debug!(address = self.address, error = %lost, "a replica cannot be followed");
            }
            if matches!(lost, Lost::Known) {
                pause = SELF_PAUSE;
            }
            tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * rand::random::<f64>())).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// One stream, until it ends; `stood` tells whether it began.
    async fn attempt(&self, stood: &mut bool) -> Lost {
        match self.stream(stood).await {
            Ok(never) => match never {},
            Err(lost) => lost,
        }
    }

    async fn stream(&self, stood: &mut bool) -> Result<std::convert::Infallible, Lost> {
        let mut messages = timeout(CONNECT_TIMEOUT, self.open())
            .await
            .map_err(|_| Lost::Silent)??;
        let mut followed: Option<Followed<'_>> = None;
        loop {
            let message = timeout(SILENCE_MAX, messages.message())
                .await
                .map_err(|_| Lost::Silent)?
                .map_err(Box::new)?
                .ok_or(Lost::Ended)?;
            let followed = match &mut followed {
                Some(followed) => followed,
                None => {
                    let sibling = self.meet(message.replica).ok_or(Lost::Known)?;
                    *stood = true;
                    tracing::info!(address = self.address, "following a replica");
                    followed.insert(Followed {
                        picker: &self.picker,
                        sibling,
                    })
                }
            };
            if message.replica != followed.sibling.replica {
                return Err(Lost::Changed);
            }
            take_in(&self.picker, message);
        }
    }

    fn meet(&self, replica: u64) -> Option<Sibling> {
        if replica == self.picker.replica() {
            return None;
        }
        self.siblings.enter(replica)
    }

    async fn open(&self) -> Result<tonic::Streaming<FollowResponse>, Lost> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", self.address))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.clone())?;
        }
        let channel: Channel = endpoint.connect().await?;
        let mut client = GossipClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let mut request = tonic::Request::new(FollowRequest {});
        if let Some(token) = &self.settings.token {
            let value = token.authorization().parse();
            let value = value.expect("invariant: a token is visible ASCII");
            request.metadata_mut().insert("authorization", value);
        }
        let response = client.follow(request).await.map_err(Box::new)?;
        Ok(response.into_inner())
    }
}

fn take_in(picker: &Picker, message: FollowResponse) {
    let replica = message.replica;
    let bookings = message.bookings.into_iter();
    let records: Vec<Record> = bookings.filter_map(|one| record(replica, one)).collect();
    picker.hear(replica, message.begins, &records, &message.ended);
}

/// A booking that makes sense.
fn record(replica: u64, booking: Booking) -> Option<Record> {
    let names = [&booking.prefill, &booking.decode];
    if names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
        return None;
    }
    let age = Some(booking.age_s).filter(|age| (0.0..AGE_MAX_S).contains(age))?;
    Some(Record {
        key: Key {
            replica,
            number: booking.number,
        },
        prefill: booking.prefill,
        decode: booking.decode,
        dp_rank: booking.dp_rank,
        compute_tokens: booking.compute_tokens,
        kv_bytes: booking.kv_bytes,
        kv_tokens: booking.kv_tokens,
        age: Duration::try_from_secs_f64(age).ok()?,
        ready_in_s: booking.ready_in_s,
        ready_known: booking.ready_known,
        transferred: booking.transferred,
    })
}
