//! Getting into a run: greet the coordinator, compare what is here with what the run has, fetch what is missing.
//!
//! Everything is checked before any compute: the model and the seed, then every file by its BLAKE3.

use crate::folder::RunFolder;
use crate::state::TrainingState;
use base::config::ConfigError;
use base::layout::{CHECKPOINTS_FOLDER, INITIAL_CHECKPOINT, RUN_FILE};
use base::{ContentHash, Hint, Round, RunConfig};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use wire::message::{FromCoordinator, Greeting, Role, RunFile, SiteHello, Welcome};
use wire::{
    BlobClient, BlobKey, BlobRequest, ConnectError, Connection, FetchError, Holder, Identity, Invite, Proxy, Purpose,
    RecvError, SendError, Traffic,
};

/// The coordinator answers a greeting at once; a busy machine may need some seconds.
const WELCOME_SECONDS_MAX: u64 = 30;

/// Streams for fetching the run's files.
const FILE_STREAMS: usize = 4;

/// Largest file of a run that is fetched: bounds what a hostile coordinator can put on this disk, a file.
const RUN_FILE_BYTES_MAX: u64 = 1 << 40;

/// Why a site cannot join.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The coordinator said no.
    #[error("the coordinator refuses this site: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
        /// Its hint.
        hint: String,
    },
    /// The connection broke or made no sense.
    #[error("the coordinator at {address}: {reason}")]
    Conversation {
        /// Where.
        address: String,
        /// What happened.
        reason: String,
    },
    /// The folder belongs to a run with another model.
    #[error("{folder}: the model here ({found}) is not the run's ({expected})", folder = folder.display())]
    OtherModel {
        /// The site's folder.
        folder: PathBuf,
        /// Hash of `[model]` and seed in the run.
        expected: ContentHash,
        /// Hash of those in the folder.
        found: ContentHash,
    },
    /// A file here is not the run's.
    #[error("{path}: the file here has BLAKE3 {found}, the run's has {expected}", path = path.display())]
    OtherFile {
        /// The file.
        path: PathBuf,
        /// In the run.
        expected: ContentHash,
        /// In the folder.
        found: ContentHash,
    },
    /// The run's settings are refused.
    #[error("the run's settings: {0}")]
    Config(#[from] ConfigError),
    /// A file could not be fetched.
    #[error("{name}: {source}")]
    Fetch {
        /// The file.
        name: String,
        /// Why.
        source: FetchError,
    },
    /// A file came packed, and cannot be unpacked here.
    #[error("{name}, unpacking: {source}")]
    Unpack {
        /// The file.
        name: String,
        /// Damage, or what the system said.
        source: io::Error,
    },
    /// The folder cannot be written.
    #[error("{path}: {source}", path = path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Hint for JoinError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Connect(error) => return error.hint(),
            Self::Refused { hint, .. } => hint.clone(),
            Self::Conversation { .. } | Self::Unpack { .. } => {
                "see that `beringia serve` still runs there, then join again".to_owned()
            }
            Self::OtherModel { folder, .. } => {
                format!("use another folder: `beringia join INVITE --folder {}-2`", folder.display())
            }
            Self::OtherFile { path, .. } => format!("remove it and join again: `rm {}`", path.display()),
            Self::Config(_) => {
                "correct run.toml on the coordinator's machine and start `beringia serve` again".to_owned()
            }
            Self::Fetch { source, .. } => return source.hint(),
            Self::Write { path, .. } => format!("make room or allow writing: `df -h {}`", path.display()),
        })
    }
}

pub(crate) fn conversation(address: &str, reason: impl ToString) -> JoinError {
    JoinError::Conversation { address: address.to_owned(), reason: reason.to_string() }
}

/// Greets the coordinator and gives the connection with its welcome.
pub(crate) async fn greet(
    identity: &Identity,
    traffic: &Traffic,
    (invite, proxy): (&Invite, Option<&Proxy>),
    hello: SiteHello,
) -> Result<(Connection, Welcome), JoinError> {
    let address = invite.address();
    let connecting = wire::connect_through(proxy, identity, traffic, address, invite.fingerprint(), Purpose::Control);
    let mut connection = connecting.await?;
    let greeting =
        Greeting { run: invite.run().to_owned(), secret: Some(invite.secret().clone()), role: Role::Site(hello) };
    connection.send(&greeting).await.map_err(|error: SendError| conversation(address, error))?;
    let answer = connection.recv_timeout(Duration::from_secs(WELCOME_SECONDS_MAX)).await;
    match answer.map_err(|error: RecvError| conversation(address, error))? {
        FromCoordinator::Welcome(welcome) if welcome.is_acceptable() => Ok((connection, welcome)),
        FromCoordinator::Refused { reason, hint } => Err(JoinError::Refused { reason, hint }),
        _ => Err(conversation(address, "it sent something else than a welcome")),
    }
}

/// Compares the folder with the run and fetches what is missing. Gives the run's settings.
///
/// # Errors
/// Another model or other files are here, or something cannot be fetched or written.
pub(crate) async fn fetch_run(
    folder: &RunFolder,
    welcome: &Welcome,
    client: &BlobClient,
    coordinator: &Holder,
    mut on_file: impl FnMut(&RunFile),
) -> Result<RunConfig, JoinError> {
    let config = RunConfig::from_toml(&welcome.run_toml)?;
    if let Ok((here, _)) = folder.config()
        && here.model_hash() != welcome.model_hash
    {
        let found = here.model_hash();
        return Err(JoinError::OtherModel { folder: folder.root().to_owned(), expected: welcome.model_hash, found });
    }
    let mut missing = Vec::new();
    for file in &welcome.files {
        if !is_here(&folder.root().join(&file.name), file)? {
            missing.push(file);
        }
    }
    write(&folder.run_file(), welcome.run_toml.as_bytes())?;
    let made = {
        let (folder, config) = (folder.clone(), config.clone());
        let wanted: Vec<RunFile> = missing.iter().map(|file| (*file).clone()).collect();
        tokio::task::spawn_blocking(move || make_initial_state(&folder, &config, &wanted)).await.unwrap_or_default()
    };
    for file in missing.into_iter().filter(|file| !made.contains(&file.name)) {
        on_file(file);
        fetch_file(folder, file, client, coordinator).await?;
    }
    Ok(config)
}

/// Makes the initial state from the run's seed where it was made so, rather than fetch it over a thin link. Gives the names of those
/// wanted files that came out as they should be, and are in place; whatever goes wrong, the others are fetched.
fn make_initial_state(folder: &RunFolder, config: &RunConfig, wanted: &[RunFile]) -> Vec<String> {
    let initial = format!("{CHECKPOINTS_FOLDER}/{INITIAL_CHECKPOINT}/");
    let files: Vec<(&RunFile, &str)> =
        wanted.iter().filter_map(|file| Some((file, file.name.strip_prefix(&initial)?))).collect();
    if files.is_empty() || config.transformers.is_some() {
        return Vec::new();
    }
    let place = folder.root().join(".initial.partial");
    let make = || -> Option<Vec<String>> {
        let parameters = engine::initial_parameters(&config.model, config.run.seed);
        let state = TrainingState::initial(config, &parameters).ok()?;
        state.save(&place, Round(0), &config.schema(), config.checkpoint.keep).ok()?;
        std::fs::create_dir_all(folder.checkpoints().join(INITIAL_CHECKPOINT)).ok()?;
        let is_right = |(file, name): &&(&RunFile, &str)| {
            let (made, put) = (place.join(INITIAL_CHECKPOINT).join(name), folder.root().join(&file.name));
            is_here(&made, file).unwrap_or(false) && std::fs::rename(made, put).is_ok()
        };
        Some(files.iter().filter(is_right).map(|(file, _)| file.name.clone()).collect())
    };
    let made = make().unwrap_or_default();
    // What is left of it is in nobody's way.
    let _left = std::fs::remove_dir_all(&place);
    made
}

/// Whether that very file is here already.
fn is_here(path: &Path, file: &RunFile) -> Result<bool, JoinError> {
    let unreadable = |source| JoinError::Write { path: path.to_owned(), source };
    let opened = match std::fs::File::open(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(unreadable(source)),
    };
    let mut hasher = ContentHash::hasher();
    hasher.update_reader(opened).map_err(unreadable)?;
    let found = ContentHash::finish(&hasher);
    if found == file.hash {
        return Ok(true);
    }
    Err(JoinError::OtherFile { path: path.to_owned(), expected: file.hash, found })
}

async fn fetch_file(
    folder: &RunFolder,
    file: &RunFile,
    client: &BlobClient,
    coordinator: &Holder,
) -> Result<(), JoinError> {
    let path = folder.root().join(&file.name);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|source| JoinError::Write { path: parent.to_owned(), source })?;
    }
    let plain = (file.name.clone(), file.bytes, file.hash);
    let (name, bytes, hash) = file.packed.map_or(plain, |packed| (file.packed_name(), packed.bytes, packed.hash));
    let place = folder.root().join(&name);
    let request = BlobRequest {
        key: BlobKey::File { name },
        bytes,
        bytes_max: RUN_FILE_BYTES_MAX,
        hash,
        holders: vec![coordinator.clone()],
        streams: FILE_STREAMS,
    };
    let fetched = client.fetch_to_file(&request, &place).await;
    fetched.map_err(|source| JoinError::Fetch { name: file.name.clone(), source })?;
    if file.packed.is_none() {
        return Ok(());
    }
    let file = file.clone();
    let unpacked = tokio::task::spawn_blocking(move || unpack(&place, &path, &file)).await;
    unpacked.unwrap_or_else(|stopped| Err(JoinError::Write { path: folder.root().to_owned(), source: stopped.into() }))
}

/// Puts the file in place whose packed form is at `packed`, and removes that.
fn unpack(packed: &Path, path: &Path, file: &RunFile) -> Result<(), JoinError> {
    let failed = |source| JoinError::Write { path: path.to_owned(), source };
    let partial = packed.with_extension("partial");
    let write = || -> io::Result<()> {
        let mut unpacked = io::BufWriter::new(std::fs::File::create(&partial)?);
        wire::packed::unpack(std::fs::File::open(packed)?, &mut unpacked, file.bytes)?;
        unpacked.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    };
    write().map_err(|source| JoinError::Unpack { name: file.name.clone(), source })?;
    // Says so where it is another file.
    is_here(&partial, file)?;
    std::fs::rename(&partial, path).map_err(failed)?;
    std::fs::remove_file(packed).map_err(failed)
}

fn write(path: &Path, content: &[u8]) -> Result<(), JoinError> {
    let failed = |source| JoinError::Write { path: path.to_owned(), source };
    let temporary = path.with_file_name(format!(".{RUN_FILE}.partial"));
    std::fs::write(&temporary, content).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)
}
