//! Reading a run's folder; [`base::layout`] says what lies where in it.

use crate::state::{SavedState, TrainingState};
use base::config::{ConfigError, RUN_TOML_BYTES_MAX};
use base::layout::{CHECKPOINTS_FOLDER, DATA_FOLDER, EVENTS_FILE, FETCHED_STATE_FILE, RUN_FILE, TERM_FILE};
use base::{Hint, RunConfig, Term};
use checkpoint::{LoadError, Skipped};
use data::{Dataset, DatasetError, Split};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// The folder of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder(PathBuf);

/// Why a folder cannot be used as a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// There is no `run.toml`, or it cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The newest term that was followed cannot be written down.
    #[error("{path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `run.toml` is refused.
    #[error("{path}: {source}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
    /// The data is refused.
    #[error(transparent)]
    Data(#[from] DatasetError),
    /// No checkpoint can be loaded.
    #[error(transparent)]
    Checkpoint(#[from] LoadError),
    /// The checkpoint is of another model than `run.toml` describes.
    #[error("{path}: the checkpoint does not fit [model] in run.toml: {source}", path = path.display())]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// The first tensor that differs.
        source: base::TensorMismatch,
    },
    /// The tokenizer has another size than the model's vocabulary.
    #[error("the data has {data} tokens in its vocabulary, [model] vocab_size is {model}")]
    Vocabulary {
        /// In the data's manifest.
        data: u64,
        /// In `run.toml`.
        model: usize,
    },
}

impl Hint for FolderError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Read { path, .. } => {
                let folder = path.parent().unwrap_or(path).display();
                Some(format!("`beringia init {folder} --data FOLDER` makes a run"))
            }
            Self::Write { path, .. } => {
                Some(format!("make room or allow writing: `df -h {}`", path.parent().unwrap_or(path).display()))
            }
            Self::Config { source, .. } => source.hint(),
            Self::Data(error) => error.hint(),
            Self::Checkpoint(error) => error.hint(),
            Self::OtherModel { .. } => {
                Some("change [model] back, or make a new run with `beringia init NEW --data FOLDER`".to_owned())
            }
            Self::Vocabulary { data, .. } => Some(format!("set vocab_size = {data} in [model]")),
        }
    }
}

impl RunFolder {
    /// The run in that folder; nothing is read yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// `run.toml`
    pub fn run_file(&self) -> PathBuf {
        self.0.join(RUN_FILE)
    }

    /// `data/`
    pub fn data(&self) -> PathBuf {
        self.0.join(DATA_FOLDER)
    }

    /// `checkpoints/`
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join(CHECKPOINTS_FOLDER)
    }

    /// `events.jsonl`
    pub fn events(&self) -> PathBuf {
        self.0.join(EVENTS_FILE)
    }

    /// Where the run's state is put while it is fetched.
    pub fn fetched_state(&self) -> PathBuf {
        self.0.join(FETCHED_STATE_FILE)
    }

    /// Reads `run.toml`, and gives its text too.
    ///
    /// # Errors
    /// It is missing, too long or refused.
    pub fn config(&self) -> Result<(RunConfig, String), FolderError> {
        let path = self.run_file();
        let read = || {
            let mut text = String::new();
            std::fs::File::open(&path)?.take(RUN_TOML_BYTES_MAX as u64 + 1).read_to_string(&mut text)?;
            Ok(text)
        };
        let text = read().map_err(|source| FolderError::Read { path: path.clone(), source })?;
        let config = RunConfig::from_toml(&text).map_err(|source| FolderError::Config { path, source })?;
        Ok((config, text))
    }

    /// Newest term of a coordinator that this site has followed; 0 before the first. A file that is damaged is no reason not to train: it
    /// says the same as none.
    pub fn term(&self) -> Term {
        let written = std::fs::read_to_string(self.0.join(TERM_FILE)).ok();
        Term(written.and_then(|text| text.trim().parse().ok()).unwrap_or(0))
    }

    /// Writes that down: on stable storage when it returns.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep_term(&self, term: Term) -> Result<(), FolderError> {
        let path = self.0.join(TERM_FILE);
        let partial = path.with_extension("partial");
        let write = || {
            let mut file = std::fs::File::create(&partial)?;
            writeln!(file, "{term}")?;
            file.sync_all()?;
            std::fs::rename(&partial, &path)?;
            std::fs::File::open(&self.0)?.sync_all()
        };
        write().map_err(|source| FolderError::Write { path: path.clone(), source })
    }

    /// Opens one split of the data; `verify` hashes every byte first.
    ///
    /// # Errors
    /// Files that are missing or not what the manifest says, or another vocabulary than the model's.
    pub fn dataset(&self, config: &RunConfig, split: Split, verify: bool) -> Result<Dataset, FolderError> {
        let dataset = Dataset::open(&self.data(), split, verify)?;
        dataset.require_samples(config.data.sequence_length)?;
        let (data, model) = (dataset.manifest().vocabulary_size, config.model.vocab_size);
        if data != model as u64 {
            return Err(FolderError::Vocabulary { data, model });
        }
        Ok(dataset)
    }

    /// Loads the newest checkpoint that is whole. Newer ones that are not are named in the second part.
    ///
    /// # Errors
    /// There is none, or it is of another model.
    pub fn newest(&self, config: &RunConfig) -> Result<(TrainingState, Vec<Skipped>), FolderError> {
        let loaded = checkpoint::load_latest::<SavedState>(&self.checkpoints())?;
        let schema = config.schema();
        let state = TrainingState::from_checkpoint(config, &schema, loaded.state, &loaded.tensors)
            .map_err(|source| FolderError::OtherModel { path: loaded.path, source })?;
        Ok((state, loaded.skipped))
    }
}
