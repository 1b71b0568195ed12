//! The receiver's side: one blob from any number of holders over several streams.
//!
//! Each stream is a task with its own connection, so that decryption and hashing use several cores; one loop hands
//! out chunks and puts what arrives in its place. Memory is bounded by the blob (or, for files, by nothing of it)
//! plus two chunks a stream.

use super::BlobKey;
use super::file::PartialFile;
use super::pool::Pool;
use super::protocol::{self, ChunkReply, ChunkRequest};
use super::transfer::{Assignment, Blame, Transfer};
use super::tree::{self, ChunkHash};
use crate::connection::{ConnectError, Connection, Receiver, RecvError, SendError, Sender, connect_through};
use crate::identity::Identity;
use crate::limits::{
    BLOB_CHUNKS_MAX, CHUNK_BYTES_MAX, CHUNKS_IN_FLIGHT_MAX, CHUNKS_PER_STREAM_MIN, FETCH_STALL_SECONDS_MAX,
    HOLDERS_MAX, POOL_RETURN_WAIT, RETRY_PAUSE, STREAMS_MAX,
};
use crate::preamble::Purpose;
use crate::proxy::Proxy;
use crate::traffic::Traffic;
use base::{ContentHash, Hint};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

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
    /// Streams to use at most; short blobs use fewer, none more than [`STREAMS_MAX`].
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
struct Client {
    identity: Identity,
    traffic: Traffic,
    stall: Duration,
    proxy: Option<Proxy>,
    pool: Pool,
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
        Self(Arc::new(Client { identity, traffic, stall, proxy, pool: Pool::default() }))
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

    /// Fetches a blob into memory. Dropping the future stops it.
    ///
    /// # Errors
    /// See [`FetchError`]. A returned blob has the expected length and hash.
    pub async fn fetch(&self, request: &BlobRequest) -> Result<Vec<u8>, FetchError> {
        let chunks = check(request)?;
        let mut content = Vec::new();
        content
            .try_reserve_exact(request.bytes as usize)
            .map_err(|_| FetchError::Memory { key: request.key.clone(), bytes: request.bytes })?;
        content.resize(request.bytes as usize, 0);
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
        let streams = Streams {
            client: self.0.clone(),
            request,
            arrivals: arrivals_sender,
            tasks: JoinSet::new(),
            running: HashMap::new(),
            started: 0,
        };
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
    async fn put(&mut self, arrival: Arrival) -> Result<(), FetchError> {
        let Arrival { index, content, hash, .. } = arrival;
        match self {
            Self::Memory(whole) => {
                let start = index as usize * CHUNK_BYTES_MAX;
                whole[start..start + content.len()].copy_from_slice(&content);
                Ok(())
            }
            Self::File { path, partial } => {
                let Some(mut file) = partial.take() else { return Ok(()) };
                let written = blocking(move || file.put(index, &content, &hash).map(|()| file)).await;
                *partial = Some(written.map_err(|source| FetchError::File { path: path.clone(), source })?);
                Ok(())
            }
        }
    }
}

/// A verified chunk.
#[derive(Debug)]
struct Arrival {
    stream: u64,
    index: u64,
    content: Vec<u8>,
    hash: ChunkHash,
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
        useful.min(self.request.streams.clamp(1, STREAMS_MAX) as u64)
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

    async fn arrived(&mut self, arrival: Arrival) -> Result<(), FetchError> {
        let stream = arrival.stream;
        let assignment = self.streams.running.get_mut(&stream).map(|running| &mut running.assignment);
        if self.transfer.arrived(assignment, arrival.index, arrival.hash) {
            self.sink.put(arrival).await?;
        }
        self.fill(stream);
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
        FetchError::Holders { key: self.request.key.clone(), failures }
    }
}

/// The tasks of one fetch. Dropping it aborts them.
struct Streams<'a> {
    client: Arc<Client>,
    request: &'a BlobRequest,
    arrivals: mpsc::Sender<Arrival>,
    tasks: JoinSet<StreamEnd>,
    running: HashMap<u64, Running>,
    started: u64,
}

struct Running {
    assignment: Assignment,
    asks: mpsc::Sender<u64>,
}

#[derive(Debug)]
struct StreamEnd {
    stream: u64,
    result: Result<(), StreamError>,
}

impl Streams<'_> {
    fn start(&mut self, assignment: Assignment) {
        let stream = self.started;
        self.started += 1;
        let (asks, asked) = mpsc::channel(CHUNKS_IN_FLIGHT_MAX);
        let task = StreamTask {
            stream,
            client: self.client.clone(),
            holder: self.request.holders[assignment.holder].clone(),
            key: self.request.key.clone(),
            blob_bytes: self.request.bytes,
            arrivals: self.arrivals.clone(),
        };
        let pause = match assignment.failures_in_row {
            0 => Duration::ZERO,
            failures => RETRY_PAUSE * 2u32.saturating_pow(failures - 1),
        };
        self.tasks.spawn(async move {
            sleep(pause).await;
            StreamEnd { stream, result: task.run(asked).await }
        });
        self.running.insert(stream, Running { assignment, asks });
    }

    /// Lets the streams put their connections back, which takes no network. Those that are still connecting or receiving
    /// a chunk that came from elsewhere are not waited for.
    async fn finish(mut self) {
        self.running.clear();
        let all_back = async { while self.tasks.join_next().await.is_some() {} };
        let _ = timeout(POOL_RETURN_WAIT, all_back).await;
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Recv(#[from] RecvError),
    #[error("no chunk for {0:?}")]
    Stalled(Duration),
    #[error("it does not have it, or not for us")]
    NotFound,
    #[error("it cannot read its copy")]
    Unreadable,
    #[error("its copy has {found} bytes, expected were {expected}")]
    Length { expected: u64, found: u64 },
    #[error("chunk {index} was damaged")]
    Damaged { index: u64 },
    #[error("its reply does not fit the request")]
    Protocol,
    #[error("a kept connection had gone stale: {0}")]
    Stale(Box<StreamError>),
}

impl StreamError {
    fn blame(&self) -> Blame {
        match self {
            Self::Stale(_) => Blame::Nobody,
            Self::NotFound | Self::Length { .. } => Blame::Lasting,
            Self::Connect(ConnectError::Fingerprint { .. } | ConnectError::Preamble { .. }) => Blame::Lasting,
            _ => Blame::Passing,
        }
    }
}

/// One stream: a connection to one holder that is asked for chunk after chunk.
struct StreamTask {
    stream: u64,
    client: Arc<Client>,
    holder: Holder,
    key: BlobKey,
    blob_bytes: u64,
    arrivals: mpsc::Sender<Arrival>,
}

impl StreamTask {
    async fn run(self, asked: mpsc::Receiver<u64>) -> Result<(), StreamError> {
        let (mut connection, kept) = match self.client.pool.take(&self.holder) {
            Some(connection) => (connection, true),
            None => (self.connect().await?, false),
        };
        let mut received = 0;
        match self.exchange(&mut connection, asked, &mut received).await {
            Ok(()) => {
                self.client.pool.put(&self.holder, connection);
                Ok(())
            }
            Err(error @ (StreamError::Send(_) | StreamError::Recv(_) | StreamError::Stalled(_)))
                if kept && received == 0 =>
            {
                Err(StreamError::Stale(Box::new(error)))
            }
            Err(error) => Err(error),
        }
    }

    async fn connect(&self) -> Result<Connection, ConnectError> {
        let Holder { address, fingerprint } = &self.holder;
        let Client { identity, traffic, proxy, .. } = &*self.client;
        connect_through(proxy.as_ref(), identity, traffic, address, *fingerprint, Purpose::Blob).await
    }

    /// Requests go out while replies come in, so that the link is never empty between two chunks.
    async fn exchange(
        &self,
        connection: &mut Connection,
        asked: mpsc::Receiver<u64>,
        received: &mut u64,
    ) -> Result<(), StreamError> {
        let (sender, receiver) = connection.halves();
        let (sent, awaited) = mpsc::channel(CHUNKS_IN_FLIGHT_MAX);
        tokio::try_join!(self.ask(sender, asked, sent), self.take(receiver, awaited, received))?;
        Ok(())
    }

    async fn ask(
        &self,
        sender: &mut Sender,
        mut asked: mpsc::Receiver<u64>,
        sent: mpsc::Sender<u64>,
    ) -> Result<(), StreamError> {
        while let Some(index) = asked.recv().await {
            let request = ChunkRequest { key: self.key.clone(), index };
            sender.send_timeout(&request, self.client.stall).await?;
            if sent.send(index).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn take(
        &self,
        receiver: &mut Receiver,
        mut awaited: mpsc::Receiver<u64>,
        received: &mut u64,
    ) -> Result<(), StreamError> {
        while let Some(index) = awaited.recv().await {
            let stall = self.client.stall;
            let (content, hash) =
                timeout(stall, self.chunk(receiver, index)).await.map_err(|_| StreamError::Stalled(stall))??;
            *received += 1;
            // The fetch is over when nobody receives.
            let _ = self.arrivals.send(Arrival { stream: self.stream, index, content, hash }).await;
        }
        Ok(())
    }

    /// One reply, verified.
    async fn chunk(&self, receiver: &mut Receiver, index: u64) -> Result<(Vec<u8>, ChunkHash), StreamError> {
        let expected = self.blob_bytes;
        let (chunk_bytes, announced) = match receiver.recv().await? {
            ChunkReply::Chunk { blob_bytes: found, .. } | ChunkReply::OutOfRange { blob_bytes: found }
                if found != expected =>
            {
                return Err(StreamError::Length { expected, found });
            }
            ChunkReply::Chunk { chunk_bytes, hash, .. } => (chunk_bytes as usize, hash),
            ChunkReply::NotFound => return Err(StreamError::NotFound),
            ChunkReply::Unreadable => return Err(StreamError::Unreadable),
            ChunkReply::OutOfRange { .. } => return Err(StreamError::Protocol),
        };
        if chunk_bytes != protocol::chunk_bytes(expected, index) {
            return Err(StreamError::Protocol);
        }
        let content = receiver.recv_raw(chunk_bytes).await?;
        let hash = tree::chunk_hash(index, &content, protocol::chunks(expected) == 1);
        match hash == announced {
            true => Ok((content, hash)),
            false => Err(StreamError::Damaged { index }),
        }
    }
}
