//! Against an independent implementation: `transformers.LlamaForCausalLM` trained by `torch.optim.AdamW`.
//!
//! `python/golden.py` made the files and says how.
#![allow(clippy::unwrap_used)] // Helpers of tests may panic, as the tests do.

use base::config::TrainSection;
use base::{HostTensor, ModelShape, NamedTensors, ParameterSchema, TokenBatch};
use engine::Engine;
use engine_burn::{BlockKernels, BurnEngine};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Golden {
    tie_word_embeddings: bool,
    samples: usize,
    positions: usize,
    logits_of_first_sample: Vec<f32>,
    loss_nats: f64,
    gradients: BTreeMap<String, Summary>,
    train: Train,
    steps: Vec<Step>,
    parameters_after_steps: BTreeMap<String, Summary>,
}

#[derive(Deserialize)]
struct Summary {
    norm: f64,
    first: Vec<f32>,
}

#[derive(Deserialize)]
struct Train {
    learning_rate: f64,
    weight_decay: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    gradient_clip_norm: f64,
}

#[derive(Deserialize)]
struct Step {
    loss_nats: f64,
    gradient_norm: f64,
}

const VOCABULARY: usize = 61;

fn shape(tie_word_embeddings: bool) -> ModelShape {
    ModelShape {
        vocab_size: VOCABULARY,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 16,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings,
    }
}

/// The hash of `golden.py`.
fn uniform(stream: u64, length: usize) -> impl Iterator<Item = f64> {
    let index = (1..=length as u64).map(move |index| index + (stream << 32));
    index.map(|index| (index.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as f64 / 4_294_967_296.0)
}

fn initial(shape: &ModelShape) -> NamedTensors {
    let schema = ParameterSchema::llama(shape);
    let tensor = |(stream, parameter): (usize, &base::ParameterSpec)| {
        let scaled = |u: f64| if parameter.shape.len() == 1 { 1.0 + 0.5 * (u - 0.5) } else { 0.6 * (u - 0.5) };
        let values = uniform(stream as u64, parameter.range.len()).map(|u| scaled(u) as f32).collect();
        (parameter.name.clone(), HostTensor { shape: parameter.shape.clone(), values })
    };
    schema.parameters().iter().enumerate().map(tensor).collect()
}

fn close(what: &str, found: f64, expected: f64, absolute: f64, relative: f64) {
    let allowed = absolute + relative * expected.abs();
    assert!((found - expected).abs() <= allowed, "{what}: {found} where PyTorch has {expected}");
}

fn compare(what: &str, found: &[f32], expected: &Summary, absolute: f64, relative: f64) {
    let norm = found.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    close(&format!("norm of {what}"), norm, expected.norm, absolute, relative);
    for (index, (found, expected)) in found.iter().zip(&expected.first).enumerate() {
        close(&format!("{what}[{index}]"), f64::from(*found), f64::from(*expected), absolute, relative);
    }
}

fn check(text: &str, kernels: BlockKernels) {
    let golden: Golden = serde_json::from_str(text).unwrap();
    let shape = shape(golden.tie_word_embeddings);
    let train = TrainSection {
        weight_decay: golden.train.weight_decay,
        beta1: golden.train.beta1,
        beta2: golden.train.beta2,
        epsilon: golden.train.epsilon,
        gradient_clip_norm: golden.train.gradient_clip_norm,
        ..TrainSection::default()
    };
    let mut engine = BurnEngine::with_kernels(&shape, &train, "flex", &initial(&shape), kernels).unwrap();
    let tokens = uniform(1000, golden.samples * (golden.positions + 1)).map(|u| (u * VOCABULARY as f64) as u32);
    let batch = TokenBatch { samples: golden.samples, sequence_length: golden.positions, tokens: tokens.collect() };

    // f32 sums of a hundred terms in another order differ by some 1e-6 of their size.
    let logits = engine.logits(&batch.tokens[..golden.positions]).unwrap();
    assert_eq!(logits.len(), golden.logits_of_first_sample.len());
    for (index, (found, expected)) in logits.iter().zip(&golden.logits_of_first_sample).enumerate() {
        close(&format!("logit {index}"), f64::from(*found), f64::from(*expected), 1e-5, 1e-5);
    }
    let schema = engine.schema().clone();
    let mut gradient = vec![0.0; schema.elements()];
    let report = engine.gradient(&batch, &mut gradient).unwrap();
    close("loss", report.loss_nats, golden.loss_nats, 0.0, 2e-6);
    assert_eq!(golden.gradients.len(), schema.parameters().len());
    for parameter in schema.parameters() {
        compare(&parameter.name, &gradient[parameter.range.clone()], &golden.gradients[&parameter.name], 2e-6, 2e-5);
    }

    for (index, step) in golden.steps.iter().enumerate() {
        let report = engine.inner_step(&batch, golden.train.learning_rate).unwrap();
        close(&format!("loss of step {index}"), report.loss_nats, step.loss_nats, 0.0, 2e-5);
        close(&format!("norm of step {index}"), report.gradient_norm, step.gradient_norm, 0.0, 2e-4);
    }
    let mut parameters = vec![0.0; schema.elements()];
    engine.read_fragment(&schema.whole(), &mut parameters).unwrap();
    // AdamW's first steps are lr · m/√v: where a gradient nearly cancels, its rounding error decides the quotient. Five
    // steps of 1e-2 move a parameter by up to 5e-2; 1e-4 is 0.2 % of that.
    for parameter in schema.parameters() {
        let expected = &golden.parameters_after_steps[&parameter.name];
        compare(&parameter.name, &parameters[parameter.range.clone()], expected, 1e-4, 1e-4);
    }
}

#[test]
fn fused_blocks_match_transformers_and_adamw() {
    check(include_str!("golden/untied.json"), BlockKernels::Fused);
    check(include_str!("golden/tied.json"), BlockKernels::Fused);
}

#[test]
fn composed_blocks_match_transformers_and_adamw() {
    check(include_str!("golden/untied.json"), BlockKernels::Composed);
    check(include_str!("golden/tied.json"), BlockKernels::Composed);
}
