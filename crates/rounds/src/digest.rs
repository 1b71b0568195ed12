//! A gradient in a few numbers, so that two sites can compare theirs without sending them.
//!
//! Of each tensor g its norm, and four projections on random signs s that both sites draw alike:
//! ```text
//! p = sum of s_i g_i,      E[(p_a - p_b)^2] = |g_a - g_b|^2
//! ```
//! So the root mean square of the differences of the projections estimates how far apart the two gradients are, whichever element it is that
//! differs; the chance that it is below a tenth of that is 2e-4 (chi-square of four degrees of freedom). 40 bytes a tensor travel
//! instead of the gradient.

use crate::recompute::{StepMismatch, StepQuantity, relative, relative_difference};
use base::ParameterSchema;
use base::random::Random;
use serde::{Deserialize, Serialize};

/// Projections of a tensor.
const PROJECTIONS: usize = 4;

/// Elements whose signs are taken from 64 random bits.
const ELEMENTS_PER_DRAW: usize = 64 / PROJECTIONS;

/// Most tensors of which a digest can be sent: 40 bytes each are 800 kB of a frame of 1 MiB.
pub const TENSORS_MAX: usize = 20_000;

/// One tensor of a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TensorDigest {
    /// Euclidean norm.
    pub norm: f64,
    /// On random signs.
    pub projections: [f64; PROJECTIONS],
}

/// What a gradient is compared by.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct GradientDigest {
    /// Mean loss of its batch.
    pub loss_nats: f64,
    /// In canonical order.
    pub tensors: Vec<TensorDigest>,
}

/// How far apart two sites may be, each as a part of the quantity itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DigestBounds {
    /// Of the loss.
    pub loss: f64,
    /// Of each tensor of the gradient.
    pub gradient: f64,
}

impl DigestBounds {
    /// The narrower of both: no site widens the bound that it is measured by.
    #[must_use]
    pub fn narrower(self, other: Self) -> Self {
        Self { loss: self.loss.min(other.loss), gradient: self.gradient.min(other.gradient) }
    }

    /// Whether these are bounds.
    pub fn is_acceptable(&self) -> bool {
        [self.loss, self.gradient].iter().all(|bound| bound.is_finite() && *bound >= 0.0)
    }
}

impl TensorDigest {
    fn of(gradient: &[f32], mut random: Random) -> Self {
        let (mut squares, mut projections) = (0.0, [0.0; PROJECTIONS]);
        for values in gradient.chunks(ELEMENTS_PER_DRAW) {
            let mut signs = random.next_u64();
            for value in values.iter().map(|value| f64::from(*value)) {
                squares += value * value;
                for projection in &mut projections {
                    *projection += if signs & 1 == 0 { value } else { -value };
                    signs >>= 1;
                }
            }
        }
        Self { norm: squares.sqrt(), projections }
    }

    /// How far apart, as a part of this one.
    fn distance(&self, other: &Self) -> f64 {
        let pairs = self.projections.iter().zip(other.projections);
        let squares: f64 = pairs.map(|(own, other)| (own - other) * (own - other)).sum();
        relative((squares / PROJECTIONS as f64).sqrt(), self.norm).max(relative_difference(self.norm, other.norm))
    }
}

impl GradientDigest {
    /// Of a flat gradient in canonical order. Sites that compare theirs have the same `seed`.
    pub fn of(loss_nats: f64, gradient: &[f32], schema: &ParameterSchema, seed: u64) -> Self {
        let tensors = schema.parameters().iter().zip(0..);
        let tensors = tensors
            .map(|(parameter, number)| TensorDigest::of(&gradient[parameter.range.clone()], Random::new(seed, number)));
        Self { loss_nats, tensors: tensors.collect() }
    }

    /// Whether it can be one of a model with so many tensors.
    pub fn is_acceptable(&self, tensors: usize) -> bool {
        let is_finite =
            |tensor: &TensorDigest| tensor.norm.is_finite() && tensor.projections.iter().all(|one| one.is_finite());
        self.loss_nats.is_finite() && self.tensors.len() == tensors && self.tensors.iter().all(is_finite)
    }

    /// Where the two are further apart than `bounds`.
    pub fn mismatch(&self, other: &Self, bounds: DigestBounds) -> Option<StepMismatch> {
        let loss = relative_difference(self.loss_nats, other.loss_nats);
        let distances = self.tensors.iter().zip(&other.tensors).map(|(own, other)| own.distance(other));
        let gradient = distances.fold(0.0, f64::max);
        let quantities = [(StepQuantity::Loss, loss, bounds.loss), (StepQuantity::Gradient, gradient, bounds.gradient)];
        quantities.into_iter().find_map(|(quantity, difference, bound)| {
            (difference > bound).then_some(StepMismatch { quantity, difference, bound })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 5;
    const BOUNDS: DigestBounds = DigestBounds { loss: 1e-5, gradient: 1e-4 };

    fn schema() -> ParameterSchema {
        ParameterSchema::new([("a".to_owned(), vec![50, 20]), ("b".to_owned(), vec![30]), ("c".to_owned(), vec![7])])
    }

    /// The third tensor has no gradient; the second one is a thousand times smaller than the first.
    fn gradient() -> Vec<f32> {
        let mut random = Random::new(1, 1);
        (0..1_037)
            .map(|index| match index {
                0..1_000 => random.next_normal(),
                1_000..1_030 => 1e-3 * random.next_normal(),
                _ => 0.0,
            })
            .collect()
    }

    fn digest(gradient: &[f32]) -> GradientDigest {
        GradientDigest::of(2.0, gradient, &schema(), SEED)
    }

    #[test]
    fn rounding_is_within_the_bound_and_any_element_of_any_tensor_is_not() {
        let right = digest(&gradient());
        assert!(right.is_acceptable(3) && !right.is_acceptable(2));
        let exact = DigestBounds { loss: 0.0, gradient: 0.0 };
        assert_eq!(right.mismatch(&digest(&gradient()), exact), None);
        let rounded: Vec<f32> = gradient().iter().map(|value| value * (1.0 + 1e-6)).collect();
        assert_eq!(right.mismatch(&digest(&rounded), BOUNDS), None);
        for element in [0, 13, 999, 1_000, 1_029, 1_036] {
            let mut wrong = gradient();
            wrong[element] += 2e-3;
            let mismatch = right.mismatch(&digest(&wrong), BOUNDS);
            let is_large = element >= 1_000;
            // 2e-3 of a norm of 32 is 6e-5: within the bound, as it would be for the whole gradient.
            assert_eq!(mismatch.is_some(), is_large, "element {element}: {mismatch:?}");
            wrong[element] += 1.0;
            assert_eq!(right.mismatch(&digest(&wrong), BOUNDS).unwrap().quantity, StepQuantity::Gradient);
        }
    }

    #[test]
    fn signs_and_permutations_that_keep_the_norm_are_seen() {
        let (right, mut turned, mut swapped) = (digest(&gradient()), gradient(), gradient());
        turned[3] = -turned[3];
        swapped.swap(10, 11);
        for wrong in [turned, swapped] {
            assert!(right.mismatch(&digest(&wrong), BOUNDS).unwrap().difference > 1e-3);
        }
    }

    #[test]
    fn another_loss_is_seen_and_the_narrower_bound_counts() {
        let (right, other) = (digest(&gradient()), GradientDigest { loss_nats: 2.1, ..digest(&gradient()) });
        assert_eq!(right.mismatch(&other, BOUNDS).unwrap().quantity, StepQuantity::Loss);
        let wide = DigestBounds { loss: 1.0, gradient: 1.0 };
        assert_eq!(right.mismatch(&other, wide), None);
        assert_eq!(wide.narrower(BOUNDS), BOUNDS);
        assert!(!DigestBounds { loss: f64::NAN, ..BOUNDS }.is_acceptable());
    }
}
