//! Number formats and what is built from them: element formats of 4 to 16 bits, block scales, and the codecs that
//! carry a fragment's values over a link.
//!
//! ```text
//! element   one value to one code: E4M3, E5M2, E3M2, E2M3, E2M1, E3M0, bf16, f16, int8
//! scale     what a block's codes are multiplied by: UE8M0 (powers of two) or f32
//! mx, tile  blocks of the two: MXFP8, MXFP6, MXFP4 (blocks of 32); tiles of 1x128 and 128x128
//! codec     a fragment's values as bytes, of a size known beforehand, and what was lost in coding them
//! lowrank   a fragment's matrices as products of thin factors: of a size known from the shapes
//! ```
//!
//! Everything is slices in, slices out: no allocation but `lowrank`'s of its factors, no I/O, no clock, no randomness
//! but what an argument seeds. The same input gives the same bits on every machine: all arithmetic is on integers, or
//! single IEEE operations in an order that is written down. Not here: how codes are multiplied (that is an engine's business), error feedback
//! between rounds (the caller keeps the residual), and any network.

pub mod bits;
pub mod codec;
pub mod element;
mod isa;
pub mod lowrank;
pub mod mx;
pub mod round;
pub mod scale;
pub mod tile;

pub use codec::{Codec, CodecKind, DecodeError};
pub use element::{Element, Overflow};
pub use lowrank::{Basis, LowRank, MatrixShape};
pub use round::Rounding;
