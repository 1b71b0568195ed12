//! The log as a file: append-only JSON lines, read whole or followed while it grows.
//!
//! One `write` for each line, so that a crash tears at most the last one; opening again reports the torn line and
//! begins a new one. A full disk must not stop training: an append that fails is counted and the next one tries
//! again. Not a queue and not a database: readers poll by offset.

use crate::event::{EVENT_VERSION, Event, LineError, Record};
use base::Hint;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest line that is written or read, bytes: a `round_started` of 10,000 sites has about 100 bytes for each.
pub const LINE_BYTES_MAX: usize = 2 << 20;
/// Bytes read by one poll.
const POLL_BYTES_MAX: u64 = 4 << 20;
/// Bytes at the end of a log in which its last record is looked for: at least one whole line of any length.
const TAIL_BYTES: u64 = 2 * LINE_BYTES_MAX as u64;

/// Gives the time of a record, milliseconds since 1970-01-01 UTC.
pub type Clock = Box<dyn Fn() -> u64 + Send>;

/// The system's clock, for edge crates to pass to [`EventLog::open`].
pub fn system_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// Why a log could not be opened, written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The file cannot be opened.
    #[error("{path}: the event log cannot be opened: {source}", path = path.display())]
    Open {
        /// The log.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A record was not written; the run can go on.
    #[error("{path}: an event was not logged ({dropped} so far): {source}", path = path.display())]
    Append {
        /// The log.
        path: PathBuf,
        /// Records not written since the log was opened.
        dropped: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("{path}: the event log cannot be read: {source}", path = path.display())]
    Read {
        /// The log.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is shorter than what was already read: it is another file.
    #[error("{path}: has {found} bytes where {read} were read before: the log was replaced", path = path.display())]
    Replaced {
        /// The log.
        path: PathBuf,
        /// Bytes read so far.
        read: u64,
        /// Bytes there now.
        found: u64,
    },
}

impl Hint for LogError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Append { path, source, .. } if source.kind() == ErrorKind::StorageFull => {
                format!("free some space (`df -h {}`); logging goes on by itself", path.display())
            }
            Self::Open { path, .. } | Self::Append { path, .. } => {
                format!("make {} writable for this user", path.display())
            }
            Self::Read { path, .. } => format!("make {} readable for this user", path.display()),
            Self::Replaced { .. } => "run the command again to read the new log from its beginning".to_owned(),
        })
    }
}

/// Writes a log.
pub struct EventLog {
    path: PathBuf,
    file: File,
    source: String,
    clock: Clock,
    next_seq: u64,
    /// The file ends inside a line; the next write begins a new one.
    torn: bool,
    torn_bytes_found: u64,
    dropped: u64,
}

impl std::fmt::Debug for EventLog {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("EventLog").field("path", &self.path).field("next_seq", &self.next_seq).finish()
    }
}

impl EventLog {
    /// Opens or creates the log at `path`. Its records will name `source`; numbering goes on where it ended.
    ///
    /// # Errors
    /// The file cannot be created, read or written.
    pub fn open(path: &Path, source: &str, clock: Clock) -> Result<Self, LogError> {
        let opened = || -> io::Result<(File, End)> {
            let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
            let end = find_end(&mut file)?;
            Ok((file, end))
        };
        let (file, end) = opened().map_err(|source| LogError::Open { path: path.to_owned(), source })?;
        Ok(Self {
            path: path.to_owned(),
            file,
            source: source.to_owned(),
            clock,
            next_seq: end.next_seq,
            torn: end.torn_bytes > 0,
            torn_bytes_found: end.torn_bytes,
            dropped: 0,
        })
    }

    /// Bytes of the unfinished line that [`EventLog::open`] found at the end, 0 if there was none.
    pub fn torn_bytes_found(&self) -> u64 {
        self.torn_bytes_found
    }

    /// Records that could not be written since the log was opened.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Gives an event its number and time, without writing it: views are fed even where the disk is full.
    pub fn stamp(&mut self, event: Event) -> Record {
        let seq = self.next_seq;
        self.next_seq += 1;
        Record { v: EVENT_VERSION, seq, unix_ms: (self.clock)(), source: self.source.clone(), event }
    }

    /// Appends one record with one write.
    ///
    /// # Errors
    /// [`LogError::Append`]; the record is dropped and counted, and a later append may succeed again.
    pub fn append(&mut self, record: &Record) -> Result<(), LogError> {
        let line = record.to_line();
        let written = if line.len() > LINE_BYTES_MAX {
            Err(io::Error::new(ErrorKind::InvalidInput, format!("{} bytes, at most {LINE_BYTES_MAX}", line.len())))
        } else {
            self.write_line(&line)
        };
        written.map_err(|source| {
            self.dropped += 1;
            LogError::Append { path: self.path.clone(), dropped: self.dropped, source }
        })
    }

    fn write_line(&mut self, line: &str) -> io::Result<()> {
        let written = append_line(&mut self.file, line, self.torn);
        self.torn = written.is_err();
        written
    }
}

/// After a torn line, a line end comes first; should nothing of the torn one be there, it only adds an empty line.
fn append_line(writer: &mut impl Write, line: &str, after_torn: bool) -> io::Result<()> {
    if after_torn { writer.write_all(format!("\n{line}").as_bytes()) } else { writer.write_all(line.as_bytes()) }
}

/// How a log ends.
struct End {
    next_seq: u64,
    torn_bytes: u64,
}

/// Looks at the tail, and at the whole file only if no record is there.
fn find_end(file: &mut File) -> io::Result<End> {
    let length = file.metadata()?.len();
    let tail = end_from(file, length.saturating_sub(TAIL_BYTES), length)?;
    if tail.next_seq > 0 || length <= TAIL_BYTES { Ok(tail) } else { end_from(file, 0, length) }
}

/// Reads from `start` up to `length` and no further: a device may have no end.
fn end_from(file: &mut File, start: u64, length: u64) -> io::Result<End> {
    file.seek(SeekFrom::Start(start))?;
    let mut rest = file.take(length - start);
    let mut lines = Lines::default();
    let mut next_seq = 0;
    let mut count = |line: &[u8]| {
        if let Ok(numbered) = serde_json::from_slice::<Numbered>(line) {
            next_seq = next_seq.max(numbered.seq.saturating_add(1));
        }
    };
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = rest.read(&mut buffer)?;
        if read == 0 {
            // Whole but for its line end, a record is completed by the line end that the next one brings.
            count(&lines.partial);
            return Ok(End { next_seq, torn_bytes: lines.unfinished_bytes });
        }
        lines.push(&buffer[..read], |line| line.into_iter().for_each(&mut count));
    }
}

/// The number of a record, also of one of the future.
#[derive(serde::Deserialize)]
struct Numbered {
    seq: u64,
}

/// Cuts a stream into lines, in bounded memory.
#[derive(Debug, Default)]
struct Lines {
    partial: Vec<u8>,
    /// Bytes since the last line end, those not kept included.
    unfinished_bytes: u64,
}

impl Lines {
    /// Calls `each` for every line that ends in `bytes`, without its line end; `None` stands for a line longer
    /// than [`LINE_BYTES_MAX`].
    fn push(&mut self, bytes: &[u8], mut each: impl FnMut(Option<&[u8]>)) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (content, ends) = part.strip_suffix(b"\n").map_or((part, false), |content| (content, true));
            self.unfinished_bytes += content.len() as u64;
            if self.unfinished_bytes <= LINE_BYTES_MAX as u64 {
                self.partial.extend_from_slice(content);
            }
            if ends {
                each((self.unfinished_bytes <= LINE_BYTES_MAX as u64).then_some(&self.partial));
                self.partial.clear();
                self.unfinished_bytes = 0;
            }
        }
    }
}

/// Lines that a reader passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SkippedLines {
    /// Records of a newer program.
    pub unknown: u64,
    /// Torn, damaged or too long.
    pub malformed: u64,
}

/// Reads a log while it grows.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    offset: u64,
    lines: Lines,
    skipped: SkippedLines,
}

impl Follower {
    /// Follows the log at `path` from its beginning. The file may not exist yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), offset: 0, lines: Lines::default(), skipped: SkippedLines::default() }
    }

    /// Records that were completed since the last poll; empty if there are none. One poll reads a bounded part:
    /// poll again until it returns nothing to catch up.
    ///
    /// # Errors
    /// The file cannot be read, or was replaced by a shorter one.
    pub fn poll(&mut self) -> Result<Vec<Record>, LogError> {
        let mut records = Vec::new();
        while records.is_empty() && self.poll_once(&mut records)? > 0 {}
        Ok(records)
    }

    /// Reads at most [`POLL_BYTES_MAX`]; returns how many bytes.
    fn poll_once(&mut self, records: &mut Vec<Record>) -> Result<u64, LogError> {
        let bytes = match self.read_new() {
            Err(LogError::Read { source, .. }) if source.kind() == ErrorKind::NotFound && self.offset == 0 => {
                return Ok(0);
            }
            other => other?,
        };
        self.offset += bytes.len() as u64;
        let skipped = &mut self.skipped;
        self.lines.push(&bytes, |line| match line.map(Record::from_line) {
            Some(Ok(record)) => records.push(record),
            Some(Err(LineError::Unknown { .. })) => skipped.unknown += 1,
            // An empty line closes a torn one and is nothing in itself.
            Some(Err(LineError::Malformed { .. })) if line.is_some_and(<[u8]>::is_empty) => {}
            Some(Err(LineError::Malformed { .. })) | None => skipped.malformed += 1,
        });
        Ok(bytes.len() as u64)
    }

    fn read_new(&self) -> Result<Vec<u8>, LogError> {
        let in_context = |source| LogError::Read { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(in_context)?;
        let found = file.metadata().map_err(in_context)?.len();
        if found < self.offset {
            return Err(LogError::Replaced { path: self.path.clone(), read: self.offset, found });
        }
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.offset)).map_err(in_context)?;
        file.take(POLL_BYTES_MAX.min(found - self.offset)).read_to_end(&mut bytes).map_err(in_context)?;
        Ok(bytes)
    }

    /// Lines passed over so far.
    pub fn skipped(&self) -> SkippedLines {
        self.skipped
    }

    /// Bytes of the line that has not ended yet: more follow, or the writer was cut off.
    pub fn unfinished_bytes(&self) -> u64 {
        self.lines.unfinished_bytes
    }
}

/// The records of a log, in bounded memory. After the last one, [`Records::skipped`] tells what was passed over.
#[derive(Debug)]
pub struct Records {
    follower: Follower,
    ready: VecDeque<Record>,
    failed: bool,
}

/// Reads the log at `path` from its beginning.
///
/// # Errors
/// The file does not exist or cannot be opened.
pub fn read(path: &Path) -> Result<Records, LogError> {
    File::open(path).map_err(|source| LogError::Open { path: path.to_owned(), source })?;
    Ok(Records { follower: Follower::new(path), ready: VecDeque::new(), failed: false })
}

impl Records {
    /// Lines passed over so far, an unfinished last one not counted.
    pub fn skipped(&self) -> SkippedLines {
        self.follower.skipped()
    }

    /// Bytes of an unfinished last line, once the iterator has ended.
    pub fn unfinished_bytes(&self) -> u64 {
        self.follower.unfinished_bytes()
    }
}

impl Iterator for Records {
    type Item = Result<Record, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty() && !self.failed {
            match self.follower.poll() {
                Ok(records) => self.ready.extend(records),
                Err(error) => {
                    // An error is reported once; asking again would report it for ever.
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod log_tests;
