//! What every engine must do, as functions over a factory: call [`run_all`] from an engine's tests.
//!
//! Each check panics with what it found, as a test does. The models are tiny (about 6,000 parameters), so that a
//! check takes milliseconds on a CPU. [`Expectations`] states how far an engine may be from exact, and why.

mod golden;

pub use golden::matches_transformers_and_adamw;

use crate::numerics::{self, relative_distance};
use crate::{Engine, EngineError, EngineState, Precision, StepBounds, initial_parameters};
use base::config::{InnerOptimizer, TrainSection};
use base::random::Random;
use base::{Fragment, ModelShape, NamedTensors, TokenBatch};

/// Builds the engine under test from a shape, settings and initial parameters.
pub type Factory<'a> = dyn Fn(&ModelShape, &TrainSection, &NamedTensors) -> Box<dyn Engine> + 'a;

/// How exact an engine must be. All tolerances are relative: |a − b| / |b|, or ‖a − b‖ / ‖b‖ over a tensor.
///
/// f32: a product is rounded at 2^-24 = 6e-8, and sums of some hundred terms in another order differ by about 1e-6 of their
/// size. bf16: each factor is rounded at 2^-9 = 2e-3; a logit of two blocks has passed some ten such roundings, independent
/// of each other (√10 · 2e-3 = 6e-3 of the logits' norm); backward doubles their number and differences of nearly equal
/// terms enlarge them; the loss averages over positions. AdamW divides a gradient by its own size, so that an
/// element whose gradient nearly cancels moves by its rounding error: hence the larger figures after steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expectations {
    /// What matrix products are computed in.
    pub precision: Precision,
    /// Whether the same calls give the same bits: CPU engines do, GPUs whose gradient of the embedding is summed in any
    /// order do not.
    pub repeatable: bool,
}

impl Expectations {
    /// f32 and the same bits each time.
    pub const EXACT: Self = Self { precision: Precision::F32, repeatable: true };

    fn by_precision(&self, f32: f64, bf16: f64) -> f64 {
        match self.precision {
            Precision::F32 => f32,
            Precision::Bf16 => bf16,
        }
    }

    /// Of logits.
    pub fn logits(&self) -> f64 {
        self.by_precision(5e-6, 2e-2)
    }

    /// Of the loss of given parameters.
    pub fn loss(&self) -> f64 {
        self.by_precision(2e-6, 5e-3)
    }

    /// Of each gradient tensor of given parameters. In bf16 PyTorch's autocast also keeps what lies between two products in
    /// bf16: 5.4e-2 measured for the embedding, whose gradient has passed every block.
    pub fn gradient(&self) -> f64 {
        self.by_precision(2e-5, 0.11)
    }

    /// Of parameters after one optimiser step.
    pub fn one_step(&self) -> f64 {
        self.by_precision(1e-4, 5e-2)
    }

    /// Of parameters after twenty optimiser steps.
    pub fn many_steps(&self) -> f64 {
        self.by_precision(1e-4, 0.15)
    }

    /// Of how far parameters have moved since the beginning. AdamW's steps have the size of the learning rate whatever that of
    /// the gradient: in bf16 an element whose gradient is within its rounding error of zero may go the other way, and some
    /// per cent of such elements are √(4 · 0.05) = 0.45 of the movement. A step that is left out is 1 away, one that is turned round 2.
    pub fn movement(&self) -> f64 {
        self.by_precision(1e-2, 0.6)
    }

    /// Of the loss after up to twenty optimiser steps.
    pub fn trained_loss(&self) -> f64 {
        self.by_precision(1e-5, 3e-2)
    }

    /// Of the gradient's norm after up to twenty optimiser steps.
    pub fn trained_gradient(&self) -> f64 {
        self.by_precision(1e-4, 0.15)
    }

    /// Of the same thing computed in another way by the same engine: other micro-batches, other lengths.
    pub fn itself(&self) -> f64 {
        self.by_precision(3e-6, 1e-2)
    }

    /// `power`: of what is compared in the gradient, whose relative error it multiplies.
    fn assert_same(&self, what: &str, found: &[f32], expected: &[f32], power: f64) {
        if self.repeatable {
            return assert_eq!(bits(found), bits(expected), "{what}");
        }
        let distance = relative_distance(found, expected);
        assert!(distance <= power * self.one_step(), "{what}: {distance:.1e} apart");
    }
}

/// Runs every check.
pub fn run_all(factory: &Factory<'_>, expected: &Expectations) {
    for tied in [false, true] {
        let shape = tiny_shape(tied);
        loss_at_start_is_that_of_guessing(factory, &shape);
        if expected.precision == Precision::F32 {
            // Differences of losses rounded to bf16 say nothing of a slope; golden values do.
            gradient_equals_finite_differences(factory, &shape);
        }
        gradient_changes_nothing(factory, expected, &shape);
        sgd_step_follows_the_gradient(factory, expected, &shape);
        accumulation_equals_the_full_batch(factory, expected, &shape);
        evaluation_and_logits_agree_with_the_loss(factory, expected, &shape);
        future_tokens_change_nothing(factory, expected, &shape);
        fragments_round_trip(factory, &shape);
        restored_engine_continues(factory, expected, &shape);
        a_step_made_again_is_the_same(factory, expected, &shape);
        training_lowers_the_loss(factory, &shape);
        steps_on_a_part_divide_by_the_joint_second_moment(factory, &shape);
    }
    let shape = tiny_shape(false);
    clipping_bounds_the_step(factory, &shape);
    numbers_that_are_not_finite_are_refused(factory, &shape);
    batches_that_do_not_fit_are_refused(factory, &shape);
    states_that_do_not_fit_are_refused(factory, &shape);
    matches_transformers_and_adamw(factory, expected);
    operations_are_within_their_bounds(factory, &shape);
}

/// A model of about 6,000 parameters with grouped-query attention (4 query heads over 2).
pub fn tiny_shape(tie_word_embeddings: bool) -> ModelShape {
    ModelShape {
        vocab_size: 29,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 16,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings,
    }
}

/// Random tokens below the vocabulary size.
pub fn random_batch(shape: &ModelShape, samples: usize, sequence_length: usize, seed: u64) -> TokenBatch {
    let mut random = Random::new(seed, 0);
    let tokens = (0..samples * (sequence_length + 1)).map(|_| random.next_below(shape.vocab_size as u64) as u32);
    TokenBatch { samples, sequence_length, tokens: tokens.collect() }
}

/// Matrices of a standard deviation of 0.2, half of that where they end a residual branch, and uneven norm weights: attention is then far
/// from uniform, and a wrong derivative of any part shows.
pub fn lively_parameters(shape: &ModelShape, seed: u64) -> NamedTensors {
    let mut named = initial_parameters(shape, seed);
    let mut random = Random::new(seed, 1 << 32);
    for (name, tensor) in &mut named {
        let ends_branch = name.contains("o_proj") || name.contains("down_proj");
        let (mean, deviation) = match tensor.shape.len() {
            1 => (1.0, 0.2),
            _ => (0.0, if ends_branch { 0.1 } else { 0.2 }),
        };
        tensor.values.iter_mut().for_each(|w| *w = mean + deviation * random.next_normal());
    }
    named
}

fn sgd() -> TrainSection {
    TrainSection { optimizer: InnerOptimizer::Sgd, gradient_clip_norm: 0.0, ..TrainSection::default() }
}

fn parameters_of(engine: &mut dyn Engine) -> Vec<f32> {
    let whole = engine.schema().whole();
    let mut values = vec![0.0; whole.elements()];
    expect_ok("read_fragment", engine.read_fragment(&whole, &mut values));
    values
}

fn gradient_of(engine: &mut dyn Engine, batch: &TokenBatch) -> Vec<f32> {
    let mut gradient = vec![f32::NAN; engine.schema().elements()];
    expect_ok("gradient", engine.gradient(batch, &mut gradient));
    gradient
}

fn expect_ok<T>(call: &str, result: Result<T, EngineError>) -> T {
    result.unwrap_or_else(|error| panic!("{call} failed: {error}"))
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// With small random weights every token is about equally likely: the loss is ln V.
pub fn loss_at_start_is_that_of_guessing(factory: &Factory<'_>, shape: &ModelShape) {
    let mut engine = factory(shape, &sgd(), &initial_parameters(shape, 1));
    let loss = expect_ok("evaluate", engine.evaluate(&random_batch(shape, 8, 16, 2)));
    let mean = loss.nats / loss.tokens as f64;
    let guessing = (shape.vocab_size as f64).ln();
    assert!((mean - guessing).abs() < 0.05, "{mean} nats per token where guessing gives {guessing}");
}

/// (L(p + h·u) − L(p − h·u)) / 2h against g·u, for u along the gradient and along random directions of each tensor.
pub fn gradient_equals_finite_differences(factory: &Factory<'_>, shape: &ModelShape) {
    let mut engine = factory(shape, &sgd(), &lively_parameters(shape, 3));
    let batch = random_batch(shape, 3, 11, 4);
    let gradient = gradient_of(&mut *engine, &batch);
    let start = parameters_of(&mut *engine);
    let parameters = engine.schema().parameters().to_vec();
    let mut random = Random::new(5, 0);
    for parameter in parameters {
        // Half the tensor's own gradient, half random: large enough to stand above rounding, blind to nothing.
        let own = &gradient[parameter.range.clone()];
        let own_norm = norm(own.iter().copied()).max(1e-12) as f32;
        let root = (own.len() as f32).sqrt();
        let direction: Vec<f32> = own.iter().map(|g| g / own_norm + 0.5 * random.next_normal() / root).collect();
        let slope: f64 = own.iter().zip(&direction).map(|(g, u)| f64::from(*g) * f64::from(*u)).sum();
        // A step of 1e-2: truncation is of order h² = 1e-4, rounding of order 1e-7 · ln V / h = 3e-5.
        let step = 1e-2;
        let found = central_difference(&mut *engine, &batch, &start, parameter.range.start, &direction, step);
        let tolerance = 0.02 * slope.abs() + 2e-4;
        assert!((found - slope).abs() < tolerance, "{}: slope {slope}, differences {found}", parameter.name);
    }
}

fn central_difference(
    engine: &mut dyn Engine,
    batch: &TokenBatch,
    start: &[f32],
    offset: usize,
    direction: &[f32],
    step: f32,
) -> f64 {
    let whole = engine.schema().whole();
    let mut mean_loss = |sign: f32| {
        let mut moved = start.to_vec();
        for (value, u) in moved[offset..].iter_mut().zip(direction) {
            *value += sign * step * u;
        }
        expect_ok("write_fragment", engine.write_fragment(&whole, &moved));
        let loss = expect_ok("evaluate", engine.evaluate(batch));
        loss.nats / loss.tokens as f64
    };
    (mean_loss(1.0) - mean_loss(-1.0)) / (2.0 * f64::from(step))
}

/// `gradient` is a question, not a step.
pub fn gradient_changes_nothing(factory: &Factory<'_>, expected: &Expectations, shape: &ModelShape) {
    let mut engine = factory(shape, &TrainSection::default(), &initial_parameters(shape, 1));
    let batch = random_batch(shape, 2, 8, 2);
    expect_ok("inner_step", engine.inner_step(&batch, 1e-3));
    let before = expect_ok("save", engine.save());
    let first = gradient_of(&mut *engine, &batch);
    expected.assert_same("the same gradient twice", &gradient_of(&mut *engine, &batch), &first, 1.0);
    assert_eq!(before, expect_ok("save", engine.save()));
}

/// One SGD step is p − lr·g, and reports the gradient's norm.
pub fn sgd_step_follows_the_gradient(factory: &Factory<'_>, expectations: &Expectations, shape: &ModelShape) {
    let mut engine = factory(shape, &sgd(), &lively_parameters(shape, 6));
    let batch = random_batch(shape, 3, 9, 7);
    let before = parameters_of(&mut *engine);
    let gradient = gradient_of(&mut *engine, &batch);
    let report = expect_ok("inner_step", engine.inner_step(&batch, 0.1));
    let expected: Vec<f32> = before.iter().zip(&gradient).map(|(p, g)| p - 0.1 * g).collect();
    let found = parameters_of(&mut *engine);
    // One rounding of p and one of lr·g apart.
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate().filter(|_| expectations.repeatable) {
        assert!((found - expected).abs() <= 2e-7 * expected.abs().max(1.0), "{index}: {found} and {expected}");
    }
    let distance = relative_distance(&found, &expected);
    assert!(distance < expectations.itself(), "a step is {distance:.1e} from the gradient's");
    assert_eq!(report.tokens, 27);
    let expected_norm = norm(gradient.iter().copied());
    let tolerance = expectations.itself().max(1e-5);
    assert!((report.gradient_norm / expected_norm - 1.0).abs() < tolerance, "{} {expected_norm}", report.gradient_norm);
}

/// Micro-batches of 2 + 2 + 1 samples give the gradient and the loss of 5 at once: weights are tokens, not parts.
pub fn accumulation_equals_the_full_batch(factory: &Factory<'_>, expected: &Expectations, shape: &ModelShape) {
    let batch = random_batch(shape, 5, 10, 8);
    let initial = lively_parameters(shape, 9);
    let of = |micro_batch_samples: usize| {
        let mut engine = factory(shape, &TrainSection { micro_batch_samples: 4, ..sgd() }, &initial);
        engine.set_micro_batch_samples(micro_batch_samples);
        assert_eq!(engine.micro_batch_samples(), micro_batch_samples);
        let mut gradient = vec![0.0; engine.schema().elements()];
        let report = expect_ok("gradient", engine.gradient(&batch, &mut gradient));
        (report.loss_nats, gradient, expect_ok("evaluate", engine.evaluate(&batch)))
    };
    let (full_loss, full, full_sum) = of(8);
    let (loss, accumulated, sum) = of(2);
    let distance = relative_distance(&accumulated, &full);
    let tolerance = expected.itself();
    assert!(distance < tolerance, "accumulated and full gradient differ by {distance}");
    assert!((loss - full_loss).abs() < tolerance * full_loss, "{loss} and {full_loss}");
    assert!((sum.nats - full_sum.nats).abs() < tolerance * full_sum.nats);
    assert_eq!(sum.tokens, full_sum.tokens);
}

/// Loss reported by a step, by `evaluate` and computed here from `logits` are one.
pub fn evaluation_and_logits_agree_with_the_loss(factory: &Factory<'_>, expected: &Expectations, shape: &ModelShape) {
    let mut engine = factory(shape, &sgd(), &lively_parameters(shape, 10));
    let batch = random_batch(shape, 1, 12, 11);
    let evaluated = expect_ok("evaluate", engine.evaluate(&batch));
    let logits = expect_ok("logits", engine.logits(&batch.tokens[..12]));
    assert_eq!(logits.len(), 12 * shape.vocab_size);
    let rows = logits.chunks_exact(shape.vocab_size).zip(&batch.tokens[1..]);
    let nats: f64 = rows.map(|(row, target)| cross_entropy(row, *target)).sum();
    let stepped = expect_ok("inner_step", engine.inner_step(&batch, 0.0)).loss_nats * 12.0;
    let tolerance = expected.itself().max(1e-5) * nats;
    assert!((nats - evaluated.nats).abs() < tolerance, "{nats} from logits, {} evaluated", evaluated.nats);
    assert!((nats - stepped).abs() < tolerance, "{nats} from logits, {stepped} from a step");
}

fn cross_entropy(logits: &[f32], target: u32) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - highest).exp()).sum();
    sum.ln() - f64::from(logits[target as usize] - highest)
}

/// Causality: logits of the first positions do not depend on the tokens that follow.
pub fn future_tokens_change_nothing(factory: &Factory<'_>, expected: &Expectations, shape: &ModelShape) {
    let mut engine = factory(shape, &sgd(), &lively_parameters(shape, 12));
    let tokens = random_batch(shape, 1, 13, 13).tokens;
    let long = expect_ok("logits", engine.logits(&tokens));
    let short = expect_ok("logits", engine.logits(&tokens[..9]));
    let distance = relative_distance(&long[..short.len()], &short);
    assert!(distance < expected.itself(), "logits of 9 positions change by {distance} when 5 tokens follow");
}

/// What is written is read back, to the bit, and the rest stays.
pub fn fragments_round_trip(factory: &Factory<'_>, shape: &ModelShape) {
    let mut engine = factory(shape, &sgd(), &initial_parameters(shape, 14));
    let before = parameters_of(&mut *engine);
    let elements = before.len();
    // Across the borders of tensors, a single element, and the end.
    let fragment = Fragment { index: 1, ranges: vec![3..700, 901..902, elements - 40..elements] };
    let values: Vec<f32> = (0..fragment.elements()).map(|i| i as f32 * 0.25 - 7.0).collect();
    expect_ok("write_fragment", engine.write_fragment(&fragment, &values));
    let mut read = vec![0.0; values.len()];
    expect_ok("read_fragment", engine.read_fragment(&fragment, &mut read));
    assert_eq!(bits(&read), bits(&values));
    let mut expected = before;
    let mut rest = &values[..];
    for range in &fragment.ranges {
        let (part, after) = rest.split_at(range.len());
        expected[range.clone()].copy_from_slice(part);
        rest = after;
    }
    assert_eq!(bits(&parameters_of(&mut *engine)), bits(&expected));
    let mut short = vec![0.0; values.len() - 1];
    assert!(matches!(engine.read_fragment(&fragment, &mut short), Err(EngineError::Shape { .. })));
    assert!(matches!(engine.write_fragment(&fragment, &short), Err(EngineError::Shape { .. })));
    assert!(matches!(engine.add_to_fragment(&fragment, &short), Err(EngineError::Shape { .. })));
    let change: Vec<f32> = (0..fragment.elements()).map(|i| (i as f32).sin()).collect();
    expect_ok("add_to_fragment", engine.add_to_fragment(&fragment, &change));
    let mut rest = &change[..];
    for range in &fragment.ranges {
        let (part, after) = rest.split_at(range.len());
        expected[range.clone()].iter_mut().zip(part).for_each(|(value, change)| *value += change);
        rest = after;
    }
    assert_eq!(bits(&parameters_of(&mut *engine)), bits(&expected), "each sum is rounded once, and the rest stays");
    let outside = Fragment { index: 1, ranges: std::iter::once(elements - 1..elements + 1).collect() };
    assert!(matches!(engine.write_fragment(&outside, &[0.0; 2]), Err(EngineError::Shape { .. })));
}

/// 8 steps are 4 steps, save, restore into another engine, 4 steps: parameters and moments, to the bit where the engine
/// is repeatable; and a run repeats itself.
pub fn restored_engine_continues(factory: &Factory<'_>, expected: &Expectations, shape: &ModelShape) {
    continues_elsewhere(factory, factory, expected, shape);
}

/// 8 steps on one engine are 4 steps there, save, restore into an engine of another kind, 4 steps there: parameters and
/// moments within `expected`.
pub fn continues_elsewhere(
    factory: &Factory<'_>,
    elsewhere: &Factory<'_>,
    expected: &Expectations,
    shape: &ModelShape,
) {
    let train = TrainSection::default();
    let initial = initial_parameters(shape, 15);
    let steps = |engine: &mut dyn Engine, range: std::ops::Range<u64>| {
        for step in range {
            expect_ok("inner_step", engine.inner_step(&random_batch(shape, 4, 12, 100 + step), 1e-2));
        }
    };
    let run = || {
        let mut engine = factory(shape, &train, &initial);
        steps(&mut *engine, 0..8);
        expect_ok("save", engine.save())
    };
    let uninterrupted = run();
    assert_eq!(uninterrupted.optimizer_steps, 8);
    assert_same_state(expected, "two runs with the same seed", &run(), &uninterrupted);
    let mut first = factory(shape, &train, &initial);
    steps(&mut *first, 0..4);
    let state = expect_ok("save", first.save());
    let mut second = elsewhere(shape, &train, &initial_parameters(shape, 16));
    steps(&mut *second, 0..2);
    expect_ok("restore", second.restore(&state));
    steps(&mut *second, 4..8);
    let continued = expect_ok("save", second.save());
    assert_same_state(expected, "saved, restored and continued", &continued, &uninterrupted);
}

/// A step that is made again after a restore differs by no more than the engine says: a site that computes as it should is never accused
/// of not doing so ([`crate::StepBounds`]).
pub fn a_step_made_again_is_the_same(factory: &Factory<'_>, expected: &Expectations, shape: &ModelShape) {
    let mut engine = factory(shape, &TrainSection::default(), &initial_parameters(shape, 21));
    assert!(engine.is_repeatable() || !expected.repeatable, "it says that it is not repeatable");
    let bounds = StepBounds::again(&*engine);
    for step in 0..4 {
        let batch = random_batch(shape, 4, 12, 120 + step);
        let (state, before) = (expect_ok("save", engine.save()), parameters_of(&mut *engine));
        let mut make = || {
            let report = expect_ok("inner_step", engine.inner_step(&batch, 1e-2));
            let moved = parameters_of(&mut *engine).iter().zip(&before).map(|(after, before)| after - before).collect();
            expect_ok("restore", engine.restore(&state));
            (report, moved)
        };
        let ((first, moved), (again, moved_again)): ((_, Vec<f32>), (_, Vec<f32>)) = (make(), make());
        let loss = (again.loss_nats - first.loss_nats).abs() / first.loss_nats;
        let norm = (again.gradient_norm - first.gradient_norm).abs() / first.gradient_norm;
        let movement = relative_distance(&moved_again, &moved);
        assert!(loss <= bounds.loss, "loss: {loss:.1e} apart");
        assert!(norm <= bounds.gradient, "gradient norm: {norm:.1e} apart");
        assert!(movement <= bounds.movement, "movement: {movement:.1e} apart");
        expect_ok("inner_step", engine.inner_step(&batch, 1e-2));
    }
}

fn assert_same_state(expected: &Expectations, what: &str, found: &EngineState, wanted: &EngineState) {
    assert_eq!(found.optimizer_steps, wanted.optimizer_steps, "{what}");
    for (part, found, wanted, power) in [
        ("parameters", &found.parameters, &wanted.parameters, 1.0),
        ("first moments", &found.first_moments, &wanted.first_moments, 1.0),
        ("second moments", &found.second_moments, &wanted.second_moments, 2.0),
    ] {
        assert!(found.keys().eq(wanted.keys()), "{what}: names of {part}");
        for (name, tensor) in wanted {
            assert_eq!(found[name].shape, tensor.shape, "{what}: {part} {name}");
            expected.assert_same(&format!("{what}: {part} {name}"), &found[name].values, &tensor.values, power);
        }
    }
}

/// After some steps that saw a quarter of the joint batch, one more moves every parameter as [`crate::Engine::set_batch_share`] says; and
/// what is no share counts as 1.
pub fn steps_on_a_part_divide_by_the_joint_second_moment(factory: &Factory<'_>, shape: &ModelShape) {
    const STEPS: i32 = 4;
    let (learning_rate, share) = (1e-2, 0.25);
    let train = TrainSection { gradient_clip_norm: 0.0, weight_decay: 0.1, ..TrainSection::default() };
    let batch = |step: i32| random_batch(shape, 2, 12, 40 + step as u64);
    let before_last_and_after = |share: f64| {
        let mut engine = factory(shape, &train, &initial_parameters(shape, 41));
        engine.set_batch_share(share);
        for step in 1..STEPS {
            expect_ok("inner_step", engine.inner_step(&batch(step), learning_rate));
        }
        let before = parameters_of(&mut *engine);
        expect_ok("inner_step", engine.inner_step(&batch(STEPS), learning_rate));
        let state = expect_ok("save", engine.save());
        (engine.schema().clone(), before, parameters_of(&mut *engine), state)
    };
    let (schema, before, after, state) = before_last_and_after(share);
    let flat = |tensors| schema.flatten(tensors).unwrap_or_else(|error| panic!("moments: {error}"));
    let (first, second) = (flat(&state.first_moments), flat(&state.second_moments));
    let correction = |beta: f64| 1.0 - beta.powi(STEPS);
    let mut expected = vec![0.0_f32; before.len()];
    for parameter in schema.parameters() {
        let decay = if parameter.shape.len() >= 2 { learning_rate * train.weight_decay } else { 0.0 };
        for i in parameter.range.clone() {
            let mean = f64::from(first[i]) / correction(train.beta1);
            let square = f64::from(second[i]) / correction(train.beta2);
            let joint = mean * mean + share * (square - mean * mean).max(0.0);
            let step = learning_rate * mean / (joint.sqrt() + train.epsilon);
            expected[i] = (-f64::from(before[i]) * decay - step) as f32;
        }
    }
    let moved: Vec<f32> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    let distance = relative_distance(&moved, &expected);
    // Moments as f32 give them, and a movement that is the difference of two f32.
    assert!(distance < 1e-3, "a step on a quarter of the batch is off by {distance}");
    let (_, _, whole, _) = before_last_and_after(1.0);
    assert!(relative_distance(&after, &whole) > 1e-3, "the share changes nothing");
    for no_share in [f64::NAN, 0.0, -1.0, 2.0] {
        let (_, _, found, _) = before_last_and_after(no_share);
        assert_eq!(bits(&found), bits(&whole), "a share of {no_share}");
    }
}

/// Thirty AdamW steps on one batch learn it at least by half.
pub fn training_lowers_the_loss(factory: &Factory<'_>, shape: &ModelShape) {
    let mut engine = factory(shape, &TrainSection::default(), &initial_parameters(shape, 17));
    let batch = random_batch(shape, 2, 12, 18);
    let first = expect_ok("inner_step", engine.inner_step(&batch, 1e-2)).loss_nats;
    for _ in 0..29 {
        expect_ok("inner_step", engine.inner_step(&batch, 1e-2));
    }
    let last = expect_ok("evaluate", engine.evaluate(&batch));
    let last = last.nats / last.tokens as f64;
    assert!(last < 0.5 * first, "{first} nats before, {last} after 30 steps on the same batch");
}

/// A clipped SGD step has length lr·clip, and a gradient under the bound is left alone.
pub fn clipping_bounds_the_step(factory: &Factory<'_>, shape: &ModelShape) {
    let batch = random_batch(shape, 2, 10, 19);
    let initial = lively_parameters(shape, 20);
    let step_length = |gradient_clip_norm: f64| {
        let mut engine = factory(shape, &TrainSection { gradient_clip_norm, ..sgd() }, &initial);
        let before = parameters_of(&mut *engine);
        let report = expect_ok("inner_step", engine.inner_step(&batch, 1.0));
        let after = parameters_of(&mut *engine);
        (norm(after.iter().zip(&before).map(|(a, b)| a - b)), report.gradient_norm)
    };
    let (free, gradient_norm) = step_length(0.0);
    assert!((free / gradient_norm - 1.0).abs() < 1e-4, "{free} for a gradient of norm {gradient_norm}");
    let (clipped, reported) = step_length(gradient_norm / 4.0);
    assert!((clipped / (gradient_norm / 4.0) - 1.0).abs() < 1e-4, "{clipped} is not a quarter of {gradient_norm}");
    assert!((reported / gradient_norm - 1.0).abs() < 1e-6, "the norm before clipping is reported");
    let (loose, _) = step_length(gradient_norm * 4.0);
    assert!((loose / gradient_norm - 1.0).abs() < 1e-4, "{loose} for a gradient under the bound");
}

/// A weight that is NaN, or so large that the loss overflows, ends the step before anything changes.
pub fn numbers_that_are_not_finite_are_refused(factory: &Factory<'_>, shape: &ModelShape) {
    let batch = random_batch(shape, 2, 8, 21);
    for poison in [f32::NAN, f32::INFINITY] {
        let mut engine = factory(shape, &TrainSection::default(), &initial_parameters(shape, 22));
        expect_ok("inner_step", engine.inner_step(&batch, 1e-3));
        let row = engine.schema().find("model.layers.1.mlp.gate_proj.weight").map(|p| p.range.start).unwrap_or(0);
        let fragment = Fragment { index: 0, ranges: std::iter::once(row..row + 1).collect() };
        expect_ok("write_fragment", engine.write_fragment(&fragment, &[poison]));
        let before = expect_ok("save", engine.save());
        let refused = engine.inner_step(&batch, 1e-3);
        assert!(matches!(refused, Err(EngineError::NotFinite { .. })), "{poison} gave {refused:?}");
        let after = expect_ok("save", engine.save());
        // NaN is not equal to itself: compare everything but the poisoned tensor, and the count.
        assert_eq!(before.optimizer_steps, after.optimizer_steps);
        assert_eq!(before.first_moments, after.first_moments);
        let others = |state: &EngineState| {
            let mut tensors = state.parameters.clone();
            tensors.remove("model.layers.1.mlp.gate_proj.weight");
            tensors
        };
        assert_eq!(others(&before), others(&after));
    }
}

/// Tokens outside the vocabulary, wrong lengths, too long sequences, nothing at all.
pub fn batches_that_do_not_fit_are_refused(factory: &Factory<'_>, shape: &ModelShape) {
    let mut engine = factory(shape, &TrainSection::default(), &initial_parameters(shape, 23));
    let good = random_batch(shape, 2, 8, 24);
    let mut outside = good.clone();
    outside.tokens[5] = shape.vocab_size as u32;
    let mut short = good.clone();
    short.tokens.pop();
    let long = random_batch(shape, 1, shape.max_position_embeddings + 1, 25);
    let empty = TokenBatch { samples: 0, sequence_length: 8, tokens: Vec::new() };
    let overflowing = TokenBatch { samples: usize::MAX, sequence_length: 8, tokens: good.tokens.clone() };
    let before = parameters_of(&mut *engine);
    for (name, batch) in
        [("outside", outside), ("short", short), ("long", long), ("empty", empty), ("overflowing", overflowing)]
    {
        let stepped = engine.inner_step(&batch, 1e-3);
        assert!(matches!(stepped, Err(EngineError::Shape { .. })), "{name}: {stepped:?}");
        assert!(matches!(engine.evaluate(&batch), Err(EngineError::Shape { .. })), "{name}");
    }
    assert_eq!(bits(&before), bits(&parameters_of(&mut *engine)));
    let tokens = vec![0; shape.max_position_embeddings + 1];
    assert!(matches!(engine.logits(&tokens), Err(EngineError::Shape { .. })));
    assert!(matches!(engine.logits(&[]), Err(EngineError::Shape { .. })));
    assert!(matches!(engine.logits(&[shape.vocab_size as u32]), Err(EngineError::Shape { .. })));
    let mut wrong_length = vec![0.0; 3];
    assert!(matches!(engine.gradient(&good, &mut wrong_length), Err(EngineError::Shape { .. })));
}

/// A state of another model is refused, and the engine stays as it was.
pub fn states_that_do_not_fit_are_refused(factory: &Factory<'_>, shape: &ModelShape) {
    let mut engine = factory(shape, &TrainSection::default(), &initial_parameters(shape, 26));
    expect_ok("inner_step", engine.inner_step(&random_batch(shape, 2, 8, 27), 1e-3));
    let before = expect_ok("save", engine.save());
    let mut missing = before.clone();
    missing.parameters.remove("model.norm.weight");
    let mut reshaped = before.clone();
    if let Some(tensor) = reshaped.second_moments.get_mut("model.norm.weight") {
        tensor.values.pop();
    }
    let mut halved = before.clone();
    halved.first_moments.clear();
    for state in [missing, reshaped, halved] {
        assert!(matches!(engine.restore(&state), Err(EngineError::Shape { .. })));
        assert_eq!(before, expect_ok("save", engine.save()));
    }
}

/// Each of [`numerics::operations`] against its definition in f64; an operation that does not exist is an error.
pub fn operations_are_within_their_bounds(factory: &Factory<'_>, shape: &ModelShape) {
    let mut engine = factory(shape, &TrainSection::default(), &initial_parameters(shape, 28));
    for operation in numerics::operations() {
        let found = expect_ok(operation.name, engine.operation(&operation));
        let distance = relative_distance(&found, &numerics::reference(&operation));
        assert!(distance <= operation.bound, "{}: {distance:.1e}, allowed {:.1e}", operation.name, operation.bound);
    }
    let unknown = numerics::Operation { name: "conjure", inputs: Vec::new(), bound: 0.0 };
    assert!(engine.operation(&unknown).is_err());
}
