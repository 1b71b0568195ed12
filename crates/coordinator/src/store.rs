//! The coordinator's durable log.
//!
//! One JSON object a line, appended and synced before any later effect. A crash in mid-write leaves a torn last line, which
//! was never acted upon: it is cut off at the next start.

use base::{ContentHash, Hint, SiteId};
use rounds::coordinator::Record;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// Longest line read. A commit of 10,000 contributors, about 200 bytes each, and a ledger with as many ranges.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// What the log holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A machine was given a site id, which it keeps.
    Admitted {
        /// The id.
        admitted: SiteId,
        /// Its name.
        name: String,
        /// BLAKE3 of its certificate.
        fingerprint: ContentHash,
    },
    /// A decision.
    Decision(Record),
}

/// Where decisions outlive the process.
pub trait Store: Send {
    /// Appends one line; it is on stable storage when this returns.
    ///
    /// # Errors
    /// It could not be written: the caller must not act on it.
    fn append(&mut self, line: &Line) -> Result<(), StoreError>;
}

/// Why the log failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// It cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The log.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line in the middle is damaged: what follows cannot be trusted.
    #[error("{path}, line {line}: {reason}", path = path.display())]
    Damaged {
        /// The log.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What the parser met.
        reason: String,
    },
    /// Another coordinator uses it.
    #[error("{path}: another coordinator of this run is at work", path = path.display())]
    InUse {
        /// The log.
        path: PathBuf,
    },
}

impl Hint for StoreError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::File { path, .. } => format!("make room or allow writing: `df -h {}`", path.display()),
            Self::Damaged { path, .. } => {
                format!("restore {} from a copy; without it `beringia init` begins a new run", path.display())
            }
            Self::InUse { .. } => {
                "stop the other `beringia serve` of this run first: `pgrep -af 'beringia serve'`".to_owned()
            }
        })
    }
}

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
        let read = io::Read::take(&mut reader, LINE_BYTES_MAX).read_until(b'\n', &mut bytes);
        read.map_err(|source| StoreError::File { path: path.to_owned(), source })?;
        let too_long = bytes.len() as u64 == LINE_BYTES_MAX;
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
        let mut bytes = serde_json::to_vec(line)
            .unwrap_or_else(|error| unreachable!("every line is representable in JSON: {error}"));
        bytes.push(b'\n');
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        written.map_err(|source| StoreError::File { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::{Round, Term};

    fn term(term: u64) -> Line {
        Line::Decision(Record::TermStarted { term: Term(term) })
    }

    fn admitted() -> Line {
        Line::Admitted { admitted: SiteId(3), name: "site-d".to_owned(), fingerprint: ContentHash::of(b"d") }
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
