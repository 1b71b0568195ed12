//! How the deltas of one fragment are coded: the codecs of `run.toml` as `formats` has them, with the fragment's shapes.

use crate::plan::FragmentPlan;
use base::config::Codec;
use base::{Fragment, ParameterSchema, ParameterSpec};
use formats::lowrank::{Basis, LowRank, MatrixShape};
use formats::{CodecKind, DecodeError};
use std::ops::Range;

/// Where the encoder of a low-rank codec begins, at every site.
const BASIS_SEED: u64 = 1;

/// Values in a part of what is coded value by value or block by block: 256 KiB, which several passes find in the second-level cache. A
/// multiple of every codec's block.
const PART_VALUES: usize = 1 << 16;

/// Codes the deltas of one fragment.
#[derive(Debug, Clone)]
pub struct FragmentCodec(Kind);

#[derive(Debug, Clone)]
enum Kind {
    /// Value by value, or block by block.
    Values {
        codec: &'static dyn formats::Codec,
        elements: usize,
    },
    LowRank(LowRank),
}

/// What an encoder keeps from one delta of a fragment to the next. No decoder needs it.
#[derive(Debug, Clone, Default)]
pub struct EncoderMemory(Option<Basis>);

impl FragmentCodec {
    /// The codec of `plan` for `fragment`, which is made of whole parameters; `rank` is that of a low-rank codec.
    pub fn new(plan: FragmentPlan, rank: u32, schema: &ParameterSchema, fragment: &Fragment) -> Self {
        let kind = match plan.codec {
            Codec::F32 => CodecKind::F32,
            Codec::Bf16 => CodecKind::Bf16,
            Codec::Int8 => CodecKind::Int8,
            Codec::E3m0 => CodecKind::E3m0,
            Codec::Mxfp4 => CodecKind::Mxfp4,
            Codec::LowRank => return Self(Kind::LowRank(LowRank::new(&shapes(schema, fragment), rank as usize))),
            Codec::Sparse96 => CodecKind::Sparse96,
            Codec::Sparse => CodecKind::Sparse,
        };
        Self(Kind::Values { codec: kind.codec(), elements: fragment.elements() })
    }

    /// Size of every delta of the fragment.
    pub fn encoded_bytes(&self) -> usize {
        match &self.0 {
            Kind::Values { codec, elements } => codec.encoded_bytes(*elements),
            Kind::LowRank(codec) => codec.encoded_bytes(),
        }
    }

    /// Ranges of the fragment's values that are coded apart, in order: small enough to stay in a cache while more than one thing is done
    /// with them, where the shapes allow it.
    pub fn parts(&self) -> Vec<Range<usize>> {
        match &self.0 {
            Kind::Values { elements, .. } => {
                let starts = (0..*elements).step_by(PART_VALUES);
                starts.map(|start| start..(start + PART_VALUES).min(*elements)).collect()
            }
            Kind::LowRank(codec) => codec.matrices().collect(),
        }
    }

    /// Encodes `delta`, and leaves in it what that lost: `delta - decoded`.
    pub fn encode(&self, delta: &mut [f32], memory: &mut EncoderMemory) -> Vec<u8> {
        let mut encoded = vec![0; self.encoded_bytes()];
        for (index, part) in self.parts().into_iter().enumerate() {
            self.encode_part(index, &mut delta[part], memory, &mut encoded);
        }
        encoded
    }

    /// As [`FragmentCodec::encode`] for one of the [`FragmentCodec::parts`], into its place of the whole encoding; the first part comes first, for
    /// it begins the encoding.
    pub fn encode_part(&self, index: usize, delta: &mut [f32], memory: &mut EncoderMemory, encoded: &mut [u8]) {
        match &self.0 {
            Kind::Values { codec, elements } => {
                let start = index * PART_VALUES;
                let place = codec.encoded_range(start..start + delta.len(), *elements);
                codec.encode(delta, &mut encoded[place]);
            }
            Kind::LowRank(codec) => {
                let basis = memory.0.get_or_insert_with(|| codec.basis(BASIS_SEED));
                if index == 0 {
                    codec.begin(basis, encoded);
                }
                codec.encode_matrix(index, delta, basis, encoded);
            }
        }
    }

    /// Values that are coded together: where an encoding can be cut. `None` where it cannot be cut by values.
    pub fn block_values(&self) -> Option<usize> {
        match &self.0 {
            Kind::Values { codec, .. } => Some(codec.block_values()),
            Kind::LowRank(_) => None,
        }
    }

    /// Where in an encoding these values lie, as an encoding of their own; `None` where it cannot be cut there.
    pub fn slice(&self, values: &Range<u64>) -> Option<Range<usize>> {
        let Kind::Values { codec, elements } = &self.0 else { return None };
        let (start, end) = (usize::try_from(values.start).ok()?, usize::try_from(values.end).ok()?);
        let can_be_cut = |end: usize| end == *elements || (end < *elements && end.is_multiple_of(codec.block_values()));
        (start < end && can_be_cut(start) && can_be_cut(end)).then(|| codec.encoded_range(start..end, *elements))
    }

    /// As [`FragmentCodec::check`] for a [slice](FragmentCodec::slice) of `values` values.
    ///
    /// # Errors
    /// As there.
    pub fn check_slice(&self, slice: &[u8], values: usize) -> Result<(), DecodeError> {
        match &self.0 {
            Kind::Values { codec, .. } => codec.check(slice, values),
            Kind::LowRank(codec) => codec.check(slice),
        }
    }

    /// Whether some encoder can have written these bytes: a delta is looked at before anybody is told that it is held.
    ///
    /// # Errors
    /// What is wrong with it, a number that is not finite above all.
    pub fn check(&self, delta: &[u8]) -> Result<(), DecodeError> {
        match &self.0 {
            Kind::Values { codec, elements } => codec.check(delta, *elements),
            Kind::LowRank(codec) => codec.check(delta),
        }
    }

    /// The sum of the squares of the `values` decoded values, of a whole delta or of a [slice](FragmentCodec::slice): the same bits for the same
    /// bytes on every machine. Where the codec is of low rank, an upper bound within 1e-4.
    ///
    /// # Errors
    /// As [`FragmentCodec::check`].
    pub fn squared_norm(&self, delta: &[u8], values: usize) -> Result<f64, DecodeError> {
        match &self.0 {
            Kind::Values { codec, .. } => codec.squared_norm(delta, values),
            Kind::LowRank(codec) => codec.squared_norm(delta),
        }
    }

    /// `sum += weight * decoded`, in f32 with separate roundings. Of a [slice](FragmentCodec::slice) too: `sum` has then as many values, and
    /// gets the bits that these have in the whole.
    ///
    /// # Errors
    /// As [`FragmentCodec::check`]; then nothing has changed.
    pub fn accumulate(&self, delta: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        match &self.0 {
            Kind::Values { codec, .. } => codec.accumulate(delta, weight, sum),
            Kind::LowRank(codec) => codec.accumulate(delta, weight, sum),
        }
    }

    /// As [`FragmentCodec::accumulate`] for one of the [`FragmentCodec::parts`], from the whole encoding. For encodings that were checked.
    ///
    /// # Errors
    /// As there, for that part.
    pub fn accumulate_part(&self, index: usize, delta: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        match &self.0 {
            Kind::Values { codec, elements } => {
                let start = index * PART_VALUES;
                let place = codec.encoded_range(start..start + sum.len(), *elements);
                codec.accumulate(&delta[place], weight, sum)
            }
            Kind::LowRank(codec) => codec.accumulate_matrix(index, delta, weight, sum),
        }
    }
}

/// Matrices that multiply the same input, as the Llama family names them: what they learn from it lies in the same directions, so that
/// one right factor serves them all.
const SAME_INPUT: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];

/// Shapes of the fragment's parameters, in its order: matrices by their first dimension, all else as one row. Neighbours that multiply the
/// same input are one matrix, its rows one after another.
pub(crate) fn shapes(schema: &ParameterSchema, fragment: &Fragment) -> Vec<MatrixShape> {
    let mut shapes: Vec<MatrixShape> = Vec::new();
    let mut last: Option<&ParameterSpec> = None;
    for range in &fragment.ranges {
        let is_in = |parameter: &&ParameterSpec| range.contains(&parameter.range.start);
        for parameter in schema.parameters().iter().filter(is_in) {
            let shape = shape(parameter);
            match (last, shapes.last_mut()) {
                (Some(before), Some(stack)) if share_input(before, parameter) && stack.columns == shape.columns => {
                    stack.rows += shape.rows;
                }
                _ => shapes.push(shape),
            }
            last = Some(parameter);
        }
    }
    shapes
}

fn shape(parameter: &ParameterSpec) -> MatrixShape {
    match parameter.shape[..] {
        [rows, ref rest @ ..] if !rest.is_empty() => MatrixShape { rows, columns: rest.iter().product() },
        _ => MatrixShape { rows: 1, columns: parameter.range.len() },
    }
}

/// Whether both are weights of one layer that multiply its same input, the second right after the first.
fn share_input(first: &ParameterSpec, second: &ParameterSpec) -> bool {
    // model.layers.3.self_attn.q_proj.weight: the module it is in, and its own name.
    let places = [first, second].map(|parameter| parameter.name.strip_suffix(".weight")?.rsplit_once('.'));
    let [Some((layer, name)), Some((other_layer, other_name))] = places else { return false };
    first.range.end == second.range.start
        && layer == other_layer
        && SAME_INPUT.iter().any(|names| names.contains(&name) && names.contains(&other_name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows_and_columns(tensors: &[(&str, &[usize])]) -> Vec<(usize, usize)> {
        let named = tensors.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec()));
        let schema = ParameterSchema::new(named);
        shapes(&schema, &schema.whole()).into_iter().map(|shape| (shape.rows, shape.columns)).collect()
    }

    #[test]
    fn what_multiplies_the_same_input_is_one_matrix() {
        let found = rows_and_columns(&[
            ("model.layers.0.self_attn.q_proj.weight", &[8, 4]),
            ("model.layers.0.self_attn.k_proj.weight", &[2, 4]),
            ("model.layers.0.self_attn.v_proj.weight", &[2, 4]),
            ("model.layers.0.self_attn.o_proj.weight", &[4, 4]),
            ("model.layers.0.mlp.gate_proj.weight", &[6, 4]),
            ("model.layers.0.mlp.up_proj.weight", &[6, 4]),
            ("model.layers.0.mlp.down_proj.weight", &[4, 6]),
            ("model.layers.0.input_layernorm.weight", &[4]),
            ("transformer.h.0.attn.c_attn.weight", &[4, 2, 3]),
        ]);
        assert_eq!(found, [(12, 4), (4, 4), (12, 4), (4, 6), (1, 4), (4, 6)]);
    }

    #[test]
    fn another_layer_or_width_is_another_matrix() {
        let apart: [(&str, &[usize]); 2] = [("a.q_proj.weight", &[8, 4]), ("b.k_proj.weight", &[8, 4])];
        assert_eq!(rows_and_columns(&apart), [(8, 4), (8, 4)]);
        let wider: [(&str, &[usize]); 2] = [("a.q_proj.weight", &[8, 4]), ("a.k_proj.weight", &[4, 8])];
        assert_eq!(rows_and_columns(&wider), [(8, 4), (4, 8)]);
    }
}
