//! The outer step: from the merged delta to the next global parameters, on the host, in f32.
//!
//! Elementwise and in a fixed order, so that equal inputs give equal bits on every site, whatever its engine. Two rules:
//!
//! Nesterov momentum on merged pseudo-gradients (DiLoCo, arXiv 2311.08105; the form of `torch.optim.SGD(nesterov=True)`):
//! ```text
//! m = mu * m + D;   G = G - eta * (D + mu * m)
//! ```
//! and, for `synchronous`, where D is the merged gradient of one step, the run's own inner optimiser (AdamW as
//! `torch.optim.AdamW` defines it, or plain SGD), after clipping by the global norm.

use base::config::{InnerOptimizer, Strategy, SyncSection, TrainSection};
use base::{Fragment, ParameterSchema, RunConfig};
use std::ops::Range;

/// What the outer step does with the merged delta.
#[derive(Debug, Clone, PartialEq)]
pub enum OuterRule {
    /// Nesterov momentum on pseudo-gradients.
    Nesterov {
        /// eta
        learning_rate: f64,
        /// mu
        momentum: f64,
    },
    /// The inner optimiser on merged gradients.
    Gradient(TrainSection),
}

/// The rule, its state, and which parameters are decayed.
#[derive(Debug, Clone, PartialEq)]
pub struct OuterOptimizer {
    rule: OuterRule,
    decayed: Vec<Range<usize>>,
    buffers: Vec<Vec<f32>>,
}

impl OuterOptimizer {
    /// The outer optimiser of a run, with zero state.
    pub fn new(config: &RunConfig, schema: &ParameterSchema) -> Self {
        let SyncSection { outer_learning_rate, outer_momentum, .. } = config.sync;
        let rule = match config.sync.strategy {
            Strategy::DiLoCo | Strategy::Streaming => {
                OuterRule::Nesterov { learning_rate: outer_learning_rate, momentum: outer_momentum }
            }
            Strategy::Synchronous => OuterRule::Gradient(config.train.clone()),
        };
        let matrices = schema.parameters().iter().filter(|parameter| parameter.shape.len() >= 2);
        let decayed = matrices.map(|parameter| parameter.range.clone()).collect();
        let buffers = vec![vec![0.0; schema.elements()]; Self::buffer_names_of(&rule).len()];
        Self { rule, decayed, buffers }
    }

    fn buffer_names_of(rule: &OuterRule) -> &'static [&'static str] {
        match rule {
            OuterRule::Nesterov { momentum, .. } => {
                // Without momentum there is nothing to remember, hash or hand to a newcomer.
                if *momentum == 0.0 { &[] } else { &["momentum"] }
            }
            OuterRule::Gradient(train) => match train.optimizer {
                InnerOptimizer::AdamW => &["first_moment", "second_moment"],
                InnerOptimizer::Sgd => &[],
            },
        }
    }

    /// What the state buffers are called in a checkpoint, in order.
    pub fn buffer_names(&self) -> &'static [&'static str] {
        Self::buffer_names_of(&self.rule)
    }

    /// State buffers, each as long as the parameters.
    pub fn buffers(&self) -> &[Vec<f32>] {
        &self.buffers
    }

    /// The same, to be filled from a checkpoint or a peer.
    pub fn buffers_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.buffers
    }

    /// Whether a step on a part of the parameters is part of the step on all: [`OuterOptimizer::step_part`].
    pub fn is_separable(&self) -> bool {
        matches!(self.rule, OuterRule::Nesterov { .. })
    }

    /// Applies `merged` to the parameters in `range` of the whole `global`.
    ///
    /// # Panics
    /// Where the step is not [separable](OuterOptimizer::is_separable), or lengths differ.
    pub fn step_part(&mut self, range: Range<usize>, global: &mut [f32], merged: &[f32]) {
        assert_eq!(merged.len(), range.len(), "a merge is as long as its part");
        let OuterRule::Nesterov { learning_rate, momentum } = self.rule else {
            unreachable!("gradients are clipped by the norm of all of them")
        };
        averaging_step((learning_rate as f32, momentum as f32), range, &mut self.buffers, global, merged);
    }

    /// Applies `merged`, the merge of `fragment`, to the whole `global`. `steps_before` counts the outer steps already taken: it places the step in the
    /// learning-rate schedule and in AdamW's bias correction. `merged` is scratch: clipping scales it in place.
    pub fn step(&mut self, steps_before: u64, fragment: &Fragment, global: &mut [f32], merged: &mut [f32]) {
        assert_eq!(merged.len(), fragment.elements(), "a merge is as long as its fragment");
        match &self.rule {
            OuterRule::Nesterov { learning_rate, momentum } => {
                let rates = (*learning_rate as f32, *momentum as f32);
                let mut rest = &*merged;
                for range in &fragment.ranges {
                    let (part, after) = rest.split_at(range.len());
                    averaging_step(rates, range.clone(), &mut self.buffers, global, part);
                    rest = after;
                }
            }
            OuterRule::Gradient(train) => {
                assert_eq!(merged.len(), global.len(), "gradients are merged whole");
                clip(merged, train.gradient_clip_norm);
                let learning_rate = train.learning_rate_at(steps_before);
                match train.optimizer {
                    InnerOptimizer::Sgd => sgd(global, merged, learning_rate as f32),
                    InnerOptimizer::AdamW => {
                        decay(global, &self.decayed, (1.0 - learning_rate * train.weight_decay) as f32);
                        let [first, second] = &mut self.buffers[..] else { unreachable!("AdamW keeps two moments") };
                        adam(train, learning_rate, steps_before + 1, global, merged, first, second);
                    }
                }
            }
        }
    }
}

/// The step of the parameters in `range` of the flat vector, by pseudo-gradients.
fn averaging_step(
    (learning_rate, momentum): (f32, f32),
    range: Range<usize>,
    buffers: &mut [Vec<f32>],
    global: &mut [f32],
    merged: &[f32],
) {
    let global = &mut global[range.clone()];
    match buffers.first_mut() {
        Some(buffer) => nesterov(global, merged, &mut buffer[range], learning_rate, momentum),
        None => sgd(global, merged, learning_rate),
    }
}

fn nesterov(global: &mut [f32], merged: &[f32], buffer: &mut [f32], learning_rate: f32, momentum: f32) {
    for ((parameter, delta), velocity) in global.iter_mut().zip(merged).zip(buffer) {
        *velocity = momentum * *velocity + delta;
        *parameter -= learning_rate * (delta + momentum * *velocity);
    }
}

fn sgd(global: &mut [f32], gradient: &[f32], learning_rate: f32) {
    for (parameter, gradient) in global.iter_mut().zip(gradient) {
        *parameter -= learning_rate * gradient;
    }
}

fn decay(global: &mut [f32], ranges: &[Range<usize>], factor: f32) {
    for range in ranges {
        global[range.clone()].iter_mut().for_each(|parameter| *parameter *= factor);
    }
}

/// Adam's update with bias corrections as in `torch.optim.AdamW`: p -= (lr / c1) * m / (sqrt(v) / sqrt(c2) + eps).
fn adam(
    train: &TrainSection,
    learning_rate: f64,
    step: u64,
    global: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    let correction = |beta: f64| 1.0 - libm::pow(beta, step as f64);
    let step_size = (learning_rate / correction(train.beta1)) as f32;
    let second_scale = correction(train.beta2).sqrt() as f32;
    let (beta1, beta2, epsilon) = (train.beta1 as f32, train.beta2 as f32, train.epsilon as f32);
    let (rest1, rest2) = ((1.0 - train.beta1) as f32, (1.0 - train.beta2) as f32);
    for (((parameter, gradient), m), v) in global.iter_mut().zip(gradient).zip(first).zip(second) {
        *m = beta1 * *m + rest1 * gradient;
        *v = beta2 * *v + rest2 * (gradient * gradient);
        *parameter -= step_size * (*m / (v.sqrt() / second_scale + epsilon));
    }
}

/// Scales `gradient` so that its norm is at most `norm_max` (0: no bound), as `torch.nn.utils.clip_grad_norm_` does. The
/// norm is summed in f64, in order.
fn clip(gradient: &mut [f32], norm_max: f64) {
    if norm_max == 0.0 {
        return;
    }
    let norm = gradient.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
    let scale = norm_max / (norm + 1e-6);
    if scale < 1.0 {
        gradient.iter_mut().for_each(|value| *value *= scale as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_momentum_a_whole_step_lands_on_the_local_parameters() {
        let (mut global, local) = ([1.0f32, -2.0], [0.5f32, -1.0]);
        let merged = [global[0] - local[0], global[1] - local[1]];
        nesterov(&mut global, &merged, &mut [0.0; 2], 1.0, 0.0);
        assert_eq!(global, local);
    }

    #[test]
    fn nesterov_is_pytorchs() {
        // torch.optim.SGD(lr=0.7, momentum=0.9, nesterov=True) on gradients 1, then 1:
        // m=1, p -= 0.7*1.9 = -1.33; m=1.9, p -= 0.7*(1+1.71) = -3.227.
        let (mut global, mut buffer) = ([0.0f32], [0.0f32]);
        nesterov(&mut global, &[1.0], &mut buffer, 0.7, 0.9);
        assert!((global[0] + 1.33).abs() < 1e-6, "{global:?}");
        nesterov(&mut global, &[1.0], &mut buffer, 0.7, 0.9);
        assert!((global[0] + 3.227).abs() < 1e-5, "{global:?}");
    }

    #[test]
    fn first_adam_step_moves_by_the_learning_rate() {
        let train = TrainSection::default();
        let (mut global, mut m, mut v) = ([0.0f32; 2], [0.0; 2], [0.0; 2]);
        adam(&train, 0.01, 1, &mut global, &[3.0, -0.5], &mut m, &mut v);
        assert!((global[0] + 0.01).abs() < 1e-6 && (global[1] - 0.01).abs() < 1e-6, "{global:?}");
    }

    #[test]
    fn clipping_keeps_direction_and_bounds_the_norm() {
        let mut gradient = [3.0f32, 4.0];
        clip(&mut gradient, 1.0);
        assert!((gradient[0] - 0.6).abs() < 1e-5 && (gradient[1] - 0.8).abs() < 1e-5);
        let mut small = [0.3f32, 0.4];
        clip(&mut small, 1.0);
        assert_eq!(small, [0.3, 0.4]);
    }
}
