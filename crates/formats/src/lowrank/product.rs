//! The products of thin factors and a matrix, in a written order of operations so that every machine has the same bits.
//!
//! ```text
//! times_rows   L[k][i] = sum over j of A[i][j] B[k][j]
//! rows_times   R[k][j] = sum over i of L[k][i] A[i][j]
//! combine      the value at (i, j) takes sum over k of P[i][k] Q[k][j]
//! ```
//!
//! All sums are sequential and of f32, ascending in the index summed over. Vectors lie across what is not summed over.

use crate::isa::vectorised;

/// Columns that a product is made of at once: four registers of AVX-512, eight of AVX2.
pub(super) const LANES: usize = 64;
pub(super) type Lanes = [f32; LANES];

/// Rows of the matrix that go by while as many columns of a factor stay in the first-level cache.
const ROWS_AT_ONCE: usize = 16;

/// Directions that are summed at once in `times_rows`, one a lane.
const DIRECTIONS: usize = 16;
/// Rows at once there: as many sums are under way.
const ROWS_SUMMED: usize = 4;
/// Columns at once there: with `DIRECTIONS` numbers each, 16 KiB.
const COLUMNS_SUMMED: usize = 256;

/// What becomes of a value and the product's value at its place.
pub(super) trait Combine: Copy {
    fn combine(self, value: f32, product: f32) -> f32;
}

/// The product takes the value's place.
#[derive(Clone, Copy)]
pub(super) struct Store;

/// The product is subtracted.
#[derive(Clone, Copy)]
pub(super) struct Subtract;

/// `weight` times the product is added.
#[derive(Clone, Copy)]
pub(super) struct Add {
    pub(super) weight: f32,
}

impl Combine for Store {
    #[inline(always)]
    fn combine(self, _: f32, product: f32) -> f32 {
        product
    }
}

impl Combine for Subtract {
    #[inline(always)]
    fn combine(self, value: f32, product: f32) -> f32 {
        value - product
    }
}

impl Combine for Add {
    #[inline(always)]
    fn combine(self, value: f32, product: f32) -> f32 {
        value + self.weight * product
    }
}

/// `target[j] = ((target[j] + c[0] rows[0][j]) + c[1] rows[1][j]) + ...`
#[inline(always)]
fn add_scaled<const N: usize>(target: &mut [f32], coefficients: [f32; N], rows: [&[f32]; N]) {
    let rows = rows.map(|row| &row[..target.len()]);
    for (j, target) in target.iter_mut().enumerate() {
        let mut sum = *target;
        for n in 0..N {
            sum += coefficients[n] * rows[n][j];
        }
        *target = sum;
    }
}

/// As [`add_scaled`] for as many rows as there are coefficients, which lie `stride` apart.
#[inline(always)]
fn add_all_scaled(target: &mut [f32], coefficients: &[f32], rows: &[f32], stride: usize) {
    let (fours, rest) = coefficients.as_chunks::<4>();
    for (four, coefficients) in fours.iter().enumerate() {
        let row = |n: usize| &rows[(4 * four + n) * stride..];
        add_scaled(target, *coefficients, [row(0), row(1), row(2), row(3)]);
    }
    for (n, coefficient) in rest.iter().enumerate() {
        add_scaled(target, [*coefficient], [&rows[(4 * fours.len() + n) * stride..]]);
    }
}

vectorised! {
    /// Adds to `target`, for each coefficient, that times the row, one after another.
    pub(super) fn add_rows(target: &mut [f32], coefficients: &[f32], rows: &[f32]) {
        add_all_scaled(target, coefficients, rows, target.len());
    }
}

vectorised! {
    /// The sum of products, in f64, of 16 partial sums.
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
        let mut sums = [0.0_f64; 16];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
        for (a, b) in a.iter().zip(b) {
            for lane in 0..16 {
                sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
            }
        }
        for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
            sums[lane] += f64::from(*a) * f64::from(*b);
        }
        sums.iter().sum()
    }
}

vectorised! {
    /// The largest magnitude of finite values.
    pub(super) fn largest_magnitude(values: &[f32]) -> f32 {
        f32::from_bits(values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff)))
    }
}

vectorised! {
    /// `left[k][i]`, the products of the rows of `matrix` (m x n) with those of `basis` (r x n).
    pub(super) fn times_rows(matrix: &[f32], basis: &[f32], columns: usize, left: &mut [f32]) {
        let rows = matrix.len() / columns;
        for (basis, left) in basis.chunks(DIRECTIONS * columns).zip(left.chunks_mut(DIRECTIONS * rows)) {
            let mut sums = vec![[0.0; DIRECTIONS]; rows.next_multiple_of(ROWS_SUMMED)];
            for start in (0..columns).step_by(COLUMNS_SUMMED) {
                let width = COLUMNS_SUMMED.min(columns - start);
                let mut panel = [[0.0; DIRECTIONS]; COLUMNS_SUMMED];
                for (k, row) in basis.chunks_exact(columns).enumerate() {
                    for (target, value) in panel.iter_mut().zip(&row[start..start + width]) {
                        target[k] = *value;
                    }
                }
                for (four, sums) in sums.as_chunks_mut::<ROWS_SUMMED>().0.iter_mut().enumerate() {
                    let row = |n: usize| {
                        // Beyond the last row the last one is summed again, into sums that are not used.
                        let row = (ROWS_SUMMED * four + n).min(rows - 1);
                        &matrix[row * columns + start..][..width]
                    };
                    sum_products(sums, [row(0), row(1), row(2), row(3)], &panel[..width]);
                }
            }
            for (k, left) in left.chunks_exact_mut(rows).enumerate() {
                left.iter_mut().zip(&sums).for_each(|(left, sums)| *left = sums[k]);
            }
        }
    }
}

#[inline(always)]
fn sum_products(sums: &mut [[f32; DIRECTIONS]; ROWS_SUMMED], rows: [&[f32]; ROWS_SUMMED], panel: &[[f32; DIRECTIONS]]) {
    let rows = rows.map(|row| &row[..panel.len()]);
    let [mut a, mut b, mut c, mut d] = *sums;
    for (j, directions) in panel.iter().enumerate() {
        let [va, vb, vc, vd] = rows.map(|row| row[j]);
        for k in 0..DIRECTIONS {
            a[k] += va * directions[k];
            b[k] += vb * directions[k];
            c[k] += vc * directions[k];
            d[k] += vd * directions[k];
        }
    }
    *sums = [a, b, c, d];
}

vectorised! {
    /// `right[k][j]` of zeros takes the products of the rows of `left` (r x m) with the columns of `matrix` (m x n).
    pub(super) fn rows_times(left: &[f32], matrix: &[f32], columns: usize, right: &mut [f32]) {
        let rows = matrix.len() / columns;
        for (block, matrix) in matrix.chunks(ROWS_AT_ONCE * columns).enumerate() {
            let first = block * ROWS_AT_ONCE;
            let last = rows.min(first + ROWS_AT_ONCE);
            for start in (0..columns).step_by(COLUMNS_SUMMED) {
                let width = COLUMNS_SUMMED.min(columns - start);
                for (left, right) in left.chunks_exact(rows).zip(right.chunks_exact_mut(columns)) {
                    add_all_scaled(&mut right[start..start + width], &left[first..last], &matrix[start..], columns);
                }
            }
        }
    }
}

vectorised! {
    /// Every value of the matrix, in place, becomes what `combine` makes of it and of the product's.
    pub(super) fn combine<C: Combine>(
        left: &[f32],
        right: &[Lanes],
        rank: usize,
        columns: usize,
        combine: C,
        values: &mut [f32],
    ) {
        let blocks = values.chunks_mut(ROWS_AT_ONCE * columns).zip(left.chunks(ROWS_AT_ONCE * rank));
        for (values, left) in blocks {
            for (chunk, right) in right.chunks_exact(rank).enumerate() {
                let start = chunk * LANES;
                for (row, left) in values.chunks_exact_mut(columns).zip(left.chunks_exact(rank)) {
                    let width = LANES.min(columns - start);
                    let product = product(left, right);
                    for (value, product) in row[start..start + width].iter_mut().zip(&product) {
                        *value = combine.combine(*value, *product);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn product(left: &[f32], right: &[Lanes]) -> Lanes {
    let mut product = right[0].map(|value| left[0] * value);
    add_all_scaled(&mut product, &left[1..], right[1..].as_flattened(), LANES);
    product
}
