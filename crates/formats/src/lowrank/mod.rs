//! Deltas as products of two thin factors: what a few steps of AdamW change in a weight matrix is close to low rank.
//!
//! A matrix A of m x n becomes P Q, with P of m x r and Q of r x n, in `r (m + n)` numbers rather than `m n`. An encoding
//! is one warm-started step of subspace iteration (PowerSGD, arXiv 1905.13727): with V the right factor of the
//! encoding before, r x n,
//!
//! ```text
//! P = orthonormal columns of A V^T       then rounded to codes: P'
//! W = (P'^T P')^-1 P'^T A                the least squares for P', so that P's rounding is made good
//! Q = W rounded to codes                 what a receiver has is P' Q
//! V = W with rows of length 1            the start of the next encoding
//! ```
//!
//! Each column of P and each row of Q is one encoding of a block codec, MXFP4 unless another is named. A matrix for
//! which the factors would not be shorter than MXFP4 of its values, as a vector, travels as the latter.
//!
//! The decoded value is `((p[i][0] q[0][j] + p[i][1] q[1][j]) + p[i][2] q[2][j]) + ...`, every product and every sum
//! rounded to f32: the same bits on every machine. So are the encoder's sums written down, lane by lane.
//!
//! Not here: which tensors a fragment has, and what becomes of the residual.

mod factors;
mod product;
#[cfg(test)]
mod tests;

use crate::codec::{CodecKind, DecodeError};
use crate::round::Key;
use factors::{Factors, encode_factors};
use product::{Add, Combine, Store, Subtract};
use std::ops::Range;

/// What matrices travel as that are too small for factors, and what factors are made of.
const VALUES_CODEC: CodecKind = CodecKind::Mxfp4;

/// One tensor of a fragment: rows x columns, row-major. A vector is 1 x n.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixShape {
    /// Rows, m.
    pub rows: usize,
    /// Columns, n: neighbours in memory.
    pub columns: usize,
}

impl MatrixShape {
    /// Values of the matrix.
    pub fn values(self) -> usize {
        self.rows * self.columns
    }
}

/// How the tensors of one fragment travel: made once from their shapes, and the same at every site.
#[derive(Clone, Debug)]
pub struct LowRank {
    matrices: Vec<Matrix>,
    rank: usize,
    codec: CodecKind,
}

/// Where one matrix lies among the values, in the encoding, and, where it has factors, in the basis.
#[derive(Clone, Debug)]
struct Matrix {
    shape: MatrixShape,
    values: Range<usize>,
    encoded: Range<usize>,
    basis: Option<Range<usize>>,
}

/// A sender's warm start: for every matrix with factors, the directions that the last encoding found.
///
/// Receivers need none. A lost one costs some of the energy of the next encodings, nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// r x n for each matrix, one after another.
    rows: Vec<f32>,
}

impl LowRank {
    /// Factors of rank `rank` in MXFP4, 4.25 bits a number.
    ///
    /// # Panics
    /// When `rank` is 0.
    pub fn new(shapes: &[MatrixShape], rank: usize) -> Self {
        Self::with_factors(shapes, rank, VALUES_CODEC)
    }

    /// Factors of rank `rank` in another codec.
    ///
    /// # Panics
    /// When `rank` is 0.
    pub fn with_factors(shapes: &[MatrixShape], rank: usize, codec: CodecKind) -> Self {
        assert!(rank > 0, "factors have at least one column");
        let (mut value, mut byte, mut direction) = (0, 0, 0);
        let mut matrices = Vec::with_capacity(shapes.len());
        for &shape in shapes {
            let whole = VALUES_CODEC.codec().encoded_bytes(shape.values());
            let factors = rank
                * [shape.rows, shape.columns].map(|length| codec.codec().encoded_bytes(length)).iter().sum::<usize>();
            let factored = factors < whole;
            let basis = factored.then(|| take(&mut direction, rank * shape.columns));
            let encoded = take(&mut byte, factors.min(whole));
            matrices.push(Matrix { shape, values: take(&mut value, shape.values()), encoded, basis });
        }
        Self { matrices, rank, codec }
    }

    /// Values of the fragment.
    pub fn values(&self) -> usize {
        self.matrices.last().map_or(0, |matrix| matrix.values.end)
    }

    /// Bytes of an encoding, from the shapes alone.
    pub fn encoded_bytes(&self) -> usize {
        self.matrices.last().map_or(0, |matrix| matrix.encoded.end)
    }

    /// A cold start: random directions, equal for equal seeds.
    pub fn basis(&self, seed: u64) -> Basis {
        let length = self.matrices.iter().filter_map(|matrix| matrix.basis.as_ref()).map(Range::len).sum();
        let random = |index: usize| Key::new(seed, (index as u64 >> 32) as u32).random(index as u32);
        Basis { rows: (0..length).map(|index| random(index) as i32 as f32 / 2_f32.powi(31)).collect() }
    }

    /// Encodes `values`, leaves in their place what the coding lost, `value - decoded` in one f32 subtraction, and in
    /// `basis` the start of the next encoding of this fragment.
    ///
    /// Where a value is not finite, or above about 1e34, the encoding of its matrix is refused by every decoder, its
    /// residual is not a number, and its part of `basis` is as it was.
    ///
    /// # Panics
    /// When a length is not what the shapes say: [`LowRank::values`], [`LowRank::encoded_bytes`], [`LowRank::basis`].
    pub fn encode(&self, values: &mut [f32], basis: &mut Basis, encoded: &mut [u8]) {
        self.assert_values(values);
        for (index, matrix) in self.matrices.iter().enumerate() {
            self.encode_matrix(index, &mut values[matrix.values.clone()], basis, encoded);
        }
    }

    /// Where the values of each matrix lie, in order.
    pub fn matrices(&self) -> impl Iterator<Item = Range<usize>> {
        self.matrices.iter().map(|matrix| matrix.values.clone())
    }

    /// As [`LowRank::encode`] for the values of one matrix; `encoded` is the whole encoding, of which its part is written.
    ///
    /// # Panics
    /// As there, and where there is no such matrix.
    pub fn encode_matrix(&self, index: usize, values: &mut [f32], basis: &mut Basis, encoded: &mut [u8]) {
        assert_eq!(encoded.len(), self.encoded_bytes(), "low rank: the encoding's size is known");
        let matrix = &self.matrices[index];
        assert_eq!(values.len(), matrix.values.len(), "low rank: a matrix has the values of its shape");
        let encoded = &mut encoded[matrix.encoded.clone()];
        let Some(basis_range) = matrix.basis.clone() else {
            VALUES_CODEC.codec().encode(values, encoded);
            return;
        };
        encode_factors(matrix.shape, self.codec.codec(), values, &mut basis.rows[basis_range], encoded);
        match self.factors(index, encoded) {
            Ok(factors) => factors.combine(Subtract, values),
            Err(_) => values.fill(f32::NAN),
        }
    }

    /// Whether `encoded` can be decoded. The other two ask this first, and touch nothing where it fails.
    ///
    /// # Errors
    /// [`DecodeError`]: the length is wrong, a number or a product may not be finite, or no encoder writes such bytes.
    pub fn check(&self, encoded: &[u8]) -> Result<(), DecodeError> {
        let (wanted, found) = (self.encoded_bytes(), encoded.len());
        if wanted != found {
            return Err(DecodeError::MatricesLength { matrices: self.matrices.len(), wanted, found });
        }
        for (index, matrix) in self.matrices.iter().enumerate() {
            let encoded = &encoded[matrix.encoded.clone()];
            if matrix.basis.is_some() {
                self.factors(index, encoded)?;
            } else {
                VALUES_CODEC.codec().check(encoded, matrix.shape.values()).map_err(|error| of_matrix(index, error))?;
            }
        }
        Ok(())
    }

    /// Decodes to finite values.
    ///
    /// # Errors
    /// As [`LowRank::check`]; `values` are then as they were.
    ///
    /// # Panics
    /// When `values` has another length than [`LowRank::values`].
    pub fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        self.assert_values(values);
        self.check(encoded)?;
        self.for_each(encoded, values, Store, |encoded, values| VALUES_CODEC.codec().decode(encoded, values))
    }

    /// `sum[i] += weight * decoded[i]`, the product rounded before the sum, without decoding to memory first.
    ///
    /// For finite weights the bits are those of decoding followed by that line.
    ///
    /// # Errors
    /// As [`LowRank::check`]; `sum` is then as it was.
    ///
    /// # Panics
    /// When `sum` has another length than [`LowRank::values`].
    pub fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError> {
        self.assert_values(sum);
        self.check(encoded)?;
        let values_codec = VALUES_CODEC.codec();
        self.for_each(encoded, sum, Add { weight }, |encoded, sum| values_codec.accumulate(encoded, weight, sum))
    }

    /// As [`LowRank::accumulate`] for the values of one matrix; `encoded` is the whole encoding, of which its part is read and checked.
    ///
    /// # Errors
    /// As there, for that matrix; `sum` is then as it was.
    ///
    /// # Panics
    /// When `sum` has another length than that matrix has values, or there is no such matrix.
    pub fn accumulate_matrix(
        &self,
        index: usize,
        encoded: &[u8],
        weight: f32,
        sum: &mut [f32],
    ) -> Result<(), DecodeError> {
        let (wanted, found) = (self.encoded_bytes(), encoded.len());
        if wanted != found {
            return Err(DecodeError::MatricesLength { matrices: self.matrices.len(), wanted, found });
        }
        let matrix = &self.matrices[index];
        assert_eq!(sum.len(), matrix.values.len(), "low rank: a matrix has the values of its shape");
        let encoded = &encoded[matrix.encoded.clone()];
        if matrix.basis.is_some() {
            self.factors(index, encoded)?.combine(Add { weight }, sum);
            return Ok(());
        }
        VALUES_CODEC.codec().accumulate(encoded, weight, sum).map_err(|error| of_matrix(index, error))
    }

    fn for_each<C: Combine>(
        &self,
        encoded: &[u8],
        values: &mut [f32],
        combine: C,
        whole: impl Fn(&[u8], &mut [f32]) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        for (index, matrix) in self.matrices.iter().enumerate() {
            let (encoded, values) = (&encoded[matrix.encoded.clone()], &mut values[matrix.values.clone()]);
            if matrix.basis.is_some() {
                self.factors(index, encoded)?.combine(combine, values);
            } else {
                whole(encoded, values).map_err(|error| of_matrix(index, error))?;
            }
        }
        Ok(())
    }

    fn factors(&self, index: usize, encoded: &[u8]) -> Result<Factors, DecodeError> {
        let factors = Factors::decode(self.matrices[index].shape, self.rank, self.codec.codec(), encoded)
            .map_err(|error| of_matrix(index, error))?;
        if factors.products_are_finite() { Ok(factors) } else { Err(DecodeError::ProductNotFinite { matrix: index }) }
    }

    fn assert_values(&self, values: &[f32]) {
        assert_eq!(values.len(), self.values(), "low rank: the number of values follows from the shapes");
    }
}

fn of_matrix(matrix: usize, error: DecodeError) -> DecodeError {
    DecodeError::Matrix { matrix, reason: Box::new(error) }
}

/// The next `length` of what `*end` counts.
fn take(end: &mut usize, length: usize) -> Range<usize> {
    let start = *end;
    *end += length;
    start..*end
}
