//! Checkpoints of a run: folders that are either whole or refused.
//!
//! ```text
//! checkpoints/
//!   round-00000012/
//!     model.safetensors   one file for each (stem, tensors) the caller gives
//!     outer.safetensors
//!     state.json          whatever else the caller needs to continue
//!     manifest.json       format version, round, and name, bytes and BLAKE3 of each file above
//!     manifest.blake3     the hash of manifest.json: the last file written
//! ```
//!
//! A save writes all of it under a temporary name, syncs every file and the folder, renames, syncs the parent,
//! and only then removes old checkpoints. Whatever is cut off at whatever point, a checkpoint that was there
//! before the save still loads, or the new one does. Loading compares every size and every hash; what does not
//! match is skipped with its reason, and the checkpoint before it is taken.
//!
//! Not a lock: one process at a time saves under one root.

use crate::disk::{Disk, DurableFile, RealDisk};
use crate::tensors::{self, Choice, Formats, ReaderBounds, TensorsError};
use base::{ContentHash, Hint, NamedTensors, Round};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Version of the folder's layout; a reader refuses a newer one.
pub const FORMAT_VERSION: u32 = 1;
/// Checkpoints kept at least: one to load and one to fall back to.
pub const KEEP_MIN: usize = 2;
/// Longest name of a tensor file, without its extension.
pub const STEM_BYTES_MAX: usize = 64;

const FORMAT_NAME: &str = "beringia-checkpoint";
const MANIFEST_FILE: &str = "manifest.json";
const MANIFEST_HASH_FILE: &str = "manifest.blake3";
const STATE_FILE: &str = "state.json";
const TENSORS_EXTENSION: &str = ".safetensors";
const ROUND_PREFIX: &str = "round-";
/// A folder being written. Never loaded; removed at the next save.
const SAVING_PREFIX: &str = ".saving-";
/// A folder being removed. Never loaded; removed at the next save.
const REMOVING_PREFIX: &str = ".removing-";
/// A checkpoint moved aside for a new one of the same round. Loaded if the new one never arrived.
const REPLACED_SUFFIX: &str = ".replaced";

/// What [`save`] wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Wall-clock time of the save.
    pub seconds: f64,
    /// BLAKE3 of `manifest.json`, which holds the hash of everything else.
    pub manifest_hash: ContentHash,
    /// Older folders that should be gone but could not be removed, and why. The checkpoint itself is safe.
    pub warnings: Vec<String>,
}

/// Why nothing was saved. Earlier checkpoints are as they were, and nothing of this one is left if the file system
/// lets it be removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// No room: the device, the quota or the file size limit is exhausted.
    #[error("{path}: no room for a checkpoint of {bytes_needed} bytes: {source}", path = path.display())]
    DiskFull {
        /// What could not be written.
        path: PathBuf,
        /// Bytes of the whole checkpoint.
        bytes_needed: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Not allowed to write there, or the file system is read-only.
    #[error("{path}: a checkpoint may not be written here: {source}", path = path.display())]
    NotWritable {
        /// What could not be written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else that the file system refused.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// For example `rename the new checkpoint`.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A tensor file name that is empty, too long, repeated, or not letters, digits, `-` and `_`.
    #[error("tensor file name '{stem}': {reason}")]
    Stem {
        /// The name as given.
        stem: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Tensors that contradict their shapes.
    #[error("{stem}.safetensors: {source}")]
    Tensors {
        /// Name of the tensor file.
        stem: String,
        /// The contradiction.
        source: TensorsError,
    },
    /// A state or header that no reader would accept.
    #[error("{file}: {reason}")]
    Unreadable {
        /// Name of the file.
        file: String,
        /// Why it could not be read back.
        reason: String,
    },
}

impl Hint for SaveError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::DiskFull { path, bytes_needed, .. } => {
                format!("free {bytes_needed} bytes (`df -h {}`) or lower [checkpoint] keep", parent_of(path).display())
            }
            Self::NotWritable { path, .. } => format!("make {} writable for this user", parent_of(path).display()),
            Self::Io { path, .. } => format!("check the disk that holds {}", path.display()),
            Self::Stem { .. } | Self::Tensors { .. } | Self::Unreadable { .. } => {
                "this is a mistake in the program; please report it".to_owned()
            }
        })
    }
}

/// A checkpoint that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// A checkpoint whose every byte was verified.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<S> {
    /// The round it was saved after.
    pub round: Round,
    /// By stem, as given to [`save`].
    pub tensors: BTreeMap<String, NamedTensors>,
    /// The caller's state.
    pub state: S,
    /// Its folder.
    pub path: PathBuf,
    /// BLAKE3 of `manifest.json`.
    pub manifest_hash: ContentHash,
    /// Newer ones that were refused, newest first.
    pub skipped: Vec<Skipped>,
}

/// Why no checkpoint was loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is none: a run that has not saved yet.
    #[error("{path}: no checkpoint here", path = path.display())]
    NotFound {
        /// Where one was looked for.
        path: PathBuf,
    },
    /// There are some, and every one is damaged.
    #[error(
        "{path}: none of {count} checkpoints is intact; the newest: {reason}",
        path = root.display(), count = skipped.len(),
        reason = skipped.first().map_or("", |first| first.reason.as_str())
    )]
    NoneIntact {
        /// The folder of checkpoints.
        root: PathBuf,
        /// Each with its reason, newest first.
        skipped: Vec<Skipped>,
    },
    /// Missing, truncated or changed content.
    #[error("{path}: {reason}", path = path.display())]
    Damaged {
        /// The file at fault.
        path: PathBuf,
        /// Expected and found.
        reason: String,
    },
    /// Intact, but written by a newer program.
    #[error("{path}: format version {found}, this program reads up to {FORMAT_VERSION}", path = path.display())]
    Version {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Intact, but its state is not what the caller expects.
    #[error("{path}: the saved state is of another kind: {reason}", path = path.display())]
    State {
        /// The state file.
        path: PathBuf,
        /// The first difference.
        reason: String,
    },
    /// The folder cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Hint for LoadError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => "start the run with `beringia train`; it saves by itself".to_owned(),
            Self::NoneIntact { root, .. } => {
                format!("restore a copy into {}, or move the folder away to start the run again", root.display())
            }
            Self::Damaged { path, .. } => {
                format!("remove {} to fall back to the checkpoint before it", parent_of(path).display())
            }
            Self::Version { .. } | Self::State { .. } => {
                "use the version of beringia that wrote this checkpoint, or a newer one".to_owned()
            }
            Self::Io { path, .. } => format!("make {} readable for this user", path.display()),
        })
    }
}

/// One checkpoint folder, not yet verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// From its name.
    pub round: Round,
    /// Its folder.
    pub path: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: String,
    version: u32,
    round: Round,
    files: Vec<ManifestFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ManifestFile {
    name: String,
    bytes: u64,
    blake3: ContentHash,
}

fn parent_of(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

fn folder_name(round: Round) -> String {
    format!("{ROUND_PREFIX}{:08}", round.0)
}

/// Saves a checkpoint of `round` under `root` (created if missing) and removes old ones down to `keep` (at least
/// [`KEEP_MIN`]). Each of `tensors` becomes `<stem>.safetensors`. A checkpoint of the same round is replaced; those
/// of later rounds (damaged ones that a resume skipped) are left alone and not counted.
///
/// # Errors
/// See [`SaveError`]; what was saved before stays as it was.
pub fn save<S: Serialize>(
    root: &Path,
    round: Round,
    tensors: &[(&str, &NamedTensors)],
    state: &S,
    keep: usize,
) -> Result<Saved, SaveError> {
    save_on(&RealDisk, root, round, tensors, state, keep)
}

fn save_on<S: Serialize>(
    disk: &dyn Disk,
    root: &Path,
    round: Round,
    tensors: &[(&str, &NamedTensors)],
    state: &S,
    keep: usize,
) -> Result<Saved, SaveError> {
    let started = Instant::now();
    let content = Content::prepare(tensors, state)?;
    let bytes_needed = content.bytes();
    let folder = root.join(folder_name(round));
    let temporary = root.join(format!("{SAVING_PREFIX}{}", folder_name(round)));
    let in_context = |action, path: &Path, source| save_error(action, path, bytes_needed, source);

    disk.create_folder(root).map_err(|error| in_context("create the folder of checkpoints", root, error))?;
    let mut warnings = remove_leftovers(disk, root);
    if temporary.exists() {
        let removed = disk.remove_folder(&temporary);
        removed.map_err(|error| in_context("remove what an interrupted save left", &temporary, error))?;
    }
    let written = write_folder(disk, &temporary, round, &content)
        .and_then(|hash| publish(disk, root, &temporary, &folder).map(|()| hash));
    let (bytes, manifest_hash) = written.map_err(|failed| {
        // Best effort: on the disk that just failed this may fail too, and the next save tries again.
        let _ = disk.remove_folder(&temporary);
        in_context(failed.action, &failed.path, failed.source)
    })?;
    warnings.extend(prune(disk, root, round, keep));
    Ok(Saved { path: folder, bytes, seconds: started.elapsed().as_secs_f64(), manifest_hash, warnings })
}

/// Everything that will be written, checked against what readers accept before the disk is touched.
struct Content<'a> {
    tensors: Vec<(String, Vec<u8>, &'a NamedTensors)>,
    state: Vec<u8>,
}

impl<'a> Content<'a> {
    fn prepare<S: Serialize>(tensors: &[(&str, &'a NamedTensors)], state: &S) -> Result<Self, SaveError> {
        let bounds = ReaderBounds::default();
        let mut files: Vec<(String, Vec<u8>, &NamedTensors)> = Vec::with_capacity(tensors.len());
        for &(stem, named) in tensors {
            let refuse = |reason| SaveError::Stem { stem: stem.to_owned(), reason };
            let file = format!("{stem}{TENSORS_EXTENSION}");
            if !stem_is_plain(stem) {
                return Err(refuse("1 to 64 letters, digits, '-' or '_' are expected"));
            }
            if files.iter().any(|(name, ..)| *name == file) {
                return Err(refuse("is given twice"));
            }
            let header = tensors::header_bytes(named, None)
                .map_err(|source| SaveError::Tensors { stem: stem.to_owned(), source })?;
            refuse_unreadable(&file, header.len() as u64, bounds.header_bytes_max)?;
            files.push((file, header, named));
        }
        let unreadable = |error: serde_json::Error| SaveError::Unreadable {
            file: STATE_FILE.to_owned(),
            reason: format!("cannot be written as JSON: {error}"),
        };
        let state = serde_json::to_vec(state).map_err(unreadable)?;
        refuse_unreadable(STATE_FILE, state.len() as u64, bounds.json_bytes_max)?;
        Ok(Self { tensors: files, state })
    }

    fn bytes(&self) -> u64 {
        let tensors: usize = self.tensors.iter().map(|(_, header, named)| tensors::encoded_len(header, named)).sum();
        (tensors + self.state.len()) as u64
    }
}

fn stem_is_plain(stem: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    !stem.is_empty() && stem.len() <= STEM_BYTES_MAX && stem.chars().all(plain)
}

fn refuse_unreadable(file: &str, bytes: u64, maximum: u64) -> Result<(), SaveError> {
    if bytes <= maximum {
        return Ok(());
    }
    let reason = format!("{bytes} bytes, readers accept {maximum}");
    Err(SaveError::Unreadable { file: file.to_owned(), reason })
}

/// A step of a save that failed.
struct StepFailed {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StepFailed {
    let path = path.to_owned();
    move |source| StepFailed { action, path, source }
}

fn save_error(action: &'static str, path: &Path, bytes_needed: u64, source: io::Error) -> SaveError {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            SaveError::DiskFull { path, bytes_needed, source }
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => SaveError::NotWritable { path, source },
        _ => SaveError::Io { action, path, source },
    }
}

/// Counts and hashes what passes through.
struct Hashing<W> {
    inner: W,
    hasher: Box<blake3::Hasher>,
    bytes: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hasher: Box::new(ContentHash::hasher()), bytes: 0 }
    }

    fn passed(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn hash(&self) -> ContentHash {
        ContentHash::finish(&self.hasher)
    }
}

impl Write for Hashing<Box<dyn DurableFile + '_>> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.passed(&buffer[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Read for Hashing<File> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.passed(&buffer[..read]);
        Ok(read)
    }
}

/// Writes one file of the temporary folder to stable storage.
fn write_file(
    disk: &dyn Disk,
    folder: &Path,
    name: &str,
    content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<ManifestFile, StepFailed> {
    let path = folder.join(name);
    let written = || -> io::Result<ManifestFile> {
        let mut file = Hashing::new(disk.create_file(&path)?);
        content(&mut file)?;
        file.inner.sync()?;
        Ok(ManifestFile { name: name.to_owned(), bytes: file.bytes, blake3: file.hash() })
    };
    written().map_err(failed("write", &path))
}

/// Writes the whole temporary folder; returns its bytes and the manifest's hash.
fn write_folder(
    disk: &dyn Disk,
    folder: &Path,
    round: Round,
    content: &Content<'_>,
) -> Result<(u64, ContentHash), StepFailed> {
    disk.create_folder(folder).map_err(failed("create the temporary folder", folder))?;
    let mut files = Vec::with_capacity(content.tensors.len() + 1);
    for (name, header, named) in &content.tensors {
        files.push(write_file(disk, folder, name, |file| tensors::write_tensors(file, header, named))?);
    }
    files.push(write_file(disk, folder, STATE_FILE, |file| file.write_all(&content.state))?);
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    let manifest = Manifest { format: FORMAT_NAME.to_owned(), version: FORMAT_VERSION, round, files };
    let json = serde_json::to_vec_pretty(&manifest)
        .map_err(io::Error::other)
        .map_err(failed("encode", &folder.join(MANIFEST_FILE)))?;
    let manifest = write_file(disk, folder, MANIFEST_FILE, |file| file.write_all(&json))?;
    let seal = seal_text(manifest.blake3);
    let sealed = write_file(disk, folder, MANIFEST_HASH_FILE, |file| file.write_all(seal.as_bytes()))?;
    disk.sync_folder(folder).map_err(failed("sync", folder))?;
    Ok((bytes + manifest.bytes + sealed.bytes, manifest.blake3))
}

/// The exact content of `manifest.blake3`: compared as text, so that no other spelling of a hash passes.
fn seal_text(manifest: ContentHash) -> String {
    format!("{manifest}\n")
}

/// Gives the finished folder its name. An existing checkpoint of the same round is moved aside first: at every
/// moment one of the two is there under a name that [`list`] knows.
fn publish(disk: &dyn Disk, root: &Path, temporary: &Path, folder: &Path) -> Result<(), StepFailed> {
    let replaced = replaced_path(folder);
    let replaces = folder.exists();
    if replaces {
        if replaced.exists() {
            disk.remove_folder(&replaced).map_err(failed("remove a replaced checkpoint", &replaced))?;
        }
        disk.rename(folder, &replaced).map_err(failed("move the checkpoint of the same round aside", folder))?;
    }
    if let Err(source) = disk.rename(temporary, folder) {
        if replaces {
            // Undo as far as the disk allows; under its other name the old one is found all the same.
            let _ = disk.rename(&replaced, folder);
        }
        return Err(failed("rename the new checkpoint", folder)(source));
    }
    disk.sync_folder(root).map_err(failed("sync", root))
}

fn replaced_path(folder: &Path) -> PathBuf {
    let mut path = folder.as_os_str().to_owned();
    path.push(REPLACED_SUFFIX);
    path.into()
}

/// Removes what an interrupted save left behind.
fn remove_leftovers(disk: &dyn Disk, root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let leftover = |name: &str| name.starts_with(SAVING_PREFIX) || name.starts_with(REMOVING_PREFIX);
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(leftover))
        .filter_map(|entry| remove_or_warn(disk, &entry.path()))
        .collect()
}

/// Removes checkpoints older than `round` beyond the `keep` newest (which count `round` itself), and everything
/// that newer saves have replaced.
fn prune(disk: &dyn Disk, root: &Path, round: Round, keep: usize) -> Vec<String> {
    let Ok(entries) = list(root) else { return Vec::new() };
    let is_replaced = |entry: &&Entry| entry.path.to_str().is_some_and(|path| path.ends_with(REPLACED_SUFFIX));
    let (replaced, whole): (Vec<&Entry>, Vec<&Entry>) = entries.iter().partition(is_replaced);
    let superseded = replaced.into_iter().filter(|aside| whole.iter().any(|entry| entry.round == aside.round));
    let old = whole.iter().copied().filter(|entry| entry.round <= round).skip(keep.max(KEEP_MIN));
    superseded.chain(old).filter_map(|entry| retire(disk, root, entry)).collect()
}

/// Removes one checkpoint; it loses its name first, so that a crash leaves no half of it among the others.
fn retire(disk: &dyn Disk, root: &Path, entry: &Entry) -> Option<String> {
    let name = entry.path.file_name()?.to_str()?;
    let doomed = root.join(format!("{REMOVING_PREFIX}{name}"));
    match disk.rename(&entry.path, &doomed) {
        Ok(()) => remove_or_warn(disk, &doomed),
        Err(error) => Some(format!("{}: not removed: {error}", entry.path.display())),
    }
}

fn remove_or_warn(disk: &dyn Disk, path: &Path) -> Option<String> {
    disk.remove_folder(path).err().map(|error| format!("{}: not removed: {error}", path.display()))
}

/// Checkpoint folders under `root`, newest first, by name alone.
///
/// # Errors
/// [`LoadError::NotFound`] where there is no such folder, [`LoadError::Io`] where it cannot be read.
pub fn list(root: &Path) -> Result<Vec<Entry>, LoadError> {
    let io = |source: io::Error| match source.kind() {
        ErrorKind::NotFound => LoadError::NotFound { path: root.to_owned() },
        _ => LoadError::Io { path: root.to_owned(), source },
    };
    let mut entries = Vec::new();
    for entry in fs::read_dir(root).map_err(io)? {
        let entry = entry.map_err(io)?;
        if let Some(round) = entry.file_name().to_str().and_then(round_of_name) {
            entries.push(Entry { round, path: entry.path() });
        }
    }
    // Within a round the longer name, the replaced one, comes last.
    entries.sort_by(|a, b| b.round.cmp(&a.round).then_with(|| a.path.cmp(&b.path)));
    Ok(entries)
}

fn round_of_name(name: &str) -> Option<Round> {
    let digits = name.strip_suffix(REPLACED_SUFFIX).unwrap_or(name).strip_prefix(ROUND_PREFIX)?;
    let round = Round(digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??);
    (folder_name(round) == format!("{ROUND_PREFIX}{digits}")).then_some(round)
}

/// Loads the newest checkpoint that is intact. Damaged ones are skipped and named in [`Loaded::skipped`].
///
/// # Errors
/// [`LoadError::NotFound`] for a run that never saved, [`LoadError::NoneIntact`] when nothing can be trusted;
/// [`LoadError::Version`] and [`LoadError::State`] at once, because an older checkpoint would silently lose work.
pub fn load_latest<S: DeserializeOwned>(root: &Path) -> Result<Loaded<S>, LoadError> {
    load_latest_within(root, &ReaderBounds::default())
}

/// [`load_latest`] with other bounds.
///
/// # Errors
/// As [`load_latest`].
pub fn load_latest_within<S: DeserializeOwned>(root: &Path, bounds: &ReaderBounds) -> Result<Loaded<S>, LoadError> {
    let mut skipped = Vec::new();
    for entry in list(root)? {
        let reason = match load_within::<S>(&entry.path, bounds) {
            Ok(loaded) if loaded.round == entry.round => return Ok(Loaded { skipped, ..loaded }),
            Ok(loaded) => format!("the folder's name says round {}, its manifest {}", entry.round, loaded.round),
            Err(error @ (LoadError::Version { .. } | LoadError::State { .. })) => return Err(error),
            Err(error) => error.to_string(),
        };
        skipped.push(Skipped { path: entry.path, reason });
    }
    if skipped.is_empty() {
        return Err(LoadError::NotFound { path: root.to_owned() });
    }
    Err(LoadError::NoneIntact { root: root.to_owned(), skipped })
}

/// Loads the checkpoint in that folder.
///
/// # Errors
/// See [`LoadError`].
pub fn load<S: DeserializeOwned>(folder: &Path) -> Result<Loaded<S>, LoadError> {
    load_within(folder, &ReaderBounds::default())
}

/// [`load`] with other bounds.
///
/// # Errors
/// See [`LoadError`].
pub fn load_within<S: DeserializeOwned>(folder: &Path, bounds: &ReaderBounds) -> Result<Loaded<S>, LoadError> {
    if !folder.is_dir() {
        return Err(LoadError::NotFound { path: folder.to_owned() });
    }
    let (manifest, manifest_hash) = read_manifest(folder, bounds)?;
    let mut tensors = BTreeMap::new();
    let mut state = None;
    for file in &manifest.files {
        let path = folder.join(&file.name);
        if file.name == STATE_FILE {
            state = Some(read_state(&path, file, bounds)?);
        } else if let Some(stem) = file.name.strip_suffix(TENSORS_EXTENSION).filter(|stem| stem_is_plain(stem)) {
            tensors.insert(stem.to_owned(), read_tensor_file(&path, file, bounds)?);
        } else {
            return Err(damaged(&folder.join(MANIFEST_FILE), format!("lists a file named {:?}", file.name)));
        }
    }
    let state = state.ok_or_else(|| damaged(&folder.join(MANIFEST_FILE), format!("lists no {STATE_FILE}")))?;
    Ok(Loaded { round: manifest.round, tensors, state, path: folder.to_owned(), manifest_hash, skipped: Vec::new() })
}

fn damaged(path: &Path, reason: String) -> LoadError {
    LoadError::Damaged { path: path.to_owned(), reason }
}

/// A missing file is damage: the folder was there.
fn read_error(path: &Path, source: io::Error) -> LoadError {
    match source.kind() {
        ErrorKind::NotFound => damaged(path, "is missing".to_owned()),
        ErrorKind::UnexpectedEof => damaged(path, "ends too early".to_owned()),
        _ => LoadError::Io { path: path.to_owned(), source },
    }
}

/// Opens a regular file and tells its size.
fn open_file(path: &Path) -> Result<(File, u64), LoadError> {
    let opened = || -> io::Result<(File, u64, bool)> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        Ok((file, metadata.len(), metadata.is_file()))
    };
    match opened().map_err(|error| read_error(path, error))? {
        (file, bytes, true) => Ok((file, bytes)),
        _ => Err(damaged(path, "is not a regular file".to_owned())),
    }
}

/// The content of a file of at most `bytes_max` bytes.
fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>, LoadError> {
    let (file, bytes) = open_file(path)?;
    if bytes > bytes_max {
        return Err(damaged(path, format!("has {bytes} bytes, at most {bytes_max} are accepted")));
    }
    let mut content = Vec::with_capacity(bytes as usize);
    file.take(bytes_max).read_to_end(&mut content).map_err(|error| read_error(path, error))?;
    Ok(content)
}

fn read_manifest(folder: &Path, bounds: &ReaderBounds) -> Result<(Manifest, ContentHash), LoadError> {
    let path = folder.join(MANIFEST_FILE);
    let seal_path = folder.join(MANIFEST_HASH_FILE);
    let json = read_bounded(&path, bounds.json_bytes_max)?;
    let hash = ContentHash::of(&json);
    let expected = seal_text(hash);
    // One byte more than the expected text, so that a longer file differs.
    if read_bounded(&seal_path, expected.len() as u64 + 1)? != expected.as_bytes() {
        return Err(damaged(&seal_path, format!("does not hold {hash}, the hash of {MANIFEST_FILE}")));
    }
    let manifest: Manifest = serde_json::from_slice(&json).map_err(|error| damaged(&path, error.to_string()))?;
    if manifest.format != FORMAT_NAME {
        return Err(damaged(&path, format!("describes a '{}', not a '{FORMAT_NAME}'", manifest.format)));
    }
    if manifest.version > FORMAT_VERSION {
        return Err(LoadError::Version { path: folder.to_owned(), found: manifest.version });
    }
    if manifest.files.len() > bounds.files_max {
        let reason = format!("lists {} files, at most {} are accepted", manifest.files.len(), bounds.files_max);
        return Err(damaged(&path, reason));
    }
    Ok((manifest, hash))
}

fn check_size(path: &Path, found: u64, file: &ManifestFile) -> Result<(), LoadError> {
    if found == file.bytes {
        return Ok(());
    }
    Err(damaged(path, format!("has {found} bytes where the manifest says {}", file.bytes)))
}

fn check_hash(path: &Path, found: ContentHash, file: &ManifestFile) -> Result<(), LoadError> {
    if found == file.blake3 {
        return Ok(());
    }
    let reason = format!(
        "its BLAKE3 is {}… where the manifest says {}…: the content changed",
        found.short(),
        file.blake3.short()
    );
    Err(damaged(path, reason))
}

fn read_state<S: DeserializeOwned>(path: &Path, file: &ManifestFile, bounds: &ReaderBounds) -> Result<S, LoadError> {
    let json = read_bounded(path, bounds.json_bytes_max)?;
    check_size(path, json.len() as u64, file)?;
    check_hash(path, ContentHash::of(&json), file)?;
    serde_json::from_slice(&json).map_err(|error| LoadError::State { path: path.to_owned(), reason: error.to_string() })
}

/// Reads and hashes in one pass.
fn read_tensor_file(path: &Path, file: &ManifestFile, bounds: &ReaderBounds) -> Result<NamedTensors, LoadError> {
    let (opened, bytes) = open_file(path)?;
    check_size(path, bytes, file)?;
    let mut reader = Hashing::new(opened);
    let named =
        tensors::read_tensors(&mut reader, bytes, bounds, Formats::OnlyF32, |_, _| Choice::Read).map_err(|error| {
            match error {
                TensorsError::Io(source) => read_error(path, source),
                other => damaged(path, other.to_string()),
            }
        })?;
    check_hash(path, reader.hash(), file)?;
    Ok(named)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod store_tests;
