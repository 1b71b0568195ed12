//! The two ends of the model on slices: embedding, and final norm, output projection and cross-entropy in one.
//!
//! The gradient of the summed cross-entropy by the logits is softmax − one-hot. It takes the logits' place in the
//! forward pass, so that one array of n × v exists, and the backward pass is two products.

use super::block::{ROW_PIECE, sum_rows};
use super::buffers::Buffer;
use super::elementwise::{exp, maximum, rms_norm, rms_norm_again, rms_norm_backward, sum_lanes, vectorised};
use super::linear::{Matrix, MatrixMut, Store, multiply};
use rayon::prelude::*;

/// Rows of the output projection's gradient in one piece of work.
const VOCABULARY_PIECE: usize = 128;

/// Rows of `table_vh` by id.
pub(super) fn embed(table_vh: &[f32], hidden: usize, ids: &[i32]) -> Vec<f32> {
    let mut out = Buffer::stale(ids.len() * hidden);
    for (row, id) in out.chunks_exact_mut(hidden).zip(ids) {
        row.copy_from_slice(&table_vh[*id as usize * hidden..(*id as usize + 1) * hidden]);
    }
    out.into_vec()
}

/// Adds every row of `gradient_nh` to the row of its id, in the order of the ids.
pub(super) fn embed_backward(gradient_nh: &[f32], hidden: usize, ids: &[i32], vocabulary: usize) -> Vec<f32> {
    let mut table = Buffer::stale(vocabulary * hidden);
    table.fill(0.0);
    for (row, id) in gradient_nh.chunks_exact(hidden).zip(ids) {
        for (sum, value) in table[*id as usize * hidden..(*id as usize + 1) * hidden].iter_mut().zip(row) {
            *sum += value;
        }
    }
    table.into_vec()
}

/// What the forward pass keeps.
#[derive(Debug)]
pub(super) struct Saved {
    inverse_rms_n: Buffer,
    /// Gradient of the summed loss by the logits.
    d_logits_nv: Buffer,
}

/// Summed cross-entropy, nats.
pub(super) fn loss(x_nh: &[f32], norm_h: &[f32], head_vh: &[f32], targets_n: &[i32], epsilon: f32) -> (f64, Saved) {
    let hidden = norm_h.len();
    let (rows, vocabulary) = (x_nh.len() / hidden, head_vh.len() / hidden);
    let mut saved = Saved { inverse_rms_n: Buffer::stale(rows), d_logits_nv: Buffer::stale(rows * vocabulary) };
    let mut partial = vec![0.0_f64; rows.div_ceil(ROW_PIECE)];
    let pieces = x_nh.par_chunks(ROW_PIECE * hidden).zip(targets_n.par_chunks(ROW_PIECE));
    let pieces = pieces.zip(saved.d_logits_nv.par_chunks_mut(ROW_PIECE * vocabulary));
    let pieces = pieces.zip(saved.inverse_rms_n.par_chunks_mut(ROW_PIECE)).zip(&mut partial);
    pieces.for_each_init(
        || Buffer::stale(ROW_PIECE * hidden),
        |normed, ((((x, targets), logits), inverse_rms), nats)| {
            let normed = &mut normed[..x.len()];
            rms_norm(x, norm_h, epsilon, normed, inverse_rms);
            let head = Matrix::new(head_vh, hidden).transposed();
            multiply(MatrixMut::new(logits, vocabulary), Store::Replace, Matrix::new(normed, hidden), head);
            let rows = logits.chunks_exact_mut(vocabulary).zip(targets);
            *nats = rows.map(|(logits, target)| cross_entropy(logits, *target as usize)).sum();
        },
    );
    (partial.iter().sum(), saved)
}

/// Cross-entropy of one row; the row becomes softmax − one-hot.
fn cross_entropy(logits: &mut [f32], target: usize) -> f64 {
    vectorised(
        #[inline(always)]
        || {
            let highest = maximum(logits);
            let target_logit = logits[target];
            for x in logits.iter_mut() {
                *x = exp(*x - highest);
            }
            let sum = sum_lanes(logits.len(), |i| logits[i]);
            let inverse = 1.0 / sum;
            for x in logits.iter_mut() {
                *x *= inverse;
            }
            logits[target] -= 1.0;
            f64::from(highest) + f64::from(sum).ln() - f64::from(target_logit)
        },
    )
}

/// Gradients of [`loss`] times `scale`: of x, of the norm's weight, of the output projection.
pub(super) fn loss_backward(
    x_nh: &[f32],
    norm_h: &[f32],
    head_vh: &[f32],
    saved: &Saved,
    scale: f32,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let hidden = norm_h.len();
    let (rows, vocabulary) = (x_nh.len() / hidden, head_vh.len() / hidden);
    let (mut d_x_nh, mut normed_nh) = (Buffer::stale(x_nh.len()), Buffer::stale(x_nh.len()));
    let mut d_norm_partial = vec![0.0; rows.div_ceil(ROW_PIECE) * hidden];
    let pieces = d_x_nh.par_chunks_mut(ROW_PIECE * hidden).zip(normed_nh.par_chunks_mut(ROW_PIECE * hidden));
    let pieces = pieces.zip(x_nh.par_chunks(ROW_PIECE * hidden)).zip(d_norm_partial.par_chunks_mut(hidden));
    let kept = saved.d_logits_nv.par_chunks(ROW_PIECE * vocabulary).zip(saved.inverse_rms_n.par_chunks(ROW_PIECE));
    pieces.zip(kept).for_each_init(
        || Buffer::stale(ROW_PIECE * hidden),
        |d_normed, ((((d_x, normed), x), d_norm), (d_logits, inverse_rms))| {
            let d_normed = &mut d_normed[..x.len()];
            let d_logits = Matrix::new(d_logits, vocabulary);
            multiply(MatrixMut::new(d_normed, hidden), Store::Replace, d_logits, Matrix::new(head_vh, hidden));
            d_normed.iter_mut().for_each(|g| *g *= scale);
            d_x.fill(0.0);
            rms_norm_backward(d_normed, x, norm_h, inverse_rms, d_x, d_norm);
            rms_norm_again(x, norm_h, inverse_rms, normed);
            normed.iter_mut().for_each(|y| *y *= scale);
        },
    );
    let mut d_head_vh = Buffer::stale(head_vh.len());
    let d_logits = Matrix::new(&saved.d_logits_nv, vocabulary);
    d_head_vh.par_chunks_mut(VOCABULARY_PIECE * hidden).enumerate().for_each(|(piece, d_head)| {
        let d_logits = d_logits.columns(piece * VOCABULARY_PIECE, d_head.len() / hidden).transposed();
        multiply(MatrixMut::new(d_head, hidden), Store::Replace, d_logits, Matrix::new(&normed_nh, hidden));
    });
    (d_x_nh.into_vec(), sum_rows(&d_norm_partial, hidden), d_head_vh.into_vec())
}
