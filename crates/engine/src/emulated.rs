//! An engine that sleeps instead of computing: for measuring what is around an engine.
//!
//! How much of its time a site computes depends on how long a step takes, how many bytes a fragment has and what the link
//! carries; not on what the model learns. So a step here takes a stated time, whatever the machine, and moves one parameter in
//! [`STRIDE`], other ones for other batches, so that deltas are neither zeros nor equal:
//!
//! ```text
//! g_i = uniform in [-1, 1)   for i = s, s + STRIDE, ...      all from a seed that is a hash of the batch's tokens; s < STRIDE
//! g_i = 0                    for the others
//! p   = p - learning_rate * g
//! ```
//!
//! What it is not: a model. It learns nothing, its loss is that of guessing, its logits are all alike, and it has none of the
//! operations by which engines are compared.

use crate::checks::{TextLimits, check_fragment};
use crate::numerics::Operation;
use crate::{DeviceInfo, Engine, EngineError, EngineState, LossSum, Precision, StepReport};
use base::random::{Random, mix64};
use base::{Fragment, ModelShape, NamedTensors, ParameterSchema, TensorMismatch, TokenBatch};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// What `--engine` begins with, before a colon and the seconds of a step.
pub const EMULATED: &str = "emulated";

/// Time of one step: a sleep is exact to some 0.1 ms, and a site takes a call of 45 s for hung.
pub const STEP_SECONDS: RangeInclusive<f64> = 0.001..=30.0;

/// One parameter in so many moves in a step: of 10 million that costs 2 ms.
const STRIDE: usize = 16;

/// The seconds of a step in `emulated:SECONDS`; `None` where another engine is meant.
///
/// # Errors
/// It is not a number within [`STEP_SECONDS`].
pub fn emulated_seconds(engine: &str) -> Result<Option<f64>, EngineError> {
    let (kind, seconds) = engine.split_once(':').unwrap_or((engine, ""));
    if kind != EMULATED {
        return Ok(None);
    }
    match seconds.parse() {
        Ok(seconds) if STEP_SECONDS.contains(&seconds) => Ok(Some(seconds)),
        _ => {
            let (least, most) = (STEP_SECONDS.start(), STEP_SECONDS.end());
            let reason = format!("'{seconds}' is not the seconds of a step, {least} to {most}, as in emulated:0.1");
            Err(EngineError::Device { device: engine.to_owned(), reason })
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct EmulatedEngine {
    step: Duration,
    limits: TextLimits,
    /// Loss of guessing among all tokens, nats.
    guessing_nats: f64,
    vocabulary: usize,
    schema: ParameterSchema,
    parameters: Vec<f32>,
    /// As restored: nothing here uses them, and another engine may go on with the run.
    first_moments: NamedTensors,
    second_moments: NamedTensors,
    optimizer_steps: u64,
    micro_batch_samples: usize,
}

impl EmulatedEngine {
    /// An engine with steps of `seconds` for a model of that schema; of `model` only the vocabulary and the positions count.
    ///
    /// # Errors
    /// Seconds outside [`STEP_SECONDS`], or parameters of another model.
    pub fn new(
        seconds: f64,
        model: &ModelShape,
        schema: ParameterSchema,
        initial: &NamedTensors,
    ) -> Result<Self, EngineError> {
        // The text is what a user would have given.
        emulated_seconds(&format!("{EMULATED}:{seconds}"))?;
        let parameters = schema.flatten(initial).map_err(mismatch)?;
        Ok(Self {
            step: Duration::from_secs_f64(seconds),
            limits: TextLimits { vocabulary: Some(model.vocab_size), positions: Some(model.max_position_embeddings) },
            guessing_nats: libm::log(model.vocab_size.max(1) as f64),
            vocabulary: model.vocab_size,
            schema,
            parameters,
            first_moments: NamedTensors::new(),
            second_moments: NamedTensors::new(),
            optimizer_steps: 0,
            micro_batch_samples: 1,
        })
    }

    /// Sleeps for what is left of a step that began at `start`.
    fn sleep_until_end(&self, start: Instant) {
        std::thread::sleep(self.step.saturating_sub(start.elapsed()));
    }

    fn report(&self, batch: &TokenBatch, gradient_norm: f64, start: Instant) -> StepReport {
        let (loss_nats, tokens) = (self.guessing_nats, batch.predicted_tokens());
        StepReport { loss_nats, tokens, gradient_norm, seconds: start.elapsed().as_secs_f64(), joules: None }
    }
}

/// Calls `each` with the index and the value of every element of a batch's gradient that is not 0; gives its norm.
fn for_each_moved(batch: &TokenBatch, elements: usize, mut each: impl FnMut(usize, f32)) -> f64 {
    let seed = batch.tokens.iter().fold(0, |hash, token| mix64(hash ^ u64::from(*token)));
    let mut random = Random::new(seed, 0);
    let first = random.next_below(STRIDE as u64) as usize;
    let mut squares = 0.0;
    for index in (first..elements).step_by(STRIDE) {
        // 24 bits, which f32 holds exactly.
        let value = (random.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        squares += f64::from(value).powi(2);
        each(index, value);
    }
    squares.sqrt()
}

fn mismatch(error: TensorMismatch) -> EngineError {
    EngineError::Shape { what: format!("tensor '{}'", error.name), reason: error.reason }
}

impl Engine for EmulatedEngine {
    fn device(&self) -> DeviceInfo {
        let seconds = self.step.as_secs_f64();
        DeviceInfo {
            engine: format!("{EMULATED}:{seconds}"),
            name: format!("emulation: sleeps {seconds} s a step, learns nothing"),
            maker: String::new(),
            driver: String::new(),
            memory_bytes: None,
            threads: 1,
            precision: Precision::F32,
        }
    }

    fn schema(&self) -> &ParameterSchema {
        &self.schema
    }

    fn inner_step(&mut self, batch: &TokenBatch, learning_rate: f64) -> Result<StepReport, EngineError> {
        let start = Instant::now();
        self.limits.check_batch(batch)?;
        let (parameters, rate) = (&mut self.parameters, learning_rate as f32);
        let norm = for_each_moved(batch, parameters.len(), |index, value| parameters[index] -= rate * value);
        self.optimizer_steps += 1;
        self.sleep_until_end(start);
        Ok(self.report(batch, norm, start))
    }

    fn gradient(&mut self, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepReport, EngineError> {
        let start = Instant::now();
        check_fragment(&self.schema, &self.schema.whole(), gradient.len())?;
        self.limits.check_batch(batch)?;
        gradient.fill(0.0);
        let norm = for_each_moved(batch, gradient.len(), |index, value| gradient[index] = value);
        self.sleep_until_end(start);
        Ok(self.report(batch, norm, start))
    }

    fn evaluate(&mut self, batch: &TokenBatch) -> Result<LossSum, EngineError> {
        self.limits.check_batch(batch)?;
        let tokens = batch.predicted_tokens();
        Ok(LossSum { nats: tokens as f64 * self.guessing_nats, tokens })
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.limits.check_sequence(tokens)?;
        Ok(vec![0.0; tokens.len() * self.vocabulary])
    }

    fn read_fragment(&mut self, fragment: &Fragment, values: &mut [f32]) -> Result<(), EngineError> {
        check_fragment(&self.schema, fragment, values.len())?;
        fragment.gather(&self.parameters, values);
        Ok(())
    }

    fn write_fragment(&mut self, fragment: &Fragment, values: &[f32]) -> Result<(), EngineError> {
        check_fragment(&self.schema, fragment, values.len())?;
        fragment.scatter(values, &mut self.parameters);
        Ok(())
    }

    fn save(&mut self) -> Result<EngineState, EngineError> {
        Ok(EngineState {
            parameters: self.schema.unflatten(&self.parameters),
            first_moments: self.first_moments.clone(),
            second_moments: self.second_moments.clone(),
            optimizer_steps: self.optimizer_steps,
        })
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        let parameters = self.schema.flatten(&state.parameters).map_err(mismatch)?;
        for moments in [&state.first_moments, &state.second_moments].into_iter().filter(|moments| !moments.is_empty()) {
            self.schema.flatten(moments).map_err(mismatch)?;
        }
        self.parameters = parameters;
        self.first_moments = state.first_moments.clone();
        self.second_moments = state.second_moments.clone();
        self.optimizer_steps = state.optimizer_steps;
        Ok(())
    }

    fn micro_batch_samples(&self) -> usize {
        self.micro_batch_samples
    }

    fn set_micro_batch_samples(&mut self, samples: usize) {
        self.micro_batch_samples = samples.max(1);
    }

    // Its steps know no noise.
    fn set_batch_share(&mut self, _share: f64) {}

    fn is_repeatable(&self) -> bool {
        true
    }

    fn operation(&mut self, _: &Operation) -> Result<Vec<f32>, EngineError> {
        let reason = "it is an emulation, which computes nothing".to_owned();
        Err(EngineError::Device { device: self.device().engine, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{fragments_round_trip, lively_parameters, random_batch, tiny_shape};

    const SECONDS: f64 = 0.001;

    fn engine() -> EmulatedEngine {
        let shape = tiny_shape(false);
        let schema = ParameterSchema::llama(&shape);
        EmulatedEngine::new(SECONDS, &shape, schema, &lively_parameters(&shape, 1)).unwrap()
    }

    fn batch(seed: u64) -> TokenBatch {
        random_batch(&tiny_shape(false), 2, 8, seed)
    }

    #[test]
    fn seconds_are_read_and_bounded() {
        assert_eq!(emulated_seconds("emulated:0.25").unwrap(), Some(0.25));
        for other in ["flex", "torch:cpu", "emulated2:1"] {
            assert_eq!(emulated_seconds(other).unwrap(), None);
        }
        for refused in ["emulated", "emulated:", "emulated:fast", "emulated:0", "emulated:-1", "emulated:inf"] {
            let error = emulated_seconds(refused).unwrap_err();
            assert!(error.to_string().contains("is not the seconds of a step, 0.001 to 30"), "{error}");
        }
        for refused in ["emulated:NaN", "emulated:31", "emulated:0.0001"] {
            assert!(emulated_seconds(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn equal_batches_give_equal_bits_and_others_do_not() {
        let train = |seeds: [u64; 2]| {
            let mut engine = engine();
            let reports = seeds.map(|seed| engine.inner_step(&batch(seed), 0.5).unwrap());
            assert!(reports.iter().all(|report| report.gradient_norm > 0.0 && report.tokens == 16));
            engine.parameters
        };
        assert_eq!(train([1, 2]), train([1, 2]));
        assert_ne!(train([1, 2]), train([1, 3]));
    }

    #[test]
    fn a_step_takes_its_time_and_follows_the_gradient() {
        let mut engine = engine();
        let before = engine.parameters.clone();
        let mut gradient = vec![f32::NAN; before.len()];
        let of_gradient = engine.gradient(&batch(1), &mut gradient).unwrap();
        assert_eq!(engine.parameters, before);
        let of_step = engine.inner_step(&batch(1), 0.5).unwrap();
        assert_eq!(of_step.gradient_norm, of_gradient.gradient_norm);
        assert!([of_gradient, of_step].iter().all(|report| report.seconds >= SECONDS));
        let expected: Vec<f32> = before.iter().zip(&gradient).map(|(p, g)| p - 0.5 * g).collect();
        assert_eq!(engine.parameters, expected);
        let moved = gradient.iter().filter(|value| **value != 0.0).count();
        assert!(moved.abs_diff(before.len() / STRIDE) <= 1 && gradient.iter().all(|value| value.abs() <= 1.0));
    }

    #[test]
    fn nothing_is_learnt_or_changed_by_looking() {
        let mut engine = engine();
        let before = engine.parameters.clone();
        let loss = engine.evaluate(&batch(1)).unwrap();
        let vocabulary = tiny_shape(false).vocab_size;
        assert!((loss.nats / loss.tokens as f64 - (vocabulary as f64).ln()).abs() < 1e-12);
        assert_eq!(engine.logits(&[1, 2]).unwrap(), vec![0.0; 2 * vocabulary]);
        assert_eq!(engine.parameters, before);
        assert!(engine.device().name.starts_with("emulation: sleeps 0.001 s a step"));
        let operation = &crate::numerics::operations()[0];
        assert!(engine.operation(operation).unwrap_err().to_string().contains("emulation"));
    }

    #[test]
    fn a_saved_state_continues_with_the_same_bits_and_moments_pass_through() {
        let mut first = engine();
        first.inner_step(&batch(1), 0.5).unwrap();
        let mut state = first.save().unwrap();
        state.first_moments = state.parameters.clone();
        let mut second = engine();
        second.restore(&state).unwrap();
        assert_eq!(second.save().unwrap(), state);
        for engine in [&mut first, &mut second] {
            engine.inner_step(&batch(2), 0.5).unwrap();
        }
        assert_eq!(first.parameters, second.parameters);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let shape = tiny_shape(false);
        let factory = |shape: &ModelShape, _: &base::config::TrainSection, initial: &NamedTensors| {
            let schema = ParameterSchema::llama(shape);
            Box::new(EmulatedEngine::new(SECONDS, shape, schema, initial).unwrap()) as Box<dyn Engine>
        };
        fragments_round_trip(&factory, &shape);
        let mut engine = engine();
        let before = engine.save().unwrap();
        let mut missing = before.clone();
        missing.parameters.remove("model.norm.weight");
        let moments = EngineState { first_moments: missing.parameters.clone(), ..before.clone() };
        for state in [missing, moments] {
            assert!(matches!(engine.restore(&state), Err(EngineError::Shape { .. })));
            assert_eq!(engine.save().unwrap(), before);
        }
        assert!(engine.gradient(&batch(1), &mut [0.0; 3]).is_err());
        let too_long = random_batch(&shape, 1, shape.max_position_embeddings + 1, 1);
        assert!(engine.inner_step(&too_long, 0.1).is_err() && engine.evaluate(&too_long).is_err());
        let other = lively_parameters(&tiny_shape(true), 1);
        assert!(EmulatedEngine::new(SECONDS, &shape, ParameterSchema::llama(&shape), &other).is_err());
        assert!(EmulatedEngine::new(f64::NAN, &shape, ParameterSchema::llama(&shape), &NamedTensors::new()).is_err());
    }
}
