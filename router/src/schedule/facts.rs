//! What is told about a worker when it joins.
#![forbid(unsafe_code)]

/// Most workers of one role that a board holds; a fleet of more is served by several pools.
pub const WORKERS_MAX: usize = 256;

/// Most data-parallel ranks of one worker that are told apart.
pub const RANKS_MAX: u32 = 64;

/// A worker on one board. Never given twice, not even after the worker is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub(super) u32);

impl WorkerId {
    /// The number alone, for logs and metrics.
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes the prompt's KV cache.
    Prefill,
    /// Generates from it.
    Decode,
}

/// What is known of a worker before anything was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Its name, the same on every router replica: for example `10.0.0.1:30000`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Data-parallel ranks, from 1 to [`RANKS_MAX`].
    pub dp_size: u32,
    /// Tensor-parallel ranks that send one request's KV cache side by side, each as a source of samples.
    pub senders: u32,
    /// Bytes of KV cache per token, over all its tensor-parallel ranks.
    pub kv_bytes_per_token: u64,
    /// Tokens per page; a request's KV cache is rounded up to whole pages.
    pub page_tokens: u64,
    /// Nominal bandwidth of its network cards in bytes per second, over all ranks of one request.
    pub bytes_per_s: f64,
    /// Nominal prefill speed of one data-parallel rank in tokens per second.
    pub prefill_tokens_per_s: f64,
    /// Tokens that its KV pool holds; none: unknown, which disables its admission gate.
    pub kv_tokens_max: Option<u64>,
    /// Where it stands (rack, zone): workers of one zone have the full bandwidth between them.
    pub zone: Option<String>,
}

impl Facts {
    /// A worker of this role with one rank, 128 KiB of KV cache per token in pages of 1 token, 25 GB/s and 10 000
    /// tokens/s: a guess that measurements replace.
    pub fn new(name: impl Into<String>, role: Role) -> Self {
        Self {
            name: name.into(),
            role,
            dp_size: 1,
            senders: 1,
            kv_bytes_per_token: 128 << 10,
            page_tokens: 1,
            bytes_per_s: 25e9,
            prefill_tokens_per_s: 10_000.0,
            kv_tokens_max: None,
            zone: None,
        }
    }

    /// Tokens of the whole pages that hold `tokens`.
    pub const fn page_rounded(&self, tokens: u64) -> u64 {
        let page = if self.page_tokens == 0 {
            1
        } else {
            self.page_tokens
        };
        tokens.div_ceil(page).saturating_mul(page)
    }

    /// Whether every number can be used in arithmetic.
    pub(super) fn is_sane(&self) -> bool {
        let positive = |number: f64| number.is_finite() && number > 0.0;
        (1..=RANKS_MAX).contains(&self.dp_size)
            && positive(self.bytes_per_s)
            && positive(self.prefill_tokens_per_s)
    }
}
