//! What is asked of the scheduler.
#![forbid(unsafe_code)]

use super::facts::WorkerId;

/// Bytes of text per token where nobody counted them: typical for the byte-pair encodings of today's models.
pub const BYTES_PER_TOKEN: u64 = 4;

/// A request, as far as the choice of its workers depends on it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// Tokens of the prompt, counted or guessed.
    pub prompt_tokens: u64,
    /// Tokens that its answers are expected to grow to, for the decode's KV pool.
    pub output_tokens: u64,
    /// The prompt in [`chunks_of_bytes`](super::prefix::chunks_of_bytes); empty: no prefix is looked for.
    pub chunks: &'a [u64],
    /// The prompt in [`chunks_of_tokens`](super::prefix::chunks_of_tokens), where its tokens are known; used with
    /// workers that publish their cache's events.
    pub blocks: &'a [u64],
    /// Tokens per entry of `blocks`.
    pub block_tokens: u64,
    /// Hash of the sticky key (routing key, conversation).
    pub sticky: Option<u64>,
    /// Below 0: may be held or shed before others.
    pub priority: i32,
    /// Workers that must not serve it: those that just failed it.
    pub exclude: &'a [WorkerId],
    /// The only prefills that may serve it.
    pub prefill_subset: Option<&'a [WorkerId]>,
    /// The only decodes that may serve it.
    pub decode_subset: Option<&'a [WorkerId]>,
    /// A number of its own; chance is drawn from the board's seed and this.
    pub stream: u64,
}

impl Request<'_> {
    /// A guess of the tokens in a prompt of so many bytes.
    pub const fn tokens_of_bytes(bytes: u64) -> u64 {
        bytes.div_ceil(BYTES_PER_TOKEN)
    }
}
