//! A blob on its way to a file: what has arrived survives a crash, and nothing unverified gets the file's name.
//!
//! ```text
//! NAME.partial   the bytes, at their places
//! NAME.chunks    expected hash (32) | expected length (u64 LE) | records of: chunk index (u64 LE) | chunk hash (32)
//! ```
//! The journal is a claim, not a proof: on resumption every recorded chunk is read and hashed again, and only those that
//! fit are kept. Since the chunks' hashes combine to the hash of the whole, a kept chunk is as good as a new one.

use super::protocol;
use super::tree::{self, ChunkHash};
use crate::limits::CHUNK_BYTES_MAX;
use base::ContentHash;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const HEADER_BYTES: usize = 32 + 8;
const RECORD_BYTES: usize = 8 + 32;

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

/// The two files of an unfinished blob. The journal is locked, so that two processes cannot write the same one.
#[derive(Debug)]
pub(crate) struct PartialFile {
    path: PathBuf,
    content: File,
    journal: File,
    blob_bytes: u64,
}

impl PartialFile {
    /// Opens or creates the partial file for `path`, with the hashes of the chunks that are really there.
    /// `WouldBlock` when another process is at it.
    pub(crate) fn open(
        path: &Path,
        expected: ContentHash,
        blob_bytes: u64,
    ) -> io::Result<(Self, Vec<Option<ChunkHash>>)> {
        let open = |path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let journal = open(journal_path(path))?;
        journal.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::ErrorKind::WouldBlock.into(),
            TryLockError::Error(error) => error,
        })?;
        let content = open(content_path(path))?;
        let mut partial = Self { path: path.to_owned(), content, journal, blob_bytes };
        let here = partial.verify(expected)?;
        partial.rewrite_journal(expected, &here)?;
        partial.content.set_len(blob_bytes)?;
        Ok((partial, here))
    }

    /// Reads the journal and keeps what the content confirms.
    fn verify(&mut self, expected: ContentHash) -> io::Result<Vec<Option<ChunkHash>>> {
        let chunks = protocol::chunks(self.blob_bytes);
        let mut here = vec![None; chunks as usize];
        let mut journal = Vec::new();
        let journal_bytes_max = (HEADER_BYTES + RECORD_BYTES * here.len()) as u64;
        Read::by_ref(&mut self.journal).take(journal_bytes_max).read_to_end(&mut journal)?;
        let Some(records) = journal.strip_prefix(&header(expected, self.blob_bytes)[..]) else { return Ok(here) };
        for record in records.chunks_exact(RECORD_BYTES) {
            let (Some(index), Some(hash)) = (record.first_chunk(), record.last_chunk::<32>()) else { continue };
            let index = u64::from_le_bytes(*index);
            if index < chunks && here[index as usize].is_none() && self.read_hash(index)? == Some(*hash) {
                here[index as usize] = Some(*hash);
            }
        }
        Ok(here)
    }

    /// Hash of the chunk as it is on disk; `None` beyond the end of the file.
    fn read_hash(&mut self, index: u64) -> io::Result<Option<ChunkHash>> {
        let mut chunk = vec![0; protocol::chunk_bytes(self.blob_bytes, index)];
        self.content.seek(SeekFrom::Start(index * CHUNK_BYTES_MAX as u64))?;
        match self.content.read_exact(&mut chunk) {
            Ok(()) => Ok(Some(tree::chunk_hash(index, &chunk, protocol::chunks(self.blob_bytes) == 1))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts the journal anew with what was confirmed, so that torn records do not stay in it.
    fn rewrite_journal(&mut self, expected: ContentHash, here: &[Option<ChunkHash>]) -> io::Result<()> {
        let mut journal = header(expected, self.blob_bytes).to_vec();
        for (index, hash) in (0..).zip(here) {
            journal.extend(hash.iter().flat_map(|hash| record(index, hash)));
        }
        self.journal.set_len(0)?;
        self.journal.rewind()?;
        self.journal.write_all(&journal)
    }

    /// Writes one chunk and then its record.
    pub(super) fn put(&mut self, index: u64, chunk: &[u8], hash: &ChunkHash) -> io::Result<()> {
        self.content.seek(SeekFrom::Start(index * CHUNK_BYTES_MAX as u64))?;
        self.content.write_all(chunk)?;
        self.journal.write_all(&record(index, hash))
    }

    /// Gives the complete file its name, durably.
    pub(super) fn finish(self) -> io::Result<()> {
        self.content.sync_all()?;
        fs::rename(content_path(&self.path), &self.path)?;
        fs::remove_file(journal_path(&self.path))?;
        match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => sync_folder(folder),
            _ => sync_folder(Path::new(".")),
        }
    }

    /// Removes both files: what arrived was not the blob.
    pub(super) fn discard(self) -> io::Result<()> {
        fs::remove_file(content_path(&self.path))?;
        fs::remove_file(journal_path(&self.path))
    }
}

fn header(expected: ContentHash, blob_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..32].copy_from_slice(&expected.0);
    header[32..].copy_from_slice(&blob_bytes.to_le_bytes());
    header
}

fn record(index: u64, hash: &ChunkHash) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&index.to_le_bytes());
    record[8..].copy_from_slice(hash);
    record
}

fn content_path(path: &Path) -> PathBuf {
    with_suffix(path, ".partial")
}

fn journal_path(path: &Path) -> PathBuf {
    with_suffix(path, ".chunks")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Vec<u8> {
        (0..2 * CHUNK_BYTES_MAX + 9).map(|i| (i / 3) as u8).collect()
    }

    fn put_all(partial: &mut PartialFile, indices: &[u64]) {
        let content = content();
        for &index in indices {
            let start = index as usize * CHUNK_BYTES_MAX;
            let chunk = &content[start..content.len().min(start + CHUNK_BYTES_MAX)];
            partial.put(index, chunk, &tree::chunk_hash(index, chunk, false)).unwrap();
        }
    }

    #[test]
    fn what_arrived_is_kept_and_what_was_damaged_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        let (expected, bytes) = (ContentHash::of(&content()), content().len() as u64);
        let (mut partial, here) = PartialFile::open(&path, expected, bytes).unwrap();
        assert!(here.iter().all(Option::is_none));
        put_all(&mut partial, &[2, 0]);
        drop(partial);
        // A torn record at the end, and a flipped bit in chunk 0.
        OpenOptions::new().append(true).open(journal_path(&path)).unwrap().write_all(&[1; 17]).unwrap();
        let mut on_disk = fs::read(content_path(&path)).unwrap();
        on_disk[77] ^= 4;
        fs::write(content_path(&path), &on_disk).unwrap();

        let (mut partial, here) = PartialFile::open(&path, expected, bytes).unwrap();
        assert_eq!(here.iter().map(Option::is_some).collect::<Vec<_>>(), [false, false, true]);
        put_all(&mut partial, &[0, 1]);
        partial.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), content());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_partial_file_of_another_blob_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        let bytes = content().len() as u64;
        let (mut partial, _) = PartialFile::open(&path, ContentHash::of(&content()), bytes).unwrap();
        put_all(&mut partial, &[0, 1, 2]);
        let busy = PartialFile::open(&path, ContentHash::of(&content()), bytes).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        drop(partial);
        let (partial, here) = PartialFile::open(&path, ContentHash::of(b"other"), bytes).unwrap();
        assert!(here.iter().all(Option::is_none));
        partial.discard().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
