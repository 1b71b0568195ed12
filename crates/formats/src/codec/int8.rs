//! int8 in blocks of 128, each with a bf16 scale: `[scale][128 codes]`, the scale little endian.
//!
//! `scale = amax / 127` rounded up to bf16, so that no code exceeds 127; `code = round(value * (1 / scale))` to nearest
//! even; `decoded = code * scale`. Why bf16 and 128: with f32 scales the same bits buy blocks of 256, whose largest values
//! are larger; the error on Gaussian values is then a sixth more.

use super::{Codec, CodecKind, DecodeError, assert_length, check_length};
use crate::element::{INT8_MAX, magnitude_bits, nearest_int8};
use crate::isa::{Isa, vectorised};

const BLOCK_VALUES: usize = 128;
const SCALE_BYTES: usize = 2;
const BLOCK_BYTES: usize = SCALE_BYTES + BLOCK_VALUES;

/// bf16 of 2^-100: the least scale. Smaller values are coded as 0 and stay in the residual, and 1/scale is a normal number.
const SCALE_MIN: u16 = (127 - 100) << 7;

/// bf16 of f32::MAX / 127, rounded up: the largest scale.
const SCALE_MAX: u16 = scale_of(f32::MAX.to_bits());

const BF16_NAN: u16 = 0x7fc0;
const F32_INFINITY: u32 = 0x7f80_0000;

#[derive(Debug)]
pub(super) struct Int8Codec;

/// bf16 bits of the scale of a block whose largest magnitude has the bits `largest`.
#[inline(always)]
const fn scale_of(largest: u32) -> u16 {
    let exact = (f32::from_bits(largest) / INT8_MAX).to_bits();
    let rounded_up = ((exact + 0xffff) >> 16) as u16;
    let bounded = if rounded_up < SCALE_MIN { SCALE_MIN } else { rounded_up };
    if largest < F32_INFINITY { bounded } else { BF16_NAN }
}

#[inline(always)]
fn scale_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[inline(always)]
fn split(block: &[u8]) -> (f32, &[u8]) {
    let (scale, codes) = block.split_at(SCALE_BYTES);
    (scale_value(u16::from_le_bytes([scale[0], scale[1]])), codes)
}

impl Codec for Int8Codec {
    fn kind(&self) -> CodecKind {
        CodecKind::Int8
    }

    fn encoded_bytes(&self, values: usize) -> usize {
        values + SCALE_BYTES * values.div_ceil(BLOCK_VALUES)
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
        check_blocks(Isa::best(), encoded)
    }

    fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, values.len())?;
        decode_blocks(Isa::best(), encoded, values);
        Ok(())
    }

    fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, sum.len())?;
        accumulate_blocks(Isa::best(), encoded, weight, sum);
        Ok(())
    }

    fn squared_norm(&self, encoded: &[u8], values: usize) -> Result<f64, DecodeError> {
        self.check(encoded, values)?;
        Ok(squares(Isa::best(), encoded))
    }
}

vectorised! {
    fn squares(encoded: &[u8]) -> f64 {
        let mut sum = 0.0;
        for block in encoded.chunks(BLOCK_BYTES) {
            let (scale, codes) = split(block);
            // At most 128 * 127^2.
            let mut squares = 0_i32;
            for code in codes {
                let code = i32::from(*code as i8);
                squares += code * code;
            }
            sum += f64::from(squares) * (f64::from(scale) * f64::from(scale));
        }
        sum
    }
}

#[inline(always)]
fn encode_block(values: &mut [f32], encoded: &mut [u8]) {
    let largest = values.iter().fold(0, |largest, value| magnitude_bits(*value).max(largest));
    let scale_bits = scale_of(largest);
    let (scale_bytes, codes) = encoded.split_at_mut(SCALE_BYTES);
    scale_bytes.copy_from_slice(&scale_bits.to_le_bytes());
    let scale = scale_value(scale_bits);
    let inverse = 1.0 / scale;
    for (code, value) in codes.iter_mut().zip(values) {
        let rounded = nearest_int8(*value * inverse);
        *code = rounded as u8;
        *value -= f32::from(rounded) * scale;
    }
}

vectorised! {
    fn encode_blocks(values: &mut [f32], encoded: &mut [u8]) {
        let (whole, rest) = values.as_chunks_mut::<BLOCK_VALUES>();
        let (encoded_whole, encoded_rest) = encoded.split_at_mut(whole.len() * BLOCK_BYTES);
        for (values, encoded) in whole.iter_mut().zip(encoded_whole.chunks_exact_mut(BLOCK_BYTES)) {
            encode_block(values, encoded);
        }
        if !rest.is_empty() {
            encode_block(rest, encoded_rest);
        }
    }
}

vectorised! {
    fn check_blocks(encoded: &[u8]) -> Result<(), DecodeError> {
        for (index, block) in encoded.chunks(BLOCK_BYTES).enumerate() {
            let codec = CodecKind::Int8;
            let value = index * BLOCK_VALUES;
            let (scale, codes) = block.split_at(SCALE_BYTES);
            let scale = u16::from_le_bytes([scale[0], scale[1]]);
            if !(SCALE_MIN..=SCALE_MAX).contains(&scale) {
                return Err(if scale & 0x7f80 == 0x7f80 {
                    DecodeError::NotFinite { codec, value }
                } else {
                    DecodeError::Malformed { codec, value, what: "a scale that no values have" }
                });
            }
            if codes.iter().fold(false, |found, code| found | (*code == i8::MIN as u8)) {
                return Err(DecodeError::Malformed { codec, value, what: "the code -128" });
            }
        }
        Ok(())
    }
}

vectorised! {
    fn decode_blocks(encoded: &[u8], values: &mut [f32]) {
        for (block, values) in encoded.chunks(BLOCK_BYTES).zip(values.chunks_mut(BLOCK_VALUES)) {
            let (scale, codes) = split(block);
            for (value, code) in values.iter_mut().zip(codes) {
                *value = f32::from(*code as i8) * scale;
            }
        }
    }
}

vectorised! {
    fn accumulate_blocks(encoded: &[u8], weight: f32, sum: &mut [f32]) {
        for (block, sum) in encoded.chunks(BLOCK_BYTES).zip(sum.chunks_mut(BLOCK_VALUES)) {
            let (scale, codes) = split(block);
            for (sum, code) in sum.iter_mut().zip(codes) {
                *sum += weight * (f32::from(*code as i8) * scale);
            }
        }
    }
}
