//! How far two computations of the same inner step may be apart before one of them is wrong.
//!
//! An engine that gives the same bits each time ([`Engine::is_repeatable`]) may not differ at all. One that adds in any order, as GPUs do
//! whose gradient of the embedding is summed by whoever comes first, may differ by what its conformance allows
//! ([`crate::conformance::Expectations`]), with room: who accuses an honest device throws good work away, while a flipped bit that is
//! worth a mention moves a gradient by far more.

use crate::conformance::Expectations;
use crate::{Engine, Precision};

/// Room above what the conformance suite allows on small models.
const ROOM: f64 = 4.0;

/// A movement that is turned round is 2 away, one that is left out 1: no bound may hide these.
const MOVEMENT_MAX: f64 = 0.9;

/// Bounds of differences between two computations of one inner step, each a part of the quantity itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepBounds {
    /// Of the loss.
    pub loss: f64,
    /// Of the gradient, and of its norm.
    pub gradient: f64,
    /// Of how far the parameters have moved.
    pub movement: f64,
}

impl StepBounds {
    /// The same bits.
    pub const EXACT: Self = Self { loss: 0.0, gradient: 0.0, movement: 0.0 };

    /// Of an engine that makes a step again from the same state, in the same micro-batches.
    pub fn again(engine: &dyn Engine) -> Self {
        if engine.is_repeatable() { Self::EXACT } else { Self::elsewhere(engine.device().precision) }
    }

    /// Of another machine with the same kind of engine: processors of another kind add in another order.
    pub fn elsewhere(precision: Precision) -> Self {
        let expected = Expectations { precision, repeatable: false };
        Self {
            loss: ROOM * expected.loss(),
            gradient: ROOM * expected.gradient(),
            movement: (ROOM * expected.movement()).min(MOVEMENT_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bound_hides_a_step_that_is_left_out() {
        for precision in [Precision::F32, Precision::Bf16] {
            let StepBounds { loss, gradient, movement } = StepBounds::elsewhere(precision);
            assert!(loss > 0.0 && loss < 0.1 && gradient > loss && gradient < 0.5, "{precision}: {loss} {gradient}");
            assert!(movement > 0.0 && movement < 1.0, "{precision}: {movement}");
        }
    }
}
