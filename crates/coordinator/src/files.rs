//! The files of a run that sites fetch from the coordinator: data, tokenizer, initial checkpoint.
//!
//! Hashed once at start and served as they are, or packed where that saves a thin link much; nothing else of the machine can be asked
//! for.

use base::config::{ConfigError, RUN_TOML_BYTES_MAX};
use base::layout::{CHECKPOINTS_FOLDER, DATA_FOLDER, INITIAL_CHECKPOINT, RUN_FILE};
use base::{ContentHash, Hint, RunConfig};
use data::DatasetError;
use data::manifest::{MANIFEST_FILE, Manifest};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use wire::message::{PackedFile, RunFile};
use wire::packed::PACKED_FILE_BYTES_MAX;
use wire::{Blob, BlobKey, BlobSource};

/// Longest `state.json` of the initial checkpoint: it holds a dozen numbers.
const STATE_BYTES_MAX: u64 = 1 << 20;

/// Why a folder cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// A file is missing or cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `run.toml` is refused.
    #[error("{path}: {source}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
    /// The data's manifest is refused.
    #[error(transparent)]
    Data(#[from] DatasetError),
    /// The initial checkpoint's state is not what `beringia init` writes.
    #[error("{path}: {reason}", path = path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A data file is not what its manifest says.
    #[error("{path}: the file has BLAKE3 {found}, the manifest says {expected}", path = path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// In the manifest.
        expected: ContentHash,
        /// On disk.
        found: ContentHash,
    },
}

impl Hint for FilesError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Config { source, .. } => source.hint(),
            Self::Data(error) => error.hint(),
            Self::Read { .. } | Self::State { .. } | Self::Hash { .. } => {
                Some("make a run first: `beringia init NEW --data FOLDER`".to_owned())
            }
        }
    }
}

/// What a run consists of.
#[derive(Debug)]
pub struct RunFiles {
    /// Settings.
    pub config: RunConfig,
    /// Their text, as every site gets it.
    pub config_text: String,
    /// Everything to fetch.
    pub files: Vec<RunFile>,
    /// Hash of the global state of round 0.
    pub initial_hash: ContentHash,
    /// Number of parameters.
    pub parameters: u64,
    root: PathBuf,
    /// Packed forms, by the names that they are asked for by.
    packed: BTreeMap<String, Blob>,
}

impl RunFiles {
    /// Reads the settings and hashes every file of the run in `root`.
    ///
    /// # Errors
    /// Something is missing, refused or damaged.
    pub fn open(root: &Path) -> Result<Self, FilesError> {
        let path = root.join(RUN_FILE);
        let config_text = read_bounded(&path, RUN_TOML_BYTES_MAX as u64)?;
        let config = RunConfig::from_toml(&config_text).map_err(|source| FilesError::Config { path, source })?;
        let mut files = Vec::new();
        let manifest = Manifest::read(&root.join(DATA_FOLDER))?;
        files.push(hashed(root, &format!("{DATA_FOLDER}/{MANIFEST_FILE}"))?);
        for entry in manifest.files() {
            let file = hashed(root, &format!("{DATA_FOLDER}/{}", entry.name))?;
            if file.hash != entry.blake3 {
                let (path, expected, found) = (root.join(&file.name), entry.blake3, file.hash);
                return Err(FilesError::Hash { path, expected, found });
            }
            files.push(file);
        }
        let initial = format!("{CHECKPOINTS_FOLDER}/{INITIAL_CHECKPOINT}");
        for name in names_in(&root.join(&initial))? {
            files.push(hashed(root, &format!("{initial}/{name}"))?);
        }
        let initial_hash = read_state_hash(&root.join(&initial).join("state.json"))?;
        let parameters = config.schema().elements() as u64;
        let packed = pack_tokens(root, &mut files)?;
        Ok(Self { config, config_text, files, initial_hash, parameters, root: root.to_owned(), packed })
    }
}

/// Packs the data's files, of which a site uses every byte. Weights are noise to a packer, and sites make the initial ones themselves.
fn pack_tokens(root: &Path, files: &mut [RunFile]) -> Result<BTreeMap<String, Blob>, FilesError> {
    let mut packed = BTreeMap::new();
    let of_data = |file: &&mut RunFile| file.name.starts_with(DATA_FOLDER) && file.bytes <= PACKED_FILE_BYTES_MAX;
    for file in files.iter_mut().filter(of_data) {
        let path = root.join(&file.name);
        let bytes = std::fs::read(&path).map_err(|source| FilesError::Read { path: path.clone(), source })?;
        let Some(content) = wire::packed::pack(&bytes) else { continue };
        file.packed = Some(PackedFile { bytes: content.len() as u64, hash: ContentHash::of(&content) });
        packed.insert(file.packed_name(), Blob::memory(content));
    }
    Ok(packed)
}

fn read_bounded(path: &Path, bytes_max: u64) -> Result<String, FilesError> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(bytes_max + 1).read_to_string(&mut text));
    match read {
        Ok(length) if length as u64 <= bytes_max => Ok(text),
        Ok(_) => {
            Err(FilesError::State { path: path.to_owned(), reason: format!("it is longer than {bytes_max} bytes") })
        }
        Err(source) => Err(FilesError::Read { path: path.to_owned(), source }),
    }
}

fn hashed(root: &Path, name: &str) -> Result<RunFile, FilesError> {
    let path = root.join(name);
    let hash = || {
        let file = File::open(&path)?;
        let bytes = file.metadata()?.len();
        let mut hasher = ContentHash::hasher();
        hasher.update_reader(file)?;
        Ok(RunFile { name: name.to_owned(), bytes, hash: ContentHash::finish(&hasher), packed: None })
    };
    hash().map_err(|source| FilesError::Read { path: path.clone(), source })
}

fn names_in(folder: &Path) -> Result<BTreeSet<String>, FilesError> {
    let read = || -> io::Result<BTreeSet<String>> {
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    read().map_err(|source| FilesError::Read { path: folder.to_owned(), source })
}

fn read_state_hash(path: &Path) -> Result<ContentHash, FilesError> {
    let text = read_bounded(path, STATE_BYTES_MAX)?;
    let bad = |reason: String| FilesError::State { path: path.to_owned(), reason };
    let state: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let hash = state.get("state_hash").and_then(serde_json::Value::as_str);
    hash.ok_or_else(|| bad("state_hash is missing".to_owned()))?.parse().map_err(|error| bad(format!("{error}")))
}

/// Serves the files to machines that were admitted.
pub(crate) struct Served {
    root: PathBuf,
    names: BTreeSet<String>,
    packed: BTreeMap<String, Blob>,
    admitted: Arc<RwLock<BTreeSet<ContentHash>>>,
}

impl Served {
    pub(crate) fn new(files: &RunFiles, admitted: Arc<RwLock<BTreeSet<ContentHash>>>) -> Self {
        let names = files.files.iter().map(|file| file.name.clone()).collect();
        Self { root: files.root.clone(), names, packed: files.packed.clone(), admitted }
    }
}

impl BlobSource for Served {
    fn open(&self, peer: ContentHash, key: &BlobKey) -> Option<Blob> {
        let admitted = self.admitted.read().is_ok_and(|admitted| admitted.contains(&peer));
        let BlobKey::File { name } = key else { return None };
        if !admitted {
            return None;
        }
        if !self.names.contains(name) {
            return self.packed.get(name).cloned();
        }
        Blob::file(&self.root.join(name)).ok()
    }
}
