//! A step that is made twice from the same state, to see whether the device computes the same again; and a gradient that other sites compute
//! as well, to see whether it computes the same as they do.
//!
//! The whole step is repeated, optimiser included, and every parameter compared after it: a flipped bit anywhere between the batch and the
//! new parameters shows. It costs one more step, a save and a restore of the engine's state, and for that time six times the parameters in
//! host memory: parameters, both moments, the parameters after each of the two, and their difference from before. Moments themselves are not
//! compared; what is wrong in them shows in a later step.

use super::{StepDone, TrainError, Trainer};
use base::TokenBatch;
use engine::numerics::relative_distance;
use engine::{Engine, EngineState, StepBounds};
use rounds::recompute::relative_difference;
use rounds::{
    Assignment, DigestBounds, GradientDigest, RoundPlan, SampleRange, StepMismatch, StepQuantity, StepVerdict,
};
use std::time::Instant;

/// A step, and what came of its check: nothing where the device's memory ran short between the two, so that they were computed otherwise.
type Checked = (StepDone, Option<StepVerdict>);

/// Whether that inner step of an assignment is to be made twice.
pub(super) fn is_checked(plan: &RoundPlan, assignment: &Assignment, index: u64) -> bool {
    plan.check.is_some_and(|check| (check.site, check.step) == (assignment.site, index))
}

impl Trainer {
    /// Makes step `step` of the run twice. The engine is then where it is after one step; or, where the results differ, where it was before
    /// it, for nobody knows which of them is right.
    pub(super) fn step_twice(&mut self, step: u64, batch: &TokenBatch) -> Result<Checked, TrainError> {
        let began = Instant::now();
        let before = self.engine.save()?;
        let (first, after) = self.step_and_read(step, batch)?;
        self.engine.restore(&before)?;
        let at_once = self.engine.micro_batch_samples();
        let (again, after_again) = self.step_and_read(step, batch)?;
        if self.engine.micro_batch_samples() != at_once {
            return Ok((again, None));
        }
        let bounds = StepBounds::again(&self.engine);
        let quantities = of_reports(&first, &again, bounds).into_iter();
        let moved = (StepQuantity::Movement, self.distance_moved(&before, after, after_again)?, bounds.movement);
        let mismatch = quantities.chain([moved]).find_map(beyond);
        if mismatch.is_some() {
            self.engine.restore(&before)?;
        }
        let seconds = began.elapsed().as_secs_f64() - again.seconds;
        Ok((again, Some(StepVerdict { step: again.step, seconds, mismatch })))
    }

    /// The same of a gradient, which changes nothing in the engine.
    pub(super) fn gradient_twice(
        &mut self,
        step: u64,
        batch: &TokenBatch,
        gradient: &mut [f32],
    ) -> Result<Checked, TrainError> {
        let began = Instant::now();
        let mut first_gradient = vec![0.0; gradient.len()];
        let first = self.gradient(step, batch, &mut first_gradient)?;
        let at_once = self.engine.micro_batch_samples();
        let again = self.gradient(step, batch, gradient)?;
        if self.engine.micro_batch_samples() != at_once {
            return Ok((again, None));
        }
        let bounds = StepBounds::again(&self.engine);
        let quantities = of_reports(&first, &again, bounds).into_iter();
        let whole = (StepQuantity::Gradient, relative_distance(gradient, &first_gradient), bounds.gradient);
        let mismatch = quantities.chain([whole]).find_map(beyond);
        let seconds = began.elapsed().as_secs_f64() - again.seconds;
        Ok((again, Some(StepVerdict { step: again.step, seconds, mismatch })))
    }

    /// The gradient of some samples at the engine's parameters, to be compared with that of other sites: all use the same `seed`.
    pub(crate) fn gradient_digest(
        &mut self,
        samples: &[SampleRange],
        seed: u64,
    ) -> Result<(GradientDigest, DigestBounds), TrainError> {
        let batch = self.batch(samples.iter().flat_map(|SampleRange { start, end }| *start..*end));
        let mut gradient = vec![0.0; self.schema.elements()];
        let report = self.within_memory(batch.samples, |engine| engine.gradient(&batch, &mut gradient))?;
        let StepBounds { loss, gradient: bound, .. } = StepBounds::elsewhere(self.engine.device().precision);
        let digest = GradientDigest::of(report.loss_nats, &gradient, &self.schema, seed);
        Ok((digest, DigestBounds { loss, gradient: bound }))
    }

    fn step_and_read(&mut self, step: u64, batch: &TokenBatch) -> Result<(StepDone, Vec<f32>), TrainError> {
        let done = self.step(step, batch)?;
        let mut parameters = vec![0.0; self.schema.elements()];
        self.engine.read_fragment(&self.schema.whole(), &mut parameters)?;
        Ok((done, parameters))
    }

    /// How far apart two movements from the same parameters are.
    fn distance_moved(
        &self,
        before: &EngineState,
        mut first: Vec<f32>,
        mut again: Vec<f32>,
    ) -> Result<f64, TrainError> {
        if first == again {
            return Ok(0.0);
        }
        let before = self.schema.flatten(&before.parameters).map_err(|error| {
            let (what, reason) = (format!("tensor '{}'", error.name), error.reason);
            engine::EngineError::Shape { what, reason }
        })?;
        for after in [&mut first, &mut again] {
            after.iter_mut().zip(&before).for_each(|(after, before)| *after -= before);
        }
        Ok(relative_distance(&again, &first))
    }
}

fn of_reports(first: &StepDone, again: &StepDone, bounds: StepBounds) -> [(StepQuantity, f64, f64); 2] {
    let (first, again) = (first.report, again.report);
    let loss = relative_difference(first.loss_nats, again.loss_nats);
    let norm = relative_difference(first.gradient_norm, again.gradient_norm);
    [(StepQuantity::Loss, loss, bounds.loss), (StepQuantity::GradientNorm, norm, bounds.gradient)]
}

fn beyond((quantity, difference, bound): (StepQuantity, f64, f64)) -> Option<StepMismatch> {
    // What is not finite is as far apart as can be said.
    let difference = if difference.is_finite() { difference } else { f64::MAX };
    (difference > bound).then_some(StepMismatch { quantity, difference, bound })
}
