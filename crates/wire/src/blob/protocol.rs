//! What goes over a blob connection: small framed requests one way, replies with raw chunks the other.
//!
//! Requests are answered in order; the asking side may send several before it reads ([`CHUNKS_IN_FLIGHT_MAX`] of its own
//! will), and what the serving side has not read yet stays in the socket, not in its memory.
//!
//! [`CHUNKS_IN_FLIGHT_MAX`]: crate::limits::CHUNKS_IN_FLIGHT_MAX

use super::BlobKey;
use super::tree::ChunkHash;
use crate::limits::CHUNK_BYTES_MAX;
use serde::{Deserialize, Serialize};

/// Asks for one chunk.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ChunkRequest {
    pub(crate) key: BlobKey,
    /// Counted in chunks of [`CHUNK_BYTES_MAX`].
    pub(crate) index: u64,
    /// Bytes of the chunk that are here already, from a stream that broke.
    pub(crate) offset: u32,
    /// Rate at which the answer is to be sent; 0 where the holder decides. See [`crate::link::Link::pace`].
    pub(crate) pace_bytes_per_second: u64,
}

/// Answers one request.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ChunkReply {
    /// The chunk's bytes from the offset on follow this frame; there are `chunk_bytes` of them. `hash` is that of the whole
    /// chunk.
    Chunk { blob_bytes: u64, chunk_bytes: u32, hash: ChunkHash, sent: Option<Sent> },
    /// No such blob for this peer.
    NotFound,
    /// The blob, or the chunk, ends before that place.
    OutOfRange { blob_bytes: u64 },
    /// The holder could not read it.
    Unreadable,
}

/// What the holder's TCP has counted on this connection so far, where its system says: only the sender knows what was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sent {
    /// Bytes sent, those sent again included.
    pub(crate) bytes: u64,
    /// Bytes sent again.
    pub(crate) again: u64,
}

/// Number of chunks of a blob.
pub(crate) fn chunks(blob_bytes: u64) -> u64 {
    blob_bytes.div_ceil(CHUNK_BYTES_MAX as u64)
}

/// Length of the chunk at `index`, which must be inside the blob.
pub(crate) fn chunk_bytes(blob_bytes: u64, index: u64) -> usize {
    let rest = blob_bytes - index * CHUNK_BYTES_MAX as u64;
    rest.min(CHUNK_BYTES_MAX as u64) as usize
}
