//! One transformer block on slices, forward and backward, by hand.
//!
//! Each pass is a few phases; inside a phase the work is cut into pieces of fixed size (rows, heads of a sample, rows of
//! a weight) that rayon hands to threads. A piece of rows stays in one core's cache from the norm to the end of the
//! phase, and what is cheap to compute is computed again in the backward pass instead of kept.
//!
//! Kept per layer: projections, context, log-sum-exps, the residual stream in the middle, gate and up. Shape
//! suffixes as in [`crate::model`].

use super::attention::{self, AttentionSpec, Rotary, Scratch, Upstream};
use super::buffers::Buffer;
use super::elementwise::{rms_norm, rms_norm_again, rms_norm_backward, swiglu, swiglu_backward};
use super::linear::{Matrix, MatrixMut, Store, multiply};
use rayon::prelude::*;

/// Rows of the residual stream in one piece of work: with h 256 and f 704, 256 KiB of stream and 1.4 MiB of gate and up.
pub(super) const ROW_PIECE: usize = 256;

/// Rows of a weight gradient in one piece of work.
const WEIGHT_PIECE: usize = 256;

/// Tensors of a block, in canonical order.
pub(super) const BLOCK_WEIGHTS: usize = 9;

/// A block's parameters, `[out, in]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) query: &'a [f32],
    pub(super) key: &'a [f32],
    pub(super) value: &'a [f32],
    pub(super) output: &'a [f32],
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) down: &'a [f32],
    pub(super) attention_norm: &'a [f32],
    pub(super) feed_forward_norm: &'a [f32],
}

impl Weights<'_> {
    fn hidden(&self) -> usize {
        self.attention_norm.len()
    }

    fn inner(&self) -> usize {
        self.gate.len() / self.hidden()
    }

    /// Query, key and value weights with their first columns in a row of projections.
    fn projections(&self) -> [(&[f32], usize, usize); 3] {
        let rows = |weight: &[f32]| weight.len() / self.hidden();
        let (query, key, value) = (rows(self.query), rows(self.key), rows(self.value));
        [(self.query, 0, query), (self.key, query, key), (self.value, query + key, value)]
    }
}

/// What the forward pass keeps for the backward pass.
#[derive(Debug)]
pub(super) struct Saved {
    attention_inverse_rms_n: Buffer,
    projected_nw: Buffer,
    context_bgrtd: Buffer,
    log_sum_bgrt: Buffer,
    middle_nh: Buffer,
    feed_forward_inverse_rms_n: Buffer,
    gate_nf: Buffer,
    up_nf: Buffer,
}

/// Weights as `[in, out]`. A product reads them in this layout as they are; in the other it would rearrange them again for
/// every piece of rows.
struct Transposed {
    /// Queries, keys and values side by side: `[h, w]`.
    projections_hw: Buffer,
    output_qh: Buffer,
    gate_hf: Buffer,
    up_hf: Buffer,
    down_fh: Buffer,
}

impl Transposed {
    fn new(spec: AttentionSpec, weights: Weights<'_>) -> Self {
        let (hidden, inner, width) = (weights.hidden(), weights.inner(), spec.projected_width());
        let mut transposed = Self {
            projections_hw: Buffer::stale(hidden * width),
            output_qh: Buffer::stale(weights.output.len()),
            gate_hf: Buffer::stale(weights.gate.len()),
            up_hf: Buffer::stale(weights.up.len()),
            down_fh: Buffer::stale(weights.down.len()),
        };
        for (weight, column, columns) in weights.projections() {
            transpose_into(weight, columns, hidden, &mut transposed.projections_hw[column..], width);
        }
        transpose_into(weights.output, hidden, spec.query_width(), &mut transposed.output_qh, hidden);
        transpose_into(weights.gate, inner, hidden, &mut transposed.gate_hf, inner);
        transpose_into(weights.up, inner, hidden, &mut transposed.up_hf, inner);
        transpose_into(weights.down, hidden, inner, &mut transposed.down_fh, hidden);
        transposed
    }
}

/// `from` `[rows, columns]` as `to` `[columns, rows]`, whose rows lie `stride` apart; in tiles that fit the first-level cache.
fn transpose_into(from: &[f32], rows: usize, columns: usize, to: &mut [f32], stride: usize) {
    const TILE: usize = 32;
    for first_row in (0..rows).step_by(TILE) {
        for first_column in (0..columns).step_by(TILE) {
            for column in first_column..columns.min(first_column + TILE) {
                let to = &mut to[column * stride + first_row..column * stride + rows.min(first_row + TILE)];
                for (row, value) in to.iter_mut().enumerate() {
                    *value = from[(first_row + row) * columns + column];
                }
            }
        }
    }
}

/// The residual stream after the block, and what its backward pass needs.
pub(super) fn forward(
    spec: AttentionSpec,
    rotary: Rotary<'_>,
    x_nh: &[f32],
    weights: Weights<'_>,
) -> (Vec<f32>, Saved) {
    let (hidden, inner) = (weights.hidden(), weights.inner());
    let rows = spec.samples * spec.positions;
    let transposed = Transposed::new(spec, weights);
    let mut saved = Saved {
        attention_inverse_rms_n: Buffer::stale(rows),
        projected_nw: Buffer::stale(rows * spec.projected_width()),
        context_bgrtd: Buffer::stale(rows * spec.query_width()),
        log_sum_bgrt: Buffer::stale(rows * spec.groups * spec.group_heads),
        middle_nh: Buffer::stale(rows * hidden),
        feed_forward_inverse_rms_n: Buffer::stale(rows),
        gate_nf: Buffer::stale(rows * inner),
        up_nf: Buffer::stale(rows * inner),
    };
    project(spec, x_nh, weights, &transposed, &mut saved);
    attend(spec, rotary, &mut saved);
    let out_nh = feed_forward(spec, x_nh, weights, &transposed, &mut saved);
    (out_nh.into_vec(), saved)
}

/// Norm, then queries, keys and values.
fn project(spec: AttentionSpec, x_nh: &[f32], weights: Weights<'_>, transposed: &Transposed, saved: &mut Saved) {
    let (hidden, width) = (weights.hidden(), spec.projected_width());
    let pieces = saved.projected_nw.par_chunks_mut(ROW_PIECE * width).zip(x_nh.par_chunks(ROW_PIECE * hidden));
    pieces.zip(saved.attention_inverse_rms_n.par_chunks_mut(ROW_PIECE)).for_each_init(
        || Buffer::stale(ROW_PIECE * hidden),
        |normed, ((projected, x), inverse_rms)| {
            let normed = &mut normed[..x.len()];
            rms_norm(x, weights.attention_norm, spec.epsilon as f32, normed, inverse_rms);
            let projections = Matrix::new(&transposed.projections_hw, width);
            multiply(MatrixMut::new(projected, width), Store::Replace, Matrix::new(normed, hidden), projections);
        },
    );
}

fn attend(spec: AttentionSpec, rotary: Rotary<'_>, saved: &mut Saved) {
    let sample_elements = spec.positions * spec.projected_width();
    let projected = &saved.projected_nw;
    let contexts = saved.context_bgrtd.par_chunks_mut(spec.group_context_elements());
    let log_sums = saved.log_sum_bgrt.par_chunks_mut(spec.group_heads * spec.positions);
    contexts.zip(log_sums).enumerate().for_each_init(
        || Scratch::new(spec),
        |scratch, (index, (context, log_sum))| {
            let (sample, group) = (index / spec.groups, index % spec.groups);
            let projected = &projected[sample * sample_elements..(sample + 1) * sample_elements];
            attention::forward(spec, projected, group, rotary, context, log_sum, scratch);
        },
    );
}

/// Output projection, residual, norm, SwiGLU, residual.
fn feed_forward(
    spec: AttentionSpec,
    x_nh: &[f32],
    weights: Weights<'_>,
    transposed: &Transposed,
    saved: &mut Saved,
) -> Buffer {
    let (hidden, inner, query_width) = (weights.hidden(), weights.inner(), spec.query_width());
    let mut out_nh = Buffer::stale(x_nh.len());
    let context = &saved.context_bgrtd;
    let streams = out_nh.par_chunks_mut(ROW_PIECE * hidden).zip(saved.middle_nh.par_chunks_mut(ROW_PIECE * hidden));
    let wide = saved.gate_nf.par_chunks_mut(ROW_PIECE * inner).zip(saved.up_nf.par_chunks_mut(ROW_PIECE * inner));
    let inverse_rms = saved.feed_forward_inverse_rms_n.par_chunks_mut(ROW_PIECE);
    streams.zip(wide).zip(inverse_rms).zip(x_nh.par_chunks(ROW_PIECE * hidden)).enumerate().for_each_init(
        || {
            (
                Buffer::stale(ROW_PIECE * query_width),
                Buffer::stale(ROW_PIECE * hidden),
                Buffer::stale(ROW_PIECE * inner),
            )
        },
        |(mixed, normed, gated), (piece, ((((out, middle), (gate, up)), inverse_rms), x))| {
            let rows = inverse_rms.len();
            let mixed = &mut mixed[..rows * query_width];
            let (normed, gated) = (&mut normed[..rows * hidden], &mut gated[..rows * inner]);
            gather_context(spec, context, piece * ROW_PIECE, mixed);
            middle.copy_from_slice(x);
            let output = Matrix::new(&transposed.output_qh, hidden);
            multiply(MatrixMut::new(middle, hidden), Store::Add, Matrix::new(mixed, query_width), output);
            rms_norm(middle, weights.feed_forward_norm, spec.epsilon as f32, normed, inverse_rms);
            let normed = Matrix::new(normed, hidden);
            let (gate_hf, up_hf) = (Matrix::new(&transposed.gate_hf, inner), Matrix::new(&transposed.up_hf, inner));
            multiply(MatrixMut::new(gate, inner), Store::Replace, normed, gate_hf);
            multiply(MatrixMut::new(up, inner), Store::Replace, normed, up_hf);
            swiglu(gate, up, gated);
            out.copy_from_slice(middle);
            let down = Matrix::new(&transposed.down_fh, hidden);
            multiply(MatrixMut::new(out, hidden), Store::Add, Matrix::new(gated, inner), down);
        },
    );
    out_nh
}

/// Context rows from `first_row` on, as `[rows, a·d]`.
fn gather_context(spec: AttentionSpec, context_bgrtd: &[f32], first_row: usize, mixed: &mut [f32]) {
    let sample_elements = spec.positions * spec.query_width();
    for (offset, row) in mixed.chunks_exact_mut(spec.query_width()).enumerate() {
        let (sample, position) = ((first_row + offset) / spec.positions, (first_row + offset) % spec.positions);
        let groups = &context_bgrtd[sample * sample_elements..(sample + 1) * sample_elements];
        attention::gather_context_row(spec, groups, position, row);
    }
}

/// Gradients of a block's input and of its parameters in canonical order.
#[derive(Debug)]
pub(super) struct Gradients {
    pub(super) x_nh: Vec<f32>,
    pub(super) weights: [Vec<f32>; BLOCK_WEIGHTS],
}

/// Gradients on the way through the block, and the inputs of each matrix again.
struct Pass<'a> {
    spec: AttentionSpec,
    rotary: Rotary<'a>,
    x_nh: &'a [f32],
    weights: Weights<'a>,
    saved: &'a Saved,
}

/// What the feed-forward part of the backward pass leaves for the rest.
struct FeedForwardBackward {
    gated_nf: Buffer,
    d_gate_nf: Buffer,
    d_up_nf: Buffer,
    normed_nh: Buffer,
    d_middle_nh: Buffer,
    mixed_nq: Buffer,
    d_mixed_nq: Buffer,
    d_norm_h: Vec<f32>,
}

/// What the projections' part leaves.
struct ProjectBackward {
    d_projected_nw: Buffer,
    normed_nh: Buffer,
    d_x_nh: Buffer,
    d_norm_h: Vec<f32>,
}

/// Gradients from `d_out_nh`, that of the block's output.
pub(super) fn backward(
    spec: AttentionSpec,
    rotary: Rotary<'_>,
    x_nh: &[f32],
    weights: Weights<'_>,
    saved: &Saved,
    d_out_nh: &[f32],
) -> Gradients {
    let pass = Pass { spec, rotary, x_nh, weights, saved };
    let feed_forward = pass.feed_forward(d_out_nh);
    let d_heads_bgrtd = pass.attend(&feed_forward.d_mixed_nq);
    let project = pass.project(&d_heads_bgrtd, &feed_forward.d_middle_nh);
    pass.weights(d_out_nh, feed_forward, project)
}

impl Pass<'_> {
    fn feed_forward(&self, d_out_nh: &[f32]) -> FeedForwardBackward {
        let (spec, weights, saved) = (self.spec, self.weights, self.saved);
        let (hidden, inner, query_width) = (weights.hidden(), weights.inner(), spec.query_width());
        let rows = spec.samples * spec.positions;
        let mut d_norm_partial = vec![0.0; rows.div_ceil(ROW_PIECE) * hidden];
        let mut pass = FeedForwardBackward {
            gated_nf: Buffer::stale(rows * inner),
            d_gate_nf: Buffer::stale(rows * inner),
            d_up_nf: Buffer::stale(rows * inner),
            normed_nh: Buffer::stale(rows * hidden),
            d_middle_nh: Buffer::stale(rows * hidden),
            mixed_nq: Buffer::stale(rows * query_width),
            d_mixed_nq: Buffer::stale(rows * query_width),
            d_norm_h: Vec::new(),
        };
        let wide = pass.gated_nf.par_chunks_mut(ROW_PIECE * inner);
        let wide = wide.zip(pass.d_gate_nf.par_chunks_mut(ROW_PIECE * inner));
        let wide = wide.zip(pass.d_up_nf.par_chunks_mut(ROW_PIECE * inner));
        let streams = pass.normed_nh.par_chunks_mut(ROW_PIECE * hidden);
        let streams = streams.zip(pass.d_middle_nh.par_chunks_mut(ROW_PIECE * hidden));
        let heads = pass.mixed_nq.par_chunks_mut(ROW_PIECE * query_width);
        let heads = heads.zip(pass.d_mixed_nq.par_chunks_mut(ROW_PIECE * query_width));
        let pieces = wide.zip(streams).zip(heads).zip(d_norm_partial.par_chunks_mut(hidden)).enumerate();
        pieces.for_each_init(
            || Buffer::stale(ROW_PIECE * hidden),
            |d_normed, (piece, (((wide, (normed, d_middle)), (mixed, d_mixed)), d_norm))| {
                let ((gated, d_gate), d_up) = wide;
                let first = piece * ROW_PIECE;
                let of = |values: &'_ [f32], width: usize, length: usize| -> std::ops::Range<usize> {
                    debug_assert!(first * width + length <= values.len());
                    first * width..first * width + length
                };
                let d_out = &d_out_nh[of(d_out_nh, hidden, d_middle.len())];
                let middle = &saved.middle_nh[of(&saved.middle_nh, hidden, d_middle.len())];
                let gate = &saved.gate_nf[of(&saved.gate_nf, inner, gated.len())];
                let up = &saved.up_nf[of(&saved.up_nf, inner, gated.len())];
                let inverse_rms = &saved.feed_forward_inverse_rms_n[first..first + d_middle.len() / hidden];
                let d_normed = &mut d_normed[..d_middle.len()];
                let down = Matrix::new(weights.down, inner);
                multiply(MatrixMut::new(gated, inner), Store::Replace, Matrix::new(d_out, hidden), down);
                swiglu_backward(gate, up, gated, d_gate, d_up);
                let (gate, up) = (Matrix::new(weights.gate, hidden), Matrix::new(weights.up, hidden));
                multiply(MatrixMut::new(d_normed, hidden), Store::Replace, Matrix::new(d_gate, inner), gate);
                multiply(MatrixMut::new(d_normed, hidden), Store::Add, Matrix::new(d_up, inner), up);
                rms_norm_again(middle, weights.feed_forward_norm, inverse_rms, normed);
                d_middle.copy_from_slice(d_out);
                rms_norm_backward(d_normed, middle, weights.feed_forward_norm, inverse_rms, d_middle, d_norm);
                let output = Matrix::new(weights.output, query_width);
                let d_mixed = MatrixMut::new(d_mixed, query_width);
                multiply(d_mixed, Store::Replace, Matrix::new(d_middle, hidden), output);
                gather_context(spec, &saved.context_bgrtd, first, mixed);
            },
        );
        pass.d_norm_h = sum_rows(&d_norm_partial, hidden);
        pass
    }

    /// Gradients `[b, g, r + 2, t, d]` of every group's heads.
    fn attend(&self, d_mixed_nq: &[f32]) -> Buffer {
        let (spec, saved) = (self.spec, self.saved);
        let mut d_heads = Buffer::stale(spec.samples * spec.groups * spec.group_projected_elements());
        let (context_elements, log_elements) = (spec.group_context_elements(), spec.group_heads * spec.positions);
        let (projected_elements, mixed_elements) =
            (spec.positions * spec.projected_width(), spec.positions * spec.query_width());
        d_heads.par_chunks_mut(spec.group_projected_elements()).enumerate().for_each_init(
            || (Scratch::new(spec), Buffer::stale(context_elements)),
            |(scratch, d_context), (index, d_heads)| {
                let (sample, group) = (index / spec.groups, index % spec.groups);
                let d_mixed = &d_mixed_nq[sample * mixed_elements..(sample + 1) * mixed_elements];
                attention::gather_context_group(spec, d_mixed, group, d_context);
                let upstream = Upstream {
                    projected: &saved.projected_nw[sample * projected_elements..(sample + 1) * projected_elements],
                    context: &saved.context_bgrtd[index * context_elements..(index + 1) * context_elements],
                    log_sum: &saved.log_sum_bgrt[index * log_elements..(index + 1) * log_elements],
                    gradient_context: d_context,
                };
                attention::backward(spec, upstream, group, self.rotary, d_heads, scratch);
            },
        );
        d_heads
    }

    fn project(&self, d_heads_bgrtd: &[f32], d_middle_nh: &[f32]) -> ProjectBackward {
        let (spec, weights, saved) = (self.spec, self.weights, self.saved);
        let (hidden, width) = (weights.hidden(), spec.projected_width());
        let rows = spec.samples * spec.positions;
        let mut d_norm_partial = vec![0.0; rows.div_ceil(ROW_PIECE) * hidden];
        let mut pass = ProjectBackward {
            d_projected_nw: Buffer::stale(rows * width),
            normed_nh: Buffer::stale(rows * hidden),
            d_x_nh: Buffer::stale(rows * hidden),
            d_norm_h: Vec::new(),
        };
        let streams = pass.normed_nh.par_chunks_mut(ROW_PIECE * hidden);
        let streams = streams.zip(pass.d_x_nh.par_chunks_mut(ROW_PIECE * hidden));
        let pieces = pass.d_projected_nw.par_chunks_mut(ROW_PIECE * width).zip(streams);
        pieces.zip(d_norm_partial.par_chunks_mut(hidden)).enumerate().for_each_init(
            || Buffer::stale(ROW_PIECE * hidden),
            |d_normed, (piece, ((d_projected, (normed, d_x)), d_norm))| {
                let rows = piece * ROW_PIECE..piece * ROW_PIECE + d_x.len() / hidden;
                let elements = rows.start * hidden..rows.end * hidden;
                let (x, d_normed) = (&self.x_nh[elements.clone()], &mut d_normed[..d_x.len()]);
                let inverse_rms = &saved.attention_inverse_rms_n[rows.clone()];
                gather_projected(spec, d_heads_bgrtd, rows.start, d_projected);
                let d_projected = Matrix::new(d_projected, width);
                for (weight, column, columns) in weights.projections() {
                    let store = if column == 0 { Store::Replace } else { Store::Add };
                    let d_part = d_projected.columns(column, columns);
                    multiply(MatrixMut::new(d_normed, hidden), store, d_part, Matrix::new(weight, hidden));
                }
                rms_norm_again(x, weights.attention_norm, inverse_rms, normed);
                d_x.copy_from_slice(&d_middle_nh[elements]);
                rms_norm_backward(d_normed, x, weights.attention_norm, inverse_rms, d_x, d_norm);
            },
        );
        pass.d_norm_h = sum_rows(&d_norm_partial, hidden);
        pass
    }

    /// Every weight's gradient dYᵀ·X, in pieces of its rows.
    fn weights(&self, d_out_nh: &[f32], feed_forward: FeedForwardBackward, project: ProjectBackward) -> Gradients {
        let weights = self.weights;
        let (hidden, inner, query_width) = (weights.hidden(), weights.inner(), self.spec.query_width());
        let d_projected = Matrix::new(&project.d_projected_nw, self.spec.projected_width());
        let [(_, _, query), (_, key_column, key), (_, value_column, value)] = weights.projections();
        let (attention_in, mixed) =
            (Matrix::new(&project.normed_nh, hidden), Matrix::new(&feed_forward.mixed_nq, query_width));
        let feed_forward_in = Matrix::new(&feed_forward.normed_nh, hidden);
        let factors = [
            (d_projected.columns(0, query), query, attention_in, hidden),
            (d_projected.columns(key_column, key), key, attention_in, hidden),
            (d_projected.columns(value_column, value), value, attention_in, hidden),
            (Matrix::new(&feed_forward.d_middle_nh, hidden), hidden, mixed, query_width),
            (Matrix::new(&feed_forward.d_gate_nf, inner), inner, feed_forward_in, hidden),
            (Matrix::new(&feed_forward.d_up_nf, inner), inner, feed_forward_in, hidden),
            (Matrix::new(d_out_nh, hidden), hidden, Matrix::new(&feed_forward.gated_nf, inner), inner),
        ];
        let mut matrices = factors.map(|(_, rows, _, columns)| Buffer::stale(rows * columns));
        let jobs = matrices.iter_mut().zip(factors).flat_map(|(gradient, (d_y, _, x, columns))| {
            let pieces = gradient.chunks_mut(WEIGHT_PIECE * columns).enumerate();
            pieces.map(move |(piece, gradient)| (gradient, d_y, piece * WEIGHT_PIECE, x, columns))
        });
        let jobs: Vec<_> = jobs.collect();
        jobs.into_par_iter().for_each(|(gradient, d_y, first, x, columns)| {
            let d_y = d_y.columns(first, gradient.len() / columns).transposed();
            multiply(MatrixMut::new(gradient, columns), Store::Replace, d_y, x);
        });
        let [query, key, value, output, gate, up, down] = matrices.map(Buffer::into_vec);
        let (attention_norm, feed_forward_norm) = (project.d_norm_h, feed_forward.d_norm_h);
        Gradients {
            x_nh: project.d_x_nh.into_vec(),
            weights: [query, key, value, output, gate, up, down, attention_norm, feed_forward_norm],
        }
    }
}

/// Gradient rows of the projections from `first_row` on, `[rows, width]`.
fn gather_projected(spec: AttentionSpec, heads_bgrtd: &[f32], first_row: usize, projected: &mut [f32]) {
    let sample_elements = spec.groups * spec.group_projected_elements();
    for (offset, row) in projected.chunks_exact_mut(spec.projected_width()).enumerate() {
        let (sample, position) = ((first_row + offset) / spec.positions, (first_row + offset) % spec.positions);
        let groups = &heads_bgrtd[sample * sample_elements..(sample + 1) * sample_elements];
        attention::gather_projected_row(spec, groups, position, row);
    }
}

/// Sum of the rows, first to last.
pub(super) fn sum_rows(partial: &[f32], width: usize) -> Vec<f32> {
    let mut sum = vec![0.0; width];
    for row in partial.chunks_exact(width) {
        for (total, value) in sum.iter_mut().zip(row) {
            *total += value;
        }
    }
    sum
}
