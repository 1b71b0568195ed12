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
//! An encoding has the size of factors of one rank r for all matrices, but their ranks differ: the bytes go where they take most of the
//! energy ([`ranks`]). Written are two bytes for the rank of each matrix with factors, then all matrices in order, then zeros.
//!
//! The decoded value is `((p[i][0] q[0][j] + p[i][1] q[1][j]) + p[i][2] q[2][j]) + ...`, every product and every sum
//! rounded to f32: the same bits on every machine. So are the encoder's sums written down, lane by lane.
//!
//! Not here: which tensors a fragment has, and what becomes of the residual.

mod factors;
mod product;
mod ranks;
#[cfg(test)]
mod tests;

use crate::codec::{CodecKind, DecodeError};
use crate::round::Key;
use factors::{Factors, Rows, encode_factors};
use product::{Add, Combine, Store, Subtract};
use ranks::{Demand, share_out};
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

/// Bytes that say the rank of one matrix, little-endian, and the largest that they can say.
const RANK_BYTES: usize = 2;
const RANK_MAX: usize = u16::MAX as usize;

/// How the tensors of one fragment travel: made once from their shapes, and the same at every site.
#[derive(Clone, Debug)]
pub struct LowRank {
    matrices: Vec<Matrix>,
    rank: usize,
    codec: CodecKind,
    /// Matrices with factors: the rank of each is at the start of an encoding.
    ranks: usize,
    encoded_bytes: usize,
}

/// Where one matrix lies among the values, and how it travels.
#[derive(Clone, Debug)]
struct Matrix {
    shape: MatrixShape,
    values: Range<usize>,
    way: Way,
}

#[derive(Clone, Copy, Debug)]
enum Way {
    /// As values, of so many bytes.
    Whole { bytes: usize },
    /// As factors; `number` counts the matrices with factors.
    Factors { number: usize, direction_bytes: usize, rank_max: usize },
}

/// Where the matrices lie in one encoding, and of which rank they are there; 0 where they have no factors.
struct Places(Vec<(Range<usize>, usize)>);

/// A sender's warm start: for every matrix with factors, the directions that the last encoding found.
///
/// Receivers need none. A lost one costs some of the energy of the next encodings, nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    seed: u64,
    matrices: Vec<Directions>,
}

/// The directions of one matrix, the strongest first.
#[derive(Clone, Debug, PartialEq)]
struct Directions {
    /// r x n, of length 1 but for the first start.
    rows: Vec<f32>,
    /// Squared lengths that the rows of W had; empty before the first encoding, and r long then.
    squares: Vec<f64>,
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
        assert!((1..=RANK_MAX).contains(&rank), "factors have 1 to {RANK_MAX} columns");
        let (mut value, mut ranks, mut encoded_bytes) = (0, 0, 0);
        let mut matrices = Vec::with_capacity(shapes.len());
        for &shape in shapes {
            let whole = VALUES_CODEC.codec().encoded_bytes(shape.values());
            let direction_bytes =
                [shape.rows, shape.columns].map(|length| codec.codec().encoded_bytes(length)).iter().sum::<usize>();
            let way = if rank * direction_bytes < whole {
                let rank_max = ((whole - 1) / direction_bytes).min(RANK_MAX);
                Way::Factors { number: take(&mut ranks, 1).start, direction_bytes, rank_max }
            } else {
                Way::Whole { bytes: whole }
            };
            encoded_bytes += whole.min(rank * direction_bytes);
            matrices.push(Matrix { shape, values: take(&mut value, shape.values()), way });
        }
        Self { matrices, rank, codec, ranks, encoded_bytes: RANK_BYTES * ranks + encoded_bytes }
    }

    /// Values of the fragment.
    pub fn values(&self) -> usize {
        self.matrices.last().map_or(0, |matrix| matrix.values.end)
    }

    /// Bytes of an encoding, from the shapes alone.
    pub fn encoded_bytes(&self) -> usize {
        self.encoded_bytes
    }

    /// A cold start: random directions, equal for equal seeds; all matrices of the one rank.
    pub fn basis(&self, seed: u64) -> Basis {
        let factored = self.matrices.iter().filter(|matrix| matches!(matrix.way, Way::Factors { .. }));
        let matrices = factored.enumerate().map(|(number, matrix)| {
            let mut directions = Directions { rows: Vec::new(), squares: Vec::new() };
            directions.resize(self.rank, matrix.shape.columns, Key::new(seed, number as u32));
            directions
        });
        Basis { seed, matrices: matrices.collect() }
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
        self.begin(basis, encoded);
        for (index, matrix) in self.matrices.iter().enumerate() {
            self.encode_matrix(index, &mut values[matrix.values.clone()], basis, encoded);
        }
    }

    /// Begins an encoding: decides the rank of each matrix, by what the encoding before has found, and writes it. What is in `encoded` is lost.
    ///
    /// # Panics
    /// As [`LowRank::encode`].
    pub fn begin(&self, basis: &mut Basis, encoded: &mut [u8]) {
        self.assert_encoded(encoded);
        assert_eq!(basis.matrices.len(), self.ranks, "low rank: a basis of these shapes");
        if basis.matrices.iter().all(|directions| !directions.squares.is_empty()) {
            self.share_out(basis);
        }
        encoded.fill(0);
        let ranks = self.factored().zip(&basis.matrices).map(|(shape, of)| of.rows.len() / shape.columns);
        for (place, rank) in encoded.chunks_exact_mut(RANK_BYTES).zip(ranks) {
            // At most RANK_MAX.
            place.copy_from_slice(&(rank as u16).to_le_bytes());
        }
    }

    fn share_out(&self, basis: &mut Basis) {
        let ways = self.matrices.iter().filter_map(|matrix| match matrix.way {
            Way::Factors { direction_bytes, rank_max, .. } => Some((direction_bytes, rank_max)),
            Way::Whole { .. } => None,
        });
        let demands: Vec<Demand<'_>> = ways
            .zip(&basis.matrices)
            .map(|((direction_bytes, rank_max), of)| Demand { direction_bytes, squares: &of.squares, rank_max })
            .collect();
        let ranks = share_out(&demands, demands.iter().map(|demand| demand.direction_bytes * self.rank).sum());
        for (number, ((rank, shape), directions)) in
            ranks.into_iter().zip(self.factored()).zip(&mut basis.matrices).enumerate()
        {
            directions.resize(rank, shape.columns, Key::new(basis.seed, number as u32));
        }
    }

    /// Shapes of the matrices with factors, in order.
    fn factored(&self) -> impl Iterator<Item = MatrixShape> {
        self.matrices.iter().filter(|matrix| matches!(matrix.way, Way::Factors { .. })).map(|matrix| matrix.shape)
    }

    /// Where the values of each matrix lie, in order.
    pub fn matrices(&self) -> impl Iterator<Item = Range<usize>> {
        self.matrices.iter().map(|matrix| matrix.values.clone())
    }

    /// As [`LowRank::encode`] for the values of one matrix; `encoded` is the whole encoding, [begun](LowRank::begin) with this `basis`, of which
    /// its part is written.
    ///
    /// # Panics
    /// As there, and where there is no such matrix.
    pub fn encode_matrix(&self, index: usize, values: &mut [f32], basis: &mut Basis, encoded: &mut [u8]) {
        self.assert_encoded(encoded);
        let matrix = &self.matrices[index];
        assert_eq!(values.len(), matrix.values.len(), "low rank: a matrix has the values of its shape");
        let place = self.own_places(encoded).0.swap_remove(index).0;
        let encoded = &mut encoded[place];
        let Way::Factors { number, .. } = matrix.way else {
            VALUES_CODEC.codec().encode(values, encoded);
            return;
        };
        let Directions { rows, squares } = &mut basis.matrices[number];
        let rank = rows.len() / matrix.shape.columns;
        encode_factors(matrix.shape, self.codec.codec(), values, (rows, squares), encoded);
        match self.factors(index, rank, encoded) {
            Ok(factors) => factors.combine(Subtract, values),
            Err(_) => values.fill(f32::NAN),
        }
    }

    /// Whether `encoded` can be decoded. The other two ask this first, and touch nothing where it fails.
    ///
    /// # Errors
    /// [`DecodeError`]: the length is wrong, a number or a product may not be finite, or no encoder writes such bytes.
    pub fn check(&self, encoded: &[u8]) -> Result<(), DecodeError> {
        for (index, (place, rank)) in self.places(encoded)?.0.into_iter().enumerate() {
            let (encoded, matrix) = (&encoded[place], &self.matrices[index]);
            match matrix.way {
                Way::Factors { .. } => self.rows(index, rank, encoded).map(drop)?,
                Way::Whole { .. } => VALUES_CODEC
                    .codec()
                    .check(encoded, matrix.shape.values())
                    .map_err(|error| of_matrix(index, error))?,
            }
        }
        Ok(())
    }

    /// The sum of the squares of the decoded values, as [`Codec::squared_norm`](crate::Codec::squared_norm) gives it; of a product an upper
    /// bound, which for what an encoder writes is within 1e-4.
    ///
    /// # Errors
    /// As [`LowRank::check`].
    pub fn squared_norm(&self, encoded: &[u8]) -> Result<f64, DecodeError> {
        let mut sum = 0.0;
        for (index, (place, rank)) in self.places(encoded)?.0.into_iter().enumerate() {
            let (encoded, matrix) = (&encoded[place], &self.matrices[index]);
            sum += match matrix.way {
                Way::Factors { .. } => self.rows(index, rank, encoded)?.squared_norm(),
                Way::Whole { .. } => VALUES_CODEC
                    .codec()
                    .squared_norm(encoded, matrix.shape.values())
                    .map_err(|error| of_matrix(index, error))?,
            };
        }
        Ok(sum)
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
        let (place, rank) = self.places(encoded)?.0.swap_remove(index);
        let matrix = &self.matrices[index];
        assert_eq!(sum.len(), matrix.values.len(), "low rank: a matrix has the values of its shape");
        let encoded = &encoded[place];
        if let Way::Factors { .. } = matrix.way {
            self.factors(index, rank, encoded)?.combine(Add { weight }, sum);
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
        for (index, (place, rank)) in self.places(encoded)?.0.into_iter().enumerate() {
            let matrix = &self.matrices[index];
            let (encoded, values) = (&encoded[place], &mut values[matrix.values.clone()]);
            match matrix.way {
                Way::Factors { .. } => self.factors(index, rank, encoded)?.combine(combine, values),
                Way::Whole { .. } => whole(encoded, values).map_err(|error| of_matrix(index, error))?,
            }
        }
        Ok(())
    }

    /// Where the matrices lie in bytes that may be anybody's.
    fn places(&self, encoded: &[u8]) -> Result<Places, DecodeError> {
        let (wanted, found) = (self.encoded_bytes(), encoded.len());
        if wanted != found {
            return Err(DecodeError::MatricesLength { matrices: self.matrices.len(), wanted, found });
        }
        for (index, matrix) in self.matrices.iter().enumerate() {
            if let Way::Factors { number, rank_max, .. } = matrix.way
                && !(1..=rank_max).contains(&written_rank(encoded, number))
            {
                return Err(DecodeError::Rank { matrix: index, rank: written_rank(encoded, number), most: rank_max });
            }
        }
        let places = self.own_places(encoded);
        let end = places.0.last().map_or(0, |(place, _)| place.end);
        if end > encoded.len() {
            return Err(DecodeError::Ranks { wanted: end, found });
        }
        if encoded[end..].iter().any(|byte| *byte != 0) {
            return Err(DecodeError::AfterLastMatrix);
        }
        Ok(places)
    }

    /// Where the matrices lie in an encoding whose ranks are right.
    fn own_places(&self, encoded: &[u8]) -> Places {
        let mut end = RANK_BYTES * self.ranks;
        let places = self.matrices.iter().map(|matrix| match matrix.way {
            Way::Factors { number, direction_bytes, .. } => {
                let rank = written_rank(encoded, number);
                (take(&mut end, rank * direction_bytes), rank)
            }
            Way::Whole { bytes } => (take(&mut end, bytes), 0),
        });
        Places(places.collect())
    }

    fn factors(&self, index: usize, rank: usize, encoded: &[u8]) -> Result<Factors, DecodeError> {
        self.rows(index, rank, encoded).map(|rows| Factors::new(&rows))
    }

    fn rows(&self, index: usize, rank: usize, encoded: &[u8]) -> Result<Rows, DecodeError> {
        let rows = Rows::decode(self.matrices[index].shape, rank, self.codec.codec(), encoded)
            .map_err(|error| of_matrix(index, error))?;
        if rows.products_are_finite() { Ok(rows) } else { Err(DecodeError::ProductNotFinite { matrix: index }) }
    }

    fn assert_encoded(&self, encoded: &[u8]) {
        assert_eq!(encoded.len(), self.encoded_bytes(), "low rank: the encoding's size is known");
    }

    fn assert_values(&self, values: &[f32]) {
        assert_eq!(values.len(), self.values(), "low rank: the number of values follows from the shapes");
    }
}

impl Directions {
    /// Gives up the weakest, or adds random ones.
    fn resize(&mut self, rank: usize, columns: usize, key: Key) {
        let random = |index: usize| key.random(index as u32) as i32 as f32 / 2_f32.powi(31);
        let had = self.rows.len();
        self.rows.truncate(rank * columns);
        self.rows.extend((had..rank * columns).map(random));
    }
}

/// The rank that an encoding has for the matrix with factors of that number.
fn written_rank(encoded: &[u8], number: usize) -> usize {
    usize::from(u16::from_le_bytes([encoded[RANK_BYTES * number], encoded[RANK_BYTES * number + 1]]))
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
