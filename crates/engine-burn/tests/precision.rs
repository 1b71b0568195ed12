//! bf16 matrix products with f32 weights, and refusals, on the CPU: the arithmetic is the same on every device.
#![allow(clippy::unwrap_used)] // Helpers of tests may panic, as the tests do.

use base::config::TrainSection;
use base::{ModelShape, TokenBatch};
use engine::conformance::{self, Expectations};
use engine::{Engine, EngineError, Precision, PrecisionChoice};
use engine_burn::BurnEngine;

const BF16: PrecisionChoice = PrecisionChoice::Fixed(Precision::Bf16);

#[test]
fn bf16_products_conform() {
    conformance::run_all(
        &|shape, train, initial| Box::new(BurnEngine::new(shape, train, "flex", BF16, initial).unwrap()),
        &Expectations { precision: Precision::Bf16, repeatable: true },
    );
}

/// Each gradient tensor against the same in f32. On the golden values one tensor is 5.4 % from PyTorch's in f32: differences of nearly
/// equal terms enlarge the 0.2 % of one rounding.
#[test]
fn bf16_gradients_lie_near_those_of_f32() {
    let shape = conformance::tiny_shape(false);
    let initial = conformance::lively_parameters(&shape, 3);
    let batch = conformance::random_batch(&shape, 4, 16, 4);
    let gradient = |choice| {
        let mut engine = BurnEngine::new(&shape, &TrainSection::default(), "flex", choice, &initial).unwrap();
        let mut gradient = vec![0.0; engine.schema().elements()];
        engine.gradient(&batch, &mut gradient).unwrap();
        (gradient, engine.schema().clone())
    };
    let ((rounded, schema), (exact, _)) = (gradient(BF16), gradient(PrecisionChoice::Auto));
    for parameter in schema.parameters() {
        let range = parameter.range.clone();
        let distance = engine::numerics::relative_distance(&rounded[range.clone()], &exact[range]);
        assert!((1e-4..0.1).contains(&distance), "{}: {distance:.1e}", parameter.name);
    }
}

#[test]
fn bf16_is_used_and_told() {
    let shape = conformance::tiny_shape(false);
    let initial = conformance::lively_parameters(&shape, 1);
    let build = |choice| BurnEngine::new(&shape, &TrainSection::default(), "flex", choice, &initial).unwrap();
    let (mut rounded, mut exact) = (build(BF16), build(PrecisionChoice::Auto));
    assert_eq!(rounded.device().precision, Precision::Bf16);
    assert_eq!(exact.device().precision, Precision::F32, "auto means f32 on a CPU");
    let tokens = conformance::random_batch(&shape, 1, 12, 2).tokens;
    let (rounded, exact) = (rounded.logits(&tokens).unwrap(), exact.logits(&tokens).unwrap());
    let distance = engine::numerics::relative_distance(&rounded, &exact);
    assert!(distance > 1e-4, "{distance}: nothing was rounded");
}

#[test]
fn a_device_that_does_not_exist_is_refused_with_what_there_is() {
    let shape = conformance::tiny_shape(true);
    let initial = engine::initial_parameters(&shape, 1);
    let refused =
        BurnEngine::new(&shape, &TrainSection::default(), "tpu", PrecisionChoice::Auto, &initial).unwrap_err();
    assert!(matches!(&refused, EngineError::Device { device, .. } if device == "tpu"), "{refused:?}");
    assert!(refused.to_string().contains("flex"), "{refused}");
}

/// More rows than the host has memory for their logits. Nothing of it is allocated.
#[test]
fn a_micro_batch_larger_than_memory_is_refused_and_a_smaller_one_fits() {
    let shape = ModelShape { vocab_size: 1 << 16, ..conformance::tiny_shape(true) };
    let initial = engine::initial_parameters(&shape, 1);
    let train = TrainSection { micro_batch_samples: usize::MAX, ..TrainSection::default() };
    let mut engine = BurnEngine::new(&shape, &train, "flex", PrecisionChoice::Auto, &initial).unwrap();
    let Some(memory_bytes) = engine.device().memory_bytes else {
        return;
    };
    let samples = (memory_bytes >> 16) as usize / (4 * 16) + 1;
    let large = TokenBatch { samples, sequence_length: 16, tokens: vec![3; samples * 17] };
    let before = engine.save().unwrap();
    let refused = engine.inner_step(&large, 1e-3).unwrap_err();
    assert!(matches!(&refused, EngineError::OutOfMemory { device, .. } if device == "flex"), "{refused:?}");
    assert!(matches!(engine.evaluate(&large), Err(EngineError::OutOfMemory { .. })));
    assert_eq!(engine.save().unwrap(), before);
    engine.set_micro_batch_samples(1);
    let report = engine.inner_step(&large.slice(0..2), 1e-3).unwrap();
    assert!(report.loss_nats.is_finite());
}
