//! Initial parameters, from a seed, the same on every platform.
//!
//! Matrices are drawn from normal distributions. Those of the vocabulary have a standard deviation of 0.02, as GPT-2's, so that the
//! first predictions are guesses; all others 1/√(inputs), so that outputs vary as inputs do at any width (LeCun et al. 1998,
//! Efficient BackProp, section 4.6). GPT-2's 0.02 everywhere with smaller ends of residual branches was 5.7 % behind in the loss of
//! data parallelism on what `cargo xtask bench wan` trains (docs/log.md). Norm weights are 1. Each tensor has a random stream of its
//! own: tying the embeddings or adding layers leaves the others as they were.

use base::random::Random;
use base::{HostTensor, ModelShape, NamedTensors, ParameterSchema, ParameterSpec};

/// Standard deviation of the matrices that have a row for each token of the vocabulary.
const VOCABULARY_STANDARD_DEVIATION: f64 = 0.02;

/// Parameters of a model that has seen nothing. Equal shapes and seeds give equal bits everywhere.
pub fn initial_parameters(shape: &ModelShape, seed: u64) -> NamedTensors {
    let schema = ParameterSchema::llama(shape);
    let draw = |(stream, parameter): (usize, &ParameterSpec)| {
        let values = match parameter.shape[..] {
            [_, inputs] => {
                normal(seed, stream as u64, parameter.range.len(), standard_deviation(&parameter.name, inputs) as f32)
            }
            _ => vec![1.0; parameter.range.len()],
        };
        (parameter.name.clone(), HostTensor { shape: parameter.shape.clone(), values })
    };
    schema.parameters().iter().enumerate().map(draw).collect()
}

fn standard_deviation(name: &str, inputs: usize) -> f64 {
    if ["model.embed_tokens.weight", "lm_head.weight"].contains(&name) {
        VOCABULARY_STANDARD_DEVIATION
    } else {
        1.0 / libm::sqrt(inputs as f64)
    }
}

fn normal(seed: u64, stream: u64, elements: usize, standard_deviation: f32) -> Vec<f32> {
    let mut random = Random::new(seed, stream);
    (0..elements).map(|_| standard_deviation * random.next_normal()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> ModelShape {
        ModelShape {
            vocab_size: 64,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 16,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
        }
    }

    fn deviation(values: &[f32]) -> f64 {
        (values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
    }

    #[test]
    fn bits_depend_on_the_seed_and_nothing_else() {
        let tensors = initial_parameters(&shape(), 7);
        assert_eq!(tensors, initial_parameters(&shape(), 7));
        let other = initial_parameters(&shape(), 8);
        assert_ne!(tensors["lm_head.weight"], other["lm_head.weight"]);
        // Pinned: a change here makes runs of the same seed differ between versions.
        let first: Vec<u32> = tensors["model.embed_tokens.weight"].values[..2].iter().map(|x| x.to_bits()).collect();
        assert_eq!(first, PINNED);
    }

    const PINNED: [u32; 2] = [3_158_270_688, 1_018_496_902];

    #[test]
    fn outputs_vary_as_inputs_do() {
        let tensors = initial_parameters(&shape(), 1);
        // 1,024 draws or more: the standard error of a standard deviation is 1/sqrt(2048) = 2.2 %; five of them.
        let expect = |name: &str, expected: f64| {
            let found = deviation(&tensors[name].values);
            assert!((found / expected - 1.0).abs() < 0.12, "{name}: {found} where {expected} was expected");
        };
        expect("model.embed_tokens.weight", 0.02);
        expect("lm_head.weight", 0.02);
        expect("model.layers.1.mlp.gate_proj.weight", 32.0_f64.powf(-0.5));
        expect("model.layers.0.self_attn.o_proj.weight", 32.0_f64.powf(-0.5));
        expect("model.layers.1.mlp.down_proj.weight", 48.0_f64.powf(-0.5));
        assert!(tensors["model.norm.weight"].values.iter().all(|x| *x == 1.0));
    }
}
