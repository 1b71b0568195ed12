//! The largest magnitudes of each 4,096 values, each as a place, a sign and one of two levels.
//!
//! `sparse` keeps 64 with 12-bit indices, as SparseLoCo (arXiv 2508.15706) does; `sparse96` keeps 96 in the same 116 bytes,
//! by Elias-Fano indices ([`super::indices`]).
//!
//! ```text
//! bytes, sparse   bytes, sparse96   fewer than 4,096 values n, k kept of them
//! 0..2            0..2              the same            low level, bf16, little endian
//! 2..4            2..4              the same            high level, bf16, little endian
//! 4..100          4..92             as k and n ask      the indices, ascending
//! 100..116        92..116           ceil(2 k / 8)       codes of 2 bits: bit 0: high level; bit 1: negative
//! ```
//!
//! k = ceil(n / 64) and ceil(n * 96 / 4096). Everything else decodes to 0 and stays in the residual, which the caller's
//! error feedback brings back.

use super::indices::{elias_fano_bytes, plain_bytes, read_elias_fano, read_plain, write_elias_fano, write_plain};
use super::levels::{Levels, level_value, levels_of};
use super::select::{BLOCK_VALUES, Candidates, KEPT_MAX, select};
use super::{Codec, CodecKind, DecodeError, assert_length, check_length};
use crate::isa::{Isa, vectorised};
use std::fmt::Debug;
use std::marker::PhantomData;

pub(super) const SPARSE: SparseCodec<Plain64> = SparseCodec(PhantomData);
pub(super) const SPARSE96: SparseCodec<EliasFano96> = SparseCodec(PhantomData);

const LEVEL_BYTES: usize = 4;

/// Bytes of a full block, in either format.
const BLOCK_BYTES: usize = 116;
const _: () = assert!(BLOCK_BYTES == LEVEL_BYTES + plain_bytes(64) + 64 / 4);
const _: () = assert!(BLOCK_BYTES == LEVEL_BYTES + elias_fano_bytes(96, BLOCK_VALUES) + 96 / 4);

const HIGH: u8 = 1;
const NEGATIVE: u8 = 2;

const BF16_NAN: u16 = 0x7fc0;
const BF16_INFINITY: u16 = 0x7f80;
const F32_INFINITY: u32 = 0x7f80_0000;

/// How many entries a block has and how their indices are written.
pub(super) trait SparseFormat: Copy + Debug + Send + Sync + 'static {
    const KIND: CodecKind;
    /// Entries of a full block.
    const KEPT: usize;

    fn index_bytes(kept: usize, values: usize) -> usize;

    /// Indices behind the last kept one are 0.
    fn write_indices(indices: &[u16; KEPT_MAX], kept: usize, values: usize, bytes: &mut [u8]);

    /// Whether they could be read; they may still be in any order and too large.
    fn read_indices(bytes: &[u8], kept: usize, values: usize, indices: &mut [u16; KEPT_MAX]) -> bool;

    /// [`super::select::select`] with enough columns.
    fn select(
        values: &[f32; BLOCK_VALUES],
        kept: usize,
        candidates: &mut Candidates,
        indices: &mut [u16; KEPT_MAX],
    ) -> u32;
}

/// 64 of 4,096, 12 bits an index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plain64;

/// 96 of 4,096, Elias-Fano.
#[derive(Clone, Copy, Debug)]
pub(super) struct EliasFano96;

impl SparseFormat for Plain64 {
    const KIND: CodecKind = CodecKind::Sparse;
    const KEPT: usize = 64;

    #[inline(always)]
    fn index_bytes(kept: usize, _values: usize) -> usize {
        plain_bytes(kept)
    }

    #[inline(always)]
    fn write_indices(indices: &[u16; KEPT_MAX], _kept: usize, _values: usize, bytes: &mut [u8]) {
        write_plain(indices, bytes);
    }

    #[inline(always)]
    fn read_indices(bytes: &[u8], _kept: usize, _values: usize, indices: &mut [u16; KEPT_MAX]) -> bool {
        read_plain(bytes, indices);
        true
    }

    #[inline(always)]
    fn select(
        values: &[f32; BLOCK_VALUES],
        kept: usize,
        candidates: &mut Candidates,
        indices: &mut [u16; KEPT_MAX],
    ) -> u32 {
        select::<64>(values, kept, candidates, indices)
    }
}

impl SparseFormat for EliasFano96 {
    const KIND: CodecKind = CodecKind::Sparse96;
    const KEPT: usize = 96;

    #[inline(always)]
    fn index_bytes(kept: usize, values: usize) -> usize {
        elias_fano_bytes(kept, values)
    }

    #[inline(always)]
    fn write_indices(indices: &[u16; KEPT_MAX], kept: usize, values: usize, bytes: &mut [u8]) {
        write_elias_fano(indices, kept, values, bytes);
    }

    #[inline(always)]
    fn read_indices(bytes: &[u8], kept: usize, values: usize, indices: &mut [u16; KEPT_MAX]) -> bool {
        read_elias_fano(bytes, kept, values, indices)
    }

    #[inline(always)]
    fn select(
        values: &[f32; BLOCK_VALUES],
        kept: usize,
        candidates: &mut Candidates,
        indices: &mut [u16; KEPT_MAX],
    ) -> u32 {
        select::<128>(values, kept, candidates, indices)
    }
}

#[derive(Debug)]
pub(super) struct SparseCodec<S>(PhantomData<S>);

/// What a block keeps: the first `kept` entries count.
struct Entries {
    kept: usize,
    indices: [u16; KEPT_MAX],
    codes: [u8; KEPT_MAX],
    /// By code: low, high, -low, -high.
    values: [f32; 4],
}

impl<S: SparseFormat> Codec for SparseCodec<S> {
    fn kind(&self) -> CodecKind {
        S::KIND
    }

    fn encoded_bytes(&self, values: usize) -> usize {
        let rest = values % BLOCK_VALUES;
        values / BLOCK_VALUES * BLOCK_BYTES + if rest == 0 { 0 } else { block_bytes::<S>(rest) }
    }

    fn block_values(&self) -> usize {
        BLOCK_VALUES
    }

    fn encode(&self, values: &mut [f32], encoded: &mut [u8]) {
        assert_length(self, values, encoded);
        encode_blocks::<S>(Isa::best(), values, encoded);
    }

    fn check(&self, encoded: &[u8], values: usize) -> Result<(), DecodeError> {
        check_length(self, encoded, values)?;
        check_blocks::<S>(Isa::best(), encoded, values)
    }

    fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, values.len())?;
        values.fill(0.0);
        for_each_block::<S>(Isa::best(), encoded, values, None);
        Ok(())
    }

    fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, sum.len())?;
        for_each_block::<S>(Isa::best(), encoded, sum, Some(weight));
        Ok(())
    }

    fn squared_norm(&self, encoded: &[u8], values: usize) -> Result<f64, DecodeError> {
        self.check(encoded, values)?;
        let (mut sum, mut left) = (0.0, values);
        for block in encoded.chunks(BLOCK_BYTES) {
            sum += squares_of_block::<S>(block, left.min(BLOCK_VALUES));
            left = left.saturating_sub(BLOCK_VALUES);
        }
        Ok(sum)
    }
}

/// Of a block of `length` values: so many of either level. Which values these are does not matter, and behind the last code there are zeros.
fn squares_of_block<S: SparseFormat>(encoded: &[u8], length: usize) -> f64 {
    let kept = kept_of::<S>(length);
    let codes = &encoded[LEVEL_BYTES + S::index_bytes(kept, length)..];
    let high: u32 = codes.iter().map(|four| (four & 0x55).count_ones()).sum();
    let square = |bytes: [u8; 2]| {
        let level = f64::from(level_value(u16::from_le_bytes(bytes)));
        level * level
    };
    let [low_square, high_square] = [[encoded[0], encoded[1]], [encoded[2], encoded[3]]].map(square);
    (kept - high as usize) as f64 * low_square + f64::from(high) * high_square
}

/// Entries of a block of `values`.
#[inline(always)]
fn kept_of<S: SparseFormat>(values: usize) -> usize {
    (values * S::KEPT).div_ceil(BLOCK_VALUES)
}

fn block_bytes<S: SparseFormat>(values: usize) -> usize {
    let kept = kept_of::<S>(values);
    LEVEL_BYTES + S::index_bytes(kept, values) + kept.div_ceil(4)
}

vectorised! {
    fn encode_blocks<S: SparseFormat>(values: &mut [f32], encoded: &mut [u8]) {
        let mut candidates = Candidates::new();
        let (blocks, rest) = values.as_chunks_mut::<BLOCK_VALUES>();
        let (encoded_blocks, encoded_rest) = encoded.split_at_mut(blocks.len() * BLOCK_BYTES);
        for (block, encoded) in blocks.iter_mut().zip(encoded_blocks.chunks_exact_mut(BLOCK_BYTES)) {
            encode_block::<S>(block, BLOCK_VALUES, &mut candidates, encoded);
        }
        if !rest.is_empty() {
            // Zeros behind the values are never taken: there are enough values, and of equal ones the first are.
            let mut block = [0.0; BLOCK_VALUES];
            block[..rest.len()].copy_from_slice(rest);
            encode_block::<S>(&mut block, rest.len(), &mut candidates, encoded_rest);
            rest.copy_from_slice(&block[..rest.len()]);
        }
    }
}

/// Encodes the first `length` values of a block, behind which there are zeros.
#[inline(always)]
fn encode_block<S: SparseFormat>(
    values: &mut [f32; BLOCK_VALUES],
    length: usize,
    candidates: &mut Candidates,
    encoded: &mut [u8],
) {
    let kept = kept_of::<S>(length);
    let mut indices = [0; KEPT_MAX];
    let largest = S::select(values, kept, candidates, &mut indices);
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
    encoded[..2].copy_from_slice(&levels.low.to_le_bytes());
    encoded[2..4].copy_from_slice(&levels.high.to_le_bytes());
    let (index_bytes, code_bytes) = encoded[LEVEL_BYTES..].split_at_mut(S::index_bytes(kept, length));
    S::write_indices(&indices, kept, length, index_bytes);
    for (byte, four) in code_bytes.iter_mut().zip(codes.as_chunks::<4>().0) {
        *byte = four[0] | four[1] << 2 | four[2] << 4 | four[3] << 6;
    }
}

#[inline(always)]
fn values_of(low: u16, high: u16) -> [f32; 4] {
    let (low, high) = (level_value(low), level_value(high));
    [low, high, -low, -high]
}

/// The entries of a block of `length` values, or `None` where its indices cannot be read.
#[inline(always)]
fn read_block<S: SparseFormat>(encoded: &[u8], length: usize) -> Option<Entries> {
    let kept = kept_of::<S>(length);
    let [low, high] = [[encoded[0], encoded[1]], [encoded[2], encoded[3]]].map(u16::from_le_bytes);
    let mut entries = Entries { kept, indices: [0; KEPT_MAX], codes: [0; KEPT_MAX], values: values_of(low, high) };
    let (index_bytes, code_bytes) = encoded[LEVEL_BYTES..].split_at(S::index_bytes(kept, length));
    for (four, byte) in entries.codes.as_chunks_mut::<4>().0.iter_mut().zip(code_bytes) {
        *four = [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6];
    }
    S::read_indices(index_bytes, kept, length, &mut entries.indices).then_some(entries)
}

vectorised! {
    fn check_blocks<S: SparseFormat>(encoded: &[u8], values: usize) -> Result<(), DecodeError> {
        let mut value = 0;
        for block in encoded.chunks(BLOCK_BYTES) {
            check_block::<S>(block, value, BLOCK_VALUES.min(values - value))?;
            value += BLOCK_VALUES;
        }
        Ok(())
    }
}

#[inline(always)]
fn check_block<S: SparseFormat>(encoded: &[u8], value: usize, length: usize) -> Result<(), DecodeError> {
    let codec = S::KIND;
    let malformed = |what| Err(DecodeError::Malformed { codec, value, what });
    let [low, high] = [[encoded[0], encoded[1]], [encoded[2], encoded[3]]].map(u16::from_le_bytes);
    if [low, high].iter().any(|level| level & BF16_INFINITY == BF16_INFINITY) {
        return Err(DecodeError::NotFinite { codec, value });
    }
    // A set sign bit makes a level larger than any that has none.
    if low > high || high > BF16_INFINITY {
        return malformed("levels that are negative or not in order");
    }
    let Some(entries) = read_block::<S>(encoded, length) else {
        return malformed("more or fewer indices than there are entries");
    };
    let indices = &entries.indices[..entries.kept];
    if !indices.iter().zip(&indices[1..]).fold(true, |ascending, (index, next)| ascending & (index < next)) {
        return malformed("indices that do not ascend");
    }
    if indices.last().is_some_and(|last| usize::from(*last) >= length) {
        return malformed("an index beyond the block");
    }
    if entries.codes[entries.kept..].iter().any(|code| *code != 0) {
        return malformed("bits after the last value");
    }
    Ok(())
}

vectorised! {
    /// Adds `weight * value` at each entry, or, without a weight, sets the value. `encoded` has been checked.
    fn for_each_block<S: SparseFormat>(encoded: &[u8], values: &mut [f32], weight: Option<f32>) {
        for (encoded, values) in encoded.chunks(BLOCK_BYTES).zip(values.chunks_mut(BLOCK_VALUES)) {
            let Some(entries) = read_block::<S>(encoded, values.len()) else { continue };
            let weighted = entries.values.map(|value| weight.map_or(value, |weight| weight * value));
            for (index, code) in entries.indices.iter().zip(&entries.codes).take(entries.kept) {
                let value = &mut values[usize::from(*index)];
                let decoded = weighted[usize::from(*code) % 4];
                *value = if weight.is_some() { *value + decoded } else { decoded };
            }
        }
    }
}
