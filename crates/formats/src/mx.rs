//! OCP Microscaling (MX v1.0): blocks of 32 values along the last axis, each with a UE8M0 scale.
//!
//! ```text
//! scale  X = 2^(floor(log2 amax) - emax), or rounded up: see `scale`
//! code   P_i = round(value_i / X), saturating
//! value  X * P_i
//! ```
//!
//! A block with a value that is not finite has the scale NaN (the specification leaves that open), and so decodes to NaN.
//! Scales and codes are separate slices, as kernels want them; [`crate::codec`] has a layout for links.

use crate::bits::{pack4, pack6, unpack4, unpack6};
use crate::element::{E2m1, E2m3, E3m2, E4m3, E5m2, Element, Overflow, decode_code, encode_values, magnitude_bits};
use crate::isa::{Isa, vectorised};
use crate::round::Rounding;
use crate::scale::{mx_ceil, mx_floor, ue8m0_inverse, ue8m0_value};

/// Values that share a scale.
pub const MX_BLOCK_VALUES: usize = 32;

/// Which MX format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MxFormat {
    /// MXFP8 with E4M3.
    Mxfp8E4m3,
    /// MXFP8 with E5M2.
    Mxfp8E5m2,
    /// MXFP6 with E3M2.
    Mxfp6E3m2,
    /// MXFP6 with E2M3.
    Mxfp6E2m3,
    /// MXFP4 with E2M1.
    Mxfp4,
}

/// How a block's scale is rounded to a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleRounding {
    /// As OCP MX v1.0: the largest values of a block may be cut off.
    Down,
    /// Up, so that none is; what training in MXFP8 needs (arXiv 2506.08027).
    Up,
}

impl MxFormat {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Mxfp8E4m3, Self::Mxfp8E5m2, Self::Mxfp6E3m2, Self::Mxfp6E2m3, Self::Mxfp4];

    /// Bits of a code.
    pub fn code_bits(self) -> usize {
        match self {
            Self::Mxfp8E4m3 | Self::Mxfp8E5m2 => 8,
            Self::Mxfp6E3m2 | Self::Mxfp6E2m3 => 6,
            Self::Mxfp4 => 4,
        }
    }

    /// Scales of `values` values, one byte each; a last block that is not full counts as one.
    pub fn scale_bytes(self, values: usize) -> usize {
        values.div_ceil(MX_BLOCK_VALUES)
    }

    /// Bytes of the packed codes of `values` values, the last block filled up with zeros.
    pub fn code_bytes(self, values: usize) -> usize {
        self.scale_bytes(values) * MX_BLOCK_VALUES * self.code_bits() / 8
    }

    /// Quantises `values` to `scales` and `codes`, packed as [`crate::bits`] packs.
    ///
    /// # Panics
    /// When `scales` or `codes` have other lengths than [`Self::scale_bytes`] and [`Self::code_bytes`] tell.
    pub fn encode(
        self,
        values: &[f32],
        scales: &mut [u8],
        codes: &mut [u8],
        scale_rounding: ScaleRounding,
        rounding: Rounding,
    ) {
        self.assert_lengths(values.len(), scales.len(), codes.len());
        let job = Encode { values, scales, codes, scale_rounding, rounding };
        match self {
            Self::Mxfp8E4m3 => encode_blocks::<E4m3>(Isa::best(), job),
            Self::Mxfp8E5m2 => encode_blocks::<E5m2>(Isa::best(), job),
            Self::Mxfp6E3m2 => encode_blocks::<E3m2>(Isa::best(), job),
            Self::Mxfp6E2m3 => encode_blocks::<E2m3>(Isa::best(), job),
            Self::Mxfp4 => encode_blocks::<E2m1>(Isa::best(), job),
        }
    }

    /// Dequantises. Every combination of bytes has values; those of a block whose scale is NaN are NaN.
    ///
    /// # Panics
    /// As [`Self::encode`].
    pub fn decode(self, scales: &[u8], codes: &[u8], values: &mut [f32]) {
        self.assert_lengths(values.len(), scales.len(), codes.len());
        match self {
            Self::Mxfp8E4m3 => decode_blocks::<E4m3>(Isa::best(), scales, codes, values),
            Self::Mxfp8E5m2 => decode_blocks::<E5m2>(Isa::best(), scales, codes, values),
            Self::Mxfp6E3m2 => decode_blocks::<E3m2>(Isa::best(), scales, codes, values),
            Self::Mxfp6E2m3 => decode_blocks::<E2m3>(Isa::best(), scales, codes, values),
            Self::Mxfp4 => decode_blocks::<E2m1>(Isa::best(), scales, codes, values),
        }
    }

    fn assert_lengths(self, values: usize, scales: usize, codes: usize) {
        assert_eq!(scales, self.scale_bytes(values), "a scale for each {MX_BLOCK_VALUES} of {values} values");
        assert_eq!(codes, self.code_bytes(values), "{} bits for each of {values} values", self.code_bits());
    }
}

struct Encode<'a> {
    values: &'a [f32],
    scales: &'a mut [u8],
    codes: &'a mut [u8],
    scale_rounding: ScaleRounding,
    rounding: Rounding,
}

/// Bytes of a block's packed codes.
const fn packed_bytes<E: Element>() -> usize {
    MX_BLOCK_VALUES * E::BITS as usize / 8
}

#[inline(always)]
fn pack<E: Element>(codes: &[u8], packed: &mut [u8]) {
    match E::BITS {
        4 => pack4(codes, packed),
        6 => pack6(codes, packed),
        _ => packed.copy_from_slice(codes),
    }
}

#[inline(always)]
fn unpack<E: Element>(packed: &[u8], codes: &mut [u8]) {
    match E::BITS {
        4 => unpack4(packed, codes),
        6 => unpack6(packed, codes),
        _ => codes.copy_from_slice(packed),
    }
}

#[inline(always)]
fn largest_of(values: &[f32; MX_BLOCK_VALUES]) -> f32 {
    f32::from_bits(values.iter().fold(0, |largest, value| magnitude_bits(*value).max(largest)))
}

vectorised! {
    fn encode_blocks<E: Element<Code = u8>>(job: Encode<'_>) {
        let parts = job.values.chunks(MX_BLOCK_VALUES).zip(job.scales).zip(job.codes.chunks_exact_mut(packed_bytes::<E>()));
        for (index, ((values, scale), packed)) in parts.enumerate() {
            let mut block = [0.0; MX_BLOCK_VALUES];
            block[..values.len()].copy_from_slice(values);
            let largest = largest_of(&block);
            *scale = match job.scale_rounding {
                ScaleRounding::Down => mx_floor::<E>(largest),
                ScaleRounding::Up => mx_ceil::<E>(largest),
            };
            let inverse = ue8m0_inverse(*scale);
            for value in &mut block {
                *value *= inverse;
            }
            let mut codes = [0; MX_BLOCK_VALUES];
            let rounding = job.rounding.skip(index * MX_BLOCK_VALUES);
            encode_values::<E>(&block, &mut codes, rounding, Overflow::Saturate);
            pack::<E>(&codes, packed);
        }
    }
}

vectorised! {
    fn decode_blocks<E: Element<Code = u8>>(scales: &[u8], codes: &[u8], values: &mut [f32]) {
        let parts = values.chunks_mut(MX_BLOCK_VALUES).zip(scales).zip(codes.chunks_exact(packed_bytes::<E>()));
        for ((values, scale), packed) in parts {
            let scale = ue8m0_value(*scale);
            let mut codes = [0; MX_BLOCK_VALUES];
            unpack::<E>(packed, &mut codes);
            for (value, code) in values.iter_mut().zip(&codes) {
                *value = decode_code::<E>((*code).into()) * scale;
            }
        }
    }
}
