//! Replicas tell each other their bookings, so that several routers decide like one.
//!
//! Each replica serves its own bookings on a port of its own ([`serve`]) and follows every other one ([`follow_all`]): those in a
//! list, and those that a name resolves to, asked again every few seconds. What a replica told is forgotten as soon as its
//! stream ends. Lost gossip costs good choices and nothing else.
#![forbid(unsafe_code)]

mod follow;
mod serve;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::transport::ClientTlsConfig;

use crate::config::gossip::Gossip;
use crate::pick::Picker;
use crate::pool::tls::{self, TlsError};

pub use follow::follow_all;
pub use serve::{Door, serve};

/// Silence between two messages without news.
pub const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// A replica that is silent for this long is lost.
pub const SILENCE_MAX: Duration = Duration::from_secs(3);

/// Changes within this time are told together.
pub const COALESCE: Duration = Duration::from_millis(20);

/// Most replicas that are followed, and most followers.
pub const REPLICAS_MAX: usize = 64;

/// Largest message: [`NEWS_MAX`](crate::pick::feed::NEWS_MAX) bookings with long names.
pub const MESSAGE_BYTES_MAX: usize = 512 << 10;

/// The generated messages, client and server (see `proto/kvrouter/v1/gossip.proto`).
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    elided_lifetimes_in_paths,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code follows its generator's style; the protocol file documents every field"
)]
pub mod v1 {
    tonic::include_proto!("kvrouter.v1");
}

/// Why replicas cannot talk.
#[derive(Debug, thiserror::Error)]
pub enum TalkError {
    /// The port is taken, or not ours to take.
    #[error("cannot listen on port {port}")]
    Listen {
        /// The port.
        port: u16,
        /// What the system said.
        source: std::io::Error,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// All that is needed to tell other replicas and to listen to them. Neither has begun.
#[derive(Debug)]
pub struct Talk {
    settings: Gossip,
    door: Option<Door>,
    tls: Option<ClientTlsConfig>,
}

impl Talk {
    /// Reads the certificates, and listens on `host` if others are to be told.
    ///
    /// # Errors
    /// [`TalkError`]
    pub async fn prepare(settings: &Gossip, host: &str) -> Result<Self, TalkError> {
        let acceptor = settings
            .tls
            .as_ref()
            .map(tls::mutual_acceptor)
            .transpose()?;
        let client = settings.tls.as_ref().map(tls::mutual_client).transpose()?;
        let door = match settings.port {
            Some(port) => {
                let listener = TcpListener::bind((host, port)).await;
                Some(Door {
                    listener: listener.map_err(|source| TalkError::Listen { port, source })?,
                    token: settings.token.clone(),
                    tls: acceptor,
                })
            }
            None => None,
        };
        Ok(Self {
            settings: settings.clone(),
            door,
            tls: client,
        })
    }

    /// Where others are told, if they are.
    pub fn address(&self) -> Option<SocketAddr> {
        self.door.as_ref()?.listener.local_addr().ok()
    }

    /// Begins both in `background`.
    pub fn begin(self, picker: &Arc<Picker>, background: &mut JoinSet<()>) {
        let follows = self.settings.follows();
        if (self.door.is_some() || follows) && self.tls.is_none() {
            tracing::info!(
                "replicas talk in plain text; --gossip-certificate lets them know each other"
            );
        }
        if let Some(door) = self.door {
            background.spawn(serve(Arc::clone(picker), picker.replica(), door));
        }
        if follows {
            let siblings = Siblings::default();
            let picker = Arc::clone(picker);
            background.spawn(follow_all(picker, self.settings, self.tls, siblings));
        }
    }
}

/// Which replicas are followed now: one that is found under two addresses is followed once.
#[derive(Clone, Debug, Default)]
pub struct Siblings {
    known: Arc<Mutex<HashSet<u64>>>,
}

/// A replica that is followed until this is dropped.
#[derive(Debug)]
struct Sibling {
    siblings: Siblings,
    replica: u64,
}

impl Siblings {
    fn enter(&self, replica: u64) -> Option<Sibling> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        (known.len() < REPLICAS_MAX && known.insert(replica)).then(|| Sibling {
            siblings: self.clone(),
            replica,
        })
    }

    /// How many are followed.
    pub fn count(&self) -> usize {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.len()
    }
}

impl Drop for Sibling {
    fn drop(&mut self) {
        let mut known = self
            .siblings
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        known.remove(&self.replica);
    }
}
