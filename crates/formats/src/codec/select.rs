//! The largest magnitudes of a block of 4,096, exactly, in a few passes that do not branch on a value.
//!
//! 1. The block as 64 rows of 64: the greatest magnitude of each column. At least 64 values reach the least of these 64.
//! 2. The values that reach it are the candidates: about 280 of Gaussian or Laplacian values, for the least of 64 maxima
//!    of 64 draws lies at their 93rd percentile; all 4,096 when all are equal.
//! 3. The threshold that exactly as many candidates reach as are wanted, by bisection on the bits of the magnitudes.
//!
//! Magnitudes are compared as integers: the bits of an f32 without its sign are ordered as the magnitudes are, and NaN
//! is simply the largest, so that nothing here can go astray on it.

use crate::element::magnitude_bits;

/// Values of a block: indices take 12 bits.
pub(super) const BLOCK_VALUES: usize = 4_096;

/// Most values that are kept of one block.
pub(super) const KEPT_MAX: usize = 64;

const COLUMNS: usize = 64;
const _: () = assert!(COLUMNS >= KEPT_MAX, "each column has a candidate, so there are enough");

/// Magnitudes and indices that may belong to the largest, by index.
struct Candidates {
    magnitudes: [u32; BLOCK_VALUES],
    indices: [u16; BLOCK_VALUES],
    count: usize,
}

/// Writes the indices of the `kept` largest magnitudes, in ascending order; of equal ones the first are taken.
///
/// Returns the bits of the largest magnitude of all.
#[inline(always)]
pub(super) fn select(values: &[f32; BLOCK_VALUES], kept: usize, indices: &mut [u16; KEPT_MAX]) -> u32 {
    let maxima = column_maxima(values);
    let floor = maxima.iter().fold(u32::MAX, |least, magnitude| least.min(*magnitude));
    let largest = maxima.iter().fold(0, |most, magnitude| most.max(*magnitude));
    let candidates = candidates_from(values, floor);
    let magnitudes = &candidates.magnitudes[..candidates.count];
    let (threshold, mut equal_wanted) = threshold_of(magnitudes, kept, floor, largest);
    let mut written = 0;
    for (magnitude, index) in magnitudes.iter().zip(&candidates.indices) {
        let is_equal = *magnitude == threshold;
        let is_taken = (*magnitude > threshold) | (is_equal & (equal_wanted > 0));
        equal_wanted -= usize::from(is_equal & is_taken);
        // Written without a branch; once all are taken there is no slot left, or none is taken any more.
        if let Some(slot) = indices.get_mut(written) {
            *slot = if is_taken { *index } else { *slot };
        }
        written += usize::from(is_taken);
    }
    debug_assert_eq!(written, kept);
    largest
}

#[inline(always)]
fn column_maxima(values: &[f32; BLOCK_VALUES]) -> [u32; COLUMNS] {
    let mut maxima = [0; COLUMNS];
    for row in values.as_chunks::<COLUMNS>().0 {
        for (largest, value) in maxima.iter_mut().zip(row) {
            *largest = magnitude_bits(*value).max(*largest);
        }
    }
    maxima
}

#[inline(always)]
fn candidates_from(values: &[f32; BLOCK_VALUES], floor: u32) -> Candidates {
    let mut candidates = Candidates { magnitudes: [0; BLOCK_VALUES], indices: [0; BLOCK_VALUES], count: 0 };
    for (index, value) in (0_u16..).zip(values) {
        let magnitude = magnitude_bits(*value);
        candidates.magnitudes[candidates.count % BLOCK_VALUES] = magnitude;
        candidates.indices[candidates.count % BLOCK_VALUES] = index;
        candidates.count += usize::from(magnitude >= floor);
    }
    candidates
}

/// A threshold, and how many of the magnitudes equal to it belong to the `kept` largest; all larger ones do.
///
/// At least `kept` magnitudes reach `floor`, and none exceeds `largest`.
#[inline(always)]
fn threshold_of(magnitudes: &[u32], kept: usize, floor: u32, largest: u32) -> (u32, usize) {
    let reaching = |threshold: u32| magnitudes.iter().map(|magnitude| u32::from(*magnitude >= threshold)).sum::<u32>();
    // Enough reach `low`, too few reach `high`.
    let (mut low, mut high) = (floor, largest + 1);
    let wanted = kept as u32;
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let count = reaching(middle);
        if count == wanted {
            return (middle, kept);
        }
        *(if count > wanted { &mut low } else { &mut high }) = middle;
    }
    (low, kept - reaching(high) as usize)
}
