//! Against an independent implementation: `transformers.LlamaForCausalLM` trained by `torch.optim.AdamW` in f32.
//!
//! `python/golden.py` made the files and says how. Weights and tokens come from a hash that both sides repeat, and of each
//! tensor the files hold its norm and some elements spread evenly.

use super::{Expectations, Factory, expect_ok, gradient_of, parameters_of};
use crate::numerics::relative_distance;
use base::config::TrainSection;
use base::{HostTensor, ModelShape, NamedTensors, ParameterSchema, TokenBatch};
use serde::Deserialize;
use std::collections::BTreeMap;

const FILES: [&str; 2] = [include_str!("../../golden/untied.json"), include_str!("../../golden/tied.json")];

const VOCABULARY: usize = 61;

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
    parameters_after_one_step: BTreeMap<String, Summary>,
    parameters_after_all_steps: BTreeMap<String, Summary>,
}

#[derive(Deserialize)]
struct Summary {
    norm: f64,
    kept: Vec<f32>,
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

/// The hash of `golden.py`: the top half of index · odd constant modulo 2^64, as a number in [0, 1).
fn uniform(stream: u64, length: usize) -> impl Iterator<Item = f64> {
    let index = (1..=length as u64).map(move |index| index + (stream << 32));
    index.map(|index| (index.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as f64 / 4_294_967_296.0)
}

fn initial(schema: &ParameterSchema) -> NamedTensors {
    let tensor = |(stream, parameter): (usize, &base::ParameterSpec)| {
        let scaled = |u: f64| if parameter.shape.len() == 1 { 1.0 + 0.5 * (u - 0.5) } else { 0.6 * (u - 0.5) };
        let values = uniform(stream as u64, parameter.range.len()).map(|u| scaled(u) as f32).collect();
        (parameter.name.clone(), HostTensor { shape: parameter.shape.clone(), values })
    };
    schema.parameters().iter().enumerate().map(tensor).collect()
}

fn close(what: &str, found: f64, expected: f64, relative: f64) {
    let apart = (found - expected).abs() / expected.abs();
    assert!(
        apart <= relative,
        "{what}: {found} where PyTorch has {expected}: {apart:.1e} apart, allowed {relative:.1e}"
    );
}

/// Norms and kept elements of every tensor of a flat vector.
fn compare(what: &str, schema: &ParameterSchema, flat: &[f32], expected: &BTreeMap<String, Summary>, relative: f64) {
    assert_eq!(expected.len(), schema.parameters().len(), "{what}: a value for every tensor");
    for parameter in schema.parameters() {
        let (found, expected) = (&flat[parameter.range.clone()], &expected[&parameter.name]);
        let norm = found.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        close(&format!("{what}: norm of {}", parameter.name), norm, expected.norm, relative);
        let kept_elements = expected.kept.len();
        let kept: Vec<f32> = (0..kept_elements).map(|index| found[index * found.len() / kept_elements]).collect();
        let distance = relative_distance(&kept, &expected.kept);
        assert!(
            distance <= relative,
            "{what}: {} is {distance:.1e} from PyTorch's, allowed {relative:.1e}",
            parameter.name
        );
    }
}

/// Logits, loss, every gradient, and parameters after 1 and after 20 AdamW steps, with tied and untied embeddings.
pub fn matches_transformers_and_adamw(factory: &Factory<'_>, expected: &Expectations) {
    for text in FILES {
        let golden: Golden = serde_json::from_str(text).unwrap_or_else(|error| panic!("golden values: {error}"));
        check(factory, expected, &golden);
    }
}

fn check(factory: &Factory<'_>, expected: &Expectations, golden: &Golden) {
    let shape = shape(golden.tie_word_embeddings);
    let schema = ParameterSchema::llama(&shape);
    let train = TrainSection {
        weight_decay: golden.train.weight_decay,
        beta1: golden.train.beta1,
        beta2: golden.train.beta2,
        epsilon: golden.train.epsilon,
        gradient_clip_norm: golden.train.gradient_clip_norm,
        ..TrainSection::default()
    };
    let start = initial(&schema);
    let mut engine = factory(&shape, &train, &start);
    let start = schema.flatten(&start).unwrap_or_else(|error| panic!("golden parameters: {error}"));
    let tokens = uniform(1000, golden.samples * (golden.positions + 1)).map(|u| (u * VOCABULARY as f64) as u32);
    let batch = TokenBatch { samples: golden.samples, sequence_length: golden.positions, tokens: tokens.collect() };

    let logits = expect_ok("logits", engine.logits(&batch.tokens[..golden.positions]));
    let distance = relative_distance(&logits, &golden.logits_of_first_sample);
    assert!(distance <= expected.logits(), "logits are {distance:.1e} from PyTorch's");
    let evaluated = expect_ok("evaluate", engine.evaluate(&batch));
    close("loss", evaluated.nats / evaluated.tokens as f64, golden.loss_nats, expected.loss());
    let gradient = gradient_of(&mut *engine, &batch);
    compare("gradient", &schema, &gradient, &golden.gradients, expected.gradient());

    for (index, step) in golden.steps.iter().enumerate() {
        let report = expect_ok("inner_step", engine.inner_step(&batch, golden.train.learning_rate));
        // Later steps start from parameters that are apart already.
        let (loss, norm) = match index {
            0 => (expected.loss(), expected.gradient()),
            _ => (expected.trained_loss(), expected.trained_gradient()),
        };
        close(&format!("loss of step {index}"), report.loss_nats, step.loss_nats, loss);
        close(&format!("gradient norm of step {index}"), report.gradient_norm, step.gradient_norm, norm);
        if index == 0 {
            let parameters = parameters_of(&mut *engine);
            compare("one step", &schema, &parameters, &golden.parameters_after_one_step, expected.one_step());
            compare_movement(&schema, &start, &parameters, &golden.parameters_after_one_step, expected);
        }
    }
    let parameters = parameters_of(&mut *engine);
    let what = format!("{} steps", golden.steps.len());
    compare(&what, &schema, &parameters, &golden.parameters_after_all_steps, expected.many_steps());
    compare_movement(&schema, &start, &parameters, &golden.parameters_after_all_steps, expected);
}

/// Where the kept elements of all tensors have gone since `start`, as one vector: a step that was left out, doubled or turned
/// round shows here, where parameters themselves hardly differ.
fn compare_movement(
    schema: &ParameterSchema,
    start: &[f32],
    flat: &[f32],
    golden: &BTreeMap<String, Summary>,
    expected: &Expectations,
) {
    let (mut found, mut wanted) = (Vec::new(), Vec::new());
    for parameter in schema.parameters() {
        let kept = &golden[&parameter.name].kept;
        for (index, value) in kept.iter().enumerate() {
            let at = parameter.range.start + index * parameter.range.len() / kept.len();
            found.push(flat[at] - start[at]);
            wanted.push(value - start[at]);
        }
    }
    let (distance, allowed) = (relative_distance(&found, &wanted), expected.movement());
    assert!(distance <= allowed, "parameters moved {distance:.1e} from where PyTorch's did, allowed {allowed:.1e}");
}
