//! Two levels for the magnitudes that a sparse block keeps: k-means in one dimension with k = 2, on bf16 levels.
//!
//! Levels and boundary take turns (Lloyd, IEEE Trans. Inf. Theory 1982): a level is the mean of the magnitudes on its side, the boundary
//! the middle of the levels. It begins in the middle of the range: for heavy tails that lies nearer the best boundary than the mean.
//! Eight turns are within 6 % of the best pair's error (`codec::tests`); the means of the smaller and the larger half, the
//! obvious choice, have 1.5 times the best pair's error on Gaussian magnitudes and more than 3 times on Student's t with 3 degrees.

use super::select::KEPT_MAX;
use crate::element::{Bf16, Element, decode_code, magnitude_bits, nearest_magnitude};

const TURNS_MAX: usize = 8;

/// Lanes that are summed apart, in a fixed order: the result is the same on every machine.
const LANES: usize = 16;

/// Sums are of magnitudes / 128, so that they cannot overflow.
const SUM_DIVISOR: f32 = 128.0;
const _: () = assert!(KEPT_MAX <= 128 && KEPT_MAX.is_multiple_of(LANES));

/// The two levels, as bf16 bits with `low <= high`, and the magnitude above which a value takes the high one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Levels {
    pub(super) low: u16,
    pub(super) high: u16,
    pub(super) boundary: f32,
}

/// Levels of the first `kept` magnitudes, which are finite; those behind them are zero.
#[inline(always)]
pub(super) fn levels_of(magnitudes: &[f32; KEPT_MAX], kept: usize) -> Levels {
    let kept_magnitudes = &magnitudes[..kept];
    let least = kept_magnitudes.iter().fold(f32::MAX, |least, magnitude| magnitude.min(least));
    let most = kept_magnitudes.iter().fold(0.0_f32, |most, magnitude| magnitude.max(most));
    let lanes = &magnitudes[..kept.next_multiple_of(LANES)];
    let total = sum_above(lanes, -1.0).0;
    let mut boundary = middle(least, most);
    let (mut low, mut high) = (least, most);
    for _ in 0..TURNS_MAX {
        let (high_sum, high_count) = sum_above(lanes, boundary);
        let low_count = kept as f32 - high_count;
        high = if high_count > 0.0 { high_sum * (SUM_DIVISOR / high_count) } else { most };
        low = if low_count > 0.0 { (total - high_sum) * (SUM_DIVISOR / low_count) } else { least };
        let next = middle(low, high);
        if next == boundary {
            break;
        }
        boundary = next;
    }
    let (low, high) = (bf16_of(low.clamp(least, most)), bf16_of(high.clamp(least, most)));
    Levels { low, high, boundary: middle(level_value(low), level_value(high)) }
}

/// A level's value.
#[inline(always)]
pub(super) fn level_value(bits: u16) -> f32 {
    decode_code::<Bf16>(bits.into())
}

#[inline(always)]
fn bf16_of(level: f32) -> u16 {
    nearest_magnitude::<Bf16>(magnitude_bits(level)).min(Bf16::MAGNITUDE_MAX) as u16
}

#[inline(always)]
fn middle(a: f32, b: f32) -> f32 {
    0.5 * a + 0.5 * b
}

/// Sum, divided by [`SUM_DIVISOR`], and number of the magnitudes above `boundary`.
#[inline(always)]
fn sum_above(magnitudes: &[f32], boundary: f32) -> (f32, f32) {
    let (mut sums, mut counts) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for part in magnitudes.as_chunks::<LANES>().0 {
        for ((sum, count), magnitude) in sums.iter_mut().zip(&mut counts).zip(part) {
            let is_above = *magnitude > boundary;
            *sum += if is_above { *magnitude * const { 1.0 / SUM_DIVISOR } } else { 0.0 };
            *count += if is_above { 1.0 } else { 0.0 };
        }
    }
    (sum_lanes(sums), sum_lanes(counts))
}

#[inline(always)]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
