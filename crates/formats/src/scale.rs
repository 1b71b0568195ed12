//! Scales of blocks: powers of two in 8 bits (UE8M0) and f32.
//!
//! | rule | scale of a block with largest magnitude amax | source |
//! |---|---|---|
//! | [`mx_floor`] | 2^(floor(log2 amax) - emax) | OCP MX v1.0, section 6.3 |
//! | [`mx_ceil`] | 2^ceil(log2(amax / largest)) | arXiv 2506.08027, algorithm 1 |
//! | [`tile_ceil`] | 2^ceil(log2(max(amax, 1e-4) / 448)) | DeepSeek-V3 and DeepGEMM |
//! | [`tile_f32`] | max(amax, 1e-4) / 448 | DeepSeek-V3 and DeepGEMM |
//!
//! Rounded down, a block's largest values may be cut off (by up to an eighth in E4M3: 512 becomes 448); rounded up, never.

use crate::element::{E4m3, Element, decode_code};

/// The UE8M0 code that means NaN: a block with a value that is not finite.
pub const UE8M0_NAN: u8 = 255;

/// DeepSeek's floor of a tile's largest magnitude, so that a tile of zeros has a scale.
pub const TILE_LARGEST_MIN: f32 = 1e-4;

/// 2^(code - 127); [`UE8M0_NAN`] is NaN.
#[inline(always)]
pub fn ue8m0_value(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22), // 2^-127, subnormal.
        UE8M0_NAN => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// 2^(127 - code), the inverse of [`ue8m0_value`]; [`UE8M0_NAN`] is NaN.
#[inline(always)]
pub fn ue8m0_inverse(code: u8) -> f32 {
    match code {
        254 => f32::from_bits(1 << 22),
        UE8M0_NAN => f32::NAN,
        _ => f32::from_bits((254 - u32::from(code)) << 23),
    }
}

/// The largest finite value of a format.
pub fn largest_value<E: Element>() -> f32 {
    decode_code::<E>(E::MAGNITUDE_MAX)
}

/// UE8M0 code of 2^(floor(log2 largest) - emax), at least 2^-127, for the largest magnitude of a block.
///
/// A `largest` that is not finite gives [`UE8M0_NAN`]; a subnormal one, or zero, gives code 0.
#[inline(always)]
pub fn mx_floor<E: Element>(largest: f32) -> u8 {
    let exponent = largest.to_bits() >> 23 & 0xff;
    if exponent == 255 { UE8M0_NAN } else { exponent.saturating_sub(E::EXPONENT_MAX) as u8 }
}

/// UE8M0 code of 2^ceil(log2(largest / L)), at least 2^-127, where L is the format's largest value: nothing is cut off.
///
/// A `largest` that is not finite gives [`UE8M0_NAN`].
#[inline(always)]
pub fn mx_ceil<E: Element>(largest: f32) -> u8 {
    let bits = largest.to_bits() & 0x7fff_ffff;
    if bits >> 23 == 255 {
        return UE8M0_NAN;
    }
    // Compared by mantissas, for the quotient may be rounded: 2^(e+1) is needed where 2^e times L is not enough.
    let limit = const { mantissa_of_largest::<E>() };
    let exponent = (bits >> 23) + u32::from(bits & 0x7f_ffff > limit);
    exponent.saturating_sub(E::EXPONENT_MAX) as u8
}

/// Mantissa bits of the format's largest value as f32.
const fn mantissa_of_largest<E: Element>() -> u32 {
    (E::MAGNITUDE_MAX & ((1 << E::MANTISSA_BITS) - 1)) << (23 - E::MANTISSA_BITS)
}

/// UE8M0 code of an E4M3 tile's scale, rounded up.
///
/// With `bits` those of max(largest, 1e-4) / 448 as f32, the code is the exponent field, plus one where the mantissa is
/// not zero, within 1 to 254. A `largest` that is not finite gives [`UE8M0_NAN`].
#[inline(always)]
pub fn tile_ceil(largest: f32) -> u8 {
    if !largest.is_finite() {
        return UE8M0_NAN;
    }
    let bits = tile_f32(largest).to_bits();
    let exponent = (bits >> 23 & 0xff) + u32::from(bits & 0x7f_ffff != 0);
    exponent.clamp(1, 254) as u8
}

/// An E4M3 tile's scale in f32: max(largest, 1e-4) / 448; NaN for NaN.
#[inline(always)]
pub fn tile_f32(largest: f32) -> f32 {
    let floored = if largest < TILE_LARGEST_MIN { TILE_LARGEST_MIN } else { largest };
    floored / const { E4M3_LARGEST }
}

const E4M3_LARGEST: f32 = 448.0;
const _: () = assert!(E4m3::MAGNITUDE_MAX == 0x7e && E4m3::EXPONENT_MAX == 8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::{E2m1, E2m3, E3m0, E3m2, E5m2};
    use proptest::prelude::*;

    #[test]
    fn exponents_and_largest_values_are_those_of_the_specifications() {
        assert_eq!([E4m3::EXPONENT_MAX, E5m2::EXPONENT_MAX, E3m2::EXPONENT_MAX], [8, 15, 4]);
        assert_eq!([E2m3::EXPONENT_MAX, E2m1::EXPONENT_MAX, E3m0::EXPONENT_MAX], [2, 2, 4]);
        assert_eq!(largest_value::<E4m3>(), E4M3_LARGEST);
        assert_eq!([largest_value::<E5m2>(), largest_value::<E3m2>(), largest_value::<E2m3>()], [57_344.0, 28.0, 7.5]);
        assert_eq!([largest_value::<E2m1>(), largest_value::<E3m0>()], [6.0, 16.0]);
    }

    #[test]
    fn the_code_of_a_scale_is_its_exponent() {
        for code in 0..UE8M0_NAN {
            assert_eq!(f64::from(ue8m0_value(code)), 2_f64.powi(i32::from(code) - 127));
            assert_eq!(f64::from(ue8m0_inverse(code)), 2_f64.powi(127 - i32::from(code)));
        }
        assert!(ue8m0_value(UE8M0_NAN).is_nan() && ue8m0_inverse(UE8M0_NAN).is_nan());
    }

    #[test]
    fn what_is_not_finite_has_no_scale_and_zero_has_the_least() {
        for wrong in [f32::INFINITY, f32::NAN] {
            assert_eq!([mx_floor::<E2m1>(wrong), mx_ceil::<E2m1>(wrong), tile_ceil(wrong)], [UE8M0_NAN; 3]);
        }
        assert_eq!([mx_floor::<E2m1>(0.0), mx_ceil::<E2m1>(0.0)], [0; 2]);
        // 1e-4 / 448 = 2.2e-7 lies between 2^-23 and 2^-22.
        assert_eq!(tile_ceil(0.0), 127 - 22);
        assert_eq!(tile_f32(0.0), 1e-4 / 448.0);
    }

    /// The published formulas, read in exact arithmetic: 2^code is the scale that they describe and half of it is not.
    fn follows_the_formulas<E: Element>(largest: f32) {
        let (exact, top) = (f64::from(largest), f64::from(largest_value::<E>()));
        let clamped = |exponent: f64| (exponent + 127.0).max(0.0) as u8;
        assert_eq!(mx_floor::<E>(largest), clamped(exact.log2().floor() - f64::from(E::EXPONENT_MAX)), "{largest:e}");
        let up = f64::from(ue8m0_value(mx_ceil::<E>(largest)));
        assert!(exact <= up * top, "{}: {largest:e} is cut off", E::NAME);
        assert!(mx_ceil::<E>(largest) == 0 || exact > up / 2.0 * top, "{}: {largest:e} wastes a bit", E::NAME);
    }

    proptest! {
        #[test]
        fn powers_of_two_follow_the_published_formulas(bits in 0x0080_0000_u32..0x7f80_0000, coarse in any::<bool>()) {
            // Half of the cases lie on or beside the codes of formats.
            let largest = f32::from_bits(if coarse { bits & 0xfff0_0000 | bits & 1 } else { bits });
            follows_the_formulas::<E4m3>(largest);
            follows_the_formulas::<E5m2>(largest);
            follows_the_formulas::<E3m2>(largest);
            follows_the_formulas::<E2m3>(largest);
            follows_the_formulas::<E2m1>(largest);
            follows_the_formulas::<E3m0>(largest);

            let quotient = f64::from(largest.max(1e-4) / 448.0);
            let code = tile_ceil(largest);
            prop_assert!(quotient <= f64::from(ue8m0_value(code)));
            prop_assert!(quotient > f64::from(ue8m0_value(code)) / 2.0);
        }
    }
}
