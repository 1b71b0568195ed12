//! The two factors of one matrix: found, rounded to codes, and read back.
//!
//! Written are the r columns of P, then the r rows of Q, each a whole encoding of its own: no block of values that share
//! a scale holds numbers of two columns, whose sizes differ.
//!
//! Sums over rows and columns that decide which directions are kept (lengths, projections, the r x r system of the
//! least squares) are of f64.

use super::MatrixShape;
use super::product::{self, Combine, LANES, Lanes};
use crate::codec::{Codec, DecodeError};
use crate::isa::Isa;

/// A column of which less than this share is left after the earlier ones are projected out holds rounding errors of f32
/// alone: 2^-24 of a few hundred products, with room. Squared, for squared lengths are compared.
const DEPENDENT_SQUARED: f64 = 1e-10;

/// "Twice is enough" (Parlett, after Kahan): below this share of the squared length the projection is done again.
const PROJECTED_AGAIN_SQUARED: f64 = 0.25;

/// The share of a diagonal entry of `P'^T P'` below which its column is taken to depend on those before it.
const PIVOT_MIN: f64 = 1e-6;

/// Finds and writes the factors of `values`; `basis` is the right factor of the encoding before, r x n, and then of this one, the strongest
/// row first; `squares` are then the squared lengths that its rows had.
pub(super) fn encode_factors(
    shape: MatrixShape,
    codec: &dyn Codec,
    values: &[f32],
    (basis, squares): (&mut [f32], &mut Vec<f64>),
    encoded: &mut [u8],
) {
    let rank = basis.len() / shape.columns;
    let (left_encoded, right_encoded) = encoded.split_at_mut(rank * codec.encoded_bytes(shape.rows));
    let mut left = vec![0.0; rank * shape.rows];
    product::times_rows(Isa::best(), values, basis, shape.columns, &mut left);
    orthonormalise(&mut left, shape.rows);
    round_to_codes(codec, &mut left, shape.rows, left_encoded);
    let mut right = vec![0.0; rank * shape.columns];
    product::rows_times(Isa::best(), &left, values, shape.columns, &mut right);
    solve_least_squares(&left, shape.rows, &mut right, shape.columns);
    renew(basis, squares, &right, shape.columns);
    write_rows(codec, &mut right, shape.columns, right_encoded);
}

/// Makes the rows orthonormal, by the modified Gram-Schmidt process; those that depend on earlier ones become 0.
fn orthonormalise(rows: &mut [f32], length: usize) {
    let isa = Isa::best();
    for index in 0..rows.len() / length {
        let (earlier, rest) = rows.split_at_mut(index * length);
        let row = &mut rest[..length];
        let before = product::dot(isa, row, row);
        let mut after = before;
        // A length that is not a number fails all comparisons, and then makes the whole row so: decoders refuse it.
        for _ in 0..2 {
            let start = after;
            for other in earlier.chunks_exact(length) {
                let projection = product::dot(isa, row, other) as f32;
                product::add_rows(isa, row, &[-projection], other);
            }
            after = product::dot(isa, row, row);
            if after > PROJECTED_AGAIN_SQUARED * start {
                break;
            }
        }
        let gone = after <= DEPENDENT_SQUARED * before || after.sqrt() <= f64::from(f32::MIN_POSITIVE);
        let scale = if gone { 0.0 } else { (1.0 / after.sqrt()) as f32 };
        row.iter_mut().for_each(|value| *value *= scale);
    }
}

/// Writes the rows, and leaves in their place what a receiver reads: not numbers where it refuses them.
fn round_to_codes(codec: &dyn Codec, rows: &mut [f32], length: usize, encoded: &mut [u8]) {
    write_rows(codec, rows, length, encoded);
    if read_rows(codec, encoded, length, rows).is_err() {
        rows.fill(f32::NAN);
    }
}

/// Writes the rows; the residuals that are left in their place are of no use.
fn write_rows(codec: &dyn Codec, rows: &mut [f32], length: usize, encoded: &mut [u8]) {
    let row_bytes = codec.encoded_bytes(length);
    for (row, encoded) in rows.chunks_exact_mut(length).zip(encoded.chunks_exact_mut(row_bytes)) {
        codec.encode(row, encoded);
    }
}

fn read_rows(codec: &dyn Codec, encoded: &[u8], length: usize, rows: &mut [f32]) -> Result<(), DecodeError> {
    let row_bytes = codec.encoded_bytes(length);
    for (row, encoded) in rows.chunks_exact_mut(length).zip(encoded.chunks_exact(row_bytes)) {
        codec.decode(encoded, row)?;
    }
    Ok(())
}

/// `right := (left left^T)^-1 right` by Cholesky's L L^T, for factors stored as rows. Rows of zeros stay 0.
fn solve_least_squares(left: &[f32], rows: usize, right: &mut [f32], columns: usize) {
    let rank = right.len() / columns;
    let lower = cholesky(left, rows, rank);
    let isa = Isa::best();
    let scale = |row: &mut [f32], pivot: f64| {
        let inverse = if pivot == 0.0 { 0.0 } else { (1.0 / pivot) as f32 };
        row.iter_mut().for_each(|value| *value *= inverse);
    };
    for k in 0..rank {
        let (solved, rest) = right.split_at_mut(k * columns);
        for (l, other) in solved.chunks_exact(columns).enumerate() {
            product::add_rows(isa, &mut rest[..columns], &[-lower[k * rank + l] as f32], other);
        }
        scale(&mut rest[..columns], lower[k * rank + k]);
    }
    for k in (0..rank).rev() {
        let (rest, solved) = right.split_at_mut((k + 1) * columns);
        let row = &mut rest[k * columns..];
        for (l, other) in solved.chunks_exact(columns).enumerate() {
            product::add_rows(isa, row, &[-lower[(k + 1 + l) * rank + k] as f32], other);
        }
        scale(row, lower[k * rank + k]);
    }
}

/// The lower triangle L of `left left^T = L L^T`, rank x rank; columns of 0 where a row is 0 or depends on earlier ones.
fn cholesky(left: &[f32], length: usize, rank: usize) -> Vec<f64> {
    let isa = Isa::best();
    let row = |k: usize| &left[k * length..(k + 1) * length];
    let mut lower = vec![0.0; rank * rank];
    for k in 0..rank {
        for i in k..rank {
            let earlier: f64 = (0..k).map(|l| lower[i * rank + l] * lower[k * rank + l]).sum();
            let entry = product::dot(isa, row(i), row(k));
            let rest = entry - earlier;
            lower[i * rank + k] = if i > k {
                let pivot = lower[k * rank + k];
                if pivot == 0.0 { 0.0 } else { rest / pivot }
            } else if rest <= PIVOT_MIN * entry {
                0.0
            } else {
                rest.sqrt()
            };
        }
    }
    lower
}

/// Gives `basis` the directions of `right`, and `squares` their squared lengths; both from the longest on. A direction that vanished keeps what
/// it was: it may find something in the next delta. Where all have, or a length is not finite, nothing changes.
fn renew(basis: &mut [f32], squares: &mut Vec<f64>, right: &[f32], columns: usize) {
    let found: Vec<f64> = right.chunks_exact(columns).map(|row| product::dot(Isa::best(), row, row)).collect();
    if found.iter().any(|square| !square.is_finite()) || found.iter().all(|square| *square == 0.0) {
        return;
    }
    for ((basis, right), square) in basis.chunks_exact_mut(columns).zip(right.chunks_exact(columns)).zip(&found) {
        let length = square.sqrt();
        if length > f64::from(f32::MIN_POSITIVE) {
            let scale = (1.0 / length) as f32;
            basis.iter_mut().zip(right).for_each(|(basis, right)| *basis = right * scale);
        }
    }
    let mut order: Vec<usize> = (0..found.len()).collect();
    order.sort_by(|a, b| found[*b].total_cmp(&found[*a]));
    let rows: Vec<f32> = order.iter().flat_map(|row| &basis[row * columns..(row + 1) * columns]).copied().collect();
    basis.copy_from_slice(&rows);
    squares.clear();
    squares.extend(order.iter().map(|row| found[*row]));
}

/// Roundings, in units of f32's, that [`Rows::squared_norm`] allows for beside the one of each direction: those of its own sums in f64, which
/// are `(m + n) / 16 + 40` of 2^-53 of the square; for m + n up to 2^20 their root is 2^-18.5.
const NORM_SLACK: f64 = 64.0;

/// What f32 rounds a sum by, relative to its terms.
const F32_ROUNDING: f64 = 1.0 / (1_u32 << 24) as f64;

/// Factors as they are written: the columns of P and the rows of Q, each as a row.
pub(super) struct Rows {
    shape: MatrixShape,
    rank: usize,
    /// r x m
    left: Vec<f32>,
    /// r x n
    right: Vec<f32>,
}

impl Rows {
    pub(super) fn decode(
        shape: MatrixShape,
        rank: usize,
        codec: &dyn Codec,
        encoded: &[u8],
    ) -> Result<Self, DecodeError> {
        let MatrixShape { rows, columns } = shape;
        let (left_encoded, right_encoded) = encoded.split_at(rank * codec.encoded_bytes(rows));
        let (mut left, mut right) = (vec![0.0; rank * rows], vec![0.0; rank * columns]);
        read_rows(codec, left_encoded, rows, &mut left)?;
        read_rows(codec, right_encoded, columns, &mut right)?;
        Ok(Self { shape, rank, left, right })
    }

    /// Whether no sum of products can be infinite, by the largest magnitudes of the two; half of f32's range is for rounding.
    pub(super) fn products_are_finite(&self) -> bool {
        let largest = |values: &[f32]| f64::from(product::largest_magnitude(Isa::best(), values));
        let bound = largest(&self.left) * largest(&self.right) * self.rank as f64;
        bound <= f64::from(f32::MAX) / 2.0
    }

    /// The squared norm of the product, without making it, for `r^2 (m + n)` operations instead of `r m n`:
    ///
    /// ```text
    /// |P Q|^2 = tr((P^T P) (Q Q^T)) = sum over k, l of (p_k . p_l) (q_k . q_l)
    /// ```
    ///
    /// Directions that nearly cancel leave less of that than f32 rounds the product by: a liar could choose them so, and send something
    /// large whose norm says 0. Hence what is given is an upper bound: the norm, and as many roundings of the sum of `|p_k| |q_k|` as a value
    /// of the product can have. To an honest encoding, whose p_k are orthonormal but for their codes, that adds less than 1e-4.
    pub(super) fn squared_norm(&self) -> f64 {
        let isa = Isa::best();
        let left = |k: usize| &self.left[k * self.shape.rows..(k + 1) * self.shape.rows];
        let right = |k: usize| &self.right[k * self.shape.columns..(k + 1) * self.shape.columns];
        let (mut trace, mut lengths) = (0.0_f64, 0.0_f64);
        for k in 0..self.rank {
            let square = product::dot(isa, left(k), left(k)) * product::dot(isa, right(k), right(k));
            trace += square;
            lengths += square.sqrt();
            for l in k + 1..self.rank {
                trace += 2.0 * (product::dot(isa, left(k), left(l)) * product::dot(isa, right(k), right(l)));
            }
        }
        let roundings = (self.rank as f64 + NORM_SLACK) * F32_ROUNDING;
        let norm = trace.max(0.0).sqrt() + roundings * lengths;
        norm * norm
    }
}

/// Factors laid out for their product.
pub(super) struct Factors {
    rank: usize,
    columns: usize,
    /// m x r, row-major.
    left: Vec<f32>,
    /// For every [`LANES`] columns, r rows of that many; zeros beyond the last column.
    right: Vec<Lanes>,
}

impl Factors {
    pub(super) fn new(Rows { shape, rank, left: left_rows, right: right_rows }: &Rows) -> Self {
        let (MatrixShape { rows, columns }, rank) = (*shape, *rank);
        let mut left = vec![0.0; rank * rows];
        for (k, row) in left_rows.chunks_exact(rows).enumerate() {
            for (i, value) in row.iter().enumerate() {
                left[i * rank + k] = *value;
            }
        }
        let mut right = vec![[0.0; LANES]; columns.div_ceil(LANES) * rank];
        for (k, row) in right_rows.chunks_exact(columns).enumerate() {
            for (chunk, values) in row.chunks(LANES).enumerate() {
                right[chunk * rank + k][..values.len()].copy_from_slice(values);
            }
        }
        Self { rank, columns, left, right }
    }

    /// Gives every value of the matrix, and the product's there, to `combine`.
    pub(super) fn combine<C: Combine>(&self, combine: C, values: &mut [f32]) {
        product::combine::<C>(Isa::best(), &self.left, &self.right, self.rank, self.columns, combine, values);
    }
}

#[cfg(test)]
impl Factors {
    pub(super) fn left_of(&self, i: usize, k: usize) -> f32 {
        self.left[i * self.rank + k]
    }

    pub(super) fn right_of(&self, k: usize, j: usize) -> f32 {
        self.right[j / LANES * self.rank + k][j % LANES]
    }
}
