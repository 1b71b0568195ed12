//! The arithmetic of [`super::encode`] and [`super::decode`], without a branch on a value.
//!
//! Normal results are rounded on the f32's bits: adding half a step (less one where the last kept bit is 0) carries
//! from the mantissa into the exponent as rounding must. Subnormal results are rounded by the processor: the sum with a
//! power of two whose own last bit is worth a subnormal step is rounded to nearest even, and its low bits are the code.

use super::{Code, Element, Overflow, Specials};
use crate::isa::vectorised;
use crate::round::{KeyedParts, Rounding};

const F32_MANTISSA_BITS: u32 = 23;
const F32_BIAS: u32 = 127;
const F32_INFINITY: u32 = 0x7f80_0000;
const F32_NAN: u32 = 0x7fc0_0000;
const F32_MAGNITUDE: u32 = 0x7fff_ffff;

/// Bits of |value|: ordered as the magnitudes are, with NaN above infinity.
#[inline(always)]
pub(crate) fn magnitude_bits(value: f32) -> u32 {
    value.to_bits() & F32_MAGNITUDE
}

/// 2^exponent, for normal results.
const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((F32_BIAS as i32 + exponent) as u32) << F32_MANTISSA_BITS)
}

/// How many bits of an f32's mantissa a format lacks.
const fn dropped_bits<E: Element>() -> u32 {
    F32_MANTISSA_BITS - E::MANTISSA_BITS
}

/// log2 of the step between subnormals, and between the smallest normals.
const fn step_exponent<E: Element>() -> i32 {
    1 - E::BIAS as i32 - E::MANTISSA_BITS as i32
}

/// Bits of the smallest normal value.
const fn normal_min<E: Element>() -> u32 {
    (F32_BIAS + 1 - E::BIAS) << F32_MANTISSA_BITS
}

/// A magnitude's exponent moved from f32's bias to the format's.
#[inline(always)]
fn rebias<E: Element>(magnitude: u32) -> u32 {
    magnitude.wrapping_sub((F32_BIAS - E::BIAS) << E::MANTISSA_BITS)
}

/// The code of |value| rounded to nearest even, not bounded by the format's range; meaningless for NaN.
#[inline(always)]
pub(crate) fn nearest_magnitude<E: Element>(bits: u32) -> u32 {
    let dropped = const { dropped_bits::<E>() };
    let last_kept = (bits >> dropped) & 1;
    let normal = rebias::<E>((bits + ((1 << (dropped - 1)) - 1) + last_kept) >> dropped);
    if E::BIAS == F32_BIAS {
        return normal; // Subnormals of the format are subnormals of f32: the same bits.
    }
    let anchor = const { power_of_two(step_exponent::<E>() + F32_MANTISSA_BITS as i32) };
    let subnormal = (f32::from_bits(bits) + anchor).to_bits().wrapping_sub(anchor.to_bits());
    if bits < const { normal_min::<E>() } { subnormal } else { normal }
}

/// As [`nearest_magnitude`], rounded up with the probability of the part that is dropped.
#[inline(always)]
fn stochastic_magnitude<E: Element>(bits: u32, random: u32) -> u32 {
    let dropped = const { dropped_bits::<E>() };
    let normal = rebias::<E>((bits + (random & ((1 << dropped) - 1))) >> dropped);
    if E::BIAS == F32_BIAS {
        return normal;
    }
    let is_subnormal = bits < const { normal_min::<E>() };
    let steps = f32::from_bits(bits) * const { power_of_two(-step_exponent::<E>()) };
    let subnormal = stochastic_integer(steps, random);
    if is_subnormal { subnormal as u32 } else { normal }
}

/// An integer beside `value`, the upper one with the probability of the distance from the lower one; |value| < 2^22.
#[inline(always)]
pub(super) fn stochastic_integer(value: f32, random: u32) -> i32 {
    // The sum with 1.5 * 2^23 is rounded to an integer, and its low bits are that integer.
    const ANCHOR: f32 = 12_582_912.0;
    let anchored = value + ANCHOR;
    let nearest = anchored - ANCHOR;
    let is_above = nearest > value;
    let lower = if is_above { nearest - 1.0 } else { nearest };
    let uniform = (random >> 8) as i32 as f32 * const { power_of_two(-24) };
    let is_up = uniform < value - lower;
    (anchored.to_bits().wrapping_sub(ANCHOR.to_bits()) as i32) - i32::from(is_above) + i32::from(is_up)
}

/// The code of a value whose magnitude was rounded to `magnitude`.
#[inline(always)]
fn finish<E: Element>(bits: u32, magnitude: u32, overflow_magnitude: u32) -> u32 {
    let sign = bits >> 31;
    let bounded = if magnitude > E::MAGNITUDE_MAX { overflow_magnitude } else { magnitude };
    let is_nan = bits & F32_MAGNITUDE > F32_INFINITY;
    let (nan_sign, nan_magnitude) = match E::SPECIALS {
        // Quiet, without payload.
        Specials::Ieee => (sign, E::MAGNITUDE_MAX + 1 + (1 << (E::MANTISSA_BITS - 1))),
        Specials::NanOnly => (sign, E::MAGNITUDE_MASK),
        Specials::None => (sign ^ 1, 0),
    };
    let (sign, magnitude) = if is_nan { (nan_sign, nan_magnitude) } else { (sign, bounded) };
    sign << (E::BITS - 1) | magnitude
}

/// The value of a code.
#[inline(always)]
pub(crate) fn decode_code<E: Element>(code: u32) -> f32 {
    let dropped = const { dropped_bits::<E>() };
    let magnitude = code & E::MAGNITUDE_MASK;
    let sign = (code >> (E::BITS - 1) & 1) << 31;
    let normal = (magnitude << dropped) + const { (F32_BIAS - E::BIAS) << F32_MANTISSA_BITS };
    if E::BIAS == F32_BIAS {
        return f32::from_bits(sign | normal);
    }
    let subnormal = (magnitude as i32 as f32 * const { power_of_two(step_exponent::<E>()) }).to_bits();
    let finite = if magnitude < 1 << E::MANTISSA_BITS { subnormal } else { normal };
    let bits = match E::SPECIALS {
        Specials::Ieee if magnitude > E::MAGNITUDE_MAX => normal | F32_INFINITY,
        Specials::NanOnly if magnitude > E::MAGNITUDE_MAX => F32_NAN,
        _ => finite,
    };
    f32::from_bits(sign | bits)
}

vectorised! {
    /// See [`super::encode`].
    pub(super) fn encode<E: Element>(
        values: &[f32],
        codes: &mut [E::Code],
        rounding: Rounding,
        overflow: Overflow,
    ) {
        encode_values::<E>(values, codes, rounding, overflow);
    }
}

/// [`super::encode`], as a part of a kernel.
#[inline(always)]
pub(crate) fn encode_values<E: Element>(values: &[f32], codes: &mut [E::Code], rounding: Rounding, overflow: Overflow) {
    let overflow_magnitude = match (overflow, E::SPECIALS) {
        (Overflow::Special, Specials::Ieee | Specials::NanOnly) => E::MAGNITUDE_MAX + 1,
        (Overflow::Special, Specials::None) | (Overflow::Saturate, _) => E::MAGNITUDE_MAX,
    };
    let code_of = |bits, magnitude| E::Code::from_bits(finish::<E>(bits, magnitude, overflow_magnitude));
    match rounding {
        Rounding::NearestEven => {
            for (code, value) in codes.iter_mut().zip(values) {
                let bits = value.to_bits();
                *code = code_of(bits, nearest_magnitude::<E>(bits & F32_MAGNITUDE));
            }
        }
        Rounding::Stochastic { seed, first } => {
            for (key, low, range) in KeyedParts::new(seed, first, values.len()) {
                let mut index = low;
                for (code, value) in codes[range.clone()].iter_mut().zip(&values[range]) {
                    let bits = value.to_bits();
                    *code = code_of(bits, stochastic_magnitude::<E>(bits & F32_MAGNITUDE, key.random(index)));
                    index = index.wrapping_add(1);
                }
            }
        }
    }
}

vectorised! {
    /// See [`super::decode`].
    pub(super) fn decode<E: Element>(codes: &[E::Code], values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = decode_code::<E>(code.bits());
        }
    }
}
