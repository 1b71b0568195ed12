//! From a URL and the environment to a store.
//!
//! The settings are those of the AWS tools. Their file `~/.aws/credentials` is not read: a site's process gets what it
//! needs in its environment, or from the machine's own role (instance metadata, web identity, container credentials).

use crate::OpenError;
use crate::error::describe;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// Longest name of a run that becomes part of a path.
const RUN_CHARS_MAX: usize = 128;

/// One request: a part, its connection and its answer. See [`crate::store`] for the slowest link that this serves.
pub(crate) const REQUEST_SECONDS_MAX: u64 = 180;

/// A store that cannot be connected to in this time is down, or the address is wrong.
const CONNECT_SECONDS_MAX: u64 = 15;

/// A request that fails is repeated for this long: a store restarts, or a proxy does.
const RETRY_SECONDS_MAX: u64 = 60;

/// At 0.1, 0.2, 0.4 .. 5 s between them, ten repetitions take about 30 s.
const RETRIES_MAX: usize = 10;

/// An open store and the folder of the run inside it.
pub(crate) struct Opened {
    pub(crate) store: Arc<dyn object_store::ObjectStore>,
    pub(crate) folder: Path,
    /// As given: checked to be free of secrets.
    pub(crate) url: String,
}

pub(crate) fn open(
    url: &str,
    run: &str,
    settings: impl IntoIterator<Item = (String, String)>,
) -> Result<Opened, OpenError> {
    let parsed = checked_url(url, "the object store's URL")?;
    let run = checked_run(run)?;
    let (store, prefix): (Arc<dyn object_store::ObjectStore>, Path) = match parsed.scheme() {
        "file" => (Arc::new(folder(url, &parsed)?), Path::ROOT),
        "s3" => (Arc::new(bucket(url, &parsed, settings)?), prefix(url, &parsed)?),
        scheme => return Err(refused(url, format!("'{scheme}' is not a kind of store that is known"))),
    };
    Ok(Opened { store, folder: prefix.join(run), url: url.to_owned() })
}

fn refused(url: &str, reason: impl ToString) -> OpenError {
    OpenError::Url { url: url.to_owned(), reason: reason.to_string() }
}

/// An address that may be printed.
fn checked_url(text: &str, setting: &str) -> Result<Url, OpenError> {
    let secret = || OpenError::Secret { setting: setting.to_owned() };
    // What cannot be parsed is printed as well, so this comes first.
    if text.contains(['@', '?', '#']) {
        return Err(secret());
    }
    Url::parse(text).map_err(|error| refused(text, error))
}

fn checked_run(run: &str) -> Result<&str, OpenError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let valid = (1..=RUN_CHARS_MAX).contains(&run.len()) && run.chars().all(fits) && !run.starts_with('.');
    let shown = || run.chars().take(RUN_CHARS_MAX).collect();
    if valid { Ok(run) } else { Err(OpenError::Run { run: shown(), chars_max: RUN_CHARS_MAX }) }
}

fn folder(url: &str, parsed: &Url) -> Result<LocalFileSystem, OpenError> {
    let path = parsed.to_file_path().map_err(|()| refused(url, "it is no absolute path on this machine"))?;
    // A folder that is not there is more often a disk that is not mounted than one that should be made.
    if !path.is_dir() {
        return Err(OpenError::Folder { path, reason: "there is no such folder".to_owned() });
    }
    LocalFileSystem::new_with_prefix(&path).map_err(|error| OpenError::Folder { path, reason: describe(&error) })
}

fn prefix(url: &str, parsed: &Url) -> Result<Path, OpenError> {
    Path::from_url_path(parsed.path()).map_err(|error| refused(url, error))
}

fn bucket(
    url: &str,
    parsed: &Url,
    settings: impl IntoIterator<Item = (String, String)>,
) -> Result<object_store::aws::AmazonS3, OpenError> {
    let name = parsed.host_str().filter(|name| !name.is_empty()).ok_or_else(|| refused(url, "it names no bucket"))?;
    // Fails where one is installed already, and then that one is used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = AmazonS3Builder::new().with_retry(retry()).with_client_options(client());
    for (setting, value) in settings {
        let known = setting.starts_with("AWS_").then(|| setting.to_ascii_lowercase().parse().ok()).flatten();
        let Some(key) = known else { continue };
        if matches!(key, AmazonS3ConfigKey::Endpoint | AmazonS3ConfigKey::S3Endpoint) {
            let endpoint = checked_url(&value, &setting)?;
            builder = builder.with_allow_http(endpoint.scheme() == "http");
        }
        builder = builder.with_config(key, value);
    }
    // Its errors name what is missing and repeat no value of a secret.
    builder.with_bucket_name(name).build().map_err(|error| OpenError::Settings { reason: describe(&error) })
}

fn client() -> ClientOptions {
    ClientOptions::new()
        .with_timeout(Duration::from_secs(REQUEST_SECONDS_MAX))
        .with_connect_timeout(Duration::from_secs(CONNECT_SECONDS_MAX))
}

fn retry() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(5), base: 2.0 };
    RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: Duration::from_secs(RETRY_SECONDS_MAX) }
}
