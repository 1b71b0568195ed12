//! Causal grouped-query attention of one key-value head of one sample, forward and backward.
//!
//! ```text
//! S = Q·Kᵀ / √d,  P = softmax over the keys up to the query's own position,  O = P·V
//! backward (Dao et al. 2022, appendix B.4), with L = log Σ exp S kept from the forward pass:
//! P = exp(S − L),  dV = Pᵀ·dO,  dP = dO·Vᵀ,  dS = P ⊙ (dP − rowsum(dO ⊙ O)) / √d,  dQ = dS·K,  dK = dSᵀ·Q
//! ```
//! Work goes in blocks of [`QUERY_BLOCK`] queries against the keys up to the block's last position: what lies in the
//! future is not computed, but for the triangle on the diagonal, and no mask exists. Rotary embedding is applied when a
//! head is copied out of the projections, and undone on the way back.

use super::buffers::Buffer;
use super::elementwise::{exp, maximum, sum_lanes, vectorised};
use super::linear::{Matrix, MatrixMut, Store, multiply};
use base::ModelShape;

/// Queries in one block: 64 rows of 256 scores are 64 KiB, which stays in the second-level cache with K and V.
const QUERY_BLOCK: usize = 64;

/// Sizes of attention over a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AttentionSpec {
    pub(crate) samples: usize,
    pub(crate) positions: usize,
    /// Query heads that share a key-value head.
    pub(crate) group_heads: usize,
    /// Key-value heads.
    pub(crate) groups: usize,
    pub(crate) head_size: usize,
    pub(crate) epsilon: f64,
}

impl AttentionSpec {
    pub(crate) fn new(shape: &ModelShape, samples: usize, positions: usize) -> Self {
        Self {
            samples,
            positions,
            group_heads: shape.num_attention_heads / shape.num_key_value_heads,
            groups: shape.num_key_value_heads,
            head_size: shape.head_size(),
            epsilon: shape.rms_norm_eps,
        }
    }

    /// Elements of all query heads at one position.
    pub(super) fn query_width(self) -> usize {
        self.groups * self.group_heads * self.head_size
    }

    /// Elements of queries, keys and values at one position.
    pub(super) fn projected_width(self) -> usize {
        self.query_width() + 2 * self.groups * self.head_size
    }

    /// Elements of one head over a sequence.
    fn head_elements(self) -> usize {
        self.positions * self.head_size
    }

    /// Elements of a group's context: `[r, t, d]`.
    pub(super) fn group_context_elements(self) -> usize {
        self.group_heads * self.head_elements()
    }

    /// Elements of a group's queries, keys and values: `[r + 2, t, d]`.
    pub(super) fn group_projected_elements(self) -> usize {
        (self.group_heads + 2) * self.head_elements()
    }

    /// Where head `index` of a group (queries, then the key, then the value) starts in a projected row.
    fn projected_column(self, group: usize, index: usize) -> usize {
        match index.checked_sub(self.group_heads) {
            None => (group * self.group_heads + index) * self.head_size,
            Some(0) => self.query_width() + group * self.head_size,
            Some(_) => self.query_width() + (self.groups + group) * self.head_size,
        }
    }
}

/// Cosines and sines `[t, d/2]` of the rotary embedding.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rotary<'a> {
    pub(super) cosine: &'a [f32],
    pub(super) sine: &'a [f32],
}

/// Copies a group's heads out of one sample's projections `[t, width]` as `[r + 2, t, d]`, queries and the key turned,
/// queries also scaled by 1/√d.
pub(super) fn gather_group(
    spec: AttentionSpec,
    projected: &[f32],
    group: usize,
    rotary: Rotary<'_>,
    heads: &mut [f32],
) {
    let scale = 1.0 / (spec.head_size as f32).sqrt();
    for (index, head) in heads.chunks_exact_mut(spec.head_elements()).enumerate() {
        let column = spec.projected_column(group, index);
        let rows = projected.chunks_exact(spec.projected_width());
        for (row, out) in rows.zip(head.chunks_exact_mut(spec.head_size)) {
            out.copy_from_slice(&row[column..column + spec.head_size]);
        }
        match index.checked_sub(spec.group_heads) {
            None => turn(head, spec.head_size, rotary, 1.0, scale),
            Some(0) => turn(head, spec.head_size, rotary, 1.0, 1.0),
            Some(_) => {}
        }
    }
}

/// Turns the halves of every row by the angle of its position (backwards with `direction` −1) and scales.
fn turn(head: &mut [f32], head_size: usize, rotary: Rotary<'_>, direction: f32, scale: f32) {
    vectorised(
        #[inline(always)]
        || {
            let half = head_size / 2;
            let angles = rotary.cosine.chunks_exact(half).zip(rotary.sine.chunks_exact(half));
            for (row, (cosine, sine)) in head.chunks_exact_mut(head_size).zip(angles) {
                let (first, second) = row.split_at_mut(half);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cosine).zip(sine) {
                    let (c, s) = (c * scale, s * scale * direction);
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        },
    );
}

/// Working memory of one group.
#[derive(Debug)]
pub(super) struct Scratch {
    heads: Buffer,
    /// Key, then value, as `[d, t]`: the layout in which a product with many queries reads them without packing.
    transposed: Buffer,
    scores: Buffer,
    gradient_scores: Buffer,
}

impl Scratch {
    pub(super) fn new(spec: AttentionSpec) -> Self {
        let block = QUERY_BLOCK.min(spec.positions) * spec.positions;
        Self {
            heads: Buffer::stale(spec.group_projected_elements()),
            transposed: Buffer::stale(2 * spec.head_elements()),
            scores: Buffer::stale(block),
            gradient_scores: Buffer::stale(block),
        }
    }
}

/// Query blocks as ranges of positions.
fn query_blocks(positions: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..positions).step_by(QUERY_BLOCK).map(move |start| start..positions.min(start + QUERY_BLOCK))
}

/// Context `[r, t, d]` and log-sum-exp `[r, t]` of one group of one sample.
pub(super) fn forward(
    spec: AttentionSpec,
    projected: &[f32],
    group: usize,
    rotary: Rotary<'_>,
    context: &mut [f32],
    log_sum: &mut [f32],
    scratch: &mut Scratch,
) {
    gather_group(spec, projected, group, rotary, &mut scratch.heads);
    let (queries, key, value) = split_group(spec, &scratch.heads);
    let key_dt = &mut scratch.transposed[..spec.head_elements()];
    transpose(key, spec.head_size, key_dt);
    let outputs = context.chunks_exact_mut(spec.head_elements()).zip(log_sum.chunks_exact_mut(spec.positions));
    for (query, (context, log_sum)) in queries.chunks_exact(spec.head_elements()).zip(outputs) {
        for block in query_blocks(spec.positions) {
            let scores = &mut scratch.scores[..block.len() * block.end];
            score(spec, query, key_dt, &block, scores);
            softmax_causal(scores, &block, &mut log_sum[block.clone()]);
            let rows = block.start * spec.head_size..block.end * spec.head_size;
            let value = Matrix::new(&value[..block.end * spec.head_size], spec.head_size);
            let context = MatrixMut::new(&mut context[rows], spec.head_size);
            multiply(context, Store::Replace, Matrix::new(scores, block.end), value);
        }
    }
}

/// `[r + 2, t, d]` as queries, key and value.
fn split_group(spec: AttentionSpec, heads: &[f32]) -> (&[f32], &[f32], &[f32]) {
    let (queries, rest) = heads.split_at(spec.group_heads * spec.head_elements());
    let (key, value) = rest.split_at(spec.head_elements());
    (queries, key, value)
}

/// A block of rows of `rows_td` times the first `block.end` columns of `columns_dt`: scores from queries and keys.
fn score(spec: AttentionSpec, rows_td: &[f32], columns_dt: &[f32], block: &std::ops::Range<usize>, scores: &mut [f32]) {
    let rows = Matrix::new(&rows_td[block.start * spec.head_size..block.end * spec.head_size], spec.head_size);
    let columns = Matrix::new(columns_dt, spec.positions).columns(0, block.end);
    multiply(MatrixMut::new(scores, block.end), Store::Replace, rows, columns);
}

/// `[t, d]` as `[d, t]`.
fn transpose(from_td: &[f32], head_size: usize, to_dt: &mut [f32]) {
    let positions = from_td.len() / head_size;
    for (position, row) in from_td.chunks_exact(head_size).enumerate() {
        for (index, value) in row.iter().enumerate() {
            to_dt[index * positions + position] = *value;
        }
    }
}

/// Softmax of row i over its first i + 1 keys, zero behind; log-sum-exp of every row.
fn softmax_causal(scores: &mut [f32], block: &std::ops::Range<usize>, log_sum: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for ((row, position), log_sum) in scores.chunks_exact_mut(block.end).zip(block.clone()).zip(log_sum) {
                let (seen, future) = row.split_at_mut(position + 1);
                let highest = maximum(seen);
                for s in seen.iter_mut() {
                    *s = exp(*s - highest);
                }
                let sum = sum_lanes(seen.len(), |i| seen[i]);
                let inverse = 1.0 / sum;
                for s in seen.iter_mut() {
                    *s *= inverse;
                }
                future.fill(0.0);
                *log_sum = highest + sum.ln();
            }
        },
    );
}

/// Softmax weights of a block again, from its scores and log-sum-exps.
fn softmax_again(scores: &mut [f32], block: &std::ops::Range<usize>, log_sum: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            for ((row, position), log_sum) in scores.chunks_exact_mut(block.end).zip(block.clone()).zip(log_sum) {
                let (seen, future) = row.split_at_mut(position + 1);
                for s in seen.iter_mut() {
                    *s = exp(*s - *log_sum);
                }
                future.fill(0.0);
            }
        },
    );
}

/// dS = P ⊙ (dP − D), in place of dP; D = rowsum(dO ⊙ O).
fn softmax_backward(weights: &[f32], gradient: &mut [f32], keys: usize, head_size: usize, d_out: &[f32], out: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            let rows = weights.chunks_exact(keys).zip(gradient.chunks_exact_mut(keys));
            let outputs = d_out.chunks_exact(head_size).zip(out.chunks_exact(head_size));
            for ((weights, gradient), (d_out, out)) in rows.zip(outputs) {
                let shared = sum_lanes(head_size, |i| d_out[i] * out[i]);
                for (g, p) in gradient.iter_mut().zip(weights) {
                    *g = p * (*g - shared);
                }
            }
        },
    );
}

/// What the backward pass of one group reads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Upstream<'a> {
    /// One sample's projections `[t, width]`.
    pub(super) projected: &'a [f32],
    /// `[r, t, d]` of the forward pass.
    pub(super) context: &'a [f32],
    /// `[r, t]` of the forward pass.
    pub(super) log_sum: &'a [f32],
    /// Gradient of the context, `[r, t, d]`.
    pub(super) gradient_context: &'a [f32],
}

/// Gradients `[r + 2, t, d]` of a group's projections.
pub(super) fn backward(
    spec: AttentionSpec,
    upstream: Upstream<'_>,
    group: usize,
    rotary: Rotary<'_>,
    gradient_heads: &mut [f32],
    scratch: &mut Scratch,
) {
    let (head_elements, size) = (spec.head_elements(), spec.head_size);
    gather_group(spec, upstream.projected, group, rotary, &mut scratch.heads);
    let (queries, key, value) = split_group(spec, &scratch.heads);
    let (key_dt, value_dt) = scratch.transposed.split_at_mut(head_elements);
    transpose(key, size, key_dt);
    transpose(value, size, value_dt);
    let (gradient_queries, rest) = gradient_heads.split_at_mut(spec.group_heads * head_elements);
    let (gradient_key, gradient_value) = rest.split_at_mut(head_elements);
    gradient_key.fill(0.0);
    gradient_value.fill(0.0);
    for head in 0..spec.group_heads {
        let of_head = head * head_elements..(head + 1) * head_elements;
        let (query, context) = (&queries[of_head.clone()], &upstream.context[of_head.clone()]);
        let gradient_context = &upstream.gradient_context[of_head.clone()];
        let gradient_query = &mut gradient_queries[of_head];
        let log_sum = &upstream.log_sum[head * spec.positions..(head + 1) * spec.positions];
        for block in query_blocks(spec.positions) {
            let keys = block.end;
            let rows = block.start * size..block.end * size;
            let weights = &mut scratch.scores[..block.len() * keys];
            let d_scores = &mut scratch.gradient_scores[..block.len() * keys];
            score(spec, query, key_dt, &block, weights);
            softmax_again(weights, &block, &log_sum[block.clone()]);
            let d_out = &gradient_context[rows.clone()];
            let d_out_matrix = Matrix::new(d_out, size);
            let d_value = MatrixMut::new(&mut gradient_value[..keys * size], size);
            multiply(d_value, Store::Add, Matrix::new(weights, keys).transposed(), d_out_matrix);
            score(spec, gradient_context, value_dt, &block, d_scores);
            softmax_backward(weights, d_scores, keys, size, d_out, &context[rows.clone()]);
            let d_scores = Matrix::new(d_scores, keys);
            let key = Matrix::new(&key[..keys * size], size);
            multiply(MatrixMut::new(&mut gradient_query[rows.clone()], size), Store::Replace, d_scores, key);
            let query = Matrix::new(&query[rows], size);
            let d_key = MatrixMut::new(&mut gradient_key[..keys * size], size);
            multiply(d_key, Store::Add, d_scores.transposed(), query);
        }
    }
    let scale = 1.0 / (size as f32).sqrt();
    for gradient_query in gradient_queries.chunks_exact_mut(head_elements) {
        turn(gradient_query, size, rotary, -1.0, scale);
    }
    turn(gradient_key, size, rotary, -1.0, 1.0);
}

/// One position's context of all heads, `[a·d]`, out of a sample's groups `[g, r, t, d]`.
pub(super) fn gather_context_row(spec: AttentionSpec, sample_groups: &[f32], position: usize, row: &mut [f32]) {
    let heads = sample_groups.chunks_exact(spec.head_elements());
    for (head, out) in heads.zip(row.chunks_exact_mut(spec.head_size)) {
        out.copy_from_slice(&head[position * spec.head_size..(position + 1) * spec.head_size]);
    }
}

/// A group's context `[r, t, d]` out of one sample's rows `[t, a·d]`.
pub(super) fn gather_context_group(spec: AttentionSpec, rows: &[f32], group: usize, context: &mut [f32]) {
    for (index, head) in context.chunks_exact_mut(spec.head_elements()).enumerate() {
        let column = (group * spec.group_heads + index) * spec.head_size;
        let rows = rows.chunks_exact(spec.query_width());
        for (row, out) in rows.zip(head.chunks_exact_mut(spec.head_size)) {
            out.copy_from_slice(&row[column..column + spec.head_size]);
        }
    }
}

/// One position's gradient of the projections, `[width]`, out of a sample's groups `[g, r + 2, t, d]`.
pub(super) fn gather_projected_row(spec: AttentionSpec, sample_groups: &[f32], position: usize, row: &mut [f32]) {
    let groups = sample_groups.chunks_exact(spec.group_projected_elements());
    for (group, heads) in groups.enumerate() {
        for (index, head) in heads.chunks_exact(spec.head_elements()).enumerate() {
            let column = spec.projected_column(group, index);
            let from = position * spec.head_size;
            row[column..column + spec.head_size].copy_from_slice(&head[from..from + spec.head_size]);
        }
    }
}
