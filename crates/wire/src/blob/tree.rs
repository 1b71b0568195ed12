//! BLAKE3 of a whole from the hashes of its chunks.
//!
//! BLAKE3 is a binary tree over pieces of 1,024 bytes; a chunk whose length is a power of two times that, at a multiple
//! of its length, is a complete subtree. So a chunk's hash (its chaining value) is checked by itself, on any
//! thread, in any order, and the chunks' hashes combine to the hash of the whole without reading the bytes again.
//! Source: O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3", section 2.1 (the tree).

use crate::limits::CHUNK_BYTES_MAX;
use base::ContentHash;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

/// Chaining value of a chunk; for a blob of one chunk, its BLAKE3.
pub(crate) type ChunkHash = ChainingValue;

/// Hash of the chunk at `index`; `alone` when the blob has no other.
pub(crate) fn chunk_hash(index: u64, chunk: &[u8], alone: bool) -> ChunkHash {
    if alone {
        return ContentHash::of(chunk).0;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(index * CHUNK_BYTES_MAX as u64).update(chunk);
    hasher.finalize_non_root()
}

/// BLAKE3 of a blob of `bytes` bytes whose chunks have these hashes, in order.
pub(crate) fn root(chunk_hashes: &[ChunkHash], bytes: u64) -> ContentHash {
    match chunk_hashes {
        [] => ContentHash::of(&[]),
        [alone] => ContentHash(*alone),
        _ => {
            let (left, right) = children(chunk_hashes, bytes);
            ContentHash(*merge_subtrees_root(&left, &right, Mode::Hash).as_bytes())
        }
    }
}

fn children(chunk_hashes: &[ChunkHash], bytes: u64) -> (ChunkHash, ChunkHash) {
    let left_bytes = left_subtree_len(bytes);
    let (left, right) = chunk_hashes.split_at((left_bytes / CHUNK_BYTES_MAX as u64) as usize);
    (subtree(left, left_bytes), subtree(right, bytes - left_bytes))
}

fn subtree(chunk_hashes: &[ChunkHash], bytes: u64) -> ChunkHash {
    match chunk_hashes {
        [alone] => *alone,
        _ => {
            let (left, right) = children(chunk_hashes, bytes);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_combine_to_the_hash_of_the_whole() {
        let content: Vec<u8> = (0..7 * CHUNK_BYTES_MAX).map(|i| (i % 251) as u8).collect();
        let chunk = CHUNK_BYTES_MAX;
        for bytes in [0, 1, 1024, 1025, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 1, 5 * chunk - 1, 7 * chunk]
        {
            let content = &content[..bytes];
            let alone = bytes <= chunk;
            let hashes: Vec<_> =
                content.chunks(chunk).zip(0..).map(|(part, index)| chunk_hash(index, part, alone)).collect();
            assert_eq!(root(&hashes, bytes as u64), ContentHash::of(content), "{bytes} bytes");
        }
    }
}
