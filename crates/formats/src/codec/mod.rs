//! How a fragment's values become bytes on a link, and what that loses.
//!
//! A codec's encoding has a size that follows from the number of values alone, and is a sequence of blocks, each with its
//! scale beside its codes: whole blocks of values are whole ranges of bytes, so that sites can merge a part each.
//!
//! | codec | block, values | bytes of a block | bits a value |
//! |---|---|---|---|
//! | f32 | 1 | 4 | 32 |
//! | bf16 | 1 | 2 | 16 |
//! | int8 | 128 | bf16 scale, 128 codes | 8.125 |
//! | mxfp4 | 32 | UE8M0 scale, 32 codes E2M1 | 4.25 |
//! | e3m0 | 128 | UE8M0 scale, 128 codes E3M0 | 4.0625 |
//! | sparse96 | 4,096 | two bf16 levels, 96 indices in 88 bytes, 96 codes of 2 bits | 0.2266 |
//! | sparse | 4,096 | two bf16 levels, 64 indices of 12 bits, 64 codes of 2 bits | 0.2266 |
//!
//! Encoding leaves `value - decode(encoded)` where the values were. Error feedback is the caller's: it keeps that
//! residual, times its decay, and adds it to the next delta. Errors measured are in `docs/formats.md`.

mod blocks4;
mod dense;
mod indices;
mod int8;
mod levels;
mod select;
mod sparse;
#[cfg(test)]
pub(crate) mod tests;

pub use dense::all_finite;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use thiserror::Error;

/// How a fragment's values travel, from the least lossy on: the order of [`Ord`] is that of the loss on Gaussian values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CodecKind {
    /// The values themselves.
    F32,
    /// Each value's upper half, rounded to nearest even.
    Bf16,
    /// 8-bit integers, with a bf16 scale for each 128.
    Int8,
    /// OCP MXFP4: E2M1 with a power of two for each 32.
    Mxfp4,
    /// Powers of two: E3M0, with a power of two for each 128.
    E3m0,
    /// The 96 largest of each 4,096, as sign and one of two levels: as many bytes as `Sparse`, with shorter indices.
    Sparse96,
    /// The 64 largest of each 4,096, as sign and one of two levels, as SparseLoCo sends them.
    Sparse,
}

impl CodecKind {
    /// All kinds, from the least lossy on.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::Bf16, Self::Int8, Self::Mxfp4, Self::E3m0, Self::Sparse96, Self::Sparse];

    /// The codec of this kind.
    pub fn codec(self) -> &'static dyn Codec {
        match self {
            Self::F32 => &dense::F32Codec,
            Self::Bf16 => &dense::Bf16Codec,
            Self::Int8 => &int8::Int8Codec,
            Self::Mxfp4 => &blocks4::MXFP4,
            Self::E3m0 => &blocks4::E3M0,
            Self::Sparse96 => &sparse::SPARSE96,
            Self::Sparse => &sparse::SPARSE,
        }
    }

    /// As a configuration writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Mxfp4 => "mxfp4",
            Self::E3m0 => "e3m0",
            Self::Sparse96 => "sparse96",
            Self::Sparse => "sparse",
        }
    }
}

impl fmt::Display for CodecKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

/// A name that is not a codec's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("there is no codec {0:?}: f32, bf16, int8, mxfp4, e3m0, sparse96 and sparse are known")]
pub struct UnknownCodec(pub String);

impl FromStr for CodecKind {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| UnknownCodec(text.to_owned()))
    }
}

/// Why bytes are not an encoding that this codec makes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The length does not follow from the number of values.
    #[error("{codec}: {values} values are {wanted} bytes, and {found} came")]
    Length {
        /// The codec.
        codec: CodecKind,
        /// Values that were to be decoded.
        values: usize,
        /// Bytes that they take.
        wanted: usize,
        /// Bytes that came.
        found: usize,
    },
    /// A value is infinite or not a number, or its block's scale is: so was what the sender encoded.
    #[error("{codec}: infinite, or not a number, in the block of value {value}")]
    NotFinite {
        /// The codec.
        codec: CodecKind,
        /// First value of the block.
        value: usize,
    },
    /// No encoder writes this.
    #[error("{codec}: {what} in the block of value {value}")]
    Malformed {
        /// The codec.
        codec: CodecKind,
        /// First value of the block.
        value: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The length of a low-rank encoding does not follow from the shapes.
    #[error("low rank: {matrices} matrices are {wanted} bytes, and {found} came")]
    MatricesLength {
        /// Matrices that were to be decoded.
        matrices: usize,
        /// Bytes that they take.
        wanted: usize,
        /// Bytes that came.
        found: usize,
    },
    /// A low-rank encoding gives a matrix a rank that none can have.
    #[error("low rank, matrix {matrix}: rank {rank}, and 1 to {most} are possible")]
    Rank {
        /// Which one, in the order of the shapes.
        matrix: usize,
        /// What it says.
        rank: usize,
        /// The largest rank with which factors are shorter than the matrix.
        most: usize,
    },
    /// The ranks of a low-rank encoding together take more than it has.
    #[error("low rank: matrices of these ranks are {wanted} bytes, and {found} came")]
    Ranks {
        /// Bytes that they take.
        wanted: usize,
        /// Bytes that came.
        found: usize,
    },
    /// A low-rank encoding ends in zeros.
    #[error("low rank: something follows the last matrix")]
    AfterLastMatrix,
    /// A matrix of a low-rank encoding, or one of its factors, is not an encoding.
    #[error("low rank, matrix {matrix}: {reason}")]
    Matrix {
        /// Which one, in the order of the shapes.
        matrix: usize,
        /// What is wrong with it; values are counted within the factor's row or column.
        reason: Box<DecodeError>,
    },
    /// The factors of a matrix are so large that their product may be infinite.
    #[error("low rank, matrix {matrix}: the product of the factors may be infinite")]
    ProductNotFinite {
        /// Which one, in the order of the shapes.
        matrix: usize,
    },
}

/// One way to carry f32 values as bytes. Shapes: `values` and `sum` are flat; `encoded` is [`Codec::encoded_bytes`] long.
///
/// Values that are not finite are never coded by a caller that is right. Where one is, the encoding is made all the same
/// and every decoder refuses it.
pub trait Codec: Send + Sync + fmt::Debug {
    /// Which one this is.
    fn kind(&self) -> CodecKind;

    /// Bytes of an encoding, known before one is taken.
    fn encoded_bytes(&self, values: usize) -> usize;

    /// Values that share a scale: the grain of [`Codec::encoded_range`].
    fn block_values(&self) -> usize;

    /// Encodes `values`, and leaves in their place what the coding lost: `value - decoded`, one f32 subtraction.
    ///
    /// # Panics
    /// When `encoded` has another length than [`Codec::encoded_bytes`] tells: sizes are known beforehand.
    fn encode(&self, values: &mut [f32], encoded: &mut [u8]);

    /// Whether `encoded` can be decoded to `values` values. The other two ask this first, and touch nothing where it fails.
    ///
    /// # Errors
    /// [`DecodeError`]: the length is wrong, a value is not finite, or no encoder writes such bytes.
    fn check(&self, encoded: &[u8], values: usize) -> Result<(), DecodeError>;

    /// Decodes to finite values.
    ///
    /// # Errors
    /// As [`Codec::check`]; `values` are then as they were.
    fn decode(&self, encoded: &[u8], values: &mut [f32]) -> Result<(), DecodeError>;

    /// `sum[i] += weight * decoded[i]`, the product rounded before the sum, without decoding to memory first.
    ///
    /// For finite weights and sums without -0.0 the bits are those of decoding followed by that line; `sparse` leaves
    /// entries alone that it decodes to 0.
    ///
    /// # Errors
    /// As [`Codec::check`]; `sum` is then as it was.
    fn accumulate(&self, encoded: &[u8], weight: f32, sum: &mut [f32]) -> Result<(), DecodeError>;

    /// The sum of the squares of the decoded values, in f64 and in a fixed order: the same bits for the same bytes on every machine. Not that of
    /// the parts added up, which are other roundings.
    ///
    /// # Errors
    /// As [`Codec::check`].
    fn squared_norm(&self, encoded: &[u8], values: usize) -> Result<f64, DecodeError>;

    /// Where, in the encoding of `total` values, the encoding of `values` lies: itself a whole encoding of that many.
    ///
    /// # Panics
    /// When the range does not begin and end at multiples of [`Codec::block_values`] or at `total`.
    fn encoded_range(&self, values: Range<usize>, total: usize) -> Range<usize> {
        let block = self.block_values();
        assert!(values.start <= values.end && values.end <= total, "{values:?} lies within {total} values");
        for end in [values.start, values.end] {
            assert!(end == total || end.is_multiple_of(block), "{values:?} of {total} cuts a block of {block}");
        }
        self.encoded_bytes(values.start)..self.encoded_bytes(values.end)
    }
}

/// The check that every codec begins with.
fn check_length(codec: &dyn Codec, encoded: &[u8], values: usize) -> Result<(), DecodeError> {
    let (wanted, found) = (codec.encoded_bytes(values), encoded.len());
    if found == wanted {
        return Ok(());
    }
    Err(DecodeError::Length { codec: codec.kind(), values, wanted, found })
}

/// The caller of an encoder made the buffer by [`Codec::encoded_bytes`].
fn assert_length(codec: &dyn Codec, values: &[f32], encoded: &[u8]) {
    assert_eq!(encoded.len(), codec.encoded_bytes(values.len()), "{}: the encoding's size is known", codec.kind());
}
