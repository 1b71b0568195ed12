//! Writes the shards of one split.

use crate::manifest::{FileEntry, HEADER_BYTES, ShardEntry, ShardFileKind, SplitEntry, shard_header};
use base::ContentHash;
use memmap2::Mmap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

/// Takes documents in order and rolls over to a new shard before one that would not fit.
pub(crate) struct SplitWriter {
    folder: PathBuf,
    prefix: String,
    width_bytes: u32,
    shard_tokens_max: u64,
    open: Option<OpenShard>,
    written: SplitEntry,
}

struct OpenShard {
    tokens: CountedFile,
    documents: CountedFile,
}

impl SplitWriter {
    pub(crate) fn new(folder: &Path, prefix: String, width_bytes: u32, shard_tokens_max: u64) -> Self {
        let folder = folder.to_owned();
        Self { folder, prefix, width_bytes, shard_tokens_max, open: None, written: SplitEntry::default() }
    }

    /// Tokens written so far.
    pub(crate) fn tokens(&self) -> u64 {
        self.written.tokens
    }

    /// Appends one document with its end-of-text token.
    pub(crate) fn write_document(&mut self, tokens: &[u32], text_bytes: u64) -> io::Result<()> {
        let fits = |shard: &OpenShard| shard.tokens.elements + tokens.len() as u64 <= self.shard_tokens_max;
        if !self.open.as_ref().is_some_and(fits) {
            self.close_shard()?;
        }
        let shard = match &mut self.open {
            Some(shard) => shard,
            none => none.insert(OpenShard {
                tokens: CountedFile::create(&self.folder, &self.prefix, self.written.shards.len(), "tokens")?,
                documents: CountedFile::create(&self.folder, &self.prefix, self.written.shards.len(), "documents")?,
            }),
        };
        shard.documents.write(&shard.tokens.elements.to_le_bytes())?;
        for token in tokens {
            shard.tokens.write(&token.to_le_bytes()[..self.width_bytes as usize])?;
        }
        self.written.tokens += tokens.len() as u64;
        self.written.documents += 1;
        self.written.bytes += text_bytes;
        Ok(())
    }

    /// Closes the last shard; all files are on disk when this returns.
    pub(crate) fn finish(mut self) -> io::Result<SplitEntry> {
        self.close_shard()?;
        Ok(self.written)
    }

    fn close_shard(&mut self) -> io::Result<()> {
        if let Some(shard) = self.open.take() {
            self.written.shards.push(ShardEntry {
                tokens: shard.tokens.elements,
                documents: shard.documents.elements,
                token_file: shard.tokens.finish(ShardFileKind::Tokens, self.width_bytes)?,
                document_file: shard.documents.finish(ShardFileKind::Documents, 8)?,
            });
        }
        Ok(())
    }
}

/// A file whose header is filled in last, when the number of elements is known.
struct CountedFile {
    path: PathBuf,
    name: String,
    file: BufWriter<File>,
    elements: u64,
}

impl CountedFile {
    fn create(folder: &Path, prefix: &str, shard: usize, extension: &str) -> io::Result<Self> {
        let name = format!("{prefix}-{shard:05}.{extension}");
        let path = folder.join(&name);
        let mut file = BufWriter::with_capacity(256 * 1024, File::create_new(&path)?);
        file.write_all(&[0; HEADER_BYTES as usize])?;
        Ok(Self { path, name, file, elements: 0 })
    }

    fn write(&mut self, element: &[u8]) -> io::Result<()> {
        self.elements += 1;
        self.file.write_all(element)
    }

    fn finish(self, kind: ShardFileKind, width_bytes: u32) -> io::Result<FileEntry> {
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        file.write_all(&shard_header(kind, width_bytes, self.elements))?;
        file.sync_all()?;
        let bytes = HEADER_BYTES + self.elements * u64::from(width_bytes);
        Ok(FileEntry { name: self.name, bytes, blake3: hash_file(&self.path)? })
    }
}

/// BLAKE3 of a whole file, on all cores.
pub(crate) fn hash_file(path: &Path) -> io::Result<ContentHash> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(ContentHash::of(&[]));
    }
    // SAFETY: the mapping is only read, within this function; nothing of ours shortens a finished file.
    let content = unsafe { Mmap::map(&file)? };
    let mut hasher = ContentHash::hasher();
    hasher.update_rayon(&content);
    Ok(ContentHash::finish(&hasher))
}
