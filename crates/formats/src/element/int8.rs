//! int8: codes -127 to 127, each worth its own number, symmetric about zero.
//!
//! -128 is never made, so that a value and its negative have opposite codes; as an element it decodes to -128, and
//! [the codec](crate::codec) refuses it.

use super::kernel::stochastic_integer;
use crate::isa::{Isa, vectorised};
use crate::round::{KeyedParts, Rounding};

/// The largest magnitude of a code.
pub const INT8_MAX: f32 = 127.0;

/// 1.5 * 2^23: the sum with a small number is rounded to an integer, and its low bits are that integer.
const ANCHOR: f32 = 12_582_912.0;

/// Rounds to nearest even, and beyond ±127 to ±127; NaN becomes 0.
#[inline(always)]
pub(crate) fn nearest_int8(value: f32) -> i8 {
    (bounded(value) + ANCHOR).to_bits() as i8
}

#[inline(always)]
fn bounded(value: f32) -> f32 {
    let number = if value.is_nan() { 0.0 } else { value };
    let number = if number > INT8_MAX { INT8_MAX } else { number };
    if number < -INT8_MAX { -INT8_MAX } else { number }
}

/// Encodes each value, in units of the scale that the caller divided by, to the code beside it.
///
/// # Panics
/// When the slices differ in length.
pub fn encode_int8(values: &[f32], codes: &mut [i8], rounding: Rounding) {
    assert_eq!(values.len(), codes.len(), "a code for each value");
    let isa = Isa::best();
    match rounding {
        Rounding::NearestEven => nearest(isa, values, codes),
        Rounding::Stochastic { seed, first } => stochastic(isa, values, codes, seed, first),
    }
}

/// Decodes each code to the value beside it.
///
/// # Panics
/// When the slices differ in length.
pub fn decode_int8(codes: &[i8], values: &mut [f32]) {
    assert_eq!(values.len(), codes.len(), "a value for each code");
    widen(Isa::best(), codes, values);
}

vectorised! {
    fn nearest(values: &[f32], codes: &mut [i8]) {
        for (code, value) in codes.iter_mut().zip(values) {
            *code = nearest_int8(*value);
        }
    }
}

vectorised! {
    fn stochastic(values: &[f32], codes: &mut [i8], seed: u64, first: u64) {
        for (key, low, range) in KeyedParts::new(seed, first, values.len()) {
            let mut index = low;
            for (code, value) in codes[range.clone()].iter_mut().zip(&values[range]) {
                *code = stochastic_integer(bounded(*value), key.random(index)) as i8;
                index = index.wrapping_add(1);
            }
        }
    }
}

vectorised! {
    fn widen(codes: &[i8], values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = f32::from(*code);
        }
    }
}
