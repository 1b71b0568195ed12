//! The fused blocks compute what the composed ones do: loss, every gradient, parameters after steps.
#![allow(clippy::unwrap_used)] // Helpers of tests may panic, as the tests do.

use base::config::TrainSection;
use base::{ModelShape, TokenBatch};
use engine::{Engine, conformance};
use engine_burn::{BlockKernels, BurnEngine};

/// Sizes that are no multiples of the kernels' pieces: 5 · 150 rows are 2 pieces of 256 and a rest, 150 positions are 2
/// blocks of 64 queries and a rest, 150 feed-forward and 259 vocabulary rows are pieces of 128 and a rest.
fn uneven_shape(num_key_value_heads: usize, tie_word_embeddings: bool) -> ModelShape {
    ModelShape {
        vocab_size: 259,
        hidden_size: 72,
        intermediate_size: 150,
        num_hidden_layers: 2,
        num_attention_heads: 6,
        num_key_value_heads,
        max_position_embeddings: 160,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings,
    }
}

fn engine(shape: &ModelShape, kernels: BlockKernels) -> BurnEngine {
    let initial = conformance::lively_parameters(shape, 5);
    BurnEngine::with_kernels(shape, &TrainSection::default(), "flex", &initial, kernels).unwrap()
}

fn gradient(engine: &mut BurnEngine, batch: &TokenBatch) -> (f64, Vec<f32>) {
    let mut gradient = vec![0.0; engine.schema().elements()];
    let report = engine.gradient(batch, &mut gradient).unwrap();
    (report.loss_nats, gradient)
}

fn relative_distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn fused_gradients_are_those_of_burn_s_autodiff() {
    for (key_value_heads, tied) in [(6, false), (2, true), (1, false)] {
        let shape = uneven_shape(key_value_heads, tied);
        let batch = conformance::random_batch(&shape, 5, 150, 7);
        let (mut fused, mut composed) = (engine(&shape, BlockKernels::Fused), engine(&shape, BlockKernels::Composed));
        let (fused_loss, fused_gradient) = gradient(&mut fused, &batch);
        let (composed_loss, composed_gradient) = gradient(&mut composed, &batch);
        assert!((fused_loss / composed_loss - 1.0).abs() < 2e-6, "{fused_loss} and {composed_loss}");
        // Both round every sum of up to 750 terms differently: errors of order sqrt(750) · 2^-24 = 2e-6 a layer.
        for parameter in fused.schema().parameters() {
            let range = parameter.range.clone();
            let distance = relative_distance(&fused_gradient[range.clone()], &composed_gradient[range]);
            assert!(distance < 2e-5, "{} of {key_value_heads} groups: {distance}", parameter.name);
        }
        let logits = |engine: &mut BurnEngine| engine.logits(&batch.tokens[..130]).unwrap();
        assert!(relative_distance(&logits(&mut fused), &logits(&mut composed)) < 1e-5);
    }
}

#[test]
fn fused_steps_are_those_of_burn_s_operations() {
    let shape = uneven_shape(3, false);
    let (mut fused, mut composed) = (engine(&shape, BlockKernels::Fused), engine(&shape, BlockKernels::Composed));
    for seed in 0..4 {
        let batch = conformance::random_batch(&shape, 2, 70, seed);
        let reports = [&mut fused, &mut composed].map(|engine| engine.inner_step(&batch, 1e-3).unwrap());
        assert!((reports[0].gradient_norm / reports[1].gradient_norm - 1.0).abs() < 1e-4);
        assert!((reports[0].loss_nats / reports[1].loss_nats - 1.0).abs() < 1e-5);
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let shape = uneven_shape(2, false);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut engine = engine(&shape, BlockKernels::Fused);
            for seed in 0..3 {
                engine.inner_step(&conformance::random_batch(&shape, 3, 130, seed), 1e-3).unwrap();
            }
            engine.save().unwrap()
        })
    };
    let single = run(1);
    assert!(single == run(2) && single == run(3), "the same bits with 1, 2 and 3 threads");
}
