//! The receiver's side: one blob from any number of holders over several streams.
//!
//! Each stream is a task with its own connection ([`super::stream`]), so that decryption and hashing use several cores;
//! one loop hands out chunks and puts what arrives in its place. Memory is bounded by the blob (or, for files, by nothing
//! of it) plus three chunks a stream: one arriving, one that waits for its place, one torn or empty.
//!
//! A fetch begins with the streams it was told to use. Once the link has been measured, it takes as many as the product of
//! bandwidth and delay needs windows, and not more: streams beyond that only lose packets to each other in the queue.

use super::BlobKey;
use super::file::PartialFile;
use super::pool::Pool;
use super::protocol;
use super::stream::{Arrival, StreamEnd, Streams};
use super::transfer::Transfer;
use crate::identity::Identity;
use crate::limits::{
    BLOB_CHUNKS_MAX, CHUNK_BYTES_MAX, CHUNKS_IN_FLIGHT_MAX, CHUNKS_PER_STREAM_MIN, FETCH_STALL_SECONDS_MAX,
    HOLDERS_MAX, STREAM_WINDOW_BYTES, STREAMS_MAX,
};
use crate::link::{LinkEstimate, LinkPath, Links};
use crate::proxy::Proxy;
use crate::traffic::Traffic;
use base::{ContentHash, Hint};
use std::collections::TryReserveError;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// A place that holds a blob.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    /// `host:port`.
    pub address: String,
    /// Its fingerprint, which is pinned.
    pub fingerprint: ContentHash,
}

/// What to fetch, and what it must be.
#[derive(Debug, Clone)]
pub struct BlobRequest {
    /// Its name.
    pub key: BlobKey,
    /// Its length.
    pub bytes: u64,
    /// The longest blob the caller is ready to take, whatever was announced.
    pub bytes_max: u64,
    /// BLAKE3 of the whole.
    pub hash: ContentHash,
    /// Where it is; at most [`HOLDERS_MAX`].
    pub holders: Vec<Holder>,
    /// Streams to begin with; short blobs use fewer, links that are long and fat get more, up to [`STREAMS_MAX`].
    pub streams: usize,
}

/// Why a blob was not fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Longer than the caller accepts.
    #[error("{key} has {bytes} bytes; at most {bytes_max} are accepted")]
    TooLong {
        /// Which blob.
        key: BlobKey,
        /// Its announced length.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// No memory for it.
    #[error("no memory for the {bytes} bytes of {key}")]
    Memory {
        /// Which blob.
        key: BlobKey,
        /// Its length.
        bytes: u64,
    },
    /// No holder gave all of it.
    #[error("{key} could not be fetched: {}", describe(failures))]
    Holders {
        /// Which blob.
        key: BlobKey,
        /// Address and last failure of each holder that failed.
        failures: Vec<(String, String)>,
        /// Chunks that did not come; the others are kept where the blob was to go to a file.
        missing_chunks: u64,
    },
    /// All chunks came, and they are not the blob.
    #[error("{key} has hash {found}, expected was {expected}")]
    Hash {
        /// Which blob.
        key: BlobKey,
        /// What it should be.
        expected: ContentHash,
        /// What came.
        found: ContentHash,
    },
    /// Another process fetches the same file.
    #[error("another process is fetching '{}'", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot write '{}': {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn describe(failures: &[(String, String)]) -> String {
    match failures {
        [] => "nobody holds it".to_owned(),
        _ => failures.iter().map(|(address, reason)| format!("{address}: {reason}")).collect::<Vec<_>>().join("; "),
    }
}

impl Hint for FetchError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::TooLong { .. } => "compare run.toml on both sides: the models differ in size".to_owned(),
            Self::Memory { .. } => "free memory on this machine: `free -h` shows what there is".to_owned(),
            Self::Holders { .. } => "see with `beringia status` which sites are up, and start them again".to_owned(),
            Self::Hash { .. } => {
                "start again; if it stays, the holder's copy is damaged: fetch from another site".to_owned()
            }
            Self::Busy { .. } => "let the other process finish or stop it: `pgrep -a beringia`".to_owned(),
            Self::File { path, .. } => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
                format!("make room or give the right to write: `df -h '{0}'; ls -ld '{0}'`", folder.display())
            }
        })
    }
}

/// Fetches blobs and keeps its connections open between fetches. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BlobClient(Arc<Client>);

#[derive(Debug)]
pub(super) struct Client {
    pub(super) identity: Identity,
    pub(super) traffic: Traffic,
    pub(super) stall: Duration,
    pub(super) pool: Pool,
    pub(super) proxy: Option<Proxy>,
    pub(super) links: Links,
}

impl BlobClient {
    /// A client whose bytes count in `traffic`.
    pub fn new(identity: Identity, traffic: Traffic) -> Self {
        Self::with_stall(identity, traffic, Duration::from_secs(FETCH_STALL_SECONDS_MAX))
    }

    /// A client that gives up a stream after that long without a whole chunk.
    pub fn with_stall(identity: Identity, traffic: Traffic, stall: Duration) -> Self {
        Self::configured(identity, traffic, stall, None)
    }

    /// A client that dials through a proxy, if there is one.
    pub fn through(proxy: Option<Proxy>, identity: Identity, traffic: Traffic) -> Self {
        Self::configured(identity, traffic, Duration::from_secs(FETCH_STALL_SECONDS_MAX), proxy)
    }

    fn configured(identity: Identity, traffic: Traffic, stall: Duration, proxy: Option<Proxy>) -> Self {
        let (pool, links) = (Pool::default(), Links::default());
        Self(Arc::new(Client { identity, traffic, stall, proxy, pool, links }))
    }

    /// Bytes of all its connections.
    pub fn traffic(&self) -> &Traffic {
        &self.0.traffic
    }

    /// Open connections that no fetch is using.
    pub fn idle_connections(&self) -> usize {
        self.0.pool.len()
    }

    /// Closes the connections that no fetch is using.
    pub fn close_idle(&self) {
        self.0.pool.clear();
    }

    /// What is known of the link to a holder, from what was fetched from it.
    pub fn link(&self, holder: &Holder) -> Option<LinkEstimate> {
        self.0.links.estimate(holder)
    }

    /// Every holder that was asked for something, with what is known of its link and the way of its newest connection.
    pub fn links(&self) -> Vec<(Holder, LinkEstimate, Option<LinkPath>)> {
        self.0.links.all()
    }

    /// Fetches a blob into memory. Dropping the future stops it.
    ///
    /// # Errors
    /// See [`FetchError`]. A returned blob has the expected length and hash.
    pub async fn fetch(&self, request: &BlobRequest) -> Result<Vec<u8>, FetchError> {
        let chunks = check(request)?;
        let content = zeroed(request.bytes as usize)
            .map_err(|_| FetchError::Memory { key: request.key.clone(), bytes: request.bytes })?;
        let transfer =
            Transfer::new(request.bytes, vec![None; chunks as usize], request.holders.len().min(HOLDERS_MAX));
        match self.run(request, transfer, Sink::Memory(content)).await? {
            (Sink::Memory(content), found) if found == request.hash => Ok(content),
            (_, found) => Err(hash_mismatch(request, found)),
        }
    }

    /// Fetches a blob into a file, which gets its name only when it is complete and verified. What arrived before an
    /// interruption is verified and used.
    ///
    /// # Errors
    /// See [`FetchError`].
    pub async fn fetch_to_file(&self, request: &BlobRequest, path: &Path) -> Result<(), FetchError> {
        check(request)?;
        let file_error = |source| FetchError::File { path: path.to_owned(), source };
        let (owned, expected, bytes) = (path.to_owned(), request.hash, request.bytes);
        let opened = blocking(move || PartialFile::open(&owned, expected, bytes)).await;
        let (partial, here) = opened.map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => FetchError::Busy { path: path.to_owned() },
            _ => file_error(source),
        })?;
        let transfer = Transfer::new(request.bytes, here, request.holders.len().min(HOLDERS_MAX));
        let sink = Sink::File { path: path.to_owned(), partial: Some(partial) };
        let (Sink::File { partial: Some(partial), .. }, found) = self.run(request, transfer, sink).await? else {
            unreachable!("a file sink comes back with its file");
        };
        if found != request.hash {
            blocking(move || partial.discard()).await.map_err(file_error)?;
            return Err(hash_mismatch(request, found));
        }
        blocking(move || partial.finish()).await.map_err(file_error)
    }

    /// Fetches all that is missing; returns the sink and the hash of the whole.
    async fn run(
        &self,
        request: &BlobRequest,
        transfer: Transfer,
        sink: Sink,
    ) -> Result<(Sink, ContentHash), FetchError> {
        let (arrivals_sender, arrivals) = mpsc::channel(STREAMS_MAX);
        let streams = Streams::new(self.0.clone(), request, arrivals_sender);
        Fetch { request, transfer, sink, streams, arrivals }.run().await
    }
}

/// Refuses what the caller does not want before anything is allocated; returns the number of chunks.
fn check(request: &BlobRequest) -> Result<u64, FetchError> {
    let bytes_max = request.bytes_max.min(BLOB_CHUNKS_MAX * CHUNK_BYTES_MAX as u64);
    if request.bytes > bytes_max {
        return Err(FetchError::TooLong { key: request.key.clone(), bytes: request.bytes, bytes_max });
    }
    Ok(protocol::chunks(request.bytes))
}

/// Zeros, from pages that the system clears when they are first touched: writing 500 MB of zeros before the first request
/// kept the link idle for half a second. That there is room is found out by asking for it once before, which touches nothing.
fn zeroed(bytes: usize) -> Result<Vec<u8>, TryReserveError> {
    Vec::<u8>::new().try_reserve_exact(bytes)?;
    Ok(vec![0; bytes])
}

fn hash_mismatch(request: &BlobRequest, found: ContentHash) -> FetchError {
    FetchError::Hash { key: request.key.clone(), expected: request.hash, found }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// Where chunks go.
#[derive(Debug)]
enum Sink {
    Memory(Vec<u8>),
    /// The file is away only while it is written to.
    File {
        path: PathBuf,
        partial: Option<PartialFile>,
    },
}

impl Sink {
    async fn put(&mut self, arrival: &mut Arrival) -> Result<(), FetchError> {
        match self {
            Self::Memory(whole) => {
                let start = arrival.index as usize * CHUNK_BYTES_MAX;
                whole[start..start + arrival.content.len()].copy_from_slice(&arrival.content);
                Ok(())
            }
            Self::File { path, partial } => {
                let Some(mut file) = partial.take() else { return Ok(()) };
                let (index, hash, content) = (arrival.index, arrival.hash, std::mem::take(&mut arrival.content));
                let written = blocking(move || file.put(index, &content, &hash).map(|()| (file, content))).await;
                let (file, content) = written.map_err(|source| FetchError::File { path: path.clone(), source })?;
                (*partial, arrival.content) = (Some(file), content);
                Ok(())
            }
        }
    }
}

/// The loop of one fetch.
struct Fetch<'a> {
    request: &'a BlobRequest,
    transfer: Transfer,
    sink: Sink,
    streams: Streams<'a>,
    arrivals: mpsc::Receiver<Arrival>,
}

impl Fetch<'_> {
    async fn run(mut self) -> Result<(Sink, ContentHash), FetchError> {
        for _ in 0..self.streams_wanted() {
            self.start_stream();
        }
        self.fill_all();
        while self.transfer.missing() > 0 {
            if self.streams.tasks.is_empty() {
                // What the last stream had delivered before it failed still counts, for a resumption if not for now.
                let Ok(arrival) = self.arrivals.try_recv() else { return Err(self.holders_failed()) };
                self.arrived(arrival).await?;
                continue;
            }
            tokio::select! {
                biased;
                Some(arrival) = self.arrivals.recv() => self.arrived(arrival).await?,
                Some(ended) = self.streams.tasks.join_next() => self.ended(ended),
            }
        }
        let found = self.transfer.root().ok_or_else(|| self.holders_failed())?;
        self.streams.finish().await;
        Ok((self.sink, found))
    }

    fn streams_wanted(&self) -> u64 {
        let useful = self.transfer.missing().div_ceil(CHUNKS_PER_STREAM_MIN);
        let wanted = self.request.streams.max(streams_to_fill(self.streams.bandwidth_delay_bytes()));
        useful.min(wanted.clamp(1, STREAMS_MAX) as u64)
    }

    fn start_stream(&mut self) {
        if let Some(assignment) = self.transfer.assign() {
            self.streams.start(assignment);
        }
    }

    /// Asks for chunks until the stream has its number of them in flight: fewer towards the end, so that what is left
    /// goes to the streams that turn out to be fast.
    fn fill(&mut self, stream: u64) {
        let half_share = self.transfer.missing() as usize / (2 * self.streams.running.len().max(1));
        let ahead = half_share.clamp(2, CHUNKS_IN_FLIGHT_MAX);
        let Some(running) = self.streams.running.get_mut(&stream) else { return };
        while running.assignment.in_flight() < ahead {
            let Some(index) = self.transfer.take(&mut running.assignment) else { return };
            // There is room for every chunk in flight; a stream that has ended is noticed when it is joined.
            let _ = running.asks.try_send(index);
        }
    }

    async fn arrived(&mut self, mut arrival: Arrival) -> Result<(), FetchError> {
        let stream = arrival.stream;
        let assignment = self.streams.running.get_mut(&stream).map(|running| &mut running.assignment);
        if self.transfer.arrived(assignment, arrival.index, arrival.hash) {
            self.sink.put(&mut arrival).await?;
        }
        self.streams.buffers.recycle(arrival.content);
        self.fill(stream);
        if (self.streams.running.len() as u64) < self.streams_wanted() {
            self.start_stream();
            self.fill_all();
        }
        Ok(())
    }

    /// A stream failed: what it had goes to the others, and another one takes its place.
    fn ended(&mut self, ended: Result<StreamEnd, tokio::task::JoinError>) {
        // A task that panicked left no number; the others go on, and without any the fetch ends in an error.
        let Ok(StreamEnd { stream, result: Err(error) }) = ended else { return };
        if let Some(running) = self.streams.running.remove(&stream) {
            self.transfer.failed(running.assignment, error.blame(), error.to_string());
        }
        self.start_stream();
        self.fill_all();
    }

    fn fill_all(&mut self) {
        let streams: Vec<u64> = self.streams.running.keys().copied().collect();
        streams.into_iter().for_each(|stream| self.fill(stream));
    }

    fn holders_failed(&self) -> FetchError {
        let address = |index: usize| self.request.holders[index].address.clone();
        let failures = self.transfer.failures().map(|(index, reason)| (address(index), reason.to_owned())).collect();
        FetchError::Holders { key: self.request.key.clone(), failures, missing_chunks: self.transfer.missing() }
    }
}

/// Streams whose windows together hold the product of bandwidth and delay.
fn streams_to_fill(bandwidth_delay_bytes: Option<f64>) -> usize {
    // A conversion to integer saturates: a nonsensical product asks for the most there is.
    bandwidth_delay_bytes.map_or(1, |product| (product / STREAM_WINDOW_BYTES as f64).ceil() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_fat_link_gets_the_streams_that_its_product_needs() {
        let megabits_ms = |megabits: f64, ms: f64| streams_to_fill(Some(megabits * 1e6 / 8.0 * ms / 1e3));
        assert_eq!(streams_to_fill(None), 1);
        assert_eq!((megabits_ms(20.0, 50.0), megabits_ms(1_000.0, 1.0)), (1, 1));
        // 1 Gbit/s over 100 ms are 12.5 MB: 6 windows of 2 MiB.
        assert_eq!((megabits_ms(1_000.0, 50.0), megabits_ms(1_000.0, 100.0)), (3, 6));
        assert!(megabits_ms(f64::INFINITY, 100.0) > STREAMS_MAX);
    }
}
