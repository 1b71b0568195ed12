//! A log of JSON lines: what people can read, and what coordinators wrote before the log was a [`super::database`].
//!
//! One JSON object a line, appended and synced before any later effect. A crash in mid-write leaves a torn last line, which
//! was never acted upon: it is cut off at the next start.

use super::{LINE_BYTES_MAX, Line, Store, StoreError};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// A log in a file, locked against a second coordinator.
#[derive(Debug)]
pub struct FileStore {
    path: PathBuf,
    file: File,
}

impl FileStore {
    /// Opens the log and gives what it holds.
    ///
    /// # Errors
    /// It is in use, cannot be read, or is damaged in the middle.
    pub fn open(path: &Path) -> Result<(Self, Vec<Line>), StoreError> {
        let failed = |source| StoreError::File { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).open(path).map_err(failed)?;
        file.try_lock().map_err(|_| StoreError::InUse { path: path.to_owned() })?;
        let (lines, whole_bytes) = read_lines(path, &file)?;
        file.set_len(whole_bytes).and_then(|()| file.sync_all()).map_err(failed)?;
        Ok((Self { path: path.to_owned(), file }, lines))
    }
}

/// All whole lines, and how many bytes they take.
fn read_lines(path: &Path, file: &File) -> Result<(Vec<Line>, u64), StoreError> {
    let (mut lines, mut whole_bytes) = (Vec::new(), 0);
    let mut reader = BufReader::new(file);
    loop {
        let mut bytes = Vec::new();
        let read = io::Read::take(&mut reader, LINE_BYTES_MAX as u64).read_until(b'\n', &mut bytes);
        read.map_err(|source| StoreError::File { path: path.to_owned(), source })?;
        let too_long = bytes.len() == LINE_BYTES_MAX;
        if bytes.last() != Some(&b'\n') && !too_long {
            return Ok((lines, whole_bytes));
        }
        let line = serde_json::from_slice(&bytes).map_err(|error| StoreError::Damaged {
            path: path.to_owned(),
            line: lines.len() + 1,
            reason: error.to_string(),
        })?;
        lines.push(line);
        whole_bytes += bytes.len() as u64;
    }
}

impl Store for FileStore {
    fn append(&mut self, line: &Line) -> Result<(), StoreError> {
        let mut bytes = line.encode();
        bytes.push(b'\n');
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        written.map_err(|source| StoreError::File { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::{ContentHash, Round, SiteId, Term};
    use rounds::coordinator::Record;

    fn term(term: u64) -> Line {
        Line::Decision(Record::TermStarted { term: Term(term) })
    }

    fn admitted() -> Line {
        Line::Admitted {
            admitted: SiteId(3),
            name: "site-d".to_owned(),
            fingerprint: ContentHash::of(b"d"),
            invite: None,
        }
    }

    #[test]
    fn what_was_appended_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let written = [term(1), admitted(), Line::Decision(Record::RolledBack { to: Round(2) })];
        let (mut store, nothing) = FileStore::open(&path).unwrap();
        assert!(nothing.is_empty());
        written.iter().for_each(|line| store.append(line).unwrap());
        drop(store);
        assert_eq!(FileStore::open(&path).unwrap().1, written);
    }

    #[test]
    fn a_torn_last_line_is_cut_off_and_a_damaged_middle_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut store, _) = FileStore::open(&path).unwrap();
        store.append(&term(1)).unwrap();
        store.append(&admitted()).unwrap();
        drop(store);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let (mut store, lines) = FileStore::open(&path).unwrap();
            store.append(&term(2)).unwrap();
            drop(store);
            let expected = whole[..length].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(lines.len(), expected, "{length} bytes");
            assert_eq!(FileStore::open(&path).unwrap().1.len(), expected + 1, "{length} bytes");
        }
        let mut damaged = whole;
        damaged[3] = b'#';
        std::fs::write(&path, damaged).unwrap();
        assert!(matches!(FileStore::open(&path), Err(StoreError::Damaged { line: 1, .. })));
    }

    #[test]
    fn a_second_coordinator_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let first = FileStore::open(&path).unwrap();
        assert!(matches!(FileStore::open(&path), Err(StoreError::InUse { .. })));
        drop(first);
        FileStore::open(&path).unwrap();
    }
}
