//! Roofline of one layer, of the output projection and of the optimiser on one device.
//!
//! A matrix product takes its arithmetic at the sustained rate plus the unhidden part of its traffic ([`super::rates`]); everything
//! else is memory traffic. Backward is two products for each forward one. Traffic counts, bytes for each token and unit of width, in
//! 16 bits: a norm reads and writes (4), a residual with dropout reads two and writes one and a mask (7), twice a layer each: 22;
//! an activation reads and writes the feed-forward's width (4 for each of it, 6 with a gate); splitting and transposing heads 8.
//! FP8 casts the operands of each product, [`CAST_BYTES`] a value; a token's copies go to experts and back, [`PERMUTE_BYTES`] a value.

use super::constants::Constants;
use super::layout::{Layout, Recompute, Stack};
use super::rates::Rates;
use super::shape::Transformer;
use crate::catalogue::Precision;
use crate::units::{Bytes, Flop, Seconds};

/// Bytes of norms and residuals, see above.
const NORM_BYTES: f64 = 22.0;

/// Bytes of splitting heads.
const HEADS_BYTES: f64 = 8.0;

/// Bytes of the loss for each logit: f32 copy, exponentials and gradient, written and read, forward and backward.
const LOSS_BYTES: f64 = 24.0;

/// Share of attention's square that a causal kernel computes.
const CAUSAL: f64 = 0.5;

/// Products of a fused attention's backward over its forward: five instead of two.
const FUSED_BACKWARD: f64 = 2.5;

/// Memory traffic of AdamW for each parameter: read gradient, master weight and two moments, write three and the 16-bit copy.
const ADAM_BYTES: f64 = 34.0;

/// Head sizes that matrix units take without padding are multiples of this, in 16 bits.
const HEAD_ALIGNMENT: f64 = 8.0;

/// Memory traffic of casting a 16-bit value to FP8: read for the largest magnitude, read again, written, and written transposed for the
/// product of the other pass (both operands of an FP8 product lie along the summed dimension).
const CAST_BYTES: f64 = 6.0;

/// Memory traffic of a value that goes to an expert and back: read and written in the order of experts, received, and summed over experts
/// again, 4 bytes each.
const PERMUTE_BYTES: f64 = 12.0;

/// Device time of one layer for one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerTime {
    /// Forward.
    pub forward: Seconds,
    /// Backward without recomputation.
    pub backward: Seconds,
    /// Recomputation.
    pub recompute: Seconds,
}

/// Time of the layer's arithmetic and memory traffic; collectives are apart.
pub fn layer(
    shape: &Transformer,
    layout: &Layout,
    precision: Precision,
    rates: &Rates,
    constants: &Constants,
) -> LayerTime {
    let dense = projections(shape, layout, rates) + feed_forward(shape, layout, rates);
    let (attention, attention_backward) = attention(shape, layout, rates, constants);
    let elementwise = elementwise(shape, layout, rates, constants) + permutation(shape, layout, rates);
    let (cast, cast_backward) = casts(shape, layout, precision, rates);
    let forward = dense + attention + elementwise + cast;
    LayerTime {
        forward,
        backward: dense * 2.0 + attention_backward + elementwise * 2.0 + cast_backward,
        recompute: match layout.recompute {
            Recompute::None => Seconds::ZERO,
            // Also where attention is fused and would need no more than its output: the core of attention runs again.
            Recompute::Selective => attention,
            Recompute::Full => forward,
        },
    }
}

fn projections(shape: &Transformer, layout: &Layout, rates: &Rates) -> Seconds {
    let tokens = layout.tokens(shape.seq);
    let inner = shape.hidden / layout.tp;
    rates.product(tokens, inner + 2.0 * shape.kv_width() / layout.tp, shape.hidden)
        + rates.product(tokens, shape.hidden, inner)
}

fn feed_forward(shape: &Transformer, layout: &Layout, rates: &Rates) -> Seconds {
    let tokens = layout.tokens(shape.seq);
    let width = shape.ffn / layout.tp;
    let first = if shape.gated { 2.0 * width } else { width };
    // Each expert gets its share of the tokens of all ranks of its group.
    let local_experts = (shape.experts / layout.ep).max(1.0);
    let expert_tokens = tokens * shape.experts_per_token / local_experts;
    (rates.product(expert_tokens, first, shape.hidden) + rates.product(expert_tokens, shape.hidden, width))
        * local_experts
}

/// Forward and backward of scores and their use.
fn attention(shape: &Transformer, layout: &Layout, rates: &Rates, constants: &Constants) -> (Seconds, Seconds) {
    let heads = shape.heads / layout.tp * layout.micro_batch;
    let queries = shape.seq / layout.cp;
    let head = shape.head_size();
    if layout.stack == Stack::Modern {
        let flop = Flop(4.0 * heads * queries * shape.seq * head * CAUSAL);
        let forward = flop / rates.attention_of(layout.eager);
        return (forward, forward * FUSED_BACKWARD);
    }
    let alignment = head_rate(head, constants);
    let products =
        (rates.product_wide(queries, shape.seq, head) + rates.product_wide(queries, head, shape.seq)) * heads;
    let score_bytes = if layout.eager { constants.eager_bytes_per_score } else { constants.unfused_bytes_per_score };
    let scores = Bytes(score_bytes * heads * queries * shape.seq) / rates.memory;
    let forward = products / alignment + scores;
    (forward, forward * 2.0)
}

/// Rate of attention's products over the aligned one: loads of half the width for heads that are multiples of 4 only, of a quarter for others.
fn head_rate(head: f64, constants: &Constants) -> f64 {
    match head {
        _ if head % HEAD_ALIGNMENT == 0.0 => 1.0,
        _ if head % (HEAD_ALIGNMENT / 2.0) == 0.0 => (2.0 * constants.misaligned_head_rate).min(1.0),
        _ => constants.misaligned_head_rate,
    }
}

/// Casts to FP8, forward and backward: what enters each product, and the gradient of what leaves it.
fn casts(shape: &Transformer, layout: &Layout, precision: Precision, rates: &Rates) -> (Seconds, Seconds) {
    if precision != Precision::Fp8 {
        return (Seconds::ZERO, Seconds::ZERO);
    }
    let row = shape.hidden / if layout.sequence_parallel { layout.tp } else { 1.0 };
    let ffn = shape.ffn / layout.tp * shape.experts_per_token;
    let first = if shape.gated { 2.0 * ffn } else { ffn };
    let entering = 2.0 * row + shape.hidden / layout.tp + ffn;
    let leaving = (shape.hidden + 2.0 * shape.kv_width()) / layout.tp + 2.0 * row + first;
    let cast = |values: f64| Bytes(layout.tokens(shape.seq) * values * CAST_BYTES) / rates.memory;
    (cast(entering), cast(leaving))
}

/// A token's copies to the order of experts and back.
fn permutation(shape: &Transformer, layout: &Layout, rates: &Rates) -> Seconds {
    if shape.experts <= 1.0 {
        return Seconds::ZERO;
    }
    let row = shape.hidden / if layout.sequence_parallel { layout.tp } else { 1.0 };
    Bytes(layout.tokens(shape.seq) * shape.experts_per_token * row * PERMUTE_BYTES) / rates.memory
}

fn elementwise(shape: &Transformer, layout: &Layout, rates: &Rates, constants: &Constants) -> Seconds {
    let tokens = layout.tokens(shape.seq);
    let norms = NORM_BYTES * shape.hidden / if layout.sequence_parallel { layout.tp } else { 1.0 };
    let activation = if shape.gated { 6.0 } else { 4.0 } * shape.ffn * shape.experts_per_token;
    let split = (HEADS_BYTES * shape.hidden + activation) / layout.tp;
    let passes = if layout.eager { constants.eager_traffic } else { 1.0 };
    Bytes(tokens * (norms + split) * constants.elementwise_traffic * passes) / rates.memory
}

/// Output projection and loss of one micro-batch, forward and backward.
pub fn logits(shape: &Transformer, layout: &Layout, rates: &Rates) -> Seconds {
    let tokens = layout.tokens(shape.seq);
    let vocab = shape.vocab / layout.tp;
    rates.product_wide(tokens, vocab, shape.hidden) * 3.0 + Bytes(tokens * vocab * LOSS_BYTES) / rates.memory
}

/// AdamW on so many parameters.
pub fn optimiser(parameters: f64, rates: &Rates) -> Seconds {
    Bytes(parameters * ADAM_BYTES) / rates.memory
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::constants::FITTED;

    #[test]
    fn heads_that_loads_fit_ill_are_slower_by_halves() {
        let constants = Constants { misaligned_head_rate: 0.05, ..FITTED };
        let rates = [128.0, 104.0, 108.0, 150.0, 125.0].map(|head| head_rate(head, &constants));
        assert_eq!(rates, [1.0, 1.0, 0.1, 0.05, 0.05]);
        assert_eq!(head_rate(108.0, &Constants { misaligned_head_rate: 0.8, ..FITTED }), 1.0);
    }
}
