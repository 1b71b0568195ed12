//! How the deltas of one fragment are coded: the codecs of `run.toml` as `formats` has them, with the fragment's shapes.

use crate::plan::FragmentPlan;
use base::config::Codec;
use base::{Fragment, ParameterSchema};
use formats::lowrank::{Basis, LowRank, MatrixShape};
use formats::{CodecKind, DecodeError};

/// Where the encoder of a low-rank codec begins, at every site.
const BASIS_SEED: u64 = 1;

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

    /// Encodes `delta`, and leaves in it what that lost: `delta - decoded`.
    pub fn encode(&self, delta: &mut [f32], memory: &mut EncoderMemory) -> Vec<u8> {
        let mut encoded = vec![0; self.encoded_bytes()];
        match &self.0 {
            Kind::Values { codec, .. } => codec.encode(delta, &mut encoded),
            Kind::LowRank(codec) => {
                let basis = memory.0.get_or_insert_with(|| codec.basis(BASIS_SEED));
                codec.encode(delta, basis, &mut encoded);
            }
        }
        encoded
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

    /// `sum += weight * decoded`, in f32 with separate roundings.
    ///
    /// # Errors
    /// As [`FragmentCodec::check`]; then nothing has changed.
    pub fn accumulate(&self, delta: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        match &self.0 {
            Kind::Values { codec, .. } => codec.accumulate(delta, weight, sum),
            Kind::LowRank(codec) => codec.accumulate(delta, weight, sum),
        }
    }
}

/// Shapes of the fragment's parameters, in its order: matrices by their first dimension, all else as one row.
fn shapes(schema: &ParameterSchema, fragment: &Fragment) -> Vec<MatrixShape> {
    let is_in =
        |parameter: &&base::ParameterSpec| fragment.ranges.iter().any(|range| range.contains(&parameter.range.start));
    let shape = |parameter: &base::ParameterSpec| match parameter.shape[..] {
        [rows, ref rest @ ..] if !rest.is_empty() => MatrixShape { rows, columns: rest.iter().product() },
        _ => MatrixShape { rows: 1, columns: parameter.range.len() },
    };
    schema.parameters().iter().filter(is_in).map(shape).collect()
}
