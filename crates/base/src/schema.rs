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

    /// `count` fragments that hold every parameter once. Layers are strided over them, layer l in fragment l mod `count`
    /// (arXiv 2501.18512); what is in no layer, the embedding above all, goes to the smallest fragment, in canonical order.
    pub fn fragments(&self, count: u32) -> Vec<Fragment> {
        let mut ranges: Vec<Vec<Range<usize>>> = vec![Vec::new(); count.max(1) as usize];
        let mut sizes = vec![0; ranges.len()];
        let mut place = |index: usize, range: &Range<usize>| {
            sizes[index] += range.len();
            ranges[index].push(range.clone());
            (0..sizes.len()).min_by_key(|index| sizes[*index]).unwrap_or(0)
        };
        let mut smallest = 0;
        for parameter in &self.parameters {
            if let Some(layer) = layer_of(&parameter.name) {
                smallest = place(layer % count.max(1) as usize, &parameter.range);
            }
        }
        for parameter in self.parameters.iter().filter(|parameter| layer_of(&parameter.name).is_none()) {
            smallest = place(smallest, &parameter.range);
        }
        let fragment = |(index, ranges)| Fragment { index: index as u32, ranges: joined(ranges) };
        ranges.into_iter().enumerate().map(fragment).collect()
    }
}

/// The number of the layer that a parameter is in: the first number between the dots of its name.
fn layer_of(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

/// Disjoint ranges in ascending order, adjacent ones as one.
fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|range| range.start);
    let mut all: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

impl Fragment {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }

    /// Where a part of this fragment's values lies in the flat vector: ranges there, and in the part.
    pub fn places(&self, part: Range<usize>) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let mut start_of_range = 0;
        self.ranges.iter().filter_map(move |range| {
            let begin = start_of_range;
            start_of_range += range.len();
            let (start, end) = (part.start.max(begin), part.end.min(start_of_range));
            let offset = range.start;
            (start < end).then(|| (offset + start - begin..offset + end - begin, start - part.start..end - part.start))
        })
    }

    /// Copies this fragment's elements of the flat vector `all` to `values`, in the order of its ranges.
    pub fn gather(&self, all: &[f32], values: &mut [f32]) {
        let mut rest = values;
        for range in &self.ranges {
            let (part, after) = rest.split_at_mut(range.len());
            part.copy_from_slice(&all[range.clone()]);
            rest = after;
        }
    }

    /// Copies `values` to where this fragment's elements lie in the flat vector `all`.
    pub fn scatter(&self, values: &[f32], all: &mut [f32]) {
        let mut rest = values;
        for range in &self.ranges {
            let (part, after) = rest.split_at(range.len());
            all[range.clone()].copy_from_slice(part);
            rest = after;
        }
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

    #[test]
    fn fragments_hold_every_parameter_once_and_are_strided() {
        let deep = ModelShape { num_hidden_layers: 7, ..shape(false) };
        let schema = ParameterSchema::llama(&deep);
        for count in 1..=9 {
            let fragments = schema.fragments(count);
            assert_eq!(fragments.len(), count as usize);
            let mut seen = vec![0; schema.elements()];
            for range in fragments.iter().flat_map(|fragment| fragment.ranges.clone()) {
                seen[range].iter_mut().for_each(|count| *count += 1);
            }
            assert!(seen.iter().all(|count| *count == 1), "{count} fragments");
        }
        let three = schema.fragments(3);
        let layer = |l: usize| schema.find(&format!("model.layers.{l}.mlp.up_proj.weight")).unwrap().range.start;
        for l in 0..7 {
            assert!(three[l % 3].ranges.iter().any(|range| range.contains(&layer(l))), "layer {l}");
        }
        let (smallest, largest) =
            (three.iter().map(Fragment::elements).min(), three.iter().map(Fragment::elements).max());
        assert!(largest.unwrap() < smallest.unwrap() * 2, "{smallest:?} {largest:?}");
        assert_eq!(schema.fragments(1), [schema.whole()]);
    }

    #[test]
    fn a_fragment_comes_back_to_its_place() {
        let schema = ParameterSchema::llama(&shape(true));
        let all: Vec<f32> = (0..schema.elements()).map(|index| index as f32).collect();
        let mut copy = vec![-1.0; all.len()];
        for fragment in schema.fragments(2) {
            let mut values = vec![0.0; fragment.elements()];
            fragment.gather(&all, &mut values);
            fragment.scatter(&values, &mut copy);
        }
        assert_eq!(copy, all);
    }
}
