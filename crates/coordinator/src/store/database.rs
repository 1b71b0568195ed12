//! The log in an embedded database (redb): each line a key, counted from 1, each append a transaction that is on stable storage when it
//! returns.
//!
//! Over what the database checks itself, each line carries a hash of all lines up to it:
//! ```text
//! value_n = chain_n | json_n          chain_n = BLAKE3(chain_(n-1) | json_n),  chain_0 = 32 zero bytes
//! ```
//! So damage that the database does not see is still refused: what is read is what was written, or a beginning of it. A crash in
//! mid-append leaves the log without that line, which nobody has acted upon.
//!
//! The file appears by a rename, with what was taken over in it, or not at all: a crash while it is made leaves no half of one.

use super::{LINE_BYTES_MAX, Line, Store, StoreError};
use base::ContentHash;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageBackend, StorageError,
    TableDefinition, TableError,
};
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

const LINES: TableDefinition<u64, &[u8]> = TableDefinition::new("lines");

/// Memory of the database's cache: a log is read once, and only its end is written.
const CACHE_BYTES: usize = 4 << 20;

/// Bytes of a chain's hash before each line.
const CHAIN_BYTES: usize = size_of::<ContentHash>();

/// A log in a database, locked against a second coordinator.
#[derive(Debug)]
pub struct DatabaseStore {
    path: PathBuf,
    database: Database,
    /// Number and chain of the last line.
    last: (u64, ContentHash),
}

impl DatabaseStore {
    /// Opens the log and gives what it holds.
    ///
    /// # Errors
    /// It is in use, cannot be read, or is damaged.
    pub fn open(path: &Path) -> Result<(Self, Vec<Line>), StoreError> {
        Self::of(path, || builder().open(path))
    }

    /// The same on another kind of storage, empty or with a log in it. `path` is for people.
    ///
    /// # Errors
    /// As [`DatabaseStore::open`].
    pub fn on(path: &Path, storage: impl StorageBackend) -> Result<(Self, Vec<Line>), StoreError> {
        Self::of(path, || builder().create_with_backend(storage))
    }

    /// Makes a log that begins with `lines`, which it gives back. Where another coordinator has made one meanwhile, that is in use.
    ///
    /// # Errors
    /// It is in use or cannot be written.
    pub fn create(path: &Path, lines: &[Line]) -> Result<(Self, Vec<Line>), StoreError> {
        let partial = path.with_extension("partial");
        let failed = |source| StoreError::File { path: path.to_owned(), source };
        let (mut store, begun) = match Self::of(&partial, || builder().create(&partial)) {
            Err(StoreError::InUse { .. }) => return Err(StoreError::InUse { path: path.to_owned() }),
            // What a crash has left.
            Err(StoreError::Unreadable { .. } | StoreError::Damaged { .. }) => {
                std::fs::remove_file(&partial).map_err(failed)?;
                Self::of(&partial, || builder().create(&partial))?
            }
            other => other?,
        };
        if path.exists() {
            return Err(StoreError::InUse { path: path.to_owned() });
        }
        store.write(&lines[begun.len().min(lines.len())..])?;
        std::fs::rename(&partial, path).map_err(failed)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent).and_then(|folder| folder.sync_all()).map_err(failed)?;
        store.path = path.to_owned();
        Ok((store, lines.to_vec()))
    }

    fn of(
        path: &Path,
        open: impl FnOnce() -> Result<Database, DatabaseError>,
    ) -> Result<(Self, Vec<Line>), StoreError> {
        let unreadable = |reason: String| StoreError::Unreadable { path: path.to_owned(), reason };
        // In a debug build the database asserts what a damaged file breaks.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = open().map_err(|error| of_database(path, error))?;
            let mut lines = Vec::new();
            let last = read(path, &database, &mut lines)?;
            Ok((Self { path: path.to_owned(), database, last }, lines))
        }));
        opened.unwrap_or_else(|_| Err(unreadable("it breaks what the database relies on".to_owned())))
    }

    /// Appends lines in one transaction.
    fn write(&mut self, lines: &[Line]) -> Result<(), StoreError> {
        let mut last = self.last;
        let mut write = || -> Result<(), redb::Error> {
            let mut transaction = self.database.begin_write()?;
            transaction.set_durability(Durability::Immediate)?;
            {
                let mut table = transaction.open_table(LINES)?;
                for line in lines {
                    let json = line.encode();
                    last = (last.0 + 1, chained(last.1, &json));
                    table.insert(last.0, [&last.1.0[..], &json].concat().as_slice())?;
                }
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|error| StoreError::File { path: self.path.clone(), source: io_error(error) })?;
        self.last = last;
        Ok(())
    }
}

impl Store for DatabaseStore {
    fn append(&mut self, line: &Line) -> Result<(), StoreError> {
        self.write(std::slice::from_ref(line))
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

fn chained(chain: ContentHash, json: &[u8]) -> ContentHash {
    let mut hasher = ContentHash::hasher();
    hasher.update(&chain.0);
    hasher.update(json);
    ContentHash::finish(&hasher)
}

/// Reads every line; gives the number and the chain of the last one.
fn read(path: &Path, database: &Database, lines: &mut Vec<Line>) -> Result<(u64, ContentHash), StoreError> {
    let storage = |error: StorageError| of_database(path, error.into());
    let unreadable = |reason: String| StoreError::Unreadable { path: path.to_owned(), reason };
    let transaction = database.begin_read().map_err(|error| unreadable(error.to_string()))?;
    let table = match transaction.open_table(LINES) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok((0, ContentHash([0; 32]))),
        Err(error) => return Err(unreadable(error.to_string())),
    };
    let mut last = (0, ContentHash([0; 32]));
    for entry in table.iter().map_err(storage)? {
        let (number, value) = entry.map_err(storage)?;
        last = (last.0 + 1, read_line(path, (number.value(), value.value()), last, lines)?);
    }
    Ok(last)
}

fn read_line(
    path: &Path,
    (number, value): (u64, &[u8]),
    last: (u64, ContentHash),
    lines: &mut Vec<Line>,
) -> Result<ContentHash, StoreError> {
    let line = lines.len() + 1;
    let damaged = |reason: &str| StoreError::Damaged { path: path.to_owned(), line, reason: reason.to_owned() };
    if number != last.0 + 1 {
        return Err(damaged("a line is missing"));
    }
    if value.len() < CHAIN_BYTES || value.len() - CHAIN_BYTES > LINE_BYTES_MAX {
        return Err(damaged("its length is none that a line can have"));
    }
    let (chain, json) = value.split_at(CHAIN_BYTES);
    let expected = chained(last.1, json);
    if chain != expected.0 {
        return Err(damaged("it is not what was written"));
    }
    lines.push(serde_json::from_slice(json).map_err(|error| damaged(&error.to_string()))?);
    Ok(expected)
}

fn io_error(error: redb::Error) -> io::Error {
    match error {
        redb::Error::Io(source) => source,
        other => io::Error::other(other.to_string()),
    }
}

/// What the database says, in our words.
fn of_database(path: &Path, error: DatabaseError) -> StoreError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path },
        DatabaseError::Storage(StorageError::Io(source)) if !is_about_content(&source) => {
            StoreError::File { path, source }
        }
        other => StoreError::Unreadable { path, reason: other.to_string() },
    }
}

/// Whether the file could be read, but is too short or none of the database's.
fn is_about_content(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput)
}

#[cfg(test)]
mod tests {
    use super::super::{FileStore, open_log};
    use super::*;
    use base::layout::{COORDINATOR_DATABASE, COORDINATOR_LOG};
    use base::random::Random;
    use base::{Round, SiteId, Term};
    use rounds::coordinator::Record;

    fn line(number: u64) -> Line {
        match number % 3 {
            0 => Line::Decision(Record::TermStarted { term: Term(number) }),
            1 => Line::Decision(Record::RolledBack { to: Round(number) }),
            _ => {
                let fingerprint = ContentHash::of(&number.to_le_bytes());
                Line::Admitted {
                    admitted: SiteId(number as u32),
                    name: format!("site-{number}"),
                    fingerprint,
                    invite: None,
                }
            }
        }
    }

    fn lines(count: u64) -> Vec<Line> {
        (0..count).map(line).collect()
    }

    #[test]
    fn what_was_appended_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        for before in 0..5 {
            let (mut store, found) = open_log(folder.path()).unwrap();
            assert_eq!(found, lines(before));
            store.append(&line(before)).unwrap();
        }
        assert!(!folder.path().join("coordinator.partial").exists());
    }

    #[test]
    fn a_second_coordinator_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (first, _) = open_log(folder.path()).unwrap();
        assert!(matches!(open_log(folder.path()), Err(StoreError::InUse { .. })));
        drop(first);
        open_log(folder.path()).unwrap();
    }

    #[test]
    fn a_log_of_json_lines_is_taken_over_once() {
        let folder = tempfile::tempdir().unwrap();
        let (mut old, _) = FileStore::open(&folder.path().join(COORDINATOR_LOG)).unwrap();
        lines(4).iter().for_each(|line| old.append(line).unwrap());
        assert!(matches!(open_log(folder.path()), Err(StoreError::InUse { .. })), "the old one is still at work");
        drop(old);
        let (mut store, found) = open_log(folder.path()).unwrap();
        assert_eq!(found, lines(4));
        store.append(&line(4)).unwrap();
        drop(store);
        assert_eq!(open_log(folder.path()).unwrap().1, lines(5));
    }

    #[test]
    fn a_crash_while_the_log_was_made_is_made_good() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("coordinator.partial"), b"half of a datab").unwrap();
        let (mut store, found) = open_log(folder.path()).unwrap();
        assert!(found.is_empty());
        store.append(&line(0)).unwrap();
    }

    /// A log with some lines, as bytes.
    fn whole_file(count: u64) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let (mut store, _) = open_log(folder.path()).unwrap();
        (0..count).for_each(|number| store.append(&line(number)).unwrap());
        drop(store);
        std::fs::read(folder.path().join(COORDINATOR_DATABASE)).unwrap()
    }

    /// Whether that damaged file is refused; what is read from one that is not must be a beginning of what was written.
    fn is_refused(bytes: &[u8], written: &[Line]) -> bool {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(COORDINATOR_DATABASE), bytes).unwrap();
        match open_log(folder.path()) {
            Ok((_, found)) => {
                assert!(written.starts_with(&found), "{found:?}");
                false
            }
            Err(StoreError::Unreadable { .. } | StoreError::Damaged { .. }) => true,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_torn_or_flipped_file_is_refused_or_read_to_a_point() {
        const LINES_WRITTEN: u64 = 12;
        let (whole, written) = (whole_file(LINES_WRITTEN), lines(LINES_WRITTEN));
        assert!(!is_refused(&whole, &written));
        let mut random = Random::new(5, 0);
        let mut refused = 0;
        // What a panic in the database says is of no use here.
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        for _ in 0..60 {
            let length = random.next_below(whole.len() as u64) as usize;
            refused += u32::from(is_refused(&whole[..length], &written));
        }
        let used: Vec<usize> = (0..whole.len()).filter(|index| whole[*index] != 0).collect();
        for _ in 0..120 {
            let mut damaged = whole.clone();
            let place = used[random.next_below(used.len() as u64) as usize];
            damaged[place] ^= 1 << random.next_below(8);
            refused += u32::from(is_refused(&damaged, &written));
        }
        std::panic::set_hook(before);
        assert!(refused > 60, "{refused}");
    }
}
