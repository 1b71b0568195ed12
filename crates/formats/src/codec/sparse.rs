//! The 64 largest magnitudes of each 4,096 values, as SparseLoCo (arXiv 2508.15706) sends them: 12-bit indices, 2-bit values.
//!
//! ```text
//! bytes    4,096 values   n < 4,096 values, k = ceil(n / 64)
//! 0..2     low level      the same                            bf16, little endian
//! 2..4     high level     the same                            bf16, little endian
//! 4..100   64 indices     ceil(12 k / 8) bytes                ascending, 12 bits each, the first in the lowest bits
//! 100..116 64 codes       ceil(2 k / 8) bytes                 bit 0: high level; bit 1: negative
//! ```
//!
//! Everything else decodes to 0 and stays in the residual, which the caller's error feedback brings back.

use super::levels::{Levels, level_value, levels_of};
use super::select::{BLOCK_VALUES, Candidates, KEPT_MAX, select};
use super::{Codec, CodecKind, DecodeError, assert_length, check_length};
use crate::isa::{Isa, vectorised};

/// One value is kept of this many.
const VALUES_PER_KEPT: usize = BLOCK_VALUES / KEPT_MAX;

const LEVEL_BYTES: usize = 4;
const BLOCK_BYTES: usize = LEVEL_BYTES + KEPT_MAX * 12 / 8 + KEPT_MAX * 2 / 8;
const _: () = assert!(BLOCK_BYTES == 116);

const HIGH: u8 = 1;
const NEGATIVE: u8 = 2;

const BF16_NAN: u16 = 0x7fc0;
const BF16_INFINITY: u16 = 0x7f80;
const F32_INFINITY: u32 = 0x7f80_0000;

#[derive(Debug)]
pub(super) struct SparseCodec;

/// What a block keeps: the first `kept` entries count.
struct Entries {
    kept: usize,
    indices: [u16; KEPT_MAX],
    codes: [u8; KEPT_MAX],
    /// By code: low, high, -low, -high.
    values: [f32; 4],
}

impl Codec for SparseCodec {
    fn kind(&self) -> CodecKind {
        CodecKind::Sparse
    }

    fn encoded_bytes(&self, values: usize) -> usize {
        let rest = values % BLOCK_VALUES;
        values / BLOCK_VALUES * BLOCK_BYTES + if rest == 0 { 0 } else { block_bytes(rest) }
    }

    fn block_values(&self) -> usize {
        BLOCK_VALUES
    }

    fn encode(&self, values: &mut [f32], encoded: &mut [u8]) {
        assert_length(self, values, encoded);
        encode_blocks(Isa::best(), values, encoded);
    }

    fn check(&self, encoded: &[u8], values: usize) -> Result<(), DecodeError> {
        check_length(self, encoded, values)?;
        check_blocks(Isa::best(), encoded, values)
    }

    fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, values.len())?;
        values.fill(0.0);
        for_each_block(Isa::best(), encoded, values, None);
        Ok(())
    }

    fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, sum.len())?;
        for_each_block(Isa::best(), encoded, sum, Some(weight));
        Ok(())
    }
}

/// Entries of a block of `values`.
fn kept_of(values: usize) -> usize {
    values.div_ceil(VALUES_PER_KEPT)
}

fn block_bytes(values: usize) -> usize {
    let kept = kept_of(values);
    LEVEL_BYTES + index_bytes(kept) + kept.div_ceil(4)
}

#[inline(always)]
fn index_bytes(kept: usize) -> usize {
    (kept * 3).div_ceil(2)
}

vectorised! {
    fn encode_blocks(values: &mut [f32], encoded: &mut [u8]) {
        let mut candidates = Candidates::new();
        let (blocks, rest) = values.as_chunks_mut::<BLOCK_VALUES>();
        let (encoded_blocks, encoded_rest) = encoded.split_at_mut(blocks.len() * BLOCK_BYTES);
        for (block, encoded) in blocks.iter_mut().zip(encoded_blocks.chunks_exact_mut(BLOCK_BYTES)) {
            encode_block(block, KEPT_MAX, &mut candidates, encoded);
        }
        if !rest.is_empty() {
            // Zeros behind the values are never taken: there are enough values, and of equal ones the first are.
            let mut block = [0.0; BLOCK_VALUES];
            block[..rest.len()].copy_from_slice(rest);
            encode_block(&mut block, kept_of(rest.len()), &mut candidates, encoded_rest);
            rest.copy_from_slice(&block[..rest.len()]);
        }
    }
}

#[inline(always)]
fn encode_block(values: &mut [f32; BLOCK_VALUES], kept: usize, candidates: &mut Candidates, encoded: &mut [u8]) {
    let mut indices = [0; KEPT_MAX];
    let largest = select(values, kept, candidates, &mut indices);
    let mut magnitudes = [0.0; KEPT_MAX];
    for (magnitude, index) in magnitudes.iter_mut().zip(&indices).take(kept) {
        *magnitude = values[usize::from(*index) % BLOCK_VALUES].abs();
    }
    let levels = if largest < F32_INFINITY {
        levels_of(&magnitudes, kept)
    } else {
        Levels { low: BF16_NAN, high: BF16_NAN, boundary: 0.0 }
    };
    let decoded = values_of(levels.low, levels.high);
    let mut codes = [0; KEPT_MAX];
    for ((code, index), magnitude) in codes.iter_mut().zip(&indices).zip(&magnitudes).take(kept) {
        let value = &mut values[usize::from(*index) % BLOCK_VALUES];
        let is_high = *magnitude > levels.boundary;
        *code = if is_high { HIGH } else { 0 } | if value.is_sign_negative() { NEGATIVE } else { 0 };
        *value -= decoded[usize::from(*code) % 4];
    }
    write_block(&levels, &indices, &codes, kept, encoded);
}

#[inline(always)]
fn values_of(low: u16, high: u16) -> [f32; 4] {
    let (low, high) = (level_value(low), level_value(high));
    [low, high, -low, -high]
}

#[inline(always)]
fn write_block(levels: &Levels, indices: &[u16; KEPT_MAX], codes: &[u8; KEPT_MAX], kept: usize, encoded: &mut [u8]) {
    encoded[..2].copy_from_slice(&levels.low.to_le_bytes());
    encoded[2..4].copy_from_slice(&levels.high.to_le_bytes());
    let (packed_indices, packed_codes) = encoded[LEVEL_BYTES..].split_at_mut(index_bytes(kept));
    // Entries behind the kept ones are zero, and so are the bits that they leave.
    for (bytes, pair) in packed_indices.chunks_mut(3).zip(indices.as_chunks::<2>().0) {
        let word = u32::from(pair[0]) | u32::from(pair[1]) << 12;
        bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
    }
    for (byte, four) in packed_codes.iter_mut().zip(codes.as_chunks::<4>().0) {
        *byte = four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6;
    }
}

#[inline(always)]
fn read_block(encoded: &[u8], kept: usize) -> Entries {
    let mut entries = Entries { kept, indices: [0; KEPT_MAX], codes: [0; KEPT_MAX], values: [0.0; 4] };
    entries.values =
        values_of(u16::from_le_bytes([encoded[0], encoded[1]]), u16::from_le_bytes([encoded[2], encoded[3]]));
    let (packed_indices, packed_codes) = encoded[LEVEL_BYTES..].split_at(index_bytes(kept));
    let (triples, last) = packed_indices.as_chunks::<3>();
    let mut pairs = entries.indices.as_chunks_mut::<2>().0.iter_mut();
    for (pair, bytes) in pairs.by_ref().zip(triples) {
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
        *pair = [(word & 0xfff) as u16, (word >> 12) as u16];
    }
    if let (Some(pair), &[low, high]) = (entries.indices.as_chunks_mut::<2>().0.get_mut(triples.len()), last) {
        pair[0] = u16::from_le_bytes([low, high]);
    }
    for (four, byte) in entries.codes.as_chunks_mut::<4>().0.iter_mut().zip(packed_codes) {
        *four = [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6];
    }
    entries
}

vectorised! {
    fn check_blocks(encoded: &[u8], values: usize) -> Result<(), DecodeError> {
        let mut value = 0;
        for block in encoded.chunks(BLOCK_BYTES) {
            check_block(block, value, BLOCK_VALUES.min(values - value))?;
            value += BLOCK_VALUES;
        }
        Ok(())
    }
}

#[inline(always)]
fn check_block(encoded: &[u8], value: usize, values: usize) -> Result<(), DecodeError> {
    let codec = CodecKind::Sparse;
    let malformed = |what| Err(DecodeError::Malformed { codec, value, what });
    let [low, high] = [[encoded[0], encoded[1]], [encoded[2], encoded[3]]].map(u16::from_le_bytes);
    if [low, high].iter().any(|level| level & BF16_INFINITY == BF16_INFINITY) {
        return Err(DecodeError::NotFinite { codec, value });
    }
    // A set sign bit makes a level larger than any that has none.
    if low > high || high > BF16_INFINITY {
        return malformed("levels that are negative or not in order");
    }
    let entries = read_block(encoded, kept_of(values));
    let indices = &entries.indices[..entries.kept];
    if !indices.iter().zip(&indices[1..]).fold(true, |ascending, (index, next)| ascending & (index < next)) {
        return malformed("indices that do not ascend");
    }
    if indices.last().is_some_and(|last| usize::from(*last) >= values) {
        return malformed("an index beyond the block");
    }
    if entries.codes[entries.kept..].iter().any(|code| *code != 0) {
        return malformed("bits after the last value");
    }
    Ok(())
}

vectorised! {
    /// Adds `weight * value` at each entry, or, without a weight, sets the value. `encoded` has been checked.
    fn for_each_block(encoded: &[u8], values: &mut [f32], weight: Option<f32>) {
        for (encoded, values) in encoded.chunks(BLOCK_BYTES).zip(values.chunks_mut(BLOCK_VALUES)) {
            let entries = read_block(encoded, kept_of(values.len()));
            let weighted = entries.values.map(|value| weight.map_or(value, |weight| weight * value));
            for (index, code) in entries.indices.iter().zip(&entries.codes).take(entries.kept) {
                let value = &mut values[usize::from(*index)];
                let decoded = weighted[usize::from(*code) % 4];
                *value = if weight.is_some() { *value + decoded } else { decoded };
            }
        }
    }
}
