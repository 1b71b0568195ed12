//! Putting, getting, forgetting.
//!
//! Long objects go and come in parts over several connections, as between sites: one connection does not fill a long fat
//! link. The slowest link that is served is the one on which [`STREAMS`] parts take the time of one request,
//! 8 x 5 MiB / 180 s = 233 kB/s = 1.9 Mbit/s; a transfer that is slower than that is given up.

use crate::error::{describe, is_refusal};
use crate::open::{self, Opened, REQUEST_SECONDS_MAX};
use crate::{ForgetError, GetError, ObjectKey, OpenError, PutError};
use base::{ContentHash, Round, SiteId};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResultPayload, MultipartUpload, ObjectStoreExt, Result as StoreResult};
use std::fmt;
use std::future::ready;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep, timeout};

/// Parts on their way at once, as many as `wire` has streams.
const STREAMS: usize = 8;

/// The shortest part that S3 takes but for the last one: 5 MiB.
const PART_BYTES_MIN: u64 = 5 << 20;

/// S3 takes so many parts for one object; longer objects have longer parts (50 GiB are 10,000 of 5 MiB).
const PARTS_MAX: u64 = 10_000;

/// Slowest transfer that is waited for.
const BYTES_PER_SECOND_MIN: f64 = (STREAMS as u64 * PART_BYTES_MIN) as f64 / REQUEST_SECONDS_MAX as f64;

/// What a transfer may take besides its bytes: a request that is repeated to the end, and its successor.
const TRANSFER_SECONDS_BASE: f64 = 2.0 * REQUEST_SECONDS_MAX as f64;

/// First and longest pause between two looks for an object. The first finds an object that is just being written with
/// little delay; at the longest a hundred sites that wait cost a store 50 requests a second.
const POLL_FIRST: Duration = Duration::from_millis(50);
const POLL_MAX: Duration = Duration::from_secs(2);

/// A look is given so long even where patience is at its end.
const LOOK_SECONDS_MIN: Duration = Duration::from_secs(5);

/// Removing parts of an upload that failed. Where it does not help, the bucket's lifecycle rule does.
const ABORT_SECONDS_MAX: Duration = Duration::from_secs(10);

/// A store and the run whose objects are meant. Cheap to clone.
#[derive(Clone)]
pub struct ObjectStore {
    store: Arc<dyn object_store::ObjectStore>,
    folder: Path,
    url: Arc<str>,
}

/// How much went over the link, and how fast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transfer {
    /// Bytes of content, without what the protocol adds or a repeated request sends twice.
    pub bytes: u64,
    /// From the first request to the last answer, without the wait for the object.
    pub seconds: f64,
}

impl Transfer {
    fn since(started: Instant, bytes: u64) -> Self {
        Self { bytes, seconds: started.elapsed().as_secs_f64() }
    }

    /// The speed; infinite for what took no measurable time.
    pub fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.seconds
    }
}

/// An object that was taken.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// What it holds: of the length and the hash that were asked for.
    pub content: Bytes,
    /// Its way here.
    pub transfer: Transfer,
    /// Until the object was there.
    pub waited_seconds: f64,
}

/// By address alone: what is inside holds credentials.
impl fmt::Debug for ObjectStore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ObjectStore").field("url", &self.url).field("folder", &self.folder).finish()
    }
}

impl ObjectStore {
    /// Opens `file:///FOLDER` or `s3://BUCKET/PREFIX` with the settings of this process's environment (`AWS_ENDPOINT_URL`,
    /// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, ...), for the objects of `run`.
    /// Nothing is asked of the store yet.
    pub fn open(url: &str, run: &str) -> Result<Self, OpenError> {
        let text = |value: std::ffi::OsString| value.into_string().ok();
        Self::open_with(url, run, std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?))))
    }

    /// As [`Self::open`], with these settings instead of the environment's.
    pub fn open_with(
        url: &str,
        run: &str,
        settings: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, OpenError> {
        let Opened { store, folder, url } = open::open(url, run, settings)?;
        Ok(Self { store, folder, url: url.into() })
    }

    fn path(&self, key: &ObjectKey, hash: ContentHash) -> Path {
        self.folder.clone().join(key.name(hash))
    }

    /// Leaves `content` under `key`. It appears as a whole or not at all, and doing it again changes nothing. Requests that
    /// fail are repeated, within a time that grows with the length.
    pub async fn put(&self, key: &ObjectKey, content: Bytes) -> Result<Transfer, PutError> {
        let bytes = content.len() as u64;
        let path = self.path(key, hash_of(&content).await);
        let bound = transfer_bound(bytes);
        let started = Instant::now();
        let outcome = if bytes <= PART_BYTES_MIN {
            timeout(bound, self.store.put(&path, content.into())).await.map(|put| put.map(drop))
        } else {
            self.put_parts(&path, content, bound).await
        };
        match outcome {
            Ok(Ok(())) => Ok(Transfer::since(started, bytes)),
            Ok(Err(error)) if is_refusal(&error) => Err(PutError::Refused { key: *key, reason: describe(&error) }),
            Ok(Err(error)) => Err(PutError::Failed { key: *key, reason: describe(&error) }),
            Err(Elapsed { .. }) => Err(PutError::Slow { key: *key, bytes, seconds: bound.as_secs_f64() }),
        }
    }

    /// The parts of an upload that fails are taken back: stores charge for them, and list them nowhere.
    async fn put_parts(&self, path: &Path, content: Bytes, bound: Duration) -> Result<StoreResult<()>, Elapsed> {
        let mut upload = match timeout(bound, self.store.put_multipart(path)).await? {
            Ok(upload) => upload,
            Err(error) => return Ok(Err(error)),
        };
        let outcome = timeout(bound, send_parts(&mut *upload, content)).await;
        if !matches!(outcome, Ok(Ok(()))) {
            let _ = timeout(ABORT_SECONDS_MAX, upload.abort()).await;
        }
        outcome
    }

    /// Waits until the object of `key` with this hash is there, for `patience`, then takes it. An object of another length
    /// than `bytes` is refused before memory is taken for it; one of another hash is not handed out.
    pub async fn get(
        &self,
        key: &ObjectKey,
        bytes: u64,
        hash: ContentHash,
        patience: Duration,
    ) -> Result<Fetched, GetError> {
        let path = self.path(key, hash);
        let asked = Instant::now();
        let found_bytes = self.wait_for(key, &path, patience).await?;
        if found_bytes != bytes {
            return Err(GetError::Length { key: *key, expected: bytes, found: found_bytes });
        }
        let waited_seconds = asked.elapsed().as_secs_f64();
        let started = Instant::now();
        let bound = transfer_bound(bytes);
        let (content, found) = timeout(bound, self.download(key, &path, bytes))
            .await
            .map_err(|_| GetError::Slow { key: *key, bytes, seconds: bound.as_secs_f64() })??;
        if found != hash {
            return Err(GetError::Hash { key: *key, expected: hash, found });
        }
        Ok(Fetched { content, transfer: Transfer::since(started, bytes), waited_seconds })
    }

    /// The length of an object, as soon as it is there. A store that cannot be asked may come back, like an object that is
    /// not there; one that refuses will go on refusing.
    async fn wait_for(&self, key: &ObjectKey, path: &Path, patience: Duration) -> Result<u64, GetError> {
        let asked = Instant::now();
        let mut pause = POLL_FIRST;
        loop {
            let left = patience.saturating_sub(asked.elapsed());
            let failure = match timeout(left.max(LOOK_SECONDS_MIN), self.store.head(path)).await {
                Ok(Ok(object)) => return Ok(object.size),
                Ok(Err(object_store::Error::NotFound { .. })) => None,
                Ok(Err(error)) if is_refusal(&error) => {
                    return Err(GetError::Refused { key: *key, reason: describe(&error) });
                }
                Ok(Err(error)) => Some(describe(&error)),
                Err(Elapsed { .. }) => Some("the store does not answer".to_owned()),
            };
            let waited = asked.elapsed();
            let left = patience.saturating_sub(waited);
            if left.is_zero() {
                return Err(GetError::Patience { key: *key, waited_seconds: waited.as_secs_f64(), failure });
            }
            sleep(pause.min(left)).await;
            pause = POLL_MAX.min(pause * 2);
        }
    }

    /// Content and hash of an object that is known to be there. Memory: its length and [`STREAMS`] parts.
    async fn download(&self, key: &ObjectKey, path: &Path, bytes: u64) -> Result<(Bytes, ContentHash), GetError> {
        let memory = || GetError::Memory { key: *key, bytes };
        let failed = |reason: String| GetError::Failed { key: *key, reason };
        let mut content = Vec::new();
        content.try_reserve_exact(usize::try_from(bytes).map_err(|_| memory())?).map_err(|_| memory())?;
        let mut hasher = ContentHash::hasher();
        let parts = ranges(bytes).map(|range| read_range(self.store.clone(), path.clone(), range));
        let mut parts = stream::iter(parts).buffered(STREAMS);
        while let Some(part) = parts.next().await {
            for piece in part.map_err(failed)? {
                hasher.update(&piece);
                content.extend_from_slice(&piece);
            }
        }
        Ok((content.into(), ContentHash::finish(&hasher)))
    }

    /// Removes this site's deltas of rounds before `round`, and states of rounds before it, and says how many objects that
    /// were. To be called when every live site has taken the outer step of the round before.
    pub async fn forget_before(&self, round: Round, own: SiteId) -> Result<usize, ForgetError> {
        let failed = |error: object_store::Error| ForgetError { reason: describe(&error) };
        let is_old = |path: &Path| {
            let key = path.filename().and_then(ObjectKey::of_name);
            key.is_some_and(|key| key.is_forgotten_before(round, own))
        };
        let objects: Vec<_> = self.store.list(Some(&self.folder)).try_collect().await.map_err(failed)?;
        let old: Vec<_> = objects.into_iter().map(|object| object.location).filter(is_old).map(Ok).collect();
        let removed = self.store.delete_stream(stream::iter(old).boxed());
        // Two sites may remove a state at once.
        let is_gone = |outcome: &StoreResult<Path>| matches!(outcome, Err(object_store::Error::NotFound { .. }));
        let removed = removed.filter(|outcome| ready(!is_gone(outcome)));
        Ok(removed.try_collect::<Vec<_>>().await.map_err(failed)?.len())
    }
}

async fn send_parts(upload: &mut dyn MultipartUpload, content: Bytes) -> StoreResult<()> {
    let parts: Vec<_> =
        ranges(content.len() as u64).map(|range| content.slice(range.start as usize..range.end as usize)).collect();
    // Parts are numbered in the order of these calls; nothing is sent before a future is polled.
    let parts: Vec<_> = parts.into_iter().map(|part| upload.put_part(part.into())).collect();
    stream::iter(parts).buffer_unordered(STREAMS).try_collect::<Vec<()>>().await?;
    upload.complete().await.map(drop)
}

/// One part as the pieces it came in, never more than was asked for.
async fn read_range(
    store: Arc<dyn object_store::ObjectStore>,
    path: Path,
    range: Range<u64>,
) -> Result<Vec<Bytes>, String> {
    let expected = range.end - range.start;
    let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
    let answer = store.get_opts(&path, options).await.map_err(|error| describe(&error))?;
    let mut pieces = Vec::new();
    let mut bytes = 0;
    match answer.payload {
        // A file system reads no more than the range.
        GetResultPayload::File(..) => pieces.push(answer.bytes().await.map_err(|error| describe(&error))?),
        GetResultPayload::Stream(mut arriving) => {
            while let Some(piece) = arriving.try_next().await.map_err(|error| describe(&error))? {
                bytes += piece.len() as u64;
                if bytes > expected {
                    return Err(format!("the store sent more than the {expected} bytes of a part"));
                }
                pieces.push(piece);
            }
        }
    }
    Ok(pieces)
}

/// An object cut into parts.
fn ranges(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let part = PART_BYTES_MIN.max(bytes.div_ceil(PARTS_MAX));
    (0..bytes.div_ceil(part)).map(move |index| index * part..bytes.min((index + 1) * part))
}

/// Hashes in parts, between which other tasks have their turn.
async fn hash_of(content: &[u8]) -> ContentHash {
    let mut hasher = ContentHash::hasher();
    for part in content.chunks(PART_BYTES_MIN as usize) {
        hasher.update(part);
        tokio::task::yield_now().await;
    }
    ContentHash::finish(&hasher)
}

fn transfer_bound(bytes: u64) -> Duration {
    Duration::from_secs_f64(TRANSFER_SECONDS_BASE + bytes as f64 / BYTES_PER_SECOND_MIN)
}
