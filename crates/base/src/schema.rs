//! The canonical order of a model's parameters, and fragments as ranges of it.
//!
//! Everything that leaves an engine (deltas, hashes, checkpoints) is one flat f32 vector in this order. Names
//! and shapes are Hugging Face's, so that a checkpoint needs no translation.

use crate::shape::ModelShape;
use std::ops::Range;

/// One parameter tensor: its Hugging Face name and shape, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSpec {
    /// For example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[out, in]` for projections.
    pub shape: Vec<usize>,
    /// Where it lies in the flat vector, in elements.
    pub range: Range<usize>,
}

/// All parameters of a model, in canonical order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSchema {
    parameters: Vec<ParameterSpec>,
    elements: usize,
}

/// A fixed subset of the parameters that is synchronised together: ascending, disjoint element ranges of the
/// flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment {
    /// Position among the run's fragments.
    pub index: u32,
    /// Ascending, disjoint ranges of elements.
    pub ranges: Vec<Range<usize>>,
}

impl ParameterSchema {
    /// Lays named shapes one after the other.
    pub fn new(named_shapes: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        let mut elements = 0;
        let parameters = named_shapes
            .into_iter()
            .map(|(name, shape)| {
                let start = elements;
                elements += shape.iter().product::<usize>();
                ParameterSpec { name, shape, range: start..elements }
            })
            .collect();
        Self { parameters, elements }
    }

    /// The parameters of `transformers.LlamaForCausalLM`, in the order of its `named_parameters`. With tied
    /// embeddings there is no `lm_head.weight`.
    pub fn llama(shape: &ModelShape) -> Self {
        let hidden = shape.hidden_size;
        let key_value = shape.num_key_value_heads * shape.head_size();
        let inner = shape.intermediate_size;
        let mut named = vec![("model.embed_tokens.weight".to_owned(), vec![shape.vocab_size, hidden])];
        for layer in 0..shape.num_hidden_layers {
            let block = [
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![key_value, hidden]),
                ("self_attn.v_proj", vec![key_value, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![inner, hidden]),
                ("mlp.up_proj", vec![inner, hidden]),
                ("mlp.down_proj", vec![hidden, inner]),
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
            ];
            named.extend(block.map(|(name, dims)| (format!("model.layers.{layer}.{name}.weight"), dims)));
        }
        named.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !shape.tie_word_embeddings {
            named.push(("lm_head.weight".to_owned(), vec![shape.vocab_size, hidden]));
        }
        Self::new(named)
    }

    /// Every parameter, in order.
    pub fn parameters(&self) -> &[ParameterSpec] {
        &self.parameters
    }

    /// Length of the flat vector.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// The parameter of that name.
    pub fn find(&self, name: &str) -> Option<&ParameterSpec> {
        self.parameters.iter().find(|parameter| parameter.name == name)
    }

    /// The fragment that holds every parameter: what `synchronous` and `diloco` exchange.
    pub fn whole(&self) -> Fragment {
        Fragment { index: 0, ranges: std::iter::once(0..self.elements).collect() }
    }
}

impl Fragment {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(tie_word_embeddings: bool) -> ModelShape {
        ModelShape {
            vocab_size: 100,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 32,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings,
        }
    }

    #[test]
    fn llama_counts_every_parameter_once() {
        // By hand: embedding 1600; a block 2*256 + 2*128 + 3*384 + 2*16 = 1952; final norm 16; head 1600.
        let untied = ParameterSchema::llama(&shape(false));
        assert_eq!(untied.elements(), 1600 + 2 * 1952 + 16 + 1600);
        assert_eq!(ParameterSchema::llama(&shape(true)).elements(), untied.elements() - 1600);
        let mut end = 0;
        for parameter in untied.parameters() {
            assert_eq!(parameter.range.start, end);
            end = parameter.range.end;
        }
        assert_eq!(untied.whole().elements(), end);
    }
}
