//! A peer's delta: bytes of the announced length and hash, which may still be nothing that an encoder has written.

use crate::memory::Bound;
use base::config::Codec as ConfiguredCodec;
use base::{ModelShape, ParameterSchema};
use formats::lowrank::{LowRank, MatrixShape};
use formats::{Codec, CodecKind, DecodeError};
use rounds::{FragmentCodec, FragmentPlan};

/// The smallest encodings give 35 values a byte, of four bytes each, and three such lists are held at once.
const DECODING: Bound = Bound { base_bytes: 1 << 20, per_byte: 3 * 4 * 40 };

/// Any weight that is no power of two: its products are rounded.
const WEIGHT: f32 = 0.3;

/// Codecs with a code for each value.
const OF_BLOCKS: [CodecKind; 5] = [CodecKind::F32, CodecKind::Bf16, CodecKind::Int8, CodecKind::Mxfp4, CodecKind::E3m0];

/// A delta in a codec that has a code for each value.
pub fn block_codecs(bytes: &[u8]) {
    values_codec(bytes, &OF_BLOCKS);
}

/// A delta of which only the largest values travel.
pub fn sparse_codecs(bytes: &[u8]) {
    values_codec(bytes, &[CodecKind::Sparse, CodecKind::Sparse96]);
}

/// The first byte chooses the codec; as many values are read as the rest has bytes for.
fn values_codec(bytes: &[u8], kinds: &[CodecKind]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let codec = kinds[usize::from(*first) % kinds.len()].codec();
    let values = values_in(codec, rest.len());
    let encoded = &rest[..codec.encoded_bytes(values)];
    DECODING.check(bytes.len(), || {
        agree(
            values,
            codec.check(encoded, values),
            |decoded| codec.decode(encoded, decoded),
            |sum| codec.accumulate(encoded, WEIGHT, sum),
        );
    });
    if codec.check(encoded, values).is_ok() {
        parts_are_whole(codec, encoded, values);
        encodes_again(codec, encoded, values);
    }
    assert!(codec.check(encoded, values + 1).is_err() || codec.encoded_bytes(values + 1) == encoded.len());
}

/// The most values that fit.
fn values_in(codec: &dyn Codec, bytes: usize) -> usize {
    let (mut fits, mut too_many) = (0, 64 * bytes + 4_097);
    while too_many - fits > 1 {
        let middle = fits.midpoint(too_many);
        if codec.encoded_bytes(middle) <= bytes { fits = middle } else { too_many = middle }
    }
    fits
}

/// The three ways to read an encoding accept the same, leave all as it was where they do not, and give the same finite numbers.
fn agree(
    values: usize,
    checked: Result<(), DecodeError>,
    decode: impl FnOnce(&mut [f32]) -> Result<(), DecodeError>,
    accumulate: impl FnOnce(&mut [f32]) -> Result<(), DecodeError>,
) {
    let (mut decoded, mut sum) = (vec![7.0; values], vec![1.0; values]);
    let outcomes = (decode(&mut decoded), accumulate(&mut sum));
    assert_eq!(outcomes, (checked.clone(), checked.clone()));
    if checked.is_err() {
        assert!(decoded.iter().all(|value| *value == 7.0) && sum.iter().all(|value| *value == 1.0));
        return;
    }
    for (value, sum) in decoded.iter().zip(&sum) {
        assert!(value.is_finite(), "{value} was decoded");
        assert_eq!((1.0 + WEIGHT * value).to_bits(), sum.to_bits(), "of {value}");
    }
}

/// A cut between blocks gives two encodings.
fn parts_are_whole(codec: &dyn Codec, encoded: &[u8], values: usize) {
    let cut = values / codec.block_values() / 2 * codec.block_values();
    for part in [0..cut, cut..values] {
        let place = codec.encoded_range(part.clone(), values);
        codec.check(&encoded[place], part.len()).expect("a part of an encoding is one");
    }
}

/// What is read can be coded again, to something that can be read; where nothing is rounded, to the same bytes.
fn encodes_again(codec: &dyn Codec, encoded: &[u8], values: usize) {
    let mut decoded = vec![0.0; values];
    codec.decode(encoded, &mut decoded).expect("it was checked");
    let mut again = vec![0; encoded.len()];
    codec.encode(&mut decoded, &mut again);
    codec.check(&again, values).expect("what an encoder writes can be read");
    if matches!(codec.kind(), CodecKind::F32 | CodecKind::Bf16) {
        assert_eq!(again, encoded);
    }
}

/// Matrices of shapes that are no multiples of anything.
const SHAPES: [MatrixShape; 4] = [
    MatrixShape { rows: 24, columns: 40 },
    MatrixShape { rows: 1, columns: 33 },
    MatrixShape { rows: 67, columns: 19 },
    MatrixShape { rows: 64, columns: 64 },
];

/// `bytes` as an encoding of that length.
fn of_length(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut encoded = bytes.to_vec();
    encoded.resize(length, 0);
    encoded
}

/// A delta as factors.
pub fn low_rank(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let codec = LowRank::new(&SHAPES, 1 + usize::from(first % 4));
    let encoded = of_length(rest, codec.encoded_bytes());
    let values = SHAPES.iter().map(|shape| shape.values()).sum();
    let bound = Bound { base_bytes: 1 << 20, per_byte: 0 };
    bound.check(bytes.len(), || {
        agree(
            values,
            codec.check(&encoded),
            |decoded| codec.decode(&encoded, decoded),
            |sum| codec.accumulate(&encoded, WEIGHT, sum),
        );
    });
}

/// The example that encodings of fragments are made for.
pub(crate) fn schema() -> ParameterSchema {
    ParameterSchema::llama(&shape())
}

pub(crate) fn shape() -> ModelShape {
    ModelShape {
        vocab_size: 32,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        max_position_embeddings: 64,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    }
}

/// Every way in which a fragment's delta can travel.
pub(crate) const CODECS: [ConfiguredCodec; 8] = [
    ConfiguredCodec::F32,
    ConfiguredCodec::Bf16,
    ConfiguredCodec::Int8,
    ConfiguredCodec::Mxfp4,
    ConfiguredCodec::E3m0,
    ConfiguredCodec::LowRank,
    ConfiguredCodec::Sparse96,
    ConfiguredCodec::Sparse,
];

/// The codec that a fuzz input's first byte chooses, and the values of its fragment.
pub(crate) fn fragment_codec(first: u8) -> (FragmentCodec, usize) {
    let schema = schema();
    let (codec, count) = (CODECS[usize::from(first) % CODECS.len()], 1 + u32::from(first >> 3) % 3);
    let fragments = schema.fragments(count);
    let plan = FragmentPlan { index: 0, count: fragments.len() as u32, codec, rank: 2 };
    (FragmentCodec::new(plan, 2, &schema, &fragments[0]), fragments[0].elements())
}

/// A delta as a site takes it: what is not refused can be added to a sum, as a whole, in parts and in slices.
pub fn fragment_delta(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let (codec, values) = fragment_codec(*first);
    let delta = of_length(rest, codec.encoded_bytes());
    let mut sum = vec![1.0; values];
    let checked = codec.check(&delta);
    assert_eq!(codec.accumulate(&delta, WEIGHT, &mut sum), checked);
    if checked.is_err() {
        return;
    }
    assert!(sum.iter().all(|value| value.is_finite()));
    let mut by_parts = vec![1.0; values];
    for (index, part) in codec.parts().into_iter().enumerate() {
        codec.accumulate_part(index, &delta, WEIGHT, &mut by_parts[part]).expect("the whole was checked");
    }
    assert!(sum.iter().zip(&by_parts).all(|(one, other)| one.to_bits() == other.to_bits()));
    let half = codec.block_values().map(|block| values / block / 2 * block).filter(|half| *half > 0);
    if let Some(place) = half.and_then(|half| codec.slice(&(0..half as u64))) {
        codec.check_slice(&delta[place], half.unwrap_or(0)).expect("a slice of a delta is one");
    }
}
