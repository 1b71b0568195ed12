//! What lies in a folder of token shards: counts, and the size and hash of every file.
//!
//! A manifest has no paths of the machine that wrote it and no times, so that equal text, tokenizer and options
//! give equal bytes on any machine, and one hash stands for the whole data set. It may come from a peer: it is
//! checked before anything it claims is believed.

use crate::dataset::DatasetError;
use base::ContentHash;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Its name in the data folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The tokenizer's name in the data folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Longest manifest read, bytes: at some 400 bytes a shard, 40,000 shards, or 4 × 10^12 tokens at the default size.
pub const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// Version of the manifest and of the shard files.
pub const FORMAT_VERSION: u32 = 1;

/// Most tokens in a split: keeps every sum of counts and byte lengths within 64 bits.
pub const SPLIT_TOKENS_MAX: u64 = 1 << 56;

/// Which documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Trained on.
    Train,
    /// Held out.
    Validation,
}

impl std::fmt::Display for Split {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Train => "train",
            Self::Validation => "validation",
        })
    }
}

/// One file of the data folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name, without any folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Of its content.
    pub blake3: ContentHash,
}

/// A pair of files: tokens, and where documents start in them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Tokens in the shard.
    pub tokens: u64,
    /// Documents in the shard; none continues in the next one.
    pub documents: u64,
    /// The `.tokens` file.
    pub token_file: FileEntry,
    /// The `.documents` file.
    pub document_file: FileEntry,
}

/// The shards of one split.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitEntry {
    /// Tokens, end-of-text tokens among them.
    pub tokens: u64,
    /// Documents.
    pub documents: u64,
    /// UTF-8 bytes of the documents.
    pub bytes: u64,
    /// In order.
    pub shards: Vec<ShardEntry>,
}

/// `manifest.json` of a data folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format: u32,
    /// Tokens are below this.
    pub vocabulary_size: u64,
    /// The token after each document.
    pub end_of_text: u32,
    /// Bytes of a stored token: 2 where the vocabulary allows it, else 4.
    pub token_width_bytes: u32,
    /// The seed that decided which documents are held out.
    pub split_seed: u64,
    /// Whether one document lies on both sides, cut in two, because there were too few.
    pub document_was_cut: bool,
    /// The tokenizer, in the same folder.
    pub tokenizer: FileEntry,
    /// Trained on.
    pub train: SplitEntry,
    /// Held out.
    pub validation: SplitEntry,
}

impl Manifest {
    /// Reads and checks `manifest.json` in `folder`; the files it names are not looked at.
    ///
    /// # Errors
    /// It is missing, too long, or not a manifest.
    pub fn read(folder: &Path) -> Result<Self, DatasetError> {
        let path = folder.join(MANIFEST_FILE);
        let read = || {
            let mut json = Vec::new();
            File::open(&path)?.take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut json)?;
            Ok(json)
        };
        Self::parse(&read().map_err(|source| DatasetError::File { path: path.clone(), source })?)
    }

    /// Parses and checks the content of a `manifest.json`.
    ///
    /// # Errors
    /// It is too long, not a manifest, or its numbers do not add up.
    pub fn parse(json: &[u8]) -> Result<Self, DatasetError> {
        if json.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(DatasetError::Manifest(format!("it is longer than {MANIFEST_BYTES_MAX} bytes")));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(|error| DatasetError::Manifest(error.to_string()))?;
        manifest.check().map_err(DatasetError::Manifest)?;
        Ok(manifest)
    }

    /// The content of `manifest.json`; equal manifests give equal bytes.
    pub fn to_json(&self) -> Vec<u8> {
        let json = serde_json::to_vec_pretty(self);
        json.unwrap_or_else(|error| unreachable!("every field of Manifest is representable: {error}"))
    }

    /// The hash that stands for the whole data set: text, tokenizer and split.
    pub fn hash(&self) -> ContentHash {
        ContentHash::of(&self.to_json())
    }

    /// One of the splits.
    pub fn split(&self, split: Split) -> &SplitEntry {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Every file beside the manifest: what a site has to fetch.
    pub fn files(&self) -> impl Iterator<Item = &FileEntry> {
        let shards = self.train.shards.iter().chain(&self.validation.shards);
        std::iter::once(&self.tokenizer).chain(shards.flat_map(|shard| [&shard.token_file, &shard.document_file]))
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT_VERSION {
            return Err(format!("format {} where this version reads {FORMAT_VERSION}", self.format));
        }
        let width = token_width_bytes(self.vocabulary_size);
        if self.vocabulary_size > 1 << 32 || self.token_width_bytes != width {
            let found = self.token_width_bytes;
            return Err(format!("tokens of {found} bytes for a vocabulary of {}", self.vocabulary_size));
        }
        if u64::from(self.end_of_text) >= self.vocabulary_size {
            return Err(format!("end of text {} is outside the vocabulary", self.end_of_text));
        }
        self.check_split(&self.train)?;
        self.check_split(&self.validation)?;
        let mut names = HashSet::from([MANIFEST_FILE]);
        match self.files().find(|file| !is_plain_name(&file.name) || !names.insert(&file.name)) {
            Some(file) => Err(format!("'{}' is not a plain, unique file name", file.name.escape_default())),
            None => Ok(()),
        }
    }

    fn check_split(&self, split: &SplitEntry) -> Result<(), String> {
        let (mut tokens, mut documents) = (0u64, 0u64);
        for shard in &split.shards {
            let name = &shard.token_file.name;
            if shard.tokens > SPLIT_TOKENS_MAX || shard.documents > shard.tokens {
                return Err(format!("{name}: {} tokens in {} documents", shard.tokens, shard.documents));
            }
            let lengths = (shard.token_file.bytes, shard.document_file.bytes);
            let width = u64::from(self.token_width_bytes);
            if lengths != (HEADER_BYTES + shard.tokens * width, HEADER_BYTES + shard.documents * 8) {
                return Err(format!("{name}: lengths {lengths:?} do not fit its {} tokens", shard.tokens));
            }
            tokens = tokens.saturating_add(shard.tokens);
            documents = documents.saturating_add(shard.documents);
        }
        if (tokens, documents) != (split.tokens, split.documents) || tokens > SPLIT_TOKENS_MAX {
            return Err(format!("shards hold {tokens} tokens, the split claims {}", split.tokens));
        }
        Ok(())
    }
}

/// Bytes that store a token of that vocabulary.
pub(crate) fn token_width_bytes(vocabulary_size: u64) -> u32 {
    if vocabulary_size <= 1 << 16 { 2 } else { 4 }
}

/// Names come from peers: they must stay in the folder.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain)
}

/// Bytes before the first token or offset of a shard file.
pub(crate) const HEADER_BYTES: u64 = 32;

/// Which of the two files a header belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShardFileKind {
    Tokens,
    Documents,
}

/// The first [`HEADER_BYTES`] of a shard file, little endian: magic (8), version (4), bytes of an element (4),
/// elements (8), zeros (8).
pub(crate) fn shard_header(kind: ShardFileKind, width_bytes: u32, elements: u64) -> [u8; HEADER_BYTES as usize] {
    let magic: &[u8; 8] = match kind {
        ShardFileKind::Tokens => b"BERTOKEN",
        ShardFileKind::Documents => b"BERDOCUM",
    };
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(magic);
    header[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&width_bytes.to_le_bytes());
    header[16..24].copy_from_slice(&elements.to_le_bytes());
    header
}
