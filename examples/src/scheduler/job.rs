//! What the server hands to the scheduler, and what it gets back.

use tokio::sync::mpsc;

use crate::pd::Bootstrap;

/// One sequence to generate. A batch is several jobs.
#[derive(Debug)]
pub struct Job {
    /// The request's id, unique among live requests; `/abort_request` names it.
    pub rid: String,
    /// The prompt, at least one token, all below `VOCAB`.
    pub prompt: Vec<u32>,
    /// How to continue it.
    pub sampling: Sampling,
    /// Where the other leg is; present exactly when the worker has a PD role.
    pub bootstrap: Option<Bootstrap>,
    /// Where tokens go. Its capacity must be [`Sampling::events_max`]: then the scheduler never waits for a reader.
    pub events: mpsc::Sender<Event>,
}

/// How tokens are chosen and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens to generate at most, at least 1.
    pub max_new_tokens: usize,
    /// 0 is greedy. Otherwise tokens are drawn with `seed`, so that a run can be repeated.
    pub temperature: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// Texts that end the output; they are not part of it.
    pub stop: Vec<String>,
    /// Whether the end-of-sequence token is an ordinary one.
    pub ignore_eos: bool,
}

impl Sampling {
    /// Events that a job can cause: one per token, held-back text at the end, and the outcome.
    #[must_use]
    pub const fn events_max(&self) -> usize {
        self.max_new_tokens + 2
    }
}

/// One step of a job's life, in order; the last is always `Done`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was generated.
    Token {
        /// The token.
        id: u32,
        /// The text that became certain with it, perhaps none.
        text: String,
    },
    /// Text that was held back and belongs to the output after all.
    Tail(String),
    /// The job has ended.
    Done(Outcome),
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Why.
    pub finish: Finish,
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Prompt tokens whose KV was found in the prefix cache of the worker that computed the prompt.
    pub cached_tokens: usize,
    /// Decode role: prompt tokens kept from this worker's own prefix cache and therefore not transferred.
    pub decode_prefix_tokens: usize,
}

/// Why a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// `max_new_tokens` were generated.
    Length,
    /// The end-of-sequence token was generated.
    EndOfSequence(u32),
    /// A stop text appeared.
    StopText(String),
    /// It was stopped from outside.
    Aborted(Abort),
}

/// Who stopped a job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Abort {
    /// `/abort_request` named it.
    #[error("Abort by request.")]
    Requested,
    /// Nobody reads its answer any more.
    #[error("The client has gone away.")]
    ClientGone,
    /// The worker is stopping.
    #[error("The worker is shutting down.")]
    ShuttingDown,
    /// The PD transfer failed.
    #[error("{0}")]
    Transfer(#[from] crate::pd::TransferError),
    /// The decode found another room's row in its aux slot.
    #[error("Context corruption detected: room {expected} received the row of room {found}")]
    Corrupted {
        /// The request's room.
        expected: u64,
        /// The room in the row.
        found: u64,
    },
    /// The decode claims a prefix that the prompt does not have.
    #[error(
        "the decode side keeps {claimed} tokens, which is not a page-aligned part of a prompt of {prompt}"
    )]
    BadPrefix {
        /// Tokens that decode claims.
        claimed: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// The model could not compute it.
    #[error("the model failed: {0}")]
    Model(String),
}
