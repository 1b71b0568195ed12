//! DeepSeek-V3's tiles (arXiv 2412.19437, section 3.3.2): E4M3 codes of a matrix, a scale for each 1x128 (activations,
//! gradients) or 128x128 (weights), never cut off.
//!
//! `code = round(value / scale)`, where the scale is [`tile_f32`] or [`tile_ceil`]'s power of two; a tile at the right or
//! lower edge may be smaller. A tile with a value that is not finite has a scale that is not, and so decodes to NaN.

use crate::element::{E4m3, Overflow, decode_code, encode_values, magnitude_bits};
use crate::isa::{Isa, vectorised};
use crate::round::Rounding;
use crate::scale::{tile_ceil, tile_f32, ue8m0_value};

/// Columns of a tile, and rows of a square one.
pub const TILE_SIDE: usize = 128;

/// Which values of a matrix share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TileShape {
    /// 1 x 128.
    Row,
    /// 128 x 128.
    Square,
}

/// What a tile's scale may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TileScale {
    /// amax / 448.
    F32,
    /// The next power of two: UE8M0, here as the f32 that it stands for.
    PowerOfTwo,
}

impl TileShape {
    fn rows(self) -> usize {
        match self {
            Self::Row => 1,
            Self::Square => TILE_SIDE,
        }
    }

    /// Scales of a matrix, row-major: `[ceil(rows / tile rows), ceil(columns / 128)]`.
    pub fn scales(self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(self.rows()) * columns.div_ceil(TILE_SIDE)
    }

    /// Quantises the row-major matrix `values[rows, columns]`: `codes` has its shape, `scales` that of [`Self::scales`].
    ///
    /// # Panics
    /// When `columns` is 0, `values` are not whole rows, or the other lengths do not follow.
    pub fn encode(
        self,
        values: &[f32],
        columns: usize,
        scale: TileScale,
        rounding: Rounding,
        codes: &mut [u8],
        scales: &mut [f32],
    ) {
        self.assert_lengths(values.len(), columns, codes.len(), scales.len());
        let band = columns * self.rows();
        let scales = scales.chunks_exact_mut(columns.div_ceil(TILE_SIDE));
        let bands = values.chunks(band).zip(codes.chunks_mut(band)).zip(scales);
        for (index, ((values, codes), scales)) in bands.enumerate() {
            encode_band(Isa::best(), values, columns, scale, rounding.skip(index * band), codes, scales);
        }
    }

    /// Dequantises: `value = code * scale`.
    ///
    /// # Panics
    /// As [`Self::encode`].
    pub fn decode(self, codes: &[u8], scales: &[f32], columns: usize, values: &mut [f32]) {
        self.assert_lengths(values.len(), columns, codes.len(), scales.len());
        let band = columns * self.rows();
        let scales = scales.chunks_exact(columns.div_ceil(TILE_SIDE));
        for ((values, codes), scales) in values.chunks_mut(band).zip(codes.chunks(band)).zip(scales) {
            decode_band(Isa::best(), codes, columns, scales, values);
        }
    }

    fn assert_lengths(self, values: usize, columns: usize, codes: usize, scales: usize) {
        assert!(columns > 0 && values.is_multiple_of(columns), "{values} values are rows of {columns}");
        assert_eq!(codes, values, "a code for each value");
        assert_eq!(scales, self.scales(values / columns, columns), "a scale for each tile");
    }
}

vectorised! {
    /// One row of tiles. Its scales hold the largest magnitudes first.
    fn encode_band(
        values: &[f32],
        columns: usize,
        scale: TileScale,
        rounding: Rounding,
        codes: &mut [u8],
        scales: &mut [f32],
    ) {
        scales.fill(0.0);
        for row in values.chunks_exact(columns) {
            for (largest, tile) in scales.iter_mut().zip(row.chunks(TILE_SIDE)) {
                let bits = tile.iter().fold(largest.to_bits(), |bits, value| magnitude_bits(*value).max(bits));
                *largest = f32::from_bits(bits);
            }
        }
        for largest in scales.iter_mut() {
            *largest = scale_of(scale, *largest);
        }
        for (row, (values, codes)) in values.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)).enumerate() {
            let tiles = values.chunks(TILE_SIDE).zip(codes.chunks_mut(TILE_SIDE)).zip(scales.iter());
            for (tile, ((values, codes), scale)) in tiles.enumerate() {
                let mut scaled = [0.0; TILE_SIDE];
                let scaled = &mut scaled[..values.len()];
                for (scaled, value) in scaled.iter_mut().zip(values) {
                    *scaled = *value / scale;
                }
                let rounding = rounding.skip(row * columns + tile * TILE_SIDE);
                encode_values::<E4m3>(scaled, codes, rounding, Overflow::Saturate);
            }
        }
    }
}

/// The scale of a tile, NaN where its largest magnitude is not finite.
#[inline(always)]
fn scale_of(scale: TileScale, largest: f32) -> f32 {
    match scale {
        TileScale::F32 if largest.is_finite() => tile_f32(largest),
        TileScale::F32 => f32::NAN,
        TileScale::PowerOfTwo => ue8m0_value(tile_ceil(largest)),
    }
}

vectorised! {
    fn decode_band(codes: &[u8], columns: usize, scales: &[f32], values: &mut [f32]) {
        for (values, codes) in values.chunks_exact_mut(columns).zip(codes.chunks_exact(columns)) {
            for ((values, codes), scale) in values.chunks_mut(TILE_SIDE).zip(codes.chunks(TILE_SIDE)).zip(scales) {
                for (value, code) in values.iter_mut().zip(codes) {
                    *value = decode_code::<E4m3>((*code).into()) * *scale;
                }
            }
        }
    }
}
