//! A small decoder-only transformer in the style of Qwen3, computed so that its results can be compared bit for bit.
//!
//! RMSNorm, grouped-query attention with RoPE and q/k norm, a SwiGLU MLP. What the worker has to prove is that a
//! request served by two processes gives the very bytes that one process gives, so the arithmetic of a token must not
//! depend on who computes it, how the prompt was cut into chunks, or how many ranks share the heads:
//!
//! * every matrix product sums in one fixed order (`product.rs`), so a token's result does not depend on the tokens it
//!   is computed with; all other operations over a chunk (norms, rotary, activation) never mix rows;
//! * a token at position `p` attends to exactly the rows `0..=p`, one head at a time;
//! * heads are joined in global order before the one output projection: no partial sums are added across ranks.
//!
//! A rank therefore owns the *memory* of its KV heads, which is what a transfer moves; the arithmetic is shared.
#![forbid(unsafe_code)]

mod product;
mod weights;

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::rope;

use crate::cache::PagedKv;
use crate::text::VOCAB;
use product::{product, product_transposed};
use weights::{LayerWeights, Weights};

/// The sizes of a model. Two workers exchange KV only if all of them agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key/value heads of the whole model, before sharding.
    pub kv_heads: usize,
    /// Elements of one head; even, because rotary embedding turns pairs.
    pub head_dim: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Longest sequence in tokens, prompt and output together.
    pub context: usize,
    /// Whether the output head is the embedding table.
    pub tied: bool,
}

impl Default for ModelShape {
    fn default() -> Self {
        Self {
            layers: 4,
            hidden: 128,
            q_heads: 8,
            kv_heads: 4,
            head_dim: 32,
            ffn: 384,
            context: 4096,
            tied: false,
        }
    }
}

/// Why a shape cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShapeError {
    /// A size is zero.
    #[error("every size of the model must be at least 1")]
    Zero,
    /// The query heads do not divide evenly over the KV heads.
    #[error("{q_heads} query heads cannot be grouped over {kv_heads} KV heads")]
    Grouping {
        /// Query heads asked for.
        q_heads: usize,
        /// KV heads asked for.
        kv_heads: usize,
    },
    /// Rotary embedding needs pairs.
    #[error("head_dim must be even, not {0}")]
    OddHead(usize),
}

impl ModelShape {
    /// The smallest model whose output still depends on every page of its cache; about a thirtieth of the usual work.
    #[must_use]
    pub const fn small() -> Self {
        Self {
            layers: 2,
            hidden: 64,
            q_heads: 4,
            kv_heads: 4,
            head_dim: 16,
            ffn: 64,
            context: 1024,
            tied: false,
        }
    }

    /// Checks the relations between the sizes.
    ///
    /// # Errors
    /// A [`ShapeError`] that names the relation which does not hold.
    pub const fn check(&self) -> std::result::Result<(), ShapeError> {
        let Self {
            layers,
            hidden,
            q_heads,
            kv_heads,
            head_dim,
            ffn,
            context,
            tied: _,
        } = *self;
        if layers == 0 || hidden == 0 || q_heads == 0 || kv_heads == 0 {
            return Err(ShapeError::Zero);
        }
        if head_dim == 0 || ffn == 0 || context == 0 {
            return Err(ShapeError::Zero);
        }
        if q_heads % kv_heads != 0 {
            return Err(ShapeError::Grouping { q_heads, kv_heads });
        }
        if head_dim % 2 != 0 {
            return Err(ShapeError::OddHead(head_dim));
        }
        Ok(())
    }

    /// Query heads that share one KV head.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }
}

/// The model: immutable weights and the rotary tables.
#[derive(Debug)]
pub struct Model {
    shape: ModelShape,
    weights: Weights,
    cos: Tensor,
    sin: Tensor,
}

/// Makes the calling thread compute alone. The tensor library spreads even a 32-element norm over a thread pool, which
/// costs more in wake-ups than the whole token; a pool whose only member is the caller runs the same code in place.
/// Call it once on each thread that calls [`Model::forward`]; without it results are the same, only slower.
pub fn compute_alone() {
    // A thread that is a member of a pool already is refused, and has what it needs.
    let _already = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .use_current_thread()
        .build();
}

/// The epsilon of every RMSNorm.
const NORM_EPS: f32 = 1e-6;

/// The base of the rotary frequencies, as in the Qwen3 models.
const ROPE_THETA: f64 = 1_000_000.0;

impl Model {
    /// Draws the weights from `seed`. The same seed and shape give the same model in every process.
    ///
    /// # Errors
    /// When the tensor library refuses an allocation or a shape; `shape` must have passed [`ModelShape::check`].
    pub fn from_seed(shape: ModelShape, seed: u64) -> Result<Self> {
        let (cos, sin) = rotary_tables(&shape)?;
        Ok(Self {
            shape,
            weights: Weights::draw(&shape, seed)?,
            cos,
            sin,
        })
    }

    /// The sizes of the model.
    #[must_use]
    pub const fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Computes `tokens` at positions `start..`, writing their keys and values to `kv` and reading everything before
    /// them from it. Returns the logits of the last token, one per entry of the vocabulary.
    ///
    /// # Errors
    /// When the tensor library fails; a chunk that is empty or leaves the context is such a failure.
    pub fn forward(&self, tokens: &[u32], start: usize, kv: &PagedKv<'_>) -> Result<Vec<f32>> {
        let end = start + tokens.len();
        if tokens.is_empty() || end > self.shape.context {
            candle_core::bail!(
                "a chunk of {} tokens at {start} is outside the context",
                tokens.len()
            )
        }
        let ids = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?;
        let mut x = self.weights.embedding.index_select(&ids, 0)?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, NORM_EPS)?;
            x = (x + self.attend(index, layer, &normed, start, kv)?)?;
            let normed = rms_norm(&x, &layer.ffn_norm, NORM_EPS)?;
            x = (x + self.mlp(layer, &normed)?)?;
        }
        let last = x.narrow(0, tokens.len() - 1, 1)?.contiguous()?;
        let last = rms_norm(&last, &self.weights.final_norm, NORM_EPS)?;
        let logits = last
            .matmul(&self.weights.head)?
            .broadcast_add(&self.weights.head_bias)?;
        debug_assert_eq!(logits.dims(), [1, VOCAB]);
        logits.flatten_all()?.to_vec1()
    }

    /// Attention of a chunk: project and store its keys and values, then let each token look back.
    fn attend(
        &self,
        index: usize,
        layer: &LayerWeights,
        x: &Tensor,
        start: usize,
        kv: &PagedKv<'_>,
    ) -> Result<Tensor> {
        let count = x.dim(0)?;
        let q = self.project(layer, x, start, index, kv)?;
        let cached = kv.gather(index, start + count);
        let rows = (start + count, self.shape.head_dim);
        let heads: Vec<(Tensor, Tensor)> = cached
            .into_iter()
            .map(|(k, v)| {
                let k = Tensor::from_vec(k, rows, &Device::Cpu)?;
                Ok((k, Tensor::from_vec(v, rows, &Device::Cpu)?))
            })
            .collect::<Result<_>>()?;
        let mut outputs = Vec::with_capacity(count);
        for t in 0..count {
            outputs.push(self.look_back(&q.narrow(0, t, 1)?, &heads, start + t + 1)?);
        }
        product(&Tensor::cat(&outputs, 0)?, &layer.output)
    }

    /// Projects the chunk, applies the q/k norm and the rotation, stores keys and values, and returns the queries as
    /// `[token, q_head, head_dim]`.
    fn project(
        &self,
        layer: &LayerWeights,
        x: &Tensor,
        start: usize,
        index: usize,
        kv: &PagedKv<'_>,
    ) -> Result<Tensor> {
        let count = x.dim(0)?;
        let q = self.rotate(&product(x, &layer.query)?, &layer.q_norm, start)?;
        let k = self.rotate(&product(x, &layer.key)?, &layer.k_norm, start)?;
        let k: Vec<f32> = k.flatten_all()?.to_vec1()?;
        let v: Vec<f32> = product(x, &layer.value)?.flatten_all()?.to_vec1()?;
        debug_assert_eq!(v.len(), count * self.shape.kv_heads * self.shape.head_dim);
        kv.write(index, start, &k, &v);
        Ok(q)
    }

    /// Normalises each head and turns it by its token's position: `[token, head * dim]` to `[token, head, dim]`.
    fn rotate(&self, heads: &Tensor, norm: &Tensor, start: usize) -> Result<Tensor> {
        let ((count, width), dim) = (heads.dims2()?, self.shape.head_dim);
        let normed = rms_norm(&heads.reshape((count, width / dim, dim))?, norm, NORM_EPS)?;
        let by_head = normed.unsqueeze(0)?.transpose(1, 2)?.contiguous()?;
        let cos = self.cos.narrow(0, start, count)?;
        let sin = self.sin.narrow(0, start, count)?;
        rope(&by_head, &cos, &sin)?
            .transpose(1, 2)?
            .squeeze(0)?
            .contiguous()
    }

    /// One token's attention over the first `visible` rows: `[1, q_head, dim]` to `[1, q_head * dim]`.
    fn look_back(&self, q: &Tensor, heads: &[(Tensor, Tensor)], visible: usize) -> Result<Tensor> {
        let (group, dim) = (self.shape.group(), self.shape.head_dim);
        let q = q.squeeze(0)?;
        let mut scores = Vec::with_capacity(heads.len());
        for (h, (keys, _)) in heads.iter().enumerate() {
            let rows = q.narrow(0, h * group, group)?;
            scores.push(product_transposed(&rows, &keys.narrow(0, 0, visible)?)?);
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "a head has at most some hundred elements"
        )]
        let scale = 1.0 / (dim as f64).sqrt();
        let probabilities = softmax_last_dim(&(Tensor::cat(&scores, 0)? * scale)?)?;
        let mut joined = Vec::with_capacity(heads.len());
        for (h, (_, values)) in heads.iter().enumerate() {
            let rows = probabilities.narrow(0, h * group, group)?;
            joined.push(product(&rows, &values.narrow(0, 0, visible)?)?);
        }
        Tensor::cat(&joined, 0)?.reshape((1, heads.len() * group * dim))
    }

    /// SwiGLU.
    fn mlp(&self, layer: &LayerWeights, x: &Tensor) -> Result<Tensor> {
        let gate = silu(&product(x, &layer.gate)?)?;
        product(&(gate * product(x, &layer.up)?)?, &layer.down)
    }
}

/// Cosines and sines for every position, `[context, head_dim / 2]`.
fn rotary_tables(shape: &ModelShape) -> Result<(Tensor, Tensor)> {
    let half = shape.head_dim / 2;
    let mut angles = Vec::with_capacity(shape.context * half);
    for position in 0..shape.context {
        for pair in 0..half {
            #[expect(
                clippy::cast_precision_loss,
                reason = "positions and pairs are far below 2^52"
            )]
            let angle = position as f64 * ROPE_THETA.powf(-(pair as f64) / half as f64);
            angles.push(angle);
        }
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounding to f32 is the intent"
    )]
    let rounded = |f: fn(f64) -> f64| angles.iter().map(|a| f(*a) as f32).collect::<Vec<_>>();
    let size = (shape.context, half);
    Ok((
        Tensor::from_vec(rounded(f64::cos), size, &Device::Cpu)?,
        Tensor::from_vec(rounded(f64::sin), size, &Device::Cpu)?,
    ))
}

#[cfg(test)]
mod tests;
