//! The optimiser's arithmetic on `flex`: one pass over parameter, gradient and moments, in place.

use super::buffers::recycle;
use super::elementwise::{self, vectorised};
use super::parameters::{primitive, take};
use super::{FlexTensor, values};
use crate::optimizer::{AdamWStep, BatchPart};
use burn::backend::Flex;
use burn::tensor::Tensor;
use rayon::prelude::*;

/// Elements in one piece of work: four arrays of 64 KiB, which stay in the second-level cache.
const PIECE: usize = 16 * 1024;

/// One AdamW step, in place.
pub(crate) fn adamw(
    step: AdamWStep,
    parameter: &mut Tensor<2>,
    gradient: Tensor<2>,
    first: &mut Tensor<2>,
    second: &mut Tensor<2>,
) {
    let gradient = flex(gradient);
    let (mut p, mut m, mut v) = (take(parameter), take(first), take(second));
    let pieces = p.storage_mut::<f32>().par_chunks_mut(PIECE).zip(values(&gradient).par_chunks(PIECE));
    let moments = m.storage_mut::<f32>().par_chunks_mut(PIECE).zip(v.storage_mut::<f32>().par_chunks_mut(PIECE));
    pieces.zip(moments).for_each(|((p, g), (m, v))| step_piece(step, p, g, m, v));
    recycle(gradient);
    *parameter = Tensor::from_primitive::<Flex>(p);
    *first = Tensor::from_primitive::<Flex>(m);
    *second = Tensor::from_primitive::<Flex>(v);
}

fn step_piece(step: AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    match step.part {
        None => step_on_whole(step, p, g, m, v),
        Some(part) => step_on_part(step, part, p, g, m, v),
    }
}

fn step_on_part(step: AdamWStep, part: BatchPart, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * step.gradient_scale;
                *m += (g - *m) * step.beta1_rest;
                *v = *v * step.beta2 + g * g * step.beta2_rest;
                let mean = *m * part.first_scale;
                let signal = mean * mean;
                let noise = (*v * part.second_scale - signal).max(0.0);
                let denominator = (signal + noise * part.share).sqrt() + step.epsilon;
                *p = *p * step.decay - part.learning_rate * (mean / denominator);
            }
        },
    );
}

fn step_on_whole(step: AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * step.gradient_scale;
                *m += (g - *m) * step.beta1_rest;
                *v = *v * step.beta2 + g * g * step.beta2_rest;
                let denominator = v.sqrt() / step.second_correction + step.epsilon;
                *p = *p * step.decay - step.step_size * (*m / denominator);
            }
        },
    );
}

fn flex(tensor: Tensor<2>) -> FlexTensor {
    primitive(tensor).to_contiguous()
}

/// Σ x², by pieces whose order does not depend on threads.
pub(crate) fn sum_of_squares(tensor: Tensor<2>) -> f64 {
    let tensor = flex(tensor);
    let partial: Vec<f64> = values(&tensor).par_chunks(PIECE).map(elementwise::sum_of_squares).collect();
    partial.iter().sum()
}
