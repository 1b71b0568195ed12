//! Memory of the fullest device: weights, gradients, optimiser, activations, working buffers.
//!
//! Activations of one layer and micro-batch are those of Korthikanti et al. (arXiv 2205.05198, table 2), in bytes: with tensor
//! parallelism t and 16-bit values
//! ```text
//! s b h (10 + 24/t + 5 a s / (h t))   and with the sequence split as well   s b h (34/t + 5 a s / (h t))
//! ```
//! The last term is the square of attention, which selective recomputation and fused attention drop; 24 is 8 for attention and 16 for a
//! feed-forward of 4 h, which other widths and gates change. Full recomputation keeps 2 s b h. The first of p stages
//! holds p micro-batches, and (1 + (p-1)/(p v)) of that with v chunks a device. Weights, gradients and moments are 18 bytes a
//! parameter (2 + 4 + 12), or 16 where sharded parameters are the f32 master copy (FSDP), divided as the ZeRO stage says (arXiv 1910.02054).
//! Not included: the driver's context, communication buffers, fragmentation.

use super::Case;
use super::layout::{Layout, Recompute, Stack, even_stages};
use super::shape::Transformer;
use crate::units::Bytes;

/// Bytes of an f32.
const F32_BYTES: f64 = 4.0;

/// What the fullest device holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// Weights in the precision of computation.
    pub weights: Bytes,
    /// Gradients.
    pub gradients: Bytes,
    /// Master weights and moments.
    pub optimiser: Bytes,
    /// Activations kept for the backward pass.
    pub activations: Bytes,
    /// Logits, gathered parameters, the layer that is being recomputed.
    pub buffers: Bytes,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> Bytes {
        self.weights + self.gradients + self.optimiser + self.activations + self.buffers
    }

    /// What the parameters cause.
    pub fn states(&self) -> Bytes {
        self.weights + self.gradients + self.optimiser
    }
}

/// Memory of the fullest stage.
pub fn memory(case: &Case<'_>) -> Memory {
    let layers = case.stage_layers.clone().unwrap_or_else(|| even_stages(case.shape.layers, case.layout.pp));
    let stages = layers.len();
    // The first stages hold most micro-batches, the last one the logits; between them nothing is fuller.
    let fullest = layers.iter().copied().fold(0.0, f64::max);
    let first = stage(case, layers.first().copied().unwrap_or(0.0).max(fullest), 0, stages);
    let last = stage(case, layers.last().copied().unwrap_or(0.0), stages.saturating_sub(1), stages);
    if last.total() > first.total() { last } else { first }
}

fn stage(case: &Case<'_>, layers: f64, index: usize, stages: usize) -> Memory {
    let (shape, layout) = (&case.shape, &case.layout);
    let is_end = index == 0 || index + 1 == stages;
    let parameters = stage_parameters(shape, layout, layers, is_end);
    let sharded = layout.zero >= 3;
    let shards = |least: u8| if layout.zero >= least { layout.dp * layout.cp } else { 1.0 };
    let value = case.precision.bytes();
    let weights = if sharded { F32_BYTES } else { value };
    let optimiser = if sharded || value == F32_BYTES { 2.0 * F32_BYTES } else { 3.0 * F32_BYTES };
    let in_flight = in_flight(layout, index);
    Memory {
        weights: Bytes(weights * parameters / shards(3)),
        gradients: Bytes(F32_BYTES * parameters / shards(2)),
        optimiser: Bytes(optimiser * parameters / shards(1)),
        activations: Bytes(layer_activations(shape, layout, value) * layers * in_flight),
        buffers: buffers(shape, layout, value, index + 1 == stages),
    }
}

/// Parameters of a stage on one device.
pub fn stage_parameters(shape: &Transformer, layout: &Layout, layers: f64, is_end: bool) -> f64 {
    let experts = (shape.experts / layout.ep).max(1.0) * shape.ffn_parameters();
    let layer = (shape.shared_layer_parameters() + experts) / layout.tp;
    layers * layer + if is_end { shape.embedding_parameters() / layout.tp } else { 0.0 }
}

/// Micro-batches whose activations a stage holds at once.
fn in_flight(layout: &Layout, index: usize) -> f64 {
    let waiting = (layout.pp - index as f64).min(layout.micro_batches());
    let chunks = if layout.interleave > 1.0 { 1.0 + (layout.pp - 1.0) / (layout.pp * layout.interleave) } else { 1.0 };
    waiting * chunks
}

/// Bytes of one layer and micro-batch on one device.
fn layer_activations(shape: &Transformer, layout: &Layout, value: f64) -> f64 {
    let row = layout.tokens(shape.seq) * shape.hidden;
    let split = if layout.sequence_parallel { layout.tp } else { 1.0 };
    if layout.recompute == Recompute::Full {
        return value * row / split;
    }
    working_set(shape, layout, value)
}

/// Bytes of everything one layer computes.
fn working_set(shape: &Transformer, layout: &Layout, value: f64) -> f64 {
    let row = layout.tokens(shape.seq) * shape.hidden;
    let split = if layout.sequence_parallel { layout.tp } else { 1.0 };
    // Values of 16 bits, but for dropout's masks: (10, 24) of the formula are 4 norms, 2 + 2 inputs, 2 masks; 8 attention, 16 feed-forward.
    let wide = value / 2.0;
    let replicated = 8.0 * wide + 2.0;
    let attention = 4.0 + 4.0 * shape.kv_heads / shape.heads;
    let ffn = if shape.gated { 6.0 } else { 4.0 } * shape.ffn / shape.hidden * shape.experts_per_token;
    let keeps_square = layout.stack == Stack::Classic && layout.recompute == Recompute::None;
    let square = if keeps_square { 5.0 * shape.heads * shape.seq / shape.hidden } else { 0.0 };
    row * (replicated / split + wide * (attention + ffn + square) / layout.tp)
}

fn buffers(shape: &Transformer, layout: &Layout, value: f64, has_logits: bool) -> Bytes {
    let logits = if has_logits { layout.tokens(shape.seq) * shape.vocab / layout.tp * F32_BYTES } else { 0.0 };
    let recomputed = if layout.recompute == Recompute::Full { working_set(shape, layout, value) } else { 0.0 };
    // The layer in use and the next one, gathered ahead.
    let gathered = if layout.zero >= 3 {
        2.0 * value * (shape.shared_layer_parameters() + shape.ffn_parameters() * (shape.experts / layout.ep).max(1.0))
            / layout.tp
    } else {
        0.0
    };
    Bytes(logits.max(recomputed) + gathered)
}
