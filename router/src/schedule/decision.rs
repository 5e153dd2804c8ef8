//! The answer of the scheduler, with its reasons.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::facts::WorkerId;
use super::policy::Policy;

/// Most pairs that a decision names besides its own.
pub const ALTERNATIVES_MAX: usize = 4;

/// The parts of a predicted time to the first token, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// In the prefill's queue.
    pub wait_s: f64,
    /// Computing the prompt.
    pub compute_s: f64,
    /// Until both the prefill's egress and the decode's ingress are free.
    pub wire_wait_s: f64,
    /// The transfer itself.
    pub transfer_s: f64,
    /// Until decode has taken it into a batch and computed one step.
    pub admission_s: f64,
}

impl Prediction {
    /// The parts, in the order of their declaration.
    pub const fn parts_s(&self) -> [f64; 5] {
        [
            self.wait_s,
            self.compute_s,
            self.wire_wait_s,
            self.transfer_s,
            self.admission_s,
        ]
    }

    /// The whole time to the first token.
    pub fn ttft_s(&self) -> f64 {
        self.wait_s + self.compute_s + self.wire_wait_s + self.transfer_s + self.admission_s
    }
}

/// A pair that was considered and not taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alternative {
    /// The prefill.
    pub prefill: WorkerId,
    /// The decode.
    pub decode: WorkerId,
    /// Its predicted time to the first token in seconds.
    pub ttft_s: f64,
    /// That and its penalties; the lowest is taken.
    pub cost_s: f64,
}

/// Who shall serve a request, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The prefill.
    pub prefill: WorkerId,
    /// The decode.
    pub decode: WorkerId,
    /// The prefill's data-parallel rank, for the room number: `room % dp_size == dp_rank`.
    pub dp_rank: u32,
    /// The prefill's data-parallel ranks.
    pub dp_size: u32,
    /// When the first token is expected, in parts.
    pub prediction: Prediction,
    /// The prediction and the penalties.
    pub cost_s: f64,
    /// Who decided.
    pub policy: Policy,
    /// Whether the sticky key decided.
    pub sticky: bool,
    /// Tokens that the prefill is believed to hold already.
    pub cached_tokens: u64,
    /// Age of the prefill's picture of its links; none: unknown or too old, so bookings alone were used.
    pub sample_age: Option<Duration>,
    /// How many pairs might have served it.
    pub candidates: usize,
    /// Others that were looked at, the best first. A pair that could not win may not have been looked at.
    pub alternatives: Vec<Alternative>,
    pub(super) compute_tokens: u64,
    pub(super) kv_bytes: u64,
    pub(super) kv_tokens: u64,
}

impl Decision {
    /// Bytes of KV cache that this request will move.
    pub const fn kv_bytes(&self) -> u64 {
        self.kv_bytes
    }
}

/// Why no pair was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPair {
    /// No prefill is ready; or, with `ready` above 0, none of the ready ones is allowed for this request.
    #[error("no prefill worker can serve this request ({ready} are ready)")]
    Prefill {
        /// Ready prefills.
        ready: usize,
    },
    /// No decode is ready; or, with `ready` above 0, none of the ready ones is allowed for this request.
    #[error("no decode worker can serve this request ({ready} are ready)")]
    Decode {
        /// Ready decodes.
        ready: usize,
    },
    /// Every prefill that may serve it has as many bytes before its wire as allowed. Hold the request; a transfer's end
    /// frees it.
    #[error("all prefill workers have their fill of bytes to send; retry in {} ms", retry_after.as_millis())]
    EgressFull {
        /// When the first transfer is expected to end.
        retry_after: Duration,
    },
    /// Every decode that may serve it has its KV pool booked. Hold the request; the end of a generation frees it.
    #[error("the KV pools of all decode workers are booked; retry in {} ms", retry_after.as_millis())]
    KvFull {
        /// A guess of when one has room.
        retry_after: Duration,
    },
}

/// What ends a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreedBy {
    /// A worker that becomes ready.
    Ready,
    /// The end of a transfer.
    Transfer,
    /// The end of a generation.
    Generation,
}

impl NoPair {
    /// Which event may make the same request succeed.
    pub const fn freed_by(&self) -> FreedBy {
        match self {
            Self::Prefill { .. } | Self::Decode { .. } => FreedBy::Ready,
            Self::EgressFull { .. } => FreedBy::Transfer,
            Self::KvFull { .. } => FreedBy::Generation,
        }
    }

    /// Whether the request should wait in the router, and how long at most before it asks again.
    pub const fn hold(&self) -> Option<Duration> {
        match self {
            Self::Prefill { .. } | Self::Decode { .. } => None,
            Self::EgressFull { retry_after } | Self::KvFull { retry_after } => Some(*retry_after),
        }
    }
}
