//! The codecs of `run.toml` as `formats` has them.

use base::config::Codec;
use formats::CodecKind;

/// What encodes and decodes a fragment.
pub fn codec(codec: Codec) -> &'static dyn formats::Codec {
    let kind = match codec {
        Codec::F32 => CodecKind::F32,
        Codec::Bf16 => CodecKind::Bf16,
        Codec::Int8 => CodecKind::Int8,
        Codec::E3m0 => CodecKind::E3m0,
        Codec::Mxfp4 => CodecKind::Mxfp4,
        Codec::Sparse96 => CodecKind::Sparse96,
        Codec::Sparse => CodecKind::Sparse,
    };
    kind.codec()
}

/// Size of a fragment of `elements` values.
pub fn encoded_bytes(kind: Codec, elements: u64) -> u64 {
    codec(kind).encoded_bytes(elements as usize) as u64
}

/// Whether some encoder can have written these bytes for a fragment of `elements` values: a delta is looked at before
/// anybody is told that it is held.
///
/// # Errors
/// What is wrong with it, a number that is not finite above all.
pub fn check_delta(kind: Codec, elements: usize, delta: &[u8]) -> Result<(), formats::DecodeError> {
    codec(kind).check(delta, elements)
}
