//! The Llama family as a function of its parameters: tokens to logits, tokens to loss.
//!
//! Arithmetic and names follow `transformers.LlamaForCausalLM`. A block is
//! `x + O·attention(rope(Q·norm(x)), rope(K·norm(x)), V·norm(x))`, then `x + D·(silu(G·norm(x)) ⊙ U·norm(x))`; rotary embedding
//! turns the pairs (i, i + head/2), Hugging Face's half-split convention; key and value heads are shared by groups of
//! query heads. This file states the model in Burn's own operations, for every device; the same blocks
//! fused by hand for the CPU are in [`crate::kernels`].
//!
//! Shape suffixes: b samples, t positions, n = b·t rows, h hidden, a attention heads, g key-value heads, r query heads
//! of one group, d head size, f feed-forward, v vocabulary.

use crate::kernels::{self, AttentionSpec};
use base::ModelShape;
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData, activation};
use engine::Precision;

/// Which implementation of the blocks is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKernels {
    /// Burn's own operations, one after the other: any device.
    Composed,
    /// One hand-written forward and backward per block: `flex`.
    Fused,
}

/// Tensors of one block, in canonical order.
const BLOCK_TENSORS: usize = 9;

/// The model's parameters in canonical order; norm weights are rows `[1, h]` so that all have rank 2.
pub(crate) struct Parameters<'a> {
    tensors: &'a [Tensor<2>],
    layers: usize,
}

/// Parameters of one block, `[out, in]` as Hugging Face stores them.
pub(crate) struct Block {
    pub(crate) query: Tensor<2>,
    pub(crate) key: Tensor<2>,
    pub(crate) value: Tensor<2>,
    pub(crate) output: Tensor<2>,
    pub(crate) gate: Tensor<2>,
    pub(crate) up: Tensor<2>,
    pub(crate) down: Tensor<2>,
    pub(crate) attention_norm: Tensor<2>,
    pub(crate) feed_forward_norm: Tensor<2>,
}

impl<'a> Parameters<'a> {
    /// `tensors` in the order of `ParameterSchema::llama`.
    pub(crate) fn new(tensors: &'a [Tensor<2>], shape: &ModelShape) -> Self {
        Self { tensors, layers: shape.num_hidden_layers }
    }

    fn embedding(&self) -> Tensor<2> {
        self.tensors[0].clone()
    }

    fn block(&self, layer: usize) -> Block {
        let tensor = |index: usize| self.tensors[1 + layer * BLOCK_TENSORS + index].clone();
        Block {
            query: tensor(0),
            key: tensor(1),
            value: tensor(2),
            output: tensor(3),
            gate: tensor(4),
            up: tensor(5),
            down: tensor(6),
            attention_norm: tensor(7),
            feed_forward_norm: tensor(8),
        }
    }

    fn final_norm(&self) -> Tensor<2> {
        self.tensors[1 + self.layers * BLOCK_TENSORS].clone()
    }

    /// The output projection: its own, or the embedding where they are tied.
    fn head(&self) -> Tensor<2> {
        self.tensors.get(2 + self.layers * BLOCK_TENSORS).unwrap_or(&self.tensors[0]).clone()
    }
}

/// What depends on positions only, made once for a sequence length and kept.
#[derive(Debug, Clone)]
struct PositionTables {
    positions: usize,
    /// `[t, d/2]`
    cosine_td: Tensor<2>,
    /// `[t, d/2]`
    sine_td: Tensor<2>,
    /// See [`causal_bias`].
    bias_tt: Tensor<2>,
}

/// The model without its parameters.
#[derive(Debug)]
pub(crate) struct Llama {
    shape: ModelShape,
    kernels: BlockKernels,
    precision: Precision,
    device: Device,
    tables: Option<PositionTables>,
}

impl Llama {
    pub(crate) fn new(shape: ModelShape, kernels: BlockKernels, precision: Precision, device: Device) -> Self {
        Self { shape, kernels, precision, device, tables: None }
    }

    /// Summed cross-entropy, nats, as a tensor of one element. `inputs` and `targets` are b·t ids each.
    pub(crate) fn loss_sum(
        &mut self,
        tensors: &[Tensor<2>],
        inputs: &[u32],
        targets: &[u32],
        samples: usize,
    ) -> Tensor<1> {
        let parameters = Parameters::new(tensors, &self.shape);
        let x_nh = self.hidden(&parameters, inputs, samples);
        let targets_n = self.ids(targets);
        let (norm, head) = (parameters.final_norm(), parameters.head());
        match self.kernels {
            BlockKernels::Fused => kernels::head_loss(x_nh, norm, head, targets_n, self.shape.rms_norm_eps),
            BlockKernels::Composed => {
                let logits_nv = self.linear(rms_norm(x_nh, norm, self.shape.rms_norm_eps), head);
                activation::log_softmax(logits_nv, 1).gather(1, targets_n.unsqueeze_dim(1)).sum().neg()
            }
        }
    }

    /// Logits `[n, v]` of every position.
    pub(crate) fn logits(&mut self, tensors: &[Tensor<2>], inputs: &[u32], samples: usize) -> Tensor<2> {
        let parameters = Parameters::new(tensors, &self.shape);
        let x_nh = self.hidden(&parameters, inputs, samples);
        self.linear(rms_norm(x_nh, parameters.final_norm(), self.shape.rms_norm_eps), parameters.head())
    }

    /// The residual stream `[n, h]` after the last block.
    fn hidden(&mut self, parameters: &Parameters<'_>, inputs: &[u32], samples: usize) -> Tensor<2> {
        let tables = self.tables(inputs.len() / samples);
        let ids_n = self.ids(inputs);
        let embedded_nh = match self.kernels {
            BlockKernels::Fused => kernels::embedding(parameters.embedding(), ids_n),
            BlockKernels::Composed => parameters.embedding().select(0, ids_n),
        };
        (0..parameters.layers).fold(embedded_nh, |x_nh, layer| {
            let block = parameters.block(layer);
            match self.kernels {
                BlockKernels::Fused => {
                    let spec = AttentionSpec::new(&self.shape, samples, tables.positions);
                    kernels::block(x_nh, block, tables.cosine_td.clone(), tables.sine_td.clone(), spec)
                }
                BlockKernels::Composed => self.composed_block(x_nh, block, &tables, samples),
            }
        })
    }

    fn composed_block(&self, x_nh: Tensor<2>, block: Block, tables: &PositionTables, samples: usize) -> Tensor<2> {
        let epsilon = self.shape.rms_norm_eps;
        let normed_nh = rms_norm(x_nh.clone(), block.attention_norm.clone(), epsilon);
        let x_nh = x_nh + self.attention(normed_nh, &block, tables, samples);
        let normed_nh = rms_norm(x_nh.clone(), block.feed_forward_norm, epsilon);
        let gated_nf = activation::silu(self.linear(normed_nh.clone(), block.gate)) * self.linear(normed_nh, block.up);
        x_nh + self.linear(gated_nf, block.down)
    }

    /// Causal grouped-query attention and its output projection.
    fn attention(&self, x_nh: Tensor<2>, block: &Block, tables: &PositionTables, samples: usize) -> Tensor<2> {
        let (heads, groups) = (self.shape.num_attention_heads, self.shape.num_key_value_heads);
        let (positions, head_size) = (tables.positions, self.shape.head_size());
        let split = |projected: Tensor<2>, heads: usize| -> Tensor<4> {
            projected.reshape([samples, positions, heads, head_size]).swap_dims(1, 2)
        };
        let turned =
            |projected, heads| rotate(split(projected, heads), tables.cosine_td.clone(), tables.sine_td.clone());
        let q_batd = turned(self.linear(x_nh.clone(), block.query.clone()), heads);
        let k_bgtd = turned(self.linear(x_nh.clone(), block.key.clone()), groups);
        let v_bgtd = split(self.linear(x_nh, block.value.clone()), groups);
        let (k_batd, v_batd) = (share_heads(k_bgtd, heads / groups), share_heads(v_bgtd, heads / groups));
        // Queries are scaled in place of scores: t / d times fewer elements.
        let scaled_batd = q_batd.mul_scalar((head_size as f64).sqrt().recip());
        let scores_batt = self.product(self.operand(scaled_batd), self.operand(k_batd).swap_dims(2, 3));
        let weights_batt = activation::softmax(scores_batt + tables.bias_tt.clone().unsqueeze::<4>(), 3);
        let mixed_batd = self.product(self.operand(weights_batt), self.operand(v_batd));
        let mixed_nh = mixed_batd.swap_dims(1, 2).reshape([samples * positions, heads * head_size]);
        self.linear(mixed_nh, block.output.clone())
    }

    /// x·Wᵀ, `w_oi` stored as Hugging Face does.
    fn linear(&self, x_ni: Tensor<2>, w_oi: Tensor<2>) -> Tensor<2> {
        self.product(self.operand(x_ni), self.operand(w_oi).transpose())
    }

    /// What a matrix product reads. Tensors are rounded for each product anew, so that gradients of one that goes into several
    /// are added up in f32.
    fn operand<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self.precision {
            Precision::F32 => x,
            Precision::Bf16 => x.cast(FloatDType::BF16),
        }
    }

    /// a·b of two [`Self::operand`]s, in f32.
    fn product<const D: usize>(&self, a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
        match self.precision {
            Precision::F32 => a.matmul(b),
            Precision::Bf16 => a.matmul(b).cast(FloatDType::F32),
        }
    }

    fn ids(&self, ids: &[u32]) -> Tensor<1, Int> {
        // Ids are below the vocabulary size, which `ModelShape::validate` keeps under 2^24.
        let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        let length = ids.len();
        Tensor::from_data(TensorData::new(ids, [length]), &self.device)
    }

    fn tables(&mut self, positions: usize) -> PositionTables {
        let kept = self.tables.take().filter(|tables| tables.positions == positions);
        let tables = kept.unwrap_or_else(|| self.new_tables(positions));
        self.tables.insert(tables).clone()
    }

    fn new_tables(&self, positions: usize) -> PositionTables {
        let half = self.shape.head_size() / 2;
        let (cosine, sine) = rotary_tables(&self.shape, positions);
        PositionTables {
            positions,
            cosine_td: Tensor::from_data(TensorData::new(cosine, [positions, half]), &self.device),
            sine_td: Tensor::from_data(TensorData::new(sine, [positions, half]), &self.device),
            bias_tt: causal_bias(positions, &self.device),
        }
    }
}

/// Cosines and sines of position · θ^(-2i/d), rounded to f32 where `transformers` rounds (inverse frequency, angle).
fn rotary_tables(shape: &ModelShape, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let head_size = shape.head_size();
    let inverse_frequency =
        |pair: usize| (1.0 / libm::pow(shape.rope_theta, 2.0 * pair as f64 / head_size as f64)) as f32;
    let frequencies: Vec<f32> = (0..head_size / 2).map(inverse_frequency).collect();
    let angles = || (0..positions).flat_map(|t| frequencies.iter().map(move |f| f64::from(t as f32 * f)));
    (angles().map(|a| libm::cos(a) as f32).collect(), angles().map(|a| libm::sin(a) as f32).collect())
}

/// Added to the scores of keys in a query's future: e to this is 0 beside any score, and shaders need not know infinity.
const FUTURE_BIAS: f32 = -1e30;

/// `[t, t]`: 0 where a key may be looked at, [`FUTURE_BIAS`] where it lies in the future of a query.
pub(crate) fn causal_bias(positions: usize, device: &Device) -> Tensor<2> {
    let bias = |query: usize| (0..positions).map(move |key| if key > query { FUTURE_BIAS } else { 0.0 });
    let values: Vec<f32> = (0..positions).flat_map(bias).collect();
    Tensor::from_data(TensorData::new(values, [positions, positions]), device)
}

/// x / √(mean(x²) + ε) ⊙ w (Zhang and Sennrich 2019, equation 4).
pub(crate) fn rms_norm(x_nh: Tensor<2>, weight_1h: Tensor<2>, epsilon: f64) -> Tensor<2> {
    let scale_n1 = x_nh.clone().square().mean_dim(1).add_scalar(epsilon).sqrt().recip();
    x_nh * scale_n1 * weight_1h
}

/// Rotary embedding of the halves (x1, x2): (x1·cos − x2·sin, x2·cos + x1·sin).
pub(crate) fn rotate(x_batd: Tensor<4>, cosine_td: Tensor<2>, sine_td: Tensor<2>) -> Tensor<4> {
    let half = x_batd.dims()[3] / 2;
    let (cosine, sine) = (cosine_td.unsqueeze::<4>(), sine_td.unsqueeze::<4>());
    let first = x_batd.clone().narrow(3, 0, half);
    let second = x_batd.narrow(3, half, half);
    let turned_first = first.clone() * cosine.clone() - second.clone() * sine.clone();
    let turned_second = second * cosine + first * sine;
    Tensor::cat(vec![turned_first, turned_second], 3)
}

/// Each key or value head `repeat` times in a row: query heads a = g·repeat + r share head g.
fn share_heads(x_bgtd: Tensor<4>, repeat: usize) -> Tensor<4> {
    if repeat == 1 {
        return x_bgtd;
    }
    let [samples, groups, positions, head_size] = x_bgtd.dims();
    let x_bg1td: Tensor<5> = x_bgtd.unsqueeze_dim(2);
    x_bg1td.expand([samples, groups, repeat, positions, head_size]).reshape([
        samples,
        groups * repeat,
        positions,
        head_size,
    ])
}
