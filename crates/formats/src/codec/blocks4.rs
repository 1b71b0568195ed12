//! 4-bit codes in blocks with a power of two as scale: `[UE8M0 scale][codes, two a byte]`.
//!
//! With E the exponent of the block's largest magnitude and `emax` the format's (E2M1: 2, E3M0: 4), the scale is
//! 2^(E - emax), as OCP MX has it, or twice that where the largest magnitude is more than 1.75 * 2^E (E2M1) or
//! 1.5 * 2^E (E3M0): where it would be rounded up if the grid of codes went on, and is cut off otherwise. A decoder of OCP
//! MX reads either. On Gaussian values the error of MXFP4 is 5 % less than with the first rule alone; that of E3M0 is 7 %
//! less, and is the same in blocks of 32 and of 128, for its codes span six octaves.

use super::{Codec, CodecKind, DecodeError, assert_length, check_length};
use crate::bits::{pack4, unpack4};
use crate::element::{E2m1, E3m0, Element, decode_code, magnitude_bits, nearest_magnitude};
use crate::isa::{Isa, vectorised};
use crate::scale::{UE8M0_NAN, ue8m0_inverse, ue8m0_value};
use std::marker::PhantomData;

pub(super) const MXFP4: Blocks4<E2m1> = Blocks4(PhantomData);
pub(super) const E3M0: Blocks4<E3m0> = Blocks4(PhantomData);

const SCALE_BYTES: usize = 1;
const BLOCK_VALUES_MAX: usize = 128;

/// 2^(16 - 127): the least scale. Smaller values are coded as 0 and stay in the residual; no subnormal number is met.
const SCALE_MIN: u8 = 16;

/// Partial sums of the squares of a block's codes.
const NORM_LANES: usize = 16;

const F32_INFINITY: u32 = 0x7f80_0000;

/// A 4-bit format in blocks.
pub(super) trait Format4: Element<Code = u8> + std::fmt::Debug {
    const KIND: CodecKind;
    /// Even, at most [`BLOCK_VALUES_MAX`].
    const BLOCK_VALUES: usize;
    /// Mantissa bits of the f32 above which the largest magnitude of a block takes the next scale.
    const MANTISSA_KEPT: u32;

    const BLOCK_BYTES: usize = SCALE_BYTES + Self::BLOCK_VALUES / 2;
    /// The largest scale: with it the largest code is the largest power of two in f32, or 1.5 times that.
    const SCALE_MAX: u8 = (254 - Self::EXPONENT_MAX) as u8;
}

impl Format4 for E2m1 {
    const KIND: CodecKind = CodecKind::Mxfp4;
    const BLOCK_VALUES: usize = 32;
    const MANTISSA_KEPT: u32 = 0x60_0000; // 1.75
}

impl Format4 for E3m0 {
    const KIND: CodecKind = CodecKind::E3m0;
    const BLOCK_VALUES: usize = 128;
    const MANTISSA_KEPT: u32 = 0x40_0000; // 1.5
}

/// UE8M0 code of the scale of a block whose largest magnitude has the bits `largest`.
#[inline(always)]
fn scale_of<F: Format4>(largest: u32) -> u8 {
    let exponent = (largest >> 23) + u32::from(largest & 0x7f_ffff > F::MANTISSA_KEPT);
    let scale = exponent.saturating_sub(F::EXPONENT_MAX).clamp(SCALE_MIN.into(), F::SCALE_MAX.into()) as u8;
    if largest < F32_INFINITY { scale } else { UE8M0_NAN }
}

#[derive(Debug)]
pub(super) struct Blocks4<F>(PhantomData<F>);

impl<F: Format4> Codec for Blocks4<F> {
    fn kind(&self) -> CodecKind {
        F::KIND
    }

    fn encoded_bytes(&self, values: usize) -> usize {
        values.div_ceil(2) + SCALE_BYTES * values.div_ceil(F::BLOCK_VALUES)
    }

    fn block_values(&self) -> usize {
        F::BLOCK_VALUES
    }

    fn encode(&self, values: &mut [f32], encoded: &mut [u8]) {
        assert_length(self, values, encoded);
        encode_blocks::<F>(Isa::best(), values, encoded);
    }

    fn check(&self, encoded: &[u8], values: usize) -> Result<(), DecodeError> {
        check_length(self, encoded, values)?;
        let scales = encoded.iter().step_by(F::BLOCK_BYTES);
        let Some((index, &scale)) = scales.enumerate().find(|(_, scale)| !(SCALE_MIN..=F::SCALE_MAX).contains(*scale))
        else {
            return check_padding::<F>(encoded, values);
        };
        let (codec, value) = (F::KIND, index * F::BLOCK_VALUES);
        Err(if scale == UE8M0_NAN {
            DecodeError::NotFinite { codec, value }
        } else {
            DecodeError::Malformed { codec, value, what: "a scale that no values have" }
        })
    }

    fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, values.len())?;
        decode_blocks::<F>(Isa::best(), encoded, values);
        Ok(())
    }

    fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        self.check(encoded, sum.len())?;
        accumulate_blocks::<F>(Isa::best(), encoded, weight, sum);
        Ok(())
    }

    fn squared_norm(&self, encoded: &[u8], values: usize) -> Result<f64, DecodeError> {
        self.check(encoded, values)?;
        Ok(squares::<F>(Isa::best(), encoded, values))
    }
}

vectorised! {
    fn squares<F: Format4>(encoded: &[u8], values: usize) -> f64 {
        let (mut sum, mut left) = (0.0, values);
        for block in encoded.chunks(F::BLOCK_BYTES) {
            let scale = f64::from(ue8m0_value(block[0]));
            let mut codes = [0_u8; BLOCK_VALUES_MAX];
            let count = left.min(F::BLOCK_VALUES);
            // Codes behind the last value stay 0, as their squares do.
            unpack4(&block[SCALE_BYTES..], &mut codes[..count]);
            sum += f64::from(squares_of_codes::<F>(&codes[..F::BLOCK_VALUES])) * (scale * scale);
            left -= count;
        }
        sum
    }
}

/// Exact in f32, in any order: a square is a multiple of 2^-4 and at most 2^8, and 128 of them are less than 2^20 multiples.
#[inline(always)]
fn squares_of_codes<F: Format4>(codes: &[u8]) -> f32 {
    let mut lanes = [0.0_f32; NORM_LANES];
    for chunk in codes.as_chunks::<NORM_LANES>().0 {
        for (lane, code) in lanes.iter_mut().zip(chunk) {
            let value = decode_code::<F>((*code).into());
            *lane += value * value;
        }
    }
    lanes.iter().sum()
}

/// An odd number of values leaves the upper half of the last byte empty.
fn check_padding<F: Format4>(encoded: &[u8], values: usize) -> Result<(), DecodeError> {
    match encoded.last() {
        Some(last) if values % 2 == 1 && last >> 4 != 0 => {
            let value = (values - 1) / F::BLOCK_VALUES * F::BLOCK_VALUES;
            Err(DecodeError::Malformed { codec: F::KIND, value, what: "bits after the last value" })
        }
        _ => Ok(()),
    }
}

#[inline(always)]
fn encode_block<F: Format4>(values: &mut [f32], encoded: &mut [u8]) {
    let largest = values.iter().fold(0, |largest, value| magnitude_bits(*value).max(largest));
    let scale_code = scale_of::<F>(largest);
    let (scale, inverse) = (ue8m0_value(scale_code), ue8m0_inverse(scale_code));
    let (scale_byte, packed) = encoded.split_at_mut(SCALE_BYTES);
    scale_byte[0] = scale_code;
    let mut codes = [0_u8; BLOCK_VALUES_MAX];
    let codes = &mut codes[..values.len()];
    for (code, value) in codes.iter_mut().zip(values) {
        let rounded = nearest_magnitude::<F>(magnitude_bits(*value * inverse));
        let magnitude = if rounded > F::MAGNITUDE_MAX { F::MAGNITUDE_MAX } else { rounded };
        let bits = value.to_bits() >> 31 << 3 | magnitude;
        *code = bits as u8;
        *value -= decode_code::<F>(bits) * scale;
    }
    pack4(codes, packed);
}

vectorised! {
    fn encode_blocks<F: Format4>(values: &mut [f32], encoded: &mut [u8]) {
        let blocks = values.len() / F::BLOCK_VALUES;
        let (whole, rest) = values.split_at_mut(blocks * F::BLOCK_VALUES);
        let (encoded_whole, encoded_rest) = encoded.split_at_mut(blocks * F::BLOCK_BYTES);
        let whole = whole.chunks_exact_mut(F::BLOCK_VALUES).zip(encoded_whole.chunks_exact_mut(F::BLOCK_BYTES));
        for (values, encoded) in whole {
            encode_block::<F>(values, encoded);
        }
        if !rest.is_empty() {
            encode_block::<F>(rest, encoded_rest);
        }
    }
}

/// Calls `take(value, decoded)` for each of `values` beside its decoded one.
#[inline(always)]
fn for_each_decoded<F: Format4>(encoded: &[u8], values: &mut [f32], take: impl Fn(&mut f32, f32)) {
    #[inline(always)]
    fn block<F: Format4>(encoded: &[u8], values: &mut [f32], take: &impl Fn(&mut f32, f32)) {
        let scale = ue8m0_value(encoded[0]);
        let mut codes = [0_u8; BLOCK_VALUES_MAX];
        let codes = &mut codes[..values.len()];
        unpack4(&encoded[SCALE_BYTES..], codes);
        for (value, code) in values.iter_mut().zip(codes) {
            take(value, decode_code::<F>((*code).into()) * scale);
        }
    }
    let blocks = values.len() / F::BLOCK_VALUES;
    let (whole, rest) = values.split_at_mut(blocks * F::BLOCK_VALUES);
    let (encoded_whole, encoded_rest) = encoded.split_at(blocks * F::BLOCK_BYTES);
    let whole = whole.chunks_exact_mut(F::BLOCK_VALUES).zip(encoded_whole.chunks_exact(F::BLOCK_BYTES));
    for (values, encoded) in whole {
        block::<F>(encoded, values, &take);
    }
    if !rest.is_empty() {
        block::<F>(encoded_rest, rest, &take);
    }
}

vectorised! {
    fn decode_blocks<F: Format4>(encoded: &[u8], values: &mut [f32]) {
        for_each_decoded::<F>(encoded, values, |value, decoded| *value = decoded);
    }
}

vectorised! {
    fn accumulate_blocks<F: Format4>(encoded: &[u8], weight: f32, sum: &mut [f32]) {
        for_each_decoded::<F>(encoded, sum, |sum, decoded| *sum += weight * decoded);
    }
}
