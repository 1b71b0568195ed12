//! Element formats: one f32 to one code of 4, 6, 8 or 16 bits, and back.
//!
//! A format has a sign, E exponent bits with a bias b and M mantissa bits. With e and m read as integers,
//!
//! ```text
//! value = (-1)^s * 2^(e-b) * (1 + m/2^M)    e > 0: normal
//! value = (-1)^s * 2^(1-b) * m/2^M          e = 0: zero and subnormal
//! ```
//!
//! | format | E, M, b | largest | infinity | NaN | source |
//! |---|---|---|---|---|---|
//! | E4M3 | 4, 3, 7 | 448 | none | magnitude all ones | OCP OFP8 v1.0; `float8_e4m3fn` |
//! | E5M2 | 5, 2, 15 | 57,344 | as IEEE 754 | as IEEE 754 | OCP OFP8 v1.0; `float8_e5m2` |
//! | E3M2 | 3, 2, 3 | 28 | none | none | OCP MX v1.0; `float6_e3m2fn` |
//! | E2M3 | 2, 3, 1 | 7.5 | none | none | OCP MX v1.0; `float6_e2m3fn` |
//! | E2M1 | 2, 1, 1 | 6 | none | none | OCP MX v1.0; `float4_e2m1fn` |
//! | E3M0 | 3, 0, 3 | 16 | none | none | the formula above: 0 and 2^-2 to 2^4 |
//! | bf16 | 8, 7, 127 | 3.39e38 | as IEEE 754 | as IEEE 754 | `bfloat16` |
//! | f16 | 5, 10, 15 | 65,504 | as IEEE 754 | as IEEE 754 | IEEE 754 binary16 |
//!
//! Codes, NaNs included, are those of PyPI's `ml_dtypes`, bit for bit (`tests/golden.rs`). It has no E3M0; f16 is
//! compared with NumPy's. A format without NaN codes one as zero of the opposite sign, as `ml_dtypes` does; a caller that
//! may meet NaN looks at its block's largest magnitude first, as [`crate::mx`] does.

mod int8;
mod kernel;
#[cfg(test)]
mod tests;

pub(crate) use int8::nearest_int8;
pub use int8::{INT8_MAX, decode_int8, encode_int8};
pub(crate) use kernel::{decode_code, encode_values, magnitude_bits, nearest_magnitude};

use crate::isa::Isa;
use crate::round::Rounding;

/// What the codes above the largest finite value mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// Exponent all ones: infinity where the mantissa is zero, else NaN.
    Ieee,
    /// Only the magnitude of all ones is NaN; there is no infinity.
    NanOnly,
    /// Every code is finite.
    None,
}

/// What becomes of a value that rounds to more than the largest finite one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// Infinity, or NaN where there is no infinity, or the largest value where there is neither.
    Special,
    /// The largest finite value, also for infinity itself. NaN stays NaN.
    Saturate,
}

/// An unsigned integer that holds codes.
pub trait Code: Copy + Send + Sync + 'static {
    /// The low bits of `bits`.
    fn from_bits(bits: u32) -> Self;
    /// The code as an integer.
    fn bits(self) -> u32;
}

impl Code for u8 {
    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        bits as Self
    }
    #[inline(always)]
    fn bits(self) -> u32 {
        self.into()
    }
}

impl Code for u16 {
    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        bits as Self
    }
    #[inline(always)]
    fn bits(self) -> u32 {
        self.into()
    }
}

/// A floating-point format of at most 16 bits; see the table in [the module](self). A code lies in the low bits of [`Self::Code`].
pub trait Element: Copy + Send + Sync + 'static {
    /// What holds a code.
    type Code: Code;
    /// As users write it.
    const NAME: &'static str;
    /// E.
    const EXPONENT_BITS: u32;
    /// M.
    const MANTISSA_BITS: u32;
    /// b.
    const BIAS: u32;
    /// What lies above the largest finite value.
    const SPECIALS: Specials;

    /// Bits of a code, sign included.
    const BITS: u32 = 1 + Self::EXPONENT_BITS + Self::MANTISSA_BITS;
    /// A code without its sign.
    const MAGNITUDE_MASK: u32 = (1 << (Self::BITS - 1)) - 1;
    /// Code of the largest finite value.
    const MAGNITUDE_MAX: u32 = match Self::SPECIALS {
        Specials::Ieee => Self::MAGNITUDE_MASK - (1 << Self::MANTISSA_BITS),
        Specials::NanOnly => Self::MAGNITUDE_MASK - 1,
        Specials::None => Self::MAGNITUDE_MASK,
    };
    /// floor(log2) of the largest finite value: `emax` of OCP MX.
    const EXPONENT_MAX: u32 = (Self::MAGNITUDE_MAX >> Self::MANTISSA_BITS) - Self::BIAS;
}

macro_rules! elements {
    ($($(#[$meta:meta])* $name:ident($text:literal, $code:ty): $e:literal, $m:literal, $bias:literal, $specials:ident;)+) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub struct $name;

            impl Element for $name {
                type Code = $code;
                const NAME: &'static str = $text;
                const EXPONENT_BITS: u32 = $e;
                const MANTISSA_BITS: u32 = $m;
                const BIAS: u32 = $bias;
                const SPECIALS: Specials = Specials::$specials;
            }
        )+
    };
}

elements! {
    /// 8 bits, for weights and activations.
    E4m3("e4m3", u8): 4, 3, 7, NanOnly;
    /// 8 bits, for gradients.
    E5m2("e5m2", u8): 5, 2, 15, Ieee;
    /// 6 bits, the wider range.
    E3m2("e3m2", u8): 3, 2, 3, None;
    /// 6 bits, the finer steps.
    E2m3("e2m3", u8): 2, 3, 1, None;
    /// 4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    E2m1("e2m1", u8): 2, 1, 1, None;
    /// 4 bits, powers of two only: 0, 1/4, 1/2, 1, 2, 4, 8, 16.
    E3m0("e3m0", u8): 3, 0, 3, None;
    /// The upper half of an f32.
    Bf16("bf16", u16): 8, 7, 127, Ieee;
    /// IEEE 754 binary16.
    F16("f16", u16): 5, 10, 15, Ieee;
}

/// Encodes each value to the code beside it.
///
/// # Panics
/// When the slices differ in length.
pub fn encode<E: Element>(values: &[f32], codes: &mut [E::Code], rounding: Rounding, overflow: Overflow) {
    assert_eq!(values.len(), codes.len(), "a code for each value");
    kernel::encode::<E>(Isa::best(), values, codes, rounding, overflow);
}

/// Decodes each code to the value beside it. Every code has a value; bits above a code's are not looked at.
///
/// # Panics
/// When the slices differ in length.
pub fn decode<E: Element>(codes: &[E::Code], values: &mut [f32]) {
    assert_eq!(values.len(), codes.len(), "a value for each code");
    kernel::decode::<E>(Isa::best(), codes, values);
}
