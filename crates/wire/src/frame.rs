//! Frames: a length (u32, little-endian) and a postcard body.
//!
//! The length is compared with its bound before anything is allocated for it, and the buffer grows with the bytes that
//! arrive, not with the bytes that are announced. Message types must not hold sequences of zero-sized elements: a
//! few bytes could then announce 2^64 of them.

use crate::limits::{FRAME_BYTES_MAX, READ_BYTES};
use bytes::{Buf, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

const HEADER_BYTES: usize = 4;

/// Why bytes are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The length is over its bound.
    #[error("a frame of {bytes} bytes was announced; at most {bytes_max} are accepted")]
    TooLong {
        /// The announced, or to be sent, length.
        bytes: usize,
        /// What may come, or be sent.
        bytes_max: usize,
    },
    /// The body is not a message of the expected type.
    #[error("a frame of {bytes} bytes is not a message: {reason}")]
    Malformed {
        /// Length of the body.
        bytes: usize,
        /// What the decoder said.
        reason: String,
    },
    /// The message ended before the frame.
    #[error("a frame of {bytes} bytes has {trailing} bytes after its message")]
    Trailing {
        /// Length of the body.
        bytes: usize,
        /// Bytes left over.
        trailing: usize,
    },
}

/// One message as a frame, header included.
pub fn encode<T: Serialize + ?Sized>(message: &T) -> Result<Vec<u8>, FrameError> {
    let malformed = |error: postcard::Error| FrameError::Malformed { bytes: 0, reason: error.to_string() };
    let mut frame = postcard::to_extend(message, vec![0; HEADER_BYTES]).map_err(malformed)?;
    let bytes = frame.len() - HEADER_BYTES;
    if bytes > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { bytes, bytes_max: FRAME_BYTES_MAX });
    }
    frame[..HEADER_BYTES].copy_from_slice(&(bytes as u32).to_le_bytes());
    Ok(frame)
}

/// The message that is all of `body`.
///
/// # Errors
/// It is malformed, or bytes follow it.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let bytes = body.len();
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(FrameError::Trailing { bytes, trailing: rest.len() }),
        Err(error) => Err(FrameError::Malformed { bytes, reason: error.to_string() }),
    }
}

/// Cuts a byte stream into frame bodies.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: BytesMut,
    bytes_max: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), bytes_max: FRAME_BYTES_MAX }
    }
}

impl FrameDecoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Frames from now on have at most that length, and never more than [`FRAME_BYTES_MAX`].
    pub fn set_bytes_max(&mut self, bytes_max: usize) {
        self.bytes_max = bytes_max.min(FRAME_BYTES_MAX);
    }

    /// Takes bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole body, if its bytes have arrived. After an error the stream has no meaning any more.
    ///
    /// # Errors
    /// A length over [`FRAME_BYTES_MAX`], or over what was set.
    pub fn next_body(&mut self) -> Result<Option<Bytes>, FrameError> {
        match self.announced()? {
            Some(bytes) if self.buffer.len() >= HEADER_BYTES + bytes => {
                self.buffer.advance(HEADER_BYTES);
                Ok(Some(self.buffer.split_to(bytes).freeze()))
            }
            _ => Ok(None),
        }
    }

    /// Length of the body that is arriving, once its header is there.
    fn announced(&self) -> Result<Option<usize>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        match u32::from_le_bytes(*header) as usize {
            bytes if bytes > self.bytes_max => Err(FrameError::TooLong { bytes, bytes_max: self.bytes_max }),
            bytes => Ok(Some(bytes)),
        }
    }

    /// Bytes that have arrived of an unfinished frame, and how many it has as far as known; `None` between frames.
    pub(crate) fn unfinished(&self) -> Option<(usize, usize)> {
        let expected = self.announced().ok().flatten().unwrap_or(0) + HEADER_BYTES;
        (!self.buffer.is_empty()).then_some((self.buffer.len(), expected))
    }

    /// Where to read to: always with room for [`READ_BYTES`].
    pub(crate) fn space(&mut self) -> &mut BytesMut {
        self.buffer.reserve(READ_BYTES);
        &mut self.buffer
    }

    /// Up to `bytes` bytes of what arrived after the last frame, for content that is not framed.
    pub(crate) fn take_raw(&mut self, bytes: usize) -> BytesMut {
        self.buffer.split_to(bytes.min(self.buffer.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::random::Random;
    use proptest::prelude::*;
    use serde::Deserialize;

    /// Every kind of field that messages have.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    enum Sample {
        Empty,
        Numbers { small: u8, large: u64, signed: i64, real: f64 },
        Text(String),
        List(Vec<(u32, Option<String>)>),
        Hash(base::ContentHash),
        Nested(Box<Sample>),
    }

    fn samples() -> Vec<Sample> {
        vec![
            Sample::Empty,
            Sample::Numbers { small: 7, large: u64::MAX, signed: -5, real: 0.25 },
            Sample::Text("land bridge".to_owned()),
            Sample::List(vec![(1, None), (2, Some("x".to_owned()))]),
            Sample::Hash(base::ContentHash::of(b"x")),
            Sample::Nested(Box::new(Sample::Text(String::new()))),
        ]
    }

    fn recorded() -> Vec<u8> {
        samples().iter().flat_map(|sample| encode(sample).unwrap()).collect()
    }

    #[test]
    fn frames_come_back_whatever_the_pieces() {
        let stream = recorded();
        for piece in [1, 3, 7, stream.len()] {
            let mut decoder = FrameDecoder::new();
            let mut found = Vec::new();
            for bytes in stream.chunks(piece) {
                decoder.push(bytes);
                while let Some(body) = decoder.next_body().unwrap() {
                    found.push(decode::<Sample>(&body).unwrap());
                }
            }
            assert_eq!(found, samples());
            assert_eq!(decoder.unfinished(), None);
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_memory_is_taken() {
        let mut decoder = FrameDecoder::new();
        decoder.push(&u32::MAX.to_le_bytes());
        assert_eq!(
            decoder.next_body(),
            Err(FrameError::TooLong { bytes: u32::MAX as usize, bytes_max: FRAME_BYTES_MAX })
        );
        assert!(decoder.buffer.capacity() < 1024, "{}", decoder.buffer.capacity());
        let mut decoder = FrameDecoder::new();
        decoder.push(&(FRAME_BYTES_MAX as u32).to_le_bytes());
        assert_eq!(decoder.next_body(), Ok(None));
        assert!(decoder.space().capacity() <= 2 * READ_BYTES, "memory follows what arrives, not what is announced");
    }

    #[test]
    fn a_message_over_the_bound_is_not_sent() {
        let just = vec![0u8; FRAME_BYTES_MAX - 3];
        assert_eq!(encode(&just).unwrap().len(), HEADER_BYTES + FRAME_BYTES_MAX);
        let (bytes, bytes_max) = (FRAME_BYTES_MAX + 3, FRAME_BYTES_MAX);
        assert_eq!(encode(&vec![0u8; FRAME_BYTES_MAX]), Err(FrameError::TooLong { bytes, bytes_max }));
        let mut decoder = FrameDecoder::new();
        decoder.set_bytes_max(100);
        decoder.push(&101_u32.to_le_bytes());
        assert_eq!(decoder.next_body(), Err(FrameError::TooLong { bytes: 101, bytes_max: 100 }));
    }

    #[test]
    fn trailing_bytes_and_huge_inner_lengths_are_refused() {
        assert_eq!(decode::<u8>(&[1, 2, 3]), Err(FrameError::Trailing { bytes: 3, trailing: 2 }));
        assert!(matches!(decode::<Sample>(&[2, 0xff, 0xff, 0xff, 0xff, 0x0f]), Err(FrameError::Malformed { .. })));
        assert!(matches!(decode::<Vec<u64>>(&[0xff, 0xff, 0xff, 0xff, 0x0f]), Err(FrameError::Malformed { .. })));
        assert!(matches!(decode::<Sample>(&[]), Err(FrameError::Malformed { bytes: 0, .. })));
    }

    /// Decodes until the end or the first error; returns how many messages were understood.
    fn drain(bytes: &[u8]) -> usize {
        let mut decoder = FrameDecoder::new();
        decoder.push(bytes);
        let mut messages = 0;
        while let Ok(Some(body)) = decoder.next_body() {
            messages += usize::from(decode::<Sample>(&body).is_ok());
        }
        messages
    }

    #[test]
    fn bit_flips_never_panic() {
        let stream = recorded();
        let mut random = Random::new(1, 0);
        let mut damaged = 0;
        for _ in 0..100_000 {
            let mut flipped = stream.clone();
            let bit = random.next_below(8 * flipped.len() as u64) as usize;
            flipped[bit / 8] ^= 1 << (bit % 8);
            damaged += usize::from(drain(&flipped) < samples().len());
        }
        assert!(damaged > 10_000, "the flips do reach the decoder: {damaged}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048), piece in 1usize..64) {
            let mut decoder = FrameDecoder::new();
            for part in bytes.chunks(piece) {
                decoder.push(part);
                while let Ok(Some(body)) = decoder.next_body() {
                    let _ = decode::<Sample>(&body);
                }
            }
            let _ = decode::<Sample>(&bytes);
            let _ = decode::<crate::blob::protocol::ChunkRequest>(&bytes);
            let _ = decode::<crate::blob::protocol::ChunkReply>(&bytes);
        }
    }
}
