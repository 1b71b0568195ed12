//! The inner optimisers: `torch.optim.AdamW` and plain SGD, after global-norm clipping.
//!
//! AdamW (Loshchilov and Hutter 2019, algorithm 2, as PyTorch computes it in f32), for step t from 1:
//! ```text
//! p ← p·(1 − η·λ)                    λ on matrices only
//! m ← m + (g − m)·(1 − β1)
//! v ← v·β2 + g²·(1 − β2)
//! p ← p − η/(1 − β1^t) · m / (√v / √(1 − β2^t) + ε)
//! ```
//! Where the steps see a share s of the batch of all sites ([`engine::Engine::set_batch_share`]), the last line is
//! ```text
//! m̂ = m / (1 − β1^t)
//! p ← p − η · m̂ / (√(m̂² + s · max(v / (1 − β2^t) − m̂², 0)) + ε)
//! ```
//! Clipping multiplies every gradient by min(1, c / (‖g‖ + 1e-6)), as `torch.nn.utils.clip_grad_norm_`.

use crate::kernels;
use crate::model::BlockKernels;
use crate::weights;
use base::config::{InnerOptimizer, TrainSection};
use burn::tensor::Tensor;
use engine::EngineError;

/// Keeps the quotient of `clip_grad_norm_` finite.
const CLIP_NORM_OFFSET: f64 = 1e-6;

/// AdamW's memory of one run.
#[derive(Debug)]
pub(crate) struct Optimizer {
    /// Which implementation of the arithmetic is used.
    pub(crate) kernels: BlockKernels,
    /// Empty until the first AdamW step.
    pub(crate) first_moments: Vec<Tensor<2>>,
    /// As long as `first_moments`.
    pub(crate) second_moments: Vec<Tensor<2>>,
    /// Steps taken.
    pub(crate) steps: u64,
    /// Part of the batch of all sites that steps see.
    pub(crate) batch_share: f64,
}

/// Numbers of one AdamW step, folded in f64 as PyTorch does before it touches a tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWStep {
    pub(crate) gradient_scale: f32,
    pub(crate) decay: f32,
    pub(crate) beta1_rest: f32,
    pub(crate) beta2: f32,
    pub(crate) beta2_rest: f32,
    pub(crate) step_size: f32,
    pub(crate) second_correction: f32,
    pub(crate) epsilon: f32,
    /// Where steps see a part of the batch only.
    pub(crate) part: Option<BatchPart>,
}

/// Numbers of the second moment that a joint batch would have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchPart {
    pub(crate) share: f32,
    /// 1 / (1 − β1^t)
    pub(crate) first_scale: f32,
    /// 1 / (1 − β2^t)
    pub(crate) second_scale: f32,
    /// η
    pub(crate) learning_rate: f32,
}

impl AdamWStep {
    fn new(train: &TrainSection, learning_rate: f64, gradient_scale: f64, step: u64, batch_share: f64) -> Self {
        let power = |beta: f64| beta.powf(step as f64);
        let part = BatchPart {
            share: batch_share as f32,
            first_scale: (1.0 / (1.0 - power(train.beta1))) as f32,
            second_scale: (1.0 / (1.0 - power(train.beta2))) as f32,
            learning_rate: learning_rate as f32,
        };
        Self {
            gradient_scale: gradient_scale as f32,
            decay: (1.0 - learning_rate * train.weight_decay) as f32,
            beta1_rest: (1.0 - train.beta1) as f32,
            beta2: train.beta2 as f32,
            beta2_rest: (1.0 - train.beta2) as f32,
            step_size: (learning_rate / (1.0 - power(train.beta1))) as f32,
            second_correction: (1.0 - power(train.beta2)).sqrt() as f32,
            epsilon: train.epsilon as f32,
            part: (batch_share < 1.0).then_some(part),
        }
    }
}

/// Factor of every gradient for a norm, as `torch.nn.utils.clip_grad_norm_`; 1 where clipping is off.
pub(crate) fn clip_scale(clip_norm: f64, gradient_norm: f64) -> f64 {
    if clip_norm == 0.0 { 1.0 } else { (clip_norm / (gradient_norm + CLIP_NORM_OFFSET)).min(1.0) }
}

impl Optimizer {
    /// Before the first step.
    pub(crate) fn new(kernels: BlockKernels) -> Self {
        Self { kernels, first_moments: Vec::new(), second_moments: Vec::new(), steps: 0, batch_share: 1.0 }
    }

    /// Global norm of the gradients, in one transfer from the device.
    pub(crate) fn gradient_norm(&self, gradients: &[Tensor<2>], device_name: &str) -> Result<f64, EngineError> {
        match self.kernels {
            BlockKernels::Fused => {
                Ok(gradients.iter().map(|gradient| kernels::sum_of_squares(gradient.clone())).sum::<f64>().sqrt())
            }
            BlockKernels::Composed => {
                let squares = gradients.iter().map(|gradient| gradient.clone().square().sum()).collect();
                let squares = weights::download(&Tensor::cat(squares, 0), device_name)?;
                Ok(squares.into_iter().map(f64::from).sum::<f64>().sqrt())
            }
        }
    }

    /// Makes what the first step needs besides the parameters, before it changes any.
    pub(crate) fn prepare(&mut self, train: &TrainSection, parameters: &[Tensor<2>]) {
        if train.optimizer == InnerOptimizer::AdamW && self.first_moments.is_empty() {
            self.first_moments = parameters.iter().map(Tensor::zeros_like).collect();
            self.second_moments = parameters.iter().map(Tensor::zeros_like).collect();
        }
    }

    /// Takes [`Self::prepare`] back where no step followed.
    pub(crate) fn forget_if_unused(&mut self) {
        if self.steps == 0 {
            (self.first_moments, self.second_moments) = (Vec::new(), Vec::new());
        }
    }

    /// One step on `parameters`, after [`Self::prepare`]; `decayed[i]` says whether parameter i is a matrix.
    pub(crate) fn step(
        &mut self,
        train: &TrainSection,
        parameters: &mut [Tensor<2>],
        gradients: Vec<Tensor<2>>,
        decayed: &[bool],
        learning_rate: f64,
        gradient_scale: f64,
    ) {
        self.steps += 1;
        match train.optimizer {
            InnerOptimizer::Sgd => {
                for (parameter, gradient) in parameters.iter_mut().zip(gradients) {
                    replace(parameter, |p| p - gradient.mul_scalar(gradient_scale).mul_scalar(learning_rate));
                }
            }
            InnerOptimizer::AdamW => {
                let step = AdamWStep::new(train, learning_rate, gradient_scale, self.steps, self.batch_share);
                self.adamw(step, parameters, gradients, decayed);
            }
        }
    }

    fn adamw(&mut self, step: AdamWStep, parameters: &mut [Tensor<2>], gradients: Vec<Tensor<2>>, decayed: &[bool]) {
        let moments = self.first_moments.iter_mut().zip(&mut self.second_moments);
        for (((parameter, gradient), (first, second)), decayed) in
            parameters.iter_mut().zip(gradients).zip(moments).zip(decayed)
        {
            let step = AdamWStep { decay: if *decayed { step.decay } else { 1.0 }, ..step };
            match self.kernels {
                BlockKernels::Fused => kernels::adamw(step, parameter, gradient, first, second),
                BlockKernels::Composed => composed_adamw(step, parameter, gradient, first, second),
            }
        }
    }
}

/// One AdamW step in Burn's operations, for any device.
fn composed_adamw(
    step: AdamWStep,
    parameter: &mut Tensor<2>,
    gradient: Tensor<2>,
    first: &mut Tensor<2>,
    second: &mut Tensor<2>,
) {
    let gradient = gradient.mul_scalar(step.gradient_scale);
    replace(first, |m| m.clone() + (gradient.clone() - m).mul_scalar(step.beta1_rest));
    replace(second, |v| v.mul_scalar(step.beta2) + gradient.square().mul_scalar(step.beta2_rest));
    let (numerator, denominator, size) = match step.part {
        None => (first.clone(), second.clone().sqrt().div_scalar(step.second_correction), step.step_size),
        Some(part) => {
            let mean = first.clone().mul_scalar(part.first_scale);
            let signal = mean.clone().square();
            let noise = (second.clone().mul_scalar(part.second_scale) - signal.clone()).clamp_min(0.0);
            (mean, (signal + noise.mul_scalar(part.share)).sqrt(), part.learning_rate)
        }
    };
    let quotient = numerator / denominator.add_scalar(step.epsilon);
    replace(parameter, |p| p.mul_scalar(step.decay) - quotient.mul_scalar(size));
}

/// Replaces a tensor by a function of itself, giving the function the only reference to it.
fn replace(tensor: &mut Tensor<2>, change: impl FnOnce(Tensor<2>) -> Tensor<2>) {
    let placeholder = Tensor::empty([1, 1], &tensor.device());
    let taken = std::mem::replace(tensor, placeholder);
    *tensor = change(taken);
}
