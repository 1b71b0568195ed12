//! Bulk data by pull: who holds a blob serves it, who wants it asks for its chunks.
//!
//! A blob is an immutable sequence of bytes, known by a [`BlobKey`] and checked by its BLAKE3, which the receiver
//! has learnt elsewhere (from an announcement or a manifest). It is cut into chunks of [`CHUNK_BYTES_MAX`]; any chunk
//! may come from any holder over any stream.

pub mod fetch;
pub(crate) mod file;
mod pool;
pub(crate) mod protocol;
pub mod serve;
pub(crate) mod stream;
mod torn;
pub(crate) mod transfer;
pub(crate) mod tree;

use crate::limits::{BLOB_NAME_BYTES_MAX, CHUNK_BYTES_MAX};
use base::{ContentHash, Round, SiteId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use tree::ChunkHash;

/// What a blob is called.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum BlobKey {
    /// A file of the run: tokenizer, shard, checkpoint part.
    File {
        /// A relative path with `/`; see [`BlobKey::is_valid`].
        name: String,
    },
    /// What a site adds to a round.
    Delta {
        /// The round.
        round: Round,
        /// Index of the fragment.
        fragment: u32,
        /// Whose delta.
        site: SiteId,
    },
    /// Global parameters and outer momentum after a round's commit.
    State {
        /// The round.
        round: Round,
    },
    /// Of a delta, what one site merges in a sharded round.
    Slice {
        /// The round.
        round: Round,
        /// Index of the fragment.
        fragment: u32,
        /// Whose delta.
        site: SiteId,
        /// Who merges it.
        reducer: SiteId,
    },
    /// What one site has merged in a sharded round, as little-endian f32.
    Part {
        /// The round.
        round: Round,
        /// Index of the fragment.
        fragment: u32,
        /// Who has merged it.
        reducer: SiteId,
    },
}

impl BlobKey {
    /// Whether a name is short enough and stays inside the folder it is looked up in: components of other characters than
    /// `/`, `\` and control characters, none of them empty, `.` or `..`. Servers refuse all other keys.
    pub fn is_valid(&self) -> bool {
        let Self::File { name } = self else { return true };
        let odd = |c: char| c.is_control() || c == '\\' || c == ':';
        let component_fits = |component: &str| !matches!(component, "" | "." | "..") && !component.contains(odd);
        name.len() <= BLOB_NAME_BYTES_MAX && name.split('/').all(component_fits)
    }
}

impl fmt::Display for BlobKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { name } => write!(formatter, "file {name:?}"),
            Self::Delta { round, fragment, site } => {
                write!(formatter, "delta of site {site}, round {round}, fragment {fragment}")
            }
            Self::State { round } => write!(formatter, "state of round {round}"),
            Self::Slice { round, fragment, site, reducer } => {
                write!(formatter, "slice for site {reducer} of site {site}'s delta, round {round}, fragment {fragment}")
            }
            Self::Part { round, fragment, reducer } => {
                write!(formatter, "part merged by site {reducer}, round {round}, fragment {fragment}")
            }
        }
    }
}

/// Who holds blobs.
pub trait BlobSource: Send + Sync {
    /// The blob of that key, if there is one and `peer` may have it. Called for every chunk, so it must be quick, and a
    /// peer that is no longer a member is refused from the next chunk on.
    fn open(&self, peer: ContentHash, key: &BlobKey) -> Option<Blob>;
}

/// The content of a blob, to be served. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Blob(Content);

#[derive(Debug, Clone)]
enum Content {
    /// Hashed once, served to many.
    Memory {
        bytes: Bytes,
        chunk_hashes: Arc<[ChunkHash]>,
    },
    File {
        path: Arc<Path>,
        bytes: u64,
    },
}

impl Blob {
    /// Bytes in memory. Hashes them: about 0.3 s a gigabyte on one core.
    pub fn memory(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let alone = bytes.len() <= CHUNK_BYTES_MAX;
        let chunks = bytes.chunks(CHUNK_BYTES_MAX).zip(0..);
        let chunk_hashes = chunks.map(|(chunk, index)| tree::chunk_hash(index, chunk, alone)).collect();
        Self(Content::Memory { bytes, chunk_hashes })
    }

    /// A file, which must not change while it is served: a reader would find a wrong hash.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn file(path: &Path) -> io::Result<Self> {
        let bytes = File::open(path)?.metadata()?.len();
        Ok(Self(Content::File { path: path.into(), bytes }))
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        match &self.0 {
            Content::Memory { bytes, .. } => bytes.len() as u64,
            Content::File { bytes, .. } => *bytes,
        }
    }

    /// BLAKE3 of the whole: known at once for memory, read (blocking) for a file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn hash(&self) -> io::Result<ContentHash> {
        match &self.0 {
            Content::Memory { bytes, chunk_hashes } => Ok(tree::root(chunk_hashes, bytes.len() as u64)),
            Content::File { path, .. } => {
                let mut hasher = ContentHash::hasher();
                hasher.update_reader(File::open(path)?)?;
                Ok(ContentHash::finish(&hasher))
            }
        }
    }

    /// One chunk with its hash. `index` is inside the blob.
    pub(crate) async fn chunk(&self, index: u64) -> io::Result<(Bytes, ChunkHash)> {
        match &self.0 {
            Content::Memory { bytes, chunk_hashes } => {
                let start = index as usize * CHUNK_BYTES_MAX;
                let end = bytes.len().min(start + CHUNK_BYTES_MAX);
                Ok((bytes.slice(start..end), chunk_hashes[index as usize]))
            }
            Content::File { path, bytes } => {
                let (path, bytes) = (path.clone(), *bytes);
                tokio::task::spawn_blocking(move || read_chunk(&path, bytes, index)).await?
            }
        }
    }
}

fn read_chunk(path: &Path, blob_bytes: u64, index: u64) -> io::Result<(Bytes, ChunkHash)> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(index * CHUNK_BYTES_MAX as u64))?;
    let mut chunk = vec![0; protocol::chunk_bytes(blob_bytes, index)];
    file.read_exact(&mut chunk)?;
    let hash = tree::chunk_hash(index, &chunk, protocol::chunks(blob_bytes) == 1);
    Ok((chunk.into(), hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_their_folder() {
        let valid = |name: &str| BlobKey::File { name: name.to_owned() }.is_valid();
        assert!(valid("tokenizer.json") && valid("shards/train-00001.bin") && valid("..."));
        for name in ["", "/etc/passwd", "a//b", "a/", "./a", "../a", "a/../b", "a\\b", "c:a", "a\0", &"n".repeat(256)] {
            assert!(!valid(name), "{name:?}");
        }
    }

    #[test]
    fn memory_and_file_have_one_hash_and_the_same_chunks() {
        let content: Vec<u8> = (0..2 * CHUNK_BYTES_MAX + 5).map(|i| (i / 7) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &content).unwrap();
        let (memory, file) = (Blob::memory(content.clone()), Blob::file(file.path()).unwrap());
        assert_eq!(memory.hash().unwrap(), ContentHash::of(&content));
        assert_eq!(file.hash().unwrap(), ContentHash::of(&content));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for index in 0..3 {
            let chunks = (runtime.block_on(memory.chunk(index)).unwrap(), runtime.block_on(file.chunk(index)).unwrap());
            assert_eq!(chunks.0, chunks.1);
        }
    }
}
