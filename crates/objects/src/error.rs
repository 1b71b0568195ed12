//! Why the object store did not do what it was asked, without a secret in any text.
//!
//! A server's refusal may repeat the request that was signed, session token included. So of its answer only the status and
//! the error code (`NoSuchBucket`, `SignatureDoesNotMatch`) are kept.

use crate::ObjectKey;
use base::{ContentHash, Hint};
use std::error::Error;
use std::path::PathBuf;

/// Longest error code that is repeated; the longest of S3's own has 46 characters.
const CODE_CHARS_MAX: usize = 64;

const HINT_SCHEME: &str = "name a folder that all sites see as file:///FOLDER, or a bucket as s3://BUCKET/PREFIX";
const HINT_ACCESS: &str = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and \
                           AWS_ENDPOINT_URL, and that the account may read, write, list and delete: aws s3 ls s3://BUCKET";
const HINT_REACH: &str = "check that the store answers and the bucket or folder exists: aws s3 ls s3://BUCKET, with --endpoint-url \
                          where AWS_ENDPOINT_URL is set";

/// Why a store was not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Not `file:///FOLDER` or `s3://BUCKET/PREFIX`.
    #[error("'{url}' names no object store: {reason}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// User name, password or query in an address that is printed and logged.
    #[error("{setting} holds a user name, a password or a query; addresses are printed, so it may not")]
    Secret {
        /// Where: an environment variable, or "the object store's URL".
        setting: String,
    },
    /// A run's name that cannot be part of a path.
    #[error(
        "'{run}' cannot name a run in an object store: 1 to {chars_max} of the characters A-Z a-z 0-9 - _ . are expected"
    )]
    Run {
        /// The name.
        run: String,
        /// Its longest length.
        chars_max: usize,
    },
    /// The folder is not there or may not be read.
    #[error("the folder '{}' cannot be used: {reason}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The AWS settings do not fit together.
    #[error("the AWS settings cannot be used: {reason}")]
    Settings {
        /// What is wrong.
        reason: String,
    },
}

impl Hint for OpenError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Url { .. } => HINT_SCHEME.to_owned(),
            Self::Secret { .. } => "give credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".to_owned(),
            Self::Run { .. } => "rename the run in run.toml".to_owned(),
            Self::Folder { path, .. } => format!("mkdir -p '{}', where every site sees it", path.display()),
            Self::Settings { .. } => HINT_ACCESS.to_owned(),
        })
    }
}

/// Why an object was not left.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// The store does not let us.
    #[error("the object store refuses {key}: {reason}")]
    Refused {
        /// What.
        key: ObjectKey,
        /// What it said.
        reason: String,
    },
    /// It failed, and went on failing when the request was repeated.
    #[error("{key} could not be left in the object store: {reason}")]
    Failed {
        /// What.
        key: ObjectKey,
        /// What went wrong last.
        reason: String,
    },
    /// The link is too slow.
    #[error("{key} could not be left in the object store: its {bytes} bytes were not taken within {seconds:.0} s")]
    Slow {
        /// What.
        key: ObjectKey,
        /// Its length.
        bytes: u64,
        /// How long was waited.
        seconds: f64,
    },
}

impl Hint for PutError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Refused { .. } => HINT_ACCESS.to_owned(),
            Self::Failed { .. } => HINT_REACH.to_owned(),
            Self::Slow { .. } => "set a smaller codec or more inner steps a round in run.toml".to_owned(),
        })
    }
}

/// Why an object was not taken.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum GetError {
    /// It did not appear.
    #[error("{key} was not in the object store after {waited_seconds:.1} s{}", after(failure.as_deref()))]
    Patience {
        /// What.
        key: ObjectKey,
        /// How long was waited.
        waited_seconds: f64,
        /// What kept the store from being asked, if it was not plainly absent.
        failure: Option<String>,
    },
    /// The object has another length than was announced. Nothing of it was read.
    #[error("{key} has {found} bytes in the object store, announced were {expected}")]
    Length {
        /// What.
        key: ObjectKey,
        /// The announced length.
        expected: u64,
        /// The object's.
        found: u64,
    },
    /// The object has another content than was announced.
    #[error("{key} from the object store has hash {found}, expected was {expected}")]
    Hash {
        /// What.
        key: ObjectKey,
        /// What it should be.
        expected: ContentHash,
        /// What came.
        found: ContentHash,
    },
    /// No memory for it.
    #[error("no memory for the {bytes} bytes of {key}")]
    Memory {
        /// What.
        key: ObjectKey,
        /// Its length.
        bytes: u64,
    },
    /// The store does not let us.
    #[error("the object store refuses {key}: {reason}")]
    Refused {
        /// What.
        key: ObjectKey,
        /// What it said.
        reason: String,
    },
    /// It was there, and could not be read.
    #[error("{key} could not be read from the object store: {reason}")]
    Failed {
        /// What.
        key: ObjectKey,
        /// What went wrong last.
        reason: String,
    },
    /// The link is too slow.
    #[error("{key} could not be read from the object store: its {bytes} bytes did not come within {seconds:.0} s")]
    Slow {
        /// What.
        key: ObjectKey,
        /// Its length.
        bytes: u64,
        /// How long was waited.
        seconds: f64,
    },
}

fn after(failure: Option<&str>) -> String {
    failure.map(|failure| format!("; last: {failure}")).unwrap_or_default()
}

impl Hint for GetError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Patience { failure: None, .. } => {
                "look at the log of the site that should have left it, and that both name the same --objects".to_owned()
            }
            Self::Patience { .. } | Self::Failed { .. } => HINT_REACH.to_owned(),
            Self::Length { .. } | Self::Hash { .. } => {
                "somebody else writes there: use a prefix of its own for each run, s3://BUCKET/PREFIX".to_owned()
            }
            Self::Memory { .. } => "give the site more memory, or set a smaller codec in run.toml".to_owned(),
            Self::Refused { .. } => HINT_ACCESS.to_owned(),
            Self::Slow { .. } => "set a smaller codec or more inner steps a round in run.toml".to_owned(),
        })
    }
}

/// Why old objects were not removed. Training does not depend on it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("old objects could not be removed from the object store: {reason}")]
pub struct ForgetError {
    /// What went wrong.
    pub reason: String,
}

impl Hint for ForgetError {
    fn hint(&self) -> Option<String> {
        Some(HINT_ACCESS.to_owned())
    }
}

/// Whether asking again is of no use.
pub(crate) fn is_refusal(error: &object_store::Error) -> bool {
    use object_store::Error::{NotSupported, PermissionDenied, Unauthenticated};
    matches!(error, PermissionDenied { .. } | Unauthenticated { .. } | NotSupported { .. })
}

/// What went wrong, in one line: without what the server wrote but its code, with the first cause where there is one.
pub(crate) fn describe(error: &object_store::Error) -> String {
    let (text, cause) = (error.to_string(), first_cause(error));
    let text = if text.contains(&cause) { text } else { format!("{text}: {cause}") };
    let Some((before, answer)) = text.split_once("Server returned") else { return text };
    // "non-2xx status code: 403 Forbidden: BODY", or, with status 200, "error response: BODY".
    let status = answer.strip_prefix(" non-2xx status code: ").and_then(|answer| answer.split(':').next());
    let code = error_code(answer).map(|code| format!(" ({code})")).unwrap_or_default();
    format!("{} - {}{code}", before.trim_end_matches([' ', '-', ':']), status.unwrap_or("an error"))
}

fn first_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// S3's `<Code>`, if it looks like one.
fn error_code(answer: &str) -> Option<&str> {
    let (code, _) = answer.split_once("<Code>")?.1.split_once("</Code>")?;
    (code.len() <= CODE_CHARS_MAX && code.chars().all(|c| c.is_ascii_alphanumeric())).then_some(code)
}
