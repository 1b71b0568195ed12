//! The coordinator's durable log: what is behind [`Store`], and how it is opened.
//!
//! It is an embedded [`database`]; a log of JSON [`lines`] that an earlier coordinator wrote is taken over once. Whatever holds it, a
//! line is on stable storage before the effect of its decision leaves the process.

pub mod database;
pub mod lines;

pub use database::DatabaseStore;
pub use lines::FileStore;

use base::layout::{COORDINATOR_DATABASE, COORDINATOR_LOG};
use base::{ContentHash, Hint, SiteId};
use rounds::coordinator::Record;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

/// Longest line read. A commit of 10,000 contributors, about 200 bytes each, and a ledger with as many ranges.
const LINE_BYTES_MAX: usize = 16 << 20;

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
        /// Digest of the invite for one machine that it came with: nobody else may.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        invite: Option<ContentHash>,
    },
    /// A machine may not come back.
    Revoked {
        /// BLAKE3 of its certificate.
        revoked: ContentHash,
    },
    /// A decision.
    Decision(Record),
}

impl Line {
    /// As it is written.
    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_else(|error| unreachable!("every line is representable in JSON: {error}"))
    }
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
    /// The file is not such a log, or no longer one.
    #[error("{path}: the coordinator's log is damaged: {reason}", path = path.display())]
    Unreadable {
        /// The log.
        path: PathBuf,
        /// What the database met.
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
            Self::Damaged { path, .. } | Self::Unreadable { path, .. } => {
                format!("restore {} from a copy; without it `beringia init` begins a new run", path.display())
            }
            Self::InUse { .. } => {
                "stop the other `beringia serve` of this run first: `pgrep -af 'beringia serve'`".to_owned()
            }
        })
    }
}

/// Opens the log of the run in `folder` and gives what it holds. Where there is only a log of JSON lines, that is taken over.
///
/// # Errors
/// It is in use, cannot be read, or is damaged.
pub fn open_log(folder: &Path) -> Result<(DatabaseStore, Vec<Line>), StoreError> {
    let path = folder.join(COORDINATOR_DATABASE);
    if path.exists() {
        return DatabaseStore::open(&path);
    }
    let lines_path = folder.join(COORDINATOR_LOG);
    if !lines_path.exists() {
        return DatabaseStore::create(&path, &[]);
    }
    // Locked until the database, which is locked as well, is in its place.
    let (_locked, lines) = FileStore::open(&lines_path)?;
    DatabaseStore::create(&path, &lines)
}
