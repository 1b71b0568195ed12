//! f32 and bf16: one value, one code, no scale.
//!
//! bf16 saturates: a finite value never becomes infinite, so that whatever is refused was not finite at its sender.

use super::{Codec, CodecKind, DecodeError, assert_length, check_length};
use crate::element::{Bf16, Element, decode_code, nearest_magnitude};
use crate::isa::{Isa, vectorised};

/// All exponent bits of an f32 are ones in infinity and NaN, and in nothing else.
const F32_EXPONENT: u32 = 0x7f80_0000;
const BF16_EXPONENT: u16 = 0x7f80;

/// Values that are checked at once: a block of this many tells which part of a fragment is wrong, in one cache's size.
const CHECKED_VALUES: usize = 4_096;

/// Partial sums of squares, so that a compiler may use vectors.
const NORM_LANES: usize = 16;

#[derive(Debug)]
pub(super) struct F32Codec;

#[derive(Debug)]
pub(super) struct Bf16Codec;

impl Codec for F32Codec {
    fn kind(&self) -> CodecKind {
        CodecKind::F32
    }

    fn encoded_bytes(&self, values: usize) -> usize {
        values * 4
    }

    fn block_values(&self) -> usize {
        1
    }

    fn encode(&self, values: &mut [f32], encoded: &mut [u8]) {
        assert_length(self, values, encoded);
        for (bytes, value) in encoded.as_chunks_mut().0.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
            *value = 0.0;
        }
    }

    fn check(&self, encoded: &[u8], values: usize) -> Result<(), DecodeError> {
        check_length(self, encoded, values)?;
        for (index, part) in encoded.chunks(CHECKED_VALUES * 4).enumerate() {
            if !all_finite_f32(Isa::best(), part) {
                return Err(DecodeError::NotFinite { codec: self.kind(), value: index * CHECKED_VALUES });
            }
        }
        Ok(())
    }

    fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, values.len())?;
        for (value, bytes) in values.iter_mut().zip(encoded.as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }

    fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, sum.len())?;
        for (sum, bytes) in sum.iter_mut().zip(encoded.as_chunks().0) {
            *sum += weight * f32::from_le_bytes(*bytes);
        }
        Ok(())
    }

    fn squared_norm(&self, encoded: &[u8], values: usize) -> Result<f64, DecodeError> {
        check_length(self, encoded, values)?;
        finite_norm(self, squares_f32(Isa::best(), encoded), encoded, values)
    }
}

impl Codec for Bf16Codec {
    fn kind(&self) -> CodecKind {
        CodecKind::Bf16
    }

    fn encoded_bytes(&self, values: usize) -> usize {
        values * 2
    }

    fn block_values(&self) -> usize {
        1
    }

    fn encode(&self, values: &mut [f32], encoded: &mut [u8]) {
        assert_length(self, values, encoded);
        encode_bf16(Isa::best(), values, encoded);
    }

    fn check(&self, encoded: &[u8], values: usize) -> Result<(), DecodeError> {
        check_length(self, encoded, values)?;
        for (index, part) in encoded.chunks(CHECKED_VALUES * 2).enumerate() {
            if !all_finite_bf16(Isa::best(), part) {
                return Err(DecodeError::NotFinite { codec: self.kind(), value: index * CHECKED_VALUES });
            }
        }
        Ok(())
    }

    fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, values.len())?;
        decode_bf16(Isa::best(), encoded, values);
        Ok(())
    }

    fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, sum.len())?;
        accumulate_bf16(Isa::best(), encoded, weight, sum);
        Ok(())
    }

    fn squared_norm(&self, encoded: &[u8], values: usize) -> Result<f64, DecodeError> {
        check_length(self, encoded, values)?;
        finite_norm(self, squares_bf16(Isa::best(), encoded), encoded, values)
    }
}

/// A sum of squares of f32 is finite in f64 where all of them are, for up to 2^768 values: else the check says which is not.
fn finite_norm(codec: &dyn Codec, squares: f64, encoded: &[u8], values: usize) -> Result<f64, DecodeError> {
    if !squares.is_finite() {
        codec.check(encoded, values)?;
    }
    Ok(squares)
}

/// The sum of the squares of what `decode` makes of the codes.
#[inline(always)]
fn squares<const BYTES: usize>(codes: &[[u8; BYTES]], decode: impl Fn([u8; BYTES]) -> f32) -> f64 {
    let mut lanes = [0.0_f64; NORM_LANES];
    let (chunks, rest) = codes.as_chunks::<NORM_LANES>();
    for chunk in chunks {
        for (lane, code) in lanes.iter_mut().zip(chunk) {
            let value = f64::from(decode(*code));
            *lane += value * value;
        }
    }
    for (lane, code) in lanes.iter_mut().zip(rest) {
        let value = f64::from(decode(*code));
        *lane += value * value;
    }
    lanes.iter().sum()
}

vectorised! {
    fn squares_f32(encoded: &[u8]) -> f64 {
        squares(encoded.as_chunks::<4>().0, f32::from_le_bytes)
    }
}

vectorised! {
    fn squares_bf16(encoded: &[u8]) -> f64 {
        squares(encoded.as_chunks::<2>().0, |bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))
    }
}

/// Whether no value is infinite or not a number.
pub fn all_finite(values: &[f32]) -> bool {
    all_finite_values(Isa::best(), values)
}

vectorised! {
    fn all_finite_values(values: &[f32]) -> bool {
        let mut found = false;
        for value in values {
            found |= value.to_bits() & F32_EXPONENT == F32_EXPONENT;
        }
        !found
    }
}

vectorised! {
    fn all_finite_f32(encoded: &[u8]) -> bool {
        let mut found = false;
        for bytes in encoded.as_chunks().0 {
            found |= u32::from_le_bytes(*bytes) & F32_EXPONENT == F32_EXPONENT;
        }
        !found
    }
}

vectorised! {
    fn all_finite_bf16(encoded: &[u8]) -> bool {
        let mut found = false;
        for bytes in encoded.as_chunks().0 {
            found |= u16::from_le_bytes(*bytes) & BF16_EXPONENT == BF16_EXPONENT;
        }
        !found
    }
}

vectorised! {
    fn encode_bf16(values: &mut [f32], encoded: &mut [u8]) {
        for (bytes, value) in encoded.as_chunks_mut().0.iter_mut().zip(values) {
            let bits = value.to_bits();
            let magnitude = bits & 0x7fff_ffff;
            let rounded = nearest_magnitude::<Bf16>(magnitude);
            let finite = if rounded > Bf16::MAGNITUDE_MAX { Bf16::MAGNITUDE_MAX } else { rounded };
            let code = if magnitude < F32_EXPONENT { finite } else { u32::from(BF16_EXPONENT) } | bits >> 31 << 15;
            *bytes = (code as u16).to_le_bytes();
            *value -= decode_code::<Bf16>(code);
        }
    }
}

vectorised! {
    fn decode_bf16(encoded: &[u8], values: &mut [f32]) {
        for (value, bytes) in values.iter_mut().zip(encoded.as_chunks().0) {
            *value = decode_code::<Bf16>(u16::from_le_bytes(*bytes).into());
        }
    }
}

vectorised! {
    fn accumulate_bf16(encoded: &[u8], weight: f32, sum: &mut [f32]) {
        for (sum, bytes) in sum.iter_mut().zip(encoded.as_chunks().0) {
            *sum += weight * decode_code::<Bf16>(u16::from_le_bytes(*bytes).into());
        }
    }
}
