//! Samples out of memory-mapped shards.
//!
//! The operating system keeps what is in use; a data set may be larger than memory. Samples of T + 1 tokens
//! start every T tokens, so that each token (but the first) is predicted once an epoch; they run over document
//! ends, which the model sees as end-of-text tokens, and over shard ends, which it does not see.

use crate::manifest::{
    FileEntry, HEADER_BYTES, Manifest, ShardEntry, ShardFileKind, Split, TOKENIZER_FILE, shard_header,
};
use crate::shard_writer::hash_file;
use crate::tokenizer::{TextTokenizer, TokenizerError};
use base::{ContentHash, Hint};
use memmap2::Mmap;
use rayon::prelude::*;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One split, opened for reading.
pub struct Dataset {
    manifest: Manifest,
    split: Split,
    shards: Vec<Shard>,
}

struct Shard {
    tokens: Mmap,
    documents: Mmap,
    /// Position of its first token and document in the split.
    token_start: u64,
    document_start: u64,
    entry: ShardEntry,
    width_bytes: usize,
}

/// Why a data folder is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// A file is missing or cannot be read.
    #[error("data file {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `manifest.json` is not one.
    #[error("data manifest: {0}")]
    Manifest(String),
    /// A file is shorter or longer than its manifest says.
    #[error("data file {}: {found} bytes, its manifest says {expected}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// By the manifest.
        expected: u64,
        /// On disk.
        found: u64,
    },
    /// A file holds other bytes than its manifest says.
    #[error("data file {}: its hash is {found}, its manifest says {expected}", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// By the manifest.
        expected: ContentHash,
        /// On disk.
        found: ContentHash,
    },
    /// A file's content contradicts its manifest.
    #[error("data file {}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What and where.
        reason: String,
    },
    /// The tokenizer in the folder cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Not one sample of the wanted length.
    #[error("the {split} split has {tokens} tokens, fewer than one sample of {} needs", sequence_length + 1)]
    TooShort {
        /// Which split.
        split: Split,
        /// Its tokens.
        tokens: u64,
        /// Predicted positions of a sample.
        sequence_length: usize,
    },
}

impl Hint for DatasetError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::TooShort { tokens, .. } if *tokens > 1 => {
                format!("set [data] sequence_length to {} or less, or add text", tokens - 1)
            }
            Self::TooShort { .. } => "add text to the data folder and run `beringia init` again".to_owned(),
            Self::Tokenizer(error) => return error.hint(),
            _ => "remove the run's data folder and run `beringia init` (or `beringia join`) again".to_owned(),
        })
    }
}

impl Dataset {
    /// Opens one split of a data folder. Lengths and headers are always checked; with `verify` also every hash,
    /// every token and every document start, which reads the files once.
    ///
    /// The files must not be changed while they are open.
    ///
    /// # Errors
    /// A file that is missing, or is not what the manifest says.
    pub fn open(folder: &Path, split: Split, verify: bool) -> Result<Self, DatasetError> {
        let manifest = Manifest::read(folder)?;
        let (mut token_start, mut document_start) = (0, 0);
        let mut shards = Vec::with_capacity(manifest.split(split).shards.len());
        for entry in &manifest.split(split).shards {
            let width_bytes = manifest.token_width_bytes;
            shards.push(Shard {
                tokens: map_file(folder, &entry.token_file, ShardFileKind::Tokens, width_bytes, entry.tokens, verify)?,
                documents: map_file(
                    folder,
                    &entry.document_file,
                    ShardFileKind::Documents,
                    8,
                    entry.documents,
                    verify,
                )?,
                token_start,
                document_start,
                entry: entry.clone(),
                width_bytes: width_bytes as usize,
            });
            token_start += entry.tokens;
            document_start += entry.documents;
        }
        let dataset = Self { manifest, split, shards };
        if verify {
            dataset.verify_content(folder)?;
        }
        Ok(dataset)
    }

    /// What the folder holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Which split this is.
    pub fn split(&self) -> Split {
        self.split
    }

    /// Tokens in the split.
    pub fn tokens(&self) -> u64 {
        self.manifest.split(self.split).tokens
    }

    /// Documents in the split.
    pub fn documents(&self) -> u64 {
        self.manifest.split(self.split).documents
    }

    /// Positions of a document's tokens, the end-of-text token included.
    ///
    /// # Panics
    /// `document` is not below [`Dataset::documents`].
    pub fn document(&self, document: u64) -> Range<u64> {
        let shard = &self.shards[self.shards.partition_point(|shard| shard.document_start <= document) - 1];
        let within = document - shard.document_start;
        let end = if within + 1 < shard.entry.documents { shard.document(within + 1) } else { shard.entry.tokens };
        shard.token_start + shard.document(within)..shard.token_start + end
    }

    /// Samples of `sequence_length` predicted tokens; what is left at the end is not used.
    pub fn samples(&self, sequence_length: usize) -> u64 {
        self.tokens().saturating_sub(1) / sequence_length.max(1) as u64
    }

    /// As [`Dataset::samples`], where there must be at least one.
    ///
    /// # Errors
    /// [`DatasetError::TooShort`].
    pub fn require_samples(&self, sequence_length: usize) -> Result<u64, DatasetError> {
        match self.samples(sequence_length) {
            0 => Err(DatasetError::TooShort { split: self.split, tokens: self.tokens(), sequence_length }),
            samples => Ok(samples),
        }
    }

    /// Appends the `sequence_length` + 1 tokens of sample `index` to `tokens`.
    ///
    /// # Panics
    /// `index` is not below [`Dataset::samples`].
    pub fn sample(&self, sequence_length: usize, index: u64, tokens: &mut Vec<u32>) {
        assert!(index < self.samples(sequence_length), "sample {index} of {}", self.samples(sequence_length));
        let start = index * sequence_length as u64;
        self.read(start..start + sequence_length as u64 + 1, tokens);
    }

    /// Appends the tokens at some positions to `tokens`.
    ///
    /// # Panics
    /// The range ends behind the last token.
    pub fn read(&self, positions: Range<u64>, tokens: &mut Vec<u32>) {
        tokens.extend(self.iter(positions));
    }

    /// The tokens at some positions, in order.
    ///
    /// # Panics
    /// The range ends behind the last token.
    pub fn iter(&self, positions: Range<u64>) -> impl Iterator<Item = u32> {
        assert!(positions.end <= self.tokens(), "token {} of {}", positions.end, self.tokens());
        let first = self.shards.partition_point(|shard| shard.token_start + shard.entry.tokens <= positions.start);
        let touched = self.shards[first..].iter().take_while(move |shard| shard.token_start < positions.end);
        touched.flat_map(move |shard| {
            let start = positions.start.saturating_sub(shard.token_start);
            let end = (positions.end - shard.token_start).min(shard.entry.tokens);
            shard.tokens(start..end)
        })
    }

    /// The tokenizer in the same folder.
    ///
    /// # Errors
    /// It is missing, or not the one that made the tokens.
    pub fn tokenizer(&self, folder: &Path) -> Result<TextTokenizer, DatasetError> {
        load_tokenizer(folder, &self.manifest)
    }

    fn verify_content(&self, folder: &Path) -> Result<(), DatasetError> {
        self.shards.par_iter().try_for_each(|shard| {
            let fail = |file: &FileEntry, reason| Err(DatasetError::Content { path: folder.join(&file.name), reason });
            let outside = |token: &u32| u64::from(*token) >= self.manifest.vocabulary_size;
            if let Some((position, token)) = shard.tokens(0..shard.entry.tokens).enumerate().find(|(_, t)| outside(t)) {
                let size = self.manifest.vocabulary_size;
                let reason = format!("token {token} at position {position} is outside the vocabulary of {size}");
                return fail(&shard.entry.token_file, reason);
            }
            // Strictly ascending from 0: every document has a token and none lies outside the shard.
            let starts = (0..shard.entry.documents).map(|document| shard.document(document));
            let ends = starts.clone().skip(1).chain([shard.entry.tokens]);
            let first = starts.clone().next();
            if first != Some(0) || starts.zip(ends).any(|(start, end)| start >= end) {
                return fail(&shard.entry.document_file, "document starts do not ascend from 0".to_owned());
            }
            Ok(())
        })
    }
}

/// Loads the tokenizer of a data folder and compares it with the manifest.
///
/// # Errors
/// It is missing, or not the one that made the tokens; the message names both hashes.
pub fn load_tokenizer(folder: &Path, manifest: &Manifest) -> Result<TextTokenizer, DatasetError> {
    let path = folder.join(TOKENIZER_FILE);
    let tokenizer = TextTokenizer::load(&path)?;
    if tokenizer.hash() != manifest.tokenizer.blake3 {
        return Err(DatasetError::Hash { path, expected: manifest.tokenizer.blake3, found: tokenizer.hash() });
    }
    Ok(tokenizer)
}

impl Shard {
    fn tokens(&self, positions: Range<u64>) -> impl Iterator<Item = u32> {
        let at = |position: u64| HEADER_BYTES as usize + position as usize * self.width_bytes;
        let bytes = &self.tokens[at(positions.start)..at(positions.end)];
        bytes.chunks_exact(self.width_bytes).map(|token| match token {
            [a, b] => u32::from(u16::from_le_bytes([*a, *b])),
            [a, b, c, d] => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => unreachable!("the manifest's check allows widths of 2 and 4"),
        })
    }

    fn document(&self, index: u64) -> u64 {
        let at = HEADER_BYTES as usize + index as usize * 8;
        let mut start = [0; 8];
        start.copy_from_slice(&self.documents[at..at + 8]);
        u64::from_le_bytes(start)
    }
}

/// Maps one shard file after comparing its length, its header and, with `verify`, its hash.
fn map_file(
    folder: &Path,
    entry: &FileEntry,
    kind: ShardFileKind,
    width_bytes: u32,
    elements: u64,
    verify: bool,
) -> Result<Mmap, DatasetError> {
    let path = folder.join(&entry.name);
    let failed = |source| DatasetError::File { path: path.clone(), source };
    let file = File::open(&path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?.len();
    if found != entry.bytes {
        return Err(DatasetError::Length { path, expected: entry.bytes, found });
    }
    if verify {
        let found = hash_file(&path).map_err(failed)?;
        if found != entry.blake3 {
            return Err(DatasetError::Hash { path, expected: entry.blake3, found });
        }
    }
    // SAFETY: mapped for reading; `open` documents that the files must not change while they are open.
    let content = unsafe { Mmap::map(&file) }.map_err(failed)?;
    if content[..HEADER_BYTES as usize] != shard_header(kind, width_bytes, elements) {
        return Err(DatasetError::Content { path, reason: "its header is not what its manifest says".to_owned() });
    }
    Ok(content)
}
