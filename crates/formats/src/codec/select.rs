//! The largest magnitudes of a block of 4,096, exactly, in a few passes that do not branch on a value.
//!
//! 1. The block as rows of C columns, C no less than the entries wanted: the greatest magnitude of each column. At least C
//!    values reach the least of these C.
//! 2. The values that reach it are the candidates: about 280 of Gaussian or Laplacian values with C = 64, for the least of
//!    64 maxima of 64 draws lies at their 93rd percentile; about 600 with C = 128; all 4,096 when all are equal.
//! 3. The threshold that exactly as many candidates reach as are wanted, by bisection on the bits of the magnitudes.
//!
//! Magnitudes are compared as integers: the bits of an f32 without its sign are ordered as the magnitudes are, and NaN
//! is simply the largest, so that nothing here can go astray on it.

use crate::element::magnitude_bits;

/// Values of a block: indices take 12 bits.
pub(super) const BLOCK_VALUES: usize = 4_096;

/// Most values that are kept of one block, by any format.
pub(super) const KEPT_MAX: usize = 96;

/// Values that are compared with the threshold at once: a bit of a word for each.
const ROW_VALUES: usize = 64;

/// Magnitudes and indices that may belong to the largest, by index. Made once for many blocks.
pub(super) struct Candidates {
    magnitudes: [u32; BLOCK_VALUES],
    indices: [u16; BLOCK_VALUES],
}

impl Candidates {
    pub(super) const fn new() -> Self {
        Self { magnitudes: [0; BLOCK_VALUES], indices: [0; BLOCK_VALUES] }
    }
}

/// Writes the indices of the `kept` largest magnitudes, in ascending order; of equal ones the first are taken.
///
/// Returns the bits of the largest magnitude of all. `COLUMNS` is a divisor of 4,096.
#[inline(always)]
pub(super) fn select<const COLUMNS: usize>(
    values: &[f32; BLOCK_VALUES],
    kept: usize,
    candidates: &mut Candidates,
    indices: &mut [u16; KEPT_MAX],
) -> u32 {
    debug_assert!(kept <= COLUMNS, "each column has a candidate, so there are enough");
    let maxima = column_maxima::<COLUMNS>(values);
    let floor = maxima.iter().fold(u32::MAX, |least, magnitude| least.min(*magnitude));
    let largest = maxima.iter().fold(0, |most, magnitude| most.max(*magnitude));
    let count = find_candidates(values, floor, candidates);
    let magnitudes = &candidates.magnitudes[..count];
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
fn column_maxima<const COLUMNS: usize>(values: &[f32; BLOCK_VALUES]) -> [u32; COLUMNS] {
    let mut maxima = [0; COLUMNS];
    for row in values.as_chunks::<COLUMNS>().0 {
        for (largest, value) in maxima.iter_mut().zip(row) {
            *largest = magnitude_bits(*value).max(*largest);
        }
    }
    maxima
}

/// Gathers the values that reach `floor`, and returns how many they are.
#[inline(always)]
fn find_candidates(values: &[f32; BLOCK_VALUES], floor: u32, candidates: &mut Candidates) -> usize {
    let mut count = 0;
    for (row, row_values) in values.as_chunks::<ROW_VALUES>().0.iter().enumerate() {
        let mut found = reaching_bits(row_values, floor);
        while found != 0 {
            let column = found.trailing_zeros() as usize;
            candidates.magnitudes[count % BLOCK_VALUES] = magnitude_bits(row_values[column % ROW_VALUES]);
            candidates.indices[count % BLOCK_VALUES] = (row * ROW_VALUES + column) as u16;
            count += 1;
            found &= found - 1;
        }
    }
    count
}

/// Bit i is set where the i-th value reaches `floor`.
#[inline(always)]
fn reaching_bits(row: &[f32; ROW_VALUES], floor: u32) -> u64 {
    let mut flags = [0_u8; ROW_VALUES];
    for (flag, value) in flags.iter_mut().zip(row) {
        *flag = u8::from(magnitude_bits(*value) >= floor);
    }
    let mut found = 0;
    for (index, eight) in flags.as_chunks::<8>().0.iter().enumerate() {
        // The product moves bit 0 of byte b to bit 56 + b; no two of its terms meet there or below.
        let bits = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        found |= bits << (8 * index);
    }
    found
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
