//! Weights drawn from a seed, so that every process of a cluster has the same model without a download.
//!
//! Each tensor has its own ChaCha stream, numbered by its place in the model: its values depend on the seed, its
//! number and its size only. A random model says nothing sensible, but it must be *sensitive*: the next token has to
//! depend on every layer's keys and values, or a transfer that loses a page would go unseen. Hence the gains below.

use candle_core::{Device, Result, Tensor};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::ModelShape;
use crate::text::{EOS, VOCAB};

/// Every tensor of the model.
#[derive(Debug)]
pub(super) struct Weights {
    /// `[VOCAB, hidden]`.
    pub(super) embedding: Tensor,
    /// One per block, in order.
    pub(super) layers: Vec<LayerWeights>,
    /// `[hidden]`.
    pub(super) final_norm: Tensor,
    /// `[hidden, VOCAB]`; the transposed embedding when tied.
    pub(super) head: Tensor,
    /// `[VOCAB]`, see [`head_bias`].
    pub(super) head_bias: Tensor,
}

/// The tensors of one block. Matrices are `[in, out]`, so that a row vector is multiplied from the left.
#[derive(Debug)]
pub(super) struct LayerWeights {
    /// `[hidden]`.
    pub(super) attention_norm: Tensor,
    /// `[hidden]`.
    pub(super) ffn_norm: Tensor,
    /// `[head_dim]`.
    pub(super) q_norm: Tensor,
    /// `[head_dim]`.
    pub(super) k_norm: Tensor,
    /// `[hidden, q_heads * head_dim]`.
    pub(super) query: Tensor,
    /// `[hidden, kv_heads * head_dim]`.
    pub(super) key: Tensor,
    /// `[hidden, kv_heads * head_dim]`.
    pub(super) value: Tensor,
    /// `[q_heads * head_dim, hidden]`.
    pub(super) output: Tensor,
    /// `[hidden, ffn]`.
    pub(super) gate: Tensor,
    /// `[hidden, ffn]`.
    pub(super) up: Tensor,
    /// `[ffn, hidden]`.
    pub(super) down: Tensor,
}

/// The standard deviation of an embedding element: small, so that the blocks and not the last token decide.
const EMBEDDING_DEVIATION: f32 = 0.1;

/// The weight of every q and k norm: the scores get a deviation of its square, which makes heads look at few tokens.
const HEAD_NORM: f32 = 2.2;

/// Gain of the attention's output projection; above 1 because averaging over tokens makes its input small.
const ATTENTION_GAIN: f32 = 4.0;

/// The deviation of a logit before the bias.
const LOGIT_DEVIATION: f32 = 4.0;

impl Weights {
    /// Draws all tensors for `shape` from `seed`.
    pub(super) fn draw(shape: &ModelShape, seed: u64) -> Result<Self> {
        let mut source = Source { seed, next: 0 };
        let embedding = source.matrix(VOCAB, shape.hidden, EMBEDDING_DEVIATION)?;
        let layers = (0..shape.layers)
            .map(|_| source.layer(shape))
            .collect::<Result<_>>()?;
        let head = if shape.tied {
            (embedding.t()?.contiguous()? * f64::from(LOGIT_DEVIATION))?
        } else {
            source.projection(shape.hidden, VOCAB, LOGIT_DEVIATION)?
        };
        Ok(Self {
            embedding,
            layers,
            final_norm: Tensor::full(1.0_f32, shape.hidden, &Device::Cpu)?,
            head,
            head_bias: Tensor::from_vec(head_bias(), VOCAB, &Device::Cpu)?,
        })
    }
}

/// Hands out the streams of one seed.
struct Source {
    seed: u64,
    next: u64,
}

impl Source {
    fn layer(&mut self, shape: &ModelShape) -> Result<LayerWeights> {
        let (hidden, dim) = (shape.hidden, shape.head_dim);
        let constant = |value: f32, len: usize| Tensor::full(value, len, &Device::Cpu);
        Ok(LayerWeights {
            attention_norm: constant(1.0, hidden)?,
            ffn_norm: constant(1.0, hidden)?,
            q_norm: constant(HEAD_NORM, dim)?,
            k_norm: constant(HEAD_NORM, dim)?,
            query: self.projection(hidden, shape.q_heads * dim, 1.0)?,
            key: self.projection(hidden, shape.kv_heads * dim, 1.0)?,
            value: self.projection(hidden, shape.kv_heads * dim, 1.0)?,
            output: self.projection(shape.q_heads * dim, hidden, ATTENTION_GAIN)?,
            gate: self.projection(hidden, shape.ffn, 1.0)?,
            up: self.projection(hidden, shape.ffn, 1.0)?,
            down: self.projection(shape.ffn, hidden, 1.0)?,
        })
    }

    /// A matrix that keeps the deviation of a unit input, times `gain`.
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    fn projection(&mut self, rows: usize, columns: usize, gain: f32) -> Result<Tensor> {
        self.matrix(rows, columns, gain / (rows as f32).sqrt())
    }

    /// Uniform values of the given standard deviation, from a stream of their own.
    fn matrix(&mut self, rows: usize, columns: usize, deviation: f32) -> Result<Tensor> {
        let mut stream = ChaCha8Rng::seed_from_u64(self.seed);
        stream.set_stream(self.next);
        self.next += 1;
        let reach = deviation * 3.0_f32.sqrt();
        let values = (0..rows * columns)
            .map(|_| reach * signed_unit(stream.next_u32()))
            .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu)
    }
}

/// Maps 24 random bits to `[-1, 1)`; exact, so equal on every machine.
#[expect(clippy::cast_precision_loss, reason = "24 bits fit the mantissa")]
fn signed_unit(bits: u32) -> f32 {
    (bits >> 8) as f32 / 8_388_608.0 - 1.0
}

/// Leans towards readable text: without it nine in ten bytes of a random model are not valid UTF-8. Some invalid
/// bytes and an occasional end of sequence remain possible, as with a real model.
fn head_bias() -> Vec<f32> {
    (0..)
        .take(VOCAB)
        .map(|token| match token {
            0x20 => 8.0,
            0x61..=0x7a => 4.0,
            0x21..=0x7e => 0.0,
            0x0a => -1.0,
            EOS => -4.0,
            0x80..=0xff => -6.0,
            _ => -20.0,
        })
        .collect()
}
