//! What the two sides of a trial say to each other, as JSON in messages of the exchange.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::door::Door;
use crate::transport::verbs::qp::QpAddress;

/// Queue pairs of an endpoint: four for traffic, one without receives, one for a wrong key.
pub(super) const QUEUE_PAIRS: usize = 6;
/// Queue pairs for traffic.
pub(super) const TRAFFIC: usize = 4;
/// The one without receives.
pub(super) const STARVED: usize = 4;
/// The one for a wrong key.
pub(super) const MISLED: usize = 5;

/// One end of a queue pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    gid: [u8; 16],
    lid: u16,
    qp_num: u32,
    psn: u32,
}

impl From<QpAddress> for End {
    fn from(address: QpAddress) -> Self {
        let QpAddress {
            gid,
            lid,
            qp_num,
            psn,
        } = address;
        Self {
            gid,
            lid,
            qp_num,
            psn,
        }
    }
}

impl From<&End> for QpAddress {
    fn from(end: &End) -> Self {
        Self {
            gid: end.gid,
            lid: end.lid,
            qp_num: end.qp_num,
            psn: end.psn,
        }
    }
}

/// An endpoint as its peer needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Card {
    /// Name of the device that the *reader* is to use.
    pub(super) device: String,
    /// [`QUEUE_PAIRS`] ends, in order; none where rdma_cm connects them.
    pub(super) ends: Vec<End>,
    /// Path MTU as verbs numbers it.
    pub(super) mtu: u32,
    /// Address of the memory that may be written.
    pub(super) address: u64,
    /// Its key.
    pub(super) rkey: u32,
}

/// What the asking side wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Order {
    /// Make an endpoint that answers this one, and say what it is.
    Open(Card),
    /// Make an endpoint of this device that waits for rdma_cm connections, and say where.
    Listen {
        /// The device.
        device: String,
    },
    /// Take the connections, which come now.
    Admit,
    /// Wait for a SEND on the first queue pair, then compare so many bytes with the pattern.
    Compare {
        /// How many.
        bytes: usize,
    },
    /// Answer so many SENDs on the first queue pair with a SEND each.
    Answer {
        /// How many.
        count: usize,
    },
    /// Wait for one SEND on each of the first queue pairs.
    Await {
        /// How many of them.
        queue_pairs: usize,
    },
}

/// What the serving side says to an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reply {
    /// Where it waits for connections.
    Listens(Door),
    /// The endpoint that was made.
    Opened(Card),
    /// Done as asked.
    Done,
    /// The first byte that differs.
    Differs(usize),
    /// Why it could not be done.
    Failed(String),
}

/// The byte that belongs at an offset. Its period is a prime, so that a shift by any page or packet shows.
pub(super) fn pattern(offset: usize) -> u8 {
    u8::try_from(offset % 251).expect("invariant: below 251") ^ 0x5a
}
